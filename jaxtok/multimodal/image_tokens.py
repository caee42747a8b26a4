"""Codes of images as tokens of a language model (SEED-LLaMA, arXiv 2310.01218, section 3.2).

A text tokenizer gets a token `<img_00000>`, `<img_00001>`, ... for each code, and `<img>` and `</img>` around an image.
An image is always `<img>`, its codes, `</img>`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from jaxtok.protocols import Special, Tokenizer

BEGIN, END = "<img>", "</img>"


def code_name(code: int) -> str:
    """The string of a code.

    >>> code_name(12)
    '<img_00012>'
    """
    return f"<img_{code:05d}>"


class ImageTextTokenizer:
    """A `jaxtok.protocols.Tokenizer` of texts with images in them; it is lossless, as the one inside is.

    A tokenizer that has the image tokens already (SEED-LLaMA's) keeps their ids; otherwise the codes come after its own
    ids, and then `<img>` and `</img>`. In the released tokenizers the codes begin at 32000.

    Args:
      text: the tokenizer of text.
      codes: how many values a code has.
      length: the codes of an image.

    Raises:
      ValueError: the tokenizer has image tokens, but not all of them, or not in a row.

    >>> from jaxtok.tokenizers.bytes import ByteTokenizer
    >>> tokenizer = ImageTextTokenizer(ByteTokenizer(), codes=8, length=2)
    >>> ids = tokenizer.encode("a<img><img_00003><img_00005></img>b")
    >>> ids, tokenizer.decode(ids)
    ([97, 265, 260, 262, 266, 98], b'a<img><img_00003><img_00005></img>b')
    >>> tokenizer.parse(ids)
    [[97], array([3, 5], dtype=int32), [98]]
    """

    def __init__(self, text: Tokenizer, codes: int, length: int):
        if codes < 1 or length < 1:
            raise ValueError(f"codes is {codes} and length {length}; both must be at least 1.")
        if codes > 100_000:
            raise ValueError(f"codes is {codes}; names of codes have five digits, so it must be at most 100000.")
        self.text, self.codes, self.length = text, codes, length
        known = getattr(text, "token_id", lambda name: None)
        self.first = known(code_name(0))
        if self.first is None:
            self.first = text.vocab_size
            self.begin, self.end = self.first + codes, self.first + codes + 1
            self.vocab_size = self.end + 1
        else:
            begin, end = known(BEGIN), known(END)
            last = known(code_name(codes - 1))
            if begin is None or end is None or last != self.first + codes - 1 or known(code_name(codes)) is not None:
                raise ValueError(
                    f"{text.name} has the token {code_name(0)}, but not {codes} codes in a row with {BEGIN} and {END}; "
                    "give the tokenizer of these codes, or one without image tokens."
                )
            self.begin, self.end, self.vocab_size = begin, end, text.vocab_size
        self.name = f"{text.name} with {codes} image codes"
        self.eod_id = text.eod_id
        self.special: Special = text.special

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, in which image tokens are written by their names."""
        data = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        at = 0
        for match in _NAME.finditer(data):
            token = self._id_of(match)
            if token is not None:
                ids += self._text_ids(data[at : match.start()])
                ids.append(token)
                at = match.end()
        return ids + self._text_ids(data[at:])

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of ids; image tokens are written by their names."""
        return b"".join(
            self.token_bytes(part) if isinstance(part, int) else self.text.decode(part) for part in self._parts(ids)
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; of an image token, those of its name."""
        if token_id == self.begin:
            return BEGIN.encode()
        if token_id == self.end:
            return END.encode()
        if self.first <= token_id < self.first + self.codes:
            return code_name(token_id - self.first).encode()
        return self.text.token_bytes(token_id)

    def vocabulary(self) -> list[bytes]:
        """The bytes of each id."""
        return [self.token_bytes(i) for i in range(self.vocab_size)]

    def is_image(self, ids: Int[np.ndarray, "*shape"]) -> np.ndarray:
        """Whether ids are image tokens: codes, or those around them."""
        ids = np.asarray(ids)
        return ((ids >= self.first) & (ids < self.first + self.codes)) | (ids == self.begin) | (ids == self.end)

    def image_ids(self, codes: Sequence[int] | np.ndarray) -> list[int]:
        """The ids of an image, from its codes.

        Raises:
          ValueError: they are not `length` codes in range.
        """
        codes = np.asarray(codes).reshape(-1)
        if len(codes) != self.length:
            raise ValueError(f"an image has {len(codes)} codes; it must have {self.length}.")
        if codes.min() < 0 or codes.max() >= self.codes:
            raise ValueError(f"codes go from {codes.min()} to {codes.max()}; they must be in [0, {self.codes}).")
        return [self.begin, *(codes + self.first).tolist(), self.end]

    def parse(self, ids: Iterable[int]) -> list[list[int] | Int[np.ndarray, " codes"]]:
        """The texts (ids) and the images (codes) in a row of ids, in their order.

        Raises:
          ValueError: an image is not `<img>`, `length` codes, `</img>`.
        """
        ids, parts, at = list(map(int, ids)), [], 0
        while at < len(ids):
            if ids[at] != self.begin:
                if self.is_image(np.array(ids[at])):
                    raise ValueError(
                        f"position {at} has {self._show(ids[at])} outside of an image: {BEGIN} is missing."
                    )
                if not parts or isinstance(parts[-1], np.ndarray):
                    parts.append([])
                parts[-1].append(ids[at])
                at += 1
                continue
            inside = ids[at + 1 : at + 1 + self.length]
            codes = np.array(inside, np.int32) - self.first
            whole = len(inside) == self.length and codes.min() >= 0 and codes.max() < self.codes
            if not whole or ids[at + 1 + self.length : at + 2 + self.length] != [self.end]:
                raise ValueError(
                    f"the image at position {at} is not {BEGIN}, {self.length} codes and {END}, as every image has to "
                    "be."
                )
            parts.append(codes)
            at += self.length + 2
        return parts

    def _show(self, token: int) -> str:
        return self.token_bytes(token).decode()

    def _id_of(self, match: re.Match[bytes]) -> int | None:
        name = match.group()
        if name == BEGIN.encode():
            return self.begin
        if name == END.encode():
            return self.end
        code = int(match.group(1))
        return self.first + code if code < self.codes else None

    def _text_ids(self, data: bytes) -> list[int]:
        return self.text.encode(data) if data else []

    def _parts(self, ids: Iterable[int]) -> Iterable[int | list[int]]:
        """Image tokens one by one, and the ids between them."""
        text: list[int] = []
        for token in map(int, ids):
            if token in self._image_ids:
                if text:
                    yield text
                text = []
                yield token
            else:
                text.append(token)
        if text:
            yield text

    @functools.cached_property
    def _image_ids(self) -> frozenset[int]:
        return frozenset({self.begin, self.end, *range(self.first, self.first + self.codes)})


_NAME = re.compile(rb"<img>|</img>|<img_(\d{5})>")
