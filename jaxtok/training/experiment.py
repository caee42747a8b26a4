"""What one run is: a task, its data, and how it is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxtok.data.text import TextData
from jaxtok.lm.growth import Growth
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop's settings."""

    steps: int = 1000
    """Updates (in front of the first growth, if there is one)."""
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

    task: Any
    """Fills the Task waist (`jaxtok.protocols.Task`)."""
    data: Any = TextData()
    """Fills the Data waist (`jaxtok.protocols.Data`): text, or `jaxtok.data.images.ImageData`."""
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    """How the devices divide the work; a run can be resumed on another mesh."""
    growth: tuple[Growth, ...] = ()
    """Growths of the model inside the run, one after the other."""
    name: str = "run"
    workdir: str = ""
    """Where checkpoints and logs go; empty: runs/NAME."""

    def __post_init__(self):
        if self.data.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}, which does not divide "
                f"data.batch_size = {self.data.batch_size}."
            )
        if self.train.optimizer.ema_decay and any(growth.optimizer == "keep" for growth in self.growth):
            raise ValueError(
                f"train.optimizer.ema_decay is {self.train.optimizer.ema_decay}, but a growth keeps the optimizer's "
                "state, in which an average does not grow; choose growth.optimizer = reset, or no average."
            )

    @property
    def directory(self) -> Path:
        return Path(self.workdir or f"runs/{self.name}")

    def fitted(self) -> Experiment:
        """With the task made to fit the data (`Task.fit`), which are opened for it.

        Raises:
          ValueError: they do not fit.
        """
        return dataclasses.replace(self, task=self.task.fit(self.data, self.train))

    @property
    def total_steps(self) -> int:
        return self.train.steps + sum(g.steps for g in self.growth)
