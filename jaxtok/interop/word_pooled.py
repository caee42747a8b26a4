"""Checkpoints of Learn Your Tokens in the authors' names (avi-jit/eTok): a folder of config.json and safetensors.

Their matrices are [out, in], and the encoder's queries, keys and values are packed into one. Reading a folder takes
the authors' hyper-parameters from its config.json: num_prefix (0: the plain model), n_embd, n_head, n_layer,
n_e2e_head, n_e2e_layer, block_size, canvas_size, vocab_size. Their Lightning checkpoints are pickles: save
`model.state_dict()` with safetensors first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtok.data.word_units import NormalizedText, WordUnitText
from jaxtok.interop.folders import FolderFormat, Options, dtype_of
from jaxtok.interop.tensors import Place, Source, read_params, shapes_of, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.word_pooled import PlainConfig, WordPooledConfig, WordPooling, init_params
from jaxtok.model import Model
from jaxtok.protocols import Params

Config = WordPooledConfig | PlainConfig

_BLOCK = {  # ours -> theirs; matrices are transposed
    ("norm_attention",): "ln1",
    ("norm_ffn",): "ln2",
    ("attention", "query"): "attn.query",
    ("attention", "key"): "attn.key",
    ("attention", "value"): "attn.value",
    ("attention", "output"): "attn.proj",
    ("ffn", "up"): "mlp.0",
    ("ffn", "down"): "mlp.2",
}
_ENCODER_LAYER = {
    ("norm_attention",): "norm1",
    ("norm_ffn",): "norm2",
    ("attention", "output"): "self_attn.out_proj",
    ("ffn", "up"): "linear1",
    ("ffn", "down"): "linear2",
}
_PACKED = ("query", "key", "value")


def config_from(official: Mapping[str, Any], **overrides: Any) -> Config:
    """Returns our config from the authors' hyper-parameters, with the three switches set as in their code.

    Raises:
      ValueError: a hyper-parameter is missing.
    """
    plain = not official.get("num_prefix", 4)
    names = ["n_embd", "n_head", "n_layer", "block_size", "vocab_size"]
    names += [] if plain else ["n_e2e_head", "n_e2e_layer", "canvas_size"]
    if missing := [name for name in names if name not in official]:
        raise ValueError(f"the config has no {missing[0]}; add it.")
    get = official.__getitem__
    shared = {
        "vocab_size": get("vocab_size"),
        "d_model": get("n_embd"),
        "num_layers": get("n_layer"),
        "num_heads": get("n_head"),
    }
    if plain:
        return PlainConfig(**shared | {"max_length": get("block_size"), "mlp_dim": 4 * get("n_embd")} | overrides)
    own = {
        "prefixes": official.get("num_prefix", 4),
        "encoder_heads": get("n_e2e_head"),
        "unit_layers": get("n_e2e_layer"),
        "max_words": get("block_size"),
        "max_units": get("canvas_size"),
        "prefix_ids": "official",
        "mask_pads": False,
        "loss_on_pads": True,
    }
    return WordPooledConfig(**shared | own | _switches(official) | overrides)


def config_to(config: Config) -> dict[str, Any]:
    """Returns the authors' hyper-parameters; what their code does not have is added under names with `jaxtok_`.

    Raises:
      ValueError: the plain model has positions or another MLP.
    """
    shared = {
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, PlainConfig):
        if config.learned_positions or config.rotary_fraction or config.tie_embeddings:
            raise ValueError(
                "the plain model has positions or a tied head; the authors' has neither, so this one cannot be written."
            )
        return {"num_prefix": 0, "block_size": config.max_length} | shared
    if config.encoder_mlp_dim != 2048:
        raise ValueError(f"encoder_mlp_dim is {config.encoder_mlp_dim}; it must be 2048, as in the authors' code.")
    return shared | {
        "num_prefix": config.prefixes,
        "n_e2e_head": config.encoder_heads,
        "n_e2e_layer": config.unit_layers,
        "block_size": config.max_words,
        "canvas_size": config.max_units,
        "jaxtok_prefix_ids": config.prefix_ids,
        "jaxtok_mask_pads": config.mask_pads,
        "jaxtok_loss_on_pads": config.loss_on_pads,
    }


def _switches(official: Mapping[str, Any]) -> dict[str, Any]:
    names = ("prefix_ids", "mask_pads", "loss_on_pads")
    return {name: official[f"jaxtok_{name}"] for name in names if f"jaxtok_{name}" in official}


def sources(config: Config) -> dict[Place, Source]:
    """Returns our parameter paths to the authors' tensors."""
    found = {
        ("final_norm", "scale"): Source("ln_f.weight"),
        ("final_norm", "bias"): Source("ln_f.bias"),
        ("head_matrix",): Source("head.weight"),
    }

    def stack(place: Place, theirs: str, parts: Mapping[Place, str]) -> None:
        for part, name in parts.items():
            first = "scale" if part[0].startswith("norm") else "kernel"
            prefix = f"{theirs}.{{layer}}.{name}"
            found[*place, *part, first] = Source(f"{prefix}.weight", transpose=first == "kernel")
            found[*place, *part, "bias"] = Source(f"{prefix}.bias")

    stack(("stack", "blocks"), "blocks", _BLOCK)
    if isinstance(config, PlainConfig):
        return found | {("embedding",): Source("in_emb.weight")}
    stack(("speller", "blocks"), "decoder_blocks", _BLOCK)
    stack(("encoder", "blocks"), "wordenc.layers", _ENCODER_LAYER)
    packed = "wordenc.layers.{layer}.self_attn.in_proj"
    for part, group in enumerate(_PACKED):
        place = ("encoder", "blocks", "attention", group)
        found[*place, "kernel"] = Source(f"{packed}_weight", transpose=True, part=part, axis=0)
        found[*place, "bias"] = Source(f"{packed}_bias", part=part, axis=0)
    return found | {
        ("embedding",): Source("in_emb.weight", part=0, axis=0),
        ("prefix_embedding",): Source("in_emb.weight", part=1, axis=0),
        ("unit_positions",): Source("in_pe", ones=1),
        ("word_positions",): Source("word_pe", ones=1),
    }


def params_to(config: Config, params: Params) -> dict[str, np.ndarray]:
    """Returns the authors' tensors by name, from our parameters (or their gradient)."""
    tensors = write_params(sources(config), params)
    if isinstance(config, PlainConfig):  # their model has these, but does not use them
        tensors["in_pe"] = np.zeros((1, config.max_length, config.d_model), tensors["head.weight"].dtype)
    return tensors


def params_from(config: Config, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameters from the authors' tensors by name, without their masks; raises as `read_params`."""

    def ignored(name: str) -> bool:
        return name.endswith("attn.mask") or (name == "in_pe" and isinstance(config, PlainConfig))

    shapes = shapes_of(lambda: init_params(config, jax.random.key(0)))
    return read_params(sources(config), shapes, tensors, dtype=dtype_of(config.param_dtype), ignored=ignored)


def task_and_data(config: Config, texts: Texts, options: Options) -> tuple[Any, Any]:
    """Returns task and data: rows of words for a pooled model, rows of tokens of the same words for the plain one."""
    rule = (options.get("jaxtok") or {}).get("rule", "paper")
    rows = {"tokenizer": texts.spec, "rule": rule, "length": min(256, config.max_length), "batch_size": 8}
    if isinstance(config, PlainConfig):
        return LanguageModeling(model=config), NormalizedText(**rows)
    task = WordPooling(model=config, tokenizer=texts.spec, rule=rule)
    return task, WordUnitText(**rows, max_units=config.max_units)


def owns(task: Any) -> bool:
    """Whether the task is that of Learn Your Tokens' model or of its authors' plain one."""
    return type(task) is WordPooling or (type(task) is LanguageModeling and isinstance(task.model, PlainConfig))


def facts(model: Model) -> dict[str, str]:
    """Returns the rule that tells what words are."""
    return {"rule": model.data.rule} if isinstance(model.data, WordUnitText | NormalizedText) else {}


WORD_POOLED = FolderFormat(
    name="word_pooled",
    holds="Learn Your Tokens",
    owns=owns,
    has=lambda options: {"n_embd", "block_size", "n_layer"} <= set(options) and "model_type" not in options,
    config_from=lambda options, tensors: config_from(options),
    options_of=config_to,
    params_from=params_from,
    params_to=params_to,
    task_and_data=task_and_data,
    facts=facts,
)
read_folder, write_folder = WORD_POOLED.read_model, WORD_POOLED.write_model
