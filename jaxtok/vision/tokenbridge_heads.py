"""TokenBridge's heads (arXiv 2503.16430, section 3.3): from the features z of a position to the codes of its channels.

    autoregressive  p(q | z) = prod_c p(q_c | q_<c, z), by a small causal transformer over the channels
    parallel        p(q | z) = prod_c p(q_c | z), by the same transformer without the codes before c: a baseline
    diffusion       MAR's head (arXiv 2406.11838): the vector itself is drawn, by denoising it with a small MLP

With s = W z and the embeddings t_c and e_c of channel c, the input of step 0 is s + e_0 and that of step c is
E_c[q_{c-1}] + e_c; the condition of step c, by which the blocks are modulated, is s + t_c. When drawing, the authors'
code begins with s + t_0 + e_0, unlike in training (`TokenBridgeConfig.official_first_token`). Channels are in the order
in which they are predicted. A row is a position of an image.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Block, ModulatedBlock, Stack
from jaxtok.protocols import Params

if TYPE_CHECKING:
    from jaxtok.vision.tokenbridge import TokenBridgeConfig

Keys = Any
"""A random key for each row; None if nothing is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTStack(LinearStack):
    """timm's blocks, as MAR's transformers have them, with Xavier's initialisation."""

    norm_eps: float = 1e-6
    causal: bool = False
    mask_keys: bool = True
    rotary_fraction: float = 0.0

    def kernel_init(self, axes: tuple[str, str], std: float) -> nn.initializers.Initializer:
        # Queries, keys and values are one matrix there, so Xavier's bound is that of a matrix of 3 x their width.
        scale = 0.5 if axes == ("d_model", "heads") else 1.0
        return nn.initializers.variance_scaling(scale, "fan_avg", "uniform") if std else nn.initializers.zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelStack(ViTStack):
    """Causal blocks that are modulated, with a norm of each head's queries and keys."""

    causal: bool = True
    mask_keys: bool = False
    qk_norm: bool = True

    def head_norm(self, name: str | None = None) -> Norm:
        return self.norm_module(name)

    def block(self) -> type[Block]:
        return ModulatedBlock


class _Head(nn.Module):
    config: TokenBridgeConfig

    def table(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float = 0.02) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
        value = self.param(name, init, shape, self.config.param_dtype)
        return gather(value.astype(self.config.dtype), *axes)

    def linear(self, features: int, axes=("d_model", "mlp"), zero: bool = False) -> Linear:
        init = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
        cfg = self.config
        return Linear(features, axes, kernel_init=init, dtype=cfg.dtype, param_dtype=cfg.param_dtype)

    def norm(self, kind: str) -> Norm:
        cfg = self.config
        return Norm(kind, eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype)


class ChannelHead(_Head):
    """The autoregressive head, and the parallel one, which has no tables of codes."""

    def setup(self):
        cfg = self.config
        width, channels, levels = cfg.head_width, cfg.channels, cfg.quantizer.levels
        self.condition = self.linear(width, ("d_model", "channels"))
        self.channel_embedding = self.table("channel_embedding", (channels, width), (None, "d_model"))
        self.step_embedding = self.table("step_embedding", (channels, width), (None, "d_model"))
        if cfg.head == "autoregressive":
            shape = (channels - 1, levels, width)
            self.tables = self.table("tables", shape, (None, "vocab", "d_model"), std=1.0)
        self.stack = Stack(cfg.channel_stack)
        self.final_norm, self.last_norm = self.norm("layernorm"), self.norm("layernorm_nonparam")
        self.final_modulation = self.linear(2 * width, ("d_model", "modulation"), zero=True)
        xavier = nn.initializers.xavier_uniform(in_axis=1, out_axis=2, batch_axis=(0,))
        init = nn.with_logical_partitioning(xavier, (None, "d_model", "vocab"))
        self.kernels = self.param("kernels", init, (channels, width, levels), cfg.param_dtype)
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, "vocab"))
        self.biases = self.param("biases", init, (channels, levels), cfg.param_dtype)

    def __call__(
        self,
        z: Float[Array, "rows d_model"],
        codes: Int[Array, "rows channels"],
        deterministic: bool = True,
    ) -> Float[Array, "rows channels levels"]:
        """Logits in float32 of each channel, given the codes of those before it (teacher forcing)."""
        s = self.condition(z)[:, None]
        if self.config.head == "parallel":
            x = jnp.concatenate([s, jnp.zeros((len(s), self.config.channels - 1, s.shape[-1]), s.dtype)], 1)
        else:
            embedded = jax.vmap(lambda table, ids: table[ids], (0, 1), 1)(self.tables, codes[:, :-1])
            x = jnp.concatenate([s, embedded], 1)
        condition = s + self.step_embedding
        x = constrain(x + self.channel_embedding, "d_model")
        x, _ = self.stack(x, None, condition=condition, deterministic=deterministic)
        kernels = gather(self.kernels.astype(self.config.dtype), None, "d_model", "vocab")
        x = jnp.einsum("rcd,cdv->rcv", self.last(x, condition), kernels, preferred_element_type=jnp.float32)
        return constrain(x + self.biases.astype(jnp.float32), "vocab")

    def last(self, x: Array, condition: Array) -> Array:
        """What the matrices of the logits are multiplied by. Here the scale comes before the shift, unlike in DiT."""
        scale, shift = jnp.split(self.final_modulation(nn.silu(condition)), 2, axis=-1)
        return self.last_norm(self.final_norm(x)) * (1 + scale) + shift

    def project(self, z: Float[Array, "rows d_model"]) -> Float[Array, "rows 1 head_width"]:
        """s."""
        return self.condition(z)[:, None]

    def step(
        self, s: Float[Array, "rows 1 head_width"], channel: Int[Array, ""], before: Int[Array, " rows"], cache: Any
    ) -> tuple[Float[Array, "rows levels"], Any]:
        """The logits of one channel, given the code of the one before it and a cache of those before that."""
        cfg = self.config
        first = s + self.step_embedding[0] if cfg.official_first_token else s
        table = jnp.take(self.tables, jnp.maximum(channel - 1, 0), axis=0)
        x = jnp.where(channel == 0, first, jnp.take(table, before, axis=0)[:, None])
        x = x + jnp.take(self.channel_embedding, channel, axis=0)
        condition = s + jnp.take(self.step_embedding, channel, axis=0)
        x, cache = self.stack(x, None, cache=cache, condition=condition)
        kernel = jnp.take(self.kernels, channel, axis=0).astype(cfg.dtype)
        logits = jnp.einsum("rcd,dv->rcv", self.last(x, condition), kernel, preferred_element_type=jnp.float32)
        return (logits + jnp.take(self.biases, channel, axis=0).astype(jnp.float32))[:, 0], cache


def choose(logits: Float[Array, "rows ... levels"], keys: Keys, temperature: float) -> Int[Array, "rows ..."]:
    """A draw from softmax(logits / temperature) for each row, with its own key; at temperature 0, the most likely."""
    if temperature:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        logits = logits / temperature + noise
    return jnp.argmax(logits, -1).astype(jnp.int32)


def draw_channels(
    config: TokenBridgeConfig, params: Params, z: Float[Array, "rows d_model"], keys: Keys, temperature: float
) -> tuple[Int[Array, "rows channels"], Float[Array, "rows channels levels"]]:
    """Draws the codes of rows, channel by channel with a cache; also returns the logits met."""
    head, params = ChannelHead(config), {"params": params}
    if config.head == "parallel":
        logits = head.apply(params, z, jnp.zeros((len(z), config.channels), jnp.int32))
        return choose(logits, keys, temperature), logits
    s = head.apply(params, z, method="project")

    def one(carry, channel):
        before, cache = carry
        logits, cache = head.apply(params, s, channel, before, cache, method="step")
        of_channel = jax.vmap(jax.random.fold_in, (0, None))(keys, channel) if temperature else keys
        codes = choose(logits, of_channel, temperature)
        return (codes, cache), (codes, logits)

    start = jnp.zeros(len(z), jnp.int32), config.channel_stack.init_cache(len(z), config.channels)
    _, (codes, logits) = jax.lax.scan(one, start, jnp.arange(config.channels))
    return codes.T, logits.swapaxes(0, 1)


class DiffusionHead(_Head):
    """MAR's head: the noise in a noisy vector of a position, from the vector, its time and the features.

        x <- x + gate W_2 silu(W_1 (norm(x) (1 + scale) + shift)), each modulated by time embedding + s

    The authors' also predicts variances; here they are those of the noise schedule.
    """

    @nn.compact
    def __call__(
        self,
        noisy: Float[Array, "rows channels"],
        time: Float[Array, " rows"],
        z: Float[Array, "rows d_model"],
    ) -> Float[Array, "rows channels"]:
        """The noise, in float32. Times go from 0 (little noise) to 999."""
        cfg = self.config
        width = cfg.head_width
        angles = time[:, None] * np.exp(-math.log(10000) * np.arange(128) / 128).astype(np.float32)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        embedded = self.linear(width)(nn.silu(self.linear(width)(waves)))
        condition = nn.silu(embedded + self.linear(width)(z))
        x = self.linear(width, ("channels", "d_model"))(noisy)
        for _ in range(cfg.diffusion_layers):
            shift, scale, gate = jnp.split(self.linear(3 * width, zero=True)(condition), 3, -1)
            y = self.norm("layernorm")(x) * (1 + scale) + shift
            x = x + gate * self.linear(width, ("mlp", "d_model"))(nn.silu(self.linear(width)(y)))
        shift, scale = jnp.split(self.linear(2 * width, zero=True)(condition), 2, -1)
        x = self.norm("layernorm_nonparam")(x) * (1 + scale) + shift
        return self.linear(cfg.channels, ("d_model", "channels"), zero=True)(x).astype(jnp.float32)


TIMES = 1000
"""The steps of the noise schedule."""


def kept_signal() -> Float[np.ndarray, " times"]:
    """alpha-bar of the cosine schedule (arXiv 2102.09672), in float64."""
    at = np.cos((np.arange(TIMES + 1) / TIMES + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - at[1:] / at[:-1], 0.999))


def noise_loss(
    head: DiffusionHead, z: Float[Array, "rows d_model"], x: Float[Array, "rows channels"], rng: jax.Array
) -> Float[Array, " rows"]:
    """The squared error of the predicted noise at a random time, the mean over the channels (DDPM)."""
    of_time, of_noise = jax.random.split(rng)
    time = jax.random.randint(of_time, (len(x),), 0, TIMES)
    noise, kept = jax.random.normal(of_noise, x.shape), jnp.asarray(kept_signal(), jnp.float32)[time][:, None]
    predicted = head(jnp.sqrt(kept) * x + jnp.sqrt(1 - kept) * noise, time.astype(jnp.float32), z)
    return jnp.square(predicted - noise).mean(-1)


def denoise(
    config: TokenBridgeConfig,
    params: Params,
    z: Float[Array, "rows d_model"],
    keys: Keys,
    temperature: float,
    steps: int,
) -> Float[Array, "rows channels"]:
    """Draws the vectors of rows in so many steps, evenly spaced in the schedule; noise is scaled by the temperature."""
    times = np.round(np.linspace(0, TIMES - 1, steps)).astype(int)
    kept = kept_signal()[times]
    before = np.concatenate([[1.0], kept[:-1]])
    beta = 1 - kept / before
    std = np.sqrt(beta * (1 - before) / (1 - kept))
    xs = (times, np.sqrt(kept / before), beta / np.sqrt(1 - kept), std)
    xs = tuple(np.asarray(x[::-1], np.float32) for x in xs)
    head, params = DiffusionHead(config), {"params": params}

    def noise(number):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), (config.channels,)))(keys)

    def one(x, values):
        number, time, root, share, std = values
        predicted = head.apply(params, x, jnp.full(len(x), time), z)
        return (x - share * predicted) / root + temperature * std * noise(number), None

    return jax.lax.scan(one, noise(steps), (np.arange(steps), *xs))[0]
