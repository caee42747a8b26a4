"""Rows of arrays that were computed once: a frozen network's outputs, and what they are compared with."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np

from jaxtok.protocols import ArraySpec, Batch


@dataclasses.dataclass(frozen=True)
class ArrayData:
    """Rows of files `PATH/SPLIT/NAME.npy`, which are mapped into memory. A batch has each array as float32 [batch,
    ...], and

        mask  float32  [batch], 1 where the row counts, 0 where it only fills the batch

    Raises:
        ValueError: a field is out of range.
    """

    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "path"

    path: str = "data/arrays"
    """The folder, with a folder for each split: train, validation and test."""
    arrays: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """The name of each array, and the shape of a row of it."""
    batch_size: int = 32
    seed: int = 0
    eval_limit: int = 0
    prefetch: int = 4
    workers: int = 1

    def __post_init__(self):
        for field, low in dict(batch_size=1, seed=0, eval_limit=0, prefetch=1, workers=0).items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if not self.arrays:
            raise ValueError("arrays is empty; it must name the files and the shapes of their rows.")

    @property
    def units(self) -> int:
        return self.batch_size

    def batch_spec(self) -> dict[str, ArraySpec]:
        n = self.batch_size
        spec = {
            name: ArraySpec((n, *shape), np.float32, ("batch", *[None] * len(shape))) for name, shape in self.arrays
        }
        return spec | {"mask": ArraySpec((n,), np.float32, ("batch",))}

    def rows(self, split: str) -> dict[str, np.ndarray]:
        """The arrays of a split.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: it has rows of another shape, or files have different numbers of rows.
        """
        if split not in self._opened:
            found = {}
            for name, shape in self.arrays:
                file = Path(self.path) / split / f"{name}.npy"
                if not file.is_file():
                    raise FileNotFoundError(f"{file} does not exist; write it with jaxtok.data.arrays.write_arrays.")
                found[name] = np.load(file, mmap_mode="r", allow_pickle=False)
                if found[name].shape[1:] != tuple(shape):
                    raise ValueError(f"{file} has rows of {found[name].shape[1:]}; by the config they are {shape}.")
            if len({len(array) for array in found.values()}) > 1:
                counts = ", ".join(f"{name} {len(array)}" for name, array in found.items())
                raise ValueError(f"the files in {self.path}/{split} have different numbers of rows: {counts}.")
            self._opened[split] = found
        return self._opened[split]

    def count(self, split: str) -> int:
        """The number of rows in a split."""
        return len(next(iter(self.rows(split).values())))

    def train_batches(self, rows: range | None = None) -> Any:
        total, part = self.count("train"), range(self.batch_size) if rows is None else rows

        def index(number: int) -> int:
            epoch, at = divmod(number, total)
            return int(_order(total, self.seed, epoch)[at])

        def make(number: int) -> Batch:
            return self._batch("train", [index(number * self.batch_size + row) for row in part])

        return iter(self._in_threads(2**62, make))

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Any:
        total, part = self.count(split), range(self.batch_size) if rows is None else rows
        order = np.random.default_rng(0).permutation(total) if self.eval_limit else np.arange(total)
        batches = math.ceil(total / self.batch_size)

        def make(number: int) -> Batch:
            numbers = [number * self.batch_size + row for row in part]
            return self._batch(split, [int(order[n]) if n < total else -1 for n in numbers])

        return self._in_threads(min(batches, self.eval_limit or batches), make)

    def _batch(self, split: str, numbers: list[int]) -> Batch:
        real = np.array([n >= 0 for n in numbers])
        batch = {}
        for name, array in self.rows(split).items():
            batch[name] = np.stack([np.asarray(array[max(n, 0)], np.float32) for n in numbers])
            batch[name][~real] = 0
        return batch | {"mask": real.astype(np.float32)}

    def _in_threads(self, batches: int, make: Any) -> grain.IterDataset:
        buffer = max(self.prefetch, self.workers) if self.workers else 0
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=buffer)
        return grain.MapDataset.range(batches).map(make).to_iter_dataset(options)

    @functools.cached_property
    def _opened(self) -> dict[str, dict[str, np.ndarray]]:
        return {}


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def write_arrays(folder: str | Path, parts: Iterable[Mapping[str, np.ndarray]], dtype: Any = np.float16) -> Path:
    """Writes the arrays of some parts, one after the other, as `NAME.npy` into a new folder (that of a split).

    Raises:
        FileExistsError: there is something in the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder.")
    found: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, array in part.items():
            found.setdefault(name, []).append(np.asarray(array, dtype))
    for name, arrays in found.items():
        np.save(folder / f"{name}.npy", np.concatenate(arrays))
    return folder
