"""The characters of a small alphabet as tokens."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

from jaxtok.tokenizers.lossless import LosslessTokenizer


class AlphabetTokenizer(LosslessTokenizer):
    """Each character of an alphabet is a token.

    letters   a to z are 0 to 25, space is 26, and 27 ends a document
    ascii     each character is its code, and the code 0 ends a document

    Other text is refused; `reduce` makes text of the alphabet from any.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str):
        if name not in ALPHABETS:
            raise ValueError(f"alphabet {name!r}: choose one of {', '.join(ALPHABETS)}")
        self._alphabet, eod_id, self._reduce = ALPHABETS[name]
        pieces = [bytes([code]) for code in self._alphabet]
        super().__init__(name, [*pieces[:eod_id], b"", *pieces[eod_id:]], {}, eod_id)
        ids = bytearray(256)
        for code, i in self._byte_ids.items():
            ids[code] = i
        self._ids, self._others = bytes(ids), bytes(set(range(256)) - set(self._byte_ids))

    def __reduce__(self):
        return type(self), (self.name,)

    def reduce(self, text: str | bytes) -> bytes:
        """The text in the alphabet. letters: in lower case, with a space for each run of other bytes; ascii: without
        other bytes."""
        return self._reduce(text.encode() if isinstance(text, str) else text)

    def _encode_text(self, text: str) -> list[int]:
        return list(text.encode().translate(self._ids, self._others))


def _letters(text: bytes) -> bytes:
    return re.sub(rb"[^a-z]+", b" ", text.lower())


def _ascii(text: bytes) -> bytes:
    return re.sub(rb"[^\x01-\x7f]+", b"", text)


ALPHABETS: dict[str, tuple[bytes, int, Callable[[bytes], bytes]]] = {
    "letters": (string.ascii_lowercase.encode() + b" ", 27, _letters),
    "ascii": (bytes(range(1, 128)), 0, _ascii),
}
"""By name: the alphabet, the id that ends a document, and how other text is reduced to it."""
