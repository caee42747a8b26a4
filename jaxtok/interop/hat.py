"""The folders of the released HAT models: config.json and safetensors, with the names of the authors' modules.

No file with QK norms was at hand; here they are `q_norm.weight` and `k_norm.weight` beside the projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.data.words import WordText
from jaxtok.interop.folders import FolderFormat, Options, dtype_of, stored_dtype
from jaxtok.interop.huggingface import rope_from_json, rope_to_json
from jaxtok.interop.tensors import Source, read_params, shapes_of, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.decoder import init_params
from jaxtok.lm.hat_released import ReleasedConfig, ReleasedHAT, ReleasedModeling
from jaxtok.nn.linear import LlamaStack
from jaxtok.protocols import Params

PARTS = ("encoder", "backbone", "decoder")


def read_config(options: Mapping[str, Any], dtype: str = "float32") -> ReleasedConfig:
    """Returns the config of the model that a config.json describes.

    Raises:
      ValueError: it has an option that the models here do not have.
    """
    qk_norm = bool(options.get("qk_norm", options.get("use_qk_norm", False)))

    def stack(part: str) -> LlamaStack:
        o = options[f"{part}_config"]
        if not o.get("is_neox_style", True):
            raise ValueError(f"{part}_config.is_neox_style is false; it must be true, for rotations of halves.")
        if o.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"{part}_config.hidden_act is {o['hidden_act']!r}; it must be silu.")
        heads, length = o["num_attention_heads"], o.get("max_position_embeddings", 8192)
        shared, own = o.get("num_key_value_heads") or heads, o["hidden_size"] // heads
        head_size, bias = o.get("head_dim") or own, o.get("attention_bias", False)
        base, scaling = rope_from_json(o, head_size, length)
        if scaling and scaling.kind == "llama3":
            scaling = dataclasses.replace(scaling, length=0)  # this kind does not use the length
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
    """Returns the content of a config.json."""

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
    """Returns our parameter paths to their tensors; {layer} stands for the layer's number."""
    found = {
        ("embedding",): Source("encoder.embedding_layer.weight"),
        ("head_matrix",): Source("lm_head.weight"),
        ("final_norm", "scale"): Source("layer_norm.weight"),
        ("connector", "latent_query"): Source("encoder_connector.latent_query", ones=2),
        ("first_word",): Source("decoder_connector.first_word_embedding", ones=2),
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


def params_from(config: ReleasedConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `read_params`."""
    one = jnp.zeros((1, 1), jnp.int32)
    shapes = shapes_of(lambda: init_params(ReleasedHAT(config), jax.random.key(0), one, one, one))
    return read_params(sources(config), shapes, tensors, dtype=dtype_of(config.encoder.param_dtype))


def params_to(config: ReleasedConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name, from our parameter tree."""
    return write_params(sources(config), params)


def task_and_data(
    config: ReleasedConfig, texts: Texts | None = None, options: Options | None = None
) -> tuple[ReleasedModeling, WordText]:
    """Returns task and data for a model that was read: rows of 256 words, with room for 16 bytes a word."""
    task = ReleasedModeling(model=config, row_bytes=4096)
    data = WordText(length=256, batch_size=8, max_units=config.max_word_size, splitter=task.splitter)
    return task, data


HAT = FolderFormat(
    name="hat",
    holds="the released HAT models",
    owns=lambda task: type(task) is ReleasedModeling,
    has=lambda options: all(isinstance(options.get(f"{part}_config"), dict) for part in PARTS),
    config_from=lambda options, tensors: read_config(options, stored_dtype(options)),
    options_of=config_json,
    params_from=params_from,
    params_to=params_to,
    task_and_data=task_and_data,
    has_texts=False,
)
read_folder, write_folder = HAT.read_model, HAT.write_model
