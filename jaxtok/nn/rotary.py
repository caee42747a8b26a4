"""Rotary position embedding (RoPE) on a part of each head, in the half-rotation layout of GPT-NeoX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_dim(head_dim: int, fraction: float) -> int:
    """How many channels of a head are rotated: int(head_dim * fraction)."""
    return int(head_dim * fraction)


def apply_rotary(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    *,
    fraction: float = 1.0,
    base: float = 10000.0,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the first R = int(head_dim * fraction) channels by the angle position * base^(-2i/R).

    Channel i is paired with channel i + R/2; channels from R on pass through. The partner is fetched by a product with
    a constant matrix of 0 and +-1, full width: on a TPU, slices of a few channels would each be padded to 128 lanes.
    """
    head_dim = x.shape[-1]
    r = rotary_dim(head_dim, fraction)
    half = r // 2
    partner = np.zeros((head_dim, head_dim), np.float32)  # x @ partner = (-x2, x1, 0)
    partner[np.arange(half) + half, np.arange(half)] = -1
    partner[np.arange(half), np.arange(half) + half] = 1
    frequency = np.zeros(head_dim, np.float32)  # 0 beyond R: cos = 1, sin = 0
    frequency[:r] = np.tile(base ** (-2.0 * np.arange(half) / r), 2)

    angle = positions[..., None, None].astype(jnp.float32) * frequency
    rotated = jnp.einsum("blhd,de->blhe", x, partner.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    y = x.astype(jnp.float32) * jnp.cos(angle) + rotated.astype(jnp.float32) * jnp.sin(angle)
    return y.astype(x.dtype)
