"""What M2R2's exits are worth, beside a head with as many parameters and the logit lens (arXiv 2502.02040)."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jaxtok.decoding import PromptLookup, Sampling, generate
from jaxtok.decoding.m2r2 import (
    M2R2Config,
    SelfSpeculation,
    forward_two_streams,
    generate_early_exit,
    logits_of,
    round_flops,
    route,
    velocity,
)
from jaxtok.door import open_model
from jaxtok.protocols import FROZEN
from jaxtok.studies.comparison import Comparison, key
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.m2r2 import M2R2, AddExits

GREEDY = Sampling(temperature=0)


def _prompts(data: Any, count: int, length: int) -> list[list[int]]:
    """The first tokens of rows of the test split."""
    rows = [row for batch in data.eval_batches("test") for row in np.asarray(batch["tokens"])]
    return [row[:length].tolist() for row in rows[:count]]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Self-speculation against plain decoding of the same prompts, greedy and in batches, beside prompt lookup."""

    gammas: tuple[int, ...] = (3, 5)
    prompts: int = 64
    length: int = 32
    new: int = 64

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        """Returns the share of rows whose text is that of plain decoding, and for each number of drafts the tokens a
        round, those of prompt lookup, and the FLOPs of a round over those of a plain step, a round and a token."""
        model = task.task.module()
        prompts = _prompts(data, self.prompts, self.length)
        run = functools.partial(generate, model, params[FROZEN], prompts, max_new_tokens=self.new, chooser=GREEDY)
        plain, same, numbers = run(), [], {}
        for gamma in self.gammas:
            config = dataclasses.replace(task.config, gamma=gamma)
            found = run(drafter=SelfSpeculation(config=config), drafter_state=params["exits"])
            looked = run(drafter=PromptLookup(tokens=gamma))
            context = self.length + self.new
            tokens, lookup = (sum(map(len, made.tokens)) / sum(made.steps) for made in (found, looked))
            cost = round_flops(config, model, context) / model.config.flops(context)
            numbers |= {
                f"tokens_a_round_{gamma}": tokens,
                f"prompt_lookup_{gamma}": lookup,
                f"round_over_step_{gamma}": cost,
                f"flops_a_token_{gamma}": cost / tokens,
            }
            same += [a == b for a, b in zip(found.tokens, plain.tokens, strict=True)]
        return {"same_text": float(np.mean(same)), **numbers}


@dataclasses.dataclass(frozen=True)
class Routers:
    """How well a gate's scores tell the tokens at which its exit agrees with the model from the others."""

    batches: int = 8

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        """Returns for each gate the area under the ROC curve of the router's score, and of the largest probability."""
        model, config = task.task.module(), task.config

        @jax.jit
        def scores(params, batch):
            where = {"positions": batch["positions"], "segments": batch["segments"]}
            out, _ = forward_two_streams(config, model, params[FROZEN], params["exits"], batch["tokens"], **where)
            best = model.apply({"params": params[FROZEN]}, out.final, method="head").argmax(-1)
            found = []
            for gate, exit in enumerate(out.exits):
                logits = logits_of(model, params[FROZEN], exit.state)
                routed = route(config, params["exits"]["router"], exit, gate)
                found.append((routed, jax.nn.softmax(logits).max(-1), logits.argmax(-1) == best))
            return found

        parts = []
        for batch in dataclasses.replace(data, eval_limit=self.batches).eval_batches("test"):
            counted = np.asarray(batch["mask"]) > 0
            parts.append([[np.asarray(x)[counted] for x in gate] for gate in scores(params, dict(batch))])
        numbers = {}
        for gate, end in enumerate(config.gates):
            routed, likely, agrees = (np.concatenate([part[gate][n] for part in parts]) for n in range(3))
            numbers |= {f"auroc_{end}": area(routed, agrees), f"auroc_confidence_{end}": area(likely, agrees)}
        return numbers


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: how likely a positive's score is above a negative's."""
    positive = positive.astype(bool)
    count, rest = positive.sum(), (~positive).sum()
    if not count or not rest:
        return float("nan")
    ranks = scipy.stats.rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))


@dataclasses.dataclass(frozen=True)
class EarlyExits:
    """Early exit at several thresholds: the mean number of layers, and how often the tokens are the model's own."""

    thresholds: tuple[float, ...] = (0.5, 0.7, 0.9)
    by: str = "router"
    prompts: int = 16
    length: int = 32
    new: int = 64

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        """Returns for each threshold the mean layers of a new token, and the share of tokens that the whole model
        would have chosen after the same text."""
        model, prompts, numbers = task.task.module(), _prompts(data, self.prompts, self.length), {}
        best = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0].argmax(-1))
        for threshold in self.thresholds:
            found = generate_early_exit(
                model,
                params,
                prompts,
                config=task.config,
                threshold=threshold,
                by=self.by,
                max_new_tokens=self.new,
            )
            text = np.array([[*prompt, *new] for prompt, new in zip(prompts, found.tokens, strict=True)])
            own = np.asarray(best(params[FROZEN], jnp.asarray(text[:, :-1])))[:, self.length - 1 :]
            name = f"{self.by}_{threshold:g}"
            numbers[f"layers_{name}"] = found.mean_layers
            numbers[f"same_{name}"] = float(np.mean(own == text[:, self.length :]))
        return numbers


@dataclasses.dataclass(frozen=True)
class Velocity:
    """How the streams move through the layers (`jaxtok.decoding.m2r2.velocity`), on one batch of the test split."""

    def __call__(self, task: Any, params: Any, data: Any) -> dict[str, float]:
        batch = next(iter(data.eval_batches("test")))
        model, config = task.task.module(), task.config
        run = jax.jit(lambda params, tokens: velocity(config, model, params[FROZEN], params["exits"], tokens))
        found = jax.device_get(run(params, jnp.asarray(batch["tokens"])))
        numbers = {f"change_{layer}": x for layer, x in enumerate(found["change"])}
        numbers |= {f"slow_{layer + 1}": x for layer, x in enumerate(found["slow"])}
        if config.exits == "accelerated":
            numbers |= {f"fast_{layer + 1}": x for layer, x in enumerate(found["fast"])}
        return {name: float(x) for name, x in numbers.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitStudy(Comparison):
    """A comparison of exits that also plots how the streams approach the final representation, if it is measured."""

    def run(self) -> bool:
        """Runs the comparison; also writes velocity.png, of the first seed."""
        if not super().run():
            return False
        folder = Path(self.workdir)
        results = json.loads((folder / "results.json").read_text())
        numbers = {arm.name: results[key(arm.name, self.seeds[0])]["test"] for arm in self.arms}
        if curves := {name: test for name, test in numbers.items() if "fast_1" in test}:
            plot_velocity(next(iter(curves.values())), folder / "velocity.png")
        return True


def study_of(
    name: str,
    gates: tuple[int, ...] = (8,),
    *,
    kinds: tuple[str, ...] = ("lens", "head", "accelerated"),
    steps: int = 60,
    length: int = 64,
    batch_size: int = 4,
    corpus: str = "python",
) -> ExitStudy:
    """The study on a pretrained model, such as smollm2: `study_of("smollm2").run()`.

    Args:
      name: what `jaxtok.open` takes.
      gates, kinds: of the exits.
      steps, length, batch_size, corpus: how they are trained.
    """
    model = open_model(name)
    data = dataclasses.replace(model.data, corpus=corpus, length=length, batch_size=batch_size, eval_limit=2)

    def arm(kind: str) -> Experiment:
        config = M2R2Config(gates=gates, rank=16, latent=16, gamma=3, exits=kind)
        lens = kind == "lens"
        optimizer = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup=0.1, weight_decay=0.0)
        return Experiment(
            name=kind,
            task=M2R2(task=model.task, config=config, train="router" if lens else "exits"),
            data=data,
            # The lens has nothing to train but its router; one step, as there is no run without one.
            train=TrainConfig(
                steps=1 if lens else steps, log_every=5, eval_every=0, checkpoint_every=20, optimizer=optimizer
            ),
            mesh=MeshConfig(data=1),
            start=AddExits(config=config),
        )

    per_gate = [f"{what}_{end}" for end in gates for what in ("agreement", "kl", "auroc_confidence")]
    return ExitStudy(
        base=name,
        arms=tuple(map(arm, kinds)),
        measures=(Rounds(gammas=(3,), prompts=8, new=32), Routers(batches=2)),
        columns=(*per_gate, "expected_tokens", "tokens_a_round_3", "flops_a_token_3", "same_text", "prompt_lookup_3"),
        curve=f"agreement_{gates[0]}",
        test_batches=8,
        title=f"Exits of {name}",
        workdir=f"runs/exits_{Path(name).name}",
    )


def plot_velocity(numbers: dict[str, float], path: Path) -> None:
    """Plots cosine(h_i, h_L) and cosine(p_i, h_L) over the layers i."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, label in (("slow", "h, the slow stream"), ("fast", "p, the accelerated stream")):
        layers = sorted(int(key.split("_")[1]) for key in numbers if key.startswith(f"{name}_"))
        axes.plot(layers, [numbers[f"{name}_{layer}"] for layer in layers], marker="o", label=label)
    axes.set_xlabel("layers")
    axes.set_ylabel("cosine with the last state")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
