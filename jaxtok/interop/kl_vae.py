"""KL-VAEs in the layouts of latent diffusion's code (MAR, TokenBridge) and of `diffusers` (FlexTok's VAEs).

The first is one file, with names such as `encoder.down.0.block.1.conv1.weight`; it does not tell the number of groups
of the norms nor the side of the images, so it needs a task. MAR's kl16.ckpt has them in a table `model`, checkpoints of
latent diffusion in `state_dict`, beside the tensors of its loss, which are left out. The second is a folder of
config.json and diffusion_pytorch_model.safetensors, with names such as `encoder.down_blocks.0.resnets.1.conv1.weight`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.folders import odd_values_named, read_options
from jaxtok.interop.tensors import CONVOLUTION, Place, Source, read_params, shapes_of, whole_folder, write_params
from jaxtok.model import Model
from jaxtok.protocols import Params
from jaxtok.vision.kl_vae import KLVAE, KLAutoencoding, KLVAEConfig, diffusers_vae, encoder_levels, generator_levels
from jaxtok.weights import read_weights, write_weights

Tensors = Mapping[str, np.ndarray]
Layout = Literal["ldm", "diffusers"]
Tower = Literal["encoder", "generator"]

TOWERS: tuple[Tower, ...] = ("encoder", "generator")
WEIGHTS = "diffusion_pytorch_model"

_RESIDUAL = {
    "ldm": {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": "nin_shortcut"},
    "diffusers": {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": "conv_shortcut"},
}
_ATTENTION = {
    "ldm": {"norm": "norm", "query": "q", "key": "k", "value": "v", "output": "proj_out"},
    "diffusers": {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"},
}
_EARLIER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""The names of `diffusers` before version 0.18."""


def _blocks(config: KLVAEConfig, tower: Tower, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yields the kind of each layer of a tower, in our order, and its name there."""
    ldm, theirs = layout == "ldm", "encoder" if tower == "encoder" else "decoder"
    first, *levels, last = (encoder_levels if tower == "encoder" else generator_levels)(config)
    middle = levels.pop() if tower == "encoder" else levels.pop(0)
    ends = {"norm": "norm_out" if ldm else "conv_norm_out", "silu": "", "conv": "conv_out", "point": "quant_conv"}

    def between():
        for (kind, _), name in zip(middle, ("block_1", "attn_1", "block_2")):
            number = int(name[-1]) - 1
            of_diffusers = f"attentions.{number}" if kind == "attention" else f"resnets.{number}"
            yield kind, f"{theirs}.mid.{name}" if ldm else f"{theirs}.mid_block.{of_diffusers}"

    for kind, _ in first:
        yield kind, "post_quant_conv" if kind == "point" else f"{theirs}.conv_in"
    if tower == "generator":
        yield from between()
    for number, level in enumerate(levels):
        if ldm:
            at = number if tower == "encoder" else len(levels) - 1 - number
            block = f"{theirs}.{'down' if tower == 'encoder' else 'up'}.{at}"
            names = {"res": "block", "attention": "attn", "down": "downsample.conv", "up": "upsample.conv"}
        else:
            block = f"{theirs}.{'down' if tower == 'encoder' else 'up'}_blocks.{number}"
            names = {
                "res": "resnets",
                "attention": "attentions",
                "down": "downsamplers.0.conv",
                "up": "upsamplers.0.conv",
            }
        counts = {"res": 0, "attention": 0}
        for kind, _ in level:
            if kind in counts:
                yield kind, f"{block}.{names[kind]}.{counts[kind]}"
                counts[kind] += 1
            else:
                yield kind, f"{block}.{names[kind]}"
    if tower == "encoder":
        yield from between()
    for kind, _ in last:
        yield kind, ends[kind] if kind == "point" else f"{theirs}.{ends[kind]}"


def sources(config: KLVAEConfig, layout: Layout = "ldm", towers: tuple[Tower, ...] = TOWERS) -> dict[Place, Source]:
    """Returns the paths of our parameters to their tensors."""
    found: dict[Place, Source] = {}

    def add(place: Place, name: str, norm: bool, also: tuple[str, ...] = ()) -> None:
        # `diffusers` has the matrices of attention without the two axes of size 1, which `read_params` does not mind.
        found[*place, "scale" if norm else "kernel"] = Source(
            f"{name}.weight", axes=() if norm else CONVOLUTION, also=tuple(f"{other}.weight" for other in also)
        )
        found[*place, "bias"] = Source(f"{name}.bias", also=tuple(f"{other}.bias" for other in also))

    for tower in towers:
        levels = (encoder_levels if tower == "encoder" else generator_levels)(config)
        channels = config.channels if tower == "encoder" else config.z_channels
        layers = [layer for level in levels for layer in level]
        for number, ((kind, features), (_, name)) in enumerate(zip(layers, _blocks(config, tower, layout))):
            place = (tower, f"blocks_{number}")
            match kind:
                case "res":
                    for ours, theirs in _RESIDUAL[layout].items():
                        if ours != "shortcut" or channels != features:
                            add((*place, ours), f"{name}.{theirs}", "norm" in ours)
                case "attention":
                    for ours, theirs in _ATTENTION[layout].items():
                        also = (f"{name}.{_EARLIER[theirs]}",) if theirs in _EARLIER else ()
                        add((*place, ours), f"{name}.{theirs}", ours == "norm", also)
                case "down" | "up":
                    add((*place, "conv"), name, False)
                case "norm" | "conv" | "point":
                    add(place, name, kind == "norm")
            channels = features
    return found


def vae_params(
    config: KLVAEConfig, tensors: Tensors, layout: Layout = "ldm", towers: tuple[Tower, ...] = TOWERS
) -> Params:
    """Returns the parameters of `KLVAE`, or of one of its towers, from their tensors.

    Raises:
      ValueError: as `read_params`.
    """
    module = KLVAE(config)
    image = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    shapes = shapes_of(lambda: module.init(jax.random.key(0), image)["params"])
    shapes = {place: shape for place, shape in shapes.items() if place[0] in towers}

    def of_loss(name: str) -> bool:
        return name.startswith(("loss.", "model_ema."))

    return read_params(sources(config, layout, towers), shapes, tensors, ignored=of_loss)


def vae_tensors(config: KLVAEConfig, params: Params, layout: Layout = "ldm") -> dict[str, np.ndarray]:
    """Returns the inverse, for the towers that the parameters have."""
    towers = tuple(tower for tower in TOWERS if tower in params)
    found = write_params(sources(config, layout, towers), {tower: params[tower] for tower in towers})
    if layout == "ldm":
        return found
    linear = tuple(f".{name}.weight" for name in _EARLIER)
    return {name: x[..., 0, 0] if name.endswith(linear) else x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class KLVAEFile:
    """A file in the layout of latent diffusion's code; what it does not tell comes from a task."""

    name: str = "kl_vae"
    holds: str = "a KL-VAE"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(task, KLAutoencoding)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: _FIRST in names)

    def read(self, path: Path, like: Any = None, *, which: str = "") -> Model:
        """Returns the model in a file. It has no discriminator and no LPIPS, so the task has none, either.

        Args:
          path: .safetensors, .npz, or PyTorch's (needs PyTorch).
          like: a task whose model has the file's sizes, and the number that latents are multiplied by.
          which: for a file with several tables of tensors, the name of one.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its sizes are others, or it measures what latents are multiplied by.
        """
        params = vae_params(like.model if like is not None else KLVAEConfig(), read_file(path, like, which))
        return _model(like, params, path)

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file; raises as `write_file`."""
        return write_file(path, vae_tensors(model.task.model, model.params["autoencoder"]))


def _model(task: Any, params: Params, path: Path) -> Model:
    if not task.model.scaling:
        raise ValueError(
            "scaling is 0, but the file does not say how large latents are; set it to one over their standard "
            "deviation (KL-16: 0.2325)."
        )
    task = dataclasses.replace(task, discriminator=None, perceptual="none")
    return Model(task=task, params={"autoencoder": params}, data=None, path=Path(path))


_ALLOWED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
}
"""Options of `AutoencoderKL` that must have these values, if they are there."""


def config_from(options: Mapping[str, Any]) -> KLVAEConfig:
    """Returns our config from the config.json of `diffusers`' AutoencoderKL.

    Raises:
      ValueError: it has an option that is not known here.
    """
    for name, value in _ALLOWED.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} is {options[name]!r}; only {value!r} is known here.")
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if odd := [other for other in options.get(name, ()) if other != kind]:
            raise ValueError(f"{name} has {odd[0]}; only {kind} is known here.")
    quant, post = options.get("use_quant_conv", True), options.get("use_post_quant_conv", True)
    if quant != post:
        raise ValueError(f"use_quant_conv is {quant}, but use_post_quant_conv is {post}; they must be equal.")
    channels = options.get("in_channels", 3)
    if options.get("out_channels", channels) != channels:
        raise ValueError(f"out_channels is {options['out_channels']}; it must be in_channels, {channels}.")
    size, widths = options.get("sample_size", 32), tuple(options.get("block_out_channels", (64,)))
    size = max(size) if isinstance(size, list | tuple) else size
    stride = 2 ** (len(widths) - 1)
    return diffusers_vae(
        block_out_channels=widths,
        layers_per_block=options.get("layers_per_block", 1),
        latent_channels=options.get("latent_channels", 4),
        norm_num_groups=options.get("norm_num_groups", 32),
        scaling_factor=options.get("scaling_factor", 0.18215),
        image_size=-(-size // stride) * stride,
        channels=channels,
        quant_conv=quant,
    )


def options_of(config: KLVAEConfig) -> dict[str, Any]:
    """Returns the inverse.

    Raises:
      ValueError: `diffusers` has no such model.
    """
    if config.first_width not in (0, config.widths[0]) or config.encoder_attention or config.decoder_attention:
        raise ValueError(
            f"first_width is {config.first_width}, encoder_attention {config.encoder_attention} and decoder_attention "
            f"{config.decoder_attention}; for diffusers they must be {config.widths[0]}, () and ()."
        )
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.groups,
        "sample_size": config.image_size,
        "scaling_factor": config.scaling,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
    }


@dataclasses.dataclass(frozen=True)
class KLVAEFolder:
    """A folder of `diffusers`' AutoencoderKL."""

    name: str = "kl_vae_diffusers"
    holds: str = "a KL-VAE of diffusers"
    is_file: bool = False

    def owns(self, task: Any) -> bool:
        return isinstance(task, KLAutoencoding)

    def recognises(self, path: Path) -> bool:
        try:
            return read_options(path).get("_class_name") == "AutoencoderKL"
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False

    def read(self, path: Path, like: Any = None) -> Model:
        """Returns the model in a folder.

        Args:
          path: the folder.
          like: a task of a KL-VAE, whose other settings, and the image size, are taken.

        Raises:
          FileNotFoundError: config.json or the weights are missing.
          ValueError: they do not fit each other, or an option is not known here.
        """
        path = Path(path)
        options = read_options(path)
        with odd_values_named(path / "config.json", options):
            config = config_from(options)
        files = [path / f"{WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
        if not (held := [file for file in files if file.is_file()]):
            raise FileNotFoundError(f"{path} holds neither {files[0].name} nor {files[1].name}; fetch the weights too.")
        if like is not None:
            config = dataclasses.replace(config, image_size=like.model.image_size, dtype=like.model.dtype)
        task = KLAutoencoding(model=config, discriminator=None, perceptual="none") if like is None else like
        task = dataclasses.replace(task, model=config)
        return _model(task, vae_params(config, read_weights(held[0]), "diffusers"), path)

    def write(self, path: Path, model: Model) -> Path:
        """Writes a folder.

        Raises:
          FileExistsError: it has weights already.
          ValueError: `diffusers` has no such model.
        """
        options, path = options_of(model.task.model), Path(path)
        if not model.task.model.scaling:
            options["scaling_factor"] = float(model.task.scale(model.params))
        if (path / f"{WEIGHTS}.safetensors").exists():
            raise FileExistsError(f"{path} has weights already; choose another folder (nothing was written).")
        with whole_folder(path) as folder:
            (folder / "config.json").write_text(json.dumps(options, indent=2) + "\n")
            tensors = vae_tensors(model.task.model, model.params["autoencoder"], "diffusers")
            write_weights(folder / f"{WEIGHTS}.safetensors", tensors)
        return path


KL_VAE = KLVAEFile()
DIFFUSERS = KLVAEFolder()
_FIRST = "encoder.down.0.block.0.norm1.weight"
