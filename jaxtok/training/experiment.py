"""What one run is: a task, its data, and how it is trained."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from jaxtok.data.text import TextData
from jaxtok.protocols import Surgery
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop's settings."""

    steps: int = 1000
    """The number of updates, or if the run has stages, the number before the first of them. A larger number trains a
    finished run longer (in a run with stages, that of the last one): the steps that are added have a schedule of
    their own, which begins anew with its warm-up."""
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = 1
    """The number of parts into which a batch is cut, and after all of which the update is made: less memory, and the
    update of the whole batch (up to rounding, and what the parts draw by chance)."""
    seed: int = 0
    log_every: int = 10
    """The number of steps between log lines."""
    eval_every: int = 250
    """The number of steps between evaluations; 0: none but the one at the end of every stage."""
    checkpoint_every: int = 250
    """The number of steps between checkpoints; the run is also saved at the end of every stage and when interrupted."""
    save_deadline: float = 0.0
    """The seconds that SIGTERM leaves for saving; after them the process exits unsaved. 0: as long as it takes."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """What happens when the disk has no room for a checkpoint; at the end of a stage, the run always stops, and so do
    several processes."""
    keep_checkpoints: int = 2
    """The number of newest checkpoints that are kept."""
    tensorboard: bool = True
    """Whether numbers are also written for TensorBoard."""

    def __post_init__(self):
        for field in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ValueError(f"train.{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("eval_every", "save_deadline"):
            if getattr(self, field) < 0:
                raise ValueError(f"train.{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.on_full_disk not in ("stop", "continue"):
            raise ValueError(f"train.on_full_disk is {self.on_full_disk!r}; it must be stop or continue.")


MAY_CHANGE = (
    "name",
    "workdir",
    "mesh",
    "start",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "train.tensorboard",
    "train.save_deadline",
    "train.on_full_disk",
    "train.optimizer.master_weights",
)
"""How the names of the fields begin that may differ when a run is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run: `jaxtok train CONFIG` trains it, and resumes it."""

    RENAMED: ClassVar[dict[str, str]] = {"growth": "stages"}

    task: Any
    """What is trained (`jaxtok.protocols.Task`)."""
    data: Any = TextData()
    """What it is trained on (`jaxtok.protocols.Data`): text, images, codes, ..."""
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    """How the devices divide the work; a run can be resumed on another mesh."""
    stages: tuple[Any, ...] = ()
    """The surgeries (`jaxtok.protocols.Surgery`) on the model inside the run, one after the other."""
    start: Annotated[Any, tyro.conf.Suppress] = None  # `train --start` names a model, so that help would be wrong
    """The surgery that makes the first parameters from those of a model of another kind (`jaxtok train --start MODEL`
    names that model)."""
    name: str = "run"
    """The name of the run."""
    workdir: str = ""
    """The folder for checkpoints and logs; empty: runs/NAME."""

    def __post_init__(self):
        if self.data.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}; it must divide data.batch_size = {self.data.batch_size}."
            )
        for name, surgery in [*((f"stages.{n}", s) for n, s in enumerate(self.stages)), ("start", self.start)]:
            if surgery is not None and not isinstance(surgery, Surgery):
                raise ValueError(f"{name} is {surgery!r}; it must be a surgery, such as jaxtok.transfer.growth.Growth.")
        for number, surgery in enumerate(self.stages):
            if self.train.optimizer.ema_decay and surgery.optimizer == "keep":
                raise ValueError(
                    f"train.optimizer.ema_decay is {self.train.optimizer.ema_decay}, but stages.{number} keeps the "
                    "optimizer's state, whose average would be that of the old model; "
                    f"stages.{number}.optimizer must be reset, or ema_decay 0."
                )

    @property
    def directory(self) -> Path:
        return Path(self.workdir or f"runs/{self.name}")

    def fitted(self) -> Experiment:
        """Returns the experiment with its task fitted to the data (`Task.fit`), which are opened for it.

        Raises:
          ValueError: they do not fit, or a stage cannot change the task that it will meet.
        """
        task, data = self.task.fit(self.data, self.train), self.data
        fitted = dataclasses.replace(self, task=task)
        for surgery in self.stages:
            task, data = surgery.task(task, data)
            task.fit(data, self.train)
        return fitted

    @property
    def ends(self) -> tuple[int, ...]:
        """The step at which each stage ends; the first stage is that before the surgeries."""
        return tuple(itertools.accumulate([self.train.steps, *(surgery.steps for surgery in self.stages)]))

    @property
    def total_steps(self) -> int:
        return self.ends[-1]
