"""Misspelt text for evaluations of robustness: errors in the letters of words, the same ones in every run.

Two measures are in use: a share of the letters (HAT, arXiv 2501.10322: 10 % permuted, replaced or deleted, and all
capitals), and a share of the words, each with one error at a random position.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
import zlib
from typing import Literal, TypeVar

import numpy as np
import regex

from jaxtok.data.text import TextData

EDITS = ("swap", "drop", "insert", "substitute")
KINDS = (*EDITS, "any", "upper")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_LETTER = regex.compile(r"\p{L}")
_LATIN = "abcdefghijklmnopqrstuvwxyz"

Data = TypeVar("Data", bound=TextData)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Errors in words, which are runs of letters, marks and digits.

    swap        a letter changes places with the next
    drop        a letter is left out, unless it is the only one of its word
    insert      a random letter is inserted before a letter
    substitute  a letter becomes another one
    any         one of these
    upper       all of the text is in capitals, whatever the rate

    Random letters are of the same script and case.

    Raises:
        ValueError: the kind is unknown, or a number is out of range.
    """

    kind: Literal["swap", "drop", "insert", "substitute", "any", "upper"] = "any"
    rate: float = 0.1
    """The share of letters, or of words, with an error."""
    of: Literal["letters", "words"] = "letters"
    """What the rate counts. letters: each letter may have an error. words: each word may have one error, at a random
    character."""
    seed: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        if self.of not in ("letters", "words"):
            raise ValueError(f"of is {self.of!r}; it must be letters or words.")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; it must be in [0, 1].")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0.")

    @property
    def name(self) -> str:
        """A name such as swap_0.1, any_0.2_of_words or upper."""
        if self.kind == "upper":
            return self.kind
        return f"{self.kind}_{self.rate:g}" + ("_of_words" if self.of == "words" else "")

    def __call__(self, document: str | bytes) -> bytes:
        """The document with errors, which depend only on it and on the seed. Bytes that are not UTF-8 stay."""
        data = document.encode() if isinstance(document, str) else document
        text = data.decode(errors="surrogateescape")
        if self.kind == "upper":
            return text.upper().encode(errors="surrogateescape")
        rng = np.random.default_rng([self.seed, zlib.crc32(data)])
        return _WORD.sub(lambda match: self.word(match[0], rng), text).encode(errors="surrogateescape")

    def word(self, word: str, rng: np.random.Generator) -> str:
        """The word with errors."""
        if self.kind == "upper":
            return word.upper()
        if self.of == "words":
            if not word or rng.random() >= self.rate:
                return word
            return self._edited(list(word), int(rng.integers(len(word))), rng)
        letters = [index for index, letter in enumerate(word) if _LETTER.match(letter)]
        hit = [index for index, draw in zip(letters, rng.random(len(letters))) if draw < self.rate]
        characters = list(word)
        for index in reversed(hit):  # from the end, so that earlier letters keep their positions
            characters = list(self._edited(characters, index, rng))
        return "".join(characters)

    def _edited(self, characters: list[str], index: int, rng: np.random.Generator) -> str:
        kind = EDITS[int(rng.integers(len(EDITS)))] if self.kind == "any" else self.kind
        if kind == "swap" and len(characters) > 1:
            first = min(index, len(characters) - 2)
            characters[first : first + 2] = characters[first + 1], characters[first]
        elif kind == "drop" and len(characters) > 1:
            del characters[index]
        elif kind == "insert":
            characters.insert(index, other_letter(characters[index], rng))
        elif kind == "substitute" or self.kind == "any":
            characters[index] = other_letter(characters[index], rng)
        return "".join(characters)


def other_letter(character: str, rng: np.random.Generator) -> str:
    """A random other letter of the same script and case; for a character that is no letter, one of a-z."""
    choices = _alphabet(character)
    return choices[int(rng.integers(len(choices)))]


@functools.lru_cache(maxsize=4096)
def _alphabet(character: str) -> str:
    script = unicodedata.name(character, "").split(" ")[0]
    if script == "LATIN" or not _LETTER.match(character):
        letters = _LATIN.upper() if character.isupper() else _LATIN
        return letters.replace(character, "")
    kind, block = unicodedata.category(character), ord(character) & ~0x7F
    near = (chr(block + offset) for offset in range(0x80))
    alike = [c for c in near if unicodedata.category(c) == kind and unicodedata.name(c, "").split(" ")[0] == script]
    return "".join(alike).replace(character, "") or _LATIN


def noisy(data: Data, noise: Noise) -> Data:
    """The same data, with errors in the documents, for evaluation. Bytes are counted with the errors."""
    original = type(data)

    def items(self, document):
        return original.items(self, noise(document))

    kind = type(f"Noisy{original.__name__}", (original,), {"items": items})
    return kind(**{field.name: getattr(data, field.name) for field in dataclasses.fields(data)})
