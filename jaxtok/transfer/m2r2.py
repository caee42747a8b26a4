"""M2R2 as a Task and as surgeries: trains exits of any decoder, which stays frozen (`jaxtok.decoding.m2r2`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxtok.configuration import from_json, to_json
from jaxtok.decoding.m2r2 import (
    M2R2Config,
    SelfSpeculation,
    flops_of_a_token,
    forward_two_streams,
    init_exits,
    logits_of,
    route,
)
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.nn.lora import flat
from jaxtok.nn.losses import mean
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task
from jaxtok.weights import get_tensor, open_safetensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2R2(Task):
    """Trains the exits of a causal language model. Parameters are {"frozen": the model's, "exits": `init_exits`}.

    First the adapters learn to say at each gate what the whole model says (no labels are needed); then, as another
    stage (`TrainRouter`), the router learns where they do.
    """

    counted = "tokens"

    task: Any
    """The task whose model is left, a `jaxtok.lm.language_modeling.LanguageModeling`; its parameters are frozen."""
    config: M2R2Config = M2R2Config()
    train: Literal["exits", "router"] = "exits"
    """What trains: the adapters (or heads), or the router."""
    target: Literal["distribution", "argmax"] = "distribution"
    """What an exit learns: the model's distribution (KL), or its likeliest token (cross entropy)."""
    label_weight: float = 0.0
    """The weight in the loss of the cross entropy of the text's own tokens."""

    def __post_init__(self):
        for field, allowed in (("train", ("exits", "router")), ("target", ("distribution", "argmax"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")
        if self.label_weight < 0:
            raise ValueError(f"label_weight is {self.label_weight}; it must be 0 or more.")
        if self.train == "exits" and self.config.exits == "lens":
            raise ValueError("train is exits, but the logit lens has no parameters; train must be router.")
        _check_task(self.task)

    @property
    def model(self) -> Any:
        """The frozen model's config."""
        return self.task.model

    def with_model(self, **fields: Any) -> M2R2:
        return dataclasses.replace(self, task=self.task.with_model(**fields))

    def fit(self, data: Data, train: Any = None) -> M2R2:
        task = dataclasses.replace(self, task=self.task.fit(data, train))
        self.config.check(task.task.module())
        return task

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        base, exits = jax.random.split(rng)
        return self.start(self.task.init(base, batch), exits)

    def start(self, params: Params, rng: jax.Array) -> Params:
        """The parameters with the task's as the frozen ones, and exits that are the logit lens."""
        exits = init_exits(self.config, self.task.module(), rng)
        boxed = any(map(_is_box, jax.tree.leaves(params, is_leaf=_is_box)))
        return {FROZEN: params, "exits": exits if boxed else nn.meta.unbox(exits)}

    def trainable(self, params: Params) -> Params:
        def moves(path, leaf):
            first, part = (entry.key for entry in path[:2])
            return int(first != FROZEN and (part == "router") == (self.train == "router"))

        return jax.tree_util.tree_map_with_path(moves, params)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The tokens, and for each gate the sums over them of what the metrics are made of."""
        config, model = self.config, self.task.module()
        base, exits = jax.lax.stop_gradient(params[FROZEN]), params["exits"]
        if self.train == "router":
            exits = {name: x if name == "router" else jax.lax.stop_gradient(x) for name, x in exits.items()}
        out, _ = forward_two_streams(
            config, model, base, exits, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )
        mask = batch["mask"]
        final = jax.lax.stop_gradient(model.apply({"params": base}, out.final, method="head"))
        expected, best = jax.nn.log_softmax(final), final.argmax(-1)
        gates = []
        for gate, exit in enumerate(out.exits):
            found = jax.nn.log_softmax(logits_of(model, base, exit.state).astype(jnp.float32))
            agrees = (found.argmax(-1) == best).astype(jnp.float32)
            score = route(config, exits["router"], exit, gate)

            def likely(ids, found=found):
                return jnp.take_along_axis(found, ids[..., None], -1)[..., 0]

            values = {
                "kl": (jnp.exp(expected) * (expected - found)).sum(-1),
                "argmax": -likely(best),
                "labels": -likely(batch["targets"]),
                "agrees": agrees,
                "router": jax.nn.softplus(score) - agrees * score,  # binary cross entropy
                "routed_right": (score > 0) == (agrees > 0),
            }
            gates.append({name: jnp.sum(value * mask) for name, value in values.items()})
        return {"tokens": jnp.sum(mask), **jax.tree.map(lambda *gate: jnp.stack(gate), *gates)}

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        return self.sums(params, batch, rng)

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The sum over the gates of the mean over the tokens."""
        agreement = {f"agreement_{end}": sums["agrees"][gate] for gate, end in enumerate(self.config.gates)}
        logged = {name: mean(total, sums["tokens"]) for name, total in agreement.items()}
        return mean(self._loss(sums).sum(), sums["tokens"]), logged

    def _loss(self, sums: Sums) -> Any:
        if self.train == "router":
            return sums["router"]
        distilled = sums["kl" if self.target == "distribution" else "argmax"]
        return distilled + self.label_weight * sums["labels"]

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss; for the gate after N layers, kl_N, agreement_N (how often its likeliest token is the model's)
        and router_right_N (how often the router knows that, at threshold 1/2); expected_tokens (of a round, if the
        tokens were independent, by the first gate's agreement); and the number of tokens."""
        tokens = sums["tokens"]
        found = {"loss": float(self._loss(sums).sum() / tokens)}
        for gate, end in enumerate(self.config.gates):
            found |= {
                f"agreement_{end}": float(sums["agrees"][gate] / tokens),
                f"kl_{end}": float(sums["kl"][gate] / tokens),
                f"router_right_{end}": float(sums["routed_right"][gate] / tokens),
            }
        agreement = found[f"agreement_{self.config.gates[0]}"]
        found["expected_tokens"] = sum(agreement**n for n in range(self.config.gamma + 1))
        return found | {"tokens": float(tokens)}

    def decoding(self, params: Params) -> tuple[Any, Params, dict[str, Any]]:
        """The model, its parameters, and the options of `jaxtok.decoding.generate`: it drafts by its first exit."""
        drafter = SelfSpeculation(config=self.config)
        return self.task.module(), params[FROZEN], {"drafter": drafter, "drafter_state": params["exits"]}

    def flops(self, batch: Batch) -> float:
        """Forward through both streams and all heads; backward only through the second stream and its heads, and
        there only to the activations."""
        rows, length = batch["tokens"].shape
        slow, fast, head = flops_of_a_token(self.config, self.task.module(), length)
        gates = len(self.config.gates) * head
        return rows * length * (slow[0] + slow[1] + head + 2 * (fast + gates))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _check_task(task: Any) -> None:
    if not isinstance(task, LanguageModeling):
        raise ValueError(
            f"a {type(task).__name__} cannot get M2R2's exits; give a LanguageModeling, the task of a decoder."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddExits:
    """The surgery after which exits of a frozen model train; at first they are the logit lens."""

    config: M2R2Config = M2R2Config()
    steps: int = 250
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    train: Literal["exits", "router"] = "exits"
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after exits were added is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """Raises ValueError if the task is not that of a decoder that can be left at these gates."""
        _check_task(task)
        self.config.check(task.module())
        return M2R2(task=task, config=self.config, train=self.train), data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        return M2R2(task=task, config=self.config, train=self.train).start(params, rng), None

    def towards(self, task: Task) -> AddExits:
        """This surgery, with the exits of the task if it is an `M2R2`."""
        if not isinstance(task, M2R2):
            return self
        return dataclasses.replace(self, config=task.config, train=task.train)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRouter:
    """The surgery after which the router trains, and the exits stay as they are."""

    steps: int = 100
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps of the router is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """Raises ValueError if the task has no exits."""
        if not isinstance(task, M2R2):
            raise ValueError(f"a {type(task).__name__} has no exits whose router could train; add exits first.")
        return dataclasses.replace(task, train="router"), data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        return params, None

    def towards(self, task: Task) -> TrainRouter:
        return self


def save_exits(file: str | Path, config: M2R2Config, base: Params, exits: Params) -> Path:
    """Writes exits apart from their model: a safetensors file that has their config and the model's fingerprint.

    Its tensors are `adapter{i}/attn_down` [d, r], ... of layer i, or `head{gate}/...`; and `router/...`.

    Raises:
      FileExistsError: the file exists already.
    """
    file = Path(file)
    if file.exists():
        raise FileExistsError(f"{file} exists already; choose another name (nothing was written).")
    tensors = {f"router/{name}": x for name, x in exits["router"].items()}
    for name, x in exits.get("adapters", {}).items():
        tensors |= {f"adapter{layer}/{name}": row for layer, row in enumerate(x)}
    for gate, head in exits.get("heads", {}).items():
        tensors |= {f"{gate.replace('gate', 'head')}/{name}": x for name, x in head.items()}
    about = {"config": json.dumps(to_json(config)), "base": fingerprint(base)}
    arrays = {name: np.array(x) for name, x in tensors.items()}
    half_done = file.with_name(file.name + ".part")
    try:
        safetensors.numpy.save_file(arrays, half_done, metadata=about)
        half_done.rename(file)
    finally:
        half_done.unlink(missing_ok=True)
    return file


def read_exits(file: str | Path, base: Params) -> tuple[M2R2Config, Params]:
    """The config and the parameters of exits, for the model whose parameters are `base`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no exits, or those of another model.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a file that save_exits wrote.")
    with open_safetensors(file) as stored:
        about = stored.metadata() or {}
        tensors = {name: jnp.asarray(get_tensor(stored, name, file)) for name in stored.keys()}  # noqa: SIM118
    if not {"config", "base"} <= about.keys():
        raise ValueError(f"{file} holds no exits of M2R2; give a file that save_exits wrote.")
    if about["base"] != fingerprint(base):
        raise ValueError(f"{file} holds exits of another model than this one; open the model they were trained on.")
    config, exits = from_json(json.loads(about["config"])), {"router": {}}
    exits |= {"accelerated": {"adapters": {}}, "head": {"heads": {}}, "lens": {}}[config.exits]
    for name, x in tensors.items():
        part, name = name.split("/")
        if part == "router":
            exits["router"][name] = x
        elif part.startswith("head"):
            exits["heads"].setdefault(part.replace("head", "gate"), {})[name] = x
    if config.exits == "accelerated":
        names = {name.split("/")[1] for name in tensors if name.startswith("adapter")}
        rows = {name: [tensors[f"adapter{layer}/{name}"] for layer in range(config.gates[-1])] for name in names}
        exits["adapters"] = {name: jnp.stack(row) for name, row in rows.items()}
    return config, exits


def fingerprint(params: Params) -> str:
    """A hash of a model's parameters: of their names, shapes and values in float32."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flat(params).items()):
        digest.update(f"{name} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf, dtype=np.float32).tobytes())
    return digest.hexdigest()
