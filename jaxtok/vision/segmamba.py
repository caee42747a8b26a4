"""SegMamba (arXiv 2401.13560) in the form of TokenUnify's "EMmamba": a U-net on volumes whose encoder is Mamba.

Each of four stages halves the volume on all axes; its layers read the voxels of a sample as one row, in three orders
(`jaxtok.nn.mamba.Mixer`). What the authors' code does beside the paper is followed:

- The convolutions that halve have a kernel of 1 along z, so that every odd slice is left out there (the paper's summary
  says that z is not halved).
- There is no residual connection around a Mamba layer.
- A stage's output goes through a norm and an MLP; the next stage continues from what was before them.
- All stages read in 5 slices. (The list 32, 16, 8, 4 is commented out in the code.)

Inside, axes are batch, depth (z), height (y), width (x), channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.axes import constrain, gather
from jaxtok.nn.activations import gelu
from jaxtok.nn.convolution import conv2d
from jaxtok.nn.linear import Linear
from jaxtok.nn.mamba import METHODS, Mixer, MixerConfig
from jaxtok.nn.norms import Norm

Volume = Float[Array, "batch depth height width channels"]
NewVolume = Float[Array, "batch depth_out height_out width_out features"]
"""What a layer makes of a `Volume`, if it changes its sides or channels."""
Size = tuple[int, int, int]
EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegMambaConfig:
    """Defaults: the base size, with the kernel of the affinity network."""

    crop: Size = (16, 160, 160)
    """Depth, height and width of what the network sees at a time."""
    patch: Size = (4, 16, 16)
    """The size of a token in the tasks of prediction."""
    features: tuple[int, int, int, int] = (32, 64, 128, 256)
    """The channels of the four stages."""
    hidden: int = 512
    """The channels at the bottom of the U."""
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    """The Mamba layers of each stage."""
    kernel: int = 5
    """The height and width of the kernels of the U-net, whose depth is 1: 5 in the code that predicts affinities, 3 in
    that of pre-training."""
    out_channels: int = 3
    """1 for voxels, 3 for affinities."""
    next_head: bool = False
    """Whether there is the head that predicts one token (the authors' "preciever")."""
    slices: int = 5
    """The slices of the third order; they must divide the number of positions in each stage."""
    state_size: int = 16
    conv_kernel: int = 4
    expand: float = 2.0
    small_steps: bool = False
    """Whether the step sizes of the second and third order begin small; in the authors' code they do not."""
    method: Literal["auto", "scan", "associative"] = "auto"
    """How the recurrence is computed; see `jaxtok.nn.mamba.selective_scan`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of activations and operands; norms, recurrences and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    """Whether only the inputs of stages and blocks are stored for the backward pass, which computes the rest again."""

    def __post_init__(self):
        check_sizes(self.crop, self.patch)
        for field in ("features", "depths"):
            if len(value := getattr(self, field)) != 4 or min(value) < 1:
                raise ValueError(f"{field} is {value}; it must be four numbers of at least 1.")
        for field in ("hidden", "out_channels", "slices"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; it must be odd.")
        if any(side % 16 for side in self.crop):
            raise ValueError(f"crop is {self.crop}; its sides must be multiples of 16, as four stages halve them.")
        for stage in range(4):
            positions = math.prod(self.crop) // 8 ** (stage + 1)
            if positions % self.slices:
                raise ValueError(
                    f"crop is {self.crop}, so stage {stage + 1} has {positions} positions; their number must be a "
                    f"multiple of slices = {self.slices}."
                )
        for field in ("dtype", "param_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of float32, bfloat16.")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}.")
        for features in self.features:
            self.mixer(features)

    @property
    def tokens(self) -> int:
        """The number of tokens of a crop, K in the paper."""
        return math.prod(c // p for c, p in zip(self.crop, self.patch))

    def mixer(self, features: int) -> MixerConfig:
        """The mixer of a stage."""
        return mixer_of(self, features)

    def module(self) -> SegMamba:
        return SegMamba(self)

    def flops(self) -> float:
        """Forward FLOPs of one crop, in convolutions, projections and recurrences."""
        f, h, taps = self.features, self.hidden, self.kernel**2
        voxels = [math.prod(self.crop) / 8**n for n in range(5)]

        def residual(into, out, at):
            return 2 * voxels[at] * (taps * (into + out) * out + (into != out) * into * out)

        total = residual(1, f[0], 0) + residual(f[0], f[0], 0) + 2 * voxels[0] * f[0] * self.out_channels
        for n, into in enumerate((1, *f[:3])):
            width, count = f[n], voxels[n + 1]
            mixer = self.mixer(width)
            one = 2 * mixer.d_model * mixer.channels
            orders = mixer.mixer_flops() + 2 * (mixer.mixer_flops() - 3 * one)  # the projections are shared
            total += 2 * count * (49 if n == 0 else 4) * into * width + count * self.depths[n] * orders
            total += 2 * count * width * width * (2 * 27 + 2) + 8 * count * width * width
            total += residual(width, (*f[1:], h)[n], n + 1)
        for n, into in enumerate((h, f[3], f[2], f[1])):
            out = f[3 - n]
            total += 2 * voxels[3 - n] * into * out + residual(2 * out, out, 3 - n)
        return total


def check_sizes(crop: Size, patch: Size) -> None:
    """Raises a ValueError if a crop cannot be cut into two or more patches of this size."""
    for field, sides in (("crop", crop), ("patch", patch)):
        if len(sides) != 3 or min(sides) < 1:
            raise ValueError(f"{field} is {sides}; it must be three sides (depth, height, width) of at least 1.")
    if any(c % p for c, p in zip(crop, patch)):
        raise ValueError(f"crop is {crop}; its sides must be multiples of those of patch = {patch}.")
    if math.prod(crop) < 2 * math.prod(patch):
        raise ValueError(f"crop is {crop} and patch is {patch}; a crop must have at least 2 patches.")


def instance_norm(x: Volume) -> Volume:
    """Each sample's channel with mean 0 and variance 1 over its voxels, in float32; a constant becomes 0."""
    y = x.astype(jnp.float32)
    y = y - y.mean((1, 2, 3), keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), (1, 2, 3), keepdims=True) + EPS)).astype(x.dtype)


class Conv3d(nn.Module):
    """A convolution of volumes, with PyTorch's initialisation.

    A kernel of depth 1 is a convolution of slices, and is computed as one: the slices are rows of the batch.
    """

    features: int
    kernel: Size = (3, 3, 3)
    stride: int = 1
    padding: Size = (0, 0, 0)
    use_bias: bool = True
    axis: str = "d_model"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Volume) -> NewVolume:
        shape = (*self.kernel, x.shape[-1], self.features)
        bound = 1 / math.sqrt(math.prod(shape[:4]))

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def param(name, shape, axes):
            init = nn.with_logical_partitioning(uniform, axes)
            return gather(self.param(name, init, shape, self.param_dtype).astype(self.dtype), *axes)

        kernel = param("kernel", shape, (None, None, None, None, self.axis))
        bias = param("bias", shape[4:], ("channels",)) if self.use_bias else None
        x, s = x.astype(self.dtype), self.stride
        if self.kernel == (1, 1, 1) and s == 1:
            y = x @ kernel[0, 0, 0]
            return y if bias is None else y + bias
        if self.kernel[0] == 1 and self.padding[0] == 0 and self.padding[1] == self.padding[2]:
            batch, depth = x[:, ::s].shape[:2]
            slices = x[:, ::s].reshape(batch * depth, *x.shape[2:])
            y = conv2d(slices, kernel[0], bias, stride=s, padding=(self.padding[1],) * 2)
            return y.reshape(batch, depth, *y.shape[1:])
        y = jax.lax.conv_general_dilated(
            x, kernel, (s, s, s), [(p, p) for p in self.padding], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        return y if bias is None else y + bias


class Doubling(nn.Module):
    """A transposed convolution of kernel 2 and stride 2: each voxel writes a block of 2 x 2 x 2 of its own."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Volume) -> NewVolume:
        into, out = x.shape[-1], self.features
        bound = 1 / math.sqrt(8 * out)  # PyTorch takes the second axis, which is that of the outputs here

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        axes = (None, None, None, None, "d_model")
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(uniform, axes), (2, 2, 2, into, out), self.param_dtype
        )
        y = jnp.einsum("bdhwi,xyzio->bdxhywzo", x.astype(self.dtype), gather(kernel.astype(self.dtype), *axes))
        batch, depth, height, width = x.shape[:4]
        return y.reshape(batch, 2 * depth, 2 * height, 2 * width, out)


class ResidualBlock(nn.Module):
    """lrelu(norm(conv(lrelu(norm(conv(x))))) + x), with a normed 1 x 1 x 1 convolution of x where channels change."""

    features: int
    kernel: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Volume) -> NewVolume:
        k = self.kernel
        kinds = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def conv(name, y, sides=(1, k, k)):
            half = tuple(side // 2 for side in sides)
            return instance_norm(Conv3d(self.features, sides, padding=half, **kinds, name=name)(y))

        y = conv("conv2", jax.nn.leaky_relu(conv("conv1", x), 0.01))
        if x.shape[-1] != self.features:
            x = conv("conv3", x, (1, 1, 1))
        return jax.nn.leaky_relu(y + x, 0.01)


class GatedConvolutions(nn.Module):
    """SegMamba's GSC: x + P(P(P(x)) + P(x)) with P(x) = relu(norm(conv(x)))."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        def layer(name, y, side):
            conv = Conv3d(
                x.shape[-1],
                (side,) * 3,
                padding=(side // 2,) * 3,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )
            return jax.nn.relu(instance_norm(conv(y)))

        y = layer("proj2", layer("proj", x, 3), 3) + layer("proj3", x, 1)
        return x + layer("proj4", y, 1)


class MambaLayer(nn.Module):
    """A norm and a mixer in three orders, over the voxels in raster order; without a residual connection."""

    config: SegMambaConfig
    features: int

    @nn.compact
    def __call__(self, x: Volume) -> Volume:
        cfg = self.config
        tokens = x.reshape(len(x), -1, self.features)
        norm = Norm("layernorm", dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")
        mixer = Mixer(cfg.mixer(self.features), 3, cfg.slices, cfg.small_steps, name="mixer")
        return mixer(norm(tokens))[0].reshape(x.shape).astype(x.dtype)


class _Layers(nn.Module):
    """One step of the scan over a stage's layers."""

    config: SegMambaConfig
    features: int

    @nn.compact
    def __call__(self, x: Volume, _: None) -> tuple[Volume, None]:
        return MambaLayer(self.config, self.features, name="layer")(x), None


class Stage(nn.Module):
    """Halves the volume, then has gated convolutions and Mamba layers; returns also the output of the stage."""

    config: SegMambaConfig
    number: int

    @nn.compact
    def __call__(self, x: Volume) -> tuple[NewVolume, NewVolume]:
        cfg, width = self.config, self.config.features[self.number]
        kinds = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        if self.number == 0:
            x = Conv3d(width, (1, 7, 7), 2, (0, 3, 3), **kinds, name="down")(x)
        else:
            x = Conv3d(width, (1, 2, 2), 2, **kinds, name="down")(instance_norm(x))
        x = GatedConvolutions(**kinds, name="gated")(x)
        layers = nn.scan(
            _Layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.depths[self.number],
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(cfg, width, name="layers")(x, None)
        y = Conv3d(2 * width, (1, 1, 1), **kinds, name="up")(instance_norm(x))
        y = Conv3d(width, (1, 1, 1), **kinds, name="out")(gelu(y))
        return x, y


class NextHead(nn.Module):
    """From logits of a crop to those of one token: three convolutions and a matrix, for one size of crops."""

    config: SegMambaConfig

    @nn.compact
    def __call__(self, logits: Volume) -> Float[Array, "batch pd ph pw"]:
        cfg = self.config
        kinds = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype, "axis": "channels"}
        x = jax.nn.relu(Conv3d(12, (3, 3, 3), 2, (1, 1, 1), **kinds, name="conv1")(logits))
        x = jax.nn.relu(Conv3d(12, (3, 3, 3), 2, (1, 1, 1), **kinds, name="conv2")(x))
        x = Conv3d(1, (3, 3, 3), 2, (1, 1, 1), **kinds, name="conv3")(x)
        mlp = Linear(math.prod(cfg.patch), (None, "channels"), dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="mlp")
        y = mlp(x.reshape(len(x), -1))
        return y.reshape(len(x), *cfg.patch).astype(jnp.float32)


class SegMamba(nn.Module):
    """Maps crops to logits for each voxel."""

    config: SegMambaConfig

    @nn.compact
    def __call__(self, x: Volume, *, next_token: bool = False, stages: bool = False) -> Any:
        """Logits [batch, depth, height, width, out_channels] in float32.

        Args:
          x: crops of the config's size.
          next_token: also return the logits of one token, of the head for it.
          stages: also return the outputs of the four stages.

        Raises:
          ValueError: the crops have another size.
        """
        cfg = self.config
        check_crops(x, cfg.crop)
        f, kinds = cfg.features, {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        again = (lambda module: nn.remat(module, prevent_cse=False)) if cfg.remat else (lambda module: module)
        stage, residual = again(Stage), again(ResidualBlock)

        def block(name, features, y):
            y = residual(features, cfg.kernel, **kinds, name=name)(y)
            return constrain(y, None, None, None, None)

        x = x.astype(cfg.dtype)
        skips, y, outputs = [block("encoder1", f[0], x)], x, []
        for number, width in enumerate((*f[1:], cfg.hidden)):
            y, out = stage(cfg, number, name=f"stage{number}")(y)
            outputs.append(out)
            skips.append(block(f"encoder{number + 2}", width, out))
        y = skips[4]
        for number in (3, 2, 1, 0):
            up = Doubling(f[number], **kinds, name=f"up{number + 2}")(y)
            y = block(f"decoder{number + 2}", f[number], jnp.concatenate([up, skips[number]], -1))
        y = block("decoder1", f[0], y)
        logits = Conv3d(cfg.out_channels, (1, 1, 1), **kinds, axis="channels", name="out")(y).astype(jnp.float32)
        results = [logits]
        if cfg.next_head and (next_token or self.is_initializing()):
            head = NextHead(cfg, name="next_head")(logits)
            results += [head] if next_token else []
        results += [outputs] if stages else []
        return results[0] if len(results) == 1 else tuple(results)


def mixer_of(config: Any, features: int) -> MixerConfig:
    """The mixer of so many channels that the config of a network of volumes describes."""
    return MixerConfig(
        d_model=features,
        state_size=config.state_size,
        conv_kernel=config.conv_kernel,
        expand=config.expand,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        method=config.method,
    )


def check_crops(x: Array, crop: Size) -> None:
    """Raises a ValueError if these are not crops of one channel and this size."""
    if x.ndim != 5 or x.shape[1:] != (*crop, 1):
        sides = ", ".join(map(str, crop))
        raise ValueError(f"the crops have the shape {x.shape}; for this model it must be [batch, {sides}, 1].")
