"""ELM's checkpoints in the authors' layout: a flat state dict, in a .pth file or as safetensors.

Linear layers are [out, in] there, and queries, keys and values are one matrix. A file does not say the number of heads,
the grid, the kind of attention, nor (of a masked model) the sub-codes: these are arguments. A file of a training holds
{model, ema, opt, args}; which of the first two is meant has to be said. Reading a .pth needs PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.protocols import Params
from jaxtok.vision import elm, elm_masked
from jaxtok.vision.elm import ElmConfig
from jaxtok.vision.elm_masked import MaskedElmConfig
from jaxtok.weights import read_weights, write_weights

_UNUSED = re.compile(r"output\..*|proj\..*|pos_embed\..*|freqs_cis")
"""What the published class of the masked model has and does not use."""


def config_from(
    tensors: Mapping[str, np.ndarray], *, head_size: int = 64, sub_codes: int = 0, **options: Any
) -> ElmConfig:
    """The config that the tensors' names and shapes say, a `MaskedElmConfig` where they are of a masked model.

    Args:
      head_size: channels of a head; 64 in everything published.
      sub_codes: of a masked model, whose tensors do not say; 0: one.
      options: fields that no tensor says, such as grid, cosine_scores, loss_chunk or dtype.

    Raises:
      ValueError: a tensor is missing, or the sizes are no ELM's.
    """

    def shape(name):
        if name not in tensors:
            raise ValueError(f"the checkpoint has no {name}, so it is no ELM.")
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


def tensor_names(config: ElmConfig) -> dict[str, tuple[str, ...]]:
    """Their names (`{layer}` stands for the layer) to our paths, where one is one of the other but for a transpose."""
    block, attention, ffn = ("stack", "blocks"), "layers.{layer}.attention.", "layers.{layer}.feed_forward."
    names = {
        "cls_embedding.embedding_table.weight": ("class_embedding",),
        "norm.weight": ("final_norm", "scale"),
        f"{attention}wo.weight": (*block, "attention", "output", "kernel"),
        f"{ffn}w1.weight": (*block, "ffn", "gate", "kernel"),
        f"{ffn}w3.weight": (*block, "ffn", "up", "kernel"),
        f"{ffn}w2.weight": (*block, "ffn", "down", "kernel"),
        "layers.{layer}.attention_norm.weight": (*block, "norm_attention", "scale"),
        "layers.{layer}.ffn_norm.weight": (*block, "norm_ffn", "scale"),
    }
    if isinstance(config, MaskedElmConfig):
        for part, (ours, weight) in {"fc": ("head_dense", "kernel"), "ln": ("head_norm", "scale")}.items():
            names |= {f"mlm_layer.{part}.weight": (ours, weight), f"mlm_layer.{part}.bias": (ours, "bias")}
    elif config.sub_codes > 1:
        names["proj.weight"] = ("projection", "kernel")
    if config.modulation:
        for leaf, ours in {"weight": "kernel", "bias": "bias"}.items():
            names[f"layers.{{layer}}.adaLN_modulation.1.{leaf}"] = (*block, "modulation", ours)
            names[f"final_adaLN.1.{leaf}"] = ("final_modulation", ours)
    return names


def _tables(config: ElmConfig) -> dict[tuple[str, ...], list[str]]:
    """Our tables of sub-codes to the name of each one's."""
    found = {}
    for ours, theirs in {"embedding": "tok_embedder", "head_matrix": "output"}.items():
        parts = [""] if config.sub_codes == 1 else [f".{i}" for i in range(config.sub_codes)]
        found[(ours,)] = [f"{theirs}{part}.weight" for part in parts]
    return found


def expected_shapes(config: ElmConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Parameter paths to shapes, without making any array."""
    init = elm_masked.init_params if isinstance(config, MaskedElmConfig) else elm.init_params
    tree: Any = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def params_from(config: ElmConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameter tree from their tensors.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; the message names them.
    """
    shapes, tree, problems, left = expected_shapes(config), {}, [], set(tensors)

    def read(name, shape):
        left.discard(name)
        if name not in tensors:
            problems.append(f"{name} is missing")
            return np.zeros(shape, np.float32)
        array = np.asarray(tensors[name])
        if array.shape != tuple(shape):
            problems.append(f"{name} has the shape {array.shape}, not {tuple(shape)}")
            return np.zeros(shape, np.float32)
        return array

    def matrix(name, shape):  # ours
        return read(name, shape[::-1]).T

    for name, path in tensor_names(config).items():
        one = matrix if path[-1] == "kernel" else read
        if "{layer}" in name:
            shape = shapes[path][1:]
            tree[path] = np.stack([one(name.format(layer=k), shape) for k in range(config.num_layers)])
        else:
            tree[path] = one(name, shapes[path])
    parts = {group: ("stack", "blocks", "attention", group, "kernel") for group in ("query", "key", "value")}
    widths = [shapes[path][2] for path in parts.values()]
    joint = [
        matrix(f"layers.{k}.attention.wqkv.weight", (config.d_model, sum(widths))) for k in range(config.num_layers)
    ]
    for path, columns in zip(parts.values(), np.split(np.stack(joint), np.cumsum(widths)[:-1], axis=2)):
        tree[path] = columns
    if isinstance(config, MaskedElmConfig):
        table = read("tok_embedder.weight", (config.codebook + 1, config.d_model))
        tree[("embedding",)], tree[("mask_embedding",)] = table[:-1], table[-1:]
        tree[("head_bias",)] = read("mlm_layer.bias", (1, 1, config.codebook + 1)).reshape(-1)[:-1]
        left = {name for name in left if not _UNUSED.fullmatch(name)}
    else:
        for path, names in _tables(config).items():
            tree[path] = np.stack([read(name, shapes[path][1:]) for name in names])
    problems += [f"{name} is unknown" for name in sorted(left - {"freqs_cis"})]
    if problems:
        raise ValueError(f"the tensors do not fit the config: {'; '.join(problems[:8])}.")
    dtype = jnp.dtype(config.param_dtype)
    return flax.traverse_util.unflatten_dict({path: np.ascontiguousarray(x.astype(dtype)) for path, x in tree.items()})


def params_to(config: ElmConfig, params: Params) -> dict[str, np.ndarray]:
    """Their tensors from our parameter tree. What theirs has and the masked model here has not (the bias of the mask as
    a target) is 0."""
    flat = {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params).items()}
    found = {}
    for name, path in tensor_names(config).items():
        array = np.swapaxes(flat[path], -1, -2) if path[-1] == "kernel" else flat[path]
        layers = range(config.num_layers) if "{layer}" in name else [None]
        found |= {name.format(layer=k): array if k is None else array[k] for k in layers}
    block = ("stack", "blocks", "attention")
    joint = np.concatenate([flat[*block, group, "kernel"] for group in ("query", "key", "value")], axis=2)
    found |= {f"layers.{k}.attention.wqkv.weight": joint[k].T for k in range(config.num_layers)}
    if isinstance(config, MaskedElmConfig):
        found["tok_embedder.weight"] = np.concatenate([flat["embedding",], flat["mask_embedding",]])
        found["mlm_layer.bias"] = np.append(flat["head_bias",], np.zeros(1, flat["head_bias",].dtype))[None, None]
    else:
        for path, names in _tables(config).items():
            found |= {name: flat[path][i] for i, name in enumerate(names)}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def read_checkpoint(path: str | Path, *, which: str = "", **options: Any) -> tuple[ElmConfig, Params]:
    """Config and parameters from a file of the authors' code; `options` as in `config_from`.

    Args:
      which: of a file of a training, `model` or its moving average `ema` (which the samples are made with).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no ELM; see `jaxtok.weights.read_weights`, `config_from` and `params_from`.
    """
    tensors = read_weights(path, which)
    config = config_from(tensors, **options)
    return config, params_from(config, tensors)


def write_checkpoint(path: str | Path, config: ElmConfig, params: Params) -> Path:
    """Writes a .safetensors file, or a .pth (needs PyTorch), as the authors' code reads it, in float32.

    Raises:
      FileExistsError, ValueError: as `jaxtok.weights.write_weights`.
    """
    return write_weights(path, {name: x.astype(np.float32) for name, x in params_to(config, params).items()})
