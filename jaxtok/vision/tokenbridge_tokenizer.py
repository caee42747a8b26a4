"""TokenBridge's tokenizer (arXiv 2503.16430, section 3.2): a KL-VAE whose latents are quantised after its training.

Each channel of a latent vector becomes an integer by itself, by B levels that are fixed and the same for all channels
and VAEs. With boundaries b_i = Phi^-1(i / B), limited to [-r, r], the levels are the means of a normal distribution
between them,

    gamma_i = (phi(b_i) - phi(b_{i+1})) / (Phi(b_{i+1}) - Phi(b_i)),

for a value x that is mapped from [low, high] to [-r, r] and limited there. The index is that of the nearest level,
which is not always the interval between boundaries that x is in. As the boundaries end at r, the largest level is below
it (for 64 levels and [-5, 5], 4.06).

What std should x have? Levels have the density of a normal distribution with std high / r. Each is equally often used
if this is the std of x; the squared error is least (Panter and Dite, 1951) where it is sqrt(3) times that of x, that is
at an std of high / (r sqrt(3)): 0.96 for [-5, 5] and r = 3. So latents of std 1 are right, as `KLVAEConfig.scaling`
makes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.nn.quantizers import Quantized, code_counts
from jaxtok.protocols import Params, Sums
from jaxtok.vision.images import check_codes, check_images
from jaxtok.vision.kl_vae import KLAutoencoding

KINDS = ("gaussian", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionwiseQuantizer:
    """Fixed levels for single numbers; defaults: TokenBridge's."""

    levels: int = 64
    """The number of levels (B); bits in the authors' code: log2 B."""
    low: float = -5.0
    high: float = 5.0
    """The range that is mapped to [-r, r]; values outside get the outermost levels."""
    reach: float = 3.0
    """r: where the normal distribution of the levels is cut off, in its standard deviations."""
    kind: Literal["gaussian", "linear"] = "gaussian"
    """Whether the levels are the means between quantiles of a normal distribution, or the middles of equal intervals of
    the range."""

    def __post_init__(self):
        if self.levels < 2:
            raise ValueError(f"levels is {self.levels}; it must be at least 2 (1 bit).")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be below high, and both finite.")
        if not 0 < self.reach < math.inf:
            raise ValueError(f"reach is {self.reach}; it must be positive.")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")

    @functools.cached_property
    def boundaries(self) -> Float[np.ndarray, " levels_and_one"]:
        """b, in float64."""
        quantiles = scipy.stats.norm.ppf(np.linspace(0, 1, self.levels + 1))
        return np.clip(quantiles, -self.reach, self.reach)

    @functools.cached_property
    def values(self) -> Float[np.ndarray, " levels"]:
        """gamma, in float64, within [-r, r]."""
        if self.kind == "linear":
            return self.reach * ((2 * np.arange(self.levels) + 1) / self.levels - 1)
        b, normal = self.boundaries, scipy.stats.norm
        share = normal.cdf(b[1:]) - normal.cdf(b[:-1])
        return (normal.pdf(b[:-1]) - normal.pdf(b[1:])) / np.where(share == 0, 1e-10, share)

    @functools.cached_property
    def points(self) -> Float[np.ndarray, " levels"]:
        """What the indices stand for, in float32, within [low, high]."""
        shares = (self.values + self.reach) / (2 * self.reach)
        return (shares * (self.high - self.low) + self.low).astype(np.float32)

    def quantize(self, x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The index of the nearest level; of two equally near, the lower one.

        Raises:
          ValueError: not all numbers are finite (under `jit` this is not checked).
        """
        if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
            raise ValueError("x holds numbers that are not finite; no level is near to them.")
        # Above 1 / Phi(-r) levels (740 for r = 3) some boundaries coincide at r, and their levels are 0 by the formula.
        ordered, index = np.unique(self.values, return_index=True)
        x = (x.astype(jnp.float32) - self.low) / (self.high - self.low) * (2 * self.reach) - self.reach
        thresholds = jnp.asarray((ordered[1:] + ordered[:-1]) / 2, jnp.float32)
        rank = jnp.searchsorted(thresholds, jnp.clip(x, -self.reach, self.reach), side="left")
        return jnp.asarray(index, jnp.int32)[rank]

    def dequantize(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The numbers that indices stand for."""
        return jnp.asarray(self.points)[codes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeTokenizer(KLAutoencoding):
    """A KL-VAE with its quantiser: an image tokenizer (`jaxtok.protocols.ImageTokenizer`), one code a channel.

    Training is that of the KL-VAE, which does not see the quantiser; evaluation is through it.
    """

    quantizer: DimensionwiseQuantizer = DimensionwiseQuantizer()
    sample_posterior: bool = True
    """Whether an image's latents are drawn from their posterior, as the authors' are, or are its means."""

    prefixes: ClassVar[tuple[int, ...]] = ()
    draws_images: ClassVar[bool] = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.model.image_size, self.model.image_size, self.model.channels)

    @property
    def code_shape(self) -> tuple[int, int]:
        return self.model.grid

    @property
    def code_values(self) -> tuple[int, ...]:
        return (self.quantizer.levels,) * self.model.z_channels

    @property
    def draws_codes(self) -> bool:
        return self.sample_posterior

    def encode(
        self, params: Params, images: Float[Array, "batch height width channels"], rng: jax.Array | None = None
    ) -> Int[Array, "batch positions channels"]:
        """Codes of images in [0, 1]; positions row by row, channels in the VAE's order.

        Raises:
          ValueError: the images have another shape or type, or there is no key although latents are drawn.
        """
        check_images(images, self.image_shape)
        if rng is None and self.draws_codes:
            raise ValueError("rng is None; it must be a key, as this tokenizer draws its codes (sample_posterior).")
        return _encode(self, _needed(params), images, rng if self.draws_codes else None)

    def decode(
        self, params: Params, codes: Int[Array, "batch positions channels"], rng: jax.Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        """Images, not limited to [0, 1]; nothing is drawn, so a key is not used.

        Raises:
          ValueError: the codes have another shape, or are outside the vocabulary.
        """
        check_codes(codes, (math.prod(self.code_shape),), self.code_values)
        return _decode(self, _needed(params), jnp.asarray(codes))

    def reconstruct(self, params, images, rng):
        latents = self.latents(params, images, rng)
        codes = self.quantizer.quantize(latents)
        vectors = self.quantizer.dequantize(codes)
        # the squared error of the latents, and what the range must hold
        distortion = jnp.mean(jnp.square(vectors - latents), (1, 2, 3))
        of_latents = {"latent_square": jnp.mean(jnp.square(latents), (1, 2, 3))}
        return self.images(params, vectors), Quantized(vectors, codes, distortion, of_latents)

    def code_sums(self, quantized: Quantized, mask: Float[Array, " batch"]) -> dict[str, jax.Array]:
        size, channels = self.quantizer.levels, self.model.z_channels
        counted = jnp.where(
            mask[:, None, None, None] > 0, quantized.codes + size * jnp.arange(channels), size * channels
        )
        return {
            "codes": constrain(code_counts(counted, size * channels), None),
            "latent_mse": jnp.sum(quantized.loss * mask),
            "latent_square": jnp.sum(quantized.metrics["latent_square"] * mask),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """As `Reconstruction.metrics`, through the quantiser; also latent_std (the root mean square of the quantiser's
        input), latent_mse (its squared error), share_used (of the levels of all channels) and entropy (the mean of the
        channels', in bits)."""
        row = super().metrics(sums)
        row["latent_std"] = math.sqrt(row.pop("latent_square"))
        counts = np.asarray(sums["codes"]).reshape(self.model.z_channels, -1)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        entropy = -np.sum(shares * np.log2(np.where(shares > 0, shares, 1)), 1)
        return row | {"share_used": float(np.mean(counts > 0)), "entropy": float(entropy.mean())}


def _needed(params: Params) -> Params:
    """The parameters that encoding and decoding need."""
    return {name: params[name] for name in ("autoencoder", "latents") if name in params}


def _encode_images(task: BridgeTokenizer, params: Params, images, rng):
    codes = task.quantizer.quantize(task.latents(params, images, rng))
    return codes.reshape(len(codes), -1, codes.shape[-1])


def _decode_codes(task: BridgeTokenizer, params: Params, codes):
    codes = codes.reshape(len(codes), *task.code_shape, codes.shape[-1])
    return task.images(params, task.quantizer.dequantize(codes))


_encode = jax.jit(_encode_images, static_argnums=0)
_decode = jax.jit(_decode_codes, static_argnums=0)


def low_frequency_share(
    latents: Float[np.ndarray, "images rows columns channels"], cutoff: float = 0.125
) -> Float[np.ndarray, " channels"]:
    """The share of each channel's power, its mean included, at radial frequencies up to `cutoff` cycles a position.

    The definition is ours: the authors published the order of KL-16's channels, and not how they made it.
    """
    power = np.square(np.abs(np.fft.fft2(np.asarray(latents, np.float64), axes=(1, 2)))).mean(0)
    rows, columns = (np.fft.fftfreq(size) for size in power.shape[:2])
    low = np.hypot(rows[:, None], columns[None]) <= cutoff
    return power[low].sum(0) / power.sum((0, 1))


def frequency_order(
    latents: Float[np.ndarray, "images rows columns channels"], cutoff: float = 0.125
) -> tuple[int, ...]:
    """The channels in the order in which the head predicts them (section 3.3): those of low frequencies first."""
    return tuple(np.argsort(-low_frequency_share(latents, cutoff), kind="stable").tolist())


def measured_order(
    task: BridgeTokenizer, params: Params, batches: Iterable[np.ndarray], cutoff: float = 0.125
) -> tuple[int, ...]:
    """`frequency_order` of the means of the latents of batches of images in [0, 1]."""
    latents = jax.jit(lambda images: task.latents(params, images))
    return frequency_order(np.concatenate([np.asarray(latents(jnp.asarray(images))) for images in batches]), cutoff)
