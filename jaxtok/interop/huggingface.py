"""Hugging Face folders, in and out: config.json and safetensors (one file, or shards with an index).

Decoders: GPT-2, Llama 2 and 3, Mistral, Qwen2 and Gemma. Encoders: BERT, RoBERTa, XLM-R and ELECTRA. Both: T5, mT5,
ByT5, and the checkpoints of MrT5's authors (`jaxtok.interop.t5`). No code of a folder is run, and PyTorch is needed for
.bin files only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

from jaxtok.interop import t5
from jaxtok.interop.tensors import Source, expected_shapes, read_tensors
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.electra import ElectraConfig
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.t5 import T5Config
from jaxtok.nn.rotary import RopeScaling
from jaxtok.tokenizers import HuggingFaceTokenizer

DECODERS = ("gpt2", "llama", "mistral", "qwen2", "gemma")
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")

_ACTIVATIONS = {  # theirs -> ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.position_ids$"
    r"|^(encoder|decoder)\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$"
)
_COPIES = {
    "lm_head.weight",
    "generator_lm_head.weight",
    *(f"{head}.decoder.{leaf}" for head in ("lm_head", "cls.predictions") for leaf in ("weight", "bias")),
}
"""Of a head that is the embedding."""


def sources(config: DecoderConfig | BertConfig | T5Config) -> dict[tuple[str, ...], Source]:
    """Our parameter paths to their tensors."""
    if isinstance(config, T5Config):
        return t5.sources(config)
    if isinstance(config, BertConfig):
        return _encoder_sources(config)
    block = ("stack", "blocks")
    if isinstance(config, GPT2Config):
        h = "transformer.h.{layer}."
        found = {("embedding",): Source("transformer.wte.weight"), ("positions",): Source("transformer.wpe.weight")}
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
    else:
        h = "model.layers.{layer}."
        found = {
            ("embedding",): Source("model.embed_tokens.weight"),
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
        found[("head_matrix",)] = Source("lm_head.weight")
    return found


def _encoder_sources(config: BertConfig) -> dict[tuple[str, ...], Source]:
    electra, block = isinstance(config, ElectraConfig), ("stack", "blocks")
    base = "electra" if electra else "roberta" if config.positions_from_ids else "bert"
    found = {
        ("embedding",): Source(f"{base}.embeddings.word_embeddings.weight"),
        ("position_embedding",): Source(f"{base}.embeddings.position_embeddings.weight"),
        ("type_embedding",): Source(f"{base}.embeddings.token_type_embeddings.weight"),
    }
    h = f"{base}.encoder.layer.{{layer}}."
    linears = {(*block, "attention", g): f"{h}attention.self.{g}" for g in ("query", "key", "value")}
    linears[*block, "attention", "output"] = f"{h}attention.output.dense"
    linears[*block, "ffn", "up"] = f"{h}intermediate.dense"
    linears[*block, "ffn", "down"] = f"{h}output.dense"
    norms = {("embedding_norm",): f"{base}.embeddings.LayerNorm"}
    norms[*block, "norm_attention"] = f"{h}attention.output.LayerNorm"
    norms[*block, "norm_ffn"] = f"{h}output.LayerNorm"
    if config.embedding_width != config.d_model:
        linears[("embedding_project",)] = f"{base}.embeddings_project"
    if electra and config.replaced_head:
        linears[("replaced_dense",)] = "discriminator_predictions.dense"
        linears[("replaced_output",)] = "discriminator_predictions.dense_prediction"
    if electra and config.mask_head:
        linears[("head_dense",)] = "generator_predictions.dense"
        norms[("head_norm",)] = "generator_predictions.LayerNorm"
        found[("head_bias",)] = Source("generator_lm_head.bias")
    elif config.mask_head:
        head = "lm_head" if config.positions_from_ids else "cls.predictions.transform"
        linears[("head_dense",)] = f"{head}.dense"
        norms[("head_norm",)] = f"{head}.{'layer_norm' if config.positions_from_ids else 'LayerNorm'}"
        found[("head_bias",)] = Source("lm_head.bias" if config.positions_from_ids else "cls.predictions.bias")
    if config.pooler:
        linears[("pooler",)] = f"{base}.pooler.dense"
    if config.next_sentence:
        linears[("next_sentence_head",)] = "cls.seq_relationship"
    if config.num_classes:
        linears |= {("classifier_dense",): "classifier.dense", ("classifier",): "classifier.out_proj"}
    for path, theirs in linears.items():
        found[*path, "kernel"] = Source(f"{theirs}.weight", transpose=True)
        found[*path, "bias"] = Source(f"{theirs}.bias")
    for path, theirs in norms.items():
        found[*path, "scale"], found[*path, "bias"] = Source(f"{theirs}.weight"), Source(f"{theirs}.bias")
    return found


def read_encoder_config(options: Mapping[str, Any], tensors: Mapping[str, Any]) -> BertConfig:
    """Our config from a config.json, with the heads that there are tensors of.

    Raises:
      ValueError: an option that the models here do not have.
    """
    if (kind := options.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"position_embedding_type is {kind!r}; only absolute can be read.")
    electra = options["model_type"] == "electra"
    roberta = options["model_type"] not in ("bert", "electra")

    def get(name: str, default: Any) -> Any:
        value = options.get(name)
        return default if value is None else value

    def there(name: str) -> bool:
        return any(key.endswith(name) for key in tensors)

    classes = tensors["classifier.out_proj.weight"].shape[0] if there("classifier.out_proj.weight") else 0
    common = dict(
        num_layers=get("num_hidden_layers", 12),
        d_model=get("hidden_size", 256 if electra else 768),
        num_heads=get("num_attention_heads", 4 if electra else 12),
        mlp_dim=get("intermediate_size", 1024 if electra else 3072),
        activation=_activation(get("hidden_act", "gelu")),
        vocab_size=get("vocab_size", 50265 if options["model_type"] == "roberta" else 30522),
        max_positions=get("max_position_embeddings", 512),
        type_vocab_size=get("type_vocab_size", 2),
        pad_id=get("pad_token_id", 1 if roberta else 0),
        norm_eps=float(get("layer_norm_eps", 1e-12)),
        init_std=float(get("initializer_range", 0.02)),
        num_classes=classes,
        param_dtype="bfloat16" if get("torch_dtype", get("dtype", "float32")) == "bfloat16" else "float32",
    )
    if electra:
        return ElectraConfig(
            embedding_size=get("embedding_size", 128),
            mask_head=there("generator_predictions.dense.weight"),
            replaced_head=there("discriminator_predictions.dense.weight"),
            head_activation="" if common["activation"] == "gelu" else "gelu",
            **common,
        )
    return BertConfig(
        positions_from_ids=roberta,
        mask_head=there("lm_head.dense.weight") or there("cls.predictions.transform.dense.weight"),
        pooler=there("pooler.dense.weight"),
        next_sentence=there("cls.seq_relationship.weight"),
        **common,
    )


def has_bias(config: LlamaConfig, path: tuple[str, str]) -> bool:
    """Whether the projection at this place of a block has a bias."""
    own = config.mlp_bias if path[0] == "ffn" else config.qkv_bias if path[1] != "output" else None
    return config.use_bias if own is None else own


def read_config(options: Mapping[str, Any], tied: bool | None = None) -> DecoderConfig:
    """Our config from a config.json; a key that is absent or null has Hugging Face's default.

    Args:
      options: the file's content.
      tied: whether the head is the embedding, if the tensors have said so.

    Raises:
      ValueError: an unknown kind of model, or an option that the models here do not have.
    """
    kind = options.get("model_type")
    if kind not in DECODERS:
        raise ValueError(
            f"model_type is {kind!r}; the kinds that can be read are {', '.join(DECODERS + ENCODERS + t5.KINDS)}."
        )

    def get(name: str, default: Any = None) -> Any:
        value = options.get(name)
        return default if value is None else value

    tie = get("tie_word_embeddings", kind in ("gpt2", "gemma")) if tied is None else tied
    dtype = get("torch_dtype", get("dtype", "float32"))
    common = {"tie_embeddings": tie, "param_dtype": "bfloat16" if dtype == "bfloat16" else "float32"}
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
            activation=_activation(get("activation_function", "gelu_new")),
            norm_eps=float(get("layer_norm_epsilon", 1e-5)),
            scale_scores=get("scale_attn_weights", True),
            scale_by_layer=get("scale_attn_by_inverse_layer_idx", False),
            **common,
        )
    if get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {options['partial_rotary_factor']}; only 1 can be read.")
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
        activation=_activation(activation),
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


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"the activation is {name!r}; the ones that can be read are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _window(options: Mapping[str, Any], kind: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """The sliding window, 0 for none, and the layers without it."""
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
    """The base of the frequencies and their scaling, from either spelling (`rope_scaling`, or `rope_parameters`)."""
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
        raise ValueError(f"rope_type is {kind!r}; it can be default, {', '.join(needed)}.")
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


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
      ValueError: it is not one of the models that Hugging Face has.
    """
    if isinstance(config, T5Config):
        return t5.config_json(config)
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": getattr(config, "tie_embeddings", True),
        "initializer_range": config.init_std,
        "torch_dtype": config.param_dtype,
    }
    theirs = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
    if isinstance(config, BertConfig):
        electra = isinstance(config, ElectraConfig)
        kind = "electra" if electra else "roberta" if config.positions_from_ids else "bert"
        head_of_gelu = not electra or (config.head_activation or config.activation) == "gelu"
        if not head_of_gelu and (config.mask_head or config.num_classes):
            raise ValueError("the heads of Hugging Face's ELECTRA are of gelu; set head_activation to it.")
        if not electra and config.embedding_width != config.d_model:
            raise ValueError(f"embedding_size is {config.embedding_size}; of Hugging Face's encoders, ELECTRA has one.")
        head = "ForMaskedLM" if config.mask_head else "ForSequenceClassification" if config.num_classes else "Model"
        head = "ForPreTraining" if config.next_sentence or (electra and config.replaced_head) else head
        return (
            common
            | {
                "architectures": [kind.capitalize() + head],
                "model_type": kind,
                "num_hidden_layers": config.num_layers,
                "hidden_size": config.d_model,
                "num_attention_heads": config.num_heads,
                "intermediate_size": config.mlp_dim,
                "hidden_act": theirs[config.activation],
                "max_position_embeddings": config.max_positions,
                "type_vocab_size": config.type_vocab_size,
                "pad_token_id": config.pad_id,
                "layer_norm_eps": config.norm_eps,
            }
            | ({"num_labels": config.num_classes} if config.num_classes else {})
            | ({"embedding_size": config.embedding_width} if electra else {})
        )
    if isinstance(config, GPT2Config):
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": config.num_layers,
            "n_embd": config.d_model,
            "n_head": config.num_heads,
            "n_inner": config.mlp_dim,
            "n_positions": config.max_length,
            "activation_function": theirs[config.activation],
            "layer_norm_epsilon": config.norm_eps or 1e-5,
            "scale_attn_weights": config.scale_scores,
            "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        }
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"{type(config).__name__} is no model of Hugging Face's; export GPT-2 or Llama-style models.")
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
        "hidden_act": theirs[config.activation],
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


def params_from(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameter tree from their tensors.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; the message names them.
    """
    shapes = expected_shapes(config)
    left = {name for name in tensors if not _IGNORED.search(name)}
    tree: dict[str, Any] = {}
    problems: list[str] = []

    def read(source: Source, layer: int, shape: tuple[int, ...]) -> np.ndarray | None:
        name = _present(source.name.format(layer=layer), tensors)
        if name not in tensors:
            problems.append(f"{source.name.format(layer=layer)} is missing")
            return None
        left.discard(name)
        array = tensors[name]
        if source.part is not None and array.shape[-1] % 3 == 0:
            array = np.split(array, 3, axis=-1)[source.part]
        array = array.T if source.transpose else array
        if array.shape != shape:
            problems.append(f"{name} has shape {tensors[name].shape}, which does not give {shape}")
            return None
        return array.astype(config.param_dtype if config.param_dtype != "bfloat16" else ml_dtypes.bfloat16)

    for path, source in sources(config).items():
        if "{layer}" in source.name:
            layers = range(source.first, source.first + shapes[path][0])
            arrays = [read(source, layer, shapes[path][1:]) for layer in layers]
            array = None if any(a is None for a in arrays) else np.stack(arrays)
        else:
            array = read(source, 0, shapes[path])
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    if getattr(config, "tie_embeddings", True):
        left -= _COPIES
    problems += [f"{name} is unknown" for name in sorted(left)]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"the tensors do not fit config.json: {'; '.join(problems[:8])}{more}.")
    return tree


def params_to(config: DecoderConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors by name, from our parameter tree."""
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for path, source in sources(config).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        array = np.asarray(leaf)
        for layer in range(array.shape[0]) if "{layer}" in source.name else [None]:
            one = array if layer is None else array[layer]
            name = source.name if layer is None else source.name.format(layer=source.first + layer)
            parts.setdefault(name, {})[source.part] = one.T if source.transpose else one
    joined = {}
    for name, found in parts.items():
        arrays = [found[part] for part in sorted(found, key=lambda part: part or 0)]
        joined[name] = np.ascontiguousarray(np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0])
    return joined


def _present(name: str, tensors: Mapping[str, np.ndarray]) -> str:
    """The name, the one without the model's prefix, as files of base models have it, or an old one."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    names = [name, name.split(".", 1)[1], old, old.split(".", 1)[1]]
    return next((n for n in names if n in tensors), name)


def read_folder(folder: str | Path) -> tuple[DecoderConfig | BertConfig | T5Config, dict[str, Any]]:
    """Config and parameters from a Hugging Face folder.

    Raises:
      FileNotFoundError: the folder, its config.json or its weights are missing.
      ValueError: they do not fit each other, or it is a kind of model that is not known here.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json and the weights.")
    options = json.loads(path.read_text())
    if options.get("model_type") in t5.KINDS:
        tensors = read_tensors(folder)
        config = t5.read_config(options, tensors)
        return config, params_from(config, t5.with_embedding(tensors))
    if options.get("model_type") in ENCODERS:
        tensors = read_tensors(folder)
        config = read_encoder_config(options, tensors)
        return config, params_from(config, tensors)
    config = read_config(options)
    tensors = read_tensors(folder)
    embedding = _present(sources(config)[("embedding",)].name, tensors)
    head = "lm_head.weight"
    if head in tensors and embedding in tensors:
        tied = np.array_equal(tensors[head], tensors[embedding])
    elif head in tensors:
        tensors, tied = {**tensors, embedding: tensors[head]}, True
    elif config.tie_embeddings:
        tied = True
    else:
        raise ValueError(f"{folder} has no tensor {head}, and config.json says that the head is not the embedding.")
    config = read_config(options, tied)
    return config, params_from(config, tensors)


def is_folder(path: str | Path) -> bool:
    """Whether this is a Hugging Face folder: its config.json says the kind of model."""
    options = Path(path) / "config.json"
    if not options.is_file():
        return False
    try:
        return "model_type" in json.loads(options.read_text())
    except ValueError:
        return False


def read_tokenizer(folder: str | Path) -> tuple[HuggingFaceTokenizer, list[int], list[int]]:
    """The folder's tokenizer, the ids that it writes in front of a text, and those behind which generation ends.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: neither generation_config.json nor config.json has an eos_token_id.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; save the tokenizer there in the fast format.")
    stops: Any = None
    for name in ("generation_config.json", "config.json"):
        if stops is None and (folder / name).is_file():
            stops = json.loads((folder / name).read_text()).get("eos_token_id")
    if stops is None:
        raise ValueError(f"{folder} has no eos_token_id, neither in generation_config.json nor in config.json; add it.")
    stops = [stops] if isinstance(stops, int) else list(stops)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix = theirs.encode("", add_special_tokens=True).ids
    return HuggingFaceTokenizer(folder, eod=theirs.id_to_token(stops[0])), prefix, stops


def first_sentinel(folder: str | Path) -> int:
    """The id of <extra_id_0> in a folder's tokenizer, from which T5's sentinels count down.

    Raises:
      ValueError: the tokenizer has none.
    """
    found = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).token_to_id("<extra_id_0>")
    if found is None:
        raise ValueError(
            f"the tokenizer in {folder} has no token <extra_id_0>; give the one the model was trained with."
        )
    return found


def write_folder(
    folder: str | Path, config: DecoderConfig, params: Mapping[str, Any], *, shard_bytes: int = 5 * 10**9
) -> Path:
    """Writes config.json and model.safetensors, or shards of at most so many bytes and their index.

    Raises:
      ValueError: it is not one of the models that Hugging Face has.
    """
    folder = Path(folder)
    options = config_json(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, params_to(config, params), shard_bytes)
    (folder / "config.json").write_text(json.dumps(options, indent=2) + "\n")
    return folder


def save_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Writes model.safetensors, or shards of at most so many bytes and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    metadata = {"format": "pt"}
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], folder / "model.safetensors", metadata=metadata)
    else:
        places = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            safetensors.numpy.save_file(shard, folder / file, metadata=metadata)
            places |= dict.fromkeys(shard, file)
        size = sum(array.nbytes for shard in shards for array in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
