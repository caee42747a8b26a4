"""The contrastive loss of two towers (CLIP, arXiv 2103.00020; with label smoothing as in BLIP, arXiv 2201.12086).

A batch of n pairs has n x n similarities. They are computed for a part of the rows and a part of the columns at a time,
in the backward pass too, so that memory does not grow with n^2. On a mesh, rows are divided as the batch is, and
columns are gathered from all devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.axes import constrain
from jaxtok.nn.losses import by_parts

_LEAST = -1e30


def contrastive_nats(
    rows: Float[Array, "batch features"],
    columns: Float[Array, "batch features"],
    temperature: Float[Array, ""] | float,
    *,
    mask: Float[Array, " batch"] | None = None,
    smoothing: float = 0.0,
    part: int = 0,
) -> Float[Array, " batch"]:
    """-log softmax_j(row_i . column_j / temperature) at j = i, for each row i, in nats.

    Columns carry no gradient, as those that are gathered from other devices do not in the authors' code.

    Args:
      rows, columns: vectors of length 1; pair i is row i and column i.
      mask: 1 for pairs that count; the columns of the others are left out.
      smoothing: the share of the target that is spread over all n columns.
      part: how many rows, and columns, are compared at a time, a divisor of the batch; 0: all.

    Raises:
      ValueError: `part` does not divide the batch.
    """
    rows, own = rows.astype(jnp.float32), jax.lax.stop_gradient(columns.astype(jnp.float32))
    columns = constrain(own, None, None)
    mask = jnp.ones(len(columns)) if mask is None else mask
    seen = constrain(mask > 0, None)
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.einsum("n,nd->d", mask, columns, precision="highest") / count
    size = part or len(columns)

    def of_rows(x, y):  # [1, part, d]
        total = _log_sum_exp(x[0], columns, seen, temperature, size)
        chosen = (1 - smoothing) * jnp.sum(x[0] * y[0], -1)
        if smoothing:
            chosen += smoothing * jnp.einsum("nd,d->n", x[0], mean, precision="highest")
        return (total - chosen / temperature)[None]

    return by_parts(of_rows, part, rows[None], own[None])[0]


def _log_sum_exp(
    rows: Float[Array, "rows features"],
    columns: Float[Array, "columns features"],
    seen: Bool[Array, " columns"],
    temperature: Float[Array, ""] | float,
    size: int,
) -> Float[Array, " rows"]:
    """log sum_j exp(row . column_j / temperature) over the columns that are seen, `size` of them at a time."""
    if size == len(columns):
        return jax.nn.logsumexp(jnp.where(seen, _similarity(rows, columns, temperature), _LEAST), -1)

    @jax.checkpoint
    def more(carry, part):
        most, total = carry
        columns, seen = part
        scores = jnp.where(seen, _similarity(rows, columns, temperature), _LEAST)
        # The result does not depend on the greatest score so far, so neither does its gradient.
        now = jax.lax.stop_gradient(jnp.maximum(most, scores.max(-1)))
        total = total * jnp.exp(most - now) + jnp.exp(scores - now[:, None]).sum(-1)
        return (now, total), None

    parts = columns.reshape(-1, size, columns.shape[-1]), seen.reshape(-1, size)
    start = (jnp.full(len(rows), _LEAST), jnp.zeros(len(rows)))
    (most, total), _ = jax.lax.scan(more, start, parts)
    return most + jnp.log(total)


def _similarity(rows, columns, temperature):
    return jnp.einsum("nd,md->nm", rows, columns, precision="highest") / temperature


def hard_negatives(
    rows: Float[Array, "batch features"],
    columns: Float[Array, "batch features"],
    temperature: Float[Array, ""] | float,
    rng: Key[Array, ""],
    *,
    part: int = 0,
) -> Int[Array, " batch"]:
    """For each row the number of another column, drawn by the softmax of their similarities; without a gradient."""
    rows, columns = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (rows, columns))
    columns, numbers = constrain(columns, None, None), jnp.arange(len(rows))

    def of_rows(x, number):
        scores = _similarity(x[0], columns, temperature)
        scores = jnp.where(number[0][:, None] == jnp.arange(len(columns)), -jnp.inf, scores)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, number[0])
        return jax.vmap(jax.random.categorical)(keys, scores)[None]

    return by_parts(of_rows, part, rows[None], numbers[None])[0]
