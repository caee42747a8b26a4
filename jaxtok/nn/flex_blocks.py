"""FlexTok's transformer blocks (arXiv 2502.13967): plain, and modulated by a condition (adaLN-zero, arXiv 2212.09748).

With u~ = LN(u) (1 + scale) + shift, both of the condition c by m = W silu(c) + b,

    FlexBlock         x += attention(LN x);  x += mlp(LN x)
    with sets > 0     x += gate_a attention(x~_a);  x += gate_m mlp(x~_m)
    FlexDecoderBlock  x += gate_s self(x~_s);  x += gate_x cross(x~_q, context~_c);  x += gate_m mlp(x~_m)

The chunks of m are in the order gate_a, gate_m, shift_a, scale_a, shift_m, scale_m: gates first, other than in DiT. A
block may have several sets of them, each for some of the tokens. Norms have neither scale nor bias, those of a head's
queries and keys included; scores are q k 8 / head_dim, which is 1 / sqrt(head_dim) only for heads of 64 channels (muP,
arXiv 2203.03466); the MLP is fc2(silu(fc1 x) fc3 x) without biases. W and b begin at 0, and so do the gates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.nn.attention import attend
from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.norms import Norm, standardized
from jaxtok.nn.transformer import Block, ModulatedBlock


def gated_width(d_model: int, ratio: float) -> int:
    """The width of the gated MLP: two thirds of `ratio` times the width."""
    return 2 * int(d_model * ratio) // 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexStack(LinearStack):
    """A stack of FlexTok's blocks, bidirectional if no mask is given."""

    norm: str = "layernorm_nonparam"
    norm_eps: float = 1e-5
    causal: bool = False
    rotary_fraction: float = 0.0
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    sets: tuple[int, ...] = ()
    """The number of neighbouring tokens that share a set of modulations, for each set, the last of which takes all that
    are left; empty: no modulation."""

    def scored(self, q, k, layer):
        q, k = (standardized(x, self.norm_eps).astype(x.dtype) for x in (q, k))
        return q * (8 / math.sqrt(self.head_dim)), k

    def block(self) -> type[Block]:
        return FlexBlock

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        if group == "modulation":
            return modulation(features, self.dtype, self.param_dtype, name)
        std = xavier_std(self.d_model, self.d_model)
        if group == "output":
            return self.linear(features, ("heads", "d_model"), std, None, name)
        if group in ("query", "key", "value"):
            return self.linear(features, ("d_model", "heads"), std, None, name)
        return super().projection(group, features, name)

    @property
    def output_init_std(self) -> float:
        """That of the MLP's last matrix."""
        return xavier_std(self.mlp_dim, self.d_model)

    def modulation_params(self) -> int:
        """The parameters of one block's modulation, which cost as much for a row as others for a token."""
        return 6 * len(self.sets) * self.d_model**2


def flex_stack(width: int, depth: int, head_dim: int, mlp_ratio: float, **options) -> FlexStack:
    """The config of a stack by FlexTok's names.

    Raises:
      ValueError: heads do not divide the width.
    """
    if head_dim < 1 or width % head_dim:
        raise ValueError(f"head_dim is {head_dim}, which does not divide the width {width}.")
    hidden = gated_width(width, mlp_ratio)
    return FlexStack(
        d_model=width,
        num_layers=depth,
        num_heads=width // head_dim,
        mlp_dim=hidden,
        init_std=xavier_std(width, max(hidden, 1)),
        **options,
    )


def xavier_std(fan_in: int, fan_out: int) -> float:
    """The standard deviation of Xavier's initialisation. (The authors draw from the uniform distribution of it.)"""
    return math.sqrt(2 / (fan_in + fan_out))


def modulation(features: int, dtype, param_dtype, name: str | None = None) -> Linear:
    """A projection of the condition to shifts, scales and gates, which begin at 0."""
    zeros = nn.initializers.zeros
    axes = ("d_model", "modulation")
    return Linear(features, axes, True, kernel_init=zeros, dtype=dtype, param_dtype=param_dtype, name=name)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale) + shift


def by_set(
    chunks: Float[Array, "batch all"], sets: Sequence[int], length: int, count: int
) -> list[Float[Array, "batch _ d_model"]]:
    """The `count` chunks for each token, or, with one set, for all. `chunks` has those of all sets in turn."""
    chunks = chunks.reshape(len(chunks), len(sets), count, -1)
    if len(sets) == 1:
        return [chunks[:, :, n] for n in range(count)]
    ends = np.cumsum(sets[:-1])
    number = np.searchsorted(ends, np.arange(length), side="right")
    own = [(number == n)[:, None] for n in range(len(sets))]
    return [sum(jnp.where(mask, chunks[:, n, None, c], 0) for n, mask in enumerate(own)) for c in range(count)]


class FlexBlock(ModulatedBlock):
    """A block, modulated by the condition [batch, d_model] if the config has sets."""

    config: FlexStack

    def modulated(self) -> bool:
        return bool(self.config.sets)

    def modulations(self, condition: Float[Array, "batch d_model"], length: int) -> dict[str, Sequence[Array]]:
        cfg = self.config
        project = cfg.projection("modulation", 6 * len(cfg.sets) * cfg.d_model, name="modulation")
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = by_set(project(nn.silu(condition)), cfg.sets, length, 6)
        return {"attention": (shift_a, scale_a, gate_a), "ffn": (shift_m, scale_m, gate_m)}


class FlexDecoderBlock(nn.Module):
    """The authors' block with cross-attention to a context, in their order of 11 chunks: the gates of self-attention,
    cross-attention and MLP, then shift and scale of self-attention, of the query, of the context, and of the MLP."""

    config: FlexStack

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        context: Float[Array, "batch others d_model"],
        condition: Float[Array, "batch d_model"],
    ) -> Float[Array, "batch length d_model"]:
        cfg = self.config
        project = cfg.projection("modulation", 11 * cfg.d_model, name="modulation")
        gate_self, gate_cross, gate_mlp, *others = jnp.split(project(nn.silu(condition))[:, None], 11, axis=-1)
        own, query, memory, ffn = zip(others[::2], others[1::2])

        def normed(y, shifted, name):
            return modulate(cfg.norm_module(f"norm_{name}")(y), *shifted)

        y = normed(x, own, "self")
        x = x + gate_self * FlexAttention(cfg, name="self_attention")(y, y)
        y = normed(x, query, "query")
        x = x + gate_cross * FlexAttention(cfg, name="cross_attention")(y, normed(context, memory, "context"))
        return x + gate_mlp * cfg.projection("ffn", cfg.d_model, name="ffn")(normed(x, ffn, "ffn"))


class FlexAttention(nn.Module):
    """Attention of tokens to others, of all to all."""

    config: FlexStack

    @nn.compact
    def __call__(self, x, others):
        cfg = self.config

        def heads(y, group):
            y = cfg.projection(group, cfg.num_heads * cfg.head_dim, name=group)(y)
            return y.reshape(*y.shape[:-1], cfg.num_heads, cfg.head_dim)

        q, k = cfg.scored(heads(x, "query"), heads(others, "key"), jnp.int32(0))
        y = attend(q, k, heads(others, "value"), causal=False)
        return cfg.projection("output", cfg.d_model, name="output")(y.reshape(*y.shape[:-2], -1))


class FlexHead(nn.Module):
    """proj(LN(x)), or proj(LN(x) (1 + scale) + shift) with shift and scale of a condition; proj begins at 0."""

    features: int
    modulated: bool = False
    eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d_model"], condition: Float[Array, "batch d_model"] | None = None
    ) -> Float[Array, "batch length features"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        d_model = x.shape[-1]
        y = Norm("layernorm_nonparam", eps=self.eps, **types)(x)
        if self.modulated:
            m = modulation(2 * d_model, self.dtype, self.param_dtype, "modulation")(nn.silu(condition))
            y = modulate(y, *jnp.split(m[:, None], 2, axis=-1))
        axes = ("d_model", "channels")
        return Linear(self.features, axes, True, kernel_init=nn.initializers.zeros, **types, name="proj")(y)


class TimeEmbedding(nn.Module):
    """An embedding of times in [0, 1]: mlp([cos(t f), sin(t f)]) with f_k = 1000 exp(-k ln(256) / half), k < half.

    One column of zeros follows if the number of channels is odd. As t f goes up to 1000, f is formed first and rounded,
    as in the authors' code: another order moves velocities by 2e-4.
    """

    features: int
    channels: int = 256
    """The number of channels of sines and cosines."""
    max_time: float = 1.0
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch features"]:
        def linear(name, features, fan_in):
            init = nn.initializers.normal(xavier_std(fan_in, features))
            return Linear(features, (None, "d_model"), kernel_init=init, param_dtype=self.param_dtype, name=name)

        y = linear("in", self.features, self.channels)(time_waves(t, self.channels, self.max_time))
        return linear("out", self.features, self.features)(nn.silu(y))


def time_waves(t: Float[Array, " batch"], channels: int, max_time: float = 1.0) -> Float[Array, "batch channels"]:
    """[cos(t f), sin(t f)] of `TimeEmbedding`, in float32."""
    half = channels // 2
    exponents = np.float32(-math.log(256)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1000 / max_time) * np.exp(exponents.astype(np.float64)).astype(np.float32)
    arguments = t.astype(jnp.float32)[:, None] * frequencies
    waves = jnp.concatenate([jnp.cos(arguments), jnp.sin(arguments)], -1)
    return jnp.pad(waves, [(0, 0), (0, channels % 2)])


def grid_waves(
    rows: int, columns: int, d_model: int, unscrambled: bool = False
) -> Float[np.ndarray, "rows columns d_model"]:
    """The fixed position table: sines and cosines of one number of a cell in the first half of the channels, of another
    in the second.

    The authors' numbers of cell m = row columns + column are m // rows and m mod rows, which are row and column only in
    a square. With `unscrambled` they are row and column in any table.

    Raises:
      ValueError: the channels are not divisible by 4.
    """
    if d_model % 4:
        raise ValueError(f"the width is {d_model}; for the position table it must be divisible by 4.")
    cell = np.arange(rows * columns)
    first, second = np.divmod(cell, columns if unscrambled else rows)
    quarter = d_model // 4
    frequencies = 1 / 10000 ** (np.arange(quarter) / quarter)

    def waves(number):
        arguments = number[:, None] * frequencies
        return np.concatenate([np.sin(arguments), np.cos(arguments)], -1)

    table = np.concatenate([waves(first), waves(second)], -1)
    return table.reshape(rows, columns, d_model).astype(np.float32)
