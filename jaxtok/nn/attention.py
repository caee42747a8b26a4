"""Attention between tokens: causal or not, within segments, with or without a cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.kernels.attention import Implementation, Segments, dot_product_attention, masked_attention
from jaxtok.nn.cache import EMPTY, KVCache


def attend(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    *,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    segments: Segments | None = None,
    visible: Bool[Array, "#batch visible_heads length slots"] | None = None,
    bias: tuple[Array, ...] = (),
    softmax: Callable[[Array], Array] | None = None,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    Args:
      q, k, v: queries, keys and values; without a cache there are as many slots as queries. With fewer key-value heads
        than heads, neighbouring queries share one (grouped-query attention, arXiv 2305.13245).
      window: query i sees only the last `window` slots up to its own. It is an array if the layers of a scan differ in
        it. If it is a number, and rows are longer than twice that, the cost grows with the window and not with the row.
      causal: query i sees only the keys at its own position and before.
      segments: no query sees a key of another segment; see `jaxtok.kernels.attention`.
      visible: which query sees which key, in place of causal, window and segments. Its number of heads is 1, or that of
        the keys or of the queries. With a cache it is made by `visible_slots`.
      implementation: used without `visible`; see `jaxtok.kernels.attention`.
      bias: arrays added to the scores, each of a shape that broadcasts to [batch, heads, length, slots]; a very
        negative number hides a key.
      softmax: turns scores into weights along the last axis, in place of softmax; the score of a hidden key is
        float32's lowest number.
      dropout: the probability that a weight is dropped, with the key `rng`.
    """
    heads = "heads" if k.shape[2] == q.shape[2] else "kv_heads"
    k, v = (constrain(x, "batch", None, heads, "head_dim") for x in (k, v))  # whole rows, even if queries are divided
    plain = not bias and not softmax and not dropout
    if visible is None and plain:
        if window is None:
            return dot_product_attention(q, k, v, causal=causal, segments=segments, implementation=implementation)
        if isinstance(window, int) and causal and q.shape[1] > 2 * window:
            return _local_attention(q, k, v, segments, window=window)
    if visible is None:
        slots, own = jnp.arange(k.shape[1]), jnp.arange(q.shape[1])[None, :, None]
        visible = slots <= own if causal else jnp.ones((1, q.shape[1], k.shape[1]), bool)
        if window is not None:
            visible &= slots > own - window
        if segments is not None:
            of_queries, of_keys = segments if isinstance(segments, tuple) else (segments, segments)
            visible &= of_queries[:, :, None] == of_keys[:, None, :]
        visible = visible[:, None]
    if plain:
        return masked_attention(q, k, v, visible)
    if visible.shape[1] not in (1, q.shape[2]):
        visible = jnp.repeat(visible, q.shape[2] // visible.shape[1], axis=1)
    attention = functools.partial(_biased_attention, softmax=softmax or jax.nn.softmax, dropout=dropout)
    return jax.checkpoint(attention, prevent_cse=False)(q, k, v, visible, bias, rng)


def visible_slots(
    cache: KVCache,
    layer: int | Int[Array, ""],
    positions: Int[Array, "#batch new"],
    *,
    mask: Bool[Array, "#batch new new"] | None = None,
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "#batch #heads new slots"]:
    """The slots that the newest tokens of a cache see in a layer: filled ones, at their positions or before.

    Args:
      positions: the positions of the newest tokens, which have their slots already (`KVCache.advance`).
      mask: which of the newest tokens each of them sees; default: itself and those before it.
      window: a token sees only positions less than `window` before its own.
    """
    new = positions.shape[1]
    stored = cache.positions[layer if cache.positions.shape[0] > 1 else 0]
    stored = jnp.moveaxis(stored, -1, 1)[:, :, None]  # [batch, #heads, 1, slots]
    own = positions[:, None, :, None]
    number = jnp.arange(cache.slots) - (cache.length - new)[:, None]  # [batch, slots]; 0, 1, ... are the newest tokens
    if mask is None:
        among = number[:, None] <= jnp.arange(new)[:, None]
    else:
        known = (len(number), new, new)
        at = jnp.broadcast_to(jnp.clip(number, 0, new - 1)[:, None], (*known[:2], cache.slots))
        among = jnp.take_along_axis(jnp.broadcast_to(mask, known), at, axis=2)
    visible = jnp.where((number < 0)[:, None, None], stored <= own, among[:, None]) & (stored != EMPTY)
    return visible if window is None else visible & (stored > own - window)


def visible_tokens(
    mask: Bool[Array, "#batch new new"],
    positions: Int[Array, "#batch new"],
    window: int | Int[Array, ""] | None = None,
    segments: Int[Array, "batch new"] | None = None,
) -> Bool[Array, "#batch 1 new new"]:
    """As `visible_slots`, for tokens without a cache."""
    visible = mask if window is None else mask & (positions[:, None, :] > positions[:, :, None] - window)
    return (visible if segments is None else visible & (segments[:, :, None] == segments[:, None, :]))[:, None]


def _local_attention(q: Array, k: Array, v: Array, segments: Segments | None, *, window: int) -> Array:
    """Causal attention in a window: blocks of `window` queries see their own block and the one before it."""
    batch, length = q.shape[:2]
    blocks = -(-length // window)
    of_queries, of_keys = segments if isinstance(segments, tuple) else (segments, segments)

    def cut(x):  # [batch * blocks, window, ...]
        padded = jnp.pad(x, [(0, 0), (0, blocks * window - length)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(batch * blocks, window, *x.shape[2:])

    def with_previous(x):
        own = cut(x).reshape(batch, blocks, window, *x.shape[2:])
        previous = jnp.pad(own[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (own.ndim - 2))
        return jnp.concatenate([previous, own], 2).reshape(batch * blocks, 2 * window, *x.shape[2:])

    distance = jnp.arange(window)[:, None] - (jnp.arange(2 * window) - window)
    first = jnp.arange(batch * blocks) % blocks == 0  # a row's first block has none before it
    visible = (distance >= 0) & (distance < window) & ~(first[:, None, None] & (jnp.arange(2 * window) < window))
    if segments is not None:
        visible &= cut(of_queries)[:, :, None] == with_previous(of_keys)[:, None, :]
    y = masked_attention(cut(q), with_previous(k), with_previous(v), visible[:, None])
    return y.reshape(batch, blocks * window, *q.shape[2:])[:, :length]


def _biased_attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Bool[Array, "#batch #heads length slots"],
    bias: tuple[Array, ...],
    rng: jax.Array | None,
    *,
    softmax: Callable[[Array], Array],
    dropout: float,
) -> Array:
    """The plain definition, with the options that `jax.nn.dot_product_attention` does not have."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(visible, sum(bias, scores), jnp.finfo(jnp.float32).min)
    weights = softmax(scores)
    if dropout:
        kept = jax.random.bernoulli(rng, 1 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    return jnp.einsum("bhls,bshd->blhd", weights.astype(v.dtype), v)
