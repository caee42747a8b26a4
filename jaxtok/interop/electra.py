"""ELECTRA's variables under the names of `google-research/electra` (TensorFlow 1), in and out, as arrays by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtok.interop.huggingface import Source, sources
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.electra import ElectraConfig, ReplacedTokens
from jaxtok.lm.masked_words import MaskedWords

Variables = Mapping[str, np.ndarray]


def variables(task: ReplacedTokens | MaskedWords) -> dict[tuple[str, ...], tuple[str, int]]:
    """Our parameter paths to their names, in which `{layer}` stands for the layer's number, and how many layers.

    Raises:
      ValueError: the task has parameters that are not theirs.
    """
    if isinstance(task, MaskedWords):
        return _names(task.model, "electra")
    if task.objective not in ("replaced", "electric"):
        raise ValueError(f"objective is {task.objective!r}; the authors' code has replaced and electric.")
    found = {("discriminator", *path): name for path, name in _names(task.discriminator_config, "electra").items()}
    if task.generator == "uniform":
        return found
    if task.generator == "encoder":
        towers = {("generator",): (task.generator_config, "generator")}
    else:
        left, right = task.generator_config, dataclasses.replace(task.generator_config, mask_head=False)
        towers = {("generator", "left"): (left, "generator_ltr"), ("generator", "right"): (right, "generator_rtl")}
    for place, (config, scope) in towers.items():
        found |= {(*place, *path): name for path, name in _names(config, scope).items() if task.owns(path[0])}
    return found


def _names(config: BertConfig, scope: str) -> dict[tuple[str, ...], tuple[str, int]]:
    if not isinstance(config, ElectraConfig):
        raise ValueError(f"the model is a {type(config).__name__}; the authors' code has ElectraConfig.")
    return {path: (_name(source, scope), config.num_layers) for path, source in sources(config).items()}


def _name(source: Source, scope: str) -> str:
    name = source.name.replace("generator_lm_head.bias", "generator_predictions.output_bias")
    name = name.replace("dense_prediction.", "dense_1.").replace("layer.{layer}", "layer_{layer}")
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    name = name.replace("_embeddings.weight", "_embeddings").replace(".weight", ".kernel")
    first, *rest = name.split(".")
    return "/".join([scope if first == "electra" else first, *rest])


def from_official(task: ReplacedTokens | MaskedWords, theirs: Variables) -> dict[str, Any]:
    """Our parameter tree from their variables; those of the optimizer are left out.

    Raises:
      ValueError: a variable is missing or unknown.
    """
    names = variables(task)
    known = {name.format(layer=k) for name, layers in names.values() for k in range(layers)}
    there = {name for name in theirs if not name.endswith(("/adam_m", "/adam_v")) and name != "global_step"}
    if problems := sorted(known - there) + sorted(there - known):
        kind = "missing" if problems[0] in known else "unknown"
        raise ValueError(f"of the variables, {problems[0]} is {kind}; give those of a task with these options.")
    tree: dict[str, Any] = {}
    for path, (name, layers) in names.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        stacked = "{layer}" in name
        node[path[-1]] = np.stack([theirs[name.format(layer=k)] for k in range(layers)]) if stacked else theirs[name]
    return tree


def to_official(task: ReplacedTokens | MaskedWords, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their variables from our parameter tree."""
    found = {}
    for path, (name, layers) in variables(task).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        if "{layer}" in name:
            found |= {name.format(layer=k): np.asarray(leaf[k]) for k in range(layers)}
        else:
            found[name] = np.asarray(leaf)
    return found
