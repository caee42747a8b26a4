"""Text in a small alphabet."""

from __future__ import annotations

import dataclasses

import grain

from jaxtok.data.text import TextData
from jaxtok.tokenizers.alphabet import ALPHABETS, AlphabetTokenizer


@dataclasses.dataclass(frozen=True)
class ReducedText(TextData):
    """Text that is reduced to the alphabet of its tokenizer (`jaxtok.tokenizers.alphabet`) before it is encoded.

    Bytes are those of the reduced text. Nothing is lost between the tokens and that.

    Raises:
        ValueError: the tokenizer has no alphabet to which text could be reduced.
    """

    tokenizer: str = "letters"

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer not in ALPHABETS:
            raise ValueError(f"tokenizer={self.tokenizer!r}: choose one of {', '.join(ALPHABETS)}")

    def _documents(self, split: str) -> grain.MapDataset[str | bytes]:
        return super()._documents(split).map(AlphabetTokenizer(self.tokenizer).reduce)
