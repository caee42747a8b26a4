"""Makes a tokenizer library lossless: its own tokens if they decode to the text, and byte tokens elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from jaxtok.protocols import Special

_INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are not UTF-8, as `surrogateescape` decodes them
_CONTROLS = {*range(32), 127} - set(b"\t\n\r")


class LosslessTokenizer:
    """Base of the tokenizers that wrap a library; a subclass gives `_encode_text`.

    Text is encoded by the library and kept if its tokens spell the same bytes. Otherwise (a normaliser changed a
    character, the text holds the marker that stands for a space, ...) it is halved until the parts that differ are
    single characters, and these become byte tokens. Text is never taken for a special token.

    A subclass sets `as_published` for a vocabulary that has an unknown token instead of all bytes: then the ids are the
    library's own, whatever they keep of the text (T5 folds white space, BERT drops it), and the first unknown character
    gives a warning.

    Args:
        name: a name for logs and errors.
        pieces: the bytes of each token, by id; none for special and unknown tokens.
        byte_ids: the tokens of single bytes, by byte value; can be incomplete or empty.
        eod_id: the token that ends a document.
        prefix: what the published tokenizer writes before every text, b" " or b"". `decode` drops it.
        special: the special tokens, of which the first `eos` is `eod_id`; default: there is no other.
    """

    def __init__(
        self,
        name: str,
        pieces: list[bytes],
        byte_ids: dict[int, int],
        eod_id: int,
        prefix: bytes = b"",
        special: Special | None = None,
    ):
        self.name = name
        self.vocab_size = len(pieces)
        self.eod_id = eod_id
        self.special = special or Special(eos=(eod_id,))
        self._pieces = pieces
        self._byte_ids = {piece[0]: i for i, piece in enumerate(pieces) if len(piece) == 1} | byte_ids
        self._lacking: dict[int, None] = {}
        self._prefix = prefix
        self.as_published = False
        self._warned = False

    @property
    def has_all_bytes(self) -> bool:
        """Whether every byte has a token."""
        return len(self._byte_ids) == 256

    def leave_out_controls(self) -> None:
        """Leaves out control characters that the vocabulary lacks (SmolLM2's lacks six), as the library does, and warns
        at the first."""
        self._lacking = dict.fromkeys(_CONTROLS - self._byte_ids.keys())

    def vocabulary(self) -> list[bytes]:
        """The bytes that each id stands for; none for special tokens."""
        return list(self._pieces)

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name, if the library has one."""
        return None

    def _encode_text(self, text: str) -> list[int]:
        """The library's own ids for valid text, with nothing written before it."""
        raise NotImplementedError

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of any text or byte string; `decode` gives the same bytes back.

        Raises:
            ValueError: the vocabulary has no tokens for a character that is no control character.
        """
        data = text.encode() if isinstance(text, str) else text
        if not data:
            return []
        if self.as_published:
            return self._encode_as_published(data.decode(errors="replace"))
        return self.encode_bare(self._prefix + data)

    def encode_bare(self, data: bytes) -> list[int]:
        """The ids of bytes that follow other tokens: nothing is written before them.

        Raises:
            ValueError: as `encode`.
        """
        runs = _INVALID.split(data.decode(errors="surrogateescape"))
        ids = self._encode_run(runs[0])
        for invalid, run in zip(runs[1::2], runs[2::2]):
            ids += self._encode_bytes(invalid) + self._encode_run(run)
        return ids

    def _encode_as_published(self, text: str) -> list[int]:
        ids = self._encode_text(text)
        if self.special.unk in ids:
            self._warn("lacks characters of these texts; as published, they become its unknown token.")
        return ids

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"the vocabulary of {self.name} {message}", stacklevel=4)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens, one after the other, without the prefix."""
        return b"".join(self._pieces[i] for i in ids).removeprefix(self._prefix)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, with the prefix if it has one; special tokens have none."""
        return self._pieces[token_id]

    def _encode_run(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._encode_text(text)
        spelled = b"".join(map(self._pieces.__getitem__, ids))
        if spelled == text.encode():
            return ids
        if self._lacking and spelled == text.translate(self._lacking).encode():
            self._warn("lacks control characters of these texts; as published, they are left out.")
            return ids
        if len(text) == 1:
            return self._encode_bytes(text)
        half = len(text) // 2
        cut = max(text.rfind(" ", 1, half), text.rfind("\n", 1, half))  # words stay whole if possible
        cut = half if cut < 0 else cut
        return self._encode_run(text[:cut]) + self._encode_run(text[cut:])

    def _encode_bytes(self, text: str) -> list[int]:
        try:
            return [self._byte_ids[byte] for byte in text.encode(errors="surrogateescape")]
        except KeyError:
            raise ValueError(
                f"the vocabulary of {self.name} cannot represent the character {text!a}; "
                "choose a tokenizer with byte tokens (byte-level or byte fallback), or remove it from the text."
            ) from None
