"""The baselines of MrT5 (arXiv 2410.20771, section 4.2): other ways to shorten rows after the encoder's first blocks.

Each is a kind of `MrT5Config` whose encoder does something else in place of the gate. As none has a gate to control,
`MrT5Training` takes no target rate for them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import gather
from jaxtok.lm.mrt5 import Begun, MrT5, MrT5Config, MrT5Encoder
from jaxtok.lm.t5 import hide
from jaxtok.nn.activations import gelu
from jaxtok.nn.norms import Norm

SEPARATORS = (1, 12, 13, *range(35, 51), *range(61, 68), *range(94, 100), *range(126, 130))
"""ByT5's ids that begin a segment for `FixedDeletion`: the end, blanks and punctuation."""


# Deletion without a learned gate.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomDeletion(MrT5Config):
    """Deletes about `amount` of the places of a batch, padding included, at random."""

    amount: float = 0.5
    """The part that is deleted."""
    reduction: ClassVar[str] = "random"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.amount < 1:
            raise ValueError(f"amount is {self.amount}; it must be in [0, 1).")

    @property
    def lowest_gate(self) -> float:
        return self.gate_scale

    def encoder(self) -> MrT5Encoder:
        return RandomEncoder(self.encoder_stack)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedDeletion(RandomDeletion):
    """Deletes the last `amount` of each word."""

    reduction: ClassVar[str] = "fixed"

    def encoder(self) -> MrT5Encoder:
        return FixedEncoder(self.encoder_stack)


class RandomEncoder(MrT5Encoder):
    config: RandomDeletion

    def add_reduction(self):
        pass

    def gates(self, x, tokens, mask, deterministic: bool):
        cfg = self.config
        return random_gate(self.make_rng("gate"), mask.shape, cfg.amount, cfg.gate_scale), None


class FixedEncoder(RandomEncoder):
    config: FixedDeletion

    def gates(self, x, tokens, mask, deterministic: bool):
        return fixed_gate(tokens, mask, self.config.amount, self.config.gate_scale), None


def random_gate(rng: jax.Array, shape: tuple[int, int], amount: float, scale: float) -> Float[Array, "batch length"]:
    """`scale` at a random part of a batch's places, N(amount, 0.05) of all; 0 elsewhere."""
    of_count, of_places = jax.random.split(rng)
    places = math.prod(shape)
    count = ((amount + 0.05 * jax.random.normal(of_count)) * places).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(of_places, (places,))))
    return jnp.where(rank < count, scale, 0.0).reshape(shape)


def fixed_gate(
    tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"], amount: float, scale: float
) -> Float[Array, "batch length"]:
    """0 at the first ceil((1 - amount) n) of the n real tokens from one separator to the next, `scale` elsewhere.

    Segments are counted in each row; the authors' code mixes up those of a batch.
    """
    rows, length = tokens.shape
    places = jnp.arange(length)
    separator = jnp.isin(tokens, jnp.array(SEPARATORS))
    segment = jnp.cumsum(separator, axis=1)
    sizes = jnp.zeros((rows, length + 1), jnp.int32).at[jnp.arange(rows)[:, None], segment].add(mask)
    start = jax.lax.cummax(jnp.where(separator, places, 0), axis=1)
    allowed = np.ceil((1 - amount) * np.arange(length + 1)).astype(np.int32)
    allowed = jnp.take(jnp.asarray(allowed), jnp.take_along_axis(sizes, segment, axis=1))
    return jnp.where((places - start < allowed) & mask, 0.0, scale)


# Segments between learned boundaries, averaged (arXiv 2211.09761).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments(MrT5Config):
    """Replaces the bytes between learned boundaries by their mean."""

    temperature: float = 0.5
    """The temperature of the boundaries' relaxed Bernoulli distribution."""
    prior: float = 0.2
    """The prior probability of a boundary."""
    mask_surplus: bool = False
    """Whether the slots of a row after its last segment are hidden. In the authors' code they are not, so that a row
    depends on the others of its batch."""
    reduction: ClassVar[str] = "boundaries"

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0 or not 0 < self.prior < 1:
            raise ValueError(
                f"temperature is {self.temperature} and prior {self.prior}; the first must be positive and the second "
                "between 0 and 1."
            )

    def encoder(self) -> MrT5Encoder:
        return SegmentEncoder(self.encoder_stack)

    def deleted(self, begun: Begun) -> Int[Array, ""]:
        """The number of the real places that are merged into others."""
        return begun.mask.sum() - begun.kept.sum()

    def own_loss(self, begun: Segmented) -> Float[Array, ""]:
        return boundary_loss(begun, self.prior)

    def encoder_flops(self, inputs: int, slots: int = 0) -> float:
        slots = slots or inputs
        return self._flops(inputs, slots, 2 * self.d_model * (self.mlp_dim + slots))


@flax.struct.dataclass
class Segmented(Begun):
    """Rows with segments; `kept` is true where a segment begins."""

    boundaries: Float[Array, "batch length"] | None = None
    """1 where a segment ends, with the gradient of the probability."""


class BoundaryPredictor(nn.Module):
    """The logit of a segment's end at each state, by an MLP on the norm of the state."""

    config: Segments

    @nn.compact
    def __call__(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length"]:
        cfg = self.config

        def dense(x, features, axes, bias, name):
            init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), axes)
            kernel = self.param(f"{name}_kernel", init, (x.shape[-1], features), cfg.param_dtype)
            init = nn.with_logical_partitioning(nn.initializers.constant(bias), (axes[1],))
            shift = self.param(f"{name}_bias", init, (features,), cfg.param_dtype)
            return x @ gather(kernel.astype(x.dtype), *axes) + shift.astype(x.dtype)

        x = Norm("rms", eps=cfg.norm_eps, param_dtype=cfg.param_dtype, name="norm")(x.astype(jnp.float32))
        x = gelu(dense(x, cfg.mlp_dim, ("d_model", "mlp"), 0.0, "up"))
        return dense(x, 1, ("mlp", None), -1.0, "down")[..., 0]


class SegmentEncoder(MrT5Encoder):
    """An encoder that averages segments. It draws the noise of the boundaries, unless the collection "noise" has it, as
    `uniform`."""

    config: Segments

    def add_reduction(self):
        self.boundary_predictor = BoundaryPredictor(self.config)

    def scored(self, x, tokens, mask, threshold, deterministic: bool) -> Segmented:
        length = mask.shape[1]
        z = self.boundary_predictor(x)
        if self.has_variable("noise", "uniform"):
            uniform = self.get_variable("noise", "uniform")
        else:
            uniform = jax.random.uniform(self.make_rng("gate"), z.shape, minval=1e-6, maxval=1 - 1e-6)
        soft = jax.nn.sigmoid((jnp.log(uniform) - jnp.log1p(-uniform) + z) / self.config.temperature)
        ends = (soft > 0.5) - jax.lax.stop_gradient(soft) + soft
        last = mask & (jnp.arange(length) == jnp.max(jnp.where(mask, jnp.arange(length), -1), -1, keepdims=True))
        ends = jnp.where(last, 1.0, ends * mask)
        first = jnp.pad(ends[:, :-1] > 0.5, ((0, 0), (1, 0)), constant_values=True)
        return Segmented(x, mask, first & mask, logits=z, boundaries=ends)

    def reduced(self, begun: Segmented, hard, capacity: int):
        """The mean of each segment, at the place where it begins. `capacity` is the number of slots; 0: the length."""
        ends, states = begun.boundaries, begun.states
        rows, length = ends.shape
        slots = capacity or length
        number = jnp.cumsum(ends, axis=1) - ends  # the number of the segment that a place is in, with a gradient
        which = jnp.round(jax.lax.stop_gradient(number)).astype(jnp.int32)
        slot = jnp.arange(slots)
        inside = which[..., None] == slot
        weights = jnp.where(inside, 1 - (slot - number[..., None]), 0.0)  # 1, with the gradient of the number
        total = jnp.einsum("bls,bld->bsd", weights, states.astype(jnp.float32))
        x = (total / (weights.sum(1)[..., None] + 1e-9)).astype(states.dtype)
        counts = begun.kept.sum(-1, keepdims=True)
        target = jnp.where(begun.kept, which, slots)
        places = jnp.zeros((rows, slots), jnp.int32).at[jnp.arange(rows)[:, None], target]
        places = places.set(jnp.broadcast_to(jnp.arange(length), ends.shape), mode="drop")
        filled = slot < counts
        seen = filled if self.config.mask_surplus else jnp.broadcast_to(slot < counts.max(), filled.shape)
        return x, places, seen & jnp.take_along_axis(begun.mask, places, 1), (), (hide(filled),)


def boundary_loss(begun: Segmented, prior: float) -> Float[Array, ""]:
    """-log Binomial(N, prior)(number of boundaries) / N, with the padded length N, averaged over rows."""
    length = begun.mask.shape[1]
    n = begun.boundaries.sum(-1)
    log = jax.scipy.special.gammaln
    choose = math.lgamma(length + 1) - log(n + 1) - log(length - n + 1)
    return -jnp.mean(choose + n * math.log(prior) + (length - n) * math.log1p(-prior)) / length


# A convolution with strides (CANINE, arXiv 2103.06874).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(MrT5Config):
    """Makes one place of `stride` neighbours."""

    stride: int = 4
    """The number of neighbours that become one place."""
    reduction: ClassVar[str] = "convolution"

    def __post_init__(self):
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; it must be at least 1.")

    def encoder(self) -> MrT5Encoder:
        return ConvolutionEncoder(self.encoder_stack)

    def deleted(self, begun: Begun) -> Float[Array, ""]:
        return (1 - 1 / self.stride) * begun.mask.sum()

    def capacity(self, most: int, length: int) -> int:
        return 0

    def encoder_flops(self, inputs: int, slots: int = 0) -> float:
        return self._flops(inputs, slots or inputs // self.stride, 2 * self.d_model**2)


class StridedConvolution(nn.Module):
    """gelu of a convolution of the states' norm, with a kernel as long as its stride; a remainder is dropped."""

    config: Convolution

    @nn.compact
    def __call__(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch slots d_model"]:
        cfg = self.config
        width, stride = x.shape[-1], cfg.stride

        def uniform(rng, shape, dtype=jnp.float32):  # PyTorch's
            bound = (width * stride) ** -0.5
            return jax.random.uniform(rng, shape, dtype, -bound, bound)

        axes = (None, "d_model", "channels")
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(uniform, axes), (stride, width, width), cfg.param_dtype
        )
        bias = self.param("bias", nn.with_logical_partitioning(uniform, ("channels",)), (width,), cfg.param_dtype)
        x = Norm("rms", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")(x)
        slots = x.shape[1] // stride
        x = x[:, : slots * stride].reshape(x.shape[0], slots, stride, width)
        return gelu(jnp.einsum("bskd,kde->bse", x, gather(kernel.astype(x.dtype), *axes)) + bias.astype(x.dtype))


class ConvolutionEncoder(MrT5Encoder):
    config: Convolution

    def add_reduction(self):
        self.convolution = StridedConvolution(self.config)

    def scored(self, x, tokens, mask, threshold, deterministic: bool) -> Begun:
        return Begun(x, mask, mask)

    def reduced(self, begun: Begun, hard, capacity: int):
        (rows, length), stride = begun.mask.shape, self.config.stride
        if length < stride:
            raise ValueError(f"rows have {length} places; they must have at least stride = {stride}.")
        slots = length // stride
        windows = begun.mask[:, : slots * stride].reshape(rows, slots, stride)
        places = jnp.arange(slots)[None] * stride
        return self.convolution(begun.states), places, windows[..., 0], (), (hide(windows.any(-1)),)


# No input at all: a decoder-only control.


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoInput(MrT5Config):
    """Shows the encoder an end and nothing else."""

    gate_layer: int = 0
    reduction: ClassVar[str] = "nothing"

    def module(self) -> MrT5:
        return WithoutInput(self)

    def encoder(self) -> MrT5Encoder:
        return NoInputEncoder(self.encoder_stack)

    def deleted(self, begun: Begun) -> Int[Array, ""]:
        return begun.mask.sum() - begun.kept.sum()

    def capacity(self, most: int, length: int) -> int:
        return 0

    def encoder_flops(self, inputs: int, slots: int = 0) -> float:
        return self.plain.encoder_flops(1)


class WithoutInput(MrT5):
    config: NoInput

    def begin(self, inputs, mask=None, threshold=None, deterministic: bool = True) -> Begun:
        ends = jnp.full_like(inputs[:, :1], self.config.eos_id)
        return super().begin(ends, jnp.ones_like(ends, bool), threshold, deterministic)


class NoInputEncoder(MrT5Encoder):
    config: NoInput

    def add_reduction(self):
        pass

    def scored(self, x, tokens, mask, threshold, deterministic: bool) -> Begun:
        return Begun(x, mask, mask)

    def reduced(self, begun: Begun, hard, capacity: int):
        return begun.states, jnp.arange(begun.mask.shape[1])[None], begun.mask, (), (hide(begun.mask),)


BASELINES = {kind.reduction: kind for kind in (RandomDeletion, FixedDeletion, Segments, Convolution, NoInput)}


def saved_before(fields: dict[str, Any]) -> tuple[type[MrT5Config], dict[str, Any]]:
    """See `MrT5Config.saved_before`. Options of reductions other than the config's own had no effect; they are dropped.

    Raises:
      ValueError: the reduction is unknown.
    """
    fields = dict(fields)
    kinds = {MrT5Config.reduction: MrT5Config, **BASELINES}
    if (name := fields.pop("reduction")) not in kinds:
        raise ValueError(f"reduction is {name!r}; it must be one of {', '.join(kinds)}.")
    known = {field.name for field in dataclasses.fields(kinds[name])}
    for option in {"amount", "stride", "temperature", "prior", "mask_surplus"} - known:
        fields.pop(option, None)
    if name == NoInput.reduction:
        fields["gate_layer"] = 0
    return kinds[name], fields
