"""ByT5's bytes as tokens (arXiv 2105.13626)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from jaxtok.protocols import Special

PAD, EOS, UNKNOWN = 0, 1, 2
FIRST_BYTE = 3
EXTRA_IDS = 125
_FIRST_EXTRA = FIRST_BYTE + 256
_NAMES = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN} | {f"<extra_id_{i}>": _FIRST_EXTRA + i for i in range(EXTRA_IDS)}
_SPECIAL = re.compile(r"\s*(<pad>|</s>|<unk>)\s*|(<extra_id_(?:[0-9]|[1-9][0-9]|1[01][0-9]|12[0-4])>)")


class ByT5Tokenizer:
    """The id of a byte is its value + 3; 0 is padding, 1 ends a text, 2 stands for no byte; 259 to 383 are
    <extra_id_0..124>.

    Args:
        special: what strings such as "</s>" and "<extra_id_3>" in a text mean. bytes: they are text, so that any text
            survives; ids: they are the tokens of these names, as in Hugging Face's tokenizer, where <pad>, </s> and
            <unk> also swallow the blanks around them.

    Raises:
        ValueError: `special` is neither.
    """

    name = "byt5"
    vocab_size = _FIRST_EXTRA + EXTRA_IDS
    eod_id = EOS
    special = Special(eos=(EOS,), pad=PAD, unk=UNKNOWN)

    def __init__(self, special: Literal["bytes", "ids"] = "bytes"):
        if special not in ("bytes", "ids"):
            raise ValueError(f"special is {special!r}; it must be one of bytes, ids.")
        self._special = special
        self._strings = {i: name.encode() for name, i in _NAMES.items()} if special == "ids" else {}

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, without the end."""
        if self._special == "bytes":
            return _bytes(text)
        text = text.decode(errors="surrogateescape") if isinstance(text, bytes) else text
        ids: list[int] = []
        done = 0
        for match in _SPECIAL.finditer(text):
            ids += [*_bytes(text[done : match.start()]), _NAMES[match[1] or match[2]]]
            done = match.end()
        return ids + _bytes(text[done:])

    def encode_text(self, text: str | bytes) -> list[int]:
        """The ids of a text with an end (only one, if it has one already), as models read it."""
        ids = self.encode(text)
        return ids if ids[-1:] == [EOS] else [*ids, EOS]

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The byte of a token; for a special token nothing, or its name if `special` is ids."""
        if FIRST_BYTE <= token_id < _FIRST_EXTRA:
            return bytes([token_id - FIRST_BYTE])
        return self._strings.get(token_id, b"")


def _bytes(text: str | bytes) -> list[int]:
    raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    return [byte + FIRST_BYTE for byte in raw]
