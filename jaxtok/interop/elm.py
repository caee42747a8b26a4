"""ELM's checkpoints in the authors' layout: a flat state dict, in a .pth file or as safetensors.

Linear layers are [out, in] there, and queries, keys and values are one matrix. A file does not tell the number of
heads, the grid, the kind of attention, nor the sub-codes of a masked model: these are arguments. A checkpoint of a
training run holds {model, ema, opt, args}, and `which` chooses between the first two. Reading a .pth needs PyTorch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.folders import dtype_of
from jaxtok.interop.tensors import Place, Shapes, Source, read_params, shapes_of, write_params
from jaxtok.model import Model
from jaxtok.protocols import Params
from jaxtok.vision import elm, elm_masked
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling

_UNUSED = re.compile(r"output\..*|proj\..*|pos_embed\..*|freqs_cis")
"""The names of what the published class of the masked model has but does not use."""


def config_from(
    tensors: Mapping[str, np.ndarray], *, head_size: int = 64, sub_codes: int = 0, **options: Any
) -> ElmConfig:
    """Returns the config that the tensors' names and shapes tell: a `MaskedElmConfig` if they are of a masked model.

    Args:
      head_size: the channels of a head; 64 in everything published.
      sub_codes: the sub-codes of a masked model, whose tensors do not tell; 0: one.
      options: fields that no tensor tells, such as grid, cosine_scores, loss_chunk or dtype.

    Raises:
      ValueError: a tensor is missing, or the sizes are not those of an ELM.
    """

    def shape(name):
        if name not in tensors:
            raise ValueError(f"the checkpoint has no {name}, so it is not an ELM.")
        return tuple(np.shape(tensors[name]))

    masked = "mlm_layer.bias" in tensors
    classes, width = shape("cls_embedding.embedding_table.weight")
    tables = len([name for name in tensors if re.fullmatch(r"tok_embedder\.\d+\.weight", name)])
    rows = shape("tok_embedder.0.weight" if tables else "tok_embedder.weight")[0] - masked
    if rows & (rows - 1) or rows < 2:
        raise ValueError(f"the table of codes has {rows} values; it must be a power of 2.")
    if sub_codes and not masked and sub_codes != (tables or 1):
        raise ValueError(f"sub_codes is {sub_codes}, but the checkpoint has tables for {tables or 1}.")
    layers = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))), default=-1)
    heads, left = divmod(width, head_size)
    kv_heads, also_left = divmod(shape("layers.0.attention.wqkv.weight")[0] - width, 2 * head_size)
    if left or also_left:
        raise ValueError(f"head_size is {head_size}, which does not divide the width {width} and that of the keys.")
    sizes = {
        "num_layers": layers,
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": 0 if kv_heads == heads else kv_heads,
        "mlp_dim": shape("layers.0.feed_forward.w1.weight")[0],
        "code_bits": rows.bit_length() - 1,
        "num_classes": classes - 1,
        "modulation": "final_adaLN.1.weight" in tensors,
        "sub_codes": (sub_codes or 1) if masked else (tables or 1),
    }
    if options.get("cosine_scores"):
        options.setdefault("scale_scores", False)
    return (MaskedElmConfig if masked else ElmConfig)(**sizes | options)


def sources(config: ElmConfig) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors."""
    block, attention, ffn = ("stack", "blocks"), "layers.{layer}.attention.", "layers.{layer}.feed_forward."
    linears = {
        (*block, "attention", "output"): f"{attention}wo",
        (*block, "ffn", "gate"): f"{ffn}w1",
        (*block, "ffn", "up"): f"{ffn}w3",
        (*block, "ffn", "down"): f"{ffn}w2",
    }
    found = {
        ("class_embedding",): Source("cls_embedding.embedding_table.weight"),
        ("final_norm", "scale"): Source("norm.weight"),
        (*block, "norm_attention", "scale"): Source("layers.{layer}.attention_norm.weight"),
        (*block, "norm_ffn", "scale"): Source("layers.{layer}.ffn_norm.weight"),
    }
    for part, group in enumerate(("query", "key", "value")):
        place = (*block, "attention", group, "kernel")
        found[place] = Source(f"{attention}wqkv.weight", transpose=True, part=part, axis=0)
    if config.modulation:
        linears[*block, "modulation"] = "layers.{layer}.adaLN_modulation.1"
        linears["final_modulation",] = "final_adaLN.1"
        found[*block, "modulation", "bias"] = Source("layers.{layer}.adaLN_modulation.1.bias")
        found["final_modulation", "bias"] = Source("final_adaLN.1.bias")
    if isinstance(config, MaskedElmConfig):
        linears["head_dense",] = "mlm_layer.fc"
        found |= {
            ("head_dense", "bias"): Source("mlm_layer.fc.bias"),
            ("head_norm", "scale"): Source("mlm_layer.ln.weight"),
            ("head_norm", "bias"): Source("mlm_layer.ln.bias"),
            ("head_bias",): Source("mlm_layer.bias", ones=2, padding=1),  # for the mask, which is no target
            ("embedding",): Source("tok_embedder.weight", part=0, axis=0),
            ("mask_embedding",): Source("tok_embedder.weight", part=1, axis=0),
        }
    else:
        for ours, theirs in {"embedding": "tok_embedder", "head_matrix": "output"}.items():
            one = config.sub_codes == 1
            found[(ours,)] = Source(f"{theirs}.weight", ones=-1) if one else Source(f"{theirs}.{{layer}}.weight")
        if config.sub_codes > 1:
            linears["projection",] = "proj"
    for place, name in linears.items():
        found[*place, "kernel"] = Source(f"{name}.weight", transpose=True)
    return found


def expected_shapes(config: ElmConfig) -> Shapes:
    """Returns parameter paths to shapes, without making any array."""
    init = elm_masked.init_params if isinstance(config, MaskedElmConfig) else elm.init_params
    return shapes_of(lambda: init(config, jax.random.key(0)))


def params_from(config: ElmConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `read_params`."""

    def ignored(name: str) -> bool:
        return name == "freqs_cis" or (isinstance(config, MaskedElmConfig) and bool(_UNUSED.fullmatch(name)))

    dtype = dtype_of(config.param_dtype)
    return read_params(sources(config), expected_shapes(config), tensors, dtype=dtype, ignored=ignored)


def params_to(config: ElmConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors from our parameter tree."""
    return write_params(sources(config), params)


def write_checkpoint(path: str | Path, config: ElmConfig, params: Params) -> Path:
    """Writes a .safetensors file, or a .pth (needs PyTorch), as the authors' code reads it, in float32.

    Raises:
      FileExistsError, ValueError: as `jaxtok.weights.write_weights`.
    """
    return write_file(path, {name: x.astype(np.float32) for name, x in params_to(config, params).items()})


@dataclasses.dataclass(frozen=True)
class ElmFile:
    """A file of the authors' weights; what it does not tell comes from a task."""

    name: str = "elm"
    holds: str = "ELM, autoregressive or masked"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(task, ElmModeling | MaskedElmModeling)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: any("cls_embedding.embedding_table" in name for name in names))

    def read(self, path: Path, like: Any = None, *, which: str = "") -> Model:
        """Returns the model in a file.

        Args:
          path: .safetensors, .npz, or PyTorch's (needs PyTorch).
          like: a task whose model has the file's sizes.
          which: for a checkpoint of a training run, `model` or its moving average `ema`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its sizes are others.
        """
        tensors = read_file(path, like, which)
        return Model(task=like, params=params_from(like.model, tensors), data=None, path=Path(path))

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file; raises as `write_checkpoint`."""
        return write_checkpoint(path, model.task.model, model.params)


ELM = ElmFile()
