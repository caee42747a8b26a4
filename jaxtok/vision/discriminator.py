"""The patch discriminator (pix2pix, arXiv 1611.07004, as in VQGAN, arXiv 2012.09841) and its hinge loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.axes import constrain
from jaxtok.nn.convolution import Conv

MOMENTUM = 0.1
"""The weight of a batch in the running statistics."""
EPS = 1e-5

Statistics = dict[str, dict[str, Array]]
"""Running mean and variance of each batch norm, by its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """A discriminator and its part in training; defaults: ELM's file."""

    width: int = 64
    """The channels of the first convolution."""
    layers: int = 3
    """The number of convolutions that halve the sides."""
    start_step: int = 30_001
    """The step from which on its term is in the generator's loss; it learns itself from the next step on."""
    max_weight: float = 1.0
    """The largest adaptive weight of its term."""
    augment: bool = False
    """Whether it sees images through DiffAugment."""
    augment_fakes: bool = True
    """Whether its own loss augments fakes too, as DiffAugment needs; the authors' BAE augments only real images."""

    def __post_init__(self):
        for field in ("width", "layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("start_step", "max_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")

    @property
    def features(self) -> tuple[int, ...]:
        """The channels after each convolution except the last, which gives one."""
        return tuple(self.width * min(2**n, 8) for n in range(self.layers + 1))

    def sides(self, side: int) -> tuple[int, ...]:
        """The side after each convolution.

        Raises:
          ValueError: nothing is left of an image of this side.
        """
        sides, pixels = [], side
        for number in range(self.layers + 2):
            side = side // 2 if number < self.layers else side - 1
            sides.append(side)
        if min(sides) < 1:
            smallest = 3 * 2**self.layers
            raise ValueError(
                f"discriminator.layers is {self.layers}, but the images have {pixels} pixels a side; they must have at "
                f"least {smallest}: choose fewer layers or larger images."
            )
        return tuple(sides)

    def flops(self, side: int, channels: int = 3) -> float:
        """Forward FLOPs of one image."""
        inputs, outputs = (channels, *self.features), (*self.features, 1)
        return sum(2 * 16 * n * m * s * s for n, m, s in zip(inputs, outputs, self.sides(side)))


class BatchNorm(nn.Module):
    """A batch norm over batch and positions. It takes and returns running statistics; a mesh's batch is one batch."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch rows columns channels"], running: dict[str, Array], train: bool):
        """x normalised, and the new running statistics. In training, x is normalised by the batch's own mean and biased
        variance, else by the running ones."""

        def param(name, init):
            return self.param(name, nn.with_logical_partitioning(init, ("channels",)), x.shape[-1:], jnp.float32)

        dtype, x = x.dtype, x.astype(jnp.float32)
        mean, var = running["mean"], running["var"]
        if train:
            mean = x.mean((0, 1, 2))
            var = jnp.mean(jnp.square(x - mean), (0, 1, 2))
            count = x.size // x.shape[-1]
            new = {"mean": mean, "var": var * (count / max(count - 1, 1))}
            running = jax.tree.map(lambda a, b: (1 - MOMENTUM) * a + MOMENTUM * jax.lax.stop_gradient(b), running, new)
        y = (x - mean) * jax.lax.rsqrt(var + EPS)
        return (y * param("scale", nn.initializers.ones) + param("bias", nn.initializers.zeros)).astype(dtype), running


class Discriminator(nn.Module):
    """Maps images to a grid of logits, positive for real ones. Layers have the numbers of PyTorch's sequence."""

    config: DiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], statistics: Statistics, *, train: bool
    ) -> tuple[Float[Array, "batch rows columns"], Statistics]:
        """Logits in float32, and the statistics after the batch (unchanged outside of training).

        Raises:
          ValueError: the images are too small.
        """
        cfg = self.config
        cfg.sides(min(images.shape[1:3]))

        def conv(number, features, stride, **options):
            layer = Conv(features, 4, stride, (1, 1), dtype=self.dtype, name=f"main_{number}", **options)
            return lambda x: constrain(layer(x), None, None, None)

        first, *others = cfg.features
        x = jax.nn.leaky_relu(conv(0, first, 2)(images), 0.2)
        after = {}
        for number, features in enumerate(others, 1):
            stride = 2 if number < cfg.layers else 1
            x = conv(3 * number - 1, features, stride, use_bias=False)(x)
            name = f"main_{3 * number}"
            x, after[name] = BatchNorm(name=name)(x, statistics[name], train)
            x = jax.nn.leaky_relu(x, 0.2)
        logits = conv(3 * cfg.layers + 2, 1, 1, axis="channels")(x)
        return logits[..., 0].astype(jnp.float32), after


def new_statistics(config: DiscriminatorConfig) -> Statistics:
    """Running statistics of a new discriminator: mean 0, variance 1."""
    _, *others = config.features
    return {
        f"main_{3 * number}": {"mean": jnp.zeros(features), "var": jnp.ones(features)}
        for number, features in enumerate(others, 1)
    }


def hinge_loss(
    real: Float[Array, "batch rows columns"], fake: Float[Array, "batch rows columns"]
) -> Float[Array, " batch"]:
    """The loss of each pair of images: (mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return (jax.nn.relu(1 - real).mean((1, 2)) + jax.nn.relu(1 + fake).mean((1, 2))) / 2
