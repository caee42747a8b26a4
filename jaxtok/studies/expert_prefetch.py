"""Which experts come next: predictions from M2R2's accelerated stream, and what they would save (simulated).

arXiv 2502.02040 loads experts ahead of time, as its early-aligned residual predicts them. Here a small mixture of
experts is trained, then its exits; the predictions of layer i + lead from p and from h before layer i, and from the
experts of the token before, are compared. Times are those of `simulate_expert_prefetch`, not of any hardware.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jaxtyping import Array, Float

from jaxtok.decoding.expert_prefetch import NONE, predict_experts, recall, simulate_expert_prefetch
from jaxtok.decoding.m2r2 import entry, to_gate
from jaxtok.door import open_model
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.norms import Norm
from jaxtok.protocols import FROZEN
from jaxtok.studies.comparison import markdown, print_table, train_once
from jaxtok.training.experiment import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaConfig):
    """A Llama whose MLPs are mixtures of experts, each of `mlp_dim` hidden units."""

    experts: int = 8
    top_k: int = 2
    """The experts of a token, weighted by the softmax of their scores."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k}; it must be between 1 and experts = {self.experts}.")

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        return Mixture(self, name=name) if group == "ffn" else super().projection(group, features, name)

    def projection_params(self) -> int:
        """Those of the experts of one token."""
        expert = 3 * self.d_model * self.mlp_dim
        return super().projection_params() + (self.top_k - 1) * expert + self.d_model * self.experts


class Mixture(nn.Module):
    """The weighted sum of the top_k experts' SwiGLU. All experts are computed, which only small models can afford."""

    config: MixtureConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_model"], deterministic: bool = True) -> Float[Array, "*batch d_model"]:
        cfg = self.config

        def param(name, axes, *shape):
            init = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), axes)
            return self.param(name, init, shape, cfg.param_dtype).astype(x.dtype)

        scores = x @ param("scores", ("d_model", None), cfg.d_model, cfg.experts)
        best, chosen = jax.lax.top_k(scores, cfg.top_k)
        self.sow("intermediates", "experts", chosen)
        weights = jax.nn.softmax(best.astype(jnp.float32)).astype(x.dtype)
        weights = (jax.nn.one_hot(chosen, cfg.experts, dtype=x.dtype) * weights[..., None]).sum(-2)
        wide = cfg.experts, cfg.d_model, cfg.mlp_dim
        gate, up = (jnp.einsum("...d,edf->...ef", x, param(g, (None, "d_model", "mlp"), *wide)) for g in ("gate", "up"))
        down = param("down", (None, "mlp", "d_model"), cfg.experts, cfg.mlp_dim, cfg.d_model)
        return jnp.einsum("...ef,efd,...e->...d", jax.nn.silu(gate) * up, down, weights)


def traces(task: Any, params: Any, tokens: Array, lead: int) -> dict[str, Array]:
    """The experts of layers `lead` to the last gate's + lead - 1, [layers, batch, length, top_k]: required, and as
    predicted from p and from h before layer i, and from the token before (the first token: from no token, -1)."""
    config, model = task.config, task.task.module()
    base, size = params[FROZEN], model.config
    _, sown = model.apply({"params": base}, tokens, mutable=["intermediates"])
    required = sown["intermediates"]["stack"]["blocks"]["ffn"]["experts"][0]
    h, slow, fast = entry(model, base, tokens), [], []
    for gate, (start, end) in enumerate(config.intervals):
        exit, _ = to_gate(config, model, base, params["exits"], gate, h)
        fast.append(jnp.concatenate([h[None], exit.trail])[: end - start])
        steps = [h]
        for layer in range(start, end):
            x, _ = model.apply({"params": base}, steps[-1], layers=(layer, layer + 1), method="hidden")
            steps.append(x)
        slow += steps[:-1]
        h = exit.slow
    blocks = base["stack"]["blocks"]

    def scores(layer, x):
        norm = {"params": {"scale": blocks["norm_ffn"]["scale"][layer]}}
        return Norm("rms", eps=size.norm_eps).apply(norm, x) @ blocks["ffn"]["scores"][layer]

    last = min(config.gates[-1], size.num_layers - lead) + lead
    before = jnp.pad(required[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=NONE)
    return {
        "required": required[lead:last],
        "p": predict_experts(jnp.concatenate(fast), scores, lead, size.top_k, size.num_layers),
        "h": predict_experts(jnp.stack(slow), scores, lead, size.top_k, size.num_layers),
        "token before": before[lead:last],
        "all": required,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefetchStudy:
    """Trains the model and its exits, then measures recall and simulates; run again, it only measures."""

    base: Experiment
    arm: Experiment
    """The exits' run, which starts with the base's parameters."""
    leads: tuple[int, ...] = (1, 2)
    capacity: int = 4
    """The experts of a layer that fast memory holds."""
    loads: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    """The simulated times of loading an expert, in units of a layer's computing."""
    rows: int = 8
    workdir: str = "runs/expert_prefetch_study"

    def run(self) -> bool:
        """Writes recall.md, simulated.md and crossover.png; returns False if interrupted."""
        folder = Path(self.workdir)
        base, arm = (dataclasses.replace(x, workdir=str(folder / x.name)) for x in (self.base, self.arm))
        if train_once(base).interrupted:
            return False
        result = train_once(arm, functools.partial(open_model, base.directory))
        if result.interrupted:
            return False
        tokens = jnp.asarray(next(iter(arm.data.eval_batches("test")))["tokens"][: self.rows])
        console = rich.console.Console()
        recalls, simulated = [], []
        size = result.task.task.model
        for lead in self.leads:
            found = jax.device_get(jax.jit(functools.partial(traces, result.task, lead=lead))(result.params, tokens))
            row = {name: float(recall(found[name], found["required"])) for name in ("p", "h", "token before")}
            usage = np.bincount(found["required"].ravel(), minlength=size.experts) / found["required"].size
            row["largest share of an expert"] = float(usage.max())
            recalls.append({"lead": str(lead), **{name: f"{x:.3f}" for name, x in row.items()}})
            simulated += self._simulate(found, lead)
        for name, rows in (("recall", recalls), ("simulated", simulated)):
            (folder / f"{name}.md").write_text(markdown(rows))
            console.rule(name if name == "recall" else "simulated time a token and layer (computing alone: 1)")
            print_table(console, rows)
        (folder / "results.json").write_text(json.dumps({"recall": recalls, "simulated": simulated}, indent=1) + "\n")
        plot_crossover(folder / "crossover.png", size.num_layers, size.experts, size.top_k, self.capacity)
        return True

    def _simulate(self, found: dict[str, np.ndarray], lead: int) -> list[dict[str, str]]:
        """Rows of simulated times: the texts one after the other, the layers without a prediction loaded on demand."""
        layers, batch, length, top_k = found["all"].shape

        def by_token(x):
            return np.moveaxis(x, 0, 2).reshape(batch * length, -1, top_k)

        required = by_token(found["all"])

        def predicted(name):
            whole = np.full((layers, batch, length, top_k), NONE)
            whole[lead : lead + len(found[name])] = found[name]
            return by_token(whole)

        rows = []
        for t_load in self.loads:
            options = {"capacity": self.capacity, "t_load": t_load, "lead": lead}
            row = {"lead": str(lead), "t_load": f"{t_load:g}"}
            guesses = {"demand": None, "p": predicted("p"), "h": predicted("h"), "oracle": required}
            for name, guess in guesses.items():
                time = simulate_expert_prefetch(required, guess, **options).total_time
                row[name] = f"{time / required.shape[0] / layers:.3f}"
            rows.append(row)
        return rows


def plot_crossover(path: Path, layers: int, experts: int, top_k: int, capacity: int) -> None:
    """Plots simulated time, ahead over demand, by the predictor's accuracy, for random experts: above 1, loading ahead
    is slower than loading on demand."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)

    def draw(tokens):
        return np.argsort(rng.random((tokens, layers, experts)), -1)[..., :top_k]

    required, noise, kept = draw(200), draw(200), rng.random((200, layers, top_k))
    figure, axes = plt.subplots(figsize=(6, 4))
    accuracies = np.linspace(0, 1, 11)
    for t_load in (0.1, 0.25, 0.5, 1.0, 2.0):
        options = {"capacity": capacity, "t_load": t_load, "lead": 1}
        demand = simulate_expert_prefetch(required, **options).total_time
        times = [
            simulate_expert_prefetch(required, np.where(kept < a, required, noise), **options).total_time
            for a in accuracies
        ]
        axes.plot(accuracies, np.array(times) / demand, marker="o", markersize=3, label=f"{t_load:g}")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_xlabel("accuracy of the predictions")
    axes.set_ylabel("simulated time, ahead / on demand")
    axes.grid(alpha=0.3)
    axes.legend(title="t_load / t_compute", fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
