"""The Vision Transformer (arXiv 2010.11929), and TokenFormer's image classifier, which differs in its projections only.

TokenFormer (arXiv 2410.23168, its ImageNet table) trains the standard ViT-B/16 and ViT-L/16 with every projection
replaced by parameter attention, in bidirectional blocks, by the recipe of MAE's supervised ViT (arXiv 2111.06377,
appendix A.2). No vision code and no weights were released, so this is a reconstruction:

- The size-matched models (86M and 307M, nominally) have as many parameter tokens as give ViT's number of projection
  parameters: 4 d^2 + 2 d mlp = 2 d (3 n_qkv + n_output + n_ffn). The tokens of the larger ones (109M and 407M) are not
  public; grow a matched one, or choose `tokens`.
- As in MAE's ViT: patches embedded by one matrix with a bias, a class token, a position embedding added once, pre-norm
  blocks, a norm before a linear head with a bias, and label smoothing of 0.1 (in `ImageClassification`).
- Pooling: the class token, as in the first ViT, or the mean of the patches before the final norm, as in MAE's code.
- As in TokenFormer's language models: no parameters in the blocks' norms, an affine final norm, the initialisation.
- Ours: the position embedding is learned; there is no drop path (MAE: 0.1 for B, 0.2 for L); norms have epsilon 1e-5
  (MAE's code: 1e-6).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.norms import NORMS, Norm
from jaxtok.nn.parameter_attention import ParameterAttentionStack, uniform_counts
from jaxtok.nn.transformer import Stack, StackConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(StackConfig):
    """A Vision Transformer; a subclass defines its `projection`."""

    image_size: int = 224
    """The height and width of the images in pixels."""
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    pool: Literal["token", "mean"] = "token"
    """The input of the head: the class token, or the mean of the patches."""
    final_norm: str = "layernorm"
    causal: bool = False
    rotary_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for field in ("image_size", "patch_size", "channels", "num_classes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}, which does not divide image_size = {self.image_size}.")
        if self.pool not in ("token", "mean"):
            raise ValueError(f"pool is {self.pool!r}; it must be one of token, mean.")
        if self.final_norm not in NORMS:
            raise ValueError(f"final_norm is {self.final_norm!r}; it must be one of {', '.join(NORMS)}.")
        if self.causal and self.pool == "token":
            raise ValueError("causal is True, but the class token comes first and would see no patch; use pool = mean.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.channels

    def flops(self) -> float:
        """The forward FLOPs of one image: patch embedding, blocks and head."""
        length = 1 + self.num_patches
        ends = 2 * self.d_model * (self.num_patches * self.patch_dim + self.num_classes)
        return length * self.stack_flops(length) + ends


# A dataclass takes the fields of all its bases, inherited ones too, and the first base wins. It must be ViTConfig, in
# which `causal` is False.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFormerViTConfig(ViTConfig, ParameterAttentionStack):
    """A ViT whose projections are parameter attentions; defaults: TokenFormer-B/16, size-matched."""

    norm: str = "layernorm_nonparam"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearViTConfig(ViTConfig, LinearStack):
    """The ordinary ViT; defaults: ViT-B/16."""


class ViT(nn.Module):
    """Maps images to class logits."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        deterministic: bool = True,
        features: bool = False,
    ) -> Float[Array, "batch classes"] | Float[Array, "batch d_model"]:
        """Logits in float32.

        Args:
          images: normalised pixels, of the config's size.
          deterministic: no dropout; else there must be a `dropout` key.
          features: whether to return the input of the head, in float32, instead of the logits.

        Raises:
          ValueError: the images have another size.
        """
        cfg = self.config
        if images.shape[1:] != (cfg.image_size, cfg.image_size, cfg.channels):
            raise ValueError(
                f"the images are {' x '.join(map(str, images.shape[1:]))}; for this model they must be "
                f"{cfg.image_size} x {cfg.image_size} x {cfg.channels} (height, width, channels)."
            )
        init = nn.initializers.normal(cfg.init_std)

        def vectors(name, count):
            partitioned = nn.with_logical_partitioning(init, (None, "d_model"))
            return self.param(name, partitioned, (count, cfg.d_model), cfg.param_dtype).astype(cfg.dtype)

        def linear(name, features, axes, dtype):
            return Linear(features, axes, kernel_init=init, dtype=dtype, param_dtype=cfg.param_dtype, name=name)

        x = linear("patch_embedding", cfg.d_model, ("patch", "d_model"), cfg.dtype)(patchify(images, cfg.patch_size))
        token = jnp.broadcast_to(vectors("class_token", 1), (len(x), 1, cfg.d_model))
        x = jnp.concatenate([token, x], axis=1) + vectors("position_embedding", 1 + cfg.num_patches)
        x = nn.Dropout(cfg.dropout)(x, deterministic)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        x, _ = Stack(cfg, name="stack")(x, positions, deterministic=deterministic)
        x = x[:, 0] if cfg.pool == "token" else x[:, 1:].mean(1, dtype=jnp.float32)
        x = Norm(cfg.final_norm, dtype=jnp.float32, param_dtype=cfg.param_dtype, name="final_norm")(x)
        if features:
            return x
        return linear("head", cfg.num_classes, ("d_model", "classes"), jnp.float32)(x)


def patchify(
    images: Shaped[Array, "batch height width channels"], patch_size: int
) -> Shaped[Array, "batch patches patch"]:
    """Square patches, row by row, each with its pixels row by row (channels last)."""
    batch, height, width, channels = images.shape
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    x = images.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, p * p * channels)


_LARGE = {"num_layers": 24, "d_model": 1024, "num_heads": 16}

PUBLISHED = {
    "tokenformer-vit-b16": TokenFormerViTConfig(tokens=uniform_counts(576, 2304)),
    "tokenformer-vit-l16": TokenFormerViTConfig(**_LARGE, tokens=uniform_counts(768, 3072)),
    "vit-b16": LinearViTConfig(mlp_dim=3072),
    "vit-l16": LinearViTConfig(**_LARGE, mlp_dim=4096),
}
"""The published sizes by name; the TokenFormers are size-matched with the ViTs."""
