"""The KL-regularised autoencoder of latent diffusion (arXiv 2112.10752): an image as a grid of continuous vectors.

TokenBridge and MAR use it in the layout of latent diffusion's code (`ldm_vae`), FlexTok in that of `diffusers`
(`diffusers_vae`). The two are the same network: the layouts differ in the names of tensors, in the sides with
attention, and in what latents are multiplied by. It is made of VQGAN's blocks (`jaxtok.nn.convolution`). With the
moments (mu, log sigma^2) of an image,

    z = mu + sigma eps,   x^ = generator(z),   L_KL = sum(mu^2 + sigma^2 - 1 - log sigma^2) / 2

`KLVAE` has images in [-1, 1], as the authors', in its methods `moments` and `decode`; `KLAutoencoding`, which trains
it, has images in [0, 1].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.nn.convolution import GROUPS, Encoder, Generator, Layer, last_conv, levels_flops
from jaxtok.nn.quantizers import Quantized
from jaxtok.nn.transformer import PARAM_DTYPES
from jaxtok.protocols import Batch, Data, Params
from jaxtok.vision.autoencoding import Reconstruction
from jaxtok.vision.collapse import CollapseGuard
from jaxtok.vision.images import check_images

LOG_VARIANCE = (-30.0, 20.0)
"""The range to which log sigma^2 is limited."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLVAEConfig:
    """Sizes of the autoencoder; defaults: KL-16 of MAR and TokenBridge, for images of 256 pixels."""

    image_size: int = 256
    """The side of the images in pixels. It is halved from level to level."""
    channels: int = 3
    first_width: int = 0
    """The channels after the first convolution of the encoder; 0: those of the first level."""
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    """The channels of each level, the finest first."""
    res_blocks: int = 2
    """The number of residual blocks in each level of the encoder; the generator has one more."""
    encoder_attention: tuple[int, ...] = (16,)
    """The sides at which attention follows each residual block of the encoder."""
    decoder_attention: tuple[int, ...] = ()
    """The sides at which attention follows each residual block of the generator."""
    z_channels: int = 16
    """The channels of a latent vector."""
    groups: int = GROUPS
    """The number of groups of every group norm."""
    quant_conv: bool = True
    """Whether moments and latents go through a convolution of single positions of their own."""
    scaling: float = 0.2325
    """What latents are multiplied by, for those who use them; 0: one over their root mean square in training."""
    kl_weight: float = 1e-6
    """The weight of the divergence from a standard normal distribution, which is divided by the number of an image's
    values, as the loss is a mean over these. (In latent diffusion's code both are sums.)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of activations and operands; norms, softmax, moments and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat_levels: bool = False
    """Whether only the inputs of the levels are stored for the backward pass, which then computes each level again."""

    key_bias: ClassVar[bool] = True
    """Whether keys have a bias, which changes nothing; with it, files of weights are read and written bit by bit."""

    def __post_init__(self):
        for field in ("image_size", "channels", "res_blocks", "z_channels", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths is {self.widths}; it must have a number of at least 1 for each level.")
        for field, width in [("first_width", self.first_width), *(("widths", width) for width in self.widths)]:
            if width < 0 or width % self.groups:
                raise ValueError(
                    f"{field} has {width}; it must be a multiple of {self.groups}, the number of groups of the norms."
                )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size is {self.image_size}; with {len(self.widths)} levels (widths) it must be a multiple of "
                f"{self.stride}."
            )
        for field in ("scaling", "kl_weight"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more, and finite.")
        for field in ("dtype", "param_dtype"):
            if getattr(self, field) not in PARAM_DTYPES:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(PARAM_DTYPES)}.")

    @property
    def undivided(self) -> tuple[int, ...]:
        """Numbers of channels, of ends, that no mesh divides."""
        return (self.channels, 2 * self.z_channels)

    @property
    def stride(self) -> int:
        """Pixels from one position of the grid to the next."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent vectors."""
        return (self.image_size // self.stride,) * 2

    @property
    def code_weight(self) -> float:
        """The weight of the mean loss of what is between encoder and generator (`Reconstruction`)."""
        return self.kl_weight

    def options(self, step: Any) -> dict[str, Any]:
        return {}

    def draw(self, rng: jax.Array, batch: int) -> Float[Array, "batch rows columns z_channels"]:
        """The normal numbers of a posterior sample."""
        return jax.random.normal(rng, (batch, *self.grid, self.z_channels))

    def encoder_flops(self) -> float:
        """Forward FLOPs of the encoder for one image, in convolutions and attention."""
        return levels_flops(encoder_levels(self), self.channels, self.image_size)

    def generator_flops(self) -> float:
        """Forward FLOPs of the generator for one image, in convolutions and attention."""
        return levels_flops(generator_levels(self), self.z_channels, self.grid[0])

    def flops(self) -> float:
        """Forward FLOPs of encoder and generator for one image."""
        return self.encoder_flops() + self.generator_flops()


def ldm_vae(
    *,
    resolution: int,
    ch: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
    z_channels: int,
    attn_resolutions: tuple[int, ...] = (),
    decoder_attention: tuple[int, ...] = (),
    **options: Any,
) -> KLVAEConfig:
    """A config from the arguments of latent diffusion's code, which count channels in multiples of `ch`."""
    return KLVAEConfig(
        image_size=resolution,
        first_width=ch,
        widths=tuple(ch * times for times in ch_mult),
        res_blocks=num_res_blocks,
        z_channels=z_channels,
        encoder_attention=tuple(attn_resolutions),
        decoder_attention=tuple(decoder_attention),
        **options,
    )


def diffusers_vae(
    *,
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    latent_channels: int,
    image_size: int = 256,
    norm_num_groups: int = GROUPS,
    scaling_factor: float = 0.18215,
    **options: Any,
) -> KLVAEConfig:
    """A config from the arguments of `diffusers`' AutoencoderKL; only the two middle parts have attention."""
    return KLVAEConfig(
        image_size=image_size,
        widths=tuple(block_out_channels),
        res_blocks=layers_per_block,
        z_channels=latent_channels,
        encoder_attention=(),
        groups=norm_num_groups,
        scaling=scaling_factor,
        **options,
    )


def encoder_levels(config: KLVAEConfig) -> list[list[Layer]]:
    """The encoder's layers, by level; flat, they are numbered in our parameters."""
    levels: list[list[Layer]] = [[("conv", config.first_width or config.widths[0])]]
    for number, features in enumerate(config.widths):
        level = _residual(config.res_blocks, features, config.image_size // 2**number in config.encoder_attention)
        levels.append(level + ([("down", features)] if number < len(config.widths) - 1 else []))
    moments = 2 * config.z_channels
    last: list[Layer] = [("norm", features), ("silu", features), ("conv", moments)]
    return [*levels, _middle(features), last + ([("point", moments)] if config.quant_conv else [])]


def generator_levels(config: KLVAEConfig) -> list[list[Layer]]:
    """The generator's layers, by level, the coarsest first."""
    features = config.widths[-1]
    first: list[Layer] = [("point", config.z_channels)] if config.quant_conv else []
    levels = [[*first, ("conv", features)], _middle(features)]
    for number in reversed(range(len(config.widths))):
        features = config.widths[number]
        level = _residual(config.res_blocks + 1, features, config.image_size // 2**number in config.decoder_attention)
        levels.append(level + ([("up", features)] if number else []))
    return [*levels, [("norm", features), ("silu", features), ("conv", config.channels)]]


def _residual(count: int, features: int, attention: bool) -> list[Layer]:
    return count * [("res", features), *([("attention", features)] if attention else [])]


def _middle(features: int) -> list[Layer]:
    return [("res", features), ("attention", features), ("res", features)]


class _Encoder(Encoder):
    def levels(self) -> list[list[Layer]]:
        return encoder_levels(self.config)


class _Generator(Generator):
    def levels(self) -> list[list[Layer]]:
        return generator_levels(self.config)


@flax.struct.dataclass
class Posterior:
    """A normal distribution of each latent value, independent of the others, in float32."""

    mean: Float[Array, "batch rows columns z_channels"]
    """Also the mode."""
    logvar: Float[Array, "batch rows columns z_channels"]

    @classmethod
    def of(cls, moments: Float[Array, "batch rows columns moments"]) -> Posterior:
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, *LOG_VARIANCE))

    @property
    def std(self) -> Float[Array, "batch rows columns z_channels"]:
        return jnp.exp(self.logvar / 2)

    def sample(
        self, noise: Float[Array, "batch rows columns z_channels"] | None
    ) -> Float[Array, "batch rows columns z_channels"]:
        """mean + std noise; without noise, the mean."""
        return self.mean if noise is None else self.mean + self.std * noise

    def kl(self) -> Float[Array, " batch"]:
        """The divergence from a standard normal distribution, in nats an image."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar, (1, 2, 3))

    def nll(self, x: Float[Array, "batch rows columns z_channels"]) -> Float[Array, " batch"]:
        """-log density of latents, in nats an image."""
        square = jnp.square(x - self.mean) / jnp.exp(self.logvar)
        return 0.5 * jnp.sum(math.log(2 * math.pi) + self.logvar + square, (1, 2, 3))


class KLVAE(nn.Module):
    """Maps images to distributions of latents, and latents to images."""

    config: KLVAEConfig

    def setup(self):
        self.encoder, self.generator = _Encoder(self.config), _Generator(self.config)

    def moments(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns moments"]:
        """Means, then logarithms of variances, not limited yet, of images in [-1, 1]; in float32."""
        return self.encoder(images)

    def posterior(self, images: Float[Array, "batch height width channels"]) -> Posterior:
        """The distribution of the latents of images in [-1, 1]."""
        return Posterior.of(self.moments(images))

    def decode(
        self, latents: Float[Array, "batch rows columns z_channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Images about in [-1, 1], in float32, of latents that are not scaled."""
        return self.generator(latents)

    def quantize(self, images: Float[Array, "batch height width channels"], draws=None, **options) -> Quantized:
        """A posterior sample (without `draws`, its mean) of images in [0, 1], with the divergence as its loss; it has
        no codes. Metrics have the divergence in nats an image, the mean square of the sample, and the standard
        deviation of the means over the images, which falls to 0 if the latents no longer depend on the image."""
        posterior = self.posterior(2 * images - 1)
        latents = posterior.sample(draws)
        values = images.shape[1] * images.shape[2] * images.shape[3]
        metrics = {
            "kl": posterior.kl().mean(),
            "latent_square": jnp.mean(jnp.square(latents)),
            "code_std": posterior.mean.std(0).mean(),
        }
        empty = jnp.zeros((*latents.shape[:3], 0), jnp.int32)
        return Quantized(latents, empty, posterior.kl() / values, jax.lax.stop_gradient(metrics))

    def features(self, images: Float[Array, "batch height width channels"], draws=None, **options):
        """The input of the generator's last convolution, and `Quantized`."""
        quantized = self.quantize(images, draws)
        return self.generator.features(quantized.vectors), quantized

    def __call__(self, images: Float[Array, "batch height width channels"], draws=None, **options):
        """Reconstructions of images in [0, 1], and `Quantized`."""
        features, quantized = self.features(images, draws)
        return (self.generator.last(features) + 1) / 2, quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLAutoencoding(Reconstruction):
    """Trains a KL-VAE. Parameters are those of `Reconstruction`; if `model.scaling` is 0, there is also "latents":
    {"square": the running mean square of posterior samples, over about the last hundred steps}."""

    model: KLVAEConfig
    guard: CollapseGuard | None = CollapseGuard(least_std=1e-3)
    """The rule that ends a run whose latents no longer depend on the image (`code_std`). None: there is no rule."""

    def autoencoder(self) -> KLVAE:
        return KLVAE(self.model)

    def levels(self) -> list[list[Layer]]:
        return generator_levels(self.model)

    def last(self, features: Float[Array, "batch height width ch"], params: Params) -> Array:
        return (last_conv(self.model, features, params) + 1) / 2

    def fit(self, data: Data, train: Any = None) -> KLAutoencoding:
        """As `Reconstruction.fit`.

        Raises:
          ValueError: the data's images have another size.
        """
        if (size := getattr(data, "size", self.model.image_size)) != self.model.image_size:
            raise ValueError(
                f"task.model.image_size is {self.model.image_size}, but data.size is {size}; make them equal."
            )
        return super().fit(data, train)

    def scale(self, params: Params) -> Any:
        """What latents are multiplied by."""
        return self.model.scaling or jax.lax.rsqrt(jnp.maximum(params["latents"]["square"], 1e-12))

    def latents(
        self, params: Params, images: Float[Array, "batch height width channels"], rng: jax.Array | None = None
    ) -> Float[Array, "batch rows columns z_channels"]:
        """Scaled latents of images in [0, 1]: a posterior sample, or the mean if there is no key.

        Raises:
          ValueError: the images have another shape or type.
        """
        check_images(images, (self.model.image_size, self.model.image_size, self.model.channels))
        posterior = self.autoencoder().apply({"params": params["autoencoder"]}, 2 * images - 1, method="posterior")
        noise = None if rng is None else self.model.draw(rng, len(images))
        return posterior.sample(noise) * self.scale(params)

    def images(
        self, params: Params, latents: Float[Array, "batch rows columns z_channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Images, not limited to [0, 1], of scaled latents."""
        latents = latents / self.scale(params)
        return (self.autoencoder().apply({"params": params["autoencoder"]}, latents, method="decode") + 1) / 2

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        params = super().init(rng, batch)
        return params if self.model.scaling else {**params, "latents": {"square": jnp.ones(())}}

    def after_step(self, params: Params, metrics: dict[str, Any], step: jax.Array) -> Params:
        """The parameters after an update, with the running statistics of the batch."""
        params = super().after_step(params, metrics, step)
        if self.model.scaling:
            return params
        count = jnp.minimum(jnp.asarray(step, jnp.float32), 100)
        square = params["latents"]["square"]
        square = square + (metrics["latent_square"] - square) / jnp.maximum(count, 1)
        return {**params, "latents": {"square": square}}

    def trainable(self, params: Params) -> Params | None:
        """All but statistics, and the biases of keys, whose gradient is 0 but for rounding."""

        def trains(path, _):
            return float([key.key for key in path[-2:]] != ["key", "bias"])

        others = super().trainable(params) or jax.tree.map(lambda _: 1.0, params)
        found = {**others, "autoencoder": jax.tree_util.tree_map_with_path(trains, params["autoencoder"])}
        return found if self.model.scaling else {**found, "latents": {"square": 0.0}}


PUBLISHED = {"kl-16": KLVAEConfig(first_width=128)}
"""MAR's, which TokenBridge quantises."""
