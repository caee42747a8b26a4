"""PEFT folders of LoRA adapters: adapter_config.json and adapter_model.safetensors.

They are for the models of `jaxtok.interop.huggingface`. The `Format` reads a folder as its base model with the
differences added.
PEFT keeps A [r, d_in] and B [d_out, r] of each module, and the difference of its weight [d_out, d_in] is s B A; the
joint queries, keys and values of GPT-2 are one module.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from jaxtok.interop.folders import read_options
from jaxtok.interop.huggingface import HUB, shapes, sources
from jaxtok.interop.tensors import Shapes, read_params, whole_folder, write_params
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.model import Model
from jaxtok.nn.lora import Site, find_sites, flat, merge, nested
from jaxtok.protocols import FROZEN, Params
from jaxtok.transfer.lora import Lora
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
    """Reads the adapter in a PEFT folder, for a model's config.

    Raises:
      FileNotFoundError: the folder has no adapter_config.json or adapter_model.safetensors.
      ValueError: it is not a LoRA adapter, has options that are not known here, or is for another model.
    """
    return adapter_from(model, *_read(folder))


def apply_adapter(folder: str | Path, model: Any, params: Params) -> tuple[Any, Params]:
    """Returns a model's config and parameters with the adapter of a PEFT folder added.

    If the head is the embedding and the adapter is for only one of them, they become two tables, as in PEFT.

    Raises:
      FileNotFoundError, ValueError: as `read_adapter`.
    """
    options, tensors = _read(folder)
    model, params = untie(model, params, tensors)
    sites, adapter = adapter_from(model, options, tensors)
    return model, merge(params, sites, adapter)


def untie(model: Any, params: Params, tensors: Mapping[str, Any]) -> tuple[Any, Params]:
    """Gives the model its own head if its head is the embedding and the adapter's tensors are for one of them."""
    if not getattr(model, "tie_embeddings", False):
        return model, params
    tables = {_module(sources(model)[("embedding",)].name), "lm_head"}
    tables |= {name.split(".", 1)[-1] for name in tables}
    if not any(re.split(r"\.lora_|\.weight$", name.removeprefix(_PREFIX))[0] in tables for name in tensors):
        return model, params
    return dataclasses.replace(model, tie_embeddings=False), {**params, "head_matrix": params["embedding"]}


def adapter_from(model: Any, options: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Adapter:
    """Returns what `read_adapter` returns, from the contents of the two files.

    Raises:
      ValueError: as there.
    """
    if options.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type is {options['peft_type']!r}; it must be LORA.")
    if wrong := [name for name in _MUST_BE_OFF if options.get(name)]:
        raise ValueError(
            f"{wrong[0]} is {options[wrong[0]]!r} in adapter_config.json; it must be off, as in plain LoRA."
        )
    sizes, modules = shapes(model), _modules(model)
    left = {name.removeprefix(_PREFIX) for name in tensors}
    tied = getattr(model, "tie_embeddings", getattr(model, "mask_head", False))

    def take(name: str) -> np.ndarray | None:
        base = name.removesuffix("weight") + "base_layer.weight"  # PEFT may save a table that has a difference
        for known in (name, name.split(".", 1)[1], base, base.split(".", 1)[1]):
            if known in left:
                left.remove(known)
                return np.asarray(tensors[_PREFIX + known if _PREFIX + known in tensors else known])
        return None

    sites, pairs = [], {}
    for module, paths in modules.items():
        shape = sizes[paths[0]]
        stack = len(shape) == 3
        rows, widths = shape[-2], tuple(sizes[path][-1] for path in paths)
        lookup, transposed = paths[0] == ("embedding",), paths[0] == ("head_matrix",)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        scales = {}
        for layer in range(shape[0]) if stack else [0]:
            name = module.format(layer=layer)
            parts = [take(f"{name}.lora_embedding_{x}" if lookup else f"{name}.lora_{x}.weight") for x in ("A", "B")]
            if all(part is None for part in parts):
                if targeted(name, options, linear=not lookup and not transposed):
                    raise ValueError(f"adapter_config.json targets {name}, but the adapter has no tensors of it.")
                continue
            if lookup and tied:
                raise ValueError(f"{name} has a difference, but its table is also the head; `untie` the model first.")
            rank, scale = scale_of(name, options)
            a, b = parts
            wide, high = (rows, sum(widths)) if not transposed else (sum(widths), rows)  # d_in, d_out
            for part, letter, wanted in ((a, "A", (rank, wide)), (b, "B", (high, rank))):
                if part is None or part.shape != wanted:
                    state = "is missing" if part is None else f"has shape {part.shape}"
                    raise ValueError(f"lora_{letter} of {name} {state}; this model and rank need {wanted}.")
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
    saved = _saved(model, sizes, take)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ValueError(f"the adapter has {sorted(left)[0]}{more}, which the model does not have.")
    if tied and "embedding" in saved:
        raise ValueError("the adapter saved the embedding, which is also the model's head; `untie` the model first.")
    return Adapter(tuple(sites), {"pairs": pairs, "saved": saved})


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
      base: the name of the model that the adapter is for.
      rslora: write alphas for the scaling alpha / sqrt(r).
      dropout: the dropout of the inputs, for further training.

    Raises:
      ValueError: a part of a joint module has its own difference, or Hugging Face does not have the model.
    """
    folder = Path(folder)
    options, tensors = adapter_to(model, sites, adapter, base=base, rslora=rslora)
    options["lora_dropout"] = dropout
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with whole_folder(folder) as half_done:
        safetensors.numpy.save_file(arrays, half_done / "adapter_model.safetensors", metadata={"format": "pt"})
        (half_done / "adapter_config.json").write_text(json.dumps(options, indent=2) + "\n")
    return folder


def adapter_to(
    model: Any, sites: Sequence[Site], adapter: Params, *, base: str = "", rslora: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the contents of the two files; the inverse of `adapter_from`.

    Raises:
      ValueError: as in `write_adapter`.
    """
    modules = {tuple("/".join(path) for path in paths): module for module, paths in _modules(model).items()}
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for site in sites:
        if site.paths not in modules:
            whole = next((paths for paths in modules if site.paths[0] in paths), None)
            reason = f"target {', '.join(whole)} together" if whole else "PEFT has no name for it"
            raise ValueError(f"{site.name} cannot be written for PEFT; {reason}.")
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
    table, saved = sources(model), flat(adapter.get("saved", {}))
    whole = write_params({path: table[path] for path in (tuple(name.split("/")) for name in saved)}, nested(saved))
    tensors |= {_PREFIX + name: array for name, array in whole.items()}
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
        "modules_to_save": sorted(map(_module, whole)) or None,
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
    """Returns the rank of a module and the factor of its B A.

    A pattern holds for a module if it matches the whole name, or its end after a dot; the first one counts.

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
    """Returns the names of modules with a matrix, with {layer}, and our paths; a joint module has several."""
    found: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for path, source in sources(model).items():
        if path[-1] in ("kernel", "embedding", "head_matrix"):
            found.setdefault(_module(source.name), []).append((source.part or 0, path))
    return {module: [path for _, path in sorted(paths)] for module, paths in found.items()}


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _saved(model: Any, sizes: Shapes, take: Callable[[str], np.ndarray | None]) -> Params:
    """Returns the parameters of which the adapter has the whole tensor."""
    table, tensors = {}, {}
    for path, source in sources(model).items():
        layers = range(model.num_layers) if "{layer}" in source.name else [0]
        names = [source.name.format(layer=source.first + layer) for layer in layers]
        found = {name: array for name in names if (array := tensors.get(name, take(name))) is not None}
        if found and len(found) < len(names):
            raise ValueError(f"the adapter saved {source.name} of some layers only; all or none can be read.")
        if found:
            table[path] = source
            tensors |= found
    try:
        return read_params(table, {path: sizes[path] for path in table}, tensors)
    except ValueError as error:
        raise ValueError(f"the adapter saved whole tensors that are not the model's: {error}") from error


def _number(x: float) -> float | int:
    """Returns an alpha as a whole number, if it is one but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-6 else x


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """The format; from a task that trains an adapter (`jaxtok.transfer.lora.Lora`), it writes only the adapter."""

    name: str = "peft"
    holds: str = "LoRA adapters"
    is_file: bool = False

    def owns(self, task: Any) -> bool:
        return isinstance(task, Lora) and any(form.owns(task.task) for form in HUB)

    def recognises(self, path: Path) -> bool:
        return (Path(path) / "adapter_config.json").is_file()

    def read(self, path: Path, like: Any = None, *, base: str = "") -> Model:
        """Returns the base model with the adapter added.

        Args:
          path: the adapter's folder.
          like: as for the base's format.
          base: the base's folder; default: the one that adapter_config.json names.

        Raises:
          FileNotFoundError: there is no folder of the base, or a file is missing.
          ValueError: as `read_adapter`.
        """
        options, _ = _read(path)
        named = base or options.get("base_model_name_or_path") or ""
        folder = next((place for place in (Path(named), Path(path) / named) if named and place.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{path} is an adapter of the model {named!r}, which is not a folder here; give its folder as base."
            )
        options = read_options(folder)
        form = next((form for form in HUB if form.has(options)), None)
        if form is None:
            raise ValueError(
                f"{folder} has the model_type {options.get('model_type')!r}, for which there are no adapters."
            )
        opened = form.read(folder, like)
        model, params = apply_adapter(path, opened.task.model, opened.params)
        task = dataclasses.replace(opened.task, model=model)
        return dataclasses.replace(opened, task=task, params=params, path=Path(path))

    def write(self, path: Path, model: Model, *, base: str = "") -> Path:
        """Writes the adapter; `base` is the folder or name of the model that it is for. Raises as `write_adapter`."""
        lora, params = model.task.lora, model.params
        return write_adapter(
            path,
            model.task.task.model,
            find_sites(lora, params[FROZEN]),
            params["adapter"],
            base=base,
            rslora=lora.rank_stabilized,
            dropout=lora.dropout,
        )


PEFT = AdapterFolder()
