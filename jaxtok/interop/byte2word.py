"""Byte2Word's parameters by the names of its specification (no code was released), and a BERT's body for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from jaxtok.interop.huggingface import read_folder
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.byte2word import BYTE_VOCAB, Byte2WordConfig, init_params
from jaxtok.protocols import Params
from jaxtok.tokenizers.byte_words import CLS, MASK, PAD, SEP, UNK

_OPTIONS = {  # theirs -> ours
    "d": "d_model",
    "heads": "num_heads",
    "layers": "num_layers",
    "ff": "mlp_dim",
    "pool_heads": "pool_heads",
    "max_bytes": "max_bytes",
    "max_words": "max_length",
    "max_subwords": "max_pieces",
    "subword_vocab": "vocab_size",
}
_SYMBOLS = {
    "byte_vocab": BYTE_VOCAB,
    "pad_id": PAD,
    "cls_id": CLS,
    "sep_id": SEP,
    "mask_id": MASK,
    "unk_id": UNK,
}


def read_config(options: Mapping[str, Any]) -> Byte2WordConfig:
    """Our config from a JSON with the specification's keys; others are ignored.

    Raises:
      ValueError: a key is missing, or a symbol has another id than here.
    """
    if missing := [name for name in _OPTIONS if name not in options]:
        raise ValueError(f"the config has no {missing[0]}; it needs {', '.join(_OPTIONS)}.")
    for name, value in _SYMBOLS.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} is {options[name]}; only {value} can be read.")
    return Byte2WordConfig(
        **{ours: options[name] for name, ours in _OPTIONS.items()}, dropout=options.get("dropout", 0.0)
    )


def _names() -> dict[str, tuple[str, ...]]:
    """Their names, with {layer}, to our paths."""
    block = ("stack", "blocks")
    found = {
        "byte_embed": ("pool", "byte_embedding"),
        "byte_pos": ("pool", "byte_position"),
        "pool.query": ("pool", "query"),
        "word_pos": ("position_embedding",),
        "segment": ("type_embedding",),
        "sub_pos": ("piece_position",),
        "head.w": ("head_dense", "kernel"),
        "head.b": ("head_dense", "bias"),
        "head.out": ("head_matrix",),
        "head.out_b": ("head_bias",),
    }
    linears = {"q": "query", "k": "key", "v": "value", "o": "output"}
    for letter, name in linears.items():
        for theirs, ours in (("w", "kernel"), ("b", "bias")):
            pooled = "query_projection" if letter == "q" else name
            found[f"pool.{theirs}{letter}"] = ("pool", pooled, ours)
            found[f"layer.{{layer}}.attn.{theirs}{letter}"] = (*block, "attention", name, ours)
    for theirs, ours in (("i", "up"), ("f", "down")):
        found[f"layer.{{layer}}.w{theirs}"] = (*block, "ffn", ours, "kernel")
        found[f"layer.{{layer}}.b{theirs}"] = (*block, "ffn", ours, "bias")
    norms = {"emb_ln": ("embedding_norm",), "head.ln": ("head_norm",)}
    norms |= {"layer.{layer}.ln1": (*block, "norm_attention"), "layer.{layer}.ln2": (*block, "norm_ffn")}
    for theirs, path in norms.items():
        found[f"{theirs}.w"], found[f"{theirs}.b"] = (*path, "scale"), (*path, "bias")
    return found


def params_from(config: Byte2WordConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameter tree from arrays by the specification's names.

    Raises:
      ValueError: arrays are missing, unknown or of another shape; the message names them.
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    names = {path: name for name, path in _names().items()}
    left, tree, problems = set(tensors), {}, []
    for path, shape in shapes.items():
        if path not in names:
            raise ValueError(f"the specification has no name for {'/'.join(path)}; use the default pooling and heads.")
        layers = range(config.num_layers) if path[:2] == ("stack", "blocks") else [None]
        arrays = []
        for name in (names[path].format(layer=layer) for layer in layers):
            if name not in tensors:
                problems.append(f"{name} is missing")
                continue
            left.discard(name)
            array = np.asarray(tensors[name])
            array = array.T if name == "head.out" else array[None] if name == "pool.query" else array
            arrays.append(array if layers == [None] else array[None])
            wanted = shape if layers == [None] else (1, *shape[1:])
            if arrays[-1].shape != wanted:
                problems.append(f"{name} has shape {tensors[name].shape}, which does not give {shape}")
        if not problems:
            tree[path] = arrays[0] if layers == [None] else np.concatenate(arrays)
    problems += [f"{name} is unknown" for name in sorted(left)]
    if problems:
        raise ValueError(f"the arrays do not fit the config: {'; '.join(problems[:8])}.")
    return flax.traverse_util.unflatten_dict(tree)


def params_to(config: Byte2WordConfig, params: Params) -> dict[str, np.ndarray]:
    """Arrays by the specification's names from our parameter tree."""
    flat, found = flax.traverse_util.flatten_dict(params), {}
    for name, path in _names().items():
        if path not in flat:
            continue
        array = np.asarray(flat[path])
        if "{layer}" in name:
            found |= {name.format(layer=layer): array[layer] for layer in range(config.num_layers)}
        else:
            found[name] = array.T if name == "head.out" else array[0] if name == "pool.query" else array
    return found


def with_bert_body(config: Byte2WordConfig, params: Params, bert: BertConfig, bert_params: Params) -> Params:
    """The parameters with the layers of a BERT, RoBERTa or XLM-R; its embeddings and heads are left behind.

    Raises:
      ValueError: its layers are of another size or kind.
    """
    for field in ("num_layers", "d_model", "num_heads", "mlp_dim", "activation", "norm_eps"):
        ours, theirs = getattr(config, field), getattr(bert, field)
        if ours != theirs:
            raise ValueError(f"{field} is {ours}, but the BERT's is {theirs}; build the config with {theirs}.")
    dtype = params["stack"]["blocks"]["ffn"]["up"]["kernel"].dtype
    return {**params, "stack": jax.tree.map(lambda x: np.asarray(x).astype(dtype), bert_params["stack"])}


def read_bert_body(config: Byte2WordConfig, params: Params, folder: str | Path) -> Params:
    """`with_bert_body`, from a Hugging Face folder.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no encoder, or one of another size.
    """
    bert, bert_params = read_folder(folder)
    if not isinstance(bert, BertConfig):
        raise ValueError(f"{folder} holds a {type(bert).__name__}; give a folder of BERT, RoBERTa or XLM-R.")
    return with_bert_body(config, params, bert, bert_params)
