"""Checkpoints of VQGAN and BAE as the authors of ELM and of binary latent diffusion write them.

Names are `ae.encoder.blocks.3.conv1.weight`, `ae.quantize...`, `ae.generator...`, `disc.main.2.weight` and
`perceptual...`, in .th or .pt (PyTorch, tensors only) or .safetensors. What their classes hold but nothing here uses (a
1 x 1 convolution in residual blocks that keep their width, the bias of attention's keys, the `logsigma` of the
generator) is kept aside, or written as zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.tensors import CONVOLUTION, Place, Source, read_params, shapes_of, write_params
from jaxtok.model import Model
from jaxtok.nn.convolution import Layer, encoder_levels, generator_levels
from jaxtok.protocols import FROZEN, Params
from jaxtok.vision.autoencoding import Autoencoder, Autoencoding, TokenizerConfig
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.discriminator import Discriminator, DiscriminatorConfig, Statistics, new_statistics
from jaxtok.vision.perceptual import lpips_params, lpips_tensors
from jaxtok.vision.vqgan import VQGANConfig

Tensors = Mapping[str, np.ndarray]

_INSIDE = {
    "conv": {"": ""},
    "norm": {"": ""},
    "res": {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": "conv_out"},
    "attention": {"norm": "norm", "query": "q", "key": "k", "value": "v", "output": "proj_out"},
    "down": {"conv": "conv"},
    "up": {"conv": "conv"},
}
"""From our names of a block's layers to theirs."""


def _layers(levels: list[list[Layer]], channels: int) -> Iterator[tuple[int, str, int, int]]:
    """Yields the number and kind of each block, and the channels before and after it."""
    for number, (kind, features) in enumerate(layer for level in levels for layer in level):
        yield number, kind, channels, features
        channels = features


def autoencoder_names(config: TokenizerConfig) -> dict[Place, str]:
    """Returns the paths of our parameters of the autoencoder, and their names of them."""
    names: dict[Place, str] = {}
    for tower, levels, channels in _towers(config):
        for number, kind, before, features in _layers(levels, channels):
            for ours, theirs in _INSIDE[kind].items():
                if ours == "shortcut" and before == features:
                    continue
                path = (tower, f"blocks_{number}", *filter(None, [ours]))
                name = ".".join(filter(None, [f"{tower}.blocks.{number}", theirs]))
                first = "scale" if "norm" in (kind, ours.rstrip("12")) else "kernel"
                names[*path, first] = f"{name}.weight"
                if ours != "key":
                    names[*path, "bias"] = f"{name}.bias"
    if isinstance(config, VQGANConfig) and config.quantizer_kind == "nearest":
        return names | {("quantizer", "embedding"): "quantize.embedding.weight"}
    proj = "quantize.proj.0" if isinstance(config, BAEConfig) else "quantize.proj"
    return names | {
        ("quantizer", "proj", "kernel"): f"{proj}.weight",
        ("quantizer", "proj", "bias"): f"{proj}.bias",
        ("quantizer", "embedding"): "quantize.embed.weight",
    }


def _towers(config: TokenizerConfig):
    return (
        ("encoder", encoder_levels(config), config.channels),
        ("generator", generator_levels(config), config.embed_dim),
    )


def unused_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of their autoencoder that ours lacks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tower, levels, channels in _towers(config):
        for number, kind, before, features in _layers(levels, channels):
            if kind == "res" and before == features:
                name = f"{tower}.blocks.{number}.conv_out"
                shapes |= {f"{name}.weight": (features, before, 1, 1), f"{name}.bias": (features,)}
            if kind == "attention":
                shapes[f"{tower}.blocks.{number}.k.bias"] = (features,)
    last, image = config.width * config.multipliers[0], config.channels
    return shapes | {
        "generator.logsigma.0.weight": (last, last, 3, 3),
        "generator.logsigma.0.bias": (last,),
        "generator.logsigma.2.weight": (image, last, 1, 1),
        "generator.logsigma.2.bias": (image,),
    }


def autoencoder_params(config: TokenizerConfig, tensors: Tensors) -> Params:
    """Returns our parameters of the autoencoder from their tensors (without `ae.`); unused ones may be missing.

    Raises:
      ValueError: as `read_params`.
    """
    image = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    shapes = shapes_of(lambda: Autoencoder(config).init(jax.random.key(0), image)["params"])
    return read_params(_sources(autoencoder_names(config)), shapes, tensors, ignored=unused_shapes(config).__contains__)


def autoencoder_tensors(config: TokenizerConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns the inverse, without unused tensors."""
    return write_params(_sources(autoencoder_names(config)), params)


def _sources(names: Mapping[Place, str]) -> dict[Place, Source]:
    """Returns the table for these names; all kernels are those of convolutions."""
    return {path: Source(name, axes=CONVOLUTION if path[-1] == "kernel" else ()) for path, name in names.items()}


def _norms(config: DiscriminatorConfig) -> list[int]:
    return [3 * number for number in range(1, config.layers + 1)]


def discriminator_names(config: DiscriminatorConfig) -> dict[Place, str]:
    """Returns the paths of our parameters of the discriminator, and their names of them."""
    names: dict[Place, str] = {}
    for number in (0, *(n - 1 for n in _norms(config)), 3 * config.layers + 2):
        names["main_" + str(number), "kernel"] = f"main.{number}.weight"
        if number in (0, 3 * config.layers + 2):
            names["main_" + str(number), "bias"] = f"main.{number}.bias"
    for number in _norms(config):
        names["main_" + str(number), "scale"] = f"main.{number}.weight"
        names["main_" + str(number), "bias"] = f"main.{number}.bias"
    return names


def _statistics_names(config: DiscriminatorConfig) -> dict[Place, str]:
    return {
        (f"main_{number}", kind): f"main.{number}.running_{kind}"
        for number in _norms(config)
        for kind in ("mean", "var")
    }


def discriminator_params(config: DiscriminatorConfig, tensors: Tensors) -> tuple[Params, Statistics]:
    """Returns our parameters of the discriminator and its running statistics, from their tensors (without `disc.`).

    The statistics are new if there are none among the tensors.

    Raises:
      ValueError: a tensor is missing or unknown.
    """
    names = _statistics_names(config)
    channels = np.shape(tensors["main.0.weight"])[1] if "main.0.weight" in tensors else 3
    image, new = jnp.zeros((1, 3 * 2**config.layers, 3 * 2**config.layers, channels)), new_statistics(config)
    module = Discriminator(config)
    shapes = shapes_of(lambda: module.init(jax.random.key(0), image, new, train=False)["params"])
    counts = {f"main.{number}.num_batches_tracked" for number in _norms(config)}
    also = {*names.values(), *counts}
    params = read_params(_sources(discriminator_names(config)), shapes, tensors, ignored=also.__contains__)
    of_statistics = {name: tensors[name] for name in names.values() if name in tensors}
    if not of_statistics:
        return params, jax.tree.map(np.asarray, new)
    return params, read_params(_sources(names), shapes_of(lambda: new), of_statistics)


def discriminator_tensors(config: DiscriminatorConfig, params: Params, statistics: Statistics) -> dict[str, np.ndarray]:
    """Returns the inverse, without the number of batches."""
    running = write_params(_sources(_statistics_names(config)), statistics)
    return write_params(_sources(discriminator_names(config)), params) | running


def from_official(task: Autoencoding, tensors: Tensors) -> tuple[Params, dict[str, np.ndarray]]:
    """Returns the task's parameters from the tensors of a whole checkpoint, and what is kept aside, under its names.

    The autoencoder's may have the prefix `ae.` or none. A discriminator or LPIPS that the task does not have is kept
    aside; one that the checkpoint does not have is left out, as encoding and decoding need neither.

    Raises:
      ValueError: a tensor is missing or unknown, or has another shape.
    """
    groups: dict[str, dict[str, np.ndarray]] = {"ae": {}, "disc": {}, "perceptual": {}}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        group = head if head in groups else "ae"
        groups[group][rest if head in groups else name] = tensor
    params = {"autoencoder": autoencoder_params(task.model, groups["ae"])}
    aside = {f"ae.{name}": groups["ae"][name] for name in unused_shapes(task.model) if name in groups["ae"]}
    disc, perceptual = groups["disc"], groups["perceptual"]
    if disc and task.discriminator is not None:
        params["discriminator"], params["statistics"] = discriminator_params(task.discriminator, disc)
        disc = {name: tensor for name, tensor in disc.items() if name.endswith("num_batches_tracked")}
    if perceptual and task.uses_lpips:
        lpips = lpips_params(perceptual, task.perceptual_widths, "the checkpoint")
        params[FROZEN] = {"lpips": lpips}
        perceptual = {}
    aside |= {f"disc.{name}": tensor for name, tensor in disc.items()}
    return params, aside | {f"perceptual.{name}": tensor for name, tensor in perceptual.items()}


def to_official(task: Autoencoding, params: Params, aside: Tensors | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of a whole checkpoint, as their classes load them with strict = True.

    What nothing here uses is taken from `aside`, or 0.
    """
    aside = aside or {}
    found = {f"ae.{k}": v for k, v in autoencoder_tensors(task.model, params["autoencoder"]).items()}
    for name, shape in unused_shapes(task.model).items():
        found[f"ae.{name}"] = np.asarray(aside.get(f"ae.{name}", np.zeros(shape, np.float32)))
    if "discriminator" in params:
        theirs = discriminator_tensors(task.discriminator, params["discriminator"], params["statistics"])
        for number in _norms(task.discriminator):
            name = f"main.{number}.num_batches_tracked"
            theirs[name] = np.asarray(aside.get(f"disc.{name}", np.zeros((), np.int64)))
        found |= {f"disc.{name}": tensor for name, tensor in theirs.items()}
    if FROZEN in params:
        found |= {f"perceptual.{name}": tensor for name, tensor in lpips_tensors(params[FROZEN]["lpips"]).items()}
    return found | {name: tensor for name, tensor in aside.items() if name not in found}


def write_official(path: str | Path, task: Autoencoding, params: Params, aside: Tensors | None = None) -> Path:
    """Writes `to_official` into a file, whose suffix tells its format.

    Raises:
      FileExistsError: there is such a file already.
    """
    return write_file(path, to_official(task, params, aside))


@dataclasses.dataclass(frozen=True)
class AutoencoderFile:
    """A file of the authors' weights; what it does not tell comes from a task."""

    name: str = "vqgan"
    holds: str = "VQGAN and BAE"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(task, Autoencoding) and isinstance(task.model, VQGANConfig | BAEConfig)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: any(name.removeprefix("ae.") == _FIRST for name in names))

    def read(self, path: Path, like: Any = None, *, which: str = "") -> Model:
        """Returns the model in a file. If the file has no discriminator or no LPIPS, the task has none, either.

        Args:
          path: .safetensors, .npz, or PyTorch's (needs PyTorch).
          like: a task whose model has the file's sizes.
          which: for a checkpoint of a training run, `model` or its moving average `ema`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its sizes are others.
        """
        params, _ = from_official(like, read_file(path, like, which))
        if "discriminator" not in params:
            like = dataclasses.replace(like, discriminator=None)
        if like.uses_lpips and FROZEN not in params:
            like = dataclasses.replace(like, perceptual="none")
        return Model(task=like, params=params, data=None, path=Path(path))

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file; raises as `write_official`."""
        return write_official(path, model.task, model.params)


VQGAN = AutoencoderFile()
_FIRST = "encoder.blocks.0.weight"
