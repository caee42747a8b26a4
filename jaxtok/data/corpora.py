"""Corpora: random access to documents, split into train, validation and test by a hash of each document's name."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from jaxtok.data.files import (
    JsonLines,
    Kind,
    NoText,
    Parquet,
    Shard,
    TextFile,
    cut,
    is_converted,
    kind_of,
    tell,
    text_blocks,
)

SPLITS = ("train", "validation", "test")
_PYTHON_SUFFIXES = {".py", ".rst", ".txt"}
_PYTHON_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_READABLE = "text, *.jsonl or *.parquet (text and JSON also as .gz, .bz2, .xz or .zst)"

Shards = Iterable[tuple[str, Shard]]  # with the key of each; the keys of its rows are "key:row"


def open_corpus(spec: str, split: str = "train", *, text_field: str = "text", holdout: float = 0.05) -> Corpus:
    """The documents of one split of a corpus.

    Args:
        spec: what to read:

            * `python`: the sources and texts of the Python standard library on this machine, without its tests;
            * a folder: every text file in it and below (also through links; not hidden, not empty, no NUL byte in its
              first 8 KiB) is a document, and so is every row of its files with rows. Other files are left out with a
              warning;
            * a file with rows: a line of a `*.jsonl` or `*.ndjson` file, a row of a `*.parquet` file, or an object of a
              `*.json` file (JSON lines, or an array of objects) is a document;
            * another text file: blocks of about 8 KiB, cut at line ends, are the documents (of `*.csv` and `*.tsv`
              files, too, with a warning);
            * `tfds:NAME[/CONFIG][:VERSION]`: a TensorFlow Datasets data set (read without TensorFlow), with its own
              splits if it has them;
            * `arrayrecord:PATH`: a file, a folder or a glob of ArrayRecord files, whose records are the documents.

            Text may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`), and in UTF-16 or UTF-32 with a byte order mark.
            Copies for random access are kept in the user's cache folder (`jaxtok/corpora`): of the column of Parquet
            files, and of compressed files that are not one document each.
        split: "train", "validation", "test" or "all".
        text_field: the field of a JSONL, Parquet or TFDS row that holds the text.
        holdout: the share of the documents in the validation split, and also in the test split. The split of a document
            depends only on its path relative to `spec` and its row, except in small corpora: with three documents or
            more, each split has at least one; if one or two documents do not fill the training and the validation
            split, they are cut into parts, at white space.

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
        shards = list(_python())
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
    """Documents by number, str or bytes; a source for `grain.MapDataset.source`.

    A row without a text (null, not JSON, not UTF-8) is None, which Grain leaves out, as iteration does. The first of
    them is told in a warning, and then the tenth, the hundredth, ...

    Raises:
        ValueError: none of the rows that are asked for has a text.
    """

    def __init__(self, shards: list[Shard], shard_of: np.ndarray, row_of: np.ndarray, names: list[str]):
        self._shards, self._shard_of, self._row_of, self._names = shards, shard_of, row_of, names
        self.without_text: set[int] = set()
        """The numbers of the rows that had no text so far."""
        self._in_turn = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, index: int) -> str | bytes | None:
        try:
            document = self._shards[self._shard_of[index]][int(self._row_of[index])]
        except NoText as error:
            self._leave_out(index, error)
            return None
        self._in_turn = 0
        return document

    def __iter__(self) -> Iterator[str | bytes]:
        for index in range(len(self)):
            if (document := self[index]) is not None:
                yield document

    def _leave_out(self, index: int, error: NoText) -> None:
        self._in_turn += 1
        new = index not in self.without_text
        self.without_text.add(index)
        count = len(self.without_text)
        # Two epochs in turn may end and begin with the same rows; so many are a share of the rows without any text.
        if count == len(self) or self._in_turn >= 2 * len(self):
            raise ValueError(f"there is no text in all of {count} rows: {error}; correct the corpus.") from error
        if new and count == 10 ** (len(str(count)) - 1):
            which = "it is" if count == 1 else f"it is the {count}th that is"
            tell(f"{error}; {which} left out, as all rows without a text are.")

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
        parts = splits_of([_keys(*shards[n]) for n in divided], holdout, own_splits)
        if 0 < total < 3 and not own_splits and not {"train", "validation"} <= set(itertools.chain(*parts)):
            shards = list(zip([key for key, _ in shards], cut([shard for _, shard in shards])))
            number = sum(len(shard) for _, shard in shards)
            if number >= 3:
                tell(f"{spec} holds only {_count(total)} and is cut into {number} parts, so that some are held out.")
            parts = splits_of([_keys(*shard) for shard in shards], holdout, own_splits)
        for n, of_shard in zip(divided, parts):
            rows[n] = [row for row, part in enumerate(of_shard) if part == split]
    kept = [n for n, of_shard in enumerate(rows) if len(of_shard)]
    if not total:
        raise ValueError(f"{spec} holds no documents; give a corpus with some.")
    if not kept:
        raise ValueError(
            f"the {split} split of {spec} is empty, as it holds only {_count(total)}; give more text, or evaluate on "
            "the split all, which is the whole corpus."
        )
    shard_of = np.repeat(np.arange(len(kept), dtype=np.int32), [len(rows[n]) for n in kept])
    row_of = np.concatenate([np.asarray(rows[n], np.int64) for n in kept])
    return Corpus([shards[n][1] for n in kept], shard_of, row_of, [shards[n][0] for n in kept])


def _count(documents: int) -> str:
    return f"{documents} document{'s' * (documents != 1)}"


def _keys(key: str, shard: Shard) -> list[str]:
    return [key] if isinstance(shard, TextFile) else [f"{key}:{row}" for row in range(len(shard))]


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


# --- What a spec names ---


class _Field(Sequence):
    """One field of the rows of a TFDS data source."""

    def __init__(self, rows: Sequence, field: str):
        self._rows, self._field = rows, field

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> str | bytes:
        return self._rows[row][self._field]


def files_below(root: Path, skipped: frozenset[str] = frozenset(), links: bool = True) -> list[tuple[str, Path]]:
    """The files below a folder that are not hidden, by relative path.

    Linked folders are part of it, each once, and under its own name if it is also there without a link.
    """
    found, seen, tops = [], set(), [root]
    above = set(map(str, Path(os.path.realpath(root)).parents))  # a link to one of these would lead back here
    while tops:
        linked = []
        for top in tops:
            for folder, folders, files in os.walk(top):
                if (real := os.path.realpath(folder)) in seen or real in above:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
                linked += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
                found += [Path(folder, name) for name in files if not name.startswith(".")]
        tops = sorted(linked) if links else []
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _python() -> Iterator[tuple[str, Shard]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for key, path in files_below(root, _PYTHON_SKIPPED, links=False):
        generated = path.name.startswith("_sysconfigdata")  # it differs between machines
        if path.suffix in _PYTHON_SUFFIXES and not generated and path.is_file() and path.stat().st_size:
            yield key, TextFile(path)


def _local(path: Path, field: str) -> Shards:
    path = path.absolute()
    if path.is_dir():
        return list(_folder(path, field))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a file or folder that exists, 'python', 'tfds:NAME' or 'arrayrecord:PATH'."
        )
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; give a file with text.")
    kind = kind_of(path, field)
    if kind is None:
        raise ValueError(f"{path} is not a text file; give {_READABLE}.")
    if kind == "records":
        tell(f"JSON lines are {_as_text(field)}, in {path}.")
    if _is_table(path, kind):
        tell(f"{_TABLES}, in {path}.")
    shard = _shard(path, field, kind)
    return [(path.name, text_blocks(path) if isinstance(shard, TextFile) else shard)]


def _folder(root: Path, field: str) -> Iterator[tuple[str, Shard]]:
    files = [(key, path) for key, path in files_below(root) if not path.is_file() or path.stat().st_size]
    kinds = {key: kind_of(path, field) if path.is_file() else None for key, path in files}
    left_out = [key for key, kind in kinds.items() if kind is None]
    if len(left_out) == len(files):
        raise ValueError(f"{root} holds no {_READABLE}; give another folder.")
    if left_out:
        count = "1 file is" if len(left_out) == 1 else f"{len(left_out)} files are"
        tell(f"{count} left out of {root}, as no text can be read there: {named(left_out)}.")
    if records := [key for key, kind in kinds.items() if kind == "records"]:
        tell(f"JSON lines are {_as_text(field)}, in {named(records)} of {root}.")
    if tables := [key for key, path in files if _is_table(path, kinds[key])]:
        tell(f"{_TABLES}, in {named(tables)} of {root}.")
    return ((key, _shard(path, field, kinds[key])) for key, path in files if kinds[key])


def newly_read(spec: str, text_field: str = "text") -> list[str]:
    """The files of a corpus that were left out, or were plain text, when runs did not save how a corpus is read."""
    root = Path(spec).absolute()
    if spec == "python" or spec.startswith(("tfds:", "arrayrecord:")) or not root.exists():
        return []
    real = os.path.realpath(root)

    def is_new(key: str, path: Path) -> bool:
        linked = root.is_dir() and os.path.realpath(path.parent) != os.path.join(real, *Path(key).parts[:-1])
        kind = kind_of(path, text_field)
        as_rows = kind in ("lines", "values") and path.suffix != ".jsonl"
        return kind is not None and (linked or as_rows or is_converted(path))

    files = files_below(root) if root.is_dir() else [(root.name, root)]
    return [key for key, path in files if path.is_file() and path.stat().st_size and is_new(key, path)]


def named(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _as_text(field: str) -> str:
    return f"read as plain text, as they have no text in the field {field!r} (set text_field to read their rows)"


_TABLES = (
    "CSV and TSV files are read as plain text, with all their columns (write one column as JSON lines to read rows)"
)


def _is_table(path: Path, kind: Kind | None) -> bool:
    return kind == "text" and not {".csv", ".tsv"}.isdisjoint(map(str.lower, path.suffixes))


def _shard(path: Path, field: str, kind: Kind) -> Shard:
    match kind:
        case "parquet":
            return Parquet(path, field)
        case "lines" | "values":
            return JsonLines(path, field, kind)
    return TextFile(path)


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


@contextlib.contextmanager
def tfds_errors(name: str) -> Iterator[None]:
    """Turns what TensorFlow Datasets raises for a data set into a ValueError of one sentence."""
    try:
        import importlib_resources  # noqa: F401 (TFDS does not install it, and needs it after it has downloaded)
        import tensorflow_datasets as tfds

        yield
    except ImportError as error:
        module = (error.name or str(error)).partition(".")[0]
        raise ValueError(
            f"tfds:{name} needs the module {module}, which is not installed; run `pip install {module}`."
        ) from error
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TensorFlow Datasets has no {name!r}; see tfds.list_builders() for the names.") from error
    except Exception as error:  # a builder may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"TensorFlow Datasets cannot prepare {name!r}: {reason}") from error


def _tfds(name: str, split: str, field: str) -> tuple[frozenset[str], Shards]:
    """The data set's own splits, and the shards that hold the documents of `split`."""
    with tfds_errors(name):
        import tensorflow_datasets as tfds

        sources = tfds.data_source(name)
    own = frozenset(SPLITS) & sources.keys()
    wanted = own if split == "all" else own & {split} or own & {"train"}
    for part in wanted:
        if field not in (features := sources[part].dataset_info.features):
            raise ValueError(f"tfds:{name} has no field {field!r} (it has {', '.join(features)}); set text_field.")
    return own, [(part, _Field(sources[part], field)) for part in SPLITS if part in wanted]
