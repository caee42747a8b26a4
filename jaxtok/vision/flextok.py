"""FlexTok: an image as 1 to 256 ordered tokens (Resampling Images into 1D Token Sequences of Flexible Length, ICML
2025, arXiv 2502.13967).

    encoder   [patches of the latents ; registers], "causal_last": patches see patches, register j sees the patches and
              registers up to j;  z = head(registers),  codes and ids = FSQ(z)
    decoder   registers r = W codes + b + position; those from k on become one mask token (nested dropout), and all of
              them the null token where there is no condition; [patches of x_t ; r], all see all, modulated by the time
    training  the velocity of a rectified flow from the latents to noise, given the first k codes, with k drawn for each
              image; and REPA (arXiv 2410.06940), features of the decoder that resemble those of a frozen teacher
    decoding  Euler steps from noise, given any number of first codes, with guidance

As the mask is causal, the first k codes do not depend on the registers after them. The released code has the modules
and no training, of which the losses and schedules here are the paper's. Where paper and code leave something open
(batch, steps, learning rate, which dropout each checkpoint had), the choices are ours, and options.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.nn.flex_blocks import (
    FlexHead,
    FlexStack,
    TimeEmbedding,
    flex_stack,
    grid_waves,
    xavier_std,
)
from jaxtok.nn.linear import Linear
from jaxtok.nn.losses import mean
from jaxtok.nn.norms import unit_length
from jaxtok.nn.quantizers import FiniteScalars, corrupted
from jaxtok.nn.rectified_flow import TIMES, Guidance, Times, draw_times, euler, noised, velocity_error
from jaxtok.nn.transformer import DTYPES, PARAM_DTYPES, REMAT_POLICIES, Stack
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task
from jaxtok.vision.classification import ImageClassification
from jaxtok.vision.collapse import CollapseGuard, code_health, code_sums
from jaxtok.vision.images import as_float, check_codes, check_images
from jaxtok.vision.kl_vae import KLAutoencoding, KLVAEConfig
from jaxtok.vision.metrics import psnr
from jaxtok.vision.vit import ViT, ViTConfig

LATENTS = ("vae", "colour", "grey")
DROPOUTS = ("pow2", "uniform", "uniform_pow2", "none")
GAP_TIME = 0.9
"""The time at which the losses with and without codes are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """The networks between latents and codes; defaults: the released d18-d18."""

    latent_size: tuple[int, int] = (32, 32)
    """The rows and columns of the latents."""
    channels: int = 16
    """The channels of the latents."""
    patch: tuple[int, int] = (2, 2)
    """The rows and columns of a patch."""
    registers: int = 256
    """The number of codes of an image."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """The levels of each scalar of a code (FSQ)."""
    encoder_width: int = 1152
    encoder_depth: int = 18
    decoder_width: int = 1152
    decoder_depth: int = 18
    head_dim: int = 64
    mlp_ratio: float = 4.0
    """The gated MLP is two thirds of this times as wide as the blocks."""
    norm_eps: float = 1e-5
    modulation_sets: Literal[1, 2] = 2
    """The sets of modulations by the time: one for all tokens, or one for patches and one for registers."""
    head_modulation: bool = False
    """Whether the time modulates the decoder's last norm too."""
    null: Literal["learned", "zero"] = "learned"
    """The token that stands for no condition: learned, or zeros."""
    time_channels: int = 256
    """The number of sines and cosines of the time."""
    max_time: float = 1.0
    """The time that the largest argument of these, 1000, stands for."""
    unscrambled: bool = False
    """Whether the fixed position table of the patches has their rows and columns where the grid is not square, too; the
    authors' is scrambled there (`jaxtok.nn.flex_blocks.grid_waves`)."""
    table: tuple[int, ...] = ()
    """The rows and columns of the position table, whose corner is used; empty: those of the patches."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of activations and matmul operands; norms, softmax, codes, times and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "projections", "dots"] = "none"
    """What a block stores for the backward pass; see `jaxtok.nn.transformer.StackConfig`."""

    def __post_init__(self):
        for field in ("latent_size", "patch"):
            if len(sides := getattr(self, field)) != 2 or min(sides) < 1:
                raise ValueError(f"{field} is {sides}; it must be two numbers of at least 1 (rows and columns).")
        for field in ("channels", "registers", "encoder_depth", "decoder_depth", "time_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if any(size % side for size, side in zip(self.latent_size, self.patch)):
            raise ValueError(f"patch is {self.patch}, which does not divide latent_size = {self.latent_size}.")
        for field, allowed in (
            ("modulation_sets", (1, 2)),
            ("null", ("learned", "zero")),
            ("dtype", DTYPES),
            ("param_dtype", PARAM_DTYPES),
            ("remat", tuple(REMAT_POLICIES)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(map(str, allowed))}."
                )
        if self.max_time <= 0 or self.mlp_ratio <= 0:
            raise ValueError(f"max_time is {self.max_time} and mlp_ratio {self.mlp_ratio}; both must be above 0.")
        if self.table and (len(self.table) != 2 or any(n > size for n, size in zip(self.grid, self.table))):
            raise ValueError(
                f"table is {self.table}, but the latents have {self.grid[0]} x {self.grid[1]} patches; it must be "
                "empty, or at least as many rows and columns."
            )
        for field in ("encoder_width", "decoder_width"):
            if getattr(self, field) % 4:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; for the position table it must be divisible by 4."
                )
        _ = self.scalars, self.encoder_stack, self.decoder_stack  # which check their own fields

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of the patches."""
        return (self.latent_size[0] // self.patch[0], self.latent_size[1] // self.patch[1])

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        return math.prod(self.patch) * self.channels

    @property
    def scalars(self) -> FiniteScalars:
        return FiniteScalars(self.levels)

    @property
    def encoder_stack(self) -> FlexStack:
        return self._stack(self.encoder_width, self.encoder_depth, ())

    @property
    def decoder_stack(self) -> FlexStack:
        sets = (self.patches, self.registers) if self.modulation_sets == 2 else (self.patches + self.registers,)
        return self._stack(self.decoder_width, self.decoder_depth, sets)

    def _stack(self, width: int, depth: int, sets: tuple[int, ...]) -> FlexStack:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        return flex_stack(width, depth, self.head_dim, self.mlp_ratio, norm_eps=self.norm_eps, sets=sets, **types)

    def flops(self) -> tuple[float, float]:
        """Forward FLOPs of one image in the encoder, and in the decoder."""
        length, scalars = self.patches + self.registers, len(self.levels)
        both = []
        for stack in (self.encoder_stack, self.decoder_stack):
            blocks = length * stack.stack_flops(length) + 2 * stack.num_layers * stack.modulation_params()
            ends = self.patches * self.patch_dim + self.registers * scalars
            both.append(blocks + 2 * stack.d_model * ends)
        decoder = self.decoder_width
        time = decoder * (self.time_channels + decoder) + (2 * decoder**2 if self.head_modulation else 0)
        return both[0], both[1] + 2 * decoder * self.patches * self.patch_dim + 2 * time


def causal_last(first: int, last: int) -> Bool[np.ndarray, "tokens tokens"]:
    """Which token sees which: the first ones see one another, and each of the last ones sees all first ones, and the
    last ones up to itself."""
    tokens = np.arange(first + last)
    return (tokens[None] < first) | ((tokens[None] <= tokens[:, None]) & (tokens[:, None] >= first))


def to_patches(
    latents: Float[Array, "batch height width channels"], patch: tuple[int, int]
) -> Float[Array, "batch patches patch"]:
    """Patches, row by row, each with its cells row by row (channels last)."""
    batch, height, width, channels = latents.shape
    (p, q), rows, columns = patch, height // patch[0], width // patch[1]
    x = latents.reshape(batch, rows, p, columns, q, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, p * q * channels)


def from_patches(
    patches: Float[Array, "batch patches patch"], grid: tuple[int, int], patch: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """Inverts `to_patches`."""
    (rows, columns), (p, q) = grid, patch
    x = patches.reshape(len(patches), rows, columns, p, q, -1).swapaxes(2, 3)
    return x.reshape(len(patches), rows * p, columns * q, -1)


class Part(nn.Module):
    """What encoder and decoder share: parameters by name, and the embedding of patches."""

    config: FlexTokConfig

    def vectors(self, name: str, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        axes = (*[None] * (len(shape) - 1), "d_model")
        init = nn.with_logical_partitioning(nn.initializers.truncated_normal(0.02), axes)
        return gather(self.param(name, init, shape, self.config.param_dtype).astype(self.config.dtype), *axes)

    def linear(self, name: str, fan_in: int, features: int) -> Linear:
        cfg = self.config
        return Linear(
            features,
            ("patch", "d_model"),
            kernel_init=nn.initializers.normal(xavier_std(fan_in, features)),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            name=name,
        )

    def embed(self, latents: Float[Array, "batch height width channels"], width: int):
        """The patches of latents, with their positions."""
        cfg = self.config
        rows, columns = cfg.grid
        size = cfg.table or cfg.grid
        table = jnp.asarray(grid_waves(*size, width, cfg.unscrambled), cfg.dtype)
        x = self.linear("patch", cfg.patch_dim, width)(to_patches(latents, cfg.patch))
        return x + table[:rows, :columns].reshape(rows * columns, width)


class Encoder(Part):
    """Maps latents to the vectors that are quantised."""

    @nn.compact
    def __call__(self, latents: Float[Array, "batch height width channels"]) -> Float[Array, "batch registers scalars"]:
        cfg, width = self.config, self.config.encoder_width
        patches = self.embed(latents, width)
        registers = self.vectors("registers", (cfg.registers, width))
        registers = jnp.broadcast_to(registers, (len(patches), *registers.shape))
        x = constrain(jnp.concatenate([patches, registers], 1), "d_model")
        self.sow("intermediates", "input", x)
        mask = jnp.asarray(causal_last(cfg.patches, cfg.registers))[None]
        x, _ = Stack(cfg.encoder_stack, name="stack")(x, jnp.arange(x.shape[1])[None], mask=mask)
        self.sow("intermediates", "output", x)
        head = FlexHead(len(cfg.levels), eps=cfg.norm_eps, param_dtype=cfg.param_dtype, name="head")
        return head(x[:, cfg.patches :].astype(jnp.float32))


class Decoder(Part):
    """Maps noised latents, their time and codes to a velocity."""

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch height width channels"],
        t: Float[Array, " batch"],
        codes: Float[Array, "batch given scalars"],
        keep: Int[Array, " batch"] | None = None,
        null: Bool[Array, " batch"] | None = None,
        *,
        compact: bool = False,
        features_of: int | None = None,
    ) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch patches d_model"] | None]:
        """The velocity in float32, and the features of the patches after a block.

        Args:
          keep: how many of an image's first codes count; default: all that are given.
          null: the images without a condition.
          compact: only the codes that count are given, the same number for each image. The tokens after them, which
            are all equal in every layer, are computed once and count for as many (`keep` must be None).
          features_of: the number of the block whose features are wanted.

        Raises:
          ValueError: another number of codes is given than the model has registers.
        """
        cfg, width, given = self.config, self.config.decoder_width, codes.shape[1]
        copies = cfg.registers - given if compact else 0
        if not 0 < given <= cfg.registers or (given != cfg.registers and not compact) or (compact and keep is not None):
            raise ValueError(
                f"{given} codes are given for each image, of {cfg.registers}; give all of them, and how many count as "
                "keep, or the first ones alone with compact."
            )
        patches = self.embed(latents.astype(cfg.dtype), width)
        r = self.linear("codes", len(cfg.levels), width)(codes)
        r = r + self.vectors("register_positions", (cfg.registers, width))[:given]
        mask_token = self.vectors("mask_token", (width,))
        if keep is not None:
            r = jnp.where((jnp.arange(given) < keep[:, None])[..., None], r, mask_token)
        if copies:
            r = jnp.concatenate([r, jnp.broadcast_to(mask_token, (len(r), 1, width))], 1)
        if null is not None or cfg.null == "learned":
            token = self.vectors("null_token", (width,)) if cfg.null == "learned" else jnp.zeros(width, r.dtype)
            r = r if null is None else jnp.where(null[:, None, None], token, r)
        self.sow("intermediates", "register_tokens", r)
        self.sow("intermediates", "patch_tokens", patches)
        x = constrain(jnp.concatenate([patches, r], 1), "d_model")
        condition = TimeEmbedding(width, cfg.time_channels, cfg.max_time, param_dtype=cfg.param_dtype, name="time")(
            t
        ).astype(cfg.dtype)
        self.sow("intermediates", "condition", condition)
        bias = ()
        if copies > 1:  # the last key counts `copies` times: exp(score + ln copies)
            weights = np.zeros(x.shape[1], np.float32)
            weights[-1] = math.log(copies)
            bias = (jnp.asarray(weights)[None, None, None],)
        stack, positions = Stack(cfg.decoder_stack, name="stack"), jnp.arange(x.shape[1])[None]
        parts = [(0, cfg.decoder_depth)]
        if features_of is not None and not self.is_initializing():
            parts = [(0, features_of + 1), (features_of + 1, cfg.decoder_depth)]
        features = None
        for part in parts:
            x, _ = stack(x, positions, condition=condition, bias=bias, layers=part)
            features = x[:, : cfg.patches] if features is None else features
        head = FlexHead(cfg.patch_dim, cfg.head_modulation, cfg.norm_eps, param_dtype=cfg.param_dtype, name="head")
        y = head(x[:, : cfg.patches].astype(jnp.float32), condition.astype(jnp.float32))
        return from_patches(y, cfg.grid, cfg.patch), features


class FlexTok(nn.Module):
    """Encoder and decoder."""

    config: FlexTokConfig

    def setup(self):
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def __call__(self, latents: Float[Array, "batch height width channels"], t: Float[Array, " batch"]):
        """The velocity at the latents themselves, given all of their own codes; for `init`."""
        return self.decoder(latents, t, self.config.scalars.quantize(self.encoder(latents)))

    def vectors(self, latents: Float[Array, "batch height width channels"]) -> Float[Array, "batch registers scalars"]:
        """What is quantised."""
        return self.encoder(latents)

    def velocity(self, latents, t, codes, keep=None, null=None, **options):
        """As `Decoder`."""
        return self.decoder(latents, t, codes, keep, null, **options)


def draw_kept(
    rng: jax.Array, count: int, registers: int, dropout: Literal["pow2", "uniform", "uniform_pow2", "none"]
) -> Int[Array, " count"]:
    """The number of codes that each image keeps in training.

    pow2          1, 2, 4, ..., registers, all equally likely
    uniform       1, ..., registers, all equally likely
    uniform_pow2  a uniform one rounded up to a power of two, so that the most is the likeliest
    none          all
    """
    if dropout == "none":
        return jnp.full(count, registers, jnp.int32)
    if dropout == "pow2":
        return 2 ** jax.random.randint(rng, (count,), 0, registers.bit_length())
    kept = jax.random.randint(rng, (count,), 1, registers + 1)
    if dropout == "uniform":
        return kept
    powers = jnp.asarray(np.minimum(2 ** np.arange(registers.bit_length() + 1), registers), jnp.int32)
    return powers[jnp.searchsorted(powers, kept)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSampling:
    """How images are drawn from their codes; defaults: plain sampling."""

    steps: int = 20
    """The number of Euler steps; the authors take 20 to 25."""
    guidance: float = 1.0
    """The scale of the guidance towards the codes; 1: none. The authors recommend 7.5 with APG."""
    apg: bool = True
    """Whether guidance is APG (arXiv 2410.02416), instead of classifier-free guidance."""
    momentum: float | None = -0.5
    eta: float = 0.0
    threshold: float = 2.5
    """See `jaxtok.nn.rectified_flow.Guidance`."""
    compact: bool = False
    """Whether the codes that are not given are computed once for all of them: exact, and faster with few codes, but
    compiled for each number of codes."""

    def __post_init__(self):
        self.rule.weights(self.steps)

    @property
    def rule(self) -> Guidance:
        options = {name: getattr(self, name) for name in ("apg", "momentum", "eta", "threshold")}
        return Guidance(scale=self.guidance, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repa:
    """REPA: the decoder's early features, projected, are drawn towards a frozen teacher's by their cosine.

    The authors' teacher is DINOv2-L, whose 37 x 37 patches have 1,024 features. Here it is any of this package's image
    classifiers, and its features are the patches after its last block.
    """

    teacher: ViTConfig
    run: str
    """The run of the teacher (`ImageClassification`)."""
    weight: float = 1.0
    layer: int = 1
    """The number of the decoder's block whose features are taken, from 0."""
    width: int = 0
    """The width of the two hidden layers of the projection; 0: that of the decoder."""

    def __post_init__(self):
        if self.weight < 0 or self.layer < 0 or self.width < 0:
            raise ValueError(
                f"repa.weight is {self.weight}, repa.layer {self.layer} and repa.width {self.width}; none may be "
                "negative."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of the teacher's patches."""
        return (self.teacher.image_size // self.teacher.patch_size,) * 2

    def features(self, params: Params, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch patches d"]:
        """The teacher's features of images in [0, 1]."""
        size, task = self.teacher.image_size, ImageClassification(model=self.teacher)
        x = jax.image.resize(images, (len(images), size, size, 3), "bilinear")
        x = (x - task.pixel_mean) / task.pixel_std
        _, state = ViT(self.teacher).apply({"params": params}, x, features=True, mutable="intermediates")
        return jax.lax.stop_gradient(state["intermediates"]["stack"]["blocks"]["hidden"][0][-1][:, 1:])


class Projection(nn.Module):
    """Three layers with SiLU, from the decoder's features on its grid to the teacher's on the teacher's."""

    width: int
    features: int
    grid: tuple[int, int]
    into: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "batch patches d_model"]) -> Float[Array, "batch others features"]:
        x = x.astype(jnp.float32).reshape(len(x), *self.grid, -1)
        x = jax.image.resize(x, (len(x), *self.into, x.shape[-1]), "bilinear").reshape(len(x), -1, x.shape[-1])
        for name, features in (("in", self.width), ("hidden", self.width), ("out", self.features)):
            std = xavier_std(x.shape[-1], features)
            x = Linear(features, ("d_model", "mlp"), kernel_init=nn.initializers.normal(std), name=name)(x)
            x = x if name == "out" else nn.silu(x)
        return x


@flax.struct.dataclass
class Draws:
    """The random numbers of a training step."""

    noise: Float[Array, "batch height width channels"]
    t: Float[Array, " batch"]
    keep: Int[Array, " batch"]
    null: Bool[Array, " batch"]
    rounds: Bool[Array, "batch 1 1"]
    """Where codes are rounded."""
    corruption: jax.Array
    latents: jax.Array
    """Keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokenizer(Task):
    """Trains FlexTok, and is an image tokenizer (`jaxtok.protocols.ImageTokenizer`) that decodes any number of codes.

    Batches are those of `jaxtok.data.images.ImageData`:

    images  uint8, or float32 in [0, 1]  [batch, height, width, 3]
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch

    Parameters are {"flextok": encoder and decoder, "repa": the projection, "frozen": the KL-VAE and the teacher}; the
    first, and the KL-VAE, are needed to encode and decode.
    """

    counted = "images"

    model: FlexTokConfig
    latents: Literal["vae", "colour", "grey"] = "colour"
    """What the model sees: the latents of a KL-VAE, or the pixels in [-1, 1], or their grey alone (one channel)."""
    vae: KLVAEConfig | None = None
    """The KL-VAE, which does not train."""
    vae_run: str = ""
    """The run or the files of the KL-VAE, which are read when a run begins."""
    sample_latents: bool = False
    """Whether `encode` draws latents from the KL-VAE's posterior, as the authors' code does, instead of taking their
    mean; in training they are always drawn."""
    dropout: Literal["pow2", "uniform", "uniform_pow2", "none"] = "pow2"
    """How many of its codes an image keeps in training; see `draw_kept`."""
    null_probability: float = 0.1
    """The probability with which an image's codes are withheld in training, for the guidance."""
    times: Times = "logit_normal"
    """The distribution of training times; see `jaxtok.nn.rectified_flow.times_of`."""
    time_shift: float = 0.0
    """How far that of a logit-normal is moved towards noise."""
    drop_rounding: float = 0.0
    """The probability with which an image's codes are not rounded in training (the authors' `drop_quant_p`)."""
    corrupt: float = 0.0
    """The greatest share of an image's codes that are replaced by random ones (the authors' `corrupt_tokens_p`)."""
    corrupt_least: float | None = None
    """The least share; None: the greatest."""
    corrupt_probability: float = 0.2
    """The probability with which an image's codes are corrupted at all, if `corrupt` is positive."""
    repa: Repa | None = None
    """The representation alignment; None: there is none."""
    sampling: FlowSampling = FlowSampling()
    """How `decode` draws images."""
    eval_prefixes: tuple[int, ...] = ()
    """Numbers of first codes from which an evaluation decodes too."""
    probe_every: int = 10
    """The number of steps between two probes of the gap between the losses without and with codes."""
    guard: CollapseGuard | None = CollapseGuard()
    """The rule that ends a run whose codes have collapsed; None: there is none."""

    def __post_init__(self):
        cfg = self.model
        for field, allowed in (("latents", LATENTS), ("dropout", DROPOUTS), ("times", TIMES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")
        if self.dropout == "pow2" and cfg.registers & (cfg.registers - 1):
            raise ValueError(
                f"registers is {cfg.registers}, but dropout is pow2; it must be a power of two, or dropout uniform or "
                "uniform_pow2."
            )
        for field in ("null_probability", "drop_rounding", "corrupt", "corrupt_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1].")
        if not 0 <= self.corrupt_shares[0] <= self.corrupt:
            raise ValueError(f"corrupt_least is {self.corrupt_least}; it must be in [0, corrupt = {self.corrupt}].")
        if (self.latents == "vae") != (self.vae is not None):
            raise ValueError(f"latents is {self.latents}, and vae is {self.vae}; give a vae if latents is vae.")
        if self.vae is not None and (size := (*self.vae.grid, self.vae.z_channels)) != (*cfg.latent_size, cfg.channels):
            raise ValueError(
                f"latent_size is {cfg.latent_size} and channels {cfg.channels}, but the latents of the vae are "
                f"{' x '.join(map(str, size))}; make them equal."
            )
        wanted = {"colour": 3, "grey": 1}.get(self.latents, cfg.channels)
        if cfg.channels != wanted:
            raise ValueError(f"channels is {cfg.channels}; with latents = {self.latents} it must be {wanted}.")
        if wrong := [k for k in self.eval_prefixes if not 1 <= k <= cfg.registers]:
            raise ValueError(f"eval_prefixes has {wrong[0]}; an image has 1 to {cfg.registers} codes.")
        if self.repa is not None and self.repa.layer >= cfg.decoder_depth:
            raise ValueError(f"repa.layer is {self.repa.layer}, but the decoder has {cfg.decoder_depth} blocks.")
        if self.probe_every < 1:
            raise ValueError(f"probe_every is {self.probe_every}; it must be at least 1.")

    # -- an image tokenizer

    draws_images: ClassVar[bool] = True

    @property
    def draws_codes(self) -> bool:
        return self.vae is not None and self.sample_latents

    @property
    def image_shape(self) -> tuple[int, int, int]:
        if self.vae is not None:
            return (self.vae.image_size, self.vae.image_size, self.vae.channels)
        return (*self.model.latent_size, 3)

    @property
    def code_shape(self) -> tuple[int]:
        return (self.model.registers,)

    @property
    def code_values(self) -> tuple[int]:
        return (self.model.scalars.size,)

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(range(1, self.model.registers + 1))

    def encode(
        self, params: Params, images: Float[Array, "batch height width channels"], rng: jax.Array | None = None
    ) -> Int[Array, "batch positions 1"]:
        """Codes of images in [0, 1], the most important first.

        Args:
          rng: a key, if latents are drawn (`sample_latents`).

        Raises:
          ValueError: the images have another shape or type; or latents are drawn, and there is no key.
        """
        check_images(images, self.image_shape)
        if self.draws_codes and rng is None:
            raise ValueError("rng is None; it must be a key, as this tokenizer draws its codes (sample_latents).")
        return _encode(self, self._own(params), images, rng if self.draws_codes else None)

    @staticmethod
    def _own(params: Params) -> Params:
        """What encoding and decoding need of the parameters."""
        vae = params.get(FROZEN, {}).get("vae")
        return {"flextok": params["flextok"]} | ({} if vae is None else {FROZEN: {"vae": vae}})

    def decode(
        self, params: Params, codes: Int[Array, "batch given 1"], rng: jax.Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        """Images, not limited to [0, 1], of any number of first codes. All numbers of codes share a compiled function,
        unless `sampling.compact` is set.

        Raises:
          ValueError: the codes have another shape, or are outside the vocabulary; no key.
        """
        check_codes(codes, self.prefixes, self.code_values)
        given = codes.shape[1]
        return self._drawn(params, jnp.asarray(codes)[..., 0], np.full(len(codes), given, np.int32), rng)

    def decode_lists(
        self, params: Params, codes: Sequence[Sequence[int]], rng: jax.Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        """As `decode`, of a list of codes for each image, which may be of different lengths.

        Raises:
          ValueError: a list is empty or too long, or has a code outside the vocabulary; no key.
        """
        most, size = self.model.registers, self.model.scalars.size
        lengths = np.array([len(row) for row in codes], np.int32)
        if not len(lengths) or lengths.min() < 1 or lengths.max() > most:
            wrong = next((n for n in lengths if not 1 <= n <= most), "no list")
            raise ValueError(f"there is a list of {wrong} codes; each image must have 1 to {most}.")
        if wrong := [code for row in codes for code in row if not (code == int(code) and 0 <= code < size)]:
            raise ValueError(f"there is the code {wrong[0]}; it must be in [0, {size}).")
        padded = np.zeros((len(lengths), most), np.int32)
        for row, own in zip(padded, codes):
            row[: len(own)] = own
        return self._drawn(params, padded, lengths, rng)

    def _drawn(self, params, ids, keep, rng):
        if rng is None:
            raise ValueError("this tokenizer draws its images: give decode a key, rng.")
        most = self.model.registers
        compact = self.sampling.compact and ids.shape[1] < most
        if not compact:  # id 0 is a valid code: what counts is how many are kept
            ids = jnp.pad(jnp.asarray(ids), [(0, 0), (0, most - ids.shape[1])])
        return _decode(self, self._own(params), ids, None if compact else keep, rng)

    def to_latents(
        self, params: Params, images: Float[Array, "batch height width 3"], rng: jax.Array | None = None
    ) -> Float[Array, "batch rows columns channels"]:
        """The latents of images in [0, 1]; with a key, a sample of the KL-VAE's posterior, else its mean."""
        if self.vae is not None:
            return jax.lax.stop_gradient(self._autoencoding().latents(params[FROZEN]["vae"], images, rng))
        x = 2 * images - 1
        return x.mean(-1, keepdims=True) if self.latents == "grey" else x

    def to_images(
        self, params: Params, latents: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch height width 3"]:
        """The images of latents."""
        if self.vae is not None:
            return self._autoencoding().images(params[FROZEN]["vae"], latents)
        return jnp.broadcast_to((latents + 1) / 2, (*latents.shape[:-1], 3))

    def _autoencoding(self) -> KLAutoencoding:
        return KLAutoencoding(model=self.vae, discriminator=None, perceptual="none")

    # -- a task

    def fit(self, data: Data, train: Any = None) -> FlexTokenizer:
        """The task itself. Raises ValueError if the images of the data have another shape."""
        shape = data.batch_spec()["images"].shape[1:]
        if shape != self.image_shape:
            raise ValueError(
                f"the images of the data are {' x '.join(map(str, shape))}, but the model's are "
                f"{' x '.join(map(str, self.image_shape))} (height, width, channels); make data.size, or "
                "task.model.latent_size, fit."
            )
        return self

    def flextok(self) -> FlexTok:
        """The module of the parameters' part `flextok`."""
        return FlexTok(self.model)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        ours, other = jax.random.split(rng)
        cfg, count = self.model, len(batch["images"])
        latents = jnp.zeros((count, *cfg.latent_size, cfg.channels))
        params = {"flextok": self.flextok().init(ours, latents, jnp.zeros(count))["params"]}
        if self.vae is not None:
            params[FROZEN] = {"vae": self._autoencoding().init(other, batch)}
        if self.repa is not None:
            features = jnp.zeros((len(latents), self.model.patches, self.model.decoder_width))
            params["repa"] = self._projection().init(other, features)["params"]
            size = self.repa.teacher.image_size
            teacher = ViT(self.repa.teacher).init(other, jnp.zeros((len(latents), size, size, 3)))
            params[FROZEN] = {**params.get(FROZEN, {}), "teacher": teacher["params"]}
        return params

    def _projection(self) -> Projection:
        repa, cfg = self.repa, self.model
        return Projection(repa.width or cfg.decoder_width, repa.teacher.d_model, cfg.grid, repa.grid)

    def load_weights(self, params: Params) -> Params:
        """The parameters with those of the KL-VAE and of the teacher from their runs.

        Raises:
          FileNotFoundError, ValueError: there is no such run, or it is of another model.
        """
        frozen = dict(params.get(FROZEN, {}))
        if self.vae is not None and self.vae_run:
            read = _read("vae_run", self.vae_run, KLAutoencoding, self.vae)
            frozen["vae"] = {name: read[name] for name in frozen["vae"]}
        elif self.vae is not None:
            logging.getLogger("jaxtok").warning("vae_run is empty: the KL-VAE's weights are random.")
        if self.repa is not None:
            frozen["teacher"] = _read("repa.run", self.repa.run, ImageClassification, self.repa.teacher)
        return {**params, FROZEN: frozen} if frozen else params

    @property
    def corrupt_shares(self) -> tuple[float, float]:
        return (self.corrupt if self.corrupt_least is None else self.corrupt_least, self.corrupt)

    def draw(self, rng: jax.Array, count: int) -> Draws:
        """The random numbers of a step."""
        cfg = self.model
        noise, t, keep, null, rounds, corruption, latents = jax.random.split(rng, 7)
        options = {"shift": self.time_shift} if self.times in ("logit_normal", "stratified") else {}
        return Draws(
            noise=jax.random.normal(noise, (count, *cfg.latent_size, cfg.channels)),
            t=draw_times(t, count, self.times, **options),
            keep=draw_kept(keep, count, cfg.registers, self.dropout),
            null=jax.random.bernoulli(null, self.null_probability, (count,)),
            rounds=~jax.random.bernoulli(rounds, self.drop_rounding, (count, 1, 1)),
            corruption=corruption,
            latents=latents,
        )

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        images, mask, model = as_float(batch["images"]), batch["mask"], self.flextok()
        scalars, draws = self.model.scalars, self.draw(rng, len(images))
        x = self.to_latents(params, images, draws.latents)
        given = {"params": params["flextok"]}
        vectors = model.apply(given, x, method="vectors")
        codes = scalars.quantize(vectors, draws.rounds)
        whole = jax.lax.stop_gradient(scalars.quantize(vectors))
        if self.corrupt:
            probability = self.corrupt_probability
            codes = corrupted(codes, scalars, draws.corruption, share=self.corrupt_shares, probability=probability)
        layer = None if self.repa is None else self.repa.layer
        x_t = noised(x, draws.noise, draws.t)
        v, features = model.apply(
            given, x_t, draws.t, codes, draws.keep, draws.null, features_of=layer, method="velocity"
        )
        sums = {"velocity": jnp.sum(velocity_error(v, x, draws.noise) * mask), "images": jnp.sum(mask)}
        sums["health"] = code_sums(whole, mask, scalars.ids(whole), scalars.size)
        if self.repa is not None:
            ours = self._projection().apply({"params": params["repa"]}, features)
            theirs = self.repa.features(params[FROZEN]["teacher"], images)
            cosine = jnp.sum(unit_length(ours) * unit_length(theirs), -1).mean(-1)
            sums["repa"] = jnp.sum(-cosine * mask)

        def probe(_):
            still = jax.lax.stop_gradient(params["flextok"])
            both = self.velocity_errors(still, x, draws.noise, GAP_TIME, whole, None, mask)
            return both[1] - both[0], jnp.sum(mask)

        now = (step == 0) | ((step + 1) % self.probe_every == 0)
        gap, probed = jax.lax.cond(now, probe, lambda _: (jnp.zeros(()), jnp.zeros(())), None)
        return sums | {"gap": jax.lax.stop_gradient(gap), "probed": jax.lax.stop_gradient(probed)}

    def velocity_errors(self, flextok: Params, x, noise, t: float, codes, keep, mask) -> tuple[Array, Array]:
        """The sums of the losses at one time with the first `keep` codes (None: all), and without any."""
        times = jnp.full(len(x), t)
        x_t = noised(x, noise, times)
        found = []
        for null in (False, True):
            arguments = (x_t, times, codes, keep, jnp.full(len(x), null))
            v, _ = self.flextok().apply({"params": flextok}, *arguments, method="velocity")
            found.append(jnp.sum(velocity_error(v, x, noise) * mask))
        return found[0], found[1]

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The loss of the velocity, plus REPA's with its weight. Metrics have its parts, what tells of a collapse
        (`jaxtok.vision.collapse`); null_gap is 0 in the steps between probes, where null_gap_measured is 0."""
        loss = mean(sums["velocity"], sums["images"])
        metrics = {"velocity": loss}
        if self.repa is not None:
            metrics["repa"] = mean(sums["repa"], sums["images"])
            loss = loss + self.repa.weight * metrics["repa"]
        metrics |= code_health(sums["health"])
        measured = (sums["probed"] > 0).astype(jnp.float32)
        return loss, metrics | {"null_gap": mean(sums["gap"], sums["probed"]), "null_gap_measured": measured}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        images, mask, cfg = as_float(batch["images"]), batch["mask"], self.model
        x, flextok = self.to_latents(params, images), params["flextok"]
        codes = cfg.scalars.quantize(self.flextok().apply({"params": flextok}, x, method="vectors"))
        ids = cfg.scalars.ids(codes)
        noise_key, start_key = jax.random.split(rng)
        noise = jax.random.normal(noise_key, x.shape)
        cond, null = self.velocity_errors(flextok, x, noise, GAP_TIME, codes, None, mask)
        start = _noise(self, start_key, len(x))
        sums = {"velocity": cond, "null": null, "images": jnp.sum(mask)}
        prefixes = sorted({*self.eval_prefixes, cfg.registers})

        def sample(k):
            return sample_latents(cfg, self.sampling, flextok, codes, jnp.full(len(x), k), start)

        drawn = jax.lax.map(sample, jnp.array(prefixes))  # one after the other, by one compiled loop
        errors = jnp.mean(jnp.square(drawn - x), (2, 3, 4)) @ mask
        sums |= {f"latent_mse_{k}": error for k, error in zip(prefixes, errors)}
        shown = jnp.clip(self.to_images(params, drawn[-1]), 0, 1)
        sums["mse"] = jnp.sum(jnp.square(images - shown).mean((1, 2, 3)) * mask)
        sums["psnr"] = jnp.sum(jnp.minimum(psnr(images, shown), 100.0) * mask)
        return sums | code_sums(codes, mask, ids, cfg.scalars.size)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """loss and null_loss: the mean squared error of the velocity at t = 0.9 with all codes and with none, and
        null_gap, their difference. Of images that are drawn from their codes with the same noise: latent_mse_N, the
        squared error of the latents from the first N codes (`eval_prefixes`, and all of them); mse and psnr (dB, at
        most 100), of pixels limited to [0, 1], from all codes. Of the codes: code_std, their standard deviation over
        images; codes_used and code_perplexity. And images, their number.
        """
        images = sums["images"]
        drawn = (name for name in sums if name.startswith("latent_mse") or name in ("mse", "psnr"))
        row = {"loss": sums["velocity"] / images, "null_loss": sums["null"] / images}
        row["null_gap"] = row["null_loss"] - row["loss"]
        row |= {name: sums[name] / images for name in drawn}
        row |= {name: float(value) for name, value in code_health(sums).items()}
        return row | {"images": images}

    def evaluate(self, params, batches, rng=None, **options) -> dict[str, float]:
        """See `Task.evaluate`; the default key is that of seed 0."""
        return super().evaluate(params, batches, jax.random.key(0) if rng is None else rng, **options)

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three passes of encoder and decoder, and one of the teacher and of
        the KL-VAE's encoder; without the probes."""
        total = 3 * sum(self.model.flops())
        if self.repa is not None:
            total += self.repa.teacher.flops()
        if self.vae is not None:
            total += self.vae.encoder_flops()
        return len(batch["images"]) * total


def _noise(task: FlexTokenizer, rng: jax.Array, count: int) -> Float[Array, "batch rows columns channels"]:
    """Noise for each image, of its own key, so that an image does not depend on the others of its batch."""
    shape = (*task.model.latent_size, task.model.channels)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample_latents(
    config: FlexTokConfig,
    sampling: FlowSampling,
    params: Params,
    codes: Float[Array, "batch given scalars"],
    keep: Int[Array, " batch"] | None,
    noise: Float[Array, "batch rows columns channels"],
) -> Float[Array, "batch rows columns channels"]:
    """The latents that the flow carries the noise to, given the first `keep` codes of each image (None: only these are
    given, the same number for each image)."""
    model, compact = FlexTok(config), keep is None

    def field(x, t, guided):
        def twice(array, other=None):
            return jnp.concatenate([array, array if other is None else other]) if guided else array

        null = twice(jnp.zeros(len(x), bool), jnp.ones(len(x), bool))
        kept = None if compact else twice(keep)
        v, _ = model.apply(
            {"params": params}, twice(x), twice(t), twice(codes), kept, null, compact=compact, method="velocity"
        )
        return (v[: len(x)], v[len(x) :]) if guided else (v, None)

    return euler(field, noise, sampling.steps, sampling.rule)


@functools.partial(jax.jit, static_argnums=0)
def _encode(task: FlexTokenizer, params: Params, images, rng):
    x, scalars = task.to_latents(params, as_float(images), rng), task.model.scalars
    vectors = task.flextok().apply({"params": params["flextok"]}, x, method="vectors")
    return scalars.ids(scalars.quantize(vectors))[..., None]


@functools.partial(jax.jit, static_argnums=0)
def _decode(task: FlexTokenizer, params: Params, ids, keep, rng):
    codes = task.model.scalars.codes(ids)
    noise = _noise(task, rng, len(ids))
    latents = sample_latents(task.model, task.sampling, params["flextok"], codes, keep, noise)
    return task.to_images(params, latents)


def _read(field: str, path: str, kind: type, model: Any) -> Params:
    """The parameters of a run of a task of this kind and of this model."""
    from jaxtok.door import open_model  # which imports every system's config

    opened = open_model(path)
    if not isinstance(opened.task, kind) or opened.task.model != model:
        raise ValueError(
            f"{field} is {path}, a {type(opened.task).__name__} of other sizes than the config's; give the run of a "
            f"{kind.__name__} with the same model."
        )
    return opened.params


_SIZES = {
    "flextok-d12-d12": (12, 12),
    "flextok-d18-d18": (18, 18),
    "flextok-d18-d28": (18, 28),
}

PUBLISHED = {
    name: FlexTokConfig(
        encoder_width=64 * encoder, encoder_depth=encoder, decoder_width=64 * decoder, decoder_depth=decoder
    )
    for name, (encoder, decoder) in _SIZES.items()
}
"""The released sizes, on latents of 32 x 32 x 16 of images of 256 x 256."""
