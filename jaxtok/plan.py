"""How an experiment would run on a TPU slice or on GPUs that one does not have: `jaxtok plan`.

The real training step is compiled ahead of time by the TPU compiler (libtpu), which needs no TPU. What it says of
memory and of the time of each operation is taken as it is; the rest is estimated by this module, and marked as such:

- collectives: the bytes sent round a ring, divided by the published bandwidth of the links. Those that the compiler
  runs beside other work count only as far as they take longer than all of that work.
- kernels written by hand (attention): their FLOPs, at half of the published peak.

XLA also compiles for GPUs that are not there, from a description of their kind. It tells what memory a step needs and
what the devices exchange, but no times.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table

from jaxtok.kernels.attention import kernel_flops
from jaxtok.training.checkpoints import abstract_params
from jaxtok.training.compiled import Collective, Operation, Program, read_program, shapes
from jaxtok.training.experiment import Experiment
from jaxtok.training.loop import abstract_state, count, make_train_step
from jaxtok.training.mesh import Layout, make_layout
from jaxtok.training.peak import PEAK_FLOPS

SLICES = {
    "v5e-256": "v5e:16x16",
    "v5p-512": "v5p:8x8x4",  # its name counts the two cores of each chip
    "v6e-256": "v6e:16x16",
}
"""Some slices, by the names under which they are rented."""

KERNEL_EFFICIENCY = 0.5
"""The fraction of the peak that is assumed for kernels written by hand."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is published about a chip (or about one of its cores, if each core is a device)."""

    hbm: float
    """The bytes of its memory."""
    links: float
    """The bytes a second that it sends to its neighbours, over all links."""
    cycle_flops: int
    """The FLOPs of its matrix units in a cycle; the clock is taken to be the one at which they reach the peak."""
    peak: float = 0.0
    """The published FLOP/s of bfloat16."""
    torus: tuple[int, ...] = ()
    """The number of chips of the slice along each of its directions."""

    def seconds(self, operation: Operation) -> float:
        """Returns the seconds of an operation, over all times that it runs."""
        if operation.cycles:
            return operation.times * operation.cycles * self.cycle_flops / self.peak
        call = operation.text.split("custom-call(")
        return operation.times * kernel_flops(call[0], shapes(call[-1])) / (self.peak * KERNEL_EFFICIENCY)

    def collective_seconds(self, collective: Collective) -> float:
        """Returns the seconds of a collective; a group no longer than a direction of the torus uses only its links."""
        directions = len(self.torus) or 1
        used = directions if collective.group > max(self.torus, default=1) else 1
        return collective.sent / (self.links * used / directions)


GIB = 2**30
CHIPS = {
    "TPU v4": Chip(32 * GIB, 300e9, 262_144),
    "TPU v5 lite": Chip(16 * GIB, 200e9, 131_072),
    "TPU v5": Chip(95 * GIB, 600e9, 262_144),
    "TPU v6 lite": Chip(32 * GIB, 448e9, 524_288),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What is published about a GPU, as far as XLA asks for it."""

    name: str
    memory: float
    """The bytes of its memory."""
    bandwidth: float
    """The bytes a second of its memory."""
    capability: int
    cores: int
    fpus: int
    shared_memory: int
    """The bytes of a core's shared memory."""
    l2: int
    clock: float
    """The clock rate in GHz."""

    def description(self) -> str:
        """Returns the description that XLA reads (GpuTargetConfigProto)."""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} minor: 0 }}
              core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock}
              device_memory_size: {int(self.memory)} memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{self.name}"
        """


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 2039e9, 8, 108, 64, 167_936, 40 * 2**20, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 3352e9, 9, 132, 128, 233_472, 50 * 2**20, 1.98),
    "h200": Gpu("NVIDIA H200", 141e9, 4800e9, 9, 132, 128, 233_472, 50 * 2**20, 1.98),
}


def chip_of(devices: list[Any]) -> Chip:
    """Returns what one of these devices is."""
    kind = devices[0].device_kind
    for gpu in GPUS.values():
        if gpu.name == kind:
            return Chip(gpu.memory, 0.0, 0)
    if kind not in CHIPS:
        raise ValueError(f"the chip is {kind!r}, which is not known here; use v4, v5e, v5p or v6e.")
    coordinates = np.array([d.coords for d in devices])
    part = len(np.unique(coordinates, axis=0)) / len(devices)  # of a chip: on v4, a half
    torus = tuple(int(n) for n in coordinates.max(0) - coordinates.min(0) + 1 if n > 1)
    chip = CHIPS[kind]
    return Chip(chip.hbm * part, chip.links * part, int(chip.cycle_flops * part), PEAK_FLOPS[kind] * part, torus)


Row = dict[str, Any]


def plan(
    experiment: Experiment,
    topology: str = "v5e-256",
    *,
    sweep: bool = False,
    output: Path | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Compiles the training step for devices that are not there; prints and returns what it would need and take.

    Args:
      experiment: the run, whose mesh must fit the devices.
      topology: CHIP:AxB or CHIP:AxBxC, such as v5e:16x16 or v5p:8x8x4, or one of `SLICES`; or GPU:N or GPU:HOSTSxN,
        such as h100:8.
      sweep: try other meshes and remat policies too, and print the best first.
      output: a JSON file into which the rows are also written.
      quiet: print nothing.

    Raises:
      ValueError: the topology is unknown, the mesh does not fit it, or the compiler is not installed.
    """
    devices = topology_devices(topology)
    jax.config.update("jax_enable_compilation_cache", False)  # the cache cannot keep such programs
    if not getattr(experiment.task.model, "vocab_size", 1):  # otherwise the data need not be there
        experiment = experiment.fitted()
    console = rich.console.Console(quiet=quiet, soft_wrap=True)
    cases = list(variants(experiment, len(devices))) if sweep else [experiment]
    rows: list[Row] = []
    with rich.progress.Progress(
        rich.progress.TextColumn("[bold]{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as progress:
        bar = progress.add_task("compiling", total=len(cases))
        for case in cases:
            progress.update(bar, description=f"compiling {_describe(case, len(devices))}")
            try:
                rows.append(plan_one(case, topology, devices))
            except ValueError as error:
                if not sweep:
                    raise
                rows.append(_head(case, topology, devices) | {"fits": False, "error": str(error)})
            progress.advance(bar)
    rows.sort(key=lambda row: (not row["fits"], row.get("step_seconds", math.inf)))
    if output:
        output.write_text(json.dumps(rows, indent=2) + "\n")
    if sweep:
        console.print(_sweep_table(rows))
    if not sweep or rows[0]["fits"]:
        console.print(_table(rows[0]))
    console.print(NOTE if "seconds" in rows[0] else NOTE_GPU, highlight=False)
    return rows


NOTE = """\
Memory, FLOPs and the time of operations are the TPU compiler's own; the times of collectives (from published link
bandwidth) and of hand-written kernels (at half of peak) are estimates, and so is that of the step. Nothing was run."""


NOTE_GPU = """\
Memory and collectives are the GPU compiler's own; it tells no times. Nothing was run."""


def topology_devices(topology: str) -> list[Any]:
    """Returns the devices of a topology, which need not be there.

    Raises:
      ValueError: the topology is unknown, or its compiler is not installed.
    """
    gpu = topology.split(":")[0]
    return _gpus(topology) if gpu in GPUS else _tpus(topology)


def _gpus(topology: str) -> list[Any]:
    kind, _, size = topology.partition(":")
    if not re.fullmatch(r"(\d+x)?\d+", size):
        raise ValueError(f"the topology is {topology!r}; it must be {kind}:N for N GPUs, or {kind}:HOSTSxN.")
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ValueError("planning for GPUs needs their compiler: pip install jax-cuda12-plugin.")
    from jax.experimental import topologies

    jax.devices()  # JAX finds the plugin when it looks for devices
    hosts = size if "x" in size else f"1x{size}"
    description = GPUS[kind].description()
    return topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=description, topology=f"1x{hosts}"
    ).devices


def _tpus(topology: str) -> list[Any]:
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5e-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU here, so several plans can be made at once
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError("planning needs the TPU compiler: pip install libtpu (Linux on x86-64).") from None
    name = SLICES.get(topology, topology)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise ValueError(
            f"the topology is {topology!r}, unknown to the TPU compiler ({str(error).splitlines()[0][:120]}); use "
            f"CHIP:AxB or CHIP:AxBxC with v4, v5e, v5p or v6e, such as v5e:4x4 or v5p:2x2x4, or {', '.join(SLICES)}; "
            f"or GPU:N with {', '.join(GPUS)}."
        ) from error


def compile_step(experiment: Experiment, layout: Layout) -> tuple[Any, str]:
    """Compiles the training step of an experiment's first stage for the layout's devices; returns it and its text."""
    task, config, data = experiment.task, experiment.train, experiment.data
    shardings = layout.batch(data.batch_spec())
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name])
        for name, array in data.batch_spec().items()
    }
    with layout.active():
        step = make_train_step(task, config, config.steps, data, layout)
        return compile_for(step.lower(abstract_state(task, config, data, layout), batch), layout.mesh.devices.flat[0])


def compile_for(lowered: Any, device: Any) -> tuple[Any, str]:
    """Compiles a lowered function for devices of a kind; returns it and its text.

    For TPUs, the text is what the compiler itself writes: JAX cannot print every program of a newer compiler.
    """
    if device.platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        return compiled, next(Path(folder).glob("*after_codegen.txt")).read_text()


def memory_of(compiled: Any) -> int:
    """Returns the bytes that a compiled program needs on a device: its arguments, its temporaries and itself."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def plan_one(experiment: Experiment, topology: str, devices: list[Any]) -> Row:
    """Returns memory, time and collectives of one training step on each device.

    Raises:
      ValueError: the mesh does not fit.
    """
    chip = chip_of(devices)
    layout = make_layout(experiment.mesh, devices)
    row = _head(experiment, topology, devices)
    start = time.perf_counter()
    try:
        compiled, text = compile_step(experiment, layout)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        needed, available = (float(n) * GIB for n in match.groups()) if match else (math.nan, chip.hbm)
        row |= {"fits": False, "hbm_gigabytes": needed / 1e9, "hbm_of_chip_gigabytes": available / 1e9}
        return row | {"advice": advice(experiment, layout, chip)}
    memory = compiled.memory_analysis()
    program = read_program(text)
    batch = {name: np.broadcast_to(0, array.shape) for name, array in experiment.data.batch_spec().items()}
    flops = experiment.task.flops(batch) / len(devices)
    needed = memory_of(compiled)
    row |= {
        "fits": needed <= chip.hbm,
        "hbm_gigabytes": needed / 1e9,
        "hbm_of_chip_gigabytes": chip.hbm / 1e9,
        "arguments_gigabytes": memory.argument_size_in_bytes / 1e9,
        "temporaries_gigabytes": memory.temp_size_in_bytes / 1e9,
        "model_teraflops": flops / 1e12,
        "collectives": collectives(program, chip),
        "compile_seconds": time.perf_counter() - start,
    }
    if chip.peak:
        seconds: Counter = Counter()
        for operation in program.operations:
            seconds["operations" if operation.cycles else "kernels"] += chip.seconds(operation)
        for collective in program.collectives:
            beside = "overlapped_collectives" if collective.overlapped else "exposed_collectives"
            seconds[beside] += chip.collective_seconds(collective)
        work = seconds["operations"] + seconds["kernels"]
        step = max(work, seconds["overlapped_collectives"]) + seconds["exposed_collectives"]
        row |= {
            "seconds": dict(seconds),
            "step_seconds": step,
            f"{experiment.data.unit}_per_second": experiment.data.units / step,
            "fraction_of_peak": flops / step / chip.peak,
            "largest_costs": largest_costs(program, chip),
        }
    if row["fits"]:
        return row
    return row | {"advice": advice(experiment, layout, chip)}


def largest_costs(program: Program, chip: Chip, most: int = 8) -> dict[str, float]:
    """Returns the seconds of a step by what they are spent on, without collectives, the largest first."""
    seconds: Counter = Counter()
    for operation in program.operations:
        seconds[part_of(operation.source)] += chip.seconds(operation)
    return dict(seconds.most_common(most))


def part_of(source: str) -> str:
    """Returns an operation's part of the step and of the model, from the name that JAX gave it.

    >>> part_of("jit(train_step)/transpose(jvp(Decoder))/Decoder.hidden/stack/while/body/blocks/ffn/dot_general")
    'backward: ffn'
    """
    direction = (
        "recomputed" if "rematted_computation" in source else "backward" if "transpose(" in source else "forward"
    )
    names = re.findall(r"blocks/(attention/(?:query|key|value|output)|attention|\w+)", source)
    if names:
        part = "attention between tokens" if names[-1] == "attention" else names[-1]
    elif "jvp" in source:
        match = re.search(r"Decoder\.(\w+)", source)
        part = match[1] if match else "loss"
    else:
        direction, part = "update", "optimizer"
    return f"{direction}: {part}"


def collectives(program: Program, chip: Chip) -> list[Row]:
    """Returns, by kind, group and overlap, their number, the bytes that a device sends and, on TPUs, their time."""
    rows: dict[tuple, Row] = {}
    for c in program.collectives:
        row = rows.setdefault(
            (c.kind, c.group, c.overlapped),
            {
                "kind": c.kind,
                "devices": c.group,
                "overlapped": c.overlapped,
                "count": 0,
                "gigabytes": 0.0,
            },
        )
        row["count"] += c.times
        row["gigabytes"] += c.sent / 1e9
        if chip.links:
            row["seconds"] = row.get("seconds", 0.0) + chip.collective_seconds(c)
    return sorted(rows.values(), key=lambda row: -row["gigabytes"])


def advice(experiment: Experiment, layout: Layout, chip: Chip) -> list[str]:
    """Returns what to change if the step does not fit."""
    model, train, mesh = experiment.task.model, experiment.train, layout.mesh.shape
    state = abstract_state(experiment.task, train, experiment.data, layout)
    held = sum(_local_bytes(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state)))
    texts = []
    if held > 0.4 * chip.hbm:
        texts.append(
            f"parameters and optimizer state take {held / 1e9:.1f} GB on each device: raise mesh.fsdp (now "
            f"{mesh['fsdp']}) or mesh.tensor (now {mesh['tensor']})"
        )
    if getattr(model, "remat", "full") != "full":
        texts.append(f"task.model.remat = full (now {model.remat}) keeps only the input of each block")
    rows = experiment.data.batch_size // (mesh["data"] * mesh["fsdp"] * train.accumulate)
    if rows > 1:
        texts.append(
            f"each device has {rows} rows at once: train.accumulate = {2 * train.accumulate} halves that without "
            "changing the update, a smaller data.batch_size changes it"
        )
    if not texts or (rows <= 1 and mesh["tensor"] == 1):
        texts.append("mesh.tensor divides each row's activations and its logits; mesh.sequence divides its length")
    return texts


def variants(experiment: Experiment, devices: int) -> Iterator[Experiment]:
    """Yields the experiment with parameters divided 16, 64 and 256 ways (as far as there are devices), parameter tokens
    whole or divided 4 ways, and each remat policy but `none`."""
    policies = ("full", "projections", "dots") if hasattr(experiment.task.model, "remat") else (None,)
    for tensor in (1, 4):
        rest = devices // tensor
        if rest < 4 or rest * tensor != devices:
            continue
        for fsdp in sorted({min(n, rest) for n in (16, 64, 256)}):
            if rest % fsdp or experiment.data.batch_size % rest:
                continue
            mesh = dataclasses.replace(experiment.mesh, data=rest // fsdp, fsdp=fsdp, tensor=tensor, sequence=1)
            for remat in policies:
                task = experiment.task if remat is None else experiment.task.with_model(remat=remat)
                yield dataclasses.replace(experiment, mesh=mesh, task=task)


def remat_of(model: Any) -> str:
    """Returns a model's remat policy, or those of its parts."""
    parts = vars(model).values() if dataclasses.is_dataclass(model) and not hasattr(model, "remat") else (model,)
    return ", ".join(sorted({part.remat for part in parts if hasattr(part, "remat")})) or "none"


def _local_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _head(experiment: Experiment, topology: str, devices: list[Any]) -> Row:
    model = experiment.task.model
    return {
        "name": experiment.name,
        "parameters": count(abstract_params(experiment.task, experiment.data)),
        "topology": topology,
        "devices": len(devices),
        "chip": devices[0].device_kind,
        "mesh": experiment.mesh.shape(len(devices)),
        "remat": remat_of(model),
        "batch_size": experiment.data.batch_size,
        "unit": experiment.data.unit,
        "accumulate": experiment.train.accumulate,
    }


def _describe(experiment: Experiment, devices: int) -> str:
    mesh = " ".join(f"{axis} {n}" for axis, n in experiment.mesh.shape(devices).items() if n > 1)
    return f"{experiment.name}: {mesh or 'one device'}, remat {remat_of(experiment.task.model)}"


def _table(row: Row) -> rich.table.Table:
    table = rich.table.Table(
        show_header=False, box=None, title=f"{row['name']} on {row['topology']}", title_justify="left"
    )
    mesh = ", ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1) or "one device"

    def add(name: str, value: str) -> None:
        table.add_row(name, value)

    add("model", f"{row['parameters'] / 1e6:,.0f}M parameters, {row['batch_size']} rows a step")
    add("mesh", f"{row['devices']} x {row['chip']}: {mesh}; remat {row['remat']}, accumulate {row['accumulate']}")
    verdict = "fits" if row["fits"] else "does not fit"
    add("memory", f"{row['hbm_gigabytes']:.2f} of {row['hbm_of_chip_gigabytes']:.1f} GB on each device: {verdict}")
    if "arguments_gigabytes" in row:
        add("", f"{row['arguments_gigabytes']:.2f} state and batch, {row['temporaries_gigabytes']:.2f} temporaries")
    for text in row.get("advice", ()):
        add("to change", text)
    if "seconds" in row:
        seconds = row["seconds"]
        rate = row[f"{row['unit']}_per_second"]
        add("step", f"{row['step_seconds']:.3f} s (estimate), {rate:,.0f} {row['unit']}/s")
        add(
            "of peak", f"{row['fraction_of_peak']:.2f} ({row['model_teraflops']:.1f} TFLOP of the model on each device)"
        )
        add("", f"{seconds.get('operations', 0):.3f} s operations (the compiler's estimate)")
        add("", f"{seconds.get('kernels', 0):.3f} s attention kernels (estimate)")
        add("", f"{seconds.get('exposed_collectives', 0):.3f} s collectives, alone (estimate)")
        add("", f"{seconds.get('overlapped_collectives', 0):.3f} s collectives, beside operations (estimate)")
        for number, (name, value) in enumerate(row["largest_costs"].items()):
            add("" if number else "largest costs", f"{value:.4f} s {name}")
    for number, c in enumerate(row.get("collectives", ())):
        how = "beside operations" if c["overlapped"] else "alone"
        size = f"{c['gigabytes']:.3f} GB" + (f", {c['seconds']:.4f} s" if "seconds" in c else "") + f" {how}"
        add("" if number else "collectives", f"{c['count']} {c['kind']} of {c['devices']} devices, {size}")
    return table


def _sweep_table(rows: list[Row]) -> rich.table.Table:
    table = rich.table.Table(
        "mesh", "remat", "memory, GB", "step, s", "of peak", "collectives, s", "", title_justify="left"
    )
    for row in rows:
        mesh = " ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1) or "one device"
        if "seconds" in row:
            apart = row["seconds"].get("exposed_collectives", 0), row["seconds"].get("overlapped_collectives", 0)
            numbers = [
                f"{row['step_seconds']:.3f}",
                f"{row['fraction_of_peak']:.2f}",
                f"{apart[0]:.3f} + {apart[1]:.3f}",
            ]
        else:
            numbers = ["", "", ""]
        memory = f"{row['hbm_gigabytes']:.1f}" if "hbm_gigabytes" in row else ""
        table.add_row(
            mesh, str(row["remat"]), memory, *numbers, "" if row["fits"] else row.get("error", "does not fit")
        )
    return table
