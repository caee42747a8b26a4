"""Freezes a language model and gives it an extensible tokenizer (arXiv 2401.07793), a copy of its first layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from jaxtok.lm.extensible import ExtensibleModeling
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.protocols import Data, Params, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddExtensibleTokenizer:
    """The surgery after which a language model stays as it is, and an extensible tokenizer for it learns."""

    to: ExtensibleModeling | None = None
    """The task afterwards, whose language model is replaced by the one that the surgery meets. In `Experiment.start`,
    None means the run's own task."""
    length: int = 0
    """The number of tokens in a row afterwards, which may exceed the language model's context; 0: as many as before."""
    batch_size: int = 0
    """The number of rows in a batch afterwards; 0: as many as before."""
    steps: int = 10_000
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1 or self.length < 0 or self.batch_size < 0:
            raise ValueError(
                f"steps is {self.steps}, length {self.length} and batch_size {self.batch_size}; steps must be at least "
                "1, the others 0 or more."
            )

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task and the data afterwards. Raises ValueError if the task is not that of a language model, or `to` is
        missing."""
        if not isinstance(task, LanguageModeling):
            raise ValueError(
                f"a {type(task).__name__} gets no extensible tokenizer; it must be a language model (an adapter is "
                "merged first)."
            )
        if self.to is None:
            raise ValueError("to is None; it must be the task after the surgery (an ExtensibleModeling).")
        sizes = {name: getattr(self, name) for name in ("length", "batch_size") if getattr(self, name)}
        return self.to.with_model(lm=task), dataclasses.replace(data, **sizes)

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        """The parameters afterwards. Raises ValueError if the language model is no decoder to copy from."""
        return self.task(task, data)[0].start(params, rng), None

    def towards(self, task: Task) -> AddExtensibleTokenizer:
        return self if self.to is not None else dataclasses.replace(self, to=task)
