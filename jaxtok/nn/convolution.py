"""Convolutional encoder and generator of VQGAN (arXiv 2012.09841), in the form of samb-t/unleashing-transformers.

Images are [batch, height, width, channels]. Unlike the form in latent diffusion (`jaxtok.vision.kl_vae`, of the same
blocks), it has no activation between the last norm and the last convolution, and as many residual blocks a level in the
generator as in the encoder.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.axes import constrain, gather

GROUPS = 32
"""The number of groups of a group norm, if nothing else is said."""
EPS = 1e-6

Layer = tuple[str, int]
"""A kind of `BLOCKS`, and the number of channels after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """An encoder from images to a grid of vectors, and a generator from the grid to images; defaults: ELM's."""

    groups: ClassVar[int] = GROUPS
    key_bias: ClassVar[bool] = False
    image_size: int = 256
    """The side of the images in pixels. It is halved from level to level; a level whose side is in
    `attention_resolutions` has attention."""
    channels: int = 3
    width: int = 128
    """The channels of the first level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """The channels of each level, divided by `width`; the side is halved between two levels."""
    res_blocks: int = 2
    """The number of residual blocks in each level of the encoder."""
    attention_resolutions: tuple[int, ...] = (16,)
    """The sides at which attention follows each residual block."""
    embed_dim: int = 256
    """The size of the vectors between encoder and generator."""
    norm_first: bool = True
    """Whether the generator begins with a group norm."""
    generator_multiplier: float = 1.0
    """The residual blocks in each level of the generator, divided by those of the encoder, rounded down."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of activations and operands; norms, softmax, quantiser and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat_levels: bool = False
    """Whether only the inputs of the levels are stored for the backward pass, which then computes each level again."""

    def __post_init__(self):
        for field in ("image_size", "channels", "width", "res_blocks", "embed_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {self.multipliers}; it must have a number of at least 1 for each level.")
        if self.width % GROUPS:
            raise ValueError(f"width is {self.width}; it must be a multiple of {GROUPS}, for the group norms.")
        if self.norm_first and self.embed_dim % GROUPS:
            raise ValueError(f"embed_dim is {self.embed_dim}; with norm_first it must be a multiple of {GROUPS}.")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size is {self.image_size}; with {len(self.multipliers)} levels (multipliers) it must be a "
                f"multiple of {self.stride}."
            )
        if int(self.res_blocks * self.generator_multiplier) < 1:
            raise ValueError(
                f"generator_multiplier is {self.generator_multiplier}; times res_blocks = {self.res_blocks}, it must "
                "leave the generator at least 1 residual block a level."
            )
        for field in ("dtype", "param_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of float32, bfloat16.")

    @property
    def stride(self) -> int:
        """Pixels from one position of the grid to the next."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of positions."""
        return (self.image_size // self.stride,) * 2

    def encoder_flops(self) -> float:
        """Forward FLOPs of the encoder for one image, in convolutions and attention."""
        return levels_flops(encoder_levels(self), self.channels, self.image_size)

    def generator_flops(self) -> float:
        """Forward FLOPs of the generator for one image, in convolutions and attention."""
        return levels_flops(generator_levels(self), self.embed_dim, self.grid[0])

    def flops(self) -> float:
        """Forward FLOPs of encoder and generator for one image."""
        return self.encoder_flops() + self.generator_flops()


def encoder_levels(config: AutoencoderConfig) -> list[list[Layer]]:
    """The encoder's layers, by level; flat, they are numbered as in the authors' checkpoints."""
    levels: list[list[Layer]] = [[("conv", config.width)]]
    side = config.image_size
    for number, multiplier in enumerate(config.multipliers):
        features = config.width * multiplier
        level = _residual(config, config.res_blocks, features, side)
        if number < len(config.multipliers) - 1:
            level.append(("down", features))
            side //= 2
        levels.append(level)
    features = config.width * config.multipliers[-1]
    return [*levels, _middle(features), [("norm", features), ("conv", config.embed_dim)]]


def generator_levels(config: AutoencoderConfig) -> list[list[Layer]]:
    """The generator's layers, by level; flat, they are numbered as in the authors' checkpoints."""
    features, side = config.width * config.multipliers[-1], config.grid[0]
    first: list[Layer] = [("norm", config.embed_dim)] if config.norm_first else []
    levels = [[*first, ("conv", features)], _middle(features)]
    for number in reversed(range(len(config.multipliers))):
        features = config.width * config.multipliers[number]
        level = _residual(config, int(config.res_blocks * config.generator_multiplier), features, side)
        if number:
            level.append(("up", features))
            side *= 2
        levels.append(level)
    return [*levels, [("norm", features), ("conv", config.channels)]]


def _residual(config: AutoencoderConfig, count: int, features: int, side: int) -> list[Layer]:
    attention = [("attention", features)] if side in config.attention_resolutions else []
    return count * [("res", features), *attention]


def _middle(features: int) -> list[Layer]:
    return [("res", features), ("attention", features), ("res", features)]


def conv2d(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns channels features"],
    bias: Float[Array, " features"] | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Float[Array, "batch rows_out columns_out features"]:
    """A convolution; `padding` is the number of zeros before and after each side."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), (padding, padding), dimension_numbers=dimensions)
    return y if bias is None else y + bias


class Conv(nn.Module):
    """A square convolution, with PyTorch's initialisation: uniform within 1 / sqrt(inputs) for kernel and bias."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    use_bias: bool = True
    axis: str = "d_model"
    """The logical axis of the features: `d_model`, which a mesh divides, or `channels`, which it does not."""
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        bound = 1 / math.sqrt(math.prod(shape[:3]))

        def param(name, shape, axes):
            init = nn.with_logical_partitioning(_uniform(bound), axes)
            return gather(self.param(name, init, shape, self.param_dtype).astype(self.dtype), *axes)

        kernel = param("kernel", shape, (None, None, None, self.axis))
        bias = param("bias", shape[3:], ("channels",)) if self.use_bias else None
        return conv2d(x.astype(self.dtype), kernel, bias, stride=self.stride, padding=self.padding)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class GroupNorm(nn.Module):
    """Over positions and groups of neighbouring channels, in float32, then rounded to `dtype`."""

    groups: int = GROUPS
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Raises ValueError if the number of channels is no multiple of that of groups."""
        features, groups = x.shape[-1], self.groups
        if features % groups:
            raise ValueError(f"there are {features} channels; their number must be a multiple of {groups}.")

        def param(name, init):
            return self.param(name, nn.with_logical_partitioning(init, ("channels",)), (features,), self.param_dtype)

        y = x.astype(jnp.float32).reshape(len(x), -1, groups, features // groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), (1, 3), keepdims=True) + EPS)
        y = y.reshape(x.shape) * param("scale", nn.initializers.ones) + param("bias", nn.initializers.zeros)
        return y.astype(self.dtype)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution of x where the channels change."""

    features: int
    groups: int = GROUPS
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width features"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = x
        for number in (1, 2):
            y = jax.nn.silu(GroupNorm(self.groups, **kinds, name=f"norm{number}")(y))
            y = Conv(self.features, **kinds, name=f"conv{number}")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, padding=(0, 0), **kinds, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Attention with one head over all positions, added to its input.

    The keys need no bias: it would add one number to all scores of a query, which changes nothing. (The authors' do.)
    """

    features: int
    groups: int = GROUPS
    key_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        batch, height, width, features = x.shape
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = GroupNorm(self.groups, **kinds, name="norm")(x)

        def linear(name, y):
            use_bias = name != "key" or self.key_bias
            return Conv(features, 1, padding=(0, 0), use_bias=use_bias, **kinds, name=name)(y)

        q, k, v = (linear(name, y).reshape(batch, height * width, features) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(features)
        weights = jax.nn.softmax(scores, -1).astype(v.dtype)
        y = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + linear("output", y)


class Down(nn.Module):
    """Halves the sides (rounded down): adds a zero row below and a zero column at the right, then strides by 2."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(self.features, stride=2, padding=(0, 1), **kinds, name="conv")(x)


class Up(nn.Module):
    """Doubles the sides: repeats each pixel four times, then applies a convolution."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)


BLOCKS = {"conv": Conv, "res": Residual, "attention": Attention, "down": Down, "up": Up}
"""The kinds of layers that change the number of channels, or have a number of them. The others are `norm`, `silu`, and
`point`, a convolution of single positions."""


def _blocks(config: AutoencoderConfig, levels: list[list[Layer]]) -> list[Any]:
    kinds = {"dtype": config.dtype, "param_dtype": config.param_dtype}

    def one(kind, features):
        options: dict[str, Any] = {}
        match kind:
            case "norm":
                return GroupNorm(config.groups, **kinds)
            case "silu":
                return jax.nn.silu
            case "point":
                return Conv(features, 1, padding=(0, 0), axis="channels", **kinds)
            case "conv" if features == config.channels:
                options = {"axis": "channels"}
            case "res":
                options = {"groups": config.groups}
            case "attention":
                options = {"groups": config.groups, "key_bias": config.key_bias}
        return BLOCKS[kind](features, **kinds, **options)

    return [one(*layer) for level in levels for layer in level]


def _run(module: nn.Module, x: jax.Array, levels: list[list[Layer]]) -> jax.Array:
    """x after the first layers of `module.blocks`, as many as there are in `levels`."""
    first = 0
    for layers in levels:

        def level(module, x, start=first, end=first + len(layers)):
            for block in module.blocks[start:end]:
                x = constrain(block(x), None, None, None)
            return x

        x = (nn.remat(level, prevent_cse=False) if module.config.remat_levels else level)(module, x)
        first += len(layers)
    return x


class Encoder(nn.Module):
    """Maps images to a grid of vectors."""

    config: AutoencoderConfig

    def setup(self):
        self.blocks = _blocks(self.config, self.levels())

    def levels(self) -> list[list[Layer]]:
        return encoder_levels(self.config)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns embed_dim"]:
        """Vectors in float32. Images may have other sides than the config's; attention stays in the same levels."""
        x = _run(self, images.astype(self.config.dtype), self.levels())
        return x.astype(jnp.float32)


class Generator(nn.Module):
    """Maps a grid of vectors to images."""

    config: AutoencoderConfig

    def setup(self):
        self.blocks = _blocks(self.config, self.levels())

    def levels(self) -> list[list[Layer]]:
        return generator_levels(self.config)

    def __call__(
        self, vectors: Float[Array, "batch rows columns embed_dim"]
    ) -> Float[Array, "batch height width channels"]:
        """Images in float32, not limited to [0, 1]."""
        return self.last(self.features(vectors))

    def features(self, vectors: Float[Array, "batch rows columns embed_dim"]) -> Float[Array, "batch height width ch"]:
        """The input of the last convolution."""
        *levels, last = self.levels()
        return _run(self, vectors.astype(self.config.dtype), [*levels, last[:-1]])

    def last(self, features: Float[Array, "batch height width ch"]) -> Float[Array, "batch height width channels"]:
        """The last convolution."""
        return self.blocks[-1](features).astype(jnp.float32)


def last_name(levels: list[list[Layer]]) -> str:
    """The last convolution's name in the parameters of a generator with these levels."""
    return f"blocks_{sum(map(len, levels)) - 1}"


def last_conv(config: AutoencoderConfig, features: jax.Array, params: Any) -> Float[Array, "batch height width ch"]:
    """The generator's last convolution as a function of its parameters."""
    conv = Conv(config.channels, axis="channels", dtype=config.dtype, param_dtype=config.param_dtype)
    return conv.apply({"params": params}, features).astype(jnp.float32)


def levels_flops(levels: list[list[Layer]], channels: int, side: int) -> float:
    """Forward FLOPs of an image of these channels and this side, in convolutions and attention."""
    total = 0.0
    for kind, features in (layer for level in levels for layer in level):
        side = side // 2 if kind == "down" else side * 2 if kind == "up" else side
        at = 2 * side * side  # a multiplication and an addition at each position
        match kind:
            case "conv" | "down" | "up":
                total += at * 9 * channels * features
            case "res":
                total += at * (9 * (channels + features) * features + (channels != features) * channels * features)
            case "point":
                total += at * channels * features
            case "attention":
                total += at * (4 * features * features + 2 * side * side * features)
        channels = features
    return total
