"""Training of image tokenizers by reconstruction, with a perceptual and an adversarial term (VQGAN, arXiv 2012.09841).

With l1 = |x - x^|, per image,

    nll    = mean(l1) + perceptual_weight distance(x, x^)
    g      = -mean D(x^)
    lambda = clip(|d nll / d w| / (|d g / d w| + 1e-4), 0, max_weight), of the generator's last kernel w; 0 at first
    L_G    = nll + lambda g + code_weight L_code
    L_D    = (mean relu(1 - D(x)) + mean relu(1 + D(x^))) / 2

The authors update the autoencoder by L_G, then the discriminator by L_D on the same x^, with an optimizer each. Neither
loss moves the other's parameters and neither sees the other's update, so both are one step on L_G + L_D, each loss
without gradient for what is not its own; `OptimizerConfig.parts` gives the discriminator its own optimizer.

Means are over the whole batch of a mesh, so that lambda and batch norms are the same on any mesh. (The authors compute
both on each device.)
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.nn.convolution import (
    AutoencoderConfig,
    Encoder,
    Generator,
    Layer,
    generator_levels,
    last_conv,
    last_name,
)
from jaxtok.nn.losses import mean
from jaxtok.nn.quantizers import Quantized, code_counts, perplexity
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task
from jaxtok.vision.augmentation import AugmentationDraws, augment, draw_augmentation
from jaxtok.vision.discriminator import Discriminator, DiscriminatorConfig, hinge_loss, new_statistics
from jaxtok.vision.images import as_float, check_codes, check_images
from jaxtok.vision.metrics import SSIM_WINDOW, psnr, ssim
from jaxtok.vision.perceptual import LPIPS, VGG_WIDTHS, read_lpips

COUNTED = 2**20
"""The largest vocabulary whose codes are counted in an evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(AutoencoderConfig, abc.ABC):
    """An encoder, a quantiser, which a subclass chooses, and a generator."""

    code_weight: float = 1.0
    """The weight of the quantiser's loss."""

    def __post_init__(self):
        super().__post_init__()
        if self.code_weight < 0:
            raise ValueError(f"code_weight is {self.code_weight}; it must be 0 or more.")

    @property
    @abc.abstractmethod
    def code_values(self) -> tuple[int, ...]:
        """How many values each sub-code of a position has."""

    @abc.abstractmethod
    def quantizer(self, name: str | None = None) -> nn.Module:
        """A module that maps vectors and draws to `Quantized`; its method `embed` maps codes back to vectors."""

    def options(self, step: Any) -> dict[str, Any]:
        """The arguments of the quantiser that change during training."""
        return {}

    def draw(self, rng: jax.Array, batch: int) -> Array | None:
        """The random numbers for quantising a batch; None: there are none."""
        return None

    @property
    def draws_codes(self) -> bool:
        """Whether codes are drawn at random outside of training too."""
        return False


class Autoencoder(nn.Module):
    """Maps images to codes and back."""

    config: TokenizerConfig

    def setup(self):
        self.encoder, self.generator = Encoder(self.config), Generator(self.config)
        self.quantizer = self.config.quantizer()

    def quantize(self, images: Float[Array, "batch height width channels"], draws=None, **options) -> Quantized:
        return self.quantizer(self.encoder(images), draws, **options)

    def features(self, images: Float[Array, "batch height width channels"], draws=None, **options):
        """The input of the generator's last convolution, and `Quantized`."""
        quantized = self.quantize(images, draws, **options)
        return self.generator.features(quantized.vectors), quantized

    def __call__(self, images: Float[Array, "batch height width channels"], draws=None, **options):
        """Reconstructions in float32, not limited to [0, 1], and `Quantized`."""
        features, quantized = self.features(images, draws, **options)
        return self.generator.last(features), quantized

    def decode(self, codes: Int[Array, "batch rows columns sub_codes"]) -> Float[Array, "batch height width channels"]:
        return self.generator(self.quantizer.embed(codes))


@flax.struct.dataclass
class Draws:
    """The random numbers of a training step."""

    codes: Array | None
    fakes: AugmentationDraws | None = None
    reals: AugmentationDraws | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(Task, abc.ABC):
    """Trains an encoder and a generator of images; a subclass says what is between them.

    The discriminator should have an optimizer of its own that starts at `discriminator.start_step + 1`
    (configs/vision/bae.py). If a batch is accumulated in parts, the discriminator's batch norms see each part alone,
    and its term has the mean of the parts' adaptive weights; all else is as in one batch. Batches have

    images  uint8, or float32 in [0, 1]  [batch, height, width, channels]
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch

    Parameters are {"autoencoder", "discriminator", "statistics": the discriminator's running means and variances, which
    no gradient moves, "frozen": LPIPS'}; of these only the first is needed to encode and decode.
    """

    counted = "images"

    model: Any
    """The config: an `AutoencoderConfig`, or with its properties, and with `options`, `draw` and `code_weight`."""
    discriminator: DiscriminatorConfig | None = DiscriminatorConfig()
    """The discriminator; None: there is no adversarial term."""
    perceptual: str = ""
    """The perceptual term. A path: LPIPS, with the weights in this file or folder, which are read when a run begins
    (`jaxtok.vision.perceptual.read_lpips`). mse: the mean squared error of each image. none: the term is 0."""
    perceptual_weight: float = 1.0
    perceptual_widths: tuple[int, ...] = VGG_WIDTHS
    """The channels of the five stages of LPIPS' network."""

    def __post_init__(self):
        if self.perceptual_weight < 0:
            raise ValueError(f"perceptual_weight is {self.perceptual_weight}; it must be 0 or more.")
        if self.perceptual_weight and not self.perceptual:
            raise ValueError(
                f"perceptual_weight is {self.perceptual_weight}, but perceptual is empty; it must be the file with the "
                "weights of LPIPS, or mse, or none."
            )
        if len(self.perceptual_widths) != 5 or min(self.perceptual_widths) < 1:
            raise ValueError(f"perceptual_widths is {self.perceptual_widths}; it must be five positive numbers.")
        if self.discriminator is not None:
            self.discriminator.sides(self.model.image_size)
        if self.uses_lpips and self.model.image_size < 16:
            raise ValueError(f"image_size is {self.model.image_size}; for LPIPS it must be at least 16 pixels.")

    def fit(self, data: Data, train: Any = None) -> Reconstruction:
        """The task itself. Raises ValueError if the discriminator's own optimizer starts at another step than its
        training."""
        starts = {part.part: part.start for part in train.optimizer.parts} if train is not None else {}
        if self.discriminator is not None and train is not None and train.accumulate > 1:
            logging.getLogger("jaxtok").warning(
                "train.accumulate is %d: the discriminator's batch norms see %d images at a time, so the updates are "
                "not those of one batch.",
                train.accumulate,
                data.batch_size // train.accumulate,
            )
        if self.discriminator is None or "discriminator" not in starts:
            return self
        if starts["discriminator"] != (first := self.discriminator.start_step + 1):
            raise ValueError(
                f"the discriminator's optimizer starts at {starts['discriminator']}, but with discriminator.start_step "
                f"= {first - 1} it learns from step {first} on; make the part's start {first}."
            )
        return self

    @abc.abstractmethod
    def autoencoder(self) -> nn.Module:
        """The module of the parameters' part `autoencoder`, with the methods of `Autoencoder`."""

    def levels(self) -> list[list[Layer]]:
        """The generator's layers, by level."""
        return generator_levels(self.model)

    def last(self, features: Float[Array, "batch height width ch"], params: Params) -> Array:
        """Images from the input of the generator's last convolution and its parameters."""
        return last_conv(self.model, features, params)

    @property
    def draws_codes(self) -> bool:
        """Whether something is drawn between encoder and generator outside of training too."""
        return False

    @property
    def uses_lpips(self) -> bool:
        return bool(self.perceptual_weight) and self.perceptual not in ("none", "mse")

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        ours, other = jax.random.split(rng)
        images = as_float(batch["images"])
        params = {"autoencoder": self.autoencoder().init(ours, images)["params"]}
        if self.discriminator is not None:
            statistics = new_statistics(self.discriminator)
            critic = Discriminator(self.discriminator)
            params["discriminator"] = critic.init(other, images, statistics, train=True)["params"]
            params["statistics"] = statistics
        if self.uses_lpips:
            params[FROZEN] = {"lpips": self._lpips().init(other, images, images)["params"]}
        return params

    def load_weights(self, params: Params) -> Params:
        """The parameters with those of LPIPS from its file.

        Raises:
          FileNotFoundError, ValueError: as `read_lpips`.
        """
        if self.perceptual_weight and self.perceptual in ("none", "mse"):
            logging.getLogger("jaxtok").warning(
                "perceptual is %s: the loss has no LPIPS%s.",
                self.perceptual,
                ", but a mean squared error" if self.perceptual == "mse" else "",
            )
        if not self.uses_lpips:
            return params
        return {**params, FROZEN: {"lpips": read_lpips(self.perceptual, self.perceptual_widths)}}

    def _lpips(self) -> LPIPS:
        return LPIPS(self.perceptual_widths, dtype=self.model.dtype)

    def distance(self, params: Params) -> Callable[[Array, Array], Float[Array, " batch"]]:
        """The function that gives the perceptual term of two batches of images, without its weight."""
        if self.uses_lpips:
            lpips = jax.lax.stop_gradient(params[FROZEN]["lpips"])
            return lambda x, y: self._lpips().apply({"params": lpips}, x, y)
        if self.perceptual_weight and self.perceptual == "mse":
            return lambda x, y: jnp.mean(jnp.square(x - y), (1, 2, 3))
        return lambda x, y: jnp.zeros(len(x))

    def draw(self, rng: jax.Array, batch: Batch, step: jax.Array) -> Draws:
        """The random numbers of a step: for codes, and for augmentations if there are any."""
        codes, fakes, reals = jax.random.split(rng, 3)
        count, height, width, _ = batch["images"].shape
        drawn = Draws(self.model.draw(codes, count))
        if self.discriminator is not None and self.discriminator.augment:
            fakes, reals = (draw_augmentation(key, count, height, width) for key in (fakes, reals))
            drawn = drawn.replace(fakes=fakes, reals=reals)
        return drawn

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        draws, mask = self.draw(rng, batch, step), batch["mask"]
        x, distance, model = as_float(batch["images"]), self.distance(params), self.autoencoder()
        features, quantized = model.apply(
            {"params": params["autoencoder"]},
            x,
            draws.codes,
            train=True,
            **self.model.options(step),
            method="features",
        )
        last = params["autoencoder"]["generator"][last_name(self.levels())]
        fake = self.last(features, last)

        def parts(fake):
            return jnp.sum(jnp.abs(x - fake).mean((1, 2, 3)) * mask), jnp.sum(distance(x, fake) * mask)

        images = jnp.sum(mask)

        def nll_of(fake):
            l1, perceptual = (mean(total, images) for total in parts(fake))
            return l1 + self.perceptual_weight * perceptual

        l1, perceptual = parts(fake)
        sums = {"l1": l1, "perceptual": perceptual, "code_loss": jnp.sum(quantized.loss * mask), "images": images}
        sums |= {"parts": jnp.ones(()), "of_parts": quantized.metrics}
        if self.discriminator is None:
            return sums

        cfg = self.discriminator

        def critic(params, images, statistics):
            return Discriminator(cfg, self.model.dtype).apply({"params": params}, images, statistics, train=True)

        def seen(images, draws):
            return augment(images, draws) if cfg.augment else images

        still = jax.lax.stop_gradient

        def g_of(fake):
            logits, statistics = critic(still(params["discriminator"]), seen(fake, draws.fakes), params["statistics"])
            return -jnp.sum(logits.mean((1, 2)) * mask), statistics

        def slope(term):
            """The norm of a term's gradient with respect to the last kernel alone."""
            fixed = still({"features": features, **last})

            def of_kernel(kernel):
                return term(self.last(fixed["features"], {"kernel": kernel, "bias": fixed["bias"]}))

            return jnp.linalg.norm(jax.grad(of_kernel)(fixed["kernel"]).astype(jnp.float32))

        g, statistics = g_of(fake)
        weight = jnp.clip(slope(nll_of) / (slope(lambda fake: mean(g_of(fake)[0], images)) + 1e-4), 0, cfg.max_weight)
        weight = still(jnp.where(step >= cfg.start_step, weight, 0.0))

        def learn(statistics):
            real, statistics = critic(params["discriminator"], seen(x, draws.reals), statistics)
            unreal = still(seen(fake, draws.fakes) if cfg.augment_fakes else fake)
            unreal, statistics = critic(params["discriminator"], unreal, statistics)
            return jnp.sum(hinge_loss(real, unreal) * mask), statistics

        d_loss, statistics = jax.lax.cond(step > cfg.start_step, learn, lambda s: (jnp.zeros(()), s), statistics)
        of_parts = sums["of_parts"] | {"d_weight": weight, "state": statistics}
        return sums | {"g_loss": g, "d_loss": d_loss, "of_parts": of_parts}

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """L_G + L_D; metrics have its parts, and under `state` the discriminator's statistics after the step."""
        names = [name for name in ("l1", "perceptual", "code_loss", "g_loss", "d_loss") if name in sums]
        metrics = {name: mean(sums[name], sums["images"]) for name in names}
        metrics["nll"] = metrics["l1"] + self.perceptual_weight * metrics["perceptual"]
        loss = metrics["nll"] + self.model.code_weight * metrics["code_loss"]
        metrics |= jax.tree.map(lambda total: total / sums["parts"], sums["of_parts"])
        if self.discriminator is None:
            return loss, metrics
        metrics["generator_loss"] = loss + metrics["d_weight"] * metrics["g_loss"]
        return metrics["generator_loss"] + metrics["d_loss"], metrics

    def after_step(self, params: Params, metrics: dict[str, Any], step: jax.Array) -> Params:
        """The parameters after an update, with the discriminator's running statistics of the batch."""
        return params if self.discriminator is None else {**params, "statistics": metrics["state"]}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        x, mask = as_float(batch["images"]), batch["mask"]
        rng = rng if self.draws_codes else None
        fake, quantized = self.reconstruct(params, x, rng)
        l1 = jnp.abs(x - fake).mean((1, 2, 3))
        nll = l1 + self.perceptual_weight * self.distance(params)(x, fake)
        shown = jnp.clip(fake, 0, 1)
        mse = jnp.square(x - shown).mean((1, 2, 3))
        values = {
            "loss": nll,
            "l1": l1,
            "mse": mse,
            "psnr": jnp.minimum(psnr(x, shown), 100.0),
            "images": jnp.ones_like(mask),
        }
        if self.model.image_size >= SSIM_WINDOW:
            values["ssim"] = ssim(x, shown)
        return {name: jnp.sum(value * mask) for name, value in values.items()} | self.code_sums(quantized, mask)

    def reconstruct(
        self, params: Params, images: Float[Array, "batch height width channels"], rng: jax.Array | None
    ) -> tuple[Float[Array, "batch height width channels"], Quantized]:
        """What an evaluation compares with the images, and what it is made from."""
        return _quantized(self, params["autoencoder"], images, rng, "__call__")

    def code_sums(self, quantized: Quantized, mask: Float[Array, " batch"]) -> dict[str, jax.Array]:
        """What an evaluation adds up of what is between encoder and generator."""
        return {}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Means over images of the loss (nll) and l1; of mse (the squared error), psnr (dB, at most 100) and ssim (if
        its window of 11 pixels fits), for pixels limited to [0, 1]; and the number of images."""
        images = sums["images"]
        row = {name: value / images for name, value in sums.items() if name not in ("images", "codes")}
        return row | {"images": images}

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """See `Task.evaluate`; the default key is that of seed 0."""
        return super().evaluate(params, batches, jax.random.key(0) if rng is None else rng, **options)

    def trainable(self, params: Params) -> Params | None:
        if "statistics" not in params:
            return None
        fixed = jax.tree.map(jnp.zeros_like, params["statistics"])
        return {**jax.tree.map(lambda _: 1.0, params), "statistics": fixed}

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step, without recomputation and without the adaptive weight: three passes of the
        autoencoder; of the discriminator, one pass over the fakes with its gradient, and three over real and fake
        images; of LPIPS' features, one pass over the images, and one over the fakes with its gradient."""
        total = 3 * self.model.flops()
        if self.discriminator is not None:
            total += (2 + 2 * 3) * self.discriminator.flops(self.model.image_size, self.model.channels)
        if self.uses_lpips:
            total += 3 * _vgg_flops(self.perceptual_widths, self.model.image_size)
        return len(batch["images"]) * total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoding(Reconstruction):
    """Trains an image tokenizer, and is one (`jaxtok.protocols.ImageTokenizer`)."""

    model: TokenizerConfig

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
        return self.model.code_values

    @property
    def draws_codes(self) -> bool:
        return self.model.draws_codes

    def encode(
        self, params: Params, images: Float[Array, "batch height width channels"], rng: jax.Array | None = None
    ) -> Int[Array, "batch positions sub_codes"]:
        """Codes of images in [0, 1]; positions row by row.

        Args:
          rng: a key, for a tokenizer that draws its codes (`draws_codes`).

        Raises:
          ValueError: the images have another shape or type, or the tokenizer draws its codes and there is no key.
        """
        check_images(images, self.image_shape)
        if rng is None and self.draws_codes:
            raise ValueError(
                "rng is None; it must be a key, as this tokenizer draws its codes (deterministic is False)."
            )
        return _encode(self, params["autoencoder"], images, rng)

    def decode(
        self, params: Params, codes: Int[Array, "batch positions sub_codes"], rng: jax.Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        """Images, not limited to [0, 1]; nothing is drawn, so a key is not used.

        Raises:
          ValueError: the codes have another shape, or are outside the vocabulary.
        """
        check_codes(codes, (math.prod(self.code_shape),), self.code_values)
        return _decode(self, params["autoencoder"], jnp.asarray(codes))

    def autoencoder(self) -> Autoencoder:
        return Autoencoder(self.model)

    def code_sums(self, quantized: Quantized, mask: Float[Array, " batch"]) -> dict[str, jax.Array]:
        return used_codes(quantized.codes, self.code_values, mask)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """As `Reconstruction.metrics`. For vocabularies up to 2^20, also codes_used and their perplexity. A tokenizer
        that draws its codes draws them with a key from the number of the batch."""
        row, codes = super().metrics(sums), sums.get("codes")
        if codes is not None:
            row |= {"codes_used": float(np.sum(codes > 0)), "perplexity": float(perplexity(jnp.asarray(codes)))}
        return row


def used_codes(
    codes: Int[Array, "batch rows columns sub_codes"], values: tuple[int, ...], mask: Float[Array, " batch"]
) -> dict[str, jax.Array]:
    """How often each value of a position occurs in images that count; nothing for more values than `COUNTED`."""
    size = math.prod(values)
    if size > COUNTED:
        return {}
    whole = 0
    for digit, base in enumerate(values):
        whole = whole * base + codes[..., digit]
    counted = jnp.where(mask[:, None, None] > 0, whole, size)  # codes of images that fill the batch are dropped
    return {"codes": constrain(code_counts(counted, size), None)}  # whole on each device


def _vgg_flops(widths: tuple[int, ...], side: int) -> float:
    total, channels = 0.0, 3
    for stage, features in enumerate(widths):
        for _ in range(2 if stage < 2 else 3):
            total += 2 * 9 * channels * features * (side // 2**stage) ** 2
            channels = features
    return total


def _quantized(task: Reconstruction, autoencoder: Params, images, rng, method="quantize"):
    draws = None if rng is None else task.model.draw(rng, len(images))
    return task.autoencoder().apply({"params": autoencoder}, images, draws, method=method)


def _encode_images(task: Autoencoding, autoencoder: Params, images, rng):
    codes = _quantized(task, autoencoder, images, rng).codes
    return codes.reshape(len(codes), -1, codes.shape[-1])


def _decode_codes(task: Autoencoding, autoencoder: Params, codes):
    codes = codes.reshape(len(codes), *task.code_shape, codes.shape[-1])
    return task.autoencoder().apply({"params": autoencoder}, codes, method="decode")


_encode = jax.jit(_encode_images, static_argnums=0)
_decode = jax.jit(_decode_codes, static_argnums=0)
