"""Pairs of a text and the same text with characters left out or replaced: the diagnostic tasks of MrT5 (arXiv
2410.20771, section 4.1), on random letters or on any corpus."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Int

from jaxtok.data.text import TextData, row_arrays
from jaxtok.protocols import ArraySpec, Batch

LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOWELS = b"aeiouAEIOU"
_CONSONANTS = bytes(set(LETTERS[:26]) - set(VOWELS))
_EDITS = {
    "vowels": (re.compile(b"[" + VOWELS + b"]"), b""),
    "contextual_vowels": (re.compile(b"(?<=[" + bytes(sorted(_CONSONANTS)) + b"])[" + VOWELS + b"]"), b""),
    "merge": (re.compile(b"ABC"), b"D"),
}
_SPLITS = {"train": 0, "validation": 1, "test": 2}


def edited(text: bytes, edit: str) -> bytes:
    """The text without vowels; without vowels after a lowercase consonant; or with each ABC replaced by D."""
    pattern, replacement = _EDITS[edit]
    return pattern.sub(replacement, text)


def random_letters(rng: np.random.Generator, length: int, edit: str) -> bytes:
    """'#' and random letters, `length` bytes in all, into which strings that the edit changes are inserted: on average
    as many as in the paper, 25 pairs of a lowercase consonant and a vowel, or 5 ABC (from none to twice that, if they
    fit)."""
    letters = rng.choice(np.frombuffer(LETTERS, np.uint8), length - 1)
    most, width = {"vowels": (0, 1), "contextual_vowels": (50, 2), "merge": (10, 3)}[edit]
    slots = (length - 1) // width
    chosen = rng.permutation(slots)[: rng.integers(0, most + 1)] * width
    if edit == "contextual_vowels":
        letters[chosen] = rng.choice(np.frombuffer(_CONSONANTS, np.uint8), len(chosen))
        letters[chosen + 1] = rng.choice(np.frombuffer(VOWELS, np.uint8), len(chosen))
    elif edit == "merge":
        letters[chosen[:, None] + np.arange(3)] = np.frombuffer(b"ABC", np.uint8)
    return b"#" + letters.tobytes()


@dataclasses.dataclass(frozen=True)
class CharacterEdits(TextData):
    """Pairs of a text and the edited text, in ByT5's ids, for `jaxtok.lm.t5.SequenceToSequence`.

    Raises:
        ValueError: a number is out of range, the edit is unknown, or the tokenizer is not byt5.
    """

    corpus: str = "random"
    """The texts. random: the paper's letters, `examples` of them; else a corpus as in `TextData`, cut into rows."""
    tokenizer: str = "byt5"
    edit: Literal["vowels", "contextual_vowels", "merge"] = "vowels"
    length: int = 64
    """The number of tokens of an input and of a target, with the end."""
    lower: bool = False
    """Whether text is made lower case (ASCII)."""
    examples: int = 6_400_000
    """The number of random texts for training; validation and test have a 200th of it each."""

    def __post_init__(self):
        super().__post_init__()
        if self.edit not in _EDITS:
            raise ValueError(f"edit is {self.edit!r}; it must be one of {', '.join(_EDITS)}.")
        if self.tokenizer != "byt5":
            raise ValueError(f"tokenizer is {self.tokenizer!r}; it must be byt5, whose ids are bytes.")
        if self.length < 8:
            raise ValueError(f"length is {self.length}; it must be at least 8.")
        if self.examples < 200:
            raise ValueError(f"examples is {self.examples}; it must be at least 200.")

    @property
    def row_items(self) -> int:
        return self.length - 1

    def batch_spec(self) -> dict[str, ArraySpec]:
        return row_arrays((self.batch_size, self.length), ("tokens", "targets", "mask", "bytes"))

    def _documents(self, split: str) -> grain.MapDataset[Any]:
        if self.corpus != "random":
            return super()._documents(split)
        if split not in _SPLITS:
            raise ValueError(f"split is {split!r}; for random letters it must be one of {', '.join(_SPLITS)}.")
        count = self.examples if split == "train" else self.examples // 200  # 32,000 of the paper's 6.4 million

        def make(number: int) -> bytes:
            rng = np.random.default_rng([_SPLITS[split], number])
            return random_letters(rng, self.row_items, self.edit)

        return grain.MapDataset.range(count).map(make)

    def items(self, document: str | bytes) -> Int[np.ndarray, " items"]:
        text = document.encode() if isinstance(document, str) else document
        return np.array(self.loaded_tokenizer.encode(text.lower() if self.lower else text), np.int32)

    def layout(self, rows, segments, positions) -> Batch:
        """tokens, targets, mask and bytes, each [batch, length]; see `SequenceToSequence`."""
        tokenizer = self.loaded_tokenizer
        batch = {name: np.zeros((len(rows), self.length), array.dtype) for name, array in self.batch_spec().items()}
        for number, (row, real) in enumerate(zip(rows, segments > 0)):
            text = tokenizer.decode(row[real])
            if not text:
                continue
            target = tokenizer.encode(edited(text, self.edit))
            batch["tokens"][number, : len(text) + 1] = [*row[real], tokenizer.eod_id]
            batch["targets"][number, : len(target) + 1] = [*target, tokenizer.eod_id]
            batch["mask"][number, : len(target) + 1] = 1
            batch["bytes"][number, : len(target)] = 1
        return batch
