"""Corpora: random access to documents, split into train, validation and test by a hash of each document's name."""

from __future__ import annotations

import bisect
import glob
import hashlib
import json
import mmap
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import grain
import numpy as np

SPLITS = ("train", "validation", "test")
_BLOCK = 8192  # bytes of a document, if one text file is the whole corpus
_PYTHON_SUFFIXES = {".py", ".rst", ".txt"}
_PYTHON_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

Shard = Sequence  # of documents
Shards = Iterable[tuple[str, Shard]]  # with the key of each; the keys of its rows are "key:row"


def open_corpus(spec: str, split: str = "train", *, text_field: str = "text", holdout: float = 0.05) -> Corpus:
    """The documents of one split of a corpus.

    Args:
        spec: what to read:

            * `python`: the sources and texts of the Python standard library on this machine, without its tests;
            * a folder: every text file in it and below is a document (not hidden, not empty, no NUL byte in its first
              8 KiB), and so is every row of its `*.jsonl` and `*.parquet` files;
            * a `*.jsonl` or `*.parquet` file: every row is a document;
            * another text file: blocks of about 8 KiB, cut at line ends, are the documents;
            * `tfds:NAME[/CONFIG][:VERSION]`: a TensorFlow Datasets data set (read without TensorFlow), with its own
              splits if it has them;
            * `arrayrecord:PATH`: a file, a folder or a glob of ArrayRecord files, whose records are the documents.
        split: "train", "validation", "test" or "all".
        text_field: the field of a JSONL, Parquet or TFDS row that holds the text.
        holdout: the share of the documents in the validation split, and also in the test split. The split of a document
            depends only on its path relative to `spec` and its row, except in small corpora: with three documents or
            more, each split has at least one.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: an argument is not allowed, a file cannot be read, a field is missing, or the split is empty.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}, all.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout is {holdout}; it must be between 0 and 0.5.")
    own_splits: frozenset[str] = frozenset()
    if spec == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        shards = [(key, _TextFile(path)) for key, path in _walk(root, _is_python_text, _PYTHON_SKIPPED)]
    elif spec.startswith("tfds:"):
        own_splits, shards = _tfds(spec.removeprefix("tfds:"), split, text_field)
    elif spec.startswith("arrayrecord:"):
        shards = list(array_records(spec.removeprefix("arrayrecord:")))
    else:
        shards = list(_local(Path(spec), text_field))
    return _select(spec, split, shards, holdout, own_splits)


def _share(key: str) -> float:
    """A hash of a document's key, in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()) / 2**64


def _split_at(share: float, holdout: float) -> str:
    return "validation" if share < holdout else "test" if share < 2 * holdout else "train"


class Corpus(Sequence):
    """Documents by number, str or bytes; a source for `grain.MapDataset.source`."""

    def __init__(self, shards: list[Shard], shard_of: np.ndarray, row_of: np.ndarray, names: list[str]):
        self._shards, self._shard_of, self._row_of, self._names = shards, shard_of, row_of, names

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, index: int) -> str | bytes:
        return self._shards[self._shard_of[index]][int(self._row_of[index])]

    def file(self, index: int) -> str:
        """The file that holds a document, relative to the path that was opened; for a TFDS data set, its split."""
        return self._names[self._shard_of[index]]


def _select(spec: str, split: str, shards: Shards, holdout: float, own_splits: frozenset[str]) -> Corpus:
    """The documents of `split`. Those hashed into a split that the data set has anyway (`own_splits`) are "train"."""
    shards = list(shards)
    rows = [range(len(shard)) for _, shard in shards]
    total = sum(map(len, rows))
    if split != "all":
        divided = [n for n, (key, _) in enumerate(shards) if key not in own_splits - {"train"}]
        keys = [
            [shards[n][0]] if isinstance(shards[n][1], _TextFile) else [f"{shards[n][0]}:{row}" for row in rows[n]]
            for n in divided
        ]
        for n, parts in zip(divided, splits_of(keys, holdout, own_splits)):
            rows[n] = [row for row, part in enumerate(parts) if part == split]
    kept = [n for n, of_shard in enumerate(rows) if len(of_shard)]
    if not kept:
        raise ValueError(
            f"the {split} split of {spec} is empty, as there are only {total} documents; "
            "give more documents, one bigger text file, or a larger holdout."
        )
    shard_of = np.repeat(np.arange(len(kept), dtype=np.int32), [len(rows[n]) for n in kept])
    row_of = np.concatenate([np.asarray(rows[n], np.int64) for n in kept])
    return Corpus([shards[n][1] for n in kept], shard_of, row_of, [shards[n][0] for n in kept])


def splits_of(keys: Sequence[Sequence[str]], holdout: float, own_splits: frozenset[str]) -> list[list[str]]:
    """The split of each document, from the keys of the documents in each shard.

    Documents hashed into a split that the source has anyway (`own_splits`) are "train". A held-out split that would be
    empty gets the train document with the lowest hash, as long as train keeps one.
    """
    shares = np.array([_share(key) for of_shard in keys for key in of_shard])
    for number, part in enumerate(("validation", "test")):
        low, high = number * holdout, (number + 1) * holdout
        train = np.flatnonzero(shares >= 2 * holdout)
        if part not in own_splits and len(train) > 1 and not ((shares >= low) & (shares < high)).any():
            shares[train[shares[train].argmin()]] = low
    parts = [_split_at(share, holdout) for share in shares]
    parts = iter("train" if part in own_splits else part for part in parts)
    return [[next(parts) for _ in of_shard] for of_shard in keys]


# --- Kinds of shards. All open their files for each read, so that they can be pickled and used from threads. ---


class _TextFile(Sequence):
    def __init__(self, path: Path):
        self._path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> bytes:
        return self._path.read_bytes()


class _Spans(Sequence):
    """Parts of a file between byte offsets."""

    def __init__(self, path: Path, starts: list[int], stops: list[int]):
        self._path, self._starts, self._stops = path, np.array(starts, np.int64), np.array(stops, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._starts[row])
            return file.read(self._stops[row] - self._starts[row])


def _text_blocks(path: Path) -> _Spans:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cuts = [0]
        while cuts[-1] < len(data):
            line_end = data.find(b"\n", cuts[-1] + _BLOCK - 1) + 1
            cuts.append(line_end or len(data))
    return _Spans(path, cuts[:-1], cuts[1:])


class _JsonLines(_Spans):
    """The lines of a JSONL file that are not blank."""

    def __init__(self, path: Path, field: str):
        starts, stops, offset = [], [], 0
        with path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    starts.append(offset)
                    stops.append(offset + len(line))
                offset += len(line)
        super().__init__(path, starts, stops)
        self._field = field
        if len(self):
            self[0]  # a wrong field is reported at once

    def __getitem__(self, row: int) -> str:
        try:
            record = json.loads(super().__getitem__(row))
        except ValueError as error:
            raise ValueError(f"row {row} of {self._path} is not JSON ({error}); correct the line.") from error
        text = record.get(self._field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = f"it has {', '.join(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
            raise ValueError(
                f"row {row} of {self._path} has no text in the field {self._field!r} ({fields}); set text_field."
            )
        return text


class _Parquet(Sequence):
    def __init__(self, path: Path, field: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file ({error}); replace or remove it.") from error
        text_types = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
        if field not in schema.names or schema.field(field).type not in text_types:
            raise ValueError(
                f"{path} has no text in the field {field!r} (it has {', '.join(schema.names)}); set text_field."
            )
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._path, self._field, self._starts = path, field, np.cumsum([0, *rows]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> str | bytes:
        group = bisect.bisect_right(self._starts, row) - 1
        return _row_group(self._path, group, self._field)[row - self._starts[group]].as_py() or ""


@lru_cache(maxsize=8)
def _row_group(path: Path, group: int, field: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[field]).column(0)


class _Field(Sequence):
    """One field of the rows of a TFDS data source."""

    def __init__(self, rows: Sequence, field: str):
        self._rows, self._field = rows, field

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> str | bytes:
        return self._rows[row][self._field]


# --- What a spec names ---


def _walk(root: Path, keep: Callable[[Path], bool], skipped: set[str] = frozenset()) -> Iterator[tuple[str, Path]]:
    """The files below root that are not hidden and not empty, by relative path."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.is_file() and path.stat().st_size and keep(path)]
    return iter(sorted((path.relative_to(root).as_posix(), path) for path in found))


def _is_python_text(path: Path) -> bool:
    generated = path.name.startswith("_sysconfigdata")  # it differs between machines
    return path.suffix in _PYTHON_SUFFIXES and not generated


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _is_document(path: Path) -> bool:
    return path.suffix in (".jsonl", ".parquet") or _is_text(path)


def _local(path: Path, field: str) -> Shards:
    path = path.absolute()
    if path.is_dir():
        found = list(_walk(path, _is_document))
        if not found:
            raise ValueError(
                f"{path} holds no text, *.jsonl or *.parquet; give another folder (unpack compressed files)."
            )
        return ((key, _shard(file, field)) for key, file in found)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a file or folder that exists, 'python', 'tfds:NAME' or 'arrayrecord:PATH'."
        )
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; give a file with text.")
    if not _is_document(path):
        raise ValueError(f"{path} is not a text file; give text, *.jsonl or *.parquet (unpack compressed files).")
    shard = _shard(path, field)
    return [(path.name, _text_blocks(path) if isinstance(shard, _TextFile) else shard)]


def _shard(path: Path, field: str) -> Shard:
    if path.suffix == ".jsonl":
        return _JsonLines(path, field)
    if path.suffix == ".parquet":
        return _Parquet(path, field)
    return _TextFile(path)


def array_records(pattern: str) -> Shards:
    if Path(pattern).is_dir():
        pattern = os.path.join(glob.escape(pattern), "*")
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise FileNotFoundError(f"no ArrayRecord file matches {pattern}; give a file, a folder or a glob.")
    for path in paths:
        try:
            yield path.name, grain.sources.ArrayRecordDataSource(str(path.absolute()))
        except Exception as error:  # array_record raises plain errors from C++
            raise ValueError(f"{path} is not a readable ArrayRecord file ({error}); narrow the glob.") from error


def _tfds(name: str, split: str, field: str) -> tuple[frozenset[str], Shards]:
    """The data set's own splits, and the shards that hold the documents of `split`."""
    import tensorflow_datasets as tfds

    try:
        sources = tfds.data_source(name)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TensorFlow Datasets has no {name!r}; see tfds.list_builders() for the names.") from error
    own = frozenset(SPLITS) & sources.keys()
    wanted = own if split == "all" else own & {split} or own & {"train"}
    for part in wanted:
        if field not in (features := sources[part].dataset_info.features):
            raise ValueError(f"tfds:{name} has no field {field!r} (it has {', '.join(features)}); set text_field.")
    return own, [(part, _Field(sources[part], field)) for part in SPLITS if part in wanted]
