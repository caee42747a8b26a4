"""Words without spaces between them, spelled in bytes, characters or subwords (Learn Your Tokens, arXiv 2310.11628).

paper     the authors' preprocessing: markup of WikiText and newlines become spaces, punctuation becomes words
spaces    the strings between whitespace
letters   runs of a to z, in lower case; everything else is a space
lossless  the words of `WordText.splitter`, with the whitespace; the only rule that keeps the text as it is
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from jaxtok.data.corpora import open_corpus
from jaxtok.data.text import TextData
from jaxtok.data.words import WordText
from jaxtok.tokenizers import load_tokenizer
from jaxtok.tokenizers.words import limited

WordRule = Literal["paper", "spaces", "letters", "lossless"]
RULES = ("paper", "spaces", "letters", "lossless")

_MARKUP = re.compile(r"<unk>|@-@|=")
_PUNCTUATION = re.compile(r"--|[-{}:,;.!'?]")
_NO_LETTERS = re.compile(r"[^a-z]+")
BYTE_OFFSET = 3  # ByT5's ids 0, 1 and 2 are padding, the end of a text, and unknown


def spaced_words(document: str | bytes, rule: WordRule) -> list[bytes]:
    """The words of a document, by a rule that drops the whitespace between them.

    The paper's rule is what the authors' pattern is meant to do: "--" is one word, and "}:" is two.
    """
    text = document.decode(errors="surrogateescape") if isinstance(document, bytes) else document
    match rule:
        case "paper":
            text = _PUNCTUATION.sub(r" \g<0> ", _MARKUP.sub(" ", text))
        case "letters":
            text = _NO_LETTERS.sub(" ", text.lower())
    return [word.encode(errors="surrogateescape") for word in text.split()]


@dataclasses.dataclass(frozen=True)
class Units:
    """The ids of a tokenizer as units; unit 0 ends a word.

    Bytes have ByT5's ids. For other tokenizers, the id that ends a document, which is in no word, makes room: lower ids
    move up by one.
    """

    spec: str
    size: int
    """The number of units, 0 included."""
    pieces: tuple[bytes, ...]
    """The bytes of each unit."""
    leading_space: bool
    """Whether words are encoded with a space before them, as the tokenizer's tokens have it (" the")."""

    def encode(self, word: bytes, spaced: bool = True) -> list[int]:
        """The units of a word. `spaced` says that the text has a space before the word, which is not part of it."""
        if self.spec == "bytes":
            return [byte + BYTE_OFFSET for byte in word]
        tokenizer = load_units_tokenizer(self.spec)
        ids = tokenizer.encode(b" " + word if self.leading_space and spaced else word)
        return [i + (i < tokenizer.eod_id) for i in ids]

    def decode(self, units: Iterable[int], spaced: bool = True) -> bytes:
        """The word of these units; ids that are no units are ignored."""
        text = b"".join(self.pieces[unit] for unit in units if 0 < unit < self.size)
        return text.removeprefix(b" ") if self.leading_space and spaced else text

    @property
    def allowed(self) -> np.ndarray:
        """Whether each unit may be generated: those that stand for bytes, and the end of a word."""
        return np.array([i == 0 or bool(piece) for i, piece in enumerate(self.pieces)])


load_units_tokenizer = functools.lru_cache(maxsize=4)(load_tokenizer)


@functools.lru_cache(maxsize=4)
def load_units(spec: str) -> Units:
    """The units of a tokenizer (`jaxtok.tokenizers.load_tokenizer`)."""
    if spec == "bytes":
        pieces = [b""] * BYTE_OFFSET + [bytes([byte]) for byte in range(256)]
        return Units(spec, 384, tuple(pieces + [b""] * (384 - len(pieces))), False)
    tokenizer = load_units_tokenizer(spec)
    pieces = [b""] * tokenizer.vocab_size
    for i in range(tokenizer.vocab_size):
        if i != tokenizer.eod_id:
            pieces[i + (i < tokenizer.eod_id)] = tokenizer.token_bytes(i)
    spaced = any(piece.startswith(b" ") and len(piece) > 1 for piece in pieces)
    adds_space = b"".join(map(tokenizer.token_bytes, tokenizer.encode(b"x"))) == b" x"  # by itself
    return Units(spec, tokenizer.vocab_size, tuple(pieces), leading_space=spaced and not adds_space)


@dataclasses.dataclass(frozen=True)
class WordUnitText(WordText):
    """Rows of words in units; see `WordText`. A unit of 0 ends a word that has fewer than `max_units`.

    The bytes of a word include the space after it, for which its end stands, except for a document's last word: over a
    document, they are those of `NormalizedText`.
    """

    rule: WordRule = "paper"
    long_words: Literal["split", "cut"] = "split"
    """What happens to a word of more than max_units. split: it becomes several words; cut: only its beginning stays.
    `long_words_of` counts these words."""

    def __post_init__(self):
        super().__post_init__()
        for field, allowed in (("rule", RULES), ("long_words", ("split", "cut"))):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}.")

    @property
    def spaced(self) -> bool:
        """Whether words are without the space before them."""
        return self.rule != "lossless"

    def split(self, document: str | bytes) -> list[bytes]:
        """The words, before long ones are split or cut."""
        return spaced_words(document, self.rule) if self.spaced else self.splitter.split(document)

    def words(self, document: str | bytes) -> list[tuple[Sequence[int], int]]:
        """Each word's units (at least 1, at most max_units) and how many bytes of the text they stand for."""
        units, words = load_units(self.tokenizer), []
        between = int(self.spaced)
        for word in self.split(document):
            parts = self._parts(units, word)
            sizes = [sum(len(units.pieces[i]) for i in part) for part in parts]
            if self.long_words == "cut" and len(parts) > 1:
                parts, sizes = parts[:1], [min(sizes[0], len(word)) + between]
            else:
                sizes[-1] = len(word) - sum(sizes[:-1]) + between
            words += zip(parts, sizes)
        if words and between:
            words[-1] = (words[-1][0], words[-1][1] - 1)
        return words

    def join(self, before: bytes, units: Sequence[Sequence[int]]) -> bytes:
        """The text of words that follow `before`."""
        words = [load_units(self.tokenizer).decode(word, self.spaced) for word in units]
        if not self.spaced:
            return b"".join(words)
        opening = b" " if words and before and not before[-1:].isspace() else b""
        return opening + b" ".join(words)

    def _parts(self, units: Units, word: bytes) -> list[list[int]]:
        if self.tokenizer == "bytes":
            return [units.encode(part) for part in limited(word, self.max_units)]
        ids = units.encode(word, self.spaced)
        return [ids[i : i + self.max_units] for i in range(0, len(ids), self.max_units)]


@dataclasses.dataclass(frozen=True)
class NormalizedText(TextData):
    """Rows of tokens of the same words, with one space between them, for plain language models."""

    rule: WordRule = "paper"

    def __post_init__(self):
        super().__post_init__()
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; it must be one of {', '.join(RULES)}.")

    def split(self, document: str | bytes) -> list[bytes]:
        """The words; by the lossless rule, the strings between whitespace."""
        return spaced_words(document, "spaces" if self.rule == "lossless" else self.rule)

    def items(self, document: str | bytes) -> np.ndarray:
        """See `TextData.items`."""
        return super().items(document if self.rule == "lossless" else b" ".join(self.split(document)))


def count_words(data: WordUnitText | NormalizedText, split: str = "train", documents: int = 0) -> Counter[bytes]:
    """How often each word is in the first `documents` documents of a split (0: in all)."""
    corpus = open_corpus(data.corpus, split, text_field=data.text_field)
    counts: Counter[bytes] = Counter()
    for document in itertools.islice(corpus, documents or None):
        counts.update(data.split(document))
    return counts


def long_words_of(data: WordUnitText, counts: Counter[bytes]) -> dict[str, int]:
    """How many words there are, how many have more than max_units units, and how many units are cut off."""
    units = load_units(data.tokenizer)
    over = {word: max(len(units.encode(word, data.spaced)) - data.max_units, 0) for word in counts}
    return {
        "words": counts.total(),
        "long_words": sum(counts[word] for word, n in over.items() if n),
        "units_cut": sum(counts[word] * n for word, n in over.items()) if data.long_words == "cut" else 0,
    }
