"""Text that is reduced to a small alphabet."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from jaxtok.data.text import TextData
from jaxtok.tokenizers.characters import ALPHABETS


@dataclasses.dataclass(frozen=True)
class ReducedText(TextData):
    """Text that is reduced to the alphabet of its tokenizer (`jaxtok.tokenizers.characters`) before it is encoded.

    Nothing is lost between the reduced text and the tokens; losses per byte count the bytes of the reduced text.

    Raises:
        ValueError: the tokenizer has no alphabet.
    """

    tokenizer: str = "letters"

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer not in ALPHABETS:
            raise ValueError(f"tokenizer is {self.tokenizer!r}; it must be one of {', '.join(ALPHABETS)}.")

    def items(self, document: str | bytes) -> Int[np.ndarray, "items 3"]:
        return super().items(self.loaded_tokenizer.reduce(document))
