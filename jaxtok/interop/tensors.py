"""Tensors by name from a folder of weights: safetensors, in one file or in shards with an index, or PyTorch's files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.lm import bert, t5
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.t5 import T5Config
from jaxtok.weights import open_safetensors, read_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter is in their tensors; `{layer}` stands for the layer's number."""

    name: str
    transpose: bool = False
    """PyTorch's Linear holds [out, in]."""
    part: int | None = None
    """Which third of the last axis it is, of GPT-2's joint queries, keys and values."""
    first: int = 0
    """The number of the first layer, of a stack that begins with a later one."""


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files; each is read when it is asked for."""

    def __init__(self, files: dict[str, Path]):
        self._files = files
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._file(self._files[name]).get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def read_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """The tensors in model.safetensors, in the shards of its index, or in pytorch_model.bin (needs PyTorch).

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ValueError: a file is damaged, or a shard has not what the index says.
    """
    if (path := folder / "model.safetensors").is_file():
        return Tensors(dict.fromkeys(open_safetensors(path).keys(), path))
    if (path := folder / "model.safetensors.index.json").is_file():
        places = json.loads(path.read_text())["weight_map"]
        for shard in sorted(set(places.values())):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / shard} does not exist, but {path.name} names it; fetch it too.")
            found = set(open_safetensors(folder / shard).keys())
            if missing := [name for name, place in places.items() if place == shard and name not in found]:
                raise ValueError(f"{folder / shard} has no tensor {missing[0]}, which {path.name} says it has.")
        return Tensors({name: folder / shard for name, shard in places.items()})
    for name in ("pytorch_model.bin", "mp_rank_00_model_states.pt"):
        if (path := folder / name).is_file():
            return read_weights(path, "module")  # where DeepSpeed keeps the model
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin.")


def expected_shapes(config: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Parameter paths of a model to shapes, from its config, without making any array."""
    rng = jax.random.key(0)
    if isinstance(config, BertConfig):
        tree = jax.eval_shape(lambda: bert.init_params(config, rng))
    elif isinstance(config, T5Config):
        tree = jax.eval_shape(lambda: t5.init_params(config, rng))
    else:
        tree = jax.eval_shape(lambda: init_params(Decoder(config), rng, jnp.zeros((1, 1), jnp.int32)))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}
