"""T5's relative position bias (arXiv 1910.10683, section 2.1): a number for each head and bucket of distances."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain


def distance_buckets(buckets: int, longest: int) -> Int[np.ndarray, " distances"]:
    """The bucket of each distance 0 ... longest; those beyond are in the last one.

    Half of the buckets, h, are one distance wide, the others grow with the logarithm: for a distance n,
    min(buckets - 1, h + floor(log(n / h) / log(longest / h) (buckets - h))), in float32 as the authors compute it.

    Raises:
      ValueError: there are fewer than 2 buckets, or `longest` is not above half of their number.
    """
    exact = buckets // 2
    if exact < 1 or longest <= exact:
        raise ValueError(
            f"relative_buckets is {buckets} and relative_distance {longest}; there must be at least 2 buckets, and the "
            "distance must be above half of their number."
        )
    n = np.arange(longest + 1)
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(longest / exact))
    far = exact + (ratio * np.float32(buckets - exact)).astype(np.int32)
    return np.where(n < exact, n, np.minimum(far, buckets - 1)).astype(np.int32)


class RelativeBias(nn.Module):
    """The bias of attention scores, from the positions of queries and keys."""

    heads: int
    buckets: int = 32
    distance: int = 128
    """The distance from which on all are in the last bucket (nearer ones may be in it too)."""
    causal: bool = True
    """Whether all buckets are for keys in the past; otherwise half of them are for keys in the future."""
    init_std: float = 0.02
    param_dtype: Any = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), (None, "heads"))
        self.table = self.param("table", init, (self.buckets, self.heads), self.param_dtype)

    def __call__(
        self,
        queries: Int[Array, "#batch length"],
        keys: Int[Array, "#batch slots"] | Int[Array, "#layers batch slots #heads"],
    ) -> Float[Array, "#batch heads length slots"] | Float[Array, "layers batch heads length slots"]:
        """The bias in float32. Its batch is 1 if all rows have the same positions.

        `keys` can be the positions of a cache (`KVCache.positions`); if they differ between layers, so does the bias.
        """
        table = self.table.astype(jnp.float32)
        if keys.ndim == 4 and keys.shape[0] == keys.shape[3] == 1:
            keys = keys[0, :, :, 0]
        if keys.ndim == 2:
            bias = jnp.moveaxis(jnp.take(table, self._bucket(keys[:, None] - queries[:, :, None]), axis=0), -1, 1)
            return constrain(bias, "batch" if bias.shape[0] > 1 else None, "heads", "length", None)
        bucket = self._bucket(keys[:, :, None] - queries[None, :, :, None, None])
        bucket = jnp.repeat(bucket, self.heads // bucket.shape[-1], axis=-1)
        bias = jnp.moveaxis(table[bucket, jnp.arange(self.heads)], -1, 2)
        return bias[0] if bias.shape[0] == 1 else bias

    def _bucket(self, offset):
        """The bucket of a key that is `offset` positions after the query."""
        side = self.buckets if self.causal else self.buckets // 2
        distance = jnp.maximum(-offset, 0) if self.causal else jnp.abs(offset)
        bucket = jnp.take(jnp.asarray(distance_buckets(side, self.distance)), jnp.minimum(distance, self.distance))
        return bucket if self.causal else bucket + side * (offset > 0)
