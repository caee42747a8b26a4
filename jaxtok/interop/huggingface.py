"""Hugging Face folders: the decoders GPT-2, OPT, Llama 2 and 3, Mistral, Qwen2 and Gemma; and functions for all kinds.

Encoders are in `jaxtok.interop.encoders` and `jaxtok.interop.electra`, T5 and its kin in `jaxtok.interop.t5`. No code
of a folder is run, and PyTorch is needed for .bin files only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtok.data.text import TextData
from jaxtok.interop import electra, encoders, t5
from jaxtok.interop.encoders import activation_from, activation_to
from jaxtok.interop.folders import (
    FolderFormat,
    Options,
    hub_names,
    is_tied,
    read_hub_params,
    read_options,
    stored_dtype,
)
from jaxtok.interop.tensors import Place, Shapes, Source, expected_shapes, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.electra import ElectraConfig
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.opt import OPTConfig
from jaxtok.lm.t5 import T5Config
from jaxtok.model import Model
from jaxtok.nn.rotary import RopeScaling
from jaxtok.protocols import Params

KINDS = ("gpt2", "llama", "mistral", "qwen2", "gemma", "opt")
HEAD = "lm_head.weight"


def decoder_sources(config: DecoderConfig) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors."""
    block, also = ("stack", "blocks"), (HEAD,) if config.tie_embeddings else ()
    if isinstance(config, GPT2Config):
        h = "transformer.h.{layer}."
        found = {
            ("embedding",): Source("transformer.wte.weight", also=also),
            ("positions",): Source("transformer.wpe.weight"),
        }
        for leaf, theirs in {"kernel": "weight", "bias": "bias"}.items():
            for part, group in enumerate(("query", "key", "value")):
                found[*block, "attention", group, leaf] = Source(f"{h}attn.c_attn.{theirs}", part=part)
            found[*block, "attention", "output", leaf] = Source(f"{h}attn.c_proj.{theirs}")
            found[*block, "ffn", "up", leaf] = Source(f"{h}mlp.c_fc.{theirs}")
            found[*block, "ffn", "down", leaf] = Source(f"{h}mlp.c_proj.{theirs}")
        for leaf, theirs in {"scale": "weight", "bias": "bias"}.items():
            found[*block, "norm_attention", leaf] = Source(f"{h}ln_1.{theirs}")
            found[*block, "norm_ffn", leaf] = Source(f"{h}ln_2.{theirs}")
            found["final_norm", leaf] = Source(f"transformer.ln_f.{theirs}")
    elif isinstance(config, OPTConfig):
        h = "model.decoder.layers.{layer}."
        found = {
            ("embedding",): Source("model.decoder.embed_tokens.weight", also=also),
            # its first two rows are those of padding
            ("positions",): Source("model.decoder.embed_positions.weight", axis=0, before=2),
        }
        sites = {("attention", g): f"self_attn.{g[0]}_proj" for g in ("query", "key", "value")}
        sites |= {("attention", "output"): "self_attn.out_proj", ("ffn", "up"): "fc1", ("ffn", "down"): "fc2"}
        for path, theirs in sites.items():
            found[*block, *path, "kernel"] = Source(f"{h}{theirs}.weight", transpose=True)
            if config.use_bias:
                found[*block, *path, "bias"] = Source(f"{h}{theirs}.bias")
        for leaf, theirs in {"scale": "weight", "bias": "bias"}.items():
            found[*block, "norm_attention", leaf] = Source(f"{h}self_attn_layer_norm.{theirs}")
            found[*block, "norm_ffn", leaf] = Source(f"{h}final_layer_norm.{theirs}")
            found["final_norm", leaf] = Source(f"model.decoder.final_layer_norm.{theirs}")
    else:
        h = "model.layers.{layer}."
        found = {
            ("embedding",): Source("model.embed_tokens.weight", also=also),
            ("final_norm", "scale"): Source("model.norm.weight"),
        }
        found[*block, "norm_attention", "scale"] = Source(f"{h}input_layernorm.weight")
        found[*block, "norm_ffn", "scale"] = Source(f"{h}post_attention_layernorm.weight")
        sites = {("attention", g): f"self_attn.{g[0]}_proj" for g in ("query", "key", "value", "output")}
        sites |= {("ffn", g): f"mlp.{g}_proj" for g in ("gate", "up", "down")}
        for path, theirs in sites.items():
            found[*block, *path, "kernel"] = Source(f"{h}{theirs}.weight", transpose=True)
            if has_bias(config, path):
                found[*block, *path, "bias"] = Source(f"{h}{theirs}.bias")
    if not config.tie_embeddings:
        found[("head_matrix",)] = Source(HEAD)
    return found


def has_bias(config: LlamaConfig, path: tuple[str, str]) -> bool:
    """Whether the projection at this path in a block has a bias."""
    own = config.mlp_bias if path[0] == "ffn" else config.qkv_bias if path[1] != "output" else None
    return config.use_bias if own is None else own


def read_config(options: Options, tied: bool | None = None) -> DecoderConfig:
    """Returns our config from a config.json; a key that is absent or null has Hugging Face's default.

    Args:
      options: the file's content.
      tied: whether the head is the embedding; default: what the options say.

    Raises:
      ValueError: the kind of model is unknown, or has an option that the models here do not have.
    """
    kind = options.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"model_type is {kind!r}; it must be one of {', '.join(KINDS + encoders.KINDS + t5.KINDS)}.")

    def get(name: str, default: Any = None) -> Any:
        value = options.get(name)
        return default if value is None else value

    tie = get("tie_word_embeddings", kind in ("gpt2", "opt", "gemma")) if tied is None else tied
    common = {"tie_embeddings": tie, "param_dtype": stored_dtype(options)}
    common["init_std"] = float(get("initializer_range", 0.02))
    if kind == "gpt2":
        width = get("n_embd", 768)
        return GPT2Config(
            num_layers=get("n_layer", 12),
            d_model=width,
            num_heads=get("n_head", 12),
            mlp_dim=get("n_inner", 4 * width),
            vocab_size=get("vocab_size", 50257),
            max_length=get("n_positions", 1024),
            activation=activation_from(get("activation_function", "gelu_new")),
            norm_eps=float(get("layer_norm_epsilon", 1e-5)),
            scale_scores=get("scale_attn_weights", True),
            scale_by_layer=get("scale_attn_by_inverse_layer_idx", False),
            **common,
        )
    if kind == "opt":
        width = get("hidden_size", 768)
        for name, only in {
            "do_layer_norm_before": True,
            "word_embed_proj_dim": width,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        }.items():
            if get(name, only) != only:
                raise ValueError(f"{name} is {options[name]}; it must be {only} (OPT-350M has another architecture).")
        return OPTConfig(
            num_layers=get("num_hidden_layers", 12),
            d_model=width,
            num_heads=get("num_attention_heads", 12),
            mlp_dim=get("ffn_dim", 3072),
            vocab_size=get("vocab_size", 50272),
            max_length=get("max_position_embeddings", 2048),
            activation=activation_from(get("activation_function", "relu")),
            use_bias=get("enable_bias", True),
            **common | {"init_std": float(get("init_std", 0.02))},
        )
    if get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {options['partial_rotary_factor']}; it must be 1.")
    defaults = {
        "llama": {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048},
        "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        "qwen2": {"intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        "gemma": {"intermediate_size": 24576, "num_key_value_heads": 16, "max_position_embeddings": 8192},
    }[kind]
    width, heads = (
        get("hidden_size", 3072 if kind == "gemma" else 4096),
        get("num_attention_heads", 16 if kind == "gemma" else 32),
    )
    layers = get("num_hidden_layers", 28 if kind == "gemma" else 32)
    length = get("max_position_embeddings", defaults["max_position_embeddings"])
    head_size = get("head_dim", 256 if kind == "gemma" else 0)
    base, scaling = rope_from_json(options, head_size or width // heads, length)
    window, full = _window(options, kind, layers)
    activation = get("hidden_act", "silu")
    if kind == "gemma":  # its files say gelu, and mean the tanh form
        activation = get("hidden_activation", "gelu_pytorch_tanh")
    return LlamaConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", defaults["num_key_value_heads"] or heads),
        head_size=head_size,
        mlp_dim=get("intermediate_size", defaults["intermediate_size"]),
        vocab_size=get("vocab_size", {"qwen2": 151936, "gemma": 256000}.get(kind, 32000)),
        max_length=length,
        norm="rms_plus_one" if kind == "gemma" else "rms",
        norm_eps=float(get("rms_norm_eps", 1e-6)),
        activation=activation_from(activation),
        rotary_base=base,
        rotary_scaling=scaling,
        window=window,
        full_layers=full,
        use_bias=get("attention_bias", False) if kind in ("llama", "gemma") else False,
        qkv_bias=True if kind == "qwen2" else None,
        mlp_bias=get("mlp_bias", False) if kind == "llama" else False,
        scale_embeddings=kind == "gemma",
        **common,
    )


def _window(options: Mapping[str, Any], kind: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """Returns the sliding window (0: none) and the layers without it."""
    if kind == "mistral":
        return options.get("sliding_window", 4096) or 0, ()
    if kind != "qwen2" or not options.get("use_sliding_window"):
        return 0, ()
    window = options.get("sliding_window", 4096) or 0
    types = options.get("layer_types")
    if types is None:
        first = options.get("max_window_layers")
        return window, tuple(range(min(28 if first is None else first, layers)))
    return window, tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def rope_from_json(options: Mapping[str, Any], dim: int, length: int) -> tuple[float, RopeScaling | None]:
    """Returns the base of the frequencies and their scaling, from `rope_scaling` or `rope_parameters`."""
    rope = dict(options.get("rope_parameters") or options.get("rope_scaling") or {})
    base = float(rope.get("rope_theta") or options.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
    }
    if kind not in needed:
        raise ValueError(f"rope_type is {kind!r}; it must be one of default, {', '.join(needed)}.")
    if missing := [name for name in needed[kind] if rope.get(name) is None]:
        raise ValueError(f"rope_type is {kind}, which needs {', '.join(missing)} in rope_scaling.")
    original = rope.get("original_max_position_embeddings") or options.get("original_max_position_embeddings") or length
    factor = rope.get("factor") or length / original
    return base, RopeScaling(
        kind=kind,
        factor=float(factor),
        original_length=length if kind == "dynamic" else original,
        length=length,
        low_frequency_factor=float(rope.get("low_freq_factor") or 1.0),
        high_frequency_factor=float(rope.get("high_freq_factor") or 4.0),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=rope.get("truncate", True),
        attention_factor=float(rope.get("attention_factor") or 0.0),
        mscale=float(rope.get("mscale") or 0.0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        short_factors=tuple(rope.get("short_factor") or ()),
        long_factors=tuple(rope.get("long_factor") or ()),
    )


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a config.json.

    Raises:
      ValueError: Hugging Face does not have this model.
    """
    if not isinstance(config, GPT2Config | OPTConfig | LlamaConfig):
        raise ValueError(f"the model is a {type(config).__name__}; it must be of the kind of GPT-2, OPT or Llama.")
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": config.param_dtype,
    }
    if isinstance(config, GPT2Config):
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": config.num_layers,
            "n_embd": config.d_model,
            "n_head": config.num_heads,
            "n_inner": config.mlp_dim,
            "n_positions": config.max_length,
            "activation_function": activation_to(config.activation),
            "layer_norm_epsilon": config.norm_eps or 1e-5,
            "scale_attn_weights": config.scale_scores,
            "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        }
    if isinstance(config, OPTConfig):
        return common | {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.d_model,
            "word_embed_proj_dim": config.d_model,
            "num_attention_heads": config.num_heads,
            "ffn_dim": config.mlp_dim,
            "max_position_embeddings": config.max_length,
            "activation_function": activation_to(config.activation),
            "enable_bias": config.use_bias,
            "do_layer_norm_before": True,
            "init_std": config.init_std,
        }
    kind = (
        "gemma"
        if config.norm == "rms_plus_one"
        else "qwen2"
        if config.qkv_bias
        else "mistral"
        if config.window
        else "llama"
    )
    options = common | {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps or 1e-6,
        "hidden_act": activation_to(config.activation),
        "rope_theta": config.rotary_base,
        "rope_scaling": rope_to_json(config.rotary_scaling),
    }
    if kind in ("llama", "gemma"):
        options |= {"attention_bias": config.use_bias}
    if kind == "llama":
        options["mlp_bias"] = config.use_bias if config.mlp_bias is None else config.mlp_bias
    if kind == "gemma":
        options["hidden_activation"] = options["hidden_act"]
    if kind == "mistral":
        options["sliding_window"] = config.window
    if kind == "qwen2":
        kinds = ["full_attention" if i in config.full_layers else "sliding_attention" for i in range(config.num_layers)]
        options["use_sliding_window"] = bool(config.window)
        options |= {"sliding_window": config.window, "layer_types": kinds} if config.window else {}
    return options


def rope_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    names = {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    }
    wanted = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_frequency_factor", "high_frequency_factor"),
        "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
        "longrope": ("factor", "attention_factor"),
    }[scaling.kind]
    rope = {names[field]: getattr(scaling, field) for field in wanted if getattr(scaling, field) != 0.0}
    rope |= {"rope_type": scaling.kind, "original_max_position_embeddings": scaling.original_length}
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    return rope


def config_from(options: Options, tensors: Mapping[str, np.ndarray]) -> DecoderConfig:
    """Calls `read_config`, with the tensors telling whether the head is the embedding.

    Raises:
      ValueError: as there; or there is no tensor of the head, and config.json says that it is not the embedding.
    """
    config = read_config(options)
    embedding = hub_names(decoder_sources(config)[("embedding",)].name)
    return dataclasses.replace(config, tie_embeddings=is_tied(tensors, HEAD, embedding, config.tie_embeddings))


def task_and_data(config: DecoderConfig, texts: Texts, options: Options) -> tuple[LanguageModeling, TextData]:
    """Returns the task of a language model, and rows of text.

    An evaluation cuts no documents, so that its loss is that of the documents one by one; but a run of jaxtok that was
    written as a folder is evaluated as the run.
    """
    own = options.get("jaxtok")
    whole = own.get("whole_documents", False) if own else True
    data = TextData(tokenizer=texts.spec, length=min(1024, config.max_length), batch_size=8, whole_documents=whole)
    return LanguageModeling(model=config), data


def facts(model: Model) -> dict[str, bool]:
    """Returns how a model's texts are evaluated."""
    return {"whole_documents": True} if isinstance(model.data, TextData) and model.data.whole_documents else {}


def owns(task: Any) -> bool:
    """Whether the task is just a language model of these kinds (a lexinvariant one is more than its body)."""
    return type(task) is LanguageModeling and isinstance(task.model, GPT2Config | OPTConfig | LlamaConfig)


def decoder_params(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `read_params`."""
    table, copies = decoder_sources(config), (HEAD,) if config.tie_embeddings else ()
    return read_hub_params(table, expected_shapes(config), tensors, dtype=config.param_dtype, copies=copies)


DECODERS = FolderFormat(
    name="huggingface",
    holds="GPT-2, OPT, Llama, Mistral, Qwen2 and Gemma",
    owns=owns,
    has=lambda options: options.get("model_type") in KINDS,
    config_from=config_from,
    options_of=decoder_json,
    params_from=decoder_params,
    params_to=lambda config, params: write_params(decoder_sources(config), params),
    task_and_data=task_and_data,
    facts=facts,
)

HUB = (DECODERS, encoders.ENCODERS, electra.ELECTRA, t5.T5)
"""The formats of Hugging Face's own models."""


def _format(config: Any) -> FolderFormat:
    """Returns the format of a model's config."""
    if isinstance(config, T5Config):
        return t5.T5
    if isinstance(config, BertConfig):
        return electra.ELECTRA if isinstance(config, ElectraConfig) else encoders.ENCODERS
    return DECODERS


def sources(config: Any) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors, for any model that Hugging Face has."""
    if isinstance(config, T5Config):
        return t5.sources(config)
    return encoders.sources(config) if isinstance(config, BertConfig) else decoder_sources(config)


def shapes(config: Any) -> Shapes:
    """Returns our parameter paths to shapes, for any model that Hugging Face has."""
    if isinstance(config, T5Config):
        return t5.shapes(config)
    return encoders.shapes(config) if isinstance(config, BertConfig) else expected_shapes(config)


def config_json(config: Any) -> dict[str, Any]:
    """Returns the content of a config.json.

    Raises:
      ValueError: Hugging Face does not have this model.
    """
    return _format(config).options_of(config)


def params_from(config: Any, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `jaxtok.interop.tensors.read_params`."""
    return _format(config).params_from(config, tensors)


def params_to(config: Any, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name, from our parameter tree."""
    return _format(config).params_to(config, params)


def read_folder(folder: str | Path) -> tuple[DecoderConfig | BertConfig | T5Config, Params]:
    """Reads config and parameters from a folder of any kind of model that Hugging Face has.

    Raises:
      FileNotFoundError: the folder, its config.json or its weights are missing.
      ValueError: they do not fit each other, or the kind of model is not known here.
    """
    options = read_options(folder)
    return next((form for form in HUB if form.has(options)), DECODERS).read_model(folder)


def write_folder(folder: str | Path, config: Any, params: Params, *, shard_bytes: int = 5 * 10**9) -> Path:
    """Writes config.json and model.safetensors, or shards of at most so many bytes and their index.

    Raises:
      ValueError: Hugging Face does not have this model.
    """
    return _format(config).write_model(folder, config, params, shard_bytes=shard_bytes)


def is_folder(path: str | Path) -> bool:
    """Whether this is a Hugging Face folder, whose config.json names the kind of model."""
    try:
        return "model_type" in read_options(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
