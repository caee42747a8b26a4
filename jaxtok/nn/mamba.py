"""Mamba's mixer (arXiv 2312.00752): a short convolution, a selective state space model, and a gate.

Channel e keeps N numbers h, and decides for each token how much of them stays and what is added (algorithm 2):
h_t = exp(Delta_t A) h_(t-1) + Delta_t B_t u_t and y_t = C_t h_t + D u_t, where Delta, B and C depend on the token. B is
discretised by Delta B, as in the authors' code, not by the zero-order hold that the paper's Eq. 4 has.

Axes: channels (E, the inner width), states (N), taps (K, of the convolution), rank (R, of Delta's projection).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather

Method = Literal["auto", "scan", "associative"]
METHODS = ("auto", "scan", "associative")


def selective_scan(
    u: Float[Array, "batch length channels"],
    delta: Float[Array, "batch length channels"],
    a: Float[Array, "channels states"],
    b: Float[Array, "batch length states"],
    c: Float[Array, "batch length states"],
    *,
    d: Float[Array, " channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    delta_bias: Float[Array, " channels"] | None = None,
    softplus: bool = False,
    state: Float[Array, "batch channels states"] | None = None,
    keep: Float[Array, "batch length"] | None = None,
    method: Method = "auto",
    part: int = 64,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch channels states"]]:
    """y and the last h, in float32.

    The states [batch, length, channels, states] never exist for more than `part` tokens, in the backward pass neither:
    it computes them again from the state before each part. A token with Delta = 0 changes no state.

    Args:
      u: the inputs.
      delta: step sizes; `delta_bias` is added to them, and then softplus applied if asked for.
      a: the rates, negative.
      d: the factor of what u adds to y; None: nothing.
      z: a gate: y is multiplied by silu(z).
      state: h before the first token; None: zeros.
      keep: 0 where h begins anew with a token, else 1.
      method: scan: one token after the other, the fewest operations; associative: a part of the row in log(part)
        steps; auto: the first on a CPU, else the second.
      part: the tokens of a part; 0: the whole row.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if method == "auto":
        method = "scan" if jax.default_backend() == "cpu" else "associative"
    batch, length, channels = u.shape
    u, delta, a, b, c = (x.astype(jnp.float32) for x in (u, delta, a, b, c))
    if delta_bias is not None:
        delta = delta + delta_bias.astype(jnp.float32)
    if softplus:
        delta = jax.nn.softplus(delta)
    keep = jnp.ones((batch, length)) if keep is None else keep.astype(jnp.float32)
    part = min(part or length, length)
    padding = -length % max(part, 1)

    def cut(x):  # [parts, part, batch, ...]; padding has Delta = 0
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=1 if x is keep else 0)
        return jnp.moveaxis(x, 1, 0).reshape(-1, part, *x.shape[:1], *x.shape[2:])

    inner = _one_by_one if method == "scan" else _in_log_steps
    step = jax.checkpoint(functools.partial(inner, a), prevent_cse=False)
    state = jnp.zeros((batch, channels, a.shape[1])) if state is None else state.astype(jnp.float32)
    last, y = jax.lax.scan(step, state, tuple(map(cut, (u, delta, b, c, keep))))
    y = jnp.moveaxis(y.reshape(-1, batch, channels)[:length], 0, 1)
    if d is not None:
        y = y + d.astype(jnp.float32) * u
    return (y if z is None else y * jax.nn.silu(z.astype(jnp.float32))), last


def _one_by_one(a, state, tokens):
    def step(state, token):
        u, delta, b, c, keep = token
        decay = jnp.exp(delta[..., None] * a) * keep[:, None, None]
        state = decay * state + (delta * u)[..., None] * b[:, None]
        return state, jnp.einsum("bes,bs->be", state, c)

    return jax.lax.scan(step, state, tokens)


def _in_log_steps(a, state, tokens):
    u, delta, b, c, keep = tokens
    decay = jnp.exp(delta[..., None] * a) * keep[..., None, None]
    added = (delta * u)[..., None] * b[:, :, None]
    decay, added = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1]), (decay, added))
    states = decay * state + added
    return states[-1], jnp.einsum("tbes,tbs->tbe", states, c)


def causal_convolution(
    x: Float[Array, "batch length channels"],
    kernel: Float[Array, "taps channels"],
    context: Float[Array, "batch before channels"],
    segments: Int[Array, "batch length"] | None = None,
) -> Float[Array, "batch length channels"]:
    """sum_k kernel[k] x[t - K + 1 + k] for each channel, with `context`, the K - 1 inputs before x.

    Args:
      segments: inputs of another segment count as 0.
    """
    taps, length = kernel.shape[0], x.shape[1]
    whole = jnp.concatenate([context.astype(x.dtype), x], 1)
    total = 0.0
    for k in range(taps):
        shifted = whole[:, k : k + length]
        if segments is not None and (back := taps - 1 - k):
            before = jnp.pad(segments, ((0, 0), (min(back, length), 0)), constant_values=-1)[:, :length]
            shifted = jnp.where((before == segments)[..., None], shifted, 0)
        total = total + kernel[k] * shifted
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The sizes of a mixer. Defaults: the paper's."""

    d_model: int = 768
    state_size: int = 16
    """N, the numbers that a channel keeps."""
    conv_kernel: int = 4
    """K, the tokens that the convolution sees."""
    expand: float = 2.0
    """E / d_model."""
    time_step_rank: int = 0
    """R, the rank of the step sizes' projection; 0: d_model / 16, rounded up."""
    use_bias: bool = False
    """Whether the projections into and out of the mixer have biases."""
    use_conv_bias: bool = True
    time_step_min: float = 0.001
    """Step sizes begin between this and `time_step_max`, evenly by their logarithms."""
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the projections; the states are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the parameters, except for the rates and the skip, which are float32."""
    method: Method = "auto"
    """How the recurrence is computed; see `selective_scan`."""

    def __post_init__(self):
        for name in ("d_model", "state_size", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.time_step_rank < 0:
            raise ValueError(f"time_step_rank is {self.time_step_rank}; it must be at least 1, or 0 for d_model / 16.")
        if self.expand * self.d_model < 1 or self.expand * self.d_model % 1:
            raise ValueError(
                f"expand is {self.expand}; expand * d_model = {self.expand * self.d_model} must be a whole number."
            )
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min is {self.time_step_min} and time_step_max {self.time_step_max}; the first must be "
                "positive and at most the second."
            )
        for name, allowed in (("dtype", ("float32", "bfloat16", "float16")), ("param_dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}.")

    @property
    def channels(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        return self.time_step_rank or -(-self.d_model // 16)

    def mixer_params(self) -> int:
        """The number of parameters of a mixer in one direction."""
        d, e, n, r = self.d_model, self.channels, self.state_size, self.rank
        biases = self.use_bias * (2 * e + d) + self.use_conv_bias * e
        return 2 * d * e + e * self.conv_kernel + e * (r + 2 * n) + r * e + e + e * n + e + e * d + biases

    def mixer_flops(self) -> float:
        """Forward FLOPs of one token in a mixer; the recurrence takes about 9 for each number that is kept."""
        d, e, n, r = self.d_model, self.channels, self.state_size, self.rank
        return 6 * d * e + 2 * e * (r + 2 * n) + 2 * r * e + 2 * e * self.conv_kernel + 9 * e * n


class Direction(nn.Module):
    """Convolution, step sizes and recurrence in one order of the tokens: u to y, without the gate (F in the paper of
    bidirectional Mamba)."""

    config: MixerConfig
    small_steps: bool = True
    """Whether step sizes begin small (`time_step_min`); if not, their projection begins as any other, and they near
    0.7."""

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "batch length channels"],
        *,
        context: Float[Array, "batch before channels"] | None = None,
        state: Float[Array, "batch channels states"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        real: Bool[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch channels states"]]:
        """y in float32, and the last state.

        Args:
          context: the inputs of the convolution before u; default: zeros.
          state: the state before the first token; default: zeros.
          segments: nothing passes from one to the next.
          real: tokens that are not padding; others come after them, change no state, and have y = 0.
        """
        cfg, f32 = self.config, jnp.float32
        e, n, r, taps = cfg.channels, cfg.state_size, cfg.rank, cfg.conv_kernel

        def param(name, init, shape, axes, dtype=cfg.param_dtype):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
            return gather(value.astype(f32 if dtype == f32 else cfg.dtype), *axes)

        kernel = param("conv", _uniform(taps**-0.5), (taps, e), (None, "mlp"))
        into = param("selection", _uniform(e**-0.5), (e, r + 2 * n), ("mlp", None))
        steps = param("steps", _uniform(r**-0.5 * cfg.time_step_scale), (r, e), (None, "mlp"))
        first = _step_bias(cfg) if self.small_steps else _uniform(r**-0.5)
        bias = param("steps_bias", first, (e,), ("mlp",))
        rates = -jnp.exp(param("a_log", _a_log, (e, n), ("mlp", None), f32))
        skip = param("skip", nn.initializers.ones, (e,), ("mlp",), f32)

        context = jnp.zeros((len(u), taps - 1, e), u.dtype) if context is None else context
        x = causal_convolution(u, kernel, context, segments)
        if cfg.use_conv_bias:
            x = x + param("conv_bias", _uniform(taps**-0.5), (e,), ("mlp",))
        x = jax.nn.silu(x)
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        low, b, c = jnp.split(x @ into, [r, r + n], -1)
        delta = jax.nn.softplus((low @ steps).astype(f32) + bias.astype(f32))
        self.sow("intermediates", "convolved", x)
        self.sow("intermediates", "delta", delta)
        keep = None
        if segments is not None:
            same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
            keep = same.astype(f32)
        if real is not None:
            delta = jnp.where(real[..., None], delta, 0)
        x, delta = (constrain(y, "batch", None, "mlp") for y in (x, delta))  # whole rows, even if they are divided
        y, state = selective_scan(x, delta, rates, b, c, d=skip, state=state, keep=keep, method=cfg.method)
        return (y if real is None else jnp.where(real[..., None], y, 0)), state


class Mixer(nn.Module):
    """[batch, length, d_model] to the same, in one, two or three orders of the tokens.

    1: from first to last (Mamba). 2: also from last to first (v2 of Vision Mamba). 3: also across `slices` (v3 of
    SegMamba): with the row written as [slices, length / slices], by columns. The results are added; in all orders, the
    projections into and out of the mixer and the gate are the same.
    """

    config: MixerConfig
    orders: Literal[1, 2, 3] = 1
    slices: int = 5
    small_steps: bool = True
    """Whether the step sizes of the second and third order begin small, too; in the released code they do not."""
    output_scale: float = 1.0
    """The factor of the initial projection out of the mixer."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        *,
        conv: Float[Array, "batch taps channels"] | None = None,
        state: Float[Array, "batch channels states"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        real: Bool[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], Float[Array, "batch taps channels"], Array]:
        """The result, and what is kept: the last K inputs of the convolution, and the state. See `Direction`.

        Raises:
          ValueError: there is a cache or padding, or there are segments, with more than one order; or `slices` does
            not divide the length.
        """
        cfg, (batch, length) = self.config, x.shape[:2]
        if self.orders not in (1, 2, 3):
            raise ValueError(f"orders is {self.orders}; it must be 1, 2 or 3.")
        if self.orders > 1 and any(given is not None for given in (conv, state, segments, real)):
            raise ValueError(
                f"orders is {self.orders}, and a cache, segments or padding are given; only a mixer that reads from "
                "first to last has them."
            )
        if self.orders == 3 and (self.slices < 1 or length % self.slices):
            raise ValueError(f"slices is {self.slices}; it must divide the number of tokens, {length}.")
        e, taps = cfg.channels, cfg.conv_kernel

        def param(name, init, shape, axes):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, cfg.param_dtype)
            return gather(value.astype(cfg.dtype), *axes)

        def into(name):
            inner = _uniform(cfg.d_model**-0.5)
            y = x.astype(cfg.dtype) @ param(name, inner, (cfg.d_model, e), ("d_model", "mlp"))
            return y + param(f"{name}_bias", inner, (e,), ("mlp",)) if cfg.use_bias else y

        u, z = into("value"), into("gate")
        if real is not None:
            u = jnp.where(real[..., None], u, 0)
        conv = jnp.zeros((batch, taps, e), u.dtype) if conv is None else conv.astype(u.dtype)
        forward = Direction(cfg, name="forward")
        y, state = forward(u, context=conv[:, 1:], state=state, segments=segments, real=real)
        if self.orders > 1:
            y = y + jnp.flip(Direction(cfg, self.small_steps, name="backward")(jnp.flip(u, 1))[0], 1)
        if self.orders > 2:
            across = Direction(cfg, self.small_steps, name="across")(by_columns(u, self.slices))[0]
            y = y + by_columns(across, length // self.slices)
        y = (y * jax.nn.silu(z.astype(jnp.float32))).astype(cfg.dtype)
        y = y @ param("output", _uniform(self.output_scale * e**-0.5), (e, cfg.d_model), ("mlp", "d_model"))
        if cfg.use_bias:
            y = y + param("output_bias", _uniform(e**-0.5), (cfg.d_model,), ("channels",))
        inputs = jnp.concatenate([conv, u], 1)
        count = jnp.full((batch,), length) if real is None else real.sum(1)
        kept = jnp.take_along_axis(inputs, count[:, None, None] + jnp.arange(taps)[:, None], axis=1)
        return y, kept, state


def by_columns(x: Float[Array, "batch length channels"], rows: int) -> Float[Array, "batch length channels"]:
    """The tokens of a row, written as `rows` rows of a table, read by columns. Its inverse has length / rows rows.

    >>> by_columns(jnp.arange(6)[None, :, None], 2)[0, :, 0].tolist()
    [0, 3, 1, 4, 2, 5]
    """
    batch, length, channels = x.shape
    return x.reshape(batch, rows, length // rows, channels).swapaxes(1, 2).reshape(x.shape)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _a_log(key, shape, dtype=jnp.float32):
    """log(1), log(2), ..., log(N) for each channel (S4D-Real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def _step_bias(config: MixerConfig) -> nn.initializers.Initializer:
    """The inverse of softplus of step sizes that are even by their logarithms."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)

    def init(key, shape, dtype=jnp.float32):
        steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
        steps = jnp.maximum(steps, config.time_step_floor)
        return (steps + jnp.log(-jnp.expm1(-steps))).astype(dtype)

    return init
