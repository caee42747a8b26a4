"""PEFT folders of LoRA adapters, in and out: adapter_config.json and adapter_model.safetensors.

For the models of `jaxtok.interop.huggingface`. PEFT keeps A [r, d_in] and B [d_out, r] of each module, and the
difference of its weight [d_out, d_in] is s B A; GPT-2's joint queries, keys and values are one module.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from jaxtok.interop.huggingface import Source, sources
from jaxtok.interop.tensors import expected_shapes
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.nn.lora import Site, flat, merge, nested
from jaxtok.protocols import Params
from jaxtok.weights import open_safetensors

_PREFIX = "base_model.model."
_MUST_BE_OFF = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "use_bdlora", "alora_invocation_tokens")
_MUST_BE_OFF += ("trainable_token_indices", "target_parameters", "velora_config", "kasa_config", "monteclora_config")


class Adapter(NamedTuple):
    """An adapter and where its differences are."""

    sites: tuple[Site, ...]
    params: Params
    """As `jaxtok.nn.lora` has it."""


def read_adapter(folder: str | Path, model: Any) -> Adapter:
    """The adapter in a PEFT folder, for a model's config.

    Raises:
      FileNotFoundError: the folder has no adapter_config.json or adapter_model.safetensors.
      ValueError: it is no LoRA adapter, has options that are not known here, or is for another model.
    """
    return adapter_from(model, *_read(folder))


def apply_adapter(folder: str | Path, model: Any, params: Params) -> tuple[Any, Params]:
    """A model's config and parameters with the adapter of a PEFT folder in them.

    Where the head is the embedding and the adapter is for one of the two, they come apart, as they do in PEFT.

    Raises:
      FileNotFoundError, ValueError: as `read_adapter`.
    """
    options, tensors = _read(folder)
    model, params = untie(model, params, tensors)
    sites, adapter = adapter_from(model, options, tensors)
    return model, merge(params, sites, adapter)


def untie(model: Any, params: Params, tensors: Mapping[str, Any]) -> tuple[Any, Params]:
    """The model with a head of its own, if its head is the embedding and the adapter's tensors are for one of them."""
    if not getattr(model, "tie_embeddings", False):
        return model, params
    tables = {_module(sources(model)[("embedding",)].name), "lm_head"}
    tables |= {name.split(".", 1)[-1] for name in tables}
    if not any(re.split(r"\.lora_|\.weight$", name.removeprefix(_PREFIX))[0] in tables for name in tensors):
        return model, params
    return dataclasses.replace(model, tie_embeddings=False), {**params, "head_matrix": params["embedding"]}


def adapter_from(model: Any, options: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Adapter:
    """`read_adapter`, from the contents of its two files.

    Raises:
      ValueError: as there.
    """
    if options.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type is {options['peft_type']!r}; only LORA can be read.")
    if wrong := [name for name in _MUST_BE_OFF if options.get(name)]:
        raise ValueError(f"{wrong[0]} is {options[wrong[0]]!r} in adapter_config.json; only plain LoRA can be read.")
    shapes, modules = expected_shapes(model), _modules(model)
    left = {name.removeprefix(_PREFIX) for name in tensors}
    tied = getattr(model, "tie_embeddings", getattr(model, "mask_head", False))

    def take(name: str) -> np.ndarray | None:
        base = name.removesuffix("weight") + "base_layer.weight"  # of a table with a difference, which PEFT may save
        for known in (name, name.split(".", 1)[1], base, base.split(".", 1)[1]):
            if known in left:
                left.remove(known)
                return np.asarray(tensors[_PREFIX + known if _PREFIX + known in tensors else known])
        return None

    sites, pairs = [], {}
    for module, paths in modules.items():
        shape = shapes[paths[0]]
        stack = len(shape) == 3
        rows, widths = shape[-2], tuple(shapes[path][-1] for path in paths)
        lookup, transposed = paths[0] == ("embedding",), paths[0] == ("head_matrix",)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        scales = {}
        for layer in range(shape[0]) if stack else [0]:
            name = module.format(layer=layer)
            parts = [take(f"{name}.lora_embedding_{x}" if lookup else f"{name}.lora_{x}.weight") for x in ("A", "B")]
            if all(part is None for part in parts):
                if targeted(name, options, linear=not lookup and not transposed):
                    raise ValueError(f"adapter_config.json targets {name}, of which the adapter has no tensors.")
                continue
            if lookup and tied:
                raise ValueError(f"{name} has a difference, but its table is also the head; `untie` the model first.")
            rank, scale = scale_of(name, options)
            a, b = parts
            wide, high = (rows, sum(widths)) if not transposed else (sum(widths), rows)  # d_in, d_out
            for part, letter, wanted in ((a, "A", (rank, wide)), (b, "B", (high, rank))):
                if part is None or part.shape != wanted:
                    had = "is missing" if part is None else f"has shape {part.shape}"
                    raise ValueError(f"lora_{letter} of {name} {had}; this model and rank need {wanted}.")
            found[layer] = (b, a) if transposed else (a.T, b.T)
            scales[layer] = scale
        if not found:
            continue
        rank = max(u.shape[1] for u, _ in found.values())
        count = shape[0] if stack else 1
        u = np.zeros((count, rows, rank), np.float32)
        v = np.zeros((count, rank, sum(widths)), np.float32)
        for layer, (first, second) in found.items():
            u[layer, :, : first.shape[1]], v[layer, : second.shape[0]] = first, second
        site = Site(
            paths=tuple("/".join(path) for path in paths),
            ranks=tuple(found[layer][0].shape[1] if layer in found else 0 for layer in range(count)),
            scales=tuple(scales.get(layer, 0.0) for layer in range(count)),
            widths=widths,
            lookup=lookup,
            transposed=transposed,
        )
        sites.append(site)
        pairs[site.name] = {"in": u, "out": v} if stack else {"in": u[0], "out": v[0]}
    saved = _saved(model, shapes, take)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ValueError(f"the adapter has {sorted(left)[0]}{more}, for which the model has no place.")
    if tied and ("embedding",) in saved:
        raise ValueError("the adapter saved the embedding, which is also the model's head; `untie` the model first.")
    return Adapter(tuple(sites), {"pairs": pairs, "saved": nested({"/".join(p): a for p, a in saved.items()})})


def _read(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; give a folder that PEFT has saved.")
    file = open_safetensors(folder / "adapter_model.safetensors")
    tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def write_adapter(
    folder: str | Path,
    model: Any,
    sites: Sequence[Site],
    adapter: Params,
    *,
    base: str = "",
    rslora: bool = False,
    dropout: float = 0.0,
) -> Path:
    """Writes a PEFT folder. Ranks and scales that differ between modules become patterns.

    Args:
      base: name of the model that the adapter is for.
      rslora: write alphas for the scaling alpha / sqrt(r).
      dropout: of the inputs, if somebody trains it on.

    Raises:
      ValueError: a part of a joint module has a difference of its own, or it is no model of Hugging Face's.
    """
    folder = Path(folder)
    options, tensors = adapter_to(model, sites, adapter, base=base, rslora=rslora)
    options["lora_dropout"] = dropout
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(options, indent=2) + "\n")
    return folder


def adapter_to(
    model: Any, sites: Sequence[Site], adapter: Params, *, base: str = "", rslora: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of the two files; the inverse of `adapter_from`.

    Raises:
      ValueError: as in `write_adapter`.
    """
    modules = {tuple("/".join(path) for path in paths): module for module, paths in _modules(model).items()}
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for site in sites:
        if site.paths not in modules:
            whole = next((paths for paths in modules if site.paths[0] in paths), None)
            told = f"target {', '.join(whole)} together" if whole else "it has no name for it"
            raise ValueError(f"{site.name} cannot be written for PEFT: {told}.")
        u, v = (np.asarray(adapter["pairs"][site.name][part], np.float32) for part in ("in", "out"))
        u, v = (u, v) if u.ndim == 3 else (u[None], v[None])
        for layer, (rank, scale) in enumerate(zip(site.ranks, site.scales)):
            if not rank:
                continue
            name = modules[site.paths].format(layer=layer)
            first, second = u[layer, :, :rank], v[layer, :rank]
            a, b = (second, first) if site.transposed else (first.T, second.T)
            for letter, array in (("A", a), ("B", b)):
                key = f"{name}.lora_embedding_{letter}" if site.lookup else f"{name}.lora_{letter}.weight"
                tensors[_PREFIX + key] = array
            ranks[name], alphas[name] = rank, scale * (math.sqrt(rank) if rslora else rank)
    by_path, saved, parts = sources(model), set(), {}
    for path, array in flat(adapter.get("saved", {})).items():
        source, array = by_path[tuple(path.split("/"))], np.asarray(array)
        for layer in range(model.num_layers) if "{layer}" in source.name else [0]:
            one = array[layer] if "{layer}" in source.name else array
            name = source.name.format(layer=layer)
            parts.setdefault(name, {})[source.part or 0] = one.T if source.transpose else one
            saved.add(_module(name))
    for name, arrays in parts.items():
        joined = [arrays[part] for part in sorted(arrays)]
        tensors[_PREFIX + name] = np.concatenate(joined, -1) if len(joined) > 1 else joined[0]
    rank = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
    options = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if isinstance(model, BertConfig) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "use_rslora": rslora,
        "use_dora": False,
        "fan_in_fan_out": isinstance(model, GPT2Config),
        "bias": "none",
        "inference_mode": True,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): _number(a) for name, a in alphas.items() if a != alpha},
    }
    return options, tensors


def targeted(name: str, options: Mapping[str, Any], linear: bool) -> bool:
    """Whether a module is one of the config's target_modules: in a list, by an expression, or all that are linear."""

    def matches(wanted: Any) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, name) is not None
        return any(name == one or name.endswith(f".{one}") for one in wanted or ())

    if (excluded := options.get("exclude_modules")) and matches(excluded):
        return False
    layers = options.get("layers_to_transform")
    if layers is not None:
        number = re.search(r"\.(\d+)\.", name)
        if number is None or int(number[1]) not in ([layers] if isinstance(layers, int) else layers):
            return False
    wanted = options.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return linear
    return matches(wanted)


def scale_of(name: str, options: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of a module and what its B A is multiplied by.

    A pattern holds for a module whose whole name, or the end of it behind a dot, it matches; the first one counts.

    Raises:
      ValueError: the rank is not positive.
    """

    def of(pattern: str, default: Any) -> Any:
        patterns = options.get(pattern) or {}
        return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)

    rank, alpha = of("rank_pattern", options.get("r", 8)), of("alpha_pattern", options.get("lora_alpha", 8))
    if rank < 1:
        raise ValueError(f"r is {rank} for {name} in adapter_config.json; it must be at least 1.")
    return rank, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _modules(model: Any) -> dict[str, list[tuple[str, ...]]]:
    """Names of modules with a matrix, with {layer}, to our paths: several, where one module is joint."""
    found: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for path, source in sources(model).items():
        if path[-1] in ("kernel", "embedding", "head_matrix"):
            found.setdefault(_module(source.name), []).append((source.part or 0, path))
    return {module: [path for _, path in sorted(paths)] for module, paths in found.items()}


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _saved(
    model: Any, shapes: Mapping[tuple[str, ...], tuple[int, ...]], take: Any
) -> dict[tuple[str, ...], np.ndarray]:
    """Parameters of which the adapter has the whole tensor."""
    found, tensors = {}, {}

    def array_of(source: Source, layer: int) -> np.ndarray | None:
        name = source.name.format(layer=layer)
        if name not in tensors:
            tensors[name] = take(name)
        array = tensors[name]
        if array is None:
            return None
        array = array if source.part is None else np.split(array, 3, axis=-1)[source.part]
        return array.T if source.transpose else array

    for path, source in sources(model).items():
        stacked = "{layer}" in source.name
        arrays = [array_of(source, layer) for layer in range(model.num_layers if stacked else 1)]
        if all(array is None for array in arrays):
            continue
        if any(array is None for array in arrays):
            raise ValueError(f"the adapter saved {source.name} of some layers only; all or none can be read.")
        found[path] = np.stack(arrays) if stacked else arrays[0]
        if found[path].shape != shapes[path]:
            raise ValueError(f"the adapter saved {source.name}, which does not give the model's {shapes[path]}.")
    return found


def _number(x: float) -> float | int:
    """An alpha as a whole number, where it is one but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-6 else x
