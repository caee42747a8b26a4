"""Text as rows of words: the bytes from which a word is read, and its subword pieces, which a model predicts."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import ClassVar

import numpy as np

from jaxtok.data.noise import Noise
from jaxtok.data.text import TextData, row_arrays
from jaxtok.protocols import ArraySpec, Batch
from jaxtok.tokenizers import load_tokenizer
from jaxtok.tokenizers.byte_words import CLS, PAD, SEP, basic_words, word_array


@dataclasses.dataclass(frozen=True)
class WordPieceText(TextData):
    """Rows of `length` words: [CLS], a part of one document, [SEP], padding. The tokenizer cuts words into pieces.

    A batch has

    words       int32    [batch, length, max_bytes]  symbols, PAD after the last
    pieces      int32    [batch, length, max_pieces]  ids, -1 after the last
    inputs      int32    [batch, length, max_pieces]  the pieces of the words as they are read, with the noise
    mask        float32  [batch, length]  1 for words, [CLS] and [SEP], 0 for padding
    bytes       int32    how many bytes of text the word's pieces stand for
    cut         int32    1 where a word has more bytes or pieces than are kept
    """

    unit: ClassVar[str] = "words"

    max_bytes: int = 24
    max_pieces: int = 6
    noise: float = 0.0
    """The fraction of words that are read with an error in one character; their pieces stay those of the true word."""
    noise_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for field, least in {"max_bytes": 1, "max_pieces": 1, "length": 3, "noise_seed": 0}.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {least}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}; it must be in [0, 1].")

    def items(self, document: str | bytes) -> np.ndarray:
        """For each word its symbols, pieces, pieces as read, bytes, and whether it is cut: int32 [words, ...]. The
        words fill whole rows."""
        words, room = basic_words(document), self.length - 2
        read = self._noisy(document, words) if self.noise else words
        m, k = self.max_bytes, self.max_pieces
        rows = max(-(-len(words) // room), 1)
        array = np.full((rows, self.length, m + 2 * k + 2), -1, np.int32)
        array[..., :m], array[..., -2:] = PAD, 0
        for row, start in zip(array, range(0, rows * room, room)):
            part = range(start, min(start + room, len(words)))
            row[0, 0], row[len(part) + 1, 0] = CLS, SEP
            row[1 : len(part) + 1, :m] = word_array([read[i] for i in part], m)[0]
            for line, i in zip(row[1:], part):
                ids, lengths = _pieces(self.tokenizer, words[i])
                kept = ids[:k]
                line[m : m + len(kept)] = kept
                inputs = kept if read[i] == words[i] else _pieces(self.tokenizer, read[i])[0][:k]
                line[m + k : m + k + len(inputs)] = inputs
                line[-2:] = sum(lengths[:k]), len(ids) > k or len(words[i]) > m
        return array.reshape(-1, array.shape[-1])

    def _noisy(self, document: str | bytes, words: list[bytes]) -> list[bytes]:
        """The words with errors, which depend only on the document and on the seed."""
        noise = Noise(rate=self.noise, of="words")
        data = document if isinstance(document, bytes) else document.encode()
        rng = np.random.default_rng([self.noise_seed, zlib.crc32(data)])
        texts = (word.decode(errors="surrogateescape") for word in words)
        return [noise.word(text, rng).encode(errors="surrogateescape") for text in texts]

    def layout(self, rows: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> Batch:
        m, k = self.max_bytes, self.max_pieces
        real = segments > 0
        rows = np.where(real[..., None], rows, np.array([PAD] * m + [-1] * 2 * k + [0, 0], np.int32))
        return {
            "words": rows[..., :m],
            "pieces": rows[..., m : m + k],
            "inputs": rows[..., m + k : m + 2 * k],
            "mask": (rows[..., 0] != PAD).astype(np.float32),
            "bytes": rows[..., -2],
            "cut": rows[..., -1],
        }

    def batch_spec(self) -> dict[str, ArraySpec]:
        shape = (self.batch_size, self.length)
        wide = {"words": self.max_bytes, "pieces": self.max_pieces, "inputs": self.max_pieces}
        axes = ("batch", "length", None)
        spec = {name: ArraySpec((*shape, width), np.int32, axes) for name, width in wide.items()}
        return spec | row_arrays(shape, ("mask", "bytes", "cut"))


@functools.lru_cache(maxsize=65536)
def _pieces(tokenizer: str, word: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a word's pieces, and the number of bytes of each."""
    loaded = _tokenizer(tokenizer)
    ids = tuple(loaded.encode(word))
    return ids, tuple(len(loaded.token_bytes(i)) for i in ids)


_tokenizer = functools.lru_cache(maxsize=4)(load_tokenizer)
