"""Rotary position embedding (arXiv 2104.09864) in the half-split layout, and its variants for long contexts."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies are changed for contexts that are longer than those of training; see `rotary_frequencies`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_length: int = 0
    """The context length of the first training."""
    length: int = 0
    """The context length to use now, for dynamic and longrope (Hugging Face takes it from each call)."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    """The factor on cos and sin; 0: that of the kind."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"the rope kind is {self.kind!r}; it must be one of {', '.join(ROPE_KINDS)}.")
        if self.factor <= 0:
            raise ValueError(f"the rope factor is {self.factor}; it must be positive.")
        if self.kind != "linear" and self.original_length < 1:
            raise ValueError(
                f"original_length is {self.original_length}; for rope of the kind {self.kind} it must be the context "
                "length of the first training."
            )


def rotary_dim(head_dim: int, fraction: float) -> int:
    """How many channels of a head are rotated: int(head_dim * fraction)."""
    return int(head_dim * fraction)


def rotary_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """The angle by which each of dim / 2 pairs turns per position, in float32, and the factor on cos and sin.

    With f_i = base^(-2i/dim), s the factor and L the original length:
        linear    f / s
        dynamic   f of base * (s n / L - (s - 1))^(dim / (dim - 2)) for the length n > L
        llama3    f / s for wavelengths above L / low, f below L / high, a blend by L / wavelength between
        yarn      (arXiv 2309.00071) a blend of f / s and f by how often a pair turns in L; factor 0.1 ln s + 1
        longrope  (arXiv 2402.13753) f / short_i, or f / long_i for lengths above L; factor sqrt(1 + ln s / ln L)

    Raises:
      ValueError: longrope does not have one factor for each pair.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequency = (1.0 / np.float32(base) ** exponents).astype(np.float32)
    if scaling is None:
        return frequency, 1.0
    s, length = scaling.factor, scaling.original_length
    factor = 1.0
    match scaling.kind:
        case "linear":
            frequency = frequency / np.float32(s)
        case "dynamic":
            n = max(scaling.length, length)
            stretched = base * ((s * n / length) - (s - 1)) ** (dim / (dim - 2))
            frequency = (1.0 / np.float32(stretched) ** exponents).astype(np.float32)
        case "llama3":
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            wavelength = 2 * math.pi / frequency
            t = (length / wavelength - low) / (high - low)
            blend = (1 - t) * frequency / s + t * frequency
            frequency = np.where(wavelength > length / low, frequency / s, frequency)
            between = (wavelength <= length / low) & (wavelength >= length / high)
            frequency = np.where(between, blend, frequency)
        case "yarn":

            def turning(rotations):  # the pair that makes so many rotations in the original length
                return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

            low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
            frequency = frequency / s * ramp + frequency * (1 - ramp)

            def attention(scale, mscale=1.0):
                return 0.1 * mscale * math.log(scale) + 1 if scale > 1 else 1.0

            if scaling.mscale and scaling.mscale_all_dim:
                factor = attention(s, scaling.mscale) / attention(s, scaling.mscale_all_dim)
            else:
                factor = attention(s)
        case "longrope":
            chosen = scaling.long_factors if scaling.length > length else scaling.short_factors
            if len(chosen) != dim // 2:
                raise ValueError(f"longrope has {len(chosen)} factors; there must be one for each of {dim // 2} pairs.")
            frequency = frequency / np.asarray(chosen, np.float32)
            factor = math.sqrt(1 + math.log(s) / math.log(length)) if s > 1 else 1.0
    return np.asarray(frequency, np.float32), scaling.attention_factor or factor


def apply_rotary(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "#batch length"],
    *,
    fraction: float = 1.0,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the first R = int(head_dim * fraction) channels by the angle position * f_i (`rotary_frequencies`).

    Channel i is paired with channel i + R/2; channels from R on pass through. The partner is fetched by a product with
    a constant matrix of 0 and +-1, full width: on a TPU, slices of a few channels would each be padded to 128 lanes.
    """
    head_dim = x.shape[-1]
    r = rotary_dim(head_dim, fraction)
    half = r // 2
    partner = np.zeros((head_dim, head_dim), np.float32)  # x @ partner = (-x2, x1, 0)
    partner[np.arange(half) + half, np.arange(half)] = -1
    partner[np.arange(half), np.arange(half) + half] = 1
    pairs, factor = rotary_frequencies(r, base, scaling)
    frequency = np.zeros(head_dim, np.float32)  # 0 beyond R: cos = 1, sin = 0
    frequency[:r] = np.tile(pairs, 2)

    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if factor != 1.0:
        rotated_channels = np.arange(head_dim) < r
        cos, sin = (jnp.where(rotated_channels, factor * part, part) for part in (cos, sin))
    rotated = jnp.einsum("blhd,de->blhe", x, partner.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos + rotated.astype(jnp.float32) * sin).astype(x.dtype)


def rotary_table_2d(
    rows: int, columns: int, head_dim: int, base: float = 10000.0, leading: int = 0
) -> Float[np.ndarray, "positions pairs 2"]:
    """(cos, sin) for the cells of a grid in row-major order, after `leading` zero rows.

    A head's head_dim / 2 pairs are turned by [r f ; c f] in row r and column c, with f_m = base^(-4m / head_dim) for
    m below head_dim / 4. A leading row is (0, 0), not (1, 0): it makes the query and key of its token zero, so that the
    token attends to everything evenly, and every token's score for it is 0.

    Raises:
      ValueError: head_dim is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"the head size is {head_dim}; for two-dimensional rotation it must be a multiple of 4.")
    frequency, _ = rotary_frequencies(head_dim // 2, base)
    cells = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    angle = (cells[:, :, None].astype(np.float32) * frequency).reshape(len(cells), -1)
    table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    return np.concatenate([np.zeros((leading, *table.shape[1:]), np.float32), table])


def apply_rotary_table(
    x: Float[Array, "batch length heads head_dim"], table: Float[Array, "#batch length pairs 2"]
) -> Float[Array, "batch length heads head_dim"]:
    """Turns the channel pairs (2m, 2m + 1) of x by the (cos, sin) of its position: c x1 - s x2, s x1 + c x2.

    As in `apply_rotary`, the partner is fetched by a product with a constant matrix.
    """
    size = x.shape[-1]
    even = np.arange(0, size, 2)
    partner = np.zeros((size, size), np.float32)  # x @ partner = (-x2, x1) in each pair
    partner[even + 1, even], partner[even, even + 1] = -1, 1
    cos, sin = jnp.moveaxis(jnp.repeat(table.astype(jnp.float32), 2, axis=-2), -1, 0)[:, :, :, None]
    rotated = jnp.einsum("blhd,de->blhe", x, partner.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos + rotated.astype(jnp.float32) * sin).astype(x.dtype)
