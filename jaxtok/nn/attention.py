"""Attention between tokens: causal or not, within segments, with or without a cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.nn.axes import constrain


def attend(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch slots heads head_dim"],
    v: Float[Array, "batch slots heads head_dim"],
    *,
    causal: bool = True,
    segments: Int[Array, "batch length"] | None = None,
    start: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    The backward pass computes the weights [batch, heads, length, slots] again instead of keeping them: for a scan over
    layers, storing them costs more time than the product.

    Args:
      q, k, v: queries, keys and values; without a cache there are as many slots as queries.
      causal: query i sees the keys up to its own place.
      segments: no query sees a key of another segment.
      start: with a cache, the slot of each row's first query; query i then sees the slots up to start + i.
    """
    k, v = (constrain(x, "batch", None, "heads", "head_dim") for x in (k, v))  # whole rows, where queries are divided
    if start is None and segments is None:
        attention = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    else:
        mask = visible(q.shape[1], k.shape[1], causal, segments, start)
        attention = functools.partial(jax.nn.dot_product_attention, mask=mask)
    return jax.checkpoint(attention, prevent_cse=False)(q, k, v)


def visible(
    queries: int, slots: int, causal: bool, segments: Array | None, start: Array | None
) -> Bool[Array, "batch 1 queries slots"]:
    """Which slots each query sees, as `attend` describes it."""
    first = jnp.zeros(1, jnp.int32) if start is None else start
    mask = jnp.ones((1, queries, slots), bool)
    if causal:
        mask = jnp.arange(slots) <= (first[:, None] + jnp.arange(queries))[..., None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return mask[:, None]
