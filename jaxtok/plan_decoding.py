"""What a decoding step would take on a TPU that one does not have, and what its cache needs: `jaxtok plan --decode`.

The engine's own step is compiled ahead of time, as `jaxtok.plan` compiles a training step: plain, with drafts of
several widths, and with each evictor. Memory and the cycles of each operation are the compiler's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from jaxtok.decoding import CachedTokens, Engine, PromptLookup, Sampling, TokenRecycling, parse_evictor
from jaxtok.decoding.scorers import EVICTORS
from jaxtok.lm.decoder import DecoderConfig, init_params
from jaxtok.plan import Row, chip_of, compile_for, memory_of, topology_devices
from jaxtok.training.compiled import read_program

WIDTHS = (8, 32, 65)
"""Tokens of a chain that a step verifies."""


def plan_decoding(
    model: DecoderConfig,
    topology: str = "v5e:1x1",
    *,
    name: str = "",
    rows: int = 1,
    prompt: int = 2048,
    new: int = 128,
    keep: float = 0.5,
    output: Path | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Compiles decoding steps for a chip that is not there, in bfloat16; prints and returns what they would take.

    Args:
      model: the language model, whose parameters are on one chip.
      topology: CHIP:AxB, whose first chip is used.
      name: what the table calls the model.
      rows: the rows of the batch.
      prompt, new: the tokens that the cache has room for.
      keep: the part of the prompt that the evictors keep.
      output: a JSON file into which the rows are also written.
      quiet: print nothing.

    Raises:
      ValueError: the model is no decoder, the topology is unknown, the compiler is not installed, or the tokens exceed
        the model's context.
    """
    if not isinstance(model, DecoderConfig):
        raise ValueError(
            f"the model is a {type(model).__name__}; decoding is planned for decoders, such as llama-2-7b."
        )
    if rows < 1 or prompt < 1 or new < 1 or prompt + new > model.max_length:
        raise ValueError(
            f"rows is {rows}, prompt {prompt} and new {new}; each must be at least 1, and prompt and new together at "
            f"most the model's max_length = {model.max_length}."
        )
    device = topology_devices(topology)[0]
    chip = chip_of([device])
    if not chip.peak:
        raise ValueError(f"the topology is {topology}; decoding is planned for TPUs, whose compiler tells times.")
    jax.config.update("jax_enable_compilation_cache", False)  # the cache cannot keep such programs
    model = dataclasses.replace(model, dtype="bfloat16", param_dtype="bfloat16")
    module = model.module()
    found: list[Row] = []
    for work, engine in _engines(module, prompt, new, keep):
        compiled, text, cache = _compiled(engine, rows, prompt, new, device)
        operations, needed = read_program(text).operations, memory_of(compiled)
        found.append(
            {
                "model": name,
                "chip": device.device_kind,
                "rows": rows,
                "work": work,
                "tokens": engine.nodes,
                "cache_gigabytes": cache / 1e9,
                "hbm_gigabytes": needed / 1e9,
                "fits": needed <= chip.hbm,
                "milliseconds": 1e3 * sum(chip.seconds(operation) for operation in operations),
            }
        )
    for row in found:
        row["times_plain"] = row["milliseconds"] / found[0]["milliseconds"]
    if output:
        output.write_text(json.dumps(found, indent=2) + "\n")
    console = rich.console.Console(quiet=quiet, soft_wrap=True)
    console.print(_table(found, f"{name}: a decoding step after {prompt} tokens, {rows} rows, {device.device_kind}"))
    console.print(NOTE, highlight=False)
    return found


NOTE = """\
Memory and the time of operations are the TPU compiler's own estimates. Nothing was run. A step that evicts counts the
eviction whole; how many tokens a step gives is measured elsewhere (`jaxtok bench --what decoding`)."""


def _engines(module: Any, prompt: int, new: int, keep: float) -> Iterator[tuple[str, Engine]]:
    plain = Engine(model=CachedTokens(module), chooser=Sampling(temperature=0))
    yield "plain", plain
    for width in WIDTHS:
        yield f"a chain of {width} tokens", dataclasses.replace(plain, drafter=PromptLookup(tokens=width - 1))
    tree = TokenRecycling()
    yield f"Token Recycling's tree of {tree.nodes}", dataclasses.replace(plain, drafter=tree)
    for evictor in EVICTORS:
        fitted = parse_evictor(f"{evictor}:{keep}").fit(module, prompt, new)
        yield f"{evictor}, {keep:g} of the prompt", dataclasses.replace(plain, evictor=fitted)


def _compiled(engine: Engine, rows: int, prompt: int, new: int, device: Any) -> tuple[Any, str, int]:
    """The compiled step, its text, and the bytes of its cache."""
    ids = jax.ShapeDtypeStruct((rows, prompt), jnp.int32)
    params = jax.eval_shape(functools.partial(init_params, engine.model.model), jax.random.key(0), ids)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = jax.eval_shape(functools.partial(engine.prefill, new=new), params, ids, lengths)
    sharding = jax.sharding.SingleDeviceSharding(device)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (params, state))
    lowered = jax.jit(engine.step, donate_argnums=1).lower(*given)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.model))
    return *compile_for(lowered, device), cache


def _table(rows: Sequence[Row], title: str) -> rich.table.Table:
    columns = ("step", "tokens read", "cache, GB", "memory, GB", "ms", "times plain", "")
    table = rich.table.Table(*columns, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(
            row["work"],
            str(row["tokens"]),
            f"{row['cache_gigabytes']:.3f}",
            f"{row['hbm_gigabytes']:.2f}",
            f"{row['milliseconds']:.3f}",
            f"{row['times_plain']:.2f}",
            "" if row["fits"] else "does not fit",
        )
    return table
