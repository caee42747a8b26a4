"""A table of trigrams in arrays: which tokens follow two given ones, and with which score.

It is what ADED (`jaxtok.decoding.aded`, arXiv 2407.12021) searches for drafts, a cheap stand-in for the language model.
Built from a corpus, the score of c after (a, b) is count(a, b, c) / count(a, b); scores that texts have strengthened
since (`strengthen`) are no probabilities any more, and only ratios within a row mean something.

Rows are in an open-addressing hash table, so that they are found, added and changed under `jit` with static shapes. The
authors' code has a map of maps that grows without bound; here a row has a fixed width, and a new successor of a full
row takes the place of the one with the smallest score.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import safetensors
from jaxtyping import Array, Bool, Float, Int

from jaxtok.protocols import Tokenizer
from jaxtok.weights import write_weights

PROBES = 32
"""A row is at most so many slots, minus one, after the slot of its hash."""
_KEPT = 12  # successors of a row, as in the authors' code
_SPARE = 4
_BATCH = 2**22  # trigrams of a corpus that are sorted at a time
_LARGEST = 2**21  # three ids below it fit into an int64


@functools.lru_cache
def tell(message: str) -> None:
    """Warns, once in a process."""
    logging.getLogger("jaxtok").warning(message)


@flax.struct.dataclass
class TrigramTable:
    """Rows of successors by bigram. Its arrays may have a leading axis, for a table of each row of a batch."""

    keys: Int[Array, "slots 2"]
    """The bigram of each slot; -1: the slot is empty. The number of slots is a power of two."""
    successors: Int[Array, "slots width"]
    """By their scores, and those of equal scores by their ids; -1: there is none."""
    scores: Float[Array, "slots width"]
    """Above 0; 0 where there is no successor."""
    refused: Int[Array, ""]
    """How many trigrams could not be added, because the table was full."""

    @classmethod
    def empty(cls, slots: int, width: int, dtype: Any = jnp.float32) -> TrigramTable:
        """A table without rows, with room for about half as many as `slots`, which is rounded up to a power of two.

        >>> TrigramTable.empty(100, 4).keys.shape
        (128, 2)
        """
        slots = 1 << max(slots - 1, 1).bit_length()
        successors, scores = jnp.full((slots, width), -1, jnp.int32), jnp.zeros((slots, width), dtype)
        return cls(jnp.full((slots, 2), -1, jnp.int32), successors, scores, jnp.zeros((), jnp.int32))

    @property
    def width(self) -> int:
        """The most successors of a bigram."""
        return self.successors.shape[-1]

    def find(self, bigrams: Int[Array, "*queries 2"]) -> tuple[Int[Array, "*queries"], Bool[Array, "*queries"]]:
        """The slots of bigrams, and whether they are in the table."""
        slots = _places(bigrams, self.keys.shape[0])
        same = (self.keys[slots] == bigrams[..., None, :]).all(-1) & (bigrams >= 0).all(-1)[..., None]
        first = jnp.argmax(same, -1)
        return jnp.take_along_axis(slots, first[..., None], -1)[..., 0], same.any(-1)

    def rows(
        self, bigrams: Int[Array, "*queries 2"], below: TrigramTable | None = None
    ) -> tuple[Int[Array, "*queries width"], Float[Array, "*queries width"]]:
        """The successors of bigrams and their scores; those of `below` for bigrams that this table does not have."""
        slots, found = self.find(bigrams)
        none = (jnp.int32(-1), jnp.zeros((), self.scores.dtype)) if below is None else below.rows(bigrams)
        found = found[..., None]
        return jnp.where(found, self.successors[slots], none[0]), jnp.where(found, self.scores[slots], none[1])

    def strengthen(
        self,
        trigrams: Int[Array, "new 3"],
        real: Bool[Array, " new"],
        increment: float,
        cap: float,
        below: TrigramTable | None = None,
    ) -> TrigramTable:
        """Adds `increment` to the score of each trigram, up to `cap`; one that occurs twice gets it twice.

        Bigrams and successors that are not there are added. The result does not depend on the order of the trigrams.

        Args:
          real: the trigrams that count.
          below: a table whose row a bigram begins with, if this table does not have it yet.
        """
        order = jnp.lexsort((trigrams[:, 2], trigrams[:, 1], trigrams[:, 0], ~real))
        trigrams, real = trigrams[order], real[order]

        def add(number: Int[Array, ""], table: TrigramTable) -> TrigramTable:
            bigram, token, counts = trigrams[number, :2], trigrams[number, 2], real[number]
            slot, found = table.find(bigram)
            places = _places(bigram, table.keys.shape[0])
            free = table.keys[places, 0] < 0
            slot = jnp.where(found, slot, places[jnp.argmax(free)])
            successors, scores = table.rows(bigram, below)
            same, empty = successors == token, successors < 0
            # Its own place, or the first empty one, or the last, whose score is the smallest.
            last = jnp.where(empty.any(), jnp.argmax(empty), self.width - 1)
            place = jnp.where(same.any(), jnp.argmax(same), last)
            score = jnp.minimum(jnp.where(same.any(), scores[place], 0) + jnp.asarray(increment, scores.dtype), cap)
            successors, scores = successors.at[place].set(token), scores.at[place].set(score)
            by_score = jnp.lexsort((successors, -scores))
            fits = found | free.any()
            slot = jnp.where(counts & fits, slot, table.keys.shape[0])
            return TrigramTable(
                keys=table.keys.at[slot].set(bigram, mode="drop"),
                successors=table.successors.at[slot].set(successors[by_score], mode="drop"),
                scores=table.scores.at[slot].set(scores[by_score], mode="drop"),
                refused=table.refused + (counts & ~fits),
            )

        return jax.lax.fori_loop(0, len(trigrams), add, self)


def _places(bigrams, slots: int):
    """The slots where the row of a bigram can be, for NumPy's and JAX's arrays: multiplications and shifts."""
    x = bigrams.astype(np.uint32)
    x = x[..., 0] * np.uint32(0x9E3779B1) + x[..., 1] * np.uint32(0x85EBCA77)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> np.uint32(12))) * np.uint32(0x297A2D39)
    x = x ^ (x >> np.uint32(15))
    return ((x[..., None] + np.arange(PROBES, dtype=np.uint32)) & np.uint32(slots - 1)).astype(np.int32)


# --- From texts ---


def build_table(
    sequences: Iterable[Sequence[int]],
    vocab_size: int,
    *,
    kept: int = _KEPT,
    spare: int = _SPARE,
    room: int = 0,
    dtype: Any = np.float32,
) -> TrigramTable:
    """The table of some token sequences: of each bigram, the most frequent successors and their shares.

    Args:
      sequences: those shorter than three tokens count for nothing.
      vocab_size: all ids are below it.
      kept: the most successors of a bigram; of equally frequent ones, those with the lower ids. Their shares are not
        renormalised.
      spare: the places of each row for successors that it gets later.
      room: the bigrams that the table has room for; the number of slots is a power of two, at least twice as large. 0:
        as many as there are, and what is left of the slots is for later ones.

    Raises:
      ValueError: an id is not in the vocabulary, or a number is out of range.

    >>> table = build_table([[1, 2, 3, 4, 5, 1, 2, 3, 7], [1, 2, 4], [9, 9]], vocab_size=10)
    >>> successors, scores = table.rows(jnp.array([1, 2]))
    >>> successors[:3].tolist(), [round(score, 3) for score in scores[:2].tolist()]
    ([3, 4, -1], [0.667, 0.333])
    """
    counts = count_trigrams(sequences, vocab_size)
    if kept < 1 or spare < 0 or room < 0:
        raise ValueError(f"kept is {kept}, spare {spare} and room {room}; kept must be at least 1, the others 0.")
    bigrams, successors = np.divmod(counts[0], vocab_size)
    keys, begin, row = np.unique(bigrams, return_index=True, return_inverse=True)
    of_row = np.add.reduceat(counts[1], begin) if len(keys) else np.zeros(0, np.int64)
    shares = (counts[1] / of_row[row]).astype(dtype)
    keys = np.stack(np.divmod(keys, vocab_size), -1)
    return _from_entries(keys, row, successors, shares, kept, kept + spare, room)


def count_trigrams(
    sequences: Iterable[Sequence[int]], vocab_size: int
) -> tuple[Int[np.ndarray, " trigrams"], Int[np.ndarray, " trigrams"]]:
    """The trigrams (a, b, c) of some sequences as (a * vocab_size + b) * vocab_size + c, sorted, and their numbers.

    Raises:
      ValueError: an id is not in the vocabulary.
    """
    if not 1 <= vocab_size <= _LARGEST:
        raise ValueError(f"vocab_size is {vocab_size}; it must be between 1 and {_LARGEST:,}.")
    trigrams, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    parts: list[np.ndarray] = []

    def merged() -> tuple[np.ndarray, np.ndarray]:
        new, number = np.unique(np.concatenate([trigrams[:0], *parts]), return_counts=True)
        both, place = np.unique(np.concatenate([trigrams, new]), return_inverse=True)
        return both, np.bincount(place, np.concatenate([counts, number]), len(both)).astype(np.int64)

    for number, sequence in enumerate(sequences):
        ids = np.asarray(sequence, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            odd = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ValueError(f"sequence {number} has the id {odd}; ids must be 0 to {vocab_size - 1}.")
        if len(ids) > 2:
            parts.append((ids[:-2] * vocab_size + ids[1:-1]) * vocab_size + ids[2:])
        if sum(map(len, parts)) >= _BATCH:
            trigrams, counts = merged()
            parts.clear()
    return merged()


def _from_entries(
    keys: Int[np.ndarray, "rows 2"],
    row: Int[np.ndarray, " entries"],
    successors: Int[np.ndarray, " entries"],
    scores: Float[np.ndarray, " entries"],
    kept: int,
    width: int,
    room: int,
) -> TrigramTable:
    """The table with the `kept` best entries of each row."""
    order = np.lexsort((successors, -scores, row))
    row, successors, scores = row[order], successors[order], scores[order]
    first = np.searchsorted(row, np.arange(len(keys)))
    place = np.arange(len(row)) - first[row]
    best = place < kept
    wide = np.full((len(keys), width), -1, np.int32), np.zeros((len(keys), width), scores.dtype)
    wide[0][row[best], place[best]] = successors[best]
    wide[1][row[best], place[best]] = scores[best]
    return _hashed(keys, *wide, room)


def _hashed(keys: Int[np.ndarray, "rows 2"], successors, scores, room: int) -> TrigramTable:
    """The table of some rows."""
    keys = np.asarray(keys, np.int32)
    slots = 1 << (2 * max(room, len(keys), PROBES) - 1).bit_length()
    while (slot_of := _slots_of(keys, slots)) is None:
        slots *= 2
    table = [np.full((slots, 2), -1, np.int32), np.full((slots, successors.shape[1]), -1, np.int32)]
    table.append(np.zeros((slots, scores.shape[1]), scores.dtype))
    for target, source in zip(table, (keys, successors, scores)):
        target[slot_of] = source
    return TrigramTable(*map(jnp.asarray, table), jnp.zeros((), jnp.int32))


def _slots_of(keys: Int[np.ndarray, "rows 2"], slots: int) -> Int[np.ndarray, " rows"] | None:
    """A slot for each bigram, by linear probing; None: one of them would be too far from the slot of its hash."""
    places = _places(keys, slots)
    found, waiting, taken = np.zeros(len(keys), np.int64), np.arange(len(keys)), np.zeros(slots, bool)
    for probe in range(PROBES):
        wanted = places[waiting, probe]
        slot, first = np.unique(wanted, return_index=True)
        first = first[~taken[slot]]
        found[waiting[first]] = wanted[first]
        taken[wanted[first]] = True
        waiting = np.delete(waiting, first)
        if not len(waiting):
            return found
    return None if len(waiting) else found


def corpus_table(
    tokenizer: Tokenizer,
    corpus: str = "python",
    *,
    split: str = "train",
    text_field: str = "text",
    share: float = 1.0,
    progress: bool = True,
    **options: Any,
) -> TrigramTable:
    """The table of a corpus, whose documents a model's tokenizer encodes.

    Args:
      corpus, split, text_field: as of `jaxtok.data.corpora.open_corpus`; default: the Python library's sources.
      share: the share of the documents that is read, evenly from all of the corpus.
      progress: whether a bar is shown, if there is a terminal.
      options: of `build_table`.

    Raises:
      ValueError, FileNotFoundError: as `open_corpus` and `build_table`; or the share is not above 0 and at most 1.
    """
    from jaxtok.data.corpora import open_corpus  # texts are needed for this only

    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1.")
    documents = open_corpus(corpus, split, text_field=text_field)
    numbers = np.arange(0, len(documents), 1 / share).astype(int)
    console = rich.console.Console(stderr=True)

    def sequences() -> Iterator[list[int]]:
        with rich.progress.Progress(
            console=console, transient=True, disable=not (progress and console.is_terminal)
        ) as bar:
            for number in bar.track(numbers, description=f"counting trigrams of {corpus}"):
                if (document := documents[int(number)]) is not None:
                    yield tokenizer.encode(document)

    return build_table(sequences(), tokenizer.vocab_size, **options)


# --- Files ---


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A hash of the bytes of all ids, which tells whether two tokenizers mean the same by an id."""
    digest = hashlib.blake2b(digest_size=16)
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        digest.update(struct.pack("<i", len(piece)) + piece)
    return digest.hexdigest()


def used_rows(table: TrigramTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bigrams of a table in their order, and their successors and scores."""
    keys, successors, scores = map(np.asarray, (table.keys, table.successors, table.scores))
    used = np.flatnonzero(keys[:, 0] >= 0)
    used = used[np.lexsort((keys[used, 1], keys[used, 0]))]
    return keys[used], successors[used], scores[used]


def save_table(path: str | Path, table: TrigramTable, tokenizer: Tokenizer) -> Path:
    """Writes a table as a safetensors file, with the tokenizer's hash and size. A failure leaves no file.

    It warns if the table was too full for some trigrams.

    Raises:
      FileExistsError: the file exists already.
      ValueError: the name has another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors.")
    if lost := int(table.refused):
        tell(f"{lost} trigrams were not added to the table, as it was full; make it with more room.")
    keys, successors, scores = used_rows(table)
    arrays = {"keys": keys, "successors": successors, "scores": scores}
    facts = {"vocab_size": str(tokenizer.vocab_size), "tokenizer": tokenizer_digest(tokenizer), "format": "trigrams"}
    return write_weights(path, arrays, facts)


def load_table(path: str | Path, tokenizer: Tokenizer, *, room: int = 0) -> TrigramTable:
    """Reads what `save_table` wrote.

    Args:
      room: as of `build_table`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, holds something else, or is of another tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with save_table.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            keys, successors, scores = (file.get_tensor(name) for name in ("keys", "successors", "scores"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a table of trigrams ({error}); make it again.") from error
    size, digest = str(tokenizer.vocab_size), tokenizer_digest(tokenizer)
    if (metadata.get("vocab_size"), metadata.get("tokenizer")) != (size, digest):
        raise ValueError(
            f"{path} is a table of another tokenizer, with {metadata.get('vocab_size', 'unknown')} ids; make one for "
            f"this tokenizer, which has {size}."
        )
    rows, width = successors.shape if successors.ndim == 2 else (-1, -1)
    if keys.shape != (rows, 2) or scores.shape != (rows, width) or scores.dtype.kind != "f":
        raise ValueError(f"{path} is no table of trigrams, as the shapes of its arrays do not fit; make it again.")
    _check_rows(path, keys, successors, scores, tokenizer.vocab_size)
    return _hashed(keys, successors, scores, room)


def _check_rows(path: Path, keys, successors, scores, vocab_size: int) -> None:
    """Raises a ValueError for ids outside of the vocabulary, bigrams that occur twice, and scores that are none."""
    ids = np.concatenate([keys.ravel(), successors[successors != -1].ravel()])
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        odd = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(f"{path} has the id {odd}; ids must be 0 to {vocab_size - 1}.")
    if len(np.unique(keys, axis=0)) < len(keys):
        raise ValueError(f"{path} has two rows of one bigram; make it again.")
    if not np.isfinite(scores).all() or (scores < 0).any() or ((scores > 0) != (successors >= 0)).any():
        raise ValueError(f"{path} has a score that is not a positive number; make it again.")


def read_index(
    path: str | Path, vocab_size: int, *, kept: int = _KEPT, spare: int = _SPARE, room: int = 0
) -> TrigramTable:
    """Reads an index of the authors' drafter (`draftretriever`), little-endian: the number of rows, uint64; then for
    each row its bigram, 2 int32, its length, uint64, and so many pairs of a token, int32, and its share, float32.

    Args:
      vocab_size, kept, spare, room: as of `build_table`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or an id is not in the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an index of draftretriever.")
    data = path.read_bytes()
    entry = np.dtype([("token", "<i4"), ("score", "<f4")])
    try:
        (rows,) = struct.unpack_from("<Q", data)
        keys, entries, at = [], [], 8
        for _ in range(rows):
            first, second, count = struct.unpack_from("<iiQ", data, at)
            keys.append((first, second))
            entries.append(np.frombuffer(data, entry, count, at + 16))
            at += 16 + entry.itemsize * count
    except (struct.error, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is cut off or not an index of draftretriever; fetch it again.") from error
    if at != len(data):
        raise ValueError(f"{path} has {len(data) - at} bytes after its last row; fetch it again.")
    keys = np.array(keys, np.int32).reshape(-1, 2)
    row = np.repeat(np.arange(len(keys)), [len(of_row) for of_row in entries])
    found = np.concatenate([np.zeros(0, entry), *entries])
    _check_rows(path, keys, found["token"], found["score"], vocab_size)
    return _from_entries(keys, row, found["token"], found["score"], kept, kept + spare, room)


def write_index(path: str | Path, table: TrigramTable) -> Path:
    """Writes a table as the authors' drafter reads it; see `read_index`.

    Raises:
      FileExistsError: the file exists already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name (nothing was written).")
    keys, successors, scores = used_rows(table)
    parts = [struct.pack("<Q", len(keys))]
    for bigram, tokens, of_tokens in zip(keys, successors, scores.astype("<f4")):
        count = int((tokens >= 0).sum())
        parts.append(struct.pack("<iiQ", *bigram.tolist(), count))
        parts.extend(struct.pack("<if", *pair) for pair in itertools.islice(zip(tokens, of_tokens), count))
    half_done = path.with_name(path.name + ".part")
    try:
        half_done.write_bytes(b"".join(parts))
        half_done.rename(path)
    finally:
        half_done.unlink(missing_ok=True)
    return path
