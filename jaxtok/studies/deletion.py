"""Models that delete tokens, continued from one that does not; and measures for them."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtok.lm.mrt5 import MrT5Config, MrT5Training, begin, finish
from jaxtok.lm.t5 import T5, encode, init_params
from jaxtok.model import Model
from jaxtok.studies.comparison import Comparison, train_once
from jaxtok.training import checkpoints
from jaxtok.training.experiment import Experiment
from jaxtok.training.loop import start_from
from jaxtok.transfer.mrt5 import T5ToMrT5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued(Comparison):
    """A comparison whose arms all begin with the parameters of one model, as in MrT5's pre-training."""

    base: Experiment
    """The run that trains that model, a ByT5, for each seed; its rows come in another order than those of the arms."""

    def _signature(self, arm: Experiment, seed: int) -> str:
        of_base = super()._signature(self.base, seed)
        return f"{super()._signature(arm, seed)}-{of_base}"

    def _run_arm(self, arm: Experiment, seed: int) -> dict[str, Any] | None:
        base = self.experiment(self.base, seed)
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, seed=seed + 1))
        experiment = self.experiment(arm, seed)
        if not experiment.directory.exists():
            trained = train_once(base)
            if trained.interrupted:
                return None
            beginning = dataclasses.replace(experiment, start=T5ToMrT5()).fitted()
            source = Model(task=trained.task, params=trained.params, data=base.data, path=trained.directory)
            checkpoints.begin(beginning, start_from(beginning, source))
        return super()._run_arm(arm, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftDeletion:
    """Measures the model with deleted bytes that are not removed but attended to less, as in training."""

    batches: int = 8
    """The number of batches of the test split."""

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        if not isinstance(task, MrT5Training):
            return {}
        data = dataclasses.replace(data, eval_limit=self.batches)
        numbers = task.evaluate(params, data.eval_batches("test"), deletion="soft")
        return {"soft_bits_per_byte": numbers["bits_per_byte"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSpeed:
    """Measures how many times as fast the encoder is with 50 and 80 % deleted as the same encoder without a gate.

    The input is random bytes; if the gate keeps more of them, those with the lowest gates are left out too, at the same
    cost. The three programs take turns, and the medians of their times are compared.
    """

    rows: int = 4
    length: int = 1024
    repeats: int = 5
    model: MrT5Config | None = None
    """The model to time, with new parameters, in place of the arm's."""

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        if not isinstance(task, MrT5Training) or task.model.reduction != "gate":
            return {}
        if self.model is not None:
            task = MrT5Training(model=self.model)
            params = jax.jit(functools.partial(init_params, self.model))(jax.random.key(0))
        programs = encoders(task, params, self.rows, self.length)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(self.repeats + 1):  # the first compiles
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program())
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return {f"speedup_{name}": medians["whole"] / medians[name] for name in ("50", "80")}


def encoders(task: MrT5Training, params: Any, rows: int, length: int) -> dict[str, Callable[[], jax.Array]]:
    """Returns functions to be timed: the encoder of random bytes without a gate, and with 50 and 80 % deleted."""
    plain = dataclasses.replace(task.model.plain, softmax1=False)
    whole = jax.jit(functools.partial(init_params, plain))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 259, (rows, length)).astype(np.int32)

    def shortened(part):
        begun, _ = begin(task, params, tokens, jax.random.key(0))
        return finish(task, slots(length, part), params, begun).states

    programs = {str(part): functools.partial(shortened, part) for part in (50, 80)}
    return {"whole": lambda: encode(T5(plain), whole, tokens).states} | programs


def slots(length: int, part: int) -> int:
    """Returns how many positions are left if `part` % of them are deleted."""
    return -(-length * (100 - part) // 100)
