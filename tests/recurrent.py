"""A causal language model without attention, for tests: its cache is a state, as a state-space model's is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import layer_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    vocab_size: int = 32
    max_length: int = 80
    num_layers: int = 3
    d_model: int = 16
    rotary_fraction: float = 0.0
    dtype: str = "float32"


@flax.struct.dataclass
class State:
    """The last state of each layer, which cannot be rewound."""

    states: Float[Array, "layers batch d_model"]
    length: Int[Array, " batch"]
    next_position: Int[Array, " batch"]

    rewindable: ClassVar[bool] = False

    def truncate(self, length):
        raise ValueError("a recurrent state cannot be truncated; give padding the position -1.")

    def gather(self, index, count=None):
        raise ValueError("a recurrent state has no slots; nothing can be gathered.")


class Recurrent(nn.Module):
    """In each layer, x + C (h_t gated by x_t), with h_t = a h_(t-1) + B norm(x_t) and a in (0, 1) for each channel."""

    config: RecurrentConfig

    def setup(self):
        cfg = self.config
        d, layers, init = cfg.d_model, cfg.num_layers, nn.initializers.normal(0.3)
        self.embedding = self.param("embedding", init, (cfg.vocab_size, d))
        self.head_matrix = self.param("head_matrix", init, (cfg.vocab_size, d))
        self.decay = self.param("decay", init, (layers, d))
        self.maps = self.param("maps", init, (layers, 3, d, d))
        self.norm = Norm("layernorm", dtype=cfg.dtype)

    def __call__(self, tokens, **options):
        x, cache = self.hidden(self.embed(tokens), **options)
        return self.head(x), cache

    def embed(self, tokens):
        return jnp.take(self.embedding.astype(self.config.dtype), tokens, axis=0)

    def hidden(
        self, x, *, positions=None, segments=None, mask=None, layers=None, cache=None, deterministic: bool = True
    ):
        cfg, (batch, length) = self.config, x.shape[:2]
        if mask is not None:
            raise ValueError("mask is given; a recurrence sees its tokens one after the other.")
        first, end = layer_range(layers, cfg.num_layers)
        states = jnp.zeros((cfg.num_layers, batch, cfg.d_model), x.dtype) if cache is None else cache.states
        start = jnp.zeros((batch, 1), jnp.int32) if cache is None else cache.next_position[:, None]
        positions = jnp.broadcast_to(start + jnp.arange(length) if positions is None else positions, x.shape[:2])
        segments = jnp.zeros_like(positions) if segments is None else segments
        begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        for layer in range(first, end):
            into, gate, out = self.maps[layer].astype(x.dtype)
            decay = jax.nn.sigmoid(self.decay[layer].astype(x.dtype))
            y = _unit(x)

            def step(state, token, decay=decay):
                added, begins, real = token
                new = decay * jnp.where(begins, 0, state) + added
                state = jnp.where(real, new, state)
                return state, new

            inputs = (y @ into, begins[..., None], (positions >= 0)[..., None])
            last, outputs = jax.lax.scan(step, states[layer], jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), inputs))
            states = states.at[layer].set(last)
            x = x + (jnp.swapaxes(outputs, 0, 1) * jax.nn.silu(y @ gate)) @ out
        if cache is not None:
            cache = cache.replace(states=states)
            if first == 0:
                after = jnp.maximum(cache.next_position, positions.max(1) + 1)
                cache = cache.replace(length=cache.length + length, next_position=after)
        return self.norm(x) if end == cfg.num_layers else x, cache

    def head(self, x):
        return jnp.einsum("bld,vd->blv", x, self.head_matrix.astype(x.dtype), preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> State:
        cfg, none = self.config, jnp.zeros(batch, jnp.int32)
        return State(jnp.zeros((cfg.num_layers, batch, cfg.d_model), cfg.dtype), none, none)


def _unit(x):
    """The row without its mean, of variance 1."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5).astype(x.dtype)
