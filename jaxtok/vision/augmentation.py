"""DiffAugment (arXiv 2006.10738) with the policy "color,translation": differentiable, one draw an image."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TRANSLATION = 1 / 8
"""The largest shift, as a fraction of a side."""


@flax.struct.dataclass
class AugmentationDraws:
    """The numbers drawn for each image; the first three are uniform in [0, 1)."""

    brightness: Float[Array, " batch"]
    saturation: Float[Array, " batch"]
    contrast: Float[Array, " batch"]
    rows: Int[Array, " batch"]
    """The pixels by which the image moves up."""
    columns: Int[Array, " batch"]
    """The pixels by which the image moves to the left."""


def largest_shift(side: int) -> int:
    """The largest shift in pixels, rounded."""
    return int(side * TRANSLATION + 0.5)


def draw_augmentation(rng: jax.Array, batch: int, height: int, width: int) -> AugmentationDraws:
    """The draws for a batch of images of these sides."""
    uniform, rows, columns = jax.random.split(rng, 3)

    def shift(key, side):
        limit = largest_shift(side)
        return jax.random.randint(key, (batch,), -limit, limit + 1)

    return AugmentationDraws(*jax.random.uniform(uniform, (3, batch)), shift(rows, height), shift(columns, width))


def augment(
    images: Float[Array, "batch height width channels"], draws: AugmentationDraws
) -> Float[Array, "batch height width channels"]:
    """The images after changes of brightness, saturation and contrast, and then a translation."""
    return translate(change_color(images, draws), draws)


def change_color(
    x: Float[Array, "batch height width channels"], draws: AugmentationDraws
) -> Float[Array, "batch height width channels"]:
    """Adds u - 1/2; multiplies by 2 u around the mean of the channels; and by u + 1/2 around the mean of the image."""

    def of(u):
        return u[:, None, None, None]

    x = x + (of(draws.brightness) - 0.5)
    gray = x.mean(-1, keepdims=True)
    x = (x - gray) * (2 * of(draws.saturation)) + gray
    mean = x.mean((1, 2, 3), keepdims=True)
    return (x - mean) * (of(draws.contrast) + 0.5) + mean


def translate(
    x: Float[Array, "batch height width channels"], draws: AugmentationDraws
) -> Float[Array, "batch height width channels"]:
    """out[i, j] = x[i + rows, j + columns], with zeros outside of x."""
    _, height, width, channels = x.shape
    up, left = largest_shift(height), largest_shift(width)
    padded = jnp.pad(x, ((0, 0), (up, up), (left, left), (0, 0)))

    def one(image, row, column):
        return jax.lax.dynamic_slice(image, (up + row, left + column, 0), (height, width, channels))

    return jax.vmap(one)(padded, draws.rows, draws.columns)
