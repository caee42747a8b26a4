"""How close images are to others: pair by pair (PSNR, SSIM), and as sets (Fréchet distance, inception score).

The distances between sets are those of a network's features, and can be compared only for the same network. They are
called FID and IS if the network is Inception-v3 as published. Here it is any function that the caller gives;
`jaxtok.studies.proxy_features` trains a small one if there is no other.

Images are float32 in [0, 1], or uint8.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxtok.protocols import Batch
from jaxtok.vision.images import as_float

Images = Shaped[Array, "batch height width channels"]
SSIM_WINDOW = 11
"""The side of the window in pixels; images must be at least as large."""
_SIGMA = 1.5  # the standard deviation of the window
_C1, _C2 = 0.01**2, 0.03**2


def psnr(images: Images, others: Images) -> Float[Array, " batch"]:
    """Peak signal-to-noise ratio of each pair, in dB: -10 log10 of the mean squared error; infinite if they are equal.

    Raises:
      ValueError: the shapes differ.
    """
    a, b = _pair(images, others)
    return -10 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def ssim(images: Images, others: Images) -> Float[Array, " batch"]:
    """Structural similarity of each pair (Wang et al. 2004): 1 if they are equal.

    It has the paper's Gaussian window of 11 x 11 pixels (sigma 1.5), the variances of a population, and the mean over
    channels and over all places where the window fits into the image.

    Raises:
      ValueError: the shapes differ, or the window does not fit.
    """
    a, b = _pair(images, others)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        side = SSIM_WINDOW
        raise ValueError(
            f"the images are {a.shape[1]} x {a.shape[2]}; for SSIM they must be at least {side} x {side}, its window."
        )
    rows, columns = (jnp.asarray(_windows(n)) for n in a.shape[1:3])

    def mean(x):
        return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)

    # A constant is subtracted, as the variances are differences of much larger numbers.
    a, b = a - 0.5, b - 0.5
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return jnp.mean(luminance * (2 * cov + _C2) / (var_a + var_b + _C2), axis=(1, 2, 3))


@functools.cache
def _windows(size: int) -> np.ndarray:
    """Gaussian weights of every place of the window, [places, size]."""
    weights = np.exp(-0.5 * (np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) ** 2 / _SIGMA**2)
    places = size - SSIM_WINDOW + 1
    table = np.zeros((places, size), np.float32)
    for place in range(places):
        table[place, place : place + SSIM_WINDOW] = weights / weights.sum()
    return table


def _pair(images: Images, others: Images) -> tuple[Array, Array]:
    if images.shape != others.shape:
        raise ValueError(f"the images have the shapes {images.shape} and {others.shape}; they must be equal.")
    return as_float(jnp.asarray(images)), as_float(jnp.asarray(others))


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """The mean and covariance of a set of features, in float64. The set grows by `statistics.add(features)`."""

    count: int = 0
    mean: Any = 0.0
    """[features]"""
    scatter: Any = 0.0
    """[features, features]: the sum of the products of the deviations from the mean."""

    def add(self, features: Shaped[Array, "batch features"]) -> FeatureStatistics:
        """The statistics with these features too. Raises ValueError if a feature is not finite."""
        x = np.asarray(features, np.float64)
        if not np.isfinite(x).all():
            raise ValueError("there are features that are not finite; check the images and the network.")
        if not len(x):
            return self
        mean = x.mean(0)
        return self.merge(FeatureStatistics(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets together (Chan et al. 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count, delta = self.count + other.count, other.mean - self.mean
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStatistics(count, self.mean + delta * other.count / count, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """[features, features]; the covariance of a sample (divided by count - 1).

        Raises:
          ValueError: there are fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"there are {self.count} images; for a covariance there must be at least 2.")
        return self.scatter / (self.count - 1)


def feature_statistics(
    features: Callable[[Images], Shaped[Array, "batch features"]], batches: Iterable[Batch | Images]
) -> FeatureStatistics:
    """The statistics of batches of images, or of a data pipeline's batches; images whose mask is 0 are left out."""
    statistics = FeatureStatistics()
    for batch in batches:
        images, mask = (batch["images"], batch["mask"]) if isinstance(batch, dict) else (batch, np.ones(len(batch)))
        statistics = statistics.add(np.asarray(features(images))[np.asarray(mask) > 0])
    return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared distance of two Gaussians.

    Equation 6 of arXiv 1706.08500. The trace of the root is the sum of the singular values of A B, where A and B are
    the roots of C_a and C_b, from their eigenvalues: it stays exact if there are fewer images than features, and most
    eigenvalues are zero. Only the distance of the 2,048 features of Inception-v3's last pooling is called FID.

    Raises:
      ValueError: a set has fewer than two images, or the features differ in number.
    """
    if np.shape(a.mean) != np.shape(b.mean):
        raise ValueError(f"the features have the shapes {np.shape(a.mean)} and {np.shape(b.mean)}; they must be equal.")
    shared = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return float(max(np.sum((a.mean - b.mean) ** 2) + traces, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root; eigenvalues within rounding of zero count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.where(values > values.max() * len(values) * np.finfo(np.float64).eps, values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T


def inception_score(probabilities: Shaped[Array, "images classes"], splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from its mean over the images (arXiv 1606.03498, section 4).

    The result is the mean and standard deviation over `splits` parts of the images, which are taken in their order:
    shuffle the images if they are sorted by class. It is called IS if the classes are those of Inception-v3.

    Raises:
      ValueError: there are fewer images than splits, or the rows are no probabilities.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not 1 <= splits <= len(p):
        raise ValueError(
            f"splits is {splits}, for probabilities of shape {p.shape}; it must be 1 to the number of images."
        )
    if not (p >= 0).all() or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise ValueError("the rows are no probabilities; they must be 0 or more and sum to 1.")
    p = p / p.sum(1, keepdims=True)
    scores = []
    for part in np.array_split(p, splits):
        ratio = np.log(np.where(part > 0, part, 1)) - np.log(np.maximum(part.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.sum(part * ratio, 1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
