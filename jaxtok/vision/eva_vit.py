"""EVA's Vision Transformer (arXiv 2211.07636), the frozen image encoder of BLIP-2 and SEED.

It is timm's ViT with a class token, learned positions, no bias of keys, and no norm or head after the last block: all
tokens are returned, the class token first.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.nn.linear import ViTStack
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import Params
from jaxtok.vision.vit import patchify


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaViTConfig(ViTStack):
    """Defaults: EVA-CLIP-g as SEED uses it, with 39 of its 40 blocks."""

    image_size: int = 224
    """The height and width of the images in pixels."""
    patch_size: int = 14
    channels: int = 3
    num_layers: int = 39
    d_model: int = 1408
    num_heads: int = 16
    mlp_dim: int = 6144
    key_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        for field in ("image_size", "patch_size", "channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}, which does not divide image_size = {self.image_size}.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def width(self) -> int:
        """The channels of a token that is returned."""
        return self.d_model

    def module(self) -> EvaViT:
        return EvaViT(self)

    def flops(self) -> float:
        """The forward FLOPs of one image."""
        patches = 2 * self.num_patches * self.patch_size**2 * self.channels * self.d_model
        return (1 + self.num_patches) * self.stack_flops(1 + self.num_patches) + patches


class EvaViT(nn.Module):
    """Maps images to the hidden states of the class token and of the patches."""

    config: EvaViTConfig

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch tokens d_model"]:
        """The states after the last block.

        Args:
          images: normalised pixels, of the config's size.

        Raises:
          ValueError: the images have another size.
        """
        cfg = self.config
        size = (cfg.image_size, cfg.image_size, cfg.channels)
        if images.shape[1:] != size:
            raise ValueError(
                f"the images are {' x '.join(map(str, images.shape[1:]))}; for this encoder they must be "
                f"{' x '.join(map(str, size))} (height, width, channels)."
            )
        init = nn.initializers.truncated_normal(cfg.init_std)

        def param(name, init, shape, axes):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, cfg.param_dtype)
            return value.astype(cfg.dtype)

        p = cfg.patch_size
        kernel = param("patch_kernel", init, (p, p, cfg.channels, cfg.d_model), (None, None, None, "d_model"))
        bias = param("patch_bias", nn.initializers.zeros, (cfg.d_model,), ("channels",))
        x = patchify(images.astype(cfg.dtype), p) @ kernel.reshape(-1, cfg.d_model) + bias
        token = param("class_token", init, (1, cfg.d_model), (None, "d_model"))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, cfg.d_model)), x], axis=1)
        x = x + param("position_embedding", init, (1 + cfg.num_patches, cfg.d_model), (None, "d_model"))
        return Stack(cfg, name="stack")(x, None, deterministic=deterministic)[0]


def scale_by_depth(params: Params) -> Params:
    """New parameters as EVA initialises them: those of the output projections of block l are divided by sqrt(2 l)."""
    blocks = params["stack"]["blocks"]

    def scaled(kernel):
        value = getattr(kernel, "value", kernel)
        value = value / jnp.sqrt(2.0 * jnp.arange(1, len(value) + 1))[:, None, None].astype(value.dtype)
        return kernel.replace_boxed(value) if hasattr(kernel, "replace_boxed") else value

    attention, ffn = blocks["attention"], blocks["ffn"]
    attention = {**attention, "output": {**attention["output"], "kernel": scaled(attention["output"]["kernel"])}}
    ffn = {**ffn, "down": {**ffn["down"], "kernel": scaled(ffn["down"]["kernel"])}}
    return {**params, "stack": {**params["stack"], "blocks": {**blocks, "attention": attention, "ffn": ffn}}}


def resize_positions(rows: np.ndarray, count: int) -> np.ndarray:
    """Position rows of a class token and a square grid, for a grid of `count` - 1 cells: the grid is interpolated
    bicubically, as PyTorch does it (a = -0.75, cell centres stay), and the class token's row stays.

    Args:
      rows: [1 + cells, d_model].

    Raises:
      ValueError: one of the grids is not square.
    """
    if len(rows) == count:
        return rows
    old, new = math.isqrt(len(rows) - 1), math.isqrt(count - 1)
    if old**2 != len(rows) - 1 or new**2 != count - 1:
        raise ValueError(f"there are {len(rows)} positions for {count}; both must be a square and a class token.")
    matrix = _bicubic(old, new)
    grid = np.einsum("yi,xj,ijd->yxd", matrix, matrix, rows[1:].astype(np.float64).reshape(old, old, -1))
    return np.concatenate([rows[:1], grid.reshape(new * new, -1).astype(rows.dtype)])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """The matrix [new, old] of the interpolation along one axis; what is beyond the border is the border."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for offset in range(-1, 3):
        d = np.abs(at - base - offset)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(base + offset, 0, old - 1)), np.where(d <= 1, near, far))
    return matrix
