"""Text as rows for encoders: [CLS] a [SEP] b [SEP]."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from jaxtyping import Int

from jaxtok.data.text import TextData, row_arrays
from jaxtok.protocols import ArraySpec, Batch


@dataclasses.dataclass(frozen=True)
class EncoderData(TextData):
    """Rows [CLS] a [SEP] b [SEP] of neighbouring text, as BERT and ELECTRA are trained on.

    The documents, each followed by a [SEP], are laid end to end and cut into rows of `length` - 3 tokens; half of a row
    is a, the rest b. ELECTRA's authors cut at sentences and start a row with every document; here rows are full, as
    RoBERTa's are (arXiv 1907.11692, section 4.2).

    A batch has, each of shape [batch, length]:

    tokens  int32    ids
    types   int32    0 for [CLS] a [SEP], 1 for b [SEP]
    mask    float32  1 for tokens, 0 for padding
    bytes   int32    how many bytes of text the token stands for
    """

    cls_id: int = 101
    """The id of [CLS]; the default is BERT's. If the tokenizer has no such tokens, take ids above its own, and raise
    the model's vocab_size."""
    sep_id: int = 102
    pad_id: int = 0
    single: float = 0.1
    """The fraction of the rows that are [CLS] a [SEP]."""
    short: float = 0.05
    """The fraction of the rows that are cut to a random length of 5 tokens or more."""

    def __post_init__(self):
        super().__post_init__()
        if self.length < 5:
            raise ValueError(
                f"length is {self.length}; it must be at least 5, for [CLS], a token, [SEP], a token and [SEP]."
            )
        for field in ("single", "short"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise ValueError(f"{field} is {value}; it must be in [0, 1].")
        for field in ("cls_id", "sep_id", "pad_id"):
            if (value := getattr(self, field)) < 0:
                raise ValueError(f"{field} is {value}; it must be 0 or more.")

    def batch_spec(self) -> dict[str, ArraySpec]:
        return row_arrays((self.batch_size, self.length), ("tokens", "types", "mask", "bytes"))

    @property
    def row_items(self) -> int:
        return self.length - 3

    def items(self, document: str | bytes) -> Int[np.ndarray, "items 2"]:
        """Each token of a document and its number of bytes, and then the separator."""
        ids = self.loaded_tokenizer.encode(document)
        items = np.empty((len(ids) + 1, 2), np.int32)
        items[:-1, 0], items[:-1, 1] = ids, self._byte_lengths[ids] if ids else 0
        items[-1] = self.sep_id, 0
        return items

    def layout(self, rows, segments, positions) -> Batch:
        """The batch of some rows; random choices in a row depend only on the seed and on the row's text."""
        draws = [np.random.default_rng([self.seed, zlib.crc32(row.tobytes())]).random(3) for row in rows]
        single, short, size = np.reshape(draws, (len(rows), 3)).T
        count = (segments > 0).sum(1)  # real tokens come first
        cut = np.where(short < self.short, 5 + (size * (self.length - 4)).astype(int), self.length) - 3
        count = np.minimum(count, cut)[:, None]
        half = np.where(single[:, None] < self.single, count, np.minimum(count, self.row_items // 2))
        pair = count > half
        position = np.arange(self.length)[None]
        end = count + 1 + pair  # the last [SEP]
        source = position - 1 - (position > half + 1)  # where a token is in the packed row
        text = (position > 0) & (position < end) & (position != half + 1)
        taken = np.take_along_axis(rows, np.clip(source, 0, self.row_items - 1)[..., None], 1)
        tokens = np.where(text, taken[..., 0], np.where(position == 0, self.cls_id, self.sep_id))
        real = (position <= end) & (count > 0)
        return {
            "tokens": np.where(real, tokens, self.pad_id).astype(np.int32),
            "types": (real & (position > half + 1)).astype(np.int32),
            "mask": real.astype(np.float32),
            "bytes": np.where(text & real, taken[..., 1], 0).astype(np.int32),
        }
