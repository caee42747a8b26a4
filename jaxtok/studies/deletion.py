"""Models that delete tokens, continued from one that does not; and measures of them."""

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
from jaxtok.studies.comparison import Comparison
from jaxtok.training import checkpoints
from jaxtok.training.experiment import Experiment
from jaxtok.training.loop import start_from, train
from jaxtok.transfer.mrt5 import T5ToMrT5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued(Comparison):
    """A comparison whose arms all begin with the weights of one model, as MrT5's pre-training does."""

    base: Experiment
    """Trains that model, a ByT5, for each seed. Its rows come in another order than those of the arms."""

    def _signature(self, arm: Experiment, seed: int) -> str:
        of_base = super()._signature(self.base, seed)
        return f"{super()._signature(arm, seed)}-{of_base}"

    def _run_arm(self, arm: Experiment, seed: int) -> dict[str, Any] | None:
        base = self.experiment(self.base, seed)
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, seed=seed + 1))
        experiment = self.experiment(arm, seed)
        if not experiment.directory.exists():
            trained = train(base)
            if trained.interrupted:
                return None
            beginning = dataclasses.replace(experiment, start=T5ToMrT5()).fitted()
            source = Model(task=trained.task, params=trained.params, data=base.data, path=trained.directory)
            checkpoints.begin(beginning, start_from(beginning, source))
        return super()._run_arm(arm, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftDeletion:
    """What the model does where deleted bytes are not taken out, but attended to less, as in training."""

    batches: int = 8

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        if not isinstance(task, MrT5Training):
            return {}
        data = dataclasses.replace(data, eval_limit=self.batches)
        found = task.evaluate(params, data.eval_batches("test"), deletion="soft")
        return {"soft_bits_per_byte": found["bits_per_byte"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSpeed:
    """How many times as fast the encoder is behind a deletion of 50 and 80 %, as the same encoder without a gate.

    On random bytes; where the gate keeps more, the ones with the lowest gates are left out too, at the same cost. The
    three programs take turns, and the medians of their times are compared.
    """

    rows: int = 4
    length: int = 1024
    repeats: int = 5
    model: MrT5Config | None = None
    """Another one than the arm's, with new parameters."""

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
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        return {f"speedup_{name}": medians["whole"] / medians[name] for name in ("50", "80")}


def encoders(task: MrT5Training, params: Any, rows: int, length: int) -> dict[str, Callable[[], jax.Array]]:
    """The encoder without a gate, and with one that deletes 50 and 80 %, of random bytes, as functions to be timed."""
    plain = dataclasses.replace(task.model.plain, softmax1=False)
    whole = jax.jit(functools.partial(init_params, plain))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 259, (rows, length)).astype(np.int32)

    def shortened(part):
        begun, _ = begin(task, params, tokens, jax.random.key(0))
        return finish(task, slots(length, part), params, begun).states

    programs = {str(part): functools.partial(shortened, part) for part in (50, 80)}
    return {"whole": lambda: encode(T5(plain), whole, tokens).states} | programs


def slots(length: int, part: int) -> int:
    """Places that are left where `part` % are deleted."""
    return -(-length * (100 - part) // 100)
