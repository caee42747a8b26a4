"""TokenFormer checkpoints in the authors' layout: a folder with config.json and pytorch_model.bin or model.safetensors.

The released models are `Haiyang-W/TokenFormer-{150M,450M,900M,1-5B}`. Tensors need no transposes; only the names and
the stacking over layers differ. Reading a .bin needs PyTorch (`pip install "jaxtok[torch]"`), which reads it with
`weights_only=True`; safetensors need nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtok.data.text import TextData
from jaxtok.interop.folders import FolderFormat, Options, dtype_of, stored_dtype
from jaxtok.interop.tensors import Place, Source, expected_shapes, read_params, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig
from jaxtok.nn.parameter_attention import GROUPS, TokenCounts
from jaxtok.protocols import Params

_SITES = {  # group -> the authors' name in a layer
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.proj",
    "ffn": "mlp",
}
_NORM_LEAVES = {  # kind of norm -> our leaf and the authors'
    "layernorm": {"scale": "weight", "bias": "bias"},
    "layernorm_nonparam": {},
    "rmsnorm": {"scale": "scale"},
    "scalenorm": {"scale": "g"},
}


_FIXED = {  # their options that have only one value here, which is also their default
    "layernorm_epsilon": 1e-5,
    "rms_norm_epsilon": 1e-8,
    "scalenorm_epsilon": 1e-8,
    "gpt_j_residual": False,
}


def sources(config: TokenFormerConfig) -> dict[Place, Source]:
    """Returns our parameter paths to the authors' tensors; the first block is number 2."""
    names = {("embedding",): "sequential.0.word_embeddings.weight"}
    blocks = ("stack", "blocks")
    for group, site in _SITES.items():
        place = (*blocks, group) if group == "ffn" else (*blocks, "attention", group)
        for leaf, official in {"keys": "key_param_tokens", "values": "value_param_tokens"}.items():
            names[*place, leaf] = f"sequential.{{layer}}.{site}.{official}"
    for ours, theirs in {"norm_attention": "input_layernorm", "norm_ffn": "post_attention_layernorm"}.items():
        for leaf, official in _NORM_LEAVES[config.norm].items():
            names[*blocks, ours, leaf] = f"sequential.{{layer}}.{theirs}.{official}"
    for leaf, official in _NORM_LEAVES[config.final_norm or config.norm].items():
        names["final_norm", leaf] = f"sequential.{config.num_layers + 3}.norm.{official}"
    if not config.tie_embeddings:
        names[("head_matrix",)] = f"sequential.{config.num_layers + 4}.final_linear.weight"
    return {place: Source(name, first=2) for place, name in names.items()}


def config_from_official(official: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None, **overrides):
    """Returns our config from the authors' options (the keys of their config.json or YAML), checked with the tensors.

    Raises:
      ValueError: there is an option that the model here does not have, or one that contradicts the tensors.
    """
    get = official.get
    if get("pos_emb", "rotary") not in ("rotary", "none"):
        raise ValueError(f"pos_emb is {get('pos_emb')!r}; it must be rotary or none.")
    for option, value in _FIXED.items():
        if get(option, value) != value:
            raise ValueError(f"{option} is {get(option)!r}; it must be {value}.")
    for option in ("num_layers", "hidden_size", "num_attention_heads", "qkv_slot_num", "proj_slot_num", "ffn_slot_num"):
        if not get(option):
            raise ValueError(f"the config has no {option}; add it.")
    qkv = get("qkv_slot_num")
    counts = TokenCounts(query=qkv, key=qkv, value=qkv, output=get("proj_slot_num"), ffn=get("ffn_slot_num"))
    counts = TokenCounts(**get("jaxtok_tokens", {})) | counts
    vocab = get("padded_vocab_size") or get("vocab_size") or 0
    if tensors is not None:
        vocab = _inferred(tensors, "sequential.0.word_embeddings.weight", official, "padded_vocab_size")
        for group, site in _SITES.items():
            name = f"sequential.2.{site}.key_param_tokens"
            rows = _shape(tensors, name)[0]
            if rows != getattr(counts, group):
                raise ValueError(f"{name} has {rows} rows, but config.json says {getattr(counts, group)}.")
        layers = {int(m[1]) - 1 for name in tensors if (m := re.match(r"sequential\.(\d+)\.mlp\.", name))}
        if max(layers) != get("num_layers"):
            raise ValueError(f"the tensors have {max(layers)} layers, but config.json says {get('num_layers')}.")
    return TokenFormerConfig(
        **{
            "num_layers": official["num_layers"],
            "d_model": official["hidden_size"],
            "num_heads": official["num_attention_heads"],
            "tokens": counts,
            "norm_tokens": TokenCounts(**get("jaxtok_norm_tokens", {})),
            "normalization": get("norm_activation_type", "l2_norm_gelu"),
            "vocab_size": vocab,
            "max_length": get("max_position_embeddings", 2048),
            "rotary_fraction": get("rotary_pct", 1.0) if get("pos_emb", "rotary") == "rotary" else 0.0,
            "rotary_base": float(get("rotary_emb_base", 10000)),
            "norm": get("norm", "layernorm"),
            "final_norm": get("final_norm") or "",
            "tie_embeddings": not get("no_weight_tying", False),
            "dropout": float(get("hidden_dropout", 0.0)),
            "param_dtype": stored_dtype(official),
            "tanh_gelu": get("jaxtok_tanh_gelu", False),
            "normalization_eps": get("jaxtok_normalization_eps", 0.0),
        }
        | overrides
    )


def _shape(tensors, name):
    if name not in tensors:
        raise ValueError(f"the checkpoint has no tensor {name}.")
    return tensors[name].shape


def _inferred(tensors, name, official, key):
    rows = _shape(tensors, name)[0]
    if key in official and official[key] != rows:
        raise ValueError(f"{name} has {rows} rows, but config.json says {key} = {official[key]}.")
    return rows


def params_from_official(config: TokenFormerConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from the authors' tensors by name; raises as `read_params`."""
    return read_params(
        sources(config),
        expected_shapes(config),
        tensors,
        dtype=dtype_of(config.param_dtype),
        ignored=lambda name: name.endswith("rotary_emb.inv_freq"),
    )


def params_to_official(config: TokenFormerConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns the authors' tensors by name, from our parameter tree."""
    return write_params(sources(config), params)


def official_config(config: TokenFormerConfig) -> dict[str, Any]:
    """Returns the options for config.json, by the authors' names.

    What their code cannot express (query, key and value groups of unequal sizes; a fixed normalisation scale; the TPU
    variant's GELU and epsilon) is added under names that begin with `jaxtok_`, so that `read_official` restores the
    model exactly. Their code ignores these, and would compute another function.
    """
    t = config.tokens
    options = {
        "architectures": ["TokenFormerForCausalLM"],
        "num_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "qkv_slot_num": t.query,
        "proj_slot_num": t.output,
        "ffn_slot_num": t.ffn,
        "max_position_embeddings": config.max_length,
        "pos_emb": "rotary" if config.rotary_fraction else "none",
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "no_weight_tying": not config.tie_embeddings,
        "norm": config.norm,
        "final_norm": config.final_norm or None,
        "norm_activation_type": config.normalization,
        "init_method": "normal",
        "output_layer_init_method": "wang_init",
        "hidden_dropout": config.dropout,
        "padded_vocab_size": config.vocab_size,
        "torch_dtype": config.param_dtype,
    }
    if len({t.query, t.key, t.value}) > 1:
        options["jaxtok_tokens"] = dataclasses.asdict(t)
    if config.norm_tokens.total() and config.norm_tokens != config.tokens:
        options["jaxtok_norm_tokens"] = dataclasses.asdict(config.norm_tokens)
    for field in ("tanh_gelu", "normalization_eps"):
        if getattr(config, field):
            options[f"jaxtok_{field}"] = getattr(config, field)
    return options


def task_and_data(config: TokenFormerConfig, texts: Texts, options: Options) -> tuple[LanguageModeling, TextData]:
    """Returns the task of a language model, and rows of text."""
    data = TextData(tokenizer=texts.spec, length=min(1024, config.max_length), batch_size=8)
    return LanguageModeling(model=config), data


TOKENFORMER = FolderFormat(
    name="tokenformer",
    holds="TokenFormers as their authors write them",
    owns=lambda task: type(task) is LanguageModeling and isinstance(task.model, TokenFormerConfig),
    has=lambda options: "qkv_slot_num" in options or options.get("architectures") == ["TokenFormerForCausalLM"],
    config_from=config_from_official,
    options_of=official_config,
    params_from=params_from_official,
    params_to=params_to_official,
    task_and_data=task_and_data,
)
read_official, write_official = TOKENFORMER.read_model, TOKENFORMER.write_model


assert set(_SITES) == set(GROUPS)
