"""What one run is: a task, its data, and how it is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxtok.data.text import TextData
from jaxtok.protocols import Surgery
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop's settings."""

    steps: int = 1000
    """Updates (before the first of the run's stages, if it has some)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = 1
    """Parts into which a batch is cut, with their gradients averaged: less memory, the same update."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    """Also evaluates at the end of every stage; 0: only there."""
    checkpoint_every: int = 250
    """Also saves at the end of every stage and when interrupted."""
    save_deadline: float = 0.0
    """Seconds that SIGTERM leaves for saving, behind which the process leaves without; 0: as long as it takes."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """Where a checkpoint does not fit; the one at the end of a stage has to. Several processes always stop."""
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self):
        for field in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ValueError(f"train.{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("eval_every", "save_deadline"):
            if getattr(self, field) < 0:
                raise ValueError(f"train.{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.on_full_disk not in ("stop", "continue"):
            raise ValueError(f"train.on_full_disk is {self.on_full_disk!r}; it can be stop, continue.")


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
)
"""Beginnings of the names of fields that may differ when a run is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run: `jaxtok train FILE` trains it and resumes it."""

    RENAMED: ClassVar[dict[str, str]] = {"growth": "stages"}

    task: Any
    """Fills the Task waist (`jaxtok.protocols.Task`)."""
    data: Any = TextData()
    """Fills the Data waist (`jaxtok.protocols.Data`): text, or `jaxtok.data.images.ImageData`."""
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    """How the devices divide the work; a run can be resumed on another mesh."""
    stages: tuple[Any, ...] = ()
    """Surgeries (`jaxtok.protocols.Surgery`) on the model inside the run, one after the other."""
    start: Any = None
    """The surgery that makes the first parameters from another model's (`jaxtok train CONFIG --start MODEL`), where
    that is of another kind."""
    name: str = "run"
    workdir: str = ""
    """Where checkpoints and logs go; empty: runs/NAME."""

    def __post_init__(self):
        if self.data.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}, which does not divide "
                f"data.batch_size = {self.data.batch_size}."
            )
        for name, surgery in [*((f"stages.{n}", s) for n, s in enumerate(self.stages)), ("start", self.start)]:
            if surgery is not None and not isinstance(surgery, Surgery):
                raise ValueError(f"{name} is {surgery!r}; it must be a surgery, such as jaxtok.transfer.growth.Growth.")
        for number, surgery in enumerate(self.stages):
            if self.train.optimizer.ema_decay and surgery.optimizer == "keep":
                raise ValueError(
                    f"train.optimizer.ema_decay is {self.train.optimizer.ema_decay}, but stages.{number} keeps the "
                    f"optimizer's state, in which an average does not change with the model; stages.{number}.optimizer "
                    "must be reset, or the average must be off."
                )

    @property
    def directory(self) -> Path:
        return Path(self.workdir or f"runs/{self.name}")

    def fitted(self) -> Experiment:
        """With the task made to fit the data (`Task.fit`), which are opened for it.

        Raises:
          ValueError: they do not fit, or a stage cannot change the task, now or when its turn comes.
        """
        task, data = self.task.fit(self.data, self.train), self.data
        fitted = dataclasses.replace(self, task=task)
        for surgery in self.stages:
            task, data = surgery.task(task, data)
            task.fit(data, self.train)
        return fitted

    @property
    def total_steps(self) -> int:
        return self.train.steps + sum(surgery.steps for surgery in self.stages)
