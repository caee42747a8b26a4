"""Image classification: the Task of every image classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxtok.nn.losses import cross_entropy, mean
from jaxtok.nn.parameter_attention import TokenCounts, new_token_mask
from jaxtok.protocols import Batch, Data, Params, Sums, Task
from jaxtok.vision.classes import check_classes
from jaxtok.vision.vit import ViT, ViTConfig

Images = UInt8[Array, "batch height width channels"] | Float[Array, "batch height width channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassification(Task):
    """Trains a classifier on batches of

    images  uint8    [batch, height, width, channels]; or float32, normalised already
    labels  int32    [batch], the class (any class where the mask is 0)
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch
    """

    counted = "images"

    model: ViTConfig
    pixel_mean: float = 0.5
    pixel_std: float = 0.5
    """The model sees (v / 255 - pixel_mean) / pixel_std for a uint8 pixel v, and float images as they are."""
    label_smoothing: float = 0.1
    """The share of the target that is uniform over the classes in training; 0.1 in MAE's supervised recipe."""
    frozen_tokens: TokenCounts = TokenCounts()
    """The number of parameter tokens of each group that are frozen. If any is positive, only the tokens after these
    train."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1).")
        if self.pixel_std <= 0:
            raise ValueError(f"pixel_std is {self.pixel_std}; it must be above 0.")

    def module(self) -> ViT:
        return ViT(self.model)

    def fit(self, data: Data, train: Any = None) -> ImageClassification:
        """The task itself. Raises ValueError if the data have more classes than the model."""
        check_classes(self.model.num_classes, data)
        return self

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, self._pixels(batch["images"]))["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        images = self._pixels(batch["images"])
        logits = self.module().apply({"params": params}, images, deterministic=False, rngs={"dropout": rng})
        return self._sums(logits, batch, self.label_smoothing)

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross entropy in nats with smoothed labels; also logs the accuracy."""
        return mean(sums["nats"], sums["images"]), {"accuracy": mean(sums["right"], sums["images"])}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        return self._sums(self.logits(params, batch["images"]), batch)

    def _sums(self, logits: Float[Array, "batch classes"], batch: Batch, smoothing: float = 0.0):
        labels, mask = batch["labels"], batch["mask"]
        values = {
            "nats": cross_entropy(logits, labels, smoothing),
            "right": _correct(logits, labels),
            "images": jnp.ones_like(mask),
        }
        return {name: jnp.sum(x * mask) for name, x in values.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """loss (nats, labels not smoothed), accuracy (top-1), and examples, the number of images."""
        images = sums["images"]
        return {"loss": sums["nats"] / images, "accuracy": sums["right"] / images, "examples": images}

    def logits(self, params: Params, images: Images) -> Float[Array, "batch classes"]:
        return self.module().apply({"params": params}, self._pixels(images))

    def features(self, params: Params, images: Images) -> Float[Array, "batch d_model"]:
        """The input of the linear head, in float32."""
        return self.module().apply({"params": params}, self._pixels(images), features=True)

    def _pixels(self, images: Images) -> Float[Array, "batch height width channels"]:
        if images.dtype != jnp.uint8:
            return images
        return (images.astype(jnp.float32) / 255 - self.pixel_mean) / self.pixel_std

    def trainable(self, params: Params) -> Params | None:
        return new_token_mask(params, self.frozen_tokens) if self.frozen_tokens.total() else None

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three times the forward pass."""
        return 3 * len(batch["images"]) * self.model.flops()


def _correct(logits, labels):
    return (logits.argmax(-1) == labels).astype(jnp.float32)
