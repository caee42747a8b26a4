"""The released HAT models' folders, in and out: config.json and safetensors, with the names of the authors' modules.

Where QK norms are kept was not to be seen; here they are `q_norm.weight` and `k_norm.weight` beside the projections.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxtok.data.words import WordText
from jaxtok.interop.huggingface import Source, rope_from_json, rope_to_json, save_tensors
from jaxtok.interop.tensors import read_tensors
from jaxtok.lm.decoder import init_params
from jaxtok.lm.hat_released import ReleasedConfig, ReleasedHAT, ReleasedModeling
from jaxtok.nn.linear import LlamaStack

PARTS = ("encoder", "backbone", "decoder")


def read_config(options: Mapping[str, Any], dtype: str = "float32") -> ReleasedConfig:
    """The model that a config.json describes.

    Raises:
      ValueError: it has an option that the models here do not have.
    """
    qk_norm = bool(options.get("qk_norm", options.get("use_qk_norm", False)))

    def stack(part: str) -> LlamaStack:
        o = options[f"{part}_config"]
        if not o.get("is_neox_style", True):
            raise ValueError(f"{part}_config.is_neox_style is false; only rotations of halves can be read.")
        if o.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"{part}_config.hidden_act is {o['hidden_act']!r}; only silu can be read.")
        heads, length = o["num_attention_heads"], o.get("max_position_embeddings", 8192)
        shared, own = o.get("num_key_value_heads") or heads, o["hidden_size"] // heads
        head_size, bias = o.get("head_dim") or own, o.get("attention_bias", False)
        base, scaling = rope_from_json(o, head_size, length)
        if scaling and scaling.kind == "llama3":
            scaling = dataclasses.replace(scaling, length=0)  # which it does not use
        return LlamaStack(
            num_layers=o["num_hidden_layers"],
            d_model=o["hidden_size"],
            num_heads=heads,
            num_kv_heads=0 if shared == heads else shared,
            head_size=0 if head_size * heads == o["hidden_size"] else head_size,
            mlp_dim=o["intermediate_size"],
            norm_eps=float(o.get("rms_norm_eps", 1e-5)),
            rotary_base=base,
            rotary_scaling=scaling,
            window=o.get("sliding_window") or 0,
            use_bias=bias,
            mlp_bias=None if o.get("mlp_bias", False) == bias else not bias,
            init_std=float(o.get("initializer_range", 0.02)),
            qk_norm=qk_norm,
            param_dtype=dtype,
        )

    def cross(part: str) -> tuple[int, int]:
        o = options[f"{part}_config"]["cross_attention_config"]
        heads, shared = o["num_attention_heads"], o.get("attention_num_kv_heads") or 0
        return heads, 0 if shared == heads else shared

    (connector_heads, connector_kv_heads), (guide_heads, guide_kv_heads) = cross("encoder"), cross("decoder")
    return ReleasedConfig(
        **{part: stack(part) for part in PARTS},
        alphabet=options["decoder_config"].get("vocab_size", 256),
        connector_heads=connector_heads,
        connector_kv_heads=connector_kv_heads,
        guide_heads=guide_heads,
        guide_kv_heads=guide_kv_heads,
        max_word_size=options.get("max_word_size", 100),
        special_tokens=tuple((options.get("special_token_dict") or {"<|eot_id|>": 192}).items()),
    )


def config_json(config: ReleasedConfig) -> dict[str, Any]:
    """The content of a config.json."""

    def stack(part: str) -> dict[str, Any]:
        c: LlamaStack = getattr(config, part)
        return {
            "hidden_size": c.d_model,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "num_hidden_layers": c.num_layers,
            "intermediate_size": c.mlp_dim,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rotary_base,
            "rope_scaling": rope_to_json(c.rotary_scaling),
            "sliding_window": c.window or None,
            "vocab_size": 0 if part == "backbone" else config.alphabet,
            "attention_bias": c.use_bias,
            "mlp_bias": c.use_bias if c.mlp_bias is None else c.mlp_bias,
            "hidden_act": "silu",
            "is_neox_style": True,
            "initializer_range": c.init_std,
        }

    def cross(width: int, of_keys: int, heads: int, shared: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "hidden_size_q": width,
            "hidden_size_kv": of_keys,
            "num_attention_heads": heads,
            "attention_num_kv_heads": shared or heads,
        }

    char, d = config.encoder.d_model, config.backbone.d_model
    options = {f"{part}_config": stack(part) for part in PARTS}
    options["encoder_config"]["cross_attention_config"] = cross(
        d, char, config.connector_heads, config.connector_kv_heads
    )
    options["decoder_config"]["cross_attention_config"] = cross(char, d, config.guide_heads, config.guide_kv_heads)
    return options | {
        "architectures": ["HATDecoderForCausalLM"],
        "model_type": "hierarchical_autoregressive_transformer",
        "max_word_size": config.max_word_size,
        "special_token_dict": dict(config.special_tokens),
        "qk_norm": config.encoder.qk_norm,
        "torch_dtype": config.encoder.param_dtype,
    }


def sources(config: ReleasedConfig) -> dict[tuple[str, ...], Source]:
    """Our parameter paths to their tensors; {layer} stands for the layer's number."""
    found = {
        ("embedding",): Source("encoder.embedding_layer.weight"),
        ("head_matrix",): Source("lm_head.weight"),
        ("final_norm", "scale"): Source("layer_norm.weight"),
        ("connector", "latent_query"): Source("encoder_connector.latent_query"),
        ("first_word",): Source("decoder_connector.first_word_embedding"),
    }

    def attention(path: tuple[str, ...], theirs: str, bias: bool = False, norms: tuple[str, str] | None = None) -> None:
        for group in ("query", "key", "value", "output"):
            found[*path, group, "kernel"] = Source(f"{theirs}.{group[0]}_proj.weight", transpose=True)
            if bias:
                found[*path, group, "bias"] = Source(f"{theirs}.{group[0]}_proj.bias")
        for name, norm in zip("qk", norms or ()):
            found[*path, norm, "scale"] = Source(f"{theirs}.{name}_norm.weight")

    qk = config.encoder.qk_norm
    attention(
        ("connector",),
        "encoder_connector.cross_attention_encoder_connector",
        norms=("query_norm", "key_norm") if qk else None,
    )
    guide, guide_theirs = ("decoder", "blocks"), "decoder.decoder_layers.{layer}"
    attention(guide, f"{guide_theirs}.cross_attention", norms=("query_head_norm", "key_head_norm") if qk else None)
    for name in ("query_norm", "kv_norm"):
        found[*guide, name, "scale"] = Source(f"{guide_theirs}.{name}.weight")
    blocks = {
        "encoder": (("encoder", "blocks"), "encoder.layers.{layer}"),
        "backbone": (("backbone_stack", "blocks"), "backbone.layers.{layer}"),
        "decoder": (("decoder", "blocks", "block"), "decoder.decoder_layers.{layer}.llama_layer"),
    }
    for part, (path, theirs) in blocks.items():
        stack: LlamaStack = getattr(config, part)
        norms = ("query_norm", "key_norm") if stack.qk_norm else None
        attention((*path, "attention"), f"{theirs}.self_attn", stack.use_bias, norms)
        for group in ("gate", "up", "down"):
            found[*path, "ffn", group, "kernel"] = Source(f"{theirs}.mlp.{group}_proj.weight", transpose=True)
            if stack.use_bias if stack.mlp_bias is None else stack.mlp_bias:
                found[*path, "ffn", group, "bias"] = Source(f"{theirs}.mlp.{group}_proj.bias")
        found[*path, "norm_attention", "scale"] = Source(f"{theirs}.input_layernorm.weight")
        found[*path, "norm_ffn", "scale"] = Source(f"{theirs}.post_attention_layernorm.weight")
    return found


def expected_shapes(config: ReleasedConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Parameter paths to shapes, without making any array."""
    one = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(lambda: init_params(ReleasedHAT(config), jax.random.key(0), one, one, one))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def params_from(config: ReleasedConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameter tree from their tensors.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; the message names them.
    """
    left, problems = set(tensors), []
    dtype = ml_dtypes.bfloat16 if config.encoder.param_dtype == "bfloat16" else config.encoder.param_dtype

    def read(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray | None:
        if name not in tensors:
            problems.append(f"{name} is missing")
            return None
        left.discard(name)
        array = np.asarray(tensors[name])
        array = array.T if transpose else array
        if array.shape != shape and (array.size != shape[0] or len(shape) > 1):  # theirs have [1, 1, D] for vectors
            problems.append(f"{name} has shape {tensors[name].shape}, which does not give {shape}")
            return None
        return array.reshape(shape).astype(dtype)

    tree = {}
    shapes = expected_shapes(config)
    for path, source in sources(config).items():
        shape = shapes[path]
        if "{layer}" in source.name:
            names = [source.name.format(layer=layer) for layer in range(shape[0])]
            arrays = [read(name, shape[1:], source.transpose) for name in names]
            tree[path] = None if any(a is None for a in arrays) else np.stack(arrays)
        else:
            tree[path] = read(source.name, shape, source.transpose)
    problems += [f"{name} is unknown" for name in sorted(left)]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"the tensors do not fit config.json: {'; '.join(problems[:8])}{more}.")
    return flax.traverse_util.unflatten_dict(tree)


def params_to(config: ReleasedConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors by name, from our parameter tree."""
    flat, found = flax.traverse_util.flatten_dict(params), {}
    for path, source in sources(config).items():
        array = np.asarray(flat[path])
        for layer in range(len(array)) if "{layer}" in source.name else [None]:
            one = array if layer is None else array[layer]
            if path[-1] in ("latent_query", "first_word"):
                one = one[None, None]
            found[source.name.format(layer=layer)] = np.ascontiguousarray(one.T if source.transpose else one)
    return found


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder of a released HAT: its config.json has the three modules."""
    options = Path(path) / "config.json"
    if not options.is_file():
        return False
    try:
        return all(f"{part}_config" in json.loads(options.read_text()) for part in PARTS)
    except ValueError:
        return False


def read_folder(folder: str | Path) -> tuple[ReleasedConfig, dict[str, Any]]:
    """Config and parameters from a folder with config.json and weights.

    Raises:
      FileNotFoundError: the folder, its config.json or its weights are missing.
      ValueError: they do not fit each other.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise FileNotFoundError(f"{folder} has no config.json of a HAT; give a folder with that and weights.")
    options = json.loads((folder / "config.json").read_text())
    dtype = options.get("torch_dtype", options.get("dtype", "float32"))
    config = read_config(options, "bfloat16" if dtype == "bfloat16" else "float32")
    return config, params_from(config, read_tensors(folder))


def task_and_data(config: ReleasedConfig) -> tuple[ReleasedModeling, WordText]:
    """To evaluate and train a model that was read: rows of 256 words, with room for 16 bytes a word."""
    task = ReleasedModeling(model=config, row_bytes=4096)
    data = WordText(length=256, batch_size=4, max_units=config.max_word_size, splitter=task.splitter)
    return task, data


def write_folder(
    folder: str | Path, config: ReleasedConfig, params: Mapping[str, Any], *, shard_bytes: int = 5 * 10**9
) -> Path:
    """Writes config.json and model.safetensors, or shards of at most so many bytes and their index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, params_to(config, params), shard_bytes)
    (folder / "config.json").write_text(json.dumps(config_json(config), indent=2) + "\n")
    return folder
