"""Characters of an alphabet as tokens, with or without bytes for all other characters."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

from jaxtok.tokenizers.lossless import LosslessTokenizer

PREFIX = "characters:"


class CharacterTokenizer(LosslessTokenizer):
    """Ids 0, 1, ... are the characters of an alphabet in its order; then come the 256 bytes, and the end of a document.

    Raises:
        ValueError: the alphabet has a character twice.
    """

    def __init__(self, alphabet: str):
        self._alphabet = alphabet
        self._ids = {char: i for i, char in enumerate(alphabet)}
        if len(self._ids) < len(alphabet):
            twice = next(char for char in alphabet if alphabet.count(char) > 1)
            raise ValueError(f"the alphabet has {twice!r} twice; it must have every character once.")
        pieces = [char.encode() for char in alphabet] + [bytes([byte]) for byte in range(256)] + [b""]
        byte_ids = {byte: len(alphabet) + byte for byte in range(256)}
        super().__init__(f"{len(alphabet)} characters", pieces, byte_ids, len(pieces) - 1)
        self._byte_ids = byte_ids

    def __reduce__(self):
        return type(self), (self._alphabet,)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for char in text:
            known = self._ids.get(char)
            ids += self._encode_bytes(char) if known is None else [known]
        return ids


class AlphabetTokenizer(LosslessTokenizer):
    """Each character of an alphabet is a token.

    letters   a to z are 0 to 25, space is 26, and 27 ends a document
    ascii     each character is its code, and the code 0 ends a document

    Other text is refused; `reduce` reduces any text to the alphabet.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str):
        if name not in ALPHABETS:
            raise ValueError(f"the alphabet is {name!r}; it must be one of {', '.join(ALPHABETS)}.")
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
        """The text reduced to the alphabet. letters: lower case, with a space for each run of other bytes; ascii:
        without other bytes."""
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
"""For each name, the alphabet, the id that ends a document, and the function that reduces other text to it."""
