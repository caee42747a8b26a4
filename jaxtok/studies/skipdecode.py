"""SkipDecode against early termination, constant skipping and a shallower model (arXiv 2307.02628), at equal layers.

The arms begin with one trained model, and each is tuned under its own schedule for the same number of steps, with all
layers, too. A shallower model is trained and tuned for as many steps. The loss counts only the tokens after the prompt.

    python -m jaxtok.studies.skipdecode smollm2

measures a model that was not tuned under any schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.data.text import TextData
from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.skipdecode import Schedule, solve_budget
from jaxtok.door import open_model
from jaxtok.lm.decoder import init_params
from jaxtok.protocols import Params, add_up
from jaxtok.studies.comparison import Comparison, key, train_once
from jaxtok.training.experiment import Experiment
from jaxtok.training.loop import Result
from jaxtok.transfer.skipdecode import SkipDecoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipStudy(Comparison):
    """A comparison in which arms without a `start` (a shallower model) are trained from the beginning."""

    def run(self) -> bool:
        """Runs the comparison; also writes layers.png: losses against layers, losses by position, and active layers."""
        if not super().run():
            return False
        folder = Path(self.workdir)
        plot(self, json.loads((folder / "results.json").read_text()), folder / "layers.png")
        return True

    def _train(self, arm: Experiment, seed: int) -> Result:
        return super()._train(arm, seed) if arm.start else train_once(self.experiment(arm, seed))

    def _run_arm(self, arm: Experiment, seed: int) -> dict[str, Any] | None:
        """As of the comparison; an arm that starts with the base also has the base's loss under its schedule."""
        result = super()._run_arm(arm, seed)
        if result is not None and arm.start:
            base = open_model(self.experiment(self.base, seed).directory)
            data = dataclasses.replace(self.experiment(arm, seed).data, eval_limit=self.test_batches)
            task = arm.task.fit(data)
            result["test"]["untuned"] = task.evaluate(base.params, data.eval_batches("test"))["loss"]
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Measures the mean number of layers after the prompt, and how many times fewer that is than all of them."""

    def __call__(self, task: Any, params: Params, data: TextData) -> dict[str, float]:
        if not isinstance(task, SkipDecoding):
            return {}
        schedule, count = task.schedule, task.model.num_layers
        budgets = schedule.generated()[:-1]
        least, most = budgets.min().item(), step_flops(task, count)
        each = (most - step_flops(task, least)) / max(count - least, 1)  # FLOPs are a + c n (a test)
        mean = most - each * (count - budgets.mean())
        return {
            "warmup": schedule.warmup,
            "n_max": schedule.max_layers,
            "n_min": schedule.min_layers,
            "layers": schedule.mean_layers(),
            "layer_speedup": count / schedule.mean_layers(),
            "flop_speedup": float(most / mean),
        }


def step_flops(task: SkipDecoding, budget: int, batch: int = 1) -> float:
    """The compiled FLOPs of a step of one token in each row with so many layers, embedding, attention over the planned
    length and head included. The layers are unrolled, as the compiler counts the body of a loop once."""
    schedule, count = task.schedule, task.model.num_layers
    flat = Schedule(
        max_layers=budget,
        min_layers=budget,
        warmup=1 if budget == count else min(schedule.warmup, budget),
        prompt=schedule.prompt,
        length=schedule.length,
        skip="lower" if budget == count else schedule.skip,
    )
    return _step_flops(dataclasses.replace(task.with_model(unroll=count), schedule=flat), batch)


@functools.lru_cache
def _step_flops(task: SkipDecoding, batch: int) -> float:
    model, tokens = task.module(), jnp.zeros((batch, 1), jnp.int32)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), tokens))
    cache = jax.eval_shape(lambda: model.init_cache(batch, task.schedule.length))
    step = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    return step.lower(params, tokens, cache).compile().cost_analysis()["flops"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPosition:
    """Measures the loss in quarters of the planned continuation, and that of the first tokens of the prompt."""

    batches: int = 16
    first: int = 16
    split: Literal["validation", "test"] = "test"

    def __call__(self, task: Any, params: Params, data: TextData) -> dict[str, float]:
        if not isinstance(task, SkipDecoding):
            return {}
        start, quarter = task.schedule.prompt - 1, (task.schedule.length - task.schedule.prompt) // 4
        edges = {f"quarter_{n + 1}": (start + n * quarter, start + (n + 1) * quarter) for n in range(4)}
        edges["first"] = (0, self.first)
        batches = dataclasses.replace(data, eval_limit=self.batches).eval_batches(self.split)
        sums = add_up((_by_position(task, params, batch) for batch in batches), "tokens")
        return {
            name: float(sums["nats"][a:b].sum() / max(sums["tokens"][a:b].sum(), 1)) for name, (a, b) in edges.items()
        }


@functools.partial(jax.jit, static_argnums=0)
def _by_position(task, params, batch):
    nats = task._nats(params, batch)
    places = jax.nn.one_hot(batch["positions"], batch["tokens"].shape[1]) * batch["mask"][..., None]
    return {"nats": jnp.einsum("bl,blp->p", nats, places), "tokens": places.sum((0, 1))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Measures tokens a second of greedy decoding after prompts of real text, in turns with all layers."""

    batches: tuple[int, ...] = (1, 8, 32)
    turns: int = 3
    split: Literal["validation", "test"] = "test"

    def __call__(self, task: Any, params: Params, data: TextData) -> dict[str, float]:
        if not isinstance(task, SkipDecoding):
            return {}
        schedule = task.schedule
        model = task.module()
        few = dataclasses.replace(data, eval_limit=-(-max(self.batches) // data.batch_size))
        rows = np.concatenate([batch["tokens"] for batch in few.eval_batches(self.split)])
        found: dict[str, float] = {}
        for size in self.batches:
            prompts = [row[: schedule.prompt].tolist() for row in np.resize(rows, (size, rows.shape[1]))]
            seconds: dict[str, list[float]] = {"all": [], "scheduled": []}
            for turn, (name, one) in itertools.product(
                range(self.turns + 1), (("all", model.model), ("scheduled", model))
            ):
                began = time.perf_counter()
                generate(one, params, prompts, max_new_tokens=schedule.planned, chooser=Sampling(temperature=0))
                if turn:  # the first one compiles
                    seconds[name].append(time.perf_counter() - began)
            new = size * schedule.planned
            found[f"tokens_per_second_{size}"] = new / min(seconds["scheduled"])
            found[f"speedup_{size}"] = min(seconds["all"]) / min(seconds["scheduled"])
        return found


def plot(study: SkipStudy, results: dict[str, Any], path: Path) -> Path:
    """Plots the loss against the mean number of layers, the loss by position, and the layers of the first schedule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5))
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for arm in study.arms:
        runs = [results[key(arm.name, seed)]["test"] for seed in study.seeds]
        lines.setdefault(arm.name.split(",")[0], []).append((runs[0]["layers"], [run["loss"] for run in runs]))
        quarters = [np.mean([run[f"quarter_{n}"] for run in runs]) for n in range(1, 5)]
        middle.plot(range(1, 5), quarters, marker="o", markersize=3, label=arm.name)
    for kind, points in lines.items():
        layers, losses = zip(*sorted(points))
        means = [np.mean(loss) for loss in losses]
        left.errorbar(layers, means, [(max(loss) - min(loss)) / 2 for loss in losses], marker="o", label=kind)
    left.set_xlabel("mean layers after the prompt")
    left.set_ylabel("nats a token, after tuning")
    middle.set_xlabel("quarter of the continuation")
    middle.set_ylabel("nats a token")
    for axes in (left, middle):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)  # below, as lines fill it
    schedules = [arm.task.schedule for arm in study.arms if isinstance(arm.task, SkipDecoding)]
    drawn = next(s for s in schedules if s.skip == "lower" and s.min_layers < s.max_layers)
    deepest = study.base.task.model.num_layers
    right.imshow(
        drawn.active(drawn.length, deepest).T, aspect="auto", origin="lower", cmap="Blues", interpolation="nearest"
    )
    right.set_xlabel("position")
    right.set_ylabel("layer")
    right.set_title(f"layers that run, {drawn.max_layers} to {drawn.min_layers}", fontsize=9)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def measured(
    name: str,
    speedups: Sequence[float] = (1.25, 1.5, 2.0),
    rows: int = 16,
    speed: Speed = Speed(batches=(1, 8), turns=2),
) -> Iterator[dict[str, Any]]:
    """Yields a row for each schedule of a model by name: its loss without tuning, and how fast it decodes.

    Args:
      name: what `jaxtok.open` takes.
      speedups: the wanted ratios of all layers to the mean number that runs.
      rows: how many rows of 64 and 96 tokens the loss is of.
      speed: how decoding is timed.
    """
    model = open_model(name)
    count = model.task.model.num_layers
    size = {"length": 160, "batch_size": 8, "isolate_documents": False, "whole_documents": False}
    data = dataclasses.replace(model.data, **size, eval_limit=rows // 8)
    for wanted, skip in [(1.0, "lower"), *itertools.product(speedups, ("lower", "top"))]:
        high, low = solve_budget(count, wanted, ratio=1.5)
        schedule = Schedule(max_layers=high, min_layers=low, prompt=64, length=160, skip=skip)
        task = SkipDecoding(model=model.task.model, schedule=schedule)
        row = {"skip": skip, **Layers()(task, model.params, data)}
        row["loss"] = task.evaluate(model.params, data.eval_batches("test"))["loss"]
        yield row | (speed(task, model.params, data) if skip == "lower" and wanted > 1 else {})


if __name__ == "__main__":
    for found in measured(*sys.argv[1:]):
        print(json.dumps({name: x if isinstance(x, str) else round(x, 3) for name, x in found.items()}), flush=True)
