"""Losses, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def cross_entropy(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"], smoothing: float = 0.0
) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] in nats, for each position; smoothing mixes the target with a uniform one."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * logits.mean(-1)
    return normalizer - chosen


def by_parts(function: Callable[..., Array], part: int, *arrays: Array) -> Array:
    """function(*arrays), computed for `part` positions of a row at a time, in the backward pass too.

    Intermediate results, such as logits over a large vocabulary, then exist for these positions only. Arrays and result
    are [batch, length, ...], and the function must treat each position alone. The positions of one part are spread over
    the whole row, so that a mesh that divides the length divides each part too.

    Args:
      part: positions at a time, a divisor of the length; 0: all at once.

    Raises:
      ValueError: `part` does not divide the length.
    """
    batch, length = arrays[0].shape[:2]
    if not part or part == length:
        return function(*arrays)
    if part < 0 or length % part:
        raise ValueError(f"part is {part}; it must divide the number of positions in a row, {length}.")

    def cut(x):  # [parts, batch, part, ...]
        return jnp.moveaxis(x.reshape(batch, part, length // part, *x.shape[2:]), 2, 0)

    _, y = jax.lax.scan(lambda _, xs: (None, jax.checkpoint(function)(*xs)), None, tuple(map(cut, arrays)))
    return jnp.moveaxis(y, 0, 2).reshape(batch, length, *y.shape[3:])


def masked_mean(values: Shaped[Array, "*shape"], mask: Shaped[Array, "*shape"]) -> Float[Array, ""]:
    """The mean over the positions where the mask is 1; 0 where it is nowhere 1."""
    return mean(jnp.sum(values * mask), jnp.sum(mask))


def mean(total: Shaped[Array, ""], count: Shaped[Array, ""]) -> Float[Array, ""]:
    """The total over the count; 0 where the count is 0."""
    return total / jnp.maximum(count, 1)


def text_sums(
    nats: Float[Array, "*shape"], mask: Shaped[Array, "*shape"], text_bytes: Shaped[Array, "*shape"]
) -> dict[str, Float[Array, ""]]:
    """The sums of a batch for `text_metrics` and `text_loss`: nats, tokens and bytes of text at the positions where the
    mask is 1."""
    return {"nats": jnp.sum(nats * mask), "tokens": jnp.sum(mask), "bytes": jnp.sum(text_bytes * mask)}


def text_loss(sums: Mapping[str, Array]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean of a batch's nats over its tokens; and, to log, their bits per byte of text."""
    bits = sums["nats"] / math.log(2)
    return mean(sums["nats"], sums["tokens"]), {"bits_per_byte": mean(bits, sums["bytes"])}


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """The bits per byte of a text, from its nats; they can be compared across tokenizers."""
    return nats / math.log(2) / max(text_bytes, 1.0)


def text_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte, from an evaluation's nats, tokens and bytes of text."""
    nats, tokens, text_bytes = (sums[name] for name in ("nats", "tokens", "bytes"))
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": bits_per_byte(nats, text_bytes),
        "tokens": tokens,
        "bytes": text_bytes,
    }
