"""Checkpoints with Orbax: parameters, optimizer state, place in the data, and the config, written in the background.

A run's folder holds config.json and checkpoints/STEP/{params, opt_state, data, meta}.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxtok.configuration import from_json, to_json
from jaxtok.lm.growth import Growth
from jaxtok.training.experiment import Experiment
from jaxtok.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself."""

    step: int
    """Updates so far."""
    stage: int
    """How many growths of the run's schedule are behind it."""
    stage_start: int
    """The step at which this stage began."""
    task: Any
    """As it was then: growth changes it."""
    experiment: Experiment
    elapsed: float = 0.0
    """Seconds of training so far."""
    flops: float = 0.0
    """Model FLOPs spent on training so far."""


class Checkpoints:
    """The checkpoints of one run; use as a context manager, which waits for what is still being written."""

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory = Path(directory).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, meta: Meta, params: Any, opt_state: Any = None, data: grain.DatasetIterator | None = None) -> None:
        """Copies the state to the host and writes it in the background; it appears under its step once it is whole.

        Without `opt_state` or `data`, training starts these afresh from here.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(to_json(meta))}
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardSave(opt_state)
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data)
        self._manager.save(meta.step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def meta(self, step: int) -> Meta:
        return from_json(self._restore(step, meta=ocp.args.JsonRestore()))

    def params(self, step: int, abstract: Any) -> Any:
        return self._restore(step, params=ocp.args.StandardRestore(abstract))

    def opt_state(self, step: int, abstract: Any) -> Any | None:
        """None if the checkpoint has none."""
        return self._restore(step, opt_state=ocp.args.StandardRestore(abstract))

    def data(self, step: int, iterator: grain.DatasetIterator) -> grain.DatasetIterator:
        """The iterator, moved to where it was, if the checkpoint says so."""
        return self._restore(step, data=grain.checkpoint.CheckpointRestore(iterator)) or iterator

    def _restore(self, step: int, **item: Any) -> Any | None:
        (name,) = item
        if not (self.directory / str(step) / name).is_dir():
            return None
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]


def abstract_params(task: Any, data: Any) -> Any:
    """Shapes and dtypes of a task's parameters, without making them."""
    return jax.eval_shape(lambda: task.init(jax.random.key(0), example_batch(data)))


def example_batch(data: Any) -> dict[str, jax.Array]:
    """A batch of zeros with the shapes of the data's batches."""
    return {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in data.batch_spec().items()}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint as one works with it: `loaded.task.module().apply({"params": loaded.params}, tokens)`."""

    meta: Meta
    params: Any
    directory: Path

    @property
    def task(self) -> Any:
        return self.meta.task

    @property
    def experiment(self) -> Experiment:
        return self.meta.experiment

    def opt_state(self) -> Any | None:
        """The optimizer's state, if the checkpoint has it."""
        abstract = jax.eval_shape(make_optimizer(self.experiment.train.optimizer).init, self.params)
        with Checkpoints(self.directory) as checkpoints:
            return checkpoints.opt_state(self.meta.step, abstract)


def find_run(path: str | Path) -> tuple[Path, int | None]:
    """A run's folder and a step, from the folder itself (the newest step) or from RUN/checkpoints/STEP."""
    path = Path(path)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parent.parent, int(path.name)
    return path, None


def load(path: str | Path) -> Loaded:
    """The newest checkpoint of a run's folder, or the one at RUN/checkpoints/STEP.

    Raises:
      FileNotFoundError: there is none.
    """
    run, step = find_run(path)
    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{path} is not a run: it has no folder `checkpoints`; give what `jaxtok train` made.")
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        if step is None or not (checkpoints.directory / str(step)).is_dir():
            raise FileNotFoundError(f"{run} holds no finished checkpoint{'' if step is None else f' of step {step}'}.")
        meta = checkpoints.meta(step)
        return Loaded(meta, checkpoints.params(step, abstract_params(meta.task, meta.experiment.data)), run)


def write_config(directory: Path, experiment: Experiment) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_json(experiment), indent=2) + "\n")


def read_config(directory: Path) -> Experiment:
    return from_json(json.loads((directory / "config.json").read_text()))


def fork(
    checkpoint: str | Path,
    output: str | Path,
    *,
    steps: int = 0,
    growth: Growth | None = None,
    seed: int = 0,
    **train: Any,
) -> Path:
    """A new run that starts from a checkpoint, with its place in the data: `train` is to go on with it.

    Args:
      checkpoint: a run's folder, or RUN/checkpoints/STEP.
      output: the new run's folder, which must not exist.
      steps: of the new run; default: as many as the old one's first stage.
      growth: applied to the model first; without one, or with `optimizer = keep`, the moments are taken along.
      seed: for the new rows.
      train: further fields of `TrainConfig` to change.

    Raises:
      FileExistsError: there is something in the output folder already.
    """
    output = Path(output)
    must_be_free(output)
    half_done = output.with_name(output.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    loaded = load(checkpoint)
    experiment, task, params = loaded.experiment, loaded.task, loaded.params
    keep = growth is None or growth.optimizer == "keep"
    opt_state = loaded.opt_state() if keep else None
    if growth:
        task, params, opt_state = task.grow(growth, params, opt_state, jax.random.key(seed))
    config = dataclasses.replace(experiment.train, **{"steps": steps or experiment.train.steps} | train)
    experiment = dataclasses.replace(
        experiment, task=task, train=config, growth=(), name=output.name, workdir=str(output)
    )
    meta = dataclasses.replace(loaded.meta, step=0, stage=0, stage_start=0, task=task, experiment=experiment)
    write_config(half_done, experiment)
    with Checkpoints(loaded.directory) as old, Checkpoints(half_done) as new:
        data = old.data(loaded.meta.step, experiment.data.train_batches())
        new.save(meta, params, opt_state, data)
    data.close()
    half_done.rename(output)
    return output


def must_be_free(folder: Path) -> None:
    """Raises FileExistsError if there is something at that place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; choose another folder (nothing was written).")
