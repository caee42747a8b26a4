"""Converts images to floats, and checks the images and codes that are given to image tokenizers.

For arrays of NumPy and of JAX.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AXES = {3: "height, width, channels", 4: "depth, height, width, channels"}


def as_float(images: Array) -> Float[Array, "batch ..."]:
    """Pixels in [0, 1]; uint8 pixels are divided by 255."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def check_images(images: Float[Array, "batch ..."], shape: tuple[int, ...]) -> None:
    """Checks that images have the shape `ImageTokenizer.image_shape` and are finite floats (under `jit`, only that they
    are floats).

    Raises:
      ValueError: they are not.
    """
    if tuple(images.shape[1:]) != shape or images.ndim != len(shape) + 1:
        sizes = ", ".join(map(str, shape))
        raise ValueError(
            f"the images have the shape {tuple(images.shape)}; for this tokenizer it must be [batch, {sizes}] "
            f"({AXES[len(shape)]})."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"the images are {images.dtype}; they must be floats in [0, 1]: divide them by 255.")
    if not isinstance(images, jax.core.Tracer) and not bool(jnp.isfinite(images).all()):
        raise ValueError("the images hold numbers that are not finite; pixels must be in [0, 1].")


def check_codes(
    codes: Int[Array, "batch positions sub_codes"], lengths: tuple[int, ...], values: tuple[int, ...]
) -> None:
    """Checks that codes have one of these lengths and are in the range of `ImageTokenizer.code_values` (under `jit`,
    the range is not checked).

    Raises:
      ValueError: they do not or are not.
    """
    if codes.ndim != 3 or codes.shape[1] not in lengths or codes.shape[2] != len(values):
        raise ValueError(
            f"the codes have the shape {tuple(codes.shape)}; for this tokenizer it must be [batch, "
            f"{' or '.join(map(str, lengths))}, {len(values)}] (batch, positions, sub-codes)."
        )
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"the codes are {codes.dtype}; they must be whole numbers.")
    if isinstance(codes, jax.core.Tracer) or not codes.size:
        return
    low, high = codes.min(axis=(0, 1)), codes.max(axis=(0, 1))
    for first, last, size in zip(low.tolist(), high.tolist(), values):
        if first < 0 or last >= size:
            raise ValueError(f"the codes go from {first} to {last}; they must be in [0, {size}).")
