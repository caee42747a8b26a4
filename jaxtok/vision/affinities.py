"""What a network learns in order to segment a volume: for each voxel, whether its neighbours are in its segment.

Channels are z, y, x; the neighbour is the voxel one step before. The labels are eroded first, so that affinities are 0
where segments meet in a plane. All as in TokenUnify's code (arXiv 2405.16847).
"""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Pad = Literal["replicate", "zero"]


def widen_borders(segments: Int[Array, "batch depth height width"]) -> Int[Array, "batch depth height width"]:
    """Segments, with 0 at each voxel whose 3 x 3 window in the plane holds more than one of them (0 is none)."""
    height, width = segments.shape[2:]
    framed = jnp.pad(segments, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect" if min(height, width) > 1 else "edge")
    windows = [framed[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    highest = functools.reduce(jnp.maximum, windows)
    none = jnp.iinfo(segments.dtype).max
    lowest = functools.reduce(jnp.minimum, [jnp.where(window > 0, window, none) for window in windows])
    return jnp.where(highest == lowest, segments, 0)  # of a window of zeros, the middle is 0, too


def affinities(
    segments: Int[Array, "batch depth height width"], pad: Pad = "replicate"
) -> Float[Array, "batch depth height width 3"]:
    """1 where a voxel and its neighbour are in the same segment.

    Args:
      pad: where the neighbour is outside: replicate, 1 for every voxel of a segment; zero, 0.
    """
    found = []
    for axis in (1, 2, 3):
        before = jnp.roll(segments, 1, axis)
        same = (segments == before) & (segments > 0)
        index = jnp.arange(segments.shape[axis]).reshape([-1 if n == axis else 1 for n in range(4)])
        found.append(jnp.where(index == 0, (segments > 0) if pad == "replicate" else False, same))
    return jnp.stack(found, -1).astype(jnp.float32)


def balance(
    target: Float[Array, "batch depth height width channels"],
) -> Float[Array, "batch depth height width channels"]:
    """The weight of each entry, so that ones and zeros of a crop weigh the same (within 0.05 to 0.99 of ones).

    With q the share of ones: if q > 1/2, zeros weigh q / (1 - q), else ones weigh (1 - q) / q. The rest weighs 1.
    """
    axes = (1, 2, 3, 4)
    size = target[0].size
    ones = target.sum(axes, keepdims=True)
    zeros = size - ones
    # q / (1 - q) by one division of whole numbers, which rounds once.
    of_zeros = jnp.where(ones / size > 0.99, 0.99 / (1 - 0.99), ones / jnp.maximum(zeros, 1))
    of_ones = jnp.where(ones / size < 0.05, (1 - 0.05) / 0.05, zeros / jnp.maximum(ones, 1))
    weight = jnp.where(ones > zeros, jnp.where(target > 0, 1.0, of_zeros), jnp.where(target > 0, of_ones, 1.0))
    return jnp.where((ones == 0) | (zeros == 0), 1.0, weight)
