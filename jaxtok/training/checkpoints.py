"""Checkpoints with Orbax: parameters, optimizer state, position in the data, and config, written in the background.

A run's folder holds config.json and checkpoints/STEP/{params, opt_state, data, meta}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from jaxtok.configuration import from_json, to_json
from jaxtok.protocols import Surgery
from jaxtok.training.distributed import barrier, gather, is_main
from jaxtok.training.experiment import Experiment
from jaxtok.training.logs import write_whole
from jaxtok.training.mesh import Layout, one_device, unboxed
from jaxtok.training.optimizer import OptimizerConfig, averaged_params, converted, make_optimizer, operate

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint holds besides arrays."""

    step: int
    """How many updates there were."""
    stage: int
    """How many of the run's surgeries there were."""
    stage_start: int
    """The step at which this stage, or the schedule of the steps that were added to it, began."""
    task: Any
    """The task at that step; surgeries change it."""
    experiment: Experiment
    data: Any = None
    """The data at that step; surgeries may change them. None, in checkpoints of older versions: the experiment's."""
    elapsed: float = 0.0
    """How many seconds were spent on training."""
    flops: float = 0.0
    """How many model FLOPs were spent on training."""
    schedule_end: int = 0
    """The step at which that schedule ends; 0, as in checkpoints of older versions: at the end of the stage."""

    def __post_init__(self):
        if self.data is None:
            object.__setattr__(self, "data", self.experiment.data)
        if not self.schedule_end:
            object.__setattr__(self, "schedule_end", self.experiment.ends[self.stage])

    @classmethod
    def saved_before(cls, fields: dict[str, Any]) -> tuple[type[Meta], dict[str, Any]]:
        """Returns the fields without the step of the last evaluation, which older versions kept here."""
        return cls, {name: value for name, value in fields.items() if name != "evaluated"}


class Damaged(ValueError):
    """A checkpoint, or a part of one, that is not what was saved."""


class Checkpoints:
    """The checkpoints of one run; a context manager, whose end waits for what is still being written.

    What is restored is compared with checksums of what was saved. The checksums are of values, so they hold for any
    number of processes and any mesh.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory = Path(directory).absolute() / "checkpoints"
        self._keep = keep
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:  # otherwise the exception that is on its way says more
                raise _disk_error(error) from error

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, meta: Meta, params: Any, opt_state: Any = None, data: dict[str, Any] | None = None) -> None:
        """Copies the state to the host and writes it in the background; it appears under its step once it is whole.

        Args:
          meta, params: the model.
          opt_state: the optimizer's state; without it, training starts with a new one.
          data: the state of the training batches of all processes; without it, training starts at the first batch.

        Raises:
          OSError: this checkpoint or the one before it could not be written; the others are as they were.
        """
        arrays = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        document = {"meta": to_json(meta), "data": data, "sums": checksums(arrays)}
        document = json.loads(json.dumps(document))
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items["meta"] = ocp.args.JsonSave(document | {"digest": _digest(document)})
        try:
            self._manager.save(meta.step, args=ocp.args.Composite(**items))
        except Exception as error:
            self._reopen()
            raise _disk_error(error) from error

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
          OSError: as `save`.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._reopen()
            raise _disk_error(error) from error

    def _reopen(self) -> None:
        """Opens the folder anew after a failed save, which removes what was half written."""
        with contextlib.suppress(Exception):
            self._manager.close()
        self._open()

    def meta(self, step: int) -> Meta:
        try:
            return from_json(self._document(step)["meta"])
        except Damaged:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"its metadata cannot be read ({error})") from error

    def params(self, step: int, abstract: Any) -> Any:
        """Returns the parameters, in the shapes and shardings of `abstract`. Raises `Damaged`."""
        return self._arrays(step, "params", abstract)

    def opt_state(self, step: int, config: OptimizerConfig, params: Any, layout: Layout | None = None) -> Any | None:
        """Returns the optimizer's state as `config` keeps it; None if it was not saved. Raises `Damaged`.

        Args:
          config: the optimizer; the state may have been saved with another choice of `master_weights`.
          params: the parameters of the step.
          layout: where the state is to be; default: on one device.
        """
        names = self._document(step)["sums"]
        mastered = any(name.startswith(("opt_state/master/", "opt_state/state/master/")) for name in names)
        wanted, saved = (
            abstract_opt_state(make_optimizer(dataclasses.replace(config, master_weights=choice)), params, layout)
            for choice in (config.master_weights, mastered)
        )
        state = self._arrays(step, "opt_state", saved)
        if state is None or jax.tree.structure(wanted) == jax.tree.structure(saved):
            return state
        shardings = jax.tree.map(lambda x: x.sharding, wanted)
        return jax.jit(functools.partial(converted, config), out_shardings=shardings)(state, params)

    def data(self, step: int) -> dict[str, Any] | None:
        """Returns the state of the training batches; None if it was not saved. Raises `Damaged`."""
        return self._document(step)["data"]

    def newest(self, read: Callable[[int], T]) -> tuple[T | None, dict[int, str]]:
        """Returns what `read` returns for the newest whole step, and the newer, damaged steps with their errors.

        A step is whole if no process finds any damage. The value is None if there is no checkpoint. If another process
        trains the run, it may save new steps and remove the one that is being read; then the search begins again.

        Raises:
          Damaged: there are checkpoints, but none is whole.
        """
        damaged: dict[int, str] = {}
        steps = newest = self.steps()
        while steps:
            step, *steps = steps
            value, error = None, ""
            try:
                value = read(step)
            except Damaged as damage:
                error = str(damage)
            error = next((e for e in gather(error) if e), "")
            if not error:
                return value, damaged
            self._manager.reload()
            listed = gather(self.steps())[0]
            if listed[:1] > newest[:1]:
                steps, newest, damaged = listed, listed, {}
            else:
                damaged[step] = error
        if damaged:
            listed = "; ".join(f"{step}: {error}" for step, error in damaged.items())
            raise Damaged(
                f"none of the checkpoints in {self.directory} is whole ({listed}). "
                "Restore one of them from a copy, or choose another --workdir to start again."
            )
        return None, {}

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint to the run's folder `damaged`."""
        target = self.directory.parent / "damaged" / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        barrier("set aside")
        if is_main():
            target.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        barrier("was set aside")
        self._manager.reload()
        return target

    def _document(self, step: int) -> dict[str, Any]:
        try:
            document = json.loads((self.directory / str(step) / "meta" / "metadata").read_text())
            digest = document.pop("digest")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Damaged(f"its metadata cannot be read ({_first_line(error)})") from error
        if digest != _digest(document):
            raise Damaged("its metadata is not what was saved")
        return document

    def _arrays(self, step: int, item: str, abstract: Any) -> Any | None:
        sums = {name: n for name, n in self._document(step)["sums"].items() if name.split("/")[0] == item}
        if not sums:
            return None
        tree, problem = None, ""
        try:
            tree = _read(self.directory / str(step) / item, abstract)
        except Exception as error:  # Orbax and TensorStore have no error of their own for it
            problem = _first_line(error)
        if problem := next((text for text in gather(problem) if text), ""):  # each process reads other parts
            raise Damaged(f"its {item} cannot be read ({problem})")
        restored = checksums({item: tree})
        if changed := [name for name in sums if restored.get(name) != sums[name]]:
            raise Damaged(f"{changed[0]} is not what was saved")
        return jax.tree.map(lambda x, like: x.astype(like.dtype), tree, abstract)


def _read(folder: Path, abstract: Any) -> Any:
    """Reads what this process needs of the arrays in a folder, in the precision in which they were saved.

    It waits for no other process, which may have failed.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        # Not by `reader.metadata`, which warns that files of a whole checkpoint are missing.
        saved = {_name(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(handler.metadata(folder).tree)}
        abstract = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, saved.get(_name(path), x.dtype), sharding=x.sharding),
            abstract,
        )
        return reader.restore(folder, args=ocp.args.StandardRestore(abstract))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def checksums(tree: Any) -> dict[str, int]:
    """Returns a number for each array, by its path: the sum of its entries' bits times odd numbers, modulo 2^32."""
    named = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return dict(zip(named, map(int, jax.device_get(_sums(list(named.values()))))))


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". See full")[0][:200]


def _disk_error(error: Exception) -> OSError:
    """Returns what went wrong in writing, which Orbax and TensorStore report in many ways."""
    cause: BaseException | None = error
    texts = []
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    if "No space left" in text or "ENOSPC" in text or "Disk quota" in text:
        return OSError(errno.ENOSPC, "the disk is full")
    return error if isinstance(error, OSError) else OSError(f"a checkpoint could not be written: {_first_line(error)}")


def abstract_params(task: Any, data: Any, layout: Layout | None = None) -> Any:
    """Returns the shapes, dtypes and shardings of a task's parameters, without making them; default: on one device."""
    spec = tuple((name, array.shape, jnp.dtype(array.dtype)) for name, array in data.batch_spec().items())
    boxed = _boxed_params(task, spec, jax.sharding.get_abstract_mesh())
    return with_shardings(unboxed(boxed), (layout or one_device()).params(boxed))


@functools.lru_cache(maxsize=64)  # tracing takes long, and a run is opened several times
def _boxed_params(task: Any, spec: tuple, mesh: Any) -> Any:
    """The shapes of a task's parameters in their boxes. The active mesh is only a part of the key."""

    def init():
        return task.init(jax.random.key(0), {name: jnp.zeros(shape, dtype) for name, shape, dtype in spec})

    with nn.logical_axis_rules(()):  # so that a mesh that does not divide is reported for a parameter
        return jax.eval_shape(init)


def abstract_opt_state(optimizer: optax.GradientTransformation, params: Any, layout: Layout | None = None) -> Any:
    """Returns the same for an optimizer's state; what has the shape of a parameter is sharded as that is."""
    layout = layout or one_device()
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def sharding(path, leaf):  # a moment's path ends with its parameter's
        owners = (by_path.get(path[start:]) for start in range(len(path)))
        owner = next((p for p in owners if p is not None), None)
        return owner.sharding if owner is not None and owner.shape == leaf.shape else layout.replicated

    state = jax.eval_shape(optimizer.init, params)
    return with_shardings(state, jax.tree_util.tree_map_with_path(sharding, state))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def example_batch(data: Any) -> dict[str, jax.Array]:
    """Returns a batch of zeros with the shapes of the data's batches."""
    return {name: jnp.zeros(array.shape, array.dtype) for name, array in data.batch_spec().items()}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that has been read: `loaded.task.module().apply({"params": loaded.params}, tokens)`."""

    meta: Meta
    params: Any
    directory: Path

    @property
    def task(self) -> Any:
        return self.meta.task

    @property
    def data(self) -> Any:
        return self.meta.data

    @property
    def experiment(self) -> Experiment:
        return self.meta.experiment

    def opt_state(self) -> Any | None:
        """Returns the optimizer's state; None if the checkpoint does not have it."""
        with Checkpoints(self.directory) as checkpoints:
            return checkpoints.opt_state(self.meta.step, self.experiment.train.optimizer, self.params)

    def position(self) -> dict[str, Any] | None:
        """Returns the state of the training batches; None if the checkpoint does not have it."""
        with Checkpoints(self.directory) as checkpoints:
            return checkpoints.data(self.meta.step)

    def averaged(self) -> Loaded:
        """Returns it with the moving average in place of the parameters (`OptimizerConfig.ema_decay`).

        Raises:
          ValueError: the run kept none.
        """
        averaged = averaged_params(self.opt_state(), self.params)
        return dataclasses.replace(self, params=jax.tree.map(lambda a, p: a.astype(p.dtype), averaged, self.params))


def find_run(path: str | Path) -> tuple[Path, int | None]:
    """Returns a run's folder and a step, from RUN/checkpoints/STEP, or from the folder itself (None: the newest)."""
    path = Path(path)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parent.parent, int(path.name)
    return path, None


def load(path: str | Path, ema: bool = False) -> Loaded:
    """Reads the newest checkpoint of a run's folder, or the one at RUN/checkpoints/STEP; with `ema`, `averaged`.

    In a run's folder, damaged checkpoints are passed over with a warning.

    Raises:
      FileNotFoundError: there is no checkpoint.
      Damaged: the one that is asked for is damaged, or all of them are.
      ValueError: the run kept no average.
    """
    return _load(path, Loaded.averaged if ema else lambda loaded: loaded)


def _load(path: str | Path, read_all: Callable[[Loaded], T]) -> T:
    """Returns what `read_all` makes of a loaded checkpoint; it reads the rest of what is needed of the same step."""
    run, step = find_run(path)
    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{path} is not a run: it has no folder `checkpoints`; give what `jaxtok train` made.")

    def read(step: int) -> tuple[T, int]:
        meta = checkpoints.meta(step)
        params = checkpoints.params(step, abstract_params(meta.task, meta.data))
        return read_all(Loaded(meta, params, run)), step

    with Checkpoints(run) as checkpoints:
        if step is None:
            found, damaged = checkpoints.newest(read)
            if found is None:
                raise FileNotFoundError(f"{run} holds no finished checkpoint.")
            value, newest = found
            for number, error in damaged.items():
                print(f"{run}/checkpoints/{number} is damaged: {error}; using {newest}", file=sys.stderr)
            return value
        missing = FileNotFoundError(f"{run} holds no finished checkpoint of step {step}.")
        if not (folder := checkpoints.directory / str(step)).is_dir():
            raise missing
        try:
            return read(step)[0]
        except Damaged as error:
            if not folder.is_dir():  # a training run has removed it meanwhile
                raise missing from error
            others = [str(s) for s in checkpoints.steps() if s != step]
            raise Damaged(f"{path} is damaged: {error}. Other steps here: {', '.join(others) or 'none'}.") from error


def write_config(directory: Path, experiment: Experiment) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.json", json.dumps(to_json(experiment), indent=2) + "\n")


def read_config(directory: Path) -> Experiment:
    path = directory / "config.json"
    try:
        return from_json(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or choose another --workdir.") from error


def begin(experiment: Experiment, params: Any) -> Path:
    """Writes step 0 of a run with these parameters into its folder; `train` goes on from there."""
    write_config(experiment.directory, experiment)
    with Checkpoints(experiment.directory) as checkpoints:
        meta = Meta(step=0, stage=0, stage_start=0, task=experiment.task, experiment=experiment)
        checkpoints.save(meta, params)
    return experiment.directory


def fork(
    checkpoint: str | Path,
    output: str | Path,
    *,
    steps: int = 0,
    surgery: Surgery | None = None,
    seed: int = 0,
    **train: Any,
) -> Path:
    """Makes a new run that starts from a checkpoint and at its position in the data, for `train` to go on with.

    Args:
      checkpoint: a run's folder, or RUN/checkpoints/STEP.
      output: the new run's folder, which must not exist.
      steps: the steps of the new run; 0: as many as in the old run's first stage.
      surgery: what changes the model; without one, or with `optimizer = keep`, the optimizer's state is kept.
      seed: the seed of the surgery's new parameters.
      train: other fields of `TrainConfig` to change.

    Raises:
      FileExistsError: the output folder exists already and is not empty.
    """
    output = Path(output)
    must_be_free(output)
    half_done = output.with_name(output.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    keep = surgery is None or surgery.optimizer == "keep"
    loaded, opt_state, position = _load(
        checkpoint, lambda loaded: (loaded, loaded.opt_state() if keep else None, loaded.position())
    )
    task, data, params = loaded.task, loaded.data, loaded.params
    if surgery:
        task, data = surgery.task(task, data)
        like = abstract_params(task, data)
        params, opt_state = operate(surgery, loaded.task, loaded.data, params, opt_state, jax.random.key(seed), like)
    config = dataclasses.replace(loaded.experiment.train, **{"steps": steps or loaded.experiment.train.steps} | train)
    experiment = dataclasses.replace(
        loaded.experiment,
        task=task,
        data=data,
        train=config,
        stages=(),
        start=None,
        name=output.name,
        workdir=str(output),
    )
    start = {"step": 0, "stage": 0, "stage_start": 0, "schedule_end": 0}
    meta = dataclasses.replace(loaded.meta, **start, task=task, experiment=experiment, data=data)
    write_config(half_done, experiment)
    with Checkpoints(half_done) as new:
        new.save(meta, params, opt_state, position if data == loaded.data else None)
    half_done.rename(output)
    return output


def must_be_free(folder: Path) -> None:
    """Raises FileExistsError if the path is a file, or a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; choose another folder (nothing was written).")
