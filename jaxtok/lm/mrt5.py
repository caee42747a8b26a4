"""MrT5 (arXiv 2410.20771): a ByT5 whose encoder deletes bytes after its first blocks.

A gate scores every byte. In training its score is added to the attention scores of later layers (soft deletion: rows
keep their length, and all is differentiable); in evaluation and generation bytes with low scores are taken out (hard
deletion: rows get shorter). The paper's baselines are in `jaxtok.lm.mrt5_baselines`: each fills the hooks of
`MrT5Config` and `MrT5Encoder`.

Shapes are static. A training step with hard deletion, which need not be faster, hides deleted bytes and does not take
them out: as positions keep their bias, the other bytes see the same. Evaluation takes them out and shortens rows to one
of a few capacities, each of which is compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxtok.axes import gather
from jaxtok.lm.t5 import PUBLISHED as T5_PUBLISHED
from jaxtok.lm.t5 import (
    T5,
    Encoded,
    SequenceToSequence,
    T5Config,
    hide,
    init_params,
    initial,
    position_bias,
    shift_right,
)
from jaxtok.nn.losses import cross_entropy, mean, text_loss, text_metrics, text_sums
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import Batch, Params, Sums

GATES = ("sigmoid", "log_sigmoid")
DELETED = -1e9
"""The bias of a deleted key, and the log-sigmoid gate of padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MrT5Config(T5Config):
    """A T5 of any size with a gate. Defaults: those of the authors' training script.

    Their config class has others (gate_layer 2, gate_scale -10).
    """

    gate_layer: int = 3
    """The number of the encoder's blocks before the gate."""
    gate: Literal["sigmoid", "log_sigmoid"] = "sigmoid"
    """The gate of a logit z. sigmoid: gate_scale * sigmoid(-z); log_sigmoid: log(sigmoid(z))."""
    gate_scale: float = -30.0
    threshold: float = -15.0
    """The gate above which a byte stays."""
    gate_norm: bool = True
    """Whether an RMS norm comes before the gate."""
    gumbel_noise: bool = False
    """Whether training adds Gumbel noise to the logits."""
    softmax1: bool = True

    reduction: ClassVar[str] = "gate"
    """The name of what shortens the rows; each baseline has another."""

    def __post_init__(self):
        super().__post_init__()
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}; it must be one of {', '.join(GATES)}.")
        if not 0 <= self.gate_layer < max(self.num_layers, 1):
            raise ValueError(
                f"gate_layer is {self.gate_layer}; it must be from 0 to {self.num_layers - 1}, as the encoder has "
                f"{self.num_layers} layers."
            )
        if self.gate_scale >= 0:
            raise ValueError(
                f"gate_scale is {self.gate_scale}; it must be negative, to be a bias against deleted keys."
            )
        if not self.lowest_gate < self.threshold < 0:
            raise ValueError(
                f"threshold is {self.threshold}; it must be between {self.lowest_gate} and 0, as the gates are."
            )

    @property
    def lowest_gate(self) -> float:
        return self.gate_scale if self.gate == "sigmoid" else -math.inf

    @property
    def decoder_stack(self) -> MrT5Config:
        layers = self.decoder_layers or self.num_layers
        return dataclasses.replace(self, num_layers=layers, gate_layer=0, causal=True, mask_keys=False, cross=True)

    @property
    def plain(self) -> T5Config:
        """The T5 around the gate; it has softmax1 if this model has."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(T5Config)}
        return T5Config(**fields)

    def module(self) -> MrT5:
        return MrT5(self)

    def encoder(self) -> MrT5Encoder:
        return MrT5Encoder(self.encoder_stack)

    def deleted(self, begun: Begun) -> Shaped[Array, ""]:
        """The number of the real tokens whose gate is below the threshold, which is how the authors count."""
        return (begun.mask & (begun.gate < self.threshold)).sum()

    def own_loss(self, begun: Begun) -> Float[Array, ""] | None:
        """What a baseline adds to the loss, averaged over rows; here nothing."""
        return None

    def capacity(self, most: int, length: int) -> int:
        """The places to which rows of this length are shortened if the fullest keeps `most`; 0: rows stay long."""
        return next(capacity for capacity in capacities(length) if capacity >= most)

    def encoder_flops(self, inputs: int, slots: int = 0) -> float:
        """Forward FLOPs of the encoder and of the decoder's keys and values, for one row.

        Args:
          slots: the places that are left after the gate; 0: all, as in training.
        """
        return self._flops(inputs, slots or inputs, 2 * self.d_model)

    def _flops(self, inputs: int, slots: int, of_reduction: float) -> float:
        whole, cross = self.encoder_stack, 4 * self.d_model * self.num_heads * self.head_dim
        part = self.gate_layer / self.num_layers
        rest = (1 - part) * whole.stack_flops(slots) + self.decoder_stack.num_layers * cross
        return inputs * (part * whole.stack_flops(inputs) + of_reduction) + slots * rest

    @classmethod
    def saved_before(cls, fields: dict[str, Any]) -> tuple[type[MrT5Config], dict[str, Any]]:
        """The class and the fields of a config that was saved when the baselines were values of `reduction`."""
        from jaxtok.lm.mrt5_baselines import saved_before

        return saved_before(fields) if "reduction" in fields else (cls, fields)


@flax.struct.dataclass
class Begun:
    """Rows after the first blocks, with their gates."""

    states: Float[Array, "batch length d_model"]
    mask: Bool[Array, "batch length"]
    kept: Bool[Array, "batch length"]
    """The places of real tokens that hard deletion keeps."""
    gate: Float[Array, "batch length"] | None = None
    logits: Float[Array, "batch length"] | None = None

    @property
    def counts(self) -> Int[Array, " batch"]:
        """The number of places that each row needs, at least 1."""
        return jnp.maximum(self.kept.sum(-1), 1)

    def truncated(self, capacity: int) -> Int[Array, " batch"]:
        """The number of places that each row loses when it is shortened to `capacity` places."""
        return jnp.maximum(self.counts - capacity, 0)


class DeleteGate(nn.Module):
    """The logit z of keeping each state, in float32 (section 3.1): norm(x) w + b, with b = 1 at first."""

    config: MrT5Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length"]:
        cfg = self.config
        x = x.astype(jnp.float32)
        if cfg.gate_norm:
            x = Norm("rms", eps=cfg.norm_eps, param_dtype=cfg.param_dtype, name="norm")(x)
        init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("d_model", None))
        kernel = self.param("kernel", init, (x.shape[-1], 1), cfg.param_dtype)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.ones, (None,)), (1,), cfg.param_dtype)
        return jnp.einsum("bld,dk->blk", x, gather(kernel.astype(jnp.float32), "d_model", None))[..., 0] + bias


class MrT5Encoder(nn.Module):
    """T5's encoder in two parts, `begin` and `finish`, with the gate between them."""

    config: MrT5Config

    def setup(self):
        cfg = self.config
        if cfg.gate_layer:
            self.stack = Stack(dataclasses.replace(cfg, num_layers=cfg.gate_layer, gate_layer=0))
        self.rest = Stack(dataclasses.replace(cfg, num_layers=cfg.num_layers - cfg.gate_layer, gate_layer=0))
        self.relative_bias = position_bias(cfg)
        self.final_norm = cfg.norm_module()
        self.drop = nn.Dropout(cfg.dropout)
        self.add_reduction()

    def add_reduction(self):
        self.delete_gate = DeleteGate(self.config)

    def begin(
        self,
        x: Float[Array, "batch length d_model"],
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        threshold: float | Float[Array, ""] | None = None,
        deterministic: bool = True,
    ) -> Begun:
        cfg = self.config
        x = self.drop(x, deterministic)
        if cfg.gate_layer:
            places = jnp.arange(x.shape[1])[None]
            bias = (self.relative_bias(places, places),)
            x, _ = self.stack(x, places, mask.astype(jnp.int32), deterministic=deterministic, bias=bias)
        return self.scored(x, tokens, mask, cfg.threshold if threshold is None else threshold, deterministic)

    def scored(self, x, tokens, mask, threshold, deterministic: bool) -> Begun:
        """The rows with their gates and the bytes that are kept (section 3.1)."""
        gate, z = self.gates(x, tokens, mask, deterministic)
        return Begun(x, mask, (gate > threshold) & mask, gate, z)

    def gates(
        self, x, tokens, mask, deterministic: bool
    ) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"] | None]:
        """The gates gate_scale sigmoid(-z) or log(sigmoid(z)), with the lowest value at padding; and the logits z."""
        cfg = self.config
        z = self.delete_gate(x)
        if cfg.gumbel_noise and not deterministic:
            z = z + jax.random.gumbel(self.make_rng("gate"), z.shape)
        if cfg.gate == "sigmoid":
            return jnp.where(mask, cfg.gate_scale * jax.nn.sigmoid(-z), cfg.gate_scale), z
        return jnp.where(mask, jax.nn.log_sigmoid(z), DELETED), z

    def finish(
        self, begun: Begun, hard: bool | Bool[Array, ""] = False, capacity: int = 0, deterministic: bool = True
    ) -> Encoded:
        """Runs the rest of the encoder.

        Args:
          hard: whether deleted bytes are hidden, if they are not taken out.
          capacity: the places to which rows are shortened by taking deleted bytes out; 0: they are not taken out. A row
            that needs more places keeps those with the highest gates (`Begun.truncated` counts the others;
            `MrT5Training` never asks for fewer than are needed).
        """
        x, places, mask, keys, cross = self.reduced(begun, hard, capacity)
        bias = self.relative_bias(places, places)
        self.sow("intermediates", "bias", bias)
        x, _ = self.rest(x, places, mask.astype(jnp.int32), deterministic=deterministic, bias=(bias, *keys))
        return Encoded(self.drop(self.final_norm(x), deterministic), cross)

    def reduced(self, begun: Begun, hard: bool | Bool[Array, ""], capacity: int) -> tuple[Any, ...]:
        """Deletes bytes (section 3.1): softly, by hiding them, or by taking them out.

        Returns the states of the slots that are left, their places [batch or 1, slots], the mask of the real ones, and
        two tuples of biases: on the scores of the remaining blocks, and on those of cross-attention.
        """
        x, mask = begun.states, begun.mask
        if capacity:
            places, filled = compact(begun, capacity)
            x, mask = jnp.take_along_axis(x, places[..., None], 1), jnp.take_along_axis(mask, places, 1)
            keys = (hide(filled, DELETED),)
            return x, places, mask, keys, (hide(mask), *keys)
        kept = begun.kept.at[:, 0].set(begun.kept[:, 0] | ~begun.kept.any(-1))
        keys = (jnp.where(hard, hide(kept, DELETED), begun.gate[:, None, None, :]),)
        return x, jnp.arange(mask.shape[1])[None], mask, keys, (hide(mask), *keys)


def compact(begun: Begun, capacity: int) -> tuple[Int[Array, "batch slots"], Bool[Array, "batch slots"]]:
    """The kept places in order, moved to the left, and which slots they fill. Empty slots hold place 0.

    A row that keeps none has its place 0. A row that keeps more than `capacity` has those with the highest gates.
    """
    kept, (rows, length) = begun.kept, begun.kept.shape
    if capacity < length:
        rank = jnp.argsort(jnp.argsort(-jnp.where(kept, begun.gate, -jnp.inf), axis=1), axis=1)
        kept = kept & (rank < capacity)
    slot = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, capacity)
    places = jnp.zeros((rows, capacity), jnp.int32).at[jnp.arange(rows)[:, None], slot]
    places = places.set(jnp.broadcast_to(jnp.arange(length), kept.shape), mode="drop")
    return places, jnp.arange(capacity) < jnp.maximum(kept.sum(-1, keepdims=True), 1)


class MrT5(T5):
    """A `T5` whose `encode`, with its halves `begin` and `finish`, takes the options of deletion.

    It draws from the random keys "gate" (Gumbel noise, and what the baselines draw) and "dropout".
    """

    config: MrT5Config

    def make_encoder(self) -> nn.Module:
        return self.config.encoder()

    def encode(
        self,
        inputs: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
        hard: bool | Bool[Array, ""] = False,
        capacity: int = 0,
        threshold: float | Float[Array, ""] | None = None,
    ) -> Encoded:
        return self.finish(self.begin(inputs, mask, threshold, deterministic), hard, capacity, deterministic)

    def begin(self, inputs, mask=None, threshold=None, deterministic: bool = True) -> Begun:
        """Runs the first blocks and the gate.

        Args:
          threshold: the one to use in place of the config's.
        """
        mask = (inputs != self.config.pad_id) if mask is None else mask.astype(bool)
        return self.encoder.begin(self.embed(inputs), inputs, mask, threshold, deterministic)

    def finish(self, begun: Begun, hard=False, capacity: int = 0, deterministic: bool = True) -> Encoded:
        return self.encoder.finish(begun, hard, capacity, deterministic)


def capacities(length: int) -> list[int]:
    """The numbers of places to which rows of this length are shortened: its eighths, rounded up."""
    return sorted({-(-length * part // 8) for part in range(1, 9)})


def from_t5(config: MrT5Config, params: Params, rng: jax.Array) -> Params:
    """The parameters of an MrT5 that starts from a T5: the T5's, and those of a new gate.

    Raises:
      ValueError: the T5 has other sizes.
    """
    first = config.gate_layer
    known = ("stack", "rest", "relative_bias", "final_norm")

    def new(rng):
        return {name: part for name, part in init_params(config, rng)["encoder"].items() if name not in known}

    old, blocks = params["encoder"], params["encoder"]["stack"]["blocks"]
    encoder = {**jax.jit(new)(rng), **{name: old[name] for name in ("relative_bias", "final_norm")}}
    encoder["rest"] = {"blocks": jax.tree.map(lambda x: x[first:], blocks)}
    if first:
        encoder["stack"] = {"blocks": jax.tree.map(lambda x: x[:first], blocks)}
    started = {**params, "encoder": encoder}
    expected = jax.eval_shape(functools.partial(init_params, config), rng)
    if jax.tree.map(jnp.shape, started) != jax.tree.map(jnp.shape, expected):
        raise ValueError(
            "the T5's parameters have other shapes than the MrT5's; their configs must have the same sizes."
        )
    return started


# Regularisers (section 3.2; authors' `training/trainer.py`): minimising any of them makes the gate delete more.

REGULARISERS = ("gate_mean", "logits_mean", "clamped_logits_mean", "gate_var")


def regulariser(name: str, begun: Begun, threshold: float) -> Float[Array, ""]:
    """The regulariser of this name over the real tokens of a batch, in float32.

    gate_mean            the mean gate
    logits_mean          the mean logit
    clamped_logits_mean  the mean logit, where logits below 2 * threshold count as that
    gate_var             minus the unbiased variance of the gate
    """
    return regulariser_of(name, regulariser_sums(name, begun, threshold))


def regulariser_sums(name: str, begun: Begun, threshold: float) -> dict[str, Float[Array, ""]]:
    """What a regulariser is made of: sums over the real tokens, which add up over the parts of a batch."""
    count = begun.mask.astype(jnp.float32).sum()
    values = begun.gate if name in ("gate_mean", "gate_var") else begun.logits
    if name == "clamped_logits_mean":
        values = jnp.maximum(values, 2 * threshold)
    total = jnp.where(begun.mask, values, 0.0).sum()
    if name != "gate_var":
        return {"count": count, "total": total}
    # The squares within and between the parts, as those of the values themselves would hide a small variance.
    deviation = jnp.where(begun.mask, values - mean(total, count), 0.0)
    between = count * jnp.square(mean(total, count))
    return {"count": count, "total": total, "within": jnp.square(deviation).sum(), "between": between}


def regulariser_of(name: str, sums: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    """The regulariser of a batch from its `regulariser_sums`."""
    count, average = sums["count"], mean(sums["total"], sums["count"])
    if name != "gate_var":
        return average
    squares = sums["within"] + (sums["between"] - count * jnp.square(average))
    return -squares / jnp.maximum(jnp.maximum(count, 1) - 1, 1)


def entropies(log_gate: Float[Array, "batch length"]) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """The mean entropy of each row's gates, and the entropy of its mean gate; padding counts in both."""

    def entropy(g):
        p = jnp.exp(g)
        return -(p * g + (1 - p) * jnp.log(1 - jnp.minimum(p, 1 - np.finfo(np.float32).eps)))

    mean = jax.nn.logsumexp(log_gate, axis=-1) - math.log(log_gate.shape[-1])
    return entropy(log_gate).mean(-1), entropy(mean)


def score_excess(intermediates: Any, mask: Bool[Array, "batch length"], limit: float = 5.0) -> Float[Array, ""]:
    """The mean excess of attention scores over the limit (appendix D), in the encoder after the gate and in all
    cross-attention. The scores are those without the gate; hidden keys count as 0.

    In a step with hard deletion, the authors average over shortened rows, and this averages over whole ones.
    """

    def layer(bias, layer):
        q, k = layer
        scores = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5 + bias
        return jnp.mean(jnp.where(mask[:, None, None], jnp.maximum(scores - limit, 0.0), 0.0))

    def layers(attention, bias):
        part = jax.checkpoint(functools.partial(layer, bias), prevent_cse=False)
        return jax.lax.map(part, (attention["queries"][0], attention["keys"][0]))

    encoder = intermediates["encoder"]
    own = layers(encoder["rest"]["blocks"]["attention"], encoder["bias"][0])
    cross = layers(intermediates["decoder"]["stack"]["blocks"]["cross"], 0.0)
    return jnp.concatenate([own, cross]).mean()


def new_controller() -> dict[str, Array]:
    """The state of a controller before training."""
    return {name: jnp.zeros(()) for name in ("p", "i", "alpha")}


def without_controller(params: Params) -> Params:
    """The model's own parameters."""
    return {name: part for name, part in params.items() if name != "controller"}


def control(state: dict[str, Array], rate: Array, target: float, k_p: float, k_i: float) -> dict[str, Array]:
    """One step of the PI controller of the regulariser's weight alpha (section 3.3), which grows while the deletion
    rate is below the target and is never negative."""
    error = target - rate
    p = 0.9 * state["p"] + 0.1 * k_p * error
    i = state["i"] + k_i * error
    return {"p": p, "i": i, "alpha": jnp.maximum(p + i, 0.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MrT5Training(SequenceToSequence):
    """Trains an MrT5, or a baseline, on pairs of texts; batches are those of `SequenceToSequence`.

    The loss is cross entropy + alpha * regulariser (+ score_weight * `score_excess`) with soft deletion. With a target
    rate, a controller sets alpha. Its state is a part of the parameters (`controller`) that no gradient moves:
    `after_step` moves it, once an update, by the deletion rate of the whole batch.
    """

    model: MrT5Config
    alpha: float = 0.0
    """The weight of the regulariser if there is no target rate."""
    target_rate: float = 0.0
    """The part of the real bytes that the controller aims to delete; 0: no controller."""
    k_p: float = 0.5
    k_i: float = 1e-5
    regulariser: Literal["gate_mean", "logits_mean", "clamped_logits_mean", "gate_var"] = "gate_mean"
    entropy_weights: tuple[float, float] = (0.0, 0.0)
    """The weights (c1, c2) in c1 * mean entropy of gates - c2 * entropy of the mean gate, which is added to the
    regulariser; only for log_sigmoid gates."""
    regulariser_delay: int = 0
    """The number of first steps without the regulariser, in which the controller stands still."""
    score_weight: float = 0.0
    """The weight of `score_excess`; the authors recommend 0.5 for training from scratch."""
    hard_probability: float = 0.0
    """The probability that a training step deletes hard."""

    def __post_init__(self):
        if not 0 <= self.target_rate < 1:
            raise ValueError(f"target_rate is {self.target_rate}; it must be in [0, 1), where 0 is no controller.")
        if self.regulariser not in REGULARISERS:
            raise ValueError(f"regulariser is {self.regulariser!r}; it must be one of {', '.join(REGULARISERS)}.")
        if not 0 <= self.hard_probability <= 1:
            raise ValueError(f"hard_probability is {self.hard_probability}; it must be in [0, 1].")
        for field in ("alpha", "k_p", "k_i", "regulariser_delay", "score_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.target_rate and self.model.reduction != "gate":
            raise ValueError(
                f"target_rate is {self.target_rate}, but reduction {self.model.reduction} has no gate; it must be 0."
            )
        if any(self.entropy_weights) and self.model.gate != "log_sigmoid":
            raise ValueError(
                f"entropy_weights is {self.entropy_weights}; it must be (0, 0) unless model.gate is log_sigmoid."
            )

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        params = initial(self.model, rng, batch["tokens"])
        if self.target_rate:
            params = {**params, "controller": new_controller()}
        return params

    def trainable(self, params: Params) -> Params | None:
        if "controller" not in params:
            return None
        fixed = jax.tree.map(jnp.zeros_like, params["controller"])
        return {**jax.tree.map(lambda _: 1.0, params), "controller": fixed}

    def after_step(self, params: Params, metrics: dict[str, jax.Array], step: jax.Array) -> Params:
        """The parameters after update number `step`, with a controller that has seen the deletion rate."""
        if "controller" not in params:
            return params
        old = params["controller"]
        new = control(old, metrics["deletion_rate"], self.target_rate, self.k_p, self.k_i)
        active = step >= self.regulariser_delay
        return {**params, "controller": jax.tree.map(lambda a, b: jnp.where(active, b, a), old, new)}

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        model = self.module()
        of_hard, of_gate, *of_dropout = jax.random.split(rng, 5)
        hard = jax.random.bernoulli(of_hard, self.hard_probability) if self.hard_probability else False
        weights = {"params": without_controller(params)}

        def run(method, *args, key, **options):
            return model.apply(
                weights,
                *args,
                method=method,
                deterministic=False,
                rngs={"dropout": key, "gate": of_gate},
                mutable="intermediates" if self.score_weight else [],
                **options,
            )

        begun, _ = run("begin", batch["tokens"], key=of_dropout[0])
        encoded, seen = run("finish", begun, hard, key=of_dropout[1])
        outputs = shift_right(batch["targets"], self.model.pad_id)
        (logits, _), seen_too = run("decode", outputs, encoded, key=of_dropout[2])
        sums = text_sums(cross_entropy(logits, batch["targets"]), batch["mask"], batch["bytes"])
        sums |= {"deleted": self.model.deleted(begun), "real": begun.mask.sum(), "rows": jnp.float32(len(begun.mask))}
        if self.score_weight:
            excess = score_excess({**seen["intermediates"], **seen_too["intermediates"]}, begun.mask)
            sums["excess"] = excess * sums["rows"]
        if (own := self.model.own_loss(begun)) is not None:
            sums["own"] = own * sums["rows"]
        if self.regularised:
            sums["regulariser"] = regulariser_sums(self.regulariser, begun, self.model.threshold)
            if any(self.entropy_weights):
                sums["entropies"] = tuple(entropy.sum() for entropy in entropies(begun.gate))
        return sums

    @property
    def regularised(self) -> bool:
        return self.model.reduction == "gate" and bool(self.target_rate or self.alpha)

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the loss; also logs its parts, bits per byte and deletion_rate."""
        loss, metrics = text_loss(sums)
        metrics |= {"cross_entropy": loss, "deletion_rate": mean(sums["deleted"], sums["real"])}
        if "excess" in sums:
            loss += self.score_weight * (sums["excess"] / sums["rows"])
        if "own" in sums:
            loss += sums["own"] / sums["rows"]
        if self.regularised:
            alpha = params["controller"]["alpha"] if self.target_rate else self.alpha
            extra = regulariser_of(self.regulariser, sums["regulariser"])
            if any(self.entropy_weights):
                each, of_mean = (total / sums["rows"] for total in sums["entropies"])
                extra += self.entropy_weights[0] * each - self.entropy_weights[1] * of_mean
            loss += jnp.where(step >= self.regulariser_delay, alpha, 0.0) * extra
            metrics |= {"alpha": jnp.asarray(alpha, jnp.float32), "regulariser": extra}
        return loss, metrics

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The sums with soft deletion, as in training. Evaluations delete hard by default; see `batch_sums`."""
        begun, counts = begin(self, params, batch["tokens"], rng)
        return finish_sums(self, 0, params, begun, batch) | self._rates(counts, 0, begun.mask.shape[1])

    def batch_sums(
        self, params: Params, batch: Batch, rng: jax.Array, deletion: Literal["hard", "soft"] = "hard"
    ) -> dict[str, Any]:
        """The sums with hard deletion to the smallest capacity that holds all rows of the batch, or with soft deletion.

        Raises:
          ValueError: the gate deletes everything in the batch.
        """
        if deletion == "soft":
            return super().batch_sums(params, batch, rng)
        begun, counts = begin(self, params, batch["tokens"], rng)
        capacity = self._capacity(counts, length := begun.mask.shape[1])
        return finish_sums(self, capacity, params, begun, batch) | self._rates(counts, capacity, length)

    @staticmethod
    def _rates(counts, capacity, length):
        rates = {name: counts[name] for name in ("real", "deleted", "emptied")}
        return rates | {"slots": (capacity or length) / length, "batches": 1.0}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss, perplexity, bits_per_byte, tokens and bytes, as `SequenceToSequence` does.

        Also deletion_rate, slots (the part of the length that is left after the reduction) and emptied (the number of
        rows that would have kept nothing, and keep their first place).
        """
        return text_metrics(sums) | {
            "deletion_rate": sums["deleted"] / max(sums["real"], 1.0),
            "slots": sums["slots"] / sums["batches"],
            "emptied": sums["emptied"],
        }

    def encoded(
        self, params: Params, tokens: Int[np.ndarray, "batch length"], deletion: Literal["hard", "soft"] = "hard"
    ) -> Encoded:
        begun, counts = begin(self, params, tokens, jax.random.key(0))
        capacity = self._capacity(counts, begun.mask.shape[1]) if deletion == "hard" else 0
        return finish(self, capacity, params, begun)

    def _capacity(self, counts: dict[str, Any], length: int) -> int:
        """The smallest capacity that holds all rows of a batch."""
        counts.update(jax.device_get(counts))
        if counts["nothing_left"]:
            raise ValueError(
                f"the gate deletes every byte of a batch, as all are below threshold = {self.model.threshold}; train "
                "with a lower alpha or target_rate, or choose a lower threshold."
            )
        return self.model.capacity(int(counts["most"]), length)


@functools.partial(jax.jit, static_argnames="task")
def begin(task: MrT5Training, params: Params, tokens, rng) -> tuple[Begun, dict[str, Array]]:
    """Rows after the first blocks, and counts of what deletion will do to them."""
    params = without_controller(params)
    begun = task.module().apply({"params": params}, tokens, method="begin", rngs={"gate": rng})
    real = begun.mask.sum()
    nothing_left = jnp.all(begun.gate < task.model.threshold) if begun.gate is not None else jnp.asarray(False)
    return begun, {
        "most": begun.counts.max(),
        "real": real,
        "deleted": task.model.deleted(begun),
        "emptied": (begun.mask.any(-1) & ~begun.kept.any(-1)).sum(),
        "nothing_left": nothing_left,
    }


@functools.partial(jax.jit, static_argnames=("task", "capacity"))
def finish(task: MrT5Training, capacity: int, params: Params, begun: Begun) -> Encoded:
    params = without_controller(params)
    return task.module().apply({"params": params}, begun, False, capacity, method="finish")


@functools.partial(jax.jit, static_argnames=("task", "capacity"))
def finish_sums(task: MrT5Training, capacity: int, params: Params, begun: Begun, batch: Batch):
    encoded = finish(task, capacity, params, begun)
    params = without_controller(params)
    outputs = shift_right(batch["targets"], task.model.pad_id)
    logits, _ = task.module().apply({"params": params}, outputs, encoded, method="decode")
    return text_sums(cross_entropy(logits, batch["targets"]), batch["mask"], batch["bytes"])


def mrt5(base: T5Config, kind: type[MrT5Config] | None = None, **options: Any) -> MrT5Config:
    """An MrT5, or the baseline `kind`, around a T5. From another MrT5 it also takes the options that both have."""
    kind = kind or MrT5Config
    known = {field.name for field in dataclasses.fields(kind)}
    shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.name in known}
    return kind(**shared | options)


PUBLISHED = {
    f"mrt5-{size}": mrt5(T5_PUBLISHED[f"byt5-{size}"], softmax1=True)
    for size in ("small", "base", "large", "xl", "xxl")
}
"""MrT5 in ByT5's sizes; the paper trained small and large."""
