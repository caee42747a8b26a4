"""Attention between tokens: causal or not, within segments, with or without a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.kernels.attention import Implementation, dot_product_attention


def attend(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch slots heads head_dim"],
    v: Float[Array, "batch slots heads head_dim"],
    *,
    causal: bool = True,
    segments: Int[Array, "batch length"] | None = None,
    start: Int[Array, " batch"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    Args:
      q, k, v: queries, keys and values; without a cache there are as many slots as queries.
      causal: query i sees the keys up to its own place.
      segments: no query sees a key of another segment.
      implementation: without a cache; see `jaxtok.kernels.attention`.
      start: with a cache, the slot of each row's first query; query i then sees the slots up to start + i.
    """
    k, v = (constrain(x, "batch", None, "heads", "head_dim") for x in (k, v))  # whole rows, where queries are divided
    if start is None:
        return dot_product_attention(q, k, v, causal=causal, segments=segments, implementation=implementation)
    slots = jnp.arange(k.shape[1])
    visible = slots <= (start[:, None] + jnp.arange(q.shape[1]))[..., None]  # [batch, length, slots]
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])
