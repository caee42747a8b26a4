"""Codes of images, as an image tokenizer made them: bits and sub-codes, files of codes, and batches of them.

A file of codes is a folder for each split with

    codes.npy    uint8, uint16 or uint32  [images, draws, positions, sub_codes], read where it is needed (memory map)
    labels.npy   int32                    [images]
    codes.json   grid, sub_codes, vocab_size, classes, tokenizer and the like: `Header`

so that encoding, which costs as much as training, is done once. The draws of an image are its codes under a tokenizer
that draws them, and under flips and crops of the picture (a flip is no permutation of codes); training takes one of
them at each visit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np
from jaxtyping import Array, Int, Integer

from jaxtok.data.streams import StreamBatches
from jaxtok.nn.bits import pack_bits, unpack_bits
from jaxtok.protocols import ArraySpec, Batch


def regroup(
    codes: Integer[Array, "*batch sub_codes"], code_bits: int, sub_codes: int
) -> Integer[Array, "*batch regrouped"]:
    """The same bits, cut into another number of sub-codes: the paper's vocabulary decomposition.

    Raises:
      ValueError: the bits cannot be cut so.
    """
    if codes.shape[-1] == sub_codes:
        return codes
    return pack_bits(unpack_bits(codes, codes.shape[-1] * code_bits), sub_codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a file of codes says of itself."""

    grid: tuple[int, int]
    """Rows and columns; position n is row-major."""
    sub_codes: int
    vocab_size: int
    """Values of each sub-code."""
    classes: tuple[str, ...]
    """Names; labels are their numbers."""
    tokenizer: str = ""
    """What made the codes, for a reader."""
    image_size: int = 0
    """Side in pixels."""

    def __post_init__(self):
        if len(self.grid) != 2 or min(*self.grid, self.sub_codes, self.vocab_size) < 1:
            raise ValueError(
                f"grid is {self.grid}, sub_codes {self.sub_codes} and vocab_size {self.vocab_size}; "
                "a grid is (rows, columns), and all must be at least 1."
            )

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]


def write_codes(
    folder: str | Path,
    header: Header,
    batches: Iterable[tuple[Int[np.ndarray, "batch draws positions sub_codes"], Int[np.ndarray, " batch"]]],
) -> Path:
    """Writes a split, batch by batch; it appears as a whole or not at all.

    Args:
      folder: of the split, such as codes/train.
      batches: codes and labels of a few images at a time; all have as many draws.

    Raises:
      FileExistsError: the folder is there.
      ValueError: no image; codes of another shape, or codes or labels that are out of range.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or write to another folder.")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        size = next(size for size in (1, 2, 4) if header.vocab_size <= 256**size)
        dtype, labels, draws = np.dtype(f"<u{size}"), [], 0
        with open(unfinished / "codes.npy", "wb") as file:
            shape = (0, 1, header.positions, header.sub_codes)
            for codes, of_images in batches:
                codes, of_images = np.asarray(codes), np.asarray(of_images)
                if not draws:
                    draws = codes.shape[1]
                    shape = (0, draws, *shape[2:])
                    _write_npy_header(file, shape, dtype)
                if codes.shape != (len(of_images), *shape[1:]):
                    raise ValueError(
                        f"there are codes of the shape {codes.shape} and {len(of_images)} labels; the codes must be "
                        f"[images, {draws} draws, {header.positions} positions, {header.sub_codes} sub-codes]."
                    )
                for what, values, limit in (
                    ("code", codes, header.vocab_size),
                    ("label", of_images, len(header.classes)),
                ):
                    if values.size and not 0 <= values.min() <= values.max() < limit:
                        wrong = values.min() if values.min() < 0 else values.max()
                        raise ValueError(f"there is the {what} {wrong}; it must be in 0..{limit - 1}.")
                file.write(np.ascontiguousarray(codes.astype(dtype)).tobytes())
                labels.append(of_images.astype(np.int32))
            if not sum(map(len, labels)):
                raise ValueError(f"there is no image to write to {folder}.")
            end, count = file.tell(), sum(map(len, labels))
            file.seek(0)
            _write_npy_header(file, (count, *shape[1:]), dtype)  # of the same length: NumPy leaves room for the count
            file.seek(end)
        np.save(unfinished / "labels.npy", np.concatenate(labels))
        (unfinished / "codes.json").write_text(json.dumps({"format": 1, **dataclasses.asdict(header)}, indent=1))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_npy_header(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """A split of codes, open for reading."""

    header: Header
    codes: Int[np.ndarray, "images draws positions sub_codes"]
    labels: Int[np.ndarray, " images"]


def open_codes(folder: str | Path) -> CodeFile:
    """A split that `write_codes` wrote; its codes are read from the disk where they are asked for.

    Raises:
      FileNotFoundError: it is not there, or a file of it is missing.
      ValueError: a file is damaged, or they do not fit each other.
    """
    folder = Path(folder)
    for name in ("codes.json", "codes.npy", "labels.npy"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; encode the images of this split first.")
    try:
        stored = json.loads((folder / "codes.json").read_text())
        if stored.pop("format", None) != 1:
            raise ValueError("another format")
        stored |= {"grid": tuple(stored["grid"]), "classes": tuple(stored["classes"])}
        header = Header(**stored)
        codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{folder} holds no whole file of codes ({error}); encode the images again.") from error
    if codes.ndim != 4 or codes.shape[2:] != (header.positions, header.sub_codes) or labels.shape != codes.shape[:1]:
        raise ValueError(
            f"{folder} has codes of the shape {codes.shape} and labels of {labels.shape}, which do not fit its "
            f"codes.json ({header.positions} positions, {header.sub_codes} sub-codes); encode the images again."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(header.classes):
        raise ValueError(f"{folder} has a label outside of its {len(header.classes)} classes; encode the images again.")
    return CodeFile(header, codes, labels)


@dataclasses.dataclass(frozen=True)
class CodeData:
    """Batches of codes, which `Experiment.data` can be:

    codes   int32    [batch, positions, sub_codes]
    labels  int32    [batch], the class
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch

    Raises:
        ValueError: a number is out of range.
    """

    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "path"

    path: str = "codes"
    """A folder with a folder for each split (train, validation, test) as `write_codes` writes them."""
    grid: int = 16
    """Positions a side."""
    sub_codes: int = 2
    """At each position. Codes that are stored in another number of sub-codes of as many bits in all are cut anew."""
    code_bits: int = 10
    """Of a sub-code."""
    batch_size: int = 32
    """Images a batch, over all devices and processes."""
    seed: int = 0
    """Of the order of the training images, and of the draws."""
    prefetch: int = 8
    """Batches read ahead by threads."""
    eval_limit: int = 0
    """Batches in an evaluation, of images from all over the split; 0: the whole split."""

    def __post_init__(self):
        least = dict(grid=1, sub_codes=1, code_bits=1, batch_size=1, seed=0, prefetch=0, eval_limit=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field}={value}: choose at least {low}")
        if self.seed >= 2**32 or self.code_bits > 24:
            raise ValueError(f"seed={self.seed}, code_bits={self.code_bits}: choose them below 2**32 and 25")

    def batch_spec(self) -> dict[str, ArraySpec]:
        """See `jaxtok.protocols.Data`."""
        n = self.batch_size
        return {
            "codes": ArraySpec((n, self.grid**2, self.sub_codes), np.int32, ("batch", None, None)),
            "labels": ArraySpec((n,), np.int32, ("batch",)),
            "mask": ArraySpec((n,), np.float32, ("batch",)),
        }

    @property
    def units(self) -> int:
        return self.batch_size

    def train_batches(self, rows: range | None = None) -> StreamBatches:
        """Batches without end, in a new order each epoch, or these rows of each (for a process that needs no others).

        At each visit, an image has one of its draws. The rows are the same however they are divided.

        Raises:
          FileNotFoundError: there are no codes.
          ValueError: they do not fit the sizes here, or there are none.
        """
        file, rows = self.open("train"), self._rows(rows)
        order = grain.MapDataset.range(len(file.labels)).shuffle(self.seed).repeat()
        make = functools.partial(self._train_batch, file, order, rows)
        batches = grain.MapDataset.range(2**40).map(make).to_iter_dataset(self._read)
        return StreamBatches({0: iter(batches)})

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split in its order (under `eval_limit`: over chosen images), of the first draw of each image.

        With `rows`, these of each batch. The last batch is filled up with images that do not count.

        Raises:
          FileNotFoundError: there are no codes of this split.
          ValueError: they do not fit the sizes here, or there are none.
        """
        file, rows = self.open(split), self._rows(rows)
        order = np.arange(len(file.labels))
        if self.eval_limit:  # a fair sample, the same for all seeds
            order = np.sort(np.random.default_rng(0).permutation(order)[: self.eval_limit * self.batch_size])
        make = functools.partial(self._eval_batch, file, order, rows)
        return grain.MapDataset.range(-(-len(order) // self.batch_size)).map(make).to_iter_dataset(self._read)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as the training split has them.

        Raises:
          FileNotFoundError: there are no codes.
          ValueError: they are damaged.
        """
        return open_codes(Path(self.path) / "train").header.classes

    def open(self, split: str) -> CodeFile:
        """The stored codes of a split.

        Raises:
          FileNotFoundError: there are none.
          ValueError: they do not fit the sizes here, or there is no image.
        """
        file = open_codes(Path(self.path) / split)
        header = file.header
        if header.grid != (self.grid, self.grid):
            raise ValueError(
                f"{self.path} has grids of {header.grid[0]} x {header.grid[1]} codes, but data.grid is {self.grid}."
            )
        bits = (header.vocab_size - 1).bit_length()
        ours, theirs = f"{self.sub_codes} of {self.code_bits}", f"{header.sub_codes} of {bits}"
        if self.sub_codes != header.sub_codes and header.vocab_size != 2**bits:
            raise ValueError(
                f"{self.path} has codes below {header.vocab_size}, no power of 2, which cannot be cut into other "
                f"sub-codes; set data.sub_codes to {header.sub_codes}."
            )
        if self.sub_codes * self.code_bits != header.sub_codes * bits:
            raise ValueError(
                f"{self.path} has {header.sub_codes * bits} bits a position (sub-codes x bits: {theirs}), but "
                f"data.sub_codes x data.code_bits is {ours} = {self.sub_codes * self.code_bits}; make them equal."
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
        places = number * self.batch_size + rows
        images = order[np.minimum(places, len(order) - 1)]
        return self._batch(file, images, 0, (places < len(order)).astype(np.float32))

    def _batch(self, file: CodeFile, images: np.ndarray, draws: Any, mask: np.ndarray) -> Batch:
        codes = np.asarray(file.codes[images, draws]).astype(np.int32)
        bits = (file.header.vocab_size - 1).bit_length()
        return {
            "codes": regroup(codes, bits, self.sub_codes),
            "labels": file.labels[images].astype(np.int32),
            "mask": mask,
        }
