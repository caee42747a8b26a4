"""Training under a SkipDecode schedule (arXiv 2307.02628): a task, and the surgery that makes it of a language model.

The loss is the cross entropy of the tokens after the prompt, with the layers of each position as in generation, all
positions at once (`jaxtok.decoding.skipdecode`). There are no new parameters, and a step costs what one of the model
without the layers that never run does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.data.text import TextData
from jaxtok.decoding.skipdecode import Schedule, SkipDecode
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.nn.losses import text_sums
from jaxtok.protocols import Batch, Data, Params, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipDecoding(LanguageModeling):
    """Trains a decoder under a schedule, on the tokens after the first `schedule.prompt` ones of each document.

    Positions are those of the batch: with `isolate_documents` off, a row is one text with its prompt at the beginning.
    Evaluation counts the same tokens, and generation runs the schedule from the end of each row's own prompt on.
    """

    schedule: Schedule
    full_depth: float = 0.0
    """The share of training steps in which all layers run at all positions."""

    def __post_init__(self):
        self.schedule.check(self.model.num_layers)
        if not 0 <= self.full_depth < 1:
            raise ValueError(f"full_depth is {self.full_depth}; it must be in [0, 1).")

    def module(self) -> SkipDecode:
        return SkipDecode(super().module(), self.schedule)

    def fit(self, data: Data, train: Any = None) -> SkipDecoding:
        """See `jaxtok.lm.fitting.fit_text`; rows must also be longer than the prompt.

        Raises:
          ValueError: as there, or no token of a row follows its prompt.
        """
        fitted = super().fit(data, train)
        if isinstance(data, TextData) and data.length < self.schedule.prompt:
            raise ValueError(
                f"data.length is {data.length}; it must be at least task.schedule.prompt = {self.schedule.prompt}, as "
                "only the tokens after the prompt count."
            )
        return fitted

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        if not self.full_depth:
            nats = self._nats(params, batch, rng)
        else:
            choice, rng = jax.random.split(rng)
            nats = jax.lax.cond(
                jax.random.bernoulli(choice, self.full_depth),
                lambda: LanguageModeling(model=self.model)._nats(params, batch, rng),
                lambda: self._nats(params, batch, rng),
            )
        return text_sums(nats, self.counts(batch), batch["bytes"])

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        return text_sums(self._nats(params, batch), self.counts(batch), batch["bytes"])

    def counts(self, batch: Batch) -> Float[Array, "batch length"]:
        """1 where the target is a token after the prompt, else 0."""
        return batch["mask"] * (jnp.asarray(batch["positions"]) >= self.schedule.prompt - 1)

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: those of all layers that any budget reaches, at every position."""
        rows, length = batch["tokens"].shape
        runs = sum(part.end - part.first for part in self.module().ranges())
        return 3 * rows * length * dataclasses.replace(self.model, num_layers=runs).flops(length)


def without_skipped(task: SkipDecoding, params: Params) -> tuple[SkipDecoding, Params]:
    """The same model without the layers that no budget reaches, which then need no memory, nor does their cache.

    Raises:
      ValueError: layers of the model depend on their number.
    """
    if getattr(task.model, "scale_by_layer", False) or getattr(task.model, "full_layers", ()):
        raise ValueError(
            "the model's layers depend on their number (scale_by_layer, full_layers), so none can be taken out."
        )
    kept = np.concatenate([np.arange(part.first, part.end) for part in task.module().ranges()])
    blocks = jax.tree.map(lambda leaf: leaf[kept], params["stack"]["blocks"])
    return task.with_model(num_layers=len(kept)), {**params, "stack": {**params["stack"], "blocks": blocks}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """The surgery that puts a language model under a schedule, or under another one; parameters stay."""

    schedule: Schedule
    full_depth: float = 0.0
    """See `SkipDecoding`."""
    steps: int = 1000
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps under a schedule is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[SkipDecoding, Data]:
        """The `SkipDecoding` of a language model. Raises ValueError if the task is another."""
        if type(task) not in (LanguageModeling, SkipDecoding):
            raise ValueError(
                f"a {type(task).__name__} cannot be put under a schedule; it must be a LanguageModeling of a decoder."
            )
        options = {"schedule": self.schedule, "full_depth": self.full_depth}
        return SkipDecoding(model=task.model, frozen_tokens=task.frozen_tokens, **options), data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        return params, None

    def towards(self, task: Task) -> SkipLayers:
        """This surgery, with the schedule of the task if it has one."""
        if not isinstance(task, SkipDecoding):
            return self
        return dataclasses.replace(self, schedule=task.schedule, full_depth=task.full_depth)
