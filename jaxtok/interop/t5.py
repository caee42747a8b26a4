"""T5, mT5, ByT5 and MrT5 in the layout of Hugging Face and of MrT5's authors: names of tensors and of options."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.interop.folders import FolderFormat, Options, read_hub_params, stored_dtype
from jaxtok.interop.tensors import Shapes, Source, shapes_of, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.mrt5 import MrT5Config, MrT5Training, new_controller, without_controller
from jaxtok.lm.mrt5_baselines import Convolution, FixedDeletion, RandomDeletion, Segments
from jaxtok.lm.t5 import SequenceToSequence, T5Config, init_params
from jaxtok.model import Model
from jaxtok.protocols import Params

KINDS = ("t5", "mt5", "mrt5")
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

_ACTIVATIONS = {  # as `feed_forward_proj` names them: theirs -> ours
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def sources(config: T5Config) -> dict[tuple[str, ...], Source]:
    """Returns our parameter paths to their tensors."""
    also = COPIES + ((HEAD,) if config.tie_embeddings else ())
    found = {("embedding",): Source(EMBEDDING, also=also)}
    if not config.tie_embeddings:
        found[("head_matrix",)] = Source(HEAD)
    first = config.gate_layer if isinstance(config, MrT5Config) else 0
    parts = {("decoder", "stack"): 0, ("encoder", "stack"): 0}
    if isinstance(config, MrT5Config):
        parts = {("decoder", "stack"): 0, ("encoder", "rest"): first} | ({("encoder", "stack"): 0} if first else {})
    for (side, stack), offset in parts.items():
        found |= _block_sources(config, side, stack, offset)
    for side in ("encoder", "decoder"):
        attention = f"{side}.block.0.layer.0.SelfAttention"
        found[side, "relative_bias", "table"] = Source(f"{attention}.relative_attention_bias.weight")
        found[side, "final_norm", "scale"] = Source(f"{side}.final_layer_norm.weight")
    if isinstance(config, MrT5Config):
        found |= _reduction_sources(config, f"encoder.block.{first}.")
    return found


def _block_sources(config: T5Config, side: str, stack: str, offset: int) -> dict[tuple[str, ...], Source]:
    names = {"attention": "SelfAttention"} | ({"cross": "EncDecAttention"} if side == "decoder" else {})
    found = {}
    for number, (part, theirs) in enumerate(names.items()):
        layer = f"{side}.block.{{layer}}.layer.{number}."
        for group in ("query", "key", "value", "output"):
            source = Source(f"{layer}{theirs}.{group[0]}.weight", transpose=True, first=offset)
            found[side, stack, "blocks", part, group, "kernel"] = source
        found[side, stack, "blocks", f"norm_{part}", "scale"] = Source(f"{layer}layer_norm.weight", first=offset)
    layer = f"{side}.block.{{layer}}.layer.{len(names)}."
    wide = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    for ours, theirs in (wide | {"down": "wo"}).items():
        source = Source(f"{layer}DenseReluDense.{theirs}.weight", transpose=True, first=offset)
        found[side, stack, "blocks", "ffn", ours, "kernel"] = source
    found[side, stack, "blocks", "norm_ffn", "scale"] = Source(f"{layer}layer_norm.weight", first=offset)
    return found


def _reduction_sources(config: MrT5Config, block: str) -> dict[tuple[str, ...], Source]:
    if config.reduction == "gate":
        at, theirs = ("encoder", "delete_gate"), f"{block}delete_gate."
        norm = {(*at, "norm", "scale"): Source(f"{theirs}layer_norm.weight")} if config.gate_norm else {}
        return norm | {
            (*at, "kernel"): Source(f"{theirs}feed_forward.weight", transpose=True),
            (*at, "bias"): Source(f"{theirs}feed_forward.bias"),
        }
    if config.reduction == "boundaries":
        at, theirs = ("encoder", "boundary_predictor"), f"{block}boundary_predictor.boundary_predictor."
        return {
            (*at, "norm", "scale"): Source(f"{block}down_ln.weight"),
            (*at, "up_kernel"): Source(f"{theirs}0.weight", transpose=True),
            (*at, "up_bias"): Source(f"{theirs}0.bias"),
            (*at, "down_kernel"): Source(f"{theirs}2.weight", transpose=True),
            (*at, "down_bias"): Source(f"{theirs}2.bias"),
        }
    if config.reduction == "convolution":
        at = ("encoder", "convolution")
        return {
            (*at, "norm", "scale"): Source(f"{block}down_ln.weight"),
            (*at, "kernel"): Source(f"{block}downsampling_module.conv.weight", transpose=True),  # [out, in, place]
            (*at, "bias"): Source(f"{block}downsampling_module.conv.bias"),
        }
    return {}


def read_config(options: Mapping[str, Any], tensors: Mapping[str, Any]) -> T5Config:
    """Returns our config from a config.json; the tensors tell whether the head is the embedding.

    Options of MrT5 or of one of its baselines make a `MrT5Config`, whatever model_type is.

    Raises:
      ValueError: it has an option that the models here do not have.
    """
    kind = options.get("model_type", "t5")

    def get(name: str, default: Any) -> Any:
        value = options.get(name)
        return default if value is None else value

    if get("has_absolute_position_embeddings", False):
        raise ValueError("has_absolute_position_embeddings is true; it must be false, for relative positions.")
    small = kind == "mt5"
    projection = get("feed_forward_proj", "gated-gelu" if small else "relu")
    gated, name = projection.startswith("gated-"), projection.removeprefix("gated-")
    name = "gelu_new" if projection == "gated-gelu" else name
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj is {projection!r}; it must be one of {', '.join(_ACTIVATIONS)}, also after 'gated-'."
        )
    scaled = get("scale_decoder_outputs", get("tie_word_embeddings", True)) and kind != "mt5"
    rate = float(get("dropout_rate", 0.1))
    layers = get("num_layers", 8 if small else 6)
    fields: dict[str, Any] = dict(
        num_layers=layers,
        decoder_layers=get("num_decoder_layers", layers),
        d_model=get("d_model", 512),
        num_heads=get("num_heads", 6 if small else 8),
        head_size=get("d_kv", 64),
        mlp_dim=get("d_ff", 1024 if small else 2048),
        activation=_ACTIVATIONS[name],
        gated=gated,
        vocab_size=get("vocab_size", 250112 if small else 32128),
        tie_embeddings=_is_tied(tensors),
        scale_outputs=bool(scaled),
        relative_buckets=get("relative_attention_num_buckets", 32),
        relative_distance=get("relative_attention_max_distance", 128),
        norm_eps=float(get("layer_norm_epsilon", 1e-6)),
        softmax1=get("use_softmax1", False),
        pad_id=get("pad_token_id", 0),
        eos_id=get("eos_token_id", 1),
        dropout=rate,
        attention_dropout=rate,
        mlp_dropout=rate,
        param_dtype=stored_dtype(options),
    )
    if (start := get("decoder_start_token_id", fields["pad_id"])) != fields["pad_id"]:
        raise ValueError(f"decoder_start_token_id is {start}; it must be pad_token_id = {fields['pad_id']}.")
    if "boundary_predictor_layer" in options:
        return Segments(
            **fields,
            gate_layer=options["boundary_predictor_layer"],
            temperature=float(get("temperature", 0.5)),
            prior=float(get("prior", 0.2)),
            mask_surplus=get("mask_surplus", False),
        )
    if "downsampling_layer" in options:
        layer, stride = options["downsampling_layer"], get("downsampling_rate", 4)
        return Convolution(**fields, gate_layer=layer, stride=stride)
    if "delete_gate_layer" not in options and kind != "mrt5":
        return T5Config(**fields)
    deletion = get("deletion_type", "scaled_sigmoid")
    kinds: dict[str, functools.partial[MrT5Config]] = {
        "scaled_sigmoid": functools.partial(MrT5Config, gate="sigmoid"),
        "log_sigmoid": functools.partial(MrT5Config, gate="log_sigmoid"),
        "random": functools.partial(RandomDeletion, amount=get("random_deletion_probability", 0.5)),
        "fixed": functools.partial(FixedDeletion, amount=get("fixed_deletion_amount", 0.5)),
    }
    if deletion not in kinds:
        raise ValueError(f"deletion_type is {deletion!r}; it must be one of {', '.join(kinds)}.")
    scale = float(get("sigmoid_mask_scale", -10.0))
    return kinds[deletion](
        **fields,
        gate_layer=get("delete_gate_layer", 2),
        gate_scale=scale,
        threshold=float(get("deletion_threshold", -0.7 if deletion == "log_sigmoid" else scale / 2)),
        gate_norm=get("gate_layer_norm", True),
        gumbel_noise=get("use_gumbel_noise", False),
    )


def _is_tied(tensors: Mapping[str, Any]) -> bool:
    embedding = next((name for name in (EMBEDDING, *COPIES) if name in tensors), None)
    return HEAD not in tensors or embedding is None or np.array_equal(tensors[HEAD], tensors[embedding])


def config_json(config: T5Config) -> dict[str, Any]:
    """Returns the content of a config.json."""
    name = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[config.activation]
    if config.gated:  # theirs reads gated-gelu as gelu_new, so the exact one needs its other name
        name = "gated-" + {"gelu_new": "gelu", "gelu": "gelu_python"}.get(name, name)
    reduces = isinstance(config, MrT5Config)
    options = {
        "architectures": ["MrT5ForConditionalGeneration" if reduces else "T5ForConditionalGeneration"],
        "model_type": "mrt5" if reduces else "t5",
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers or config.num_layers,
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "feed_forward_proj": name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_outputs,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps or 1e-6,
        "dropout_rate": config.dropout,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.pad_id,
        "is_encoder_decoder": True,
        "torch_dtype": config.param_dtype,
    }
    if config.softmax1:
        options["use_softmax1"] = True
    if not reduces:
        return options
    if config.reduction == "nothing":
        raise ValueError("reduction is nothing, for which the authors have no layout; it must be another one.")
    if config.reduction == "boundaries":
        return options | {
            "boundary_predictor_layer": config.gate_layer,
            "boundary_predictor_type": "gumbel",
            "temperature": config.temperature,
            "prior": config.prior,
            "mask_surplus": config.mask_surplus,
        }
    if config.reduction == "convolution":
        return options | {"downsampling_layer": config.gate_layer, "downsampling_rate": config.stride}
    kinds = {"gate": {"sigmoid": "scaled_sigmoid", "log_sigmoid": "log_sigmoid"}[config.gate]}
    amounts = {"random": "random_deletion_probability", "fixed": "fixed_deletion_amount"}
    return options | {
        "deletion_type": kinds.get(config.reduction, config.reduction),
        "sigmoid_mask_scale": config.gate_scale,
        "deletion_threshold": config.threshold,
        "delete_gate_layer": config.gate_layer,
        "gate_layer_norm": config.gate_norm,
        "use_gumbel_noise": config.gumbel_noise,
        **({amounts[config.reduction]: config.amount} if config.reduction in amounts else {}),
    }


def shapes(config: T5Config) -> Shapes:
    """Returns parameter paths to shapes."""
    return shapes_of(lambda: init_params(config, jax.random.key(0)))


def params_from(config: T5Config, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `read_params`."""
    table, tied = sources(config), config.tie_embeddings
    return read_hub_params(table, shapes(config), tensors, dtype=config.param_dtype, tied=tied)


def task_and_data(config: T5Config, texts: Texts, options: Options) -> tuple[SequenceToSequence, SpanCorruption]:
    """Returns the task, and span corruption with the tokenizer's sentinels as its data.

    Raises:
      ValueError: the tokenizer has none.
    """
    sentinels = {}
    if (first := (options.get("jaxtok") or {}).get("first_sentinel")) is not None:
        sentinels["first_sentinel"] = first
    elif Path(texts.spec).suffix == ".json":
        sentinels["first_sentinel"] = first_sentinel(texts.spec)
    data = SpanCorruption(tokenizer=texts.spec, length=min(1024, config.max_length), batch_size=8, **sentinels)
    return (MrT5Training if isinstance(config, MrT5Config) else SequenceToSequence)(model=config), data


def first_sentinel(file: str | Path) -> int:
    """Returns the id of <extra_id_0> in a tokenizer.json, from which T5's sentinels count down.

    Raises:
      ValueError: the tokenizer has none.
    """
    found = tokenizers.Tokenizer.from_file(str(file)).token_to_id("<extra_id_0>")
    if found is None:
        raise ValueError(f"{file} has no token <extra_id_0>; give the tokenizer that the model was trained with.")
    return found


def facts(model: Model) -> dict[str, int]:
    """Returns the first sentinel of a model's data."""
    data = model.data
    return {"first_sentinel": data.first_sentinel} if isinstance(data, SpanCorruption) else {}


def model_of(task: SequenceToSequence, params: Params) -> tuple[T5Config, Params]:
    """Returns config and parameters, without a controller's state."""
    return task.model, without_controller(params)


def params_of(task: SequenceToSequence, params: Params) -> Params:
    """Returns a task's parameters, with the model that was read and a new controller if it has one."""
    return {**params, "controller": new_controller()} if isinstance(task, MrT5Training) and task.target_rate else params


T5 = FolderFormat(
    name="t5",
    holds="T5, mT5, ByT5 and MrT5",
    owns=lambda task: type(task) in (SequenceToSequence, MrT5Training),
    has=lambda options: options.get("model_type") in KINDS,
    config_from=read_config,
    options_of=config_json,
    params_from=params_from,
    params_to=lambda config, params: write_params(sources(config), params),
    task_and_data=task_and_data,
    model_of=model_of,
    params_of=params_of,
    facts=facts,
    default_tokenizer="byt5",
)
