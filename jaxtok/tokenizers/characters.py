"""Characters as tokens, with bytes for all others."""

from __future__ import annotations

from jaxtok.tokenizers.lossless import LosslessTokenizer

PREFIX = "characters:"


class CharacterTokenizer(LosslessTokenizer):
    """Ids 0, 1, ... are the characters of an alphabet in its order; then come the 256 bytes, and the end of a document.

    Raises:
        ValueError: a character is there twice.
    """

    def __init__(self, alphabet: str):
        self._alphabet = alphabet
        self._ids = {char: i for i, char in enumerate(alphabet)}
        if len(self._ids) < len(alphabet):
            twice = next(char for char in alphabet if alphabet.count(char) > 1)
            raise ValueError(f"the alphabet has {twice!r} twice: name every character once")
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
