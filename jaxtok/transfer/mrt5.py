"""Turns ByT5, or any other T5, into MrT5 (arXiv 2410.20771, section 5), with its weights and a new delete gate."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from jaxtok.lm.mrt5 import MrT5Config, MrT5Training, from_t5, new_controller
from jaxtok.lm.t5 import SequenceToSequence, T5Config
from jaxtok.protocols import Data, Params, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5ToMrT5:
    """The surgery after which a T5 deletes tokens. It keeps all weights; the gate, or a baseline's part, is new."""

    to: MrT5Training | None = None
    """The task afterwards, whose model has the T5's sizes (a vocab_size of 0 is the T5's). In `Experiment.start`, None
    means the run's own task."""
    steps: int = 5000
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after the change to MrT5 is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task afterwards. Raises ValueError if the task's model is no T5, or `to` is missing."""
        if not isinstance(task, SequenceToSequence) or isinstance(task.model, MrT5Config):
            raise ValueError(
                f"a {type(task).__name__} with the model {type(task.model).__name__} cannot become an MrT5; it must be "
                "a T5 or a ByT5."
            )
        if self.to is None:
            raise ValueError("to is None; it must be the task after the change from T5 to MrT5 (an MrT5Training).")
        return self._afterwards(task.model), data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        """The parameters afterwards. Raises ValueError if the T5 has other sizes than `to`."""
        to = self._afterwards(task.model)
        params = from_t5(to.model, params, rng)
        return {**params, "controller": new_controller()} if to.target_rate else params, None

    def towards(self, task: Task) -> T5ToMrT5:
        return self if self.to is not None else dataclasses.replace(self, to=task)

    def _afterwards(self, model: T5Config) -> MrT5Training:
        vocab_size = self.to.model.vocab_size or model.vocab_size
        return dataclasses.replace(self.to, model=dataclasses.replace(self.to.model, vocab_size=vocab_size))
