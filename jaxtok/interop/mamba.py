"""Hugging Face folders of Mamba, and the authors' original ones, which differ in a few names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.interop.folders import FolderFormat, Options, is_tied, read_hub_params, stored_dtype
from jaxtok.interop.huggingface import facts, task_and_data
from jaxtok.interop.tensors import Place, Shapes, Source, shapes_of, write_params
from jaxtok.lm.decoder import init_params
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.mamba import Mamba, MambaConfig
from jaxtok.protocols import Params

HEAD = "lm_head.weight"
EMBEDDING, ORIGINAL = "backbone.embeddings.weight", "backbone.embedding.weight"
MIXER = "backbone.layers.{layer}.mixer."


def sources(config: MambaConfig) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors."""
    tied = (HEAD,) if config.tie_embeddings else ()
    block = ("stack", "blocks")
    mixer = (*block, "mixer")
    found = {
        ("embedding",): Source(EMBEDDING, also=(ORIGINAL, *tied)),
        ("final_norm", "scale"): Source("backbone.norm_f.weight"),
        (*block, "norm", "scale"): Source("backbone.layers.{layer}.norm.weight"),
    }
    return found | mixer_sources(config, mixer) | ({} if tied else {("head_matrix",): Source(HEAD)})


def mixer_sources(config: MambaConfig, at: Place) -> dict[Place, Source]:
    """Returns the parameters of the mixers at a path to their tensors."""
    return mixer_names(MIXER, at, {"forward": ""}, config.use_bias, config.use_conv_bias)


def mixer_names(
    prefix: str, at: Place, directions: Mapping[str, str], use_bias: bool = False, use_conv_bias: bool = True
) -> dict[Place, Source]:
    """Returns the parameters of the mixers at a path to their tensors.

    Args:
      prefix: what comes before the names of a mixer's tensors.
      directions: our names of the orders in which it reads, and the ends of the names of theirs.
    """
    found = {
        (*at, "value"): Source(f"{prefix}in_proj.weight", transpose=True, part=0, axis=0),
        (*at, "gate"): Source(f"{prefix}in_proj.weight", transpose=True, part=1, axis=0),
        (*at, "output"): Source(f"{prefix}out_proj.weight", transpose=True),
    }
    for name, end in directions.items():
        own = (*at, name)
        found |= {
            (*own, "conv"): Source(f"{prefix}conv1d{end}.weight", transpose=True),
            (*own, "selection"): Source(f"{prefix}x_proj{end}.weight", transpose=True),
            (*own, "steps"): Source(f"{prefix}dt_proj{end}.weight", transpose=True),
            (*own, "steps_bias"): Source(f"{prefix}dt_proj{end}.bias"),
            (*own, "a_log"): Source(f"{prefix}A{end}_log"),
            (*own, "skip"): Source(f"{prefix}D{end}"),
        }
        if use_conv_bias:
            found[*own, "conv_bias"] = Source(f"{prefix}conv1d{end}.bias")
    if use_bias:
        found[*at, "value_bias"] = Source(f"{prefix}in_proj.bias", part=0)
        found[*at, "gate_bias"] = Source(f"{prefix}in_proj.bias", part=1)
        found[*at, "output_bias"] = Source(f"{prefix}out_proj.bias")
    return found


def config_from(options: Options, tensors: Mapping[str, np.ndarray] | None = None) -> MambaConfig:
    """Returns our config from a config.json of either kind; a key that is absent has Hugging Face's default.

    Args:
      tensors: if given, they tell whether the head is the embedding.

    Raises:
      ValueError: it is another kind of model, or has an option that the models here do not have.
    """
    kind, own = options.get("model_type", "mamba"), options.get("ssm_cfg") or {}
    if kind != "mamba" or own.get("layer", "Mamba1") != "Mamba1":
        more = "; its norms of B, C and the steps are not here" if kind == "falcon_mamba" else ""
        raise ValueError(f"the model is a {own.get('layer', kind)}{more}; it must be a mamba (Mamba-1).")
    if (activation := options.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}; it must be silu.")
    if options.get("rms_norm", True) is not True or options.get("attn_layer_idx"):
        raise ValueError("the model has layers of attention or norms other than RMS; it must have neither.")

    def get(*names: str, default: Any) -> Any:
        return next((options[name] for name in names if options.get(name) is not None), default)

    rank = own.get("dt_rank", get("time_step_rank", default="auto"))
    vocab, multiple = get("vocab_size", default=50280), options.get("pad_vocab_size_multiple", 1)
    config = MambaConfig(
        num_layers=get("num_hidden_layers", "n_layer", default=32),
        d_model=get("hidden_size", "d_model", default=768),
        state_size=own.get("d_state", get("state_size", default=16)),
        conv_kernel=own.get("d_conv", get("conv_kernel", default=4)),
        expand=float(own.get("expand", get("expand", default=2))),
        time_step_rank=0 if rank == "auto" else rank,
        use_bias=get("use_bias", default=False),
        use_conv_bias=get("use_conv_bias", default=True),
        time_step_min=float(get("time_step_min", default=0.001)),
        time_step_max=float(get("time_step_max", default=0.1)),
        time_step_floor=float(get("time_step_floor", default=1e-4)),
        time_step_scale=float(get("time_step_scale", default=1.0)),
        vocab_size=-(-vocab // multiple) * multiple,
        max_length=get("max_position_embeddings", default=2048),
        norm_eps=float(get("layer_norm_epsilon", default=1e-5)),
        residual_in_float32=get("residual_in_fp32", default=True),
        init_std=float(get("initializer_range", default=0.02)),
        tie_embeddings=get("tie_word_embeddings", "tie_embeddings", default=True),
        param_dtype=stored_dtype(options),
    )
    if tensors is None:
        return config
    return dataclasses.replace(
        config, tie_embeddings=is_tied(tensors, HEAD, (EMBEDDING, ORIGINAL), config.tie_embeddings)
    )


def options_of(config: MambaConfig) -> dict[str, Any]:
    """Returns the content of a config.json."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.channels,
        "state_size": config.state_size,
        "conv_kernel": config.conv_kernel,
        "expand": int(config.expand) if config.expand == int(config.expand) else config.expand,
        "time_step_rank": config.time_step_rank or "auto",
        "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "time_step_min": config.time_step_min,
        "time_step_max": config.time_step_max,
        "time_step_floor": config.time_step_floor,
        "time_step_scale": config.time_step_scale,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_float32,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
    }


def shapes(config: MambaConfig) -> Shapes:
    """Returns our parameter paths to shapes."""
    return shapes_of(lambda: init_params(Mamba(config), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


def params_from(config: MambaConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `jaxtok.interop.tensors.read_params`.

    Rates and skips are float32 whatever the rest is.
    """
    copies = (HEAD,) if config.tie_embeddings else ()
    params = read_hub_params(sources(config), shapes(config), tensors, dtype=config.param_dtype, copies=copies)
    forward = params["stack"]["blocks"]["mixer"]["forward"]
    forward |= {name: np.asarray(forward[name], np.float32) for name in ("a_log", "skip")}
    return params


def params_to(config: MambaConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name, from our parameter tree or one of its form (a gradient)."""
    tensors = write_params(sources(config), params)
    return {name: x[:, None] if name.endswith("conv1d.weight") else x for name, x in tensors.items()}


MAMBA = FolderFormat(
    name="mamba",
    holds="Mamba",
    owns=lambda task: type(task) is LanguageModeling and isinstance(task.model, MambaConfig),
    has=lambda options: options.get("model_type") in ("mamba", "falcon_mamba") or "ssm_cfg" in options,
    config_from=config_from,
    options_of=options_of,
    params_from=params_from,
    params_to=params_to,
    task_and_data=task_and_data,
    facts=facts,
)
