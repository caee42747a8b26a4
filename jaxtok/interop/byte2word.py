"""Byte2Word's folders, with the names of its specification (no code was released), and the layers of a BERT for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtok.data.word_pieces import WordPieceText
from jaxtok.interop.folders import FolderFormat, Options, dtype_of, stored_dtype
from jaxtok.interop.huggingface import is_folder, read_folder
from jaxtok.interop.tensors import Place, Shapes, Source, read_params, shapes_of, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.byte2word import BYTE_VOCAB, Byte2WordConfig, ByteWords, init_params
from jaxtok.model import Model
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
    """Returns our config from a JSON with the specification's keys; others are ignored.

    Raises:
      ValueError: a key is missing, or a symbol does not have its id of here.
    """
    if missing := [name for name in _OPTIONS if name not in options]:
        raise ValueError(f"the config has no {missing[0]}; it needs {', '.join(_OPTIONS)}.")
    for name, value in _SYMBOLS.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} is {options[name]}; it must be {value}.")
    return Byte2WordConfig(
        **{ours: options[name] for name, ours in _OPTIONS.items()},
        dropout=options.get("dropout", 0.0),
        param_dtype=stored_dtype(options),
    )


def sources(shapes: Shapes) -> dict[Place, Source]:
    """Returns our parameter paths to the arrays, for the parameters that a model has."""
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
    laid_out = {"head.out": Source("head.out", transpose=True), "pool.query": Source("pool.query", ones=-1)}
    return {place: laid_out.get(name, Source(name)) for name, place in found.items() if place in shapes}


def _shapes(config: Byte2WordConfig) -> Shapes:
    return shapes_of(lambda: init_params(config, jax.random.key(0)))


def params_from(config: Byte2WordConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from arrays by the specification's names.

    Raises:
      ValueError: as `read_params`; or the specification has no name for a parameter.
    """
    shapes = _shapes(config)
    return read_params(sources(shapes), shapes, tensors, dtype=dtype_of(config.param_dtype))


def params_to(config: Byte2WordConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns arrays by the specification's names from our parameter tree."""
    return write_params(sources(_shapes(config)), params)


def with_bert_body(config: Byte2WordConfig, params: Params, bert: BertConfig, bert_params: Params) -> Params:
    """Returns the parameters with the layers of a BERT, RoBERTa or XLM-R; its embeddings and heads are not used.

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
    """Calls `with_bert_body` with the BERT in a Hugging Face folder.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no encoder, or one of another size.
    """
    bert, bert_params = read_folder(folder)
    if not isinstance(bert, BertConfig):
        raise ValueError(f"{folder} holds a {type(bert).__name__}; give a folder of BERT, RoBERTa or XLM-R.")
    return with_bert_body(config, params, bert, bert_params)


def config_json(config: Byte2WordConfig) -> dict[str, Any]:
    """Returns the config with the specification's keys.

    Raises:
      ValueError: the model has an option that the specification does not have.
    """
    options = {theirs: getattr(config, ours) for theirs, ours in _OPTIONS.items()}
    options |= _SYMBOLS | {"dropout": config.dropout, "torch_dtype": config.param_dtype}
    again = dataclasses.replace(read_config(options), dtype=config.dtype, remat=config.remat, pooling=config.pooling)
    for field in dataclasses.fields(config):
        if (ours := getattr(config, field.name)) != (theirs := getattr(again, field.name)):
            raise ValueError(f"{field.name} is {ours!r}; the specification has only {theirs!r}.")
    return options


def task_and_data(config: Byte2WordConfig, texts: Texts, options: Options) -> tuple[ByteWords, WordPieceText]:
    """Returns the task of masked words, with the pieces of a tokenizer as targets, and its data."""
    sizes = {"length": config.max_length, "max_bytes": config.max_bytes, "max_pieces": config.max_pieces}
    return ByteWords(model=config), WordPieceText(tokenizer=texts.spec, batch_size=8, **sizes)


@dataclasses.dataclass(frozen=True)
class Byte2WordFormat(FolderFormat):
    """Arrays by the specification's names; or the folder of a BERT, whose layers a given model takes."""

    def read(self, path: Path, like: Any = None, *, tokenizer: str = "") -> Model:
        """Returns the model in a folder; from the folder of a BERT, new parameters of `like` with its layers.

        Raises:
          FileNotFoundError, ValueError: as `FolderFormat.read`; or the BERT's layers are of another size or kind.
        """
        if not is_folder(path):
            return super().read(path, like, tokenizer=tokenizer)
        if not isinstance(like, ByteWords):
            raise ValueError(f"{path} holds the layers for a Byte2Word; give the config of one (--config).")
        new = init_params(like.model, jax.random.key(0))
        return Model(task=like, params=read_bert_body(like.model, new, path), data=None, path=Path(path))


BYTE2WORD = Byte2WordFormat(
    name="byte2word",
    holds="Byte2Word",
    owns=lambda task: type(task) is ByteWords,
    has=lambda options: {"pool_heads", "max_subwords"} <= set(options),
    config_from=lambda options, tensors: read_config(options),
    options_of=config_json,
    params_from=params_from,
    params_to=params_to,
    task_and_data=task_and_data,
)
