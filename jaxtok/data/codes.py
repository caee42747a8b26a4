"""Codes of images and volumes from an image tokenizer: files of codes, batches of them, and regrouped sub-codes.

A file of codes is a folder for each split with

    codes.npy    uint8, uint16 or uint32  [images, draws, positions, sub_codes], read as a memory map
    labels.npy   int32                    [images]
    codes.json   shape, values, classes, tokenizer and the like: `Header`

so that encoding, which costs as much as training, is done once. An image has several draws if its tokenizer draws codes
at random, or for flips and crops of the picture (a flip of the picture is no permutation of its codes); training takes
one of them at each visit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np
from jaxtyping import Int, Integer

from jaxtok.data.streams import StreamBatches
from jaxtok.protocols import ArraySpec, Batch

FORMAT = 2
"""The format of codes.json. Format 1 had `grid`, `sub_codes`, `vocab_size` and `image_size` (a side) in place of
`shape`, `values` and `image_shape`, and its images had three channels."""


def alike(values: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether two kinds of sub-codes are cut at the same bits, and the values of one are all values of the other."""
    same_bits = [(n - 1).bit_length() for n in values] == [(n - 1).bit_length() for n in others]
    pairs = list(zip(values, others))
    return same_bits and (all(x <= y for x, y in pairs) or all(x >= y for x, y in pairs))


def regroup(
    codes: Integer[np.ndarray, "*batch sub_codes"], values: tuple[int, ...], into: tuple[int, ...]
) -> Integer[np.ndarray, "*batch regrouped"]:
    """The same codes, with each position cut into other sub-codes: ELM's vocabulary decomposition (section 3).

    The sub-codes of a position are the digits of one number, the first being the most significant, each with its own
    base. If all bases are powers of two, the bits keep their order. Sub-codes that are `alike` stay as they are.

    Args:
      values: how many values each sub-code has.
      into: how many values each sub-code of the result has.

    Raises:
      ValueError: the products of the two differ, or a position has more than 2^62 values.
    """
    codes = np.asarray(codes)
    if codes.shape[-1] != len(values):
        raise ValueError(
            f"the codes have {codes.shape[-1]} sub-codes, but values is {values}; it must have one for each."
        )
    if alike(values, into):
        return codes
    if (whole := math.prod(values)) != math.prod(into) or whole > 2**62:
        raise ValueError(
            f"sub-codes of {values} values cannot be cut into sub-codes of {into}; the products must be equal, and at "
            "most 2^62."
        )
    number = np.zeros(codes.shape[:-1], np.int64)
    for digit, base in enumerate(values):
        number = number * base + codes[..., digit]
    digits = []
    for base in reversed(into):
        number, digit = np.divmod(number, base)
        digits.append(digit)
    return np.stack(digits[::-1], -1).astype(np.int32 if max(into) <= 2**31 else np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The description of a file of codes, in the terms of `jaxtok.protocols.ImageTokenizer`."""

    shape: tuple[int, ...]
    """The shape of an image's positions: (rows, columns), (depth, rows, columns) or (length,), in row-major order."""
    values: tuple[int, ...]
    """How many values each sub-code of a position has."""
    classes: tuple[str, ...]
    """The names of the classes, by label."""
    tokenizer: str = ""
    """The run that made the codes."""
    image_shape: tuple[int, ...] = ()
    """(height, width, channels) or (depth, height, width, channels); empty if it is unknown."""
    prefixes: tuple[int, ...] = ()
    """How many of an image's first positions can be decoded without the rest."""

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1 or not self.values or min(self.values) < 1:
            raise ValueError(
                f"shape is {self.shape} and values {self.values}; each must have at least one number, and all numbers "
                "must be at least 1."
            )
        if self.prefixes and not 1 <= min(self.prefixes) <= max(self.prefixes) <= self.positions:
            raise ValueError(
                f"prefixes is {self.prefixes}; with {self.positions} positions, all must be in 1..{self.positions}."
            )

    @property
    def positions(self) -> int:
        return math.prod(self.shape)

    @property
    def sub_codes(self) -> int:
        return len(self.values)


def write_codes(
    folder: str | Path,
    header: Header,
    batches: Iterable[tuple[Int[np.ndarray, "batch draws positions sub_codes"], Int[np.ndarray, " batch"]]],
) -> Path:
    """Writes a split, batch by batch; it appears as a whole or not at all.

    Args:
      folder: the folder of the split, such as codes/train.
      batches: codes and labels of a few images at a time; all have the same number of draws.

    Raises:
      FileExistsError: the folder exists.
      ValueError: there is no image, codes have another shape, or codes or labels are out of range.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or write to another folder.")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        size = next(size for size in (1, 2, 4) if max(header.values) <= 256**size)
        dtype, labels, draws = np.dtype(f"<u{size}"), [], 0
        with open(unfinished / "codes.npy", "wb") as file:
            shape = (0, 1, header.positions, header.sub_codes)
            for codes, image_labels in batches:
                codes, image_labels = np.asarray(codes), np.asarray(image_labels)
                if not draws:
                    draws = codes.shape[1]
                    shape = (0, draws, *shape[2:])
                    _write_npy_header(file, shape, dtype)
                if codes.shape != (len(image_labels), *shape[1:]):
                    raise ValueError(
                        f"there are codes of the shape {codes.shape} and {len(image_labels)} labels; the codes must be "
                        f"[images, {draws} draws, {header.positions} positions, {header.sub_codes} sub-codes]."
                    )
                _check_range("code", codes, header.values)
                _check_range("label", image_labels, len(header.classes))
                file.write(np.ascontiguousarray(codes.astype(dtype)).tobytes())
                labels.append(image_labels.astype(np.int32))
            if not sum(map(len, labels)):
                raise ValueError(f"there is no image to write to {folder}.")
            end, count = file.tell(), sum(map(len, labels))
            file.seek(0)
            _write_npy_header(file, (count, *shape[1:]), dtype)  # as long as before: NumPy leaves room for the count
            file.seek(end)
        np.save(unfinished / "labels.npy", np.concatenate(labels))
        (unfinished / "codes.json").write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(header)}, indent=1))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check_range(what: str, numbers: np.ndarray, limits: int | tuple[int, ...]) -> None:
    """Raises a ValueError for a number that is negative or not below its limit (for codes: of its sub-code)."""
    wrong = (numbers < 0) | (numbers >= np.asarray(limits))
    if wrong.any():
        limit = np.broadcast_to(limits, numbers.shape)[wrong][0]
        raise ValueError(f"there is the {what} {numbers[wrong][0]}; it must be in 0..{limit - 1}.")


def _write_npy_header(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """A split of codes, open for reading."""

    header: Header
    codes: Integer[np.ndarray, "images draws positions sub_codes"]
    labels: Int[np.ndarray, " images"]


def open_codes(folder: str | Path) -> CodeFile:
    """Opens a split that `write_codes` wrote; its codes are read from the disk when they are needed.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is damaged, or the files do not fit each other.
    """
    folder = Path(folder)
    for name in ("codes.json", "codes.npy", "labels.npy"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; encode the images of this split first.")
    try:
        stored = json.loads((folder / "codes.json").read_text())
        header = _header(stored)
        codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"the codes in {folder} are damaged ({error}); encode the images again.") from error
    if codes.ndim != 4 or codes.shape[2:] != (header.positions, header.sub_codes) or labels.shape != codes.shape[:1]:
        raise ValueError(
            f"{folder} has codes of the shape {codes.shape} and labels of {labels.shape}, which do not fit its "
            f"codes.json ({header.positions} positions, {header.sub_codes} sub-codes); encode the images again."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(header.classes):
        raise ValueError(f"{folder} has a label outside of its {len(header.classes)} classes; encode the images again.")
    return CodeFile(header, codes, labels)


def _header(stored: dict[str, Any]) -> Header:
    """The header from the content of codes.json, in this format or the first one."""
    version = stored.pop("format", None)
    if version == 1:
        side = stored.pop("image_size")
        stored["shape"], stored["values"] = stored.pop("grid"), [stored.pop("vocab_size")] * stored.pop("sub_codes")
        stored["image_shape"] = [side, side, 3] if side else []
    elif version != FORMAT:
        raise ValueError(f"its format is {version!r}, not 1 or {FORMAT}")
    return Header(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})


@dataclasses.dataclass(frozen=True)
class CodeData:
    """Batches of codes, a `Data` for `Experiment.data`:

    codes   int32    [batch, positions, sub_codes]
    labels  int32    [batch], the class
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch

    Raises:
        ValueError: a number is out of range.
    """

    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "path"

    path: str = "codes"
    """A folder with a folder for each split (train, validation, test), as `write_codes` writes them."""
    grid: int = 16
    """The number of rows and of columns of a square grid of positions; `shape` overrides it."""
    sub_codes: int = 2
    """The number of sub-codes at each position, of `code_bits` each; `values` overrides both. Codes that are stored in
    other sub-codes with the same number of values in all are regrouped (`regroup`)."""
    code_bits: int = 10
    """The bits of a sub-code."""
    batch_size: int = 32
    """The images in a batch, over all devices and processes."""
    seed: int = 0
    """The seed of the order of the training images, and of the choice of draws."""
    prefetch: int = 8
    """The number of batches that threads read ahead."""
    eval_limit: int = 0
    """The number of batches in an evaluation, of images from all over the split; 0: the whole split."""
    shape: tuple[int, ...] = ()
    """The shape of the positions, such as (32,) or (4, 8, 8); empty: grid x grid. If the codes are ordered, it may also
    be (n,), with n one of the prefixes that their tokenizer can decode: then each image has its first n positions."""
    values: tuple[int, ...] = ()
    """How many values each sub-code has; empty: 2^code_bits each."""

    def __post_init__(self):
        least = dict(grid=1, sub_codes=1, code_bits=1, batch_size=1, seed=0, prefetch=0, eval_limit=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if self.seed >= 2**32 or self.code_bits > 24:
            raise ValueError(
                f"seed is {self.seed} and code_bits is {self.code_bits}; they must be below 2**32 and below 25."
            )
        for field in ("shape", "values"):
            if min(value := getattr(self, field), default=1) < 1:
                raise ValueError(f"{field} is {value}; its numbers must be at least 1.")

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of an image's positions."""
        return self.shape or (self.grid, self.grid)

    @property
    def code_values(self) -> tuple[int, ...]:
        """How many values each sub-code has."""
        return self.values or (2**self.code_bits,) * self.sub_codes

    def batch_spec(self) -> dict[str, ArraySpec]:
        """See `jaxtok.protocols.Data`."""
        n = self.batch_size
        return {
            "codes": ArraySpec((n, math.prod(self.code_shape), len(self.code_values)), np.int32, ("batch", None, None)),
            "labels": ArraySpec((n,), np.int32, ("batch",)),
            "mask": ArraySpec((n,), np.float32, ("batch",)),
        }

    @property
    def units(self) -> int:
        return self.batch_size

    def train_batches(self, rows: range | None = None) -> StreamBatches:
        """Endless batches, in a new order each epoch; or only these rows of each, for a process that needs no others.

        At each visit, an image has one of its draws. The rows are the same however they are divided.

        Raises:
          FileNotFoundError: there are no codes.
          ValueError: the codes do not fit the sizes here, or there is no image.
        """
        file, rows = self.open("train"), self._rows(rows)
        order = grain.MapDataset.range(len(file.labels)).shuffle(self.seed).repeat()
        make = functools.partial(self._train_batch, file, order, rows)
        batches = grain.MapDataset.range(2**40).map(make).to_iter_dataset(self._read)
        return StreamBatches({0: iter(batches)})

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over the first draws of a split's images in their order (with `eval_limit`: of a sample of them).

        With `rows`, each batch has only these rows. The last batch is filled up with images that do not count.

        Raises:
          FileNotFoundError: there are no codes of this split.
          ValueError: the codes do not fit the sizes here, or there is no image.
        """
        file, rows = self.open(split), self._rows(rows)
        order = np.arange(len(file.labels))
        if self.eval_limit:  # a fair sample, the same for all seeds
            order = np.sort(np.random.default_rng(0).permutation(order)[: self.eval_limit * self.batch_size])
        make = functools.partial(self._eval_batch, file, order, rows)
        return grain.MapDataset.range(-(-len(order) // self.batch_size)).map(make).to_iter_dataset(self._read)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the training split.

        Raises:
          FileNotFoundError: there are no codes.
          ValueError: the codes are damaged.
        """
        return open_codes(Path(self.path) / "train").header.classes

    def open(self, split: str) -> CodeFile:
        """The stored codes of a split.

        Raises:
          FileNotFoundError: there are no codes.
          ValueError: the codes do not fit the sizes here, or there is no image.
        """
        file = open_codes(Path(self.path) / split)
        header, ours = file.header, self.code_shape
        if header.shape != ours and not (len(ours) == 1 and ours[0] in header.prefixes):
            prefixes = f" or a prefix of {', '.join(map(str, header.prefixes))}" if header.prefixes else ""
            raise ValueError(
                f"{self.path} has codes of the shape {times(header.shape)}, but data has {times(ours)} (data.shape, "
                f"or else data.grid); make it {times(header.shape)}{prefixes}."
            )
        ours = self.code_values
        more = math.prod(ours) - math.prod(header.values)
        if more and not (more > 0 and alike(header.values, ours)):
            raise ValueError(
                f"{self.path} has {times(header.values)} values a position, but data has {times(ours)} "
                "(data.values, or else data.sub_codes of data.code_bits each); make them, or at least their products, "
                "equal."
            )
        if not len(file.labels):
            raise ValueError(f"the {split} split of {self.path} has no image.")
        return file

    @property
    def _read(self) -> grain.ReadOptions:
        return grain.ReadOptions(num_threads=min(4, self.prefetch), prefetch_buffer_size=self.prefetch)

    def _rows(self, rows: range | None) -> np.ndarray:
        return np.arange(self.batch_size) if rows is None else np.array(rows)

    def _train_batch(self, file: CodeFile, order: Any, rows: np.ndarray, number: int) -> Batch:
        images = np.array([order[number * self.batch_size + row] for row in rows])
        rng = np.random.default_rng((self.seed, number))
        draws = rng.integers(file.codes.shape[1], size=self.batch_size)[rows]
        return self._batch(file, images, draws, np.ones(len(rows), np.float32))

    def _eval_batch(self, file: CodeFile, order: np.ndarray, rows: np.ndarray, number: int) -> Batch:
        index = number * self.batch_size + rows
        images = order[np.minimum(index, len(order) - 1)]
        return self._batch(file, images, 0, (index < len(order)).astype(np.float32))

    def _batch(self, file: CodeFile, images: np.ndarray, draws: Any, mask: np.ndarray) -> Batch:
        codes = np.asarray(file.codes[images, draws])[:, : math.prod(self.code_shape)]
        return {
            "codes": regroup(codes.astype(np.int32), file.header.values, self.code_values),
            "labels": file.labels[images].astype(np.int32),
            "mask": mask,
        }


def times(numbers: tuple[int, ...]) -> str:
    """The numbers as text, such as 4 x 8 x 8."""
    return " x ".join(map(str, numbers))
