"""Text as packed rows of words, for models whose sequence is words and whose words are spelled in smaller units."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxtok.data.text import TextData, row_arrays
from jaxtok.protocols import ArraySpec, Batch
from jaxtok.tokenizers.words import WordSplitter


@dataclasses.dataclass(frozen=True)
class WordText(TextData):
    """Rows of words, each with the word that follows it. `length` counts words; a batch has

        words           int32    [batch, length, max_units]  the input words' units, 0 after their ends
        lengths         int32    [batch, length]  units of each input word; 0: the start of a document
        targets         int32    [batch, length, max_units]  the word that follows each
        target_lengths  int32    [batch, length]  0: the end of the document
        positions       int32    [batch, length]  the input's number in its document, from 0 at the first one in the row
        segments        int32    [batch, length]  1, 2, ... for the documents in a row, 0 for padding
        mask            float32  [batch, length]  1 where the target counts, else 0
        bytes           int32    [batch, length]  the number of bytes of text in the target word

    A document w1..wn has the inputs [start, w1..wn] and the targets [w1..wn, end], so that every word is a target once
    and a row that continues a document begins with the word before the cut.

    Raises:
        ValueError: a number is out of range, or an option is set that rows of words do not have.
    """

    unit: ClassVar[str] = "words"

    tokenizer: str = "bytes"
    """The tokenizer that makes the units of a word; with "bytes", they are its bytes."""
    length: int = 64
    """The number of words in a row."""
    splitter: WordSplitter = WordSplitter()
    max_units: int = 16
    """The most units of a word. A longer word becomes several; if units are bytes, it is cut between characters."""
    start: bool = True
    """Whether the first word of a document is a target too, with the start as its input."""
    end: bool = True
    """Whether the end of a document is a target, with the last word as its input."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_units < 1:
            raise ValueError(f"max_units is {self.max_units}; it must be at least 1.")
        if not self.isolate_documents or self.mask_eod:
            raise ValueError(
                f"isolate_documents is {self.isolate_documents} and mask_eod is {self.mask_eod}; in rows of words they "
                "must be True and False."
            )

    def words(self, document: str | bytes) -> list[tuple[Sequence[int], int]]:
        """Each word's units (at least 1, at most max_units) and how many bytes of the text they stand for."""
        if self.tokenizer == "bytes":
            most = min(self.max_units, self.splitter.max_word_size)
            splitter = dataclasses.replace(self.splitter, max_word_size=most)
            return [(word, len(word)) for word in splitter.split(document)]
        words: list[tuple[Sequence[int], int]] = []
        tokenizer = self.loaded_tokenizer
        for word in self.splitter.split(document):
            ids = tokenizer.encode(word)
            parts = [ids[i : i + self.max_units] for i in range(0, len(ids), self.max_units)]
            sizes = [sum(len(tokenizer.token_bytes(i)) for i in part) for part in parts[1:]]
            words += zip(parts, [len(word) - sum(sizes), *sizes])
        return words

    def items(self, document: str | bytes) -> np.ndarray:
        """Each input's length and units, its target's, and the target's bytes: int32 [inputs, 2 max_units + 3]."""
        words = self.words(document)
        nothing: list[tuple[Sequence[int], int]] = [((), 0)]
        words = nothing * self.start + words + nothing * self.end
        table = np.zeros((len(words), 1 + self.max_units), np.int32)
        for row, (units, _) in zip(table, words):
            row[0] = len(units)
            row[1 : 1 + len(units)] = list(units)
        sizes = np.array([[size] for _, size in words[1:]], np.int32).reshape(-1, 1)
        return np.concatenate([table[:-1], table[1:], sizes], axis=1)

    def layout(self, rows: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> Batch:
        """The batch of packed items [batch, length, 2 max_units + 3]."""
        m = self.max_units
        return {
            "words": np.ascontiguousarray(rows[..., 1 : 1 + m]),
            "lengths": np.ascontiguousarray(rows[..., 0]),
            "targets": np.ascontiguousarray(rows[..., 2 + m : 2 + 2 * m]),
            "target_lengths": np.ascontiguousarray(rows[..., 1 + m]),
            "positions": positions,
            "segments": segments,
            "mask": (segments > 0).astype(np.float32),
            "bytes": np.ascontiguousarray(rows[..., -1]),
        }

    def batch_spec(self) -> dict[str, ArraySpec]:
        shape = (self.batch_size, self.length)
        units = ArraySpec((*shape, self.max_units), np.int32, ("batch", "length", None))
        rest = ("lengths", "target_lengths", "positions", "segments", "mask", "bytes")
        return {"words": units, "targets": units} | row_arrays(shape, rest)
