"""Files of documents: plain or compressed text, JSON lines, JSON, and Parquet, each with random access to its rows.

What cannot be read at random as it is (a compressed file of many rows, Parquet, an array of JSON) is written once, row
by row, to a plain copy in the user's cache folder.
"""

from __future__ import annotations

import bisect
import bz2
import codecs
import errno
import gzip
import hashlib
import json
import logging
import lzma
import mmap
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from jaxtok.cache import cache_folder

Kind = Literal["text", "records", "lines", "values", "parquet"]
Document = str | bytes
Shard = Sequence[Document]

_BLOCK = 8192  # bytes of a document, if one text file is the whole corpus
_SHARE, _LEAST = 20, 16  # a corpus of one document is cut into so many parts, of so many bytes or more
_HEAD = 1000  # rows of which one must have a text
_VALUE = 2**28  # characters of one value in a JSON file
_CHUNK = 2**20
_TOLD = 2**28  # bytes of a Parquet file whose decoding is told
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"} | {
    codecs.BOM_UTF16_BE: "utf-16"
}  # in this order, as the first begins with that of UTF-16
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)  # what reading a damaged file may raise


class NoText(ValueError):
    """A row has no text; the message says which one, and why."""


@lru_cache(maxsize=1024)
def tell(message: str) -> None:
    """Warns, once in a process, of what is left out of a corpus or read in another way than its owner may expect."""
    logging.getLogger("jaxtok").warning(message)


# --- Plain copies ---


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file as a whole or not at all, also if other processes write it at the same time."""
    handle, half = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(half, path)
    finally:
        Path(half).unlink(missing_ok=True)


def _copy(path: Path, kind: str, write: Callable[[BinaryIO], Any], room: int = 0) -> Path:
    """The copy of a file that `write` makes, which is kept until the file changes.

    Raises:
        OSError: it cannot be written, or the disk has no room for so many bytes.
    """
    state = path.stat()
    key = "\0".join([str(path.resolve()), str(state.st_size), str(state.st_mtime_ns), kind])
    name = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    copy = cache_folder("corpora") / name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        if room > (free := shutil.disk_usage(copy.parent).free) // 2:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free, and {room:,} are needed")
        write_whole(copy, write)
    return copy


def _opened(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow as pa

            return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return path.open("rb")


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst")


def is_converted(path: Path) -> bool:
    """Whether the file is not read as it is, but unpacked or converted to UTF-8."""
    if _is_compressed(path):
        return True
    with path.open("rb") as file:
        return bool(_encoding(file.read(4)))


def _encoding(head: bytes) -> str:
    """The encoding that a byte order mark tells; empty: UTF-8, or none that is known."""
    return next((encoding for mark, encoding in _BOMS.items() if head.startswith(mark)), "")


def _plain(path: Path) -> Path:
    """The file itself, or its copy without compression and in UTF-8.

    Raises:
        ValueError: it is damaged.
        OSError: the copy cannot be written.
    """

    def write(target: BinaryIO) -> None:
        with _opened(path) as source:
            if not encoding:
                shutil.copyfileobj(source, target, _CHUNK)
                return
            decoder = codecs.getincrementaldecoder(encoding)()
            while chunk := source.read(_CHUNK):
                target.write(decoder.decode(chunk).encode())
            target.write(decoder.decode(b"", final=True).encode())

    try:
        with _opened(path) as file:
            encoding = _encoding(file.read(4))
        return _copy(path, "plain", write) if encoding or _is_compressed(path) else path
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> Exception:
    """The error to raise for one that came from reading or copying a file."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        folder = cache_folder("corpora")
        return OSError(f"{path} cannot be unpacked to {folder} ({error}); set XDG_CACHE_HOME to a folder with room.")
    if isinstance(error, OSError) and error.errno:
        return error
    return ValueError(f"{path} cannot be read to its end ({error}); replace or remove it.")


# --- What a file is ---


def kind_of(path: Path, field: str) -> Kind | None:
    """What a file is read as; None: it is no text.

    text     the file is one document, or is cut into documents
    records  the same, but the file seems to be JSON lines without a text in the field
    lines    every line is a JSON object
    values   JSON objects, in an array or one after the other, over any number of lines
    parquet  a Parquet file

    Files named .json hold rows only if one of their first objects has a text in the field.
    """
    bare = path.with_suffix("") if _is_compressed(path) else path
    match bare.suffix.lower():
        case ".parquet" if bare is path:
            return "parquet"
        case ".jsonl" | ".ndjson" if bare is path or _is_text(path):
            return "lines"
        case ".json" if _is_text(path):
            return _json_kind(path, field)
    return "text" if _is_text(path) else None


def _is_text(path: Path) -> bool:
    try:
        with _opened(path) as file:
            head = file.read(8192)
        if encoding := _encoding(head):
            return "\0" not in codecs.getincrementaldecoder(encoding)().decode(head)
    except _DAMAGED:
        return False
    return b"\0" not in head


def _json_kind(path: Path, field: str) -> Kind:
    try:
        with _opened(path) as file:
            values = list(islice(_json_values(_characters(path, file)), 10))
    except (*_DAMAGED, ValueError):
        return "text"
    with _opened(path) as file:
        line = _characters(path, file).read(_CHUNK).lstrip().split("\n", 1)[0]
    try:
        lines = isinstance(json.loads(line), dict)
    except ValueError:
        lines = False
    if any(isinstance(value, dict) and isinstance(value.get(field), str) for value in values):
        return "lines" if lines else "values"
    return "records" if lines and len(values) > 1 else "text"


def _characters(path: Path, file: BinaryIO) -> codecs.StreamReader:
    with _opened(path) as same:
        encoding = _encoding(same.read(4))
    return codecs.getreader(encoding or "utf-8-sig")(file)


def _json_values(file: codecs.StreamReader) -> Iterator[Any]:
    """The elements of an array, or values that follow each other. Raises ValueError at the first that is not whole."""
    decoder, buffer, start = json.JSONDecoder(), file.read(_CHUNK).lstrip(), 0
    if buffer.startswith("["):
        start = 1
    while True:
        while start < len(buffer) and (buffer[start].isspace() or buffer[start] == ","):
            start += 1
        if buffer.startswith("]", start):
            return
        try:
            value, start = decoder.raw_decode(buffer, start)
        except ValueError:
            more = file.read(max(_CHUNK, len(buffer) - start)) if len(buffer) - start < _VALUE else ""
            if not more and start == len(buffer):
                return
            if not more:
                raise
            buffer, start = buffer[start:] + more, 0
        else:
            yield value


# --- Rows. All open their files for each read, so that they can be pickled and used from threads. ---


class TextFile(Sequence):
    """A text file as one document: its bytes, unpacked, and in UTF-8 if it has the byte order mark of UTF-16 or 32."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> bytes:
        try:
            with _opened(self.path) as file:
                data = file.read()
            encoding = _encoding(data[:4])
            return data.decode(encoding).encode() if encoding else data
        except FileNotFoundError:
            raise
        except _DAMAGED as error:
            raise NoText(f"{self.path} cannot be read to its end ({error})") from error


class Spans(Sequence):
    """Parts of a file between byte offsets."""

    def __init__(self, path: Path, starts: Sequence[int], stops: Sequence[int]):
        self.path, self._starts, self._stops = path, np.asarray(starts, np.int64), np.asarray(stops, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Document:
        with self.path.open("rb") as file:
            file.seek(self._starts[row])
            return file.read(self._stops[row] - self._starts[row])


def text_blocks(path: Path) -> Spans:
    """Blocks of about 8 KiB of a text file, cut at line ends."""
    path = _plain(path)
    if not path.stat().st_size:  # of a compressed file
        return Spans(path, [], [])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cuts = [0]
        while cuts[-1] < len(data):
            line_end = data.find(b"\n", cuts[-1] + _BLOCK - 1) + 1
            cuts.append(line_end or len(data))
    return Spans(path, cuts[:-1], cuts[1:])


def cut(shards: Sequence[Shard]) -> list[Shard]:
    """The documents cut into parts, at white space: a twentieth of all text each, but 16 bytes to 8 KiB.

    Text files are read as far as is needed; other documents are kept in memory.
    """
    texts: list[Path | list[bytes]] = []
    for shard in shards:
        if isinstance(shard, TextFile) or type(shard) is Spans:
            texts.append(_plain(shard.path))
        else:
            documents = (shard[row] for row in range(len(shard)))
            texts.append([text if isinstance(text, bytes) else text.encode() for text in documents])
    total = sum(text.stat().st_size if isinstance(text, Path) else sum(map(len, text)) for text in texts)
    size = min(max(total // _SHARE, _LEAST), _BLOCK)
    parts: list[Shard] = []
    for text in texts:
        if isinstance(text, Path):
            cuts = [0]
            if text.stat().st_size:
                with text.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    cuts = _cuts(data, size)
            parts.append(Spans(text, cuts[:-1], cuts[1:]))
        else:
            cuts = [_cuts(document, size) for document in text]
            parts.append([d[a:b] for d, at in zip(text, cuts) for a, b in pairwise(at)])
    return parts


def _cuts(data: bytes | mmap.mmap, size: int) -> list[int]:
    """Offsets at which a text is cut into parts of `size` bytes or less: after white space in the second half of a
    part, else between characters."""
    cuts = [0]
    while (end := cuts[-1] + size) < len(data):
        half = cuts[-1] + size // 2
        space = max(data.rfind(mark, half, end) for mark in (b" ", b"\n")) + 1
        for _ in range(3):  # a character has three bytes after its first at most
            end += data[end] & 0xC0 == 0x80 if end < len(data) else 0
        cuts.append(space or end)
    return [*cuts, len(data)] if cuts[-1] < len(data) else cuts


class JsonLines(Spans):
    """The lines of a file of JSON lines that are not blank, or the objects of another JSON file.

    Raises:
        ValueError: the file is damaged, or the first rows have no text.
    """

    def __init__(self, path: Path, field: str, kind: Literal["lines", "values"] = "lines"):
        self._name, self._field = path, field
        plain = _plain(path) if kind == "lines" else _copy(path, "values", self._write_values)
        starts, stops, offset = [], [], 0
        with plain.open("rb") as file:
            for line in file:
                if not line.isspace():
                    starts.append(offset)
                    stops.append(offset + len(line))
                offset += len(line)
        super().__init__(plain, starts, stops)
        first = None
        for row in range(min(len(self), _HEAD)):  # a wrong field is told at once
            try:
                self[row]
                break
            except NoText as error:
                first = first or error
        else:
            if first:
                raise ValueError(f"{first}; set text_field, or correct the file.")

    def _write_values(self, target: BinaryIO) -> None:
        try:
            with _opened(self._name) as file:
                for value in _json_values(_characters(self._name, file)):
                    target.write(json.dumps(value).encode() + b"\n")
        except (*_DAMAGED, json.JSONDecodeError) as error:
            raise _damaged(self._name, error) from error

    def __getitem__(self, row: int) -> str:
        try:
            record = json.loads(super().__getitem__(row))
        except (ValueError, RecursionError) as error:
            raise NoText(f"row {row} of {self._name} is not JSON ({error})") from error
        text = record.get(self._field) if isinstance(record, dict) else None
        if isinstance(text, str):
            if not is_unicode(text):
                raise NoText(f"row {row} of {self._name} has half of a pair of surrogates in the field {self._field!r}")
            return text
        if not isinstance(record, dict):
            fields = f"it is a {type(record).__name__}"
        elif self._field in record:
            fields = "it is null" if text is None else f"its type is {type(text).__name__}"
        else:
            fields = f"it has {', '.join(record)}"
        raise NoText(f"row {row} of {self._name} has no text in the field {self._field!r} ({fields})")


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8, as it has no half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Parquet(Sequence):
    """The rows of one column of a Parquet file; a null is an empty text.

    A row is read from a copy of the column, of its decoded texts and then their ends (int64), as Parquet itself has to
    decode a row group, often thousands of rows, for one of them. Without room for the copy, that is what is done.

    Raises:
        ValueError: the file is damaged, or the column has no text.
    """

    def __init__(self, path: Path, field: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                parts = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file ({error}); replace or remove it.") from error
        type = schema.field(field).type if field in schema.names else None
        if type is not None and pa.types.is_dictionary(type):
            type = type.value_type
        text_types = (pa.string(), pa.large_string(), pa.string_view())
        if type not in (*text_types, pa.binary(), pa.large_binary()):
            raise ValueError(
                f"{path} has no text in the field {field!r} (it has {', '.join(schema.names)}); set text_field."
            )
        self._path, self._field, self._is_text = path, field, type in text_types
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)]).tolist()
        self._copy, self._ends = None, None
        columns = (part.column(i) for part in parts for i in range(part.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field) + 8 * len(self)
        if not len(self):
            return
        try:
            copy = _copy(path, f"column {field}", lambda target: self._write(target, size), size)
            self._ends = np.fromfile(copy, np.int64, len(self), offset=copy.stat().st_size - 8 * len(self))
            self._copy = copy
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not a readable Parquet file ({error}); replace or remove it.") from error
        except OSError as error:
            if not error.errno:  # Arrow's own
                raise ValueError(f"{path} is not a readable Parquet file ({error}); replace or remove it.") from error
            tell(
                f"{path} cannot be copied to {cache_folder('corpora')}, so that reading it in random order is slow "
                f"({error}); set XDG_CACHE_HOME to a folder with room, or convert the file to JSONL."
            )

    def _write(self, target: BinaryIO, size: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if size > _TOLD:
            print(f"decoding {self._path} once ({size / 1e9:.1f} GB) ...", file=sys.stderr, flush=True)
        ends, end = [], 0
        with pq.ParquetFile(self._path, buffer_size=_CHUNK) as file:
            for batch in file.iter_batches(1024, columns=[self._field]):
                column = batch.column(0)
                if self._is_text:
                    column = column.cast(pa.large_string())
                column = column.cast(pa.large_binary()).fill_null(b"")
                _, offsets, data = column.buffers()
                offsets = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
                if data is not None:
                    target.write(memoryview(data)[offsets[0] : offsets[-1]])
                ends.append(offsets[1:] - offsets[0] + end)
                end = int(ends[-1][-1])
        target.write(np.concatenate(ends).tobytes())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Document:
        try:
            if self._copy is None:
                group = bisect.bisect_right(self._starts, row) - 1
                return _row_group(self._path, group, self._field)[row - self._starts[group]].as_py() or ""
            start = self._ends[row - 1] if row else 0
            with self._copy.open("rb") as file:
                file.seek(start)
                data = file.read(self._ends[row] - start)
            return data.decode() if self._is_text or not data else data
        except UnicodeDecodeError as error:
            raise NoText(f"row {row} of {self._path} is not UTF-8 in the field {self._field!r}") from error


@lru_cache(maxsize=8)
def _row_group(path: Path, group: int, field: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[field]).column(0)
