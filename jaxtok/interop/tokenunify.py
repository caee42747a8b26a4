"""Checkpoints of TokenUnify as its authors write them: PyTorch files of a SegMamba, under `model`, or .safetensors.

The authors' classes of pre-training and of fine-tuning differ in their kernels, and their loader drops every tensor of
another shape without a word. Here, a file must fit its config; `jaxtok.vision.tokenunify.ToAffinities` then takes what
fits the other class, and says what does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.mamba import mixer_names
from jaxtok.interop.tensors import Place, Shapes, Source, read_params, shapes_of, write_params
from jaxtok.model import Model
from jaxtok.protocols import Params
from jaxtok.vision.segmamba import SegMambaConfig

Tensors = Mapping[str, np.ndarray]

KERNEL = (2, 3, 4, 1, 0)
"""`Source.axes` of PyTorch's Conv3d [out, in, depth, height, width]."""
TRANSPOSED = (2, 3, 4, 0, 1)
"""Of its ConvTranspose3d [in, out, depth, height, width]."""
DIRECTIONS = {"forward": "", "backward": "_b", "across": "_s"}
_FIRST = "vit.downsample_layers.0.0.weight"


def sources(config: SegMambaConfig) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors."""
    found: dict[Place, Source] = {}

    def conv(place: Place, name: str, bias: bool = True) -> None:
        found[*place, "kernel"] = Source(f"{name}.weight", axes=KERNEL)
        if bias:
            found[*place, "bias"] = Source(f"{name}.bias")

    def residual(place: str, name: str, into: int, out: int) -> None:
        for number in (1, 2) if into == out else (1, 2, 3):
            conv((place, f"conv{number}"), f"{name}.conv{number}.conv", bias=False)

    f = config.features
    for n in range(4):
        stage = f"stage{n}"
        conv((stage, "down"), f"vit.downsample_layers.{n}.{1 if n else 0}")
        for proj in ("proj", "proj2", "proj3", "proj4"):
            conv((stage, "gated", proj), f"vit.gscs.{n}.{proj}")
        layer = (stage, "layers", "layer")
        for part, theirs in (("scale", "weight"), ("bias", "bias")):
            found[*layer, "norm", part] = Source(f"vit.stages.{n}.{{layer}}.norm.{theirs}")
        found |= mixer_names(f"vit.stages.{n}.{{layer}}.mamba.", (*layer, "mixer"), DIRECTIONS)
        conv((stage, "up"), f"vit.mlps.{n}.fc1")
        conv((stage, "out"), f"vit.mlps.{n}.fc2")
    widths = (1, *f, config.hidden)
    residual("encoder1", "encoder1.layer", 1, f[0])
    for n in range(4):
        residual(f"encoder{n + 2}", f"encoder{n + 2}.layer", f[n], widths[n + 2])
        found[f"up{n + 2}", "kernel"] = Source(f"decoder{n + 2}.transp_conv.conv.weight", axes=TRANSPOSED)
        residual(f"decoder{n + 2}", f"decoder{n + 2}.conv_block", 2 * f[n], f[n])
    residual("decoder1", "decoder1.layer", f[0], f[0])
    conv(("out",), "out.conv.conv")
    if config.next_head:
        for name in ("conv1", "conv2", "conv3"):
            conv(("next_head", name), f"preciever.{name}")
        found["next_head", "mlp", "kernel"] = Source("preciever.mlp.weight", transpose=True)
        found["next_head", "mlp", "bias"] = Source("preciever.mlp.bias")
    return found


def shapes(config: SegMambaConfig) -> Shapes:
    """Returns our parameter paths to shapes."""
    crop = jnp.zeros((1, *config.crop, 1))
    return shapes_of(lambda: config.module().init(jax.random.key(0), crop)["params"])


def params_from(config: SegMambaConfig, tensors: Tensors) -> Params:
    """Returns our parameter tree from their tensors.

    Raises:
      ValueError: a tensor is missing or unknown, or has another shape; also if the head for the next token belongs to
        crops of another size.
    """
    known = shapes(config)
    if config.next_head and "preciever.mlp.weight" in tensors:
        theirs, ours = np.shape(tensors["preciever.mlp.weight"]), known["next_head", "mlp", "kernel"]
        if theirs != (wanted := ours[::-1]):
            raise ValueError(
                f"preciever.mlp.weight has the shape {theirs}, but a crop of {config.crop} needs {wanted}; give the "
                f"crop that the head was trained with ({512 * theirs[1]} voxels), or next_head = False."
            )
    ignored = (lambda name: False) if config.next_head else (lambda name: name.startswith("preciever."))
    return read_params(sources(config), known, tensors, ignored=ignored)


def params_to(config: SegMambaConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name, from our parameter tree or one of its form (a gradient)."""
    tensors = write_params(sources(config), params)
    return {name: x[:, None] if ".mamba.conv1d" in name and x.ndim == 2 else x for name, x in tensors.items()}


@dataclasses.dataclass(frozen=True)
class SegMambaFile:
    """A file of the authors' weights; its sizes come from a task."""

    name: str = "tokenunify"
    holds: str = "TokenUnify (SegMamba)"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(getattr(task, "model", None), SegMambaConfig)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: any(name.removeprefix("module.") == _FIRST for name in names))

    def read(self, path: Path, like: Any = None, *, which: str = "") -> Model:
        """Returns the model in a file.

        Args:
          path: .safetensors, .npz, or PyTorch's (needs PyTorch).
          like: a task whose model has the file's sizes.
          which: the table of tensors in a checkpoint of a training run, such as `model`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its sizes are others.
        """
        tensors = read_file(path, like, which)
        return Model(task=like, params=params_from(like.model, tensors), data=None, path=Path(path))

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file, whose suffix tells its format. Raises FileExistsError if there is one already."""
        return write_file(path, params_to(model.task.model, model.params))


TOKENUNIFY = SegMambaFile()
