"""LPIPS (arXiv 1801.03924): a distance between images by the features of VGG16. Its weights come from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.nn.convolution import conv2d
from jaxtok.weights import read_weights

VGG_WIDTHS = (64, 128, 256, 512, 512)
"""The channels of VGG16's five stages."""
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""torchvision's number of each convolution, by stage; a 2 x 2 max pool is between two stages."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """The distance between two images, and the features it is made of. New parameters are NaN; they must be read."""

    widths: tuple[int, ...] = VGG_WIDTHS
    dtype: Any = jnp.float32

    def setup(self):
        def param(name, shape):
            return self.param(name, nn.initializers.constant(jnp.nan), shape, jnp.float32)

        channels, convs, heads = 3, {}, []
        for stage, (features, numbers) in enumerate(zip(self.widths, STAGES)):
            for number in numbers:
                kernel = param(f"conv_{number}_kernel", (3, 3, channels, features))
                convs[f"{number}"] = kernel, param(f"conv_{number}_bias", (features,))
                channels = features
            heads.append(param(f"head_{stage}", (features,)))
        self.convs, self.heads = convs, heads

    def features(self, images: Float[Array, "batch height width channels"]) -> list[Float[Array, "batch h w features"]]:
        """The features of each stage, for images in [0, 1] (LPIPS was made for [-1, 1]; ELM's code gives it [0, 1])."""
        x = ((images - jnp.array(SHIFT)) / jnp.array(SCALE)).astype(self.dtype)
        stages = []
        for stage, numbers in enumerate(STAGES):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for number in numbers:
                kernel, bias = (w.astype(self.dtype) for w in self.convs[f"{number}"])
                x = jax.nn.relu(conv2d(x, kernel, bias, padding=(1, 1)))
            stages.append(x)
        return stages

    def __call__(
        self, x: Float[Array, "batch height width channels"], y: Float[Array, "batch height width channels"]
    ) -> Float[Array, " batch"]:
        total = jnp.zeros(len(x))
        for a, b, head in zip(self.features(x), self.features(y), self.heads):
            difference = jnp.square(_normalised(a) - _normalised(b))
            total += jnp.einsum("bhwc,c->bhw", difference, head, precision="highest").mean((1, 2))
        return total


def _normalised(x: Float[Array, "*shape features"]) -> Float[Array, "*shape features"]:
    """x / (|x| + 1e-10), with a gradient of 0 where all features are 0."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    some = squares > 0
    return x / (jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0) + 1e-10)


def read_lpips(path: str | Path, widths: tuple[int, ...] = VGG_WIDTHS) -> dict[str, np.ndarray]:
    """Parameters of `LPIPS` from a file of weights, or from a folder with several.

    The names may be LPIPS' own (`net.slice1.0.weight`, `lin0.model.1.weight`), with or without the prefix
    `perceptual.`; or torchvision's for VGG16 (`features.0.weight`), next to a file with the heads. Other tensors are
    ignored.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a tensor is missing, or has another shape.
    """
    try:
        tensors = read_weights(path)
    except FileNotFoundError as error:
        message = f"LPIPS has no weights: {error} With perceptual = none or mse, it needs none."
        raise FileNotFoundError(message) from error
    return lpips_params(tensors, widths, str(path))


def lpips_params(tensors: Mapping[str, np.ndarray], widths: tuple[int, ...], where: str) -> dict[str, np.ndarray]:
    """As `read_lpips`, from tensors that have been read."""
    tensors = {name.removeprefix("perceptual."): tensor for name, tensor in tensors.items()}

    def take(names, shape):
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is None:
            raise ValueError(f"{where} has no tensor {names[0]} (nor {' or '.join(names[1:])}), which LPIPS needs.")
        if found.shape != shape:
            raise ValueError(
                f"{names[0]} of {where} has the shape {found.shape}, not {shape}; perceptual_widths must be the file's."
            )
        return np.asarray(found, np.float32)

    params, channels = {}, 3
    for stage, (features, numbers) in enumerate(zip(widths, STAGES)):
        for number in numbers:
            names = [f"net.slice{stage + 1}.{number}", f"features.{number}"]
            kernel = take([f"{name}.weight" for name in names], (features, channels, 3, 3))
            params[f"conv_{number}_kernel"] = kernel.transpose(2, 3, 1, 0)
            params[f"conv_{number}_bias"] = take([f"{name}.bias" for name in names], (features,))
            channels = features
        names = [f"lin{stage}.model.1.weight", f"lin{stage}.weight"]
        params[f"head_{stage}"] = take(names, (1, features, 1, 1)).reshape(-1)
    return params


def lpips_tensors(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `lpips_params`, under LPIPS' own names, with its two constants."""
    tensors = {}
    for stage, numbers in enumerate(STAGES):
        for number in numbers:
            name = f"net.slice{stage + 1}.{number}"
            tensors[f"{name}.weight"] = np.asarray(params[f"conv_{number}_kernel"]).transpose(3, 2, 0, 1)
            tensors[f"{name}.bias"] = np.asarray(params[f"conv_{number}_bias"])
        tensors[f"lin{stage}.model.1.weight"] = np.asarray(params[f"head_{stage}"]).reshape(1, -1, 1, 1)
    for name, value in (("shift", SHIFT), ("scale", SCALE)):
        tensors[f"scaling_layer.{name}"] = np.array(value, np.float32).reshape(1, 3, 1, 1)
    return tensors
