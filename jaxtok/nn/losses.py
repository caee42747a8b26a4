"""Losses, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"], smoothing: float = 0.0
) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] in nats, for each position; with label smoothing, mixed with the uniform target."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * logits.mean(-1)
    return normalizer - chosen


def masked_mean(values: Float[Array, "*shape"], mask: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The mean over the positions where the mask is 1; 0 where it is nowhere 1."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)
