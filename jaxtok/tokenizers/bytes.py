"""Bytes as tokens."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtok.protocols import Special


class ByteTokenizer:
    """Ids 0 to 255 are the bytes; 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256
    special = Special(eos=(256,))

    def encode(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i != self.eod_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id])
