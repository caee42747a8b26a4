"""Span corruption, the pre-training task of T5 (arXiv 1910.10683, section 3.1.4) and ByT5 (arXiv 2105.13626).

Spans of a text are taken out. In the input, a sentinel stands for each span; the target is each sentinel followed by
its span. Lengths, masks and sentinels are those of the authors' code.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import numpy as np
from jaxtyping import Bool, Int, Shaped

from jaxtok.data.text import TextData, row_arrays
from jaxtok.protocols import ArraySpec, Batch


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many of `length` tokens are noise, and in how many spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, max(1, round(min(noise, length - noise) / mean_span))


def raw_length(inputs_length: int, density: float = 0.15, mean_span: float = 20.0) -> tuple[int, int]:
    """The largest number of tokens whose corrupted input is at most `inputs_length` long, and the target's length.

    Both lengths count the end, and a sentinel for each span.
    """

    def lengths(raw: int) -> tuple[int, int]:
        noise = round(raw * density)
        spans = round(noise / mean_span)
        return raw - noise + spans + 1, noise + spans + 1

    raw = inputs_length
    while lengths(raw + 1)[0] <= inputs_length:
        raw += 1
    inputs, targets = lengths(raw)
    if density == 0.5 and targets > inputs:  # as in the authors' code, which wants targets no longer than inputs
        raw, targets = raw - 1, targets - 1
    return raw, targets


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> Bool[np.ndarray, " length"]:
    """Which tokens are noise: spans of random lengths, with all ways to cut equally likely. The first token is not
    noise, and the last one is.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if length < 2:
        raise ValueError(f"length is {length}; it must be at least 2.")
    noise, spans = noise_counts(length, density, mean_span)

    def cut(total: int) -> np.ndarray:
        """The lengths of `spans` random parts of `total` tokens, none of them empty."""
        ends = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff(ends, prepend=0, append=total)

    lengths = np.stack([cut(length - noise), cut(noise)], 1).ravel()
    return np.repeat(np.tile([False, True], spans), lengths)


def corrupt(
    tokens: Int[np.ndarray, " length"], mask: Shaped[np.ndarray, " length"], first_sentinel: int, end: int
) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
    """The input and the target of tokens, of which those in `mask` are noise. Sentinels count down from
    `first_sentinel`."""
    mask = np.asarray(mask, bool)
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    sentinels = first_sentinel + 1 - np.cumsum(starts)
    inputs = np.where(starts, sentinels, tokens)[starts | ~mask]
    pairs = np.stack([sentinels, tokens], 1)
    targets = pairs[np.stack([starts, mask], 1)]  # row by row: the sentinel, then the token
    return np.append(inputs, end), np.append(targets, end)


def restore(
    inputs: Int[np.ndarray, " inputs"], targets: Int[np.ndarray, " targets"], first_sentinel: int
) -> Int[np.ndarray, " length"]:
    """The tokens from which `corrupt` made these inputs and targets, if none of the tokens is one of its sentinels."""
    inputs, targets = np.asarray(inputs)[:-1], np.asarray(targets)[:-1]
    parts: list[np.ndarray] = []
    sentinel = first_sentinel
    while len(index := np.flatnonzero(inputs == sentinel)):
        (start,) = np.flatnonzero(targets == sentinel)
        rest = targets[start + 1 :]
        end = np.flatnonzero(rest == sentinel - 1)
        parts += [inputs[: index[0]], rest[: end[0]] if len(end) else rest]
        inputs, sentinel = inputs[index[0] + 1 :], sentinel - 1
    return np.concatenate([*parts, inputs])


@dataclasses.dataclass(frozen=True)
class SpanCorruption(TextData):
    """Text as pairs of a corrupted input and what is missing in it, for `jaxtok.lm.t5.SequenceToSequence`.

    Documents are laid end to end, without anything between them, and cut into rows whose input is `length` tokens long,
    or up to a span's length fewer. The noise of a row depends only on `seed` and on the row itself.

    Raises:
        ValueError: a number is out of range.
    """

    tokenizer: str = "byt5"
    length: int = 1024
    """The number of tokens of an input, sentinels and end included."""
    density: float = 0.15
    """The fraction of the tokens that is noise."""
    mean_span: float = 20.0
    """The mean length of a span in tokens."""
    first_sentinel: int = 258
    """The id of the first sentinel; the others count down. The default, as in ByT5's code, takes the ids of the highest
    bytes, which do not occur in UTF-8."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.density <= 0.5:
            raise ValueError(f"density is {self.density}; it must be above 0 and at most 0.5.")
        if self.mean_span < 1:
            raise ValueError(f"mean_span is {self.mean_span}; it must be at least 1.")
        if self.length < 4:
            raise ValueError(f"length is {self.length}; it must be at least 4, for a token, a sentinel and the end.")
        if (spans := noise_counts(self.row_items, self.density, self.mean_span)[1]) > self.first_sentinel:
            raise ValueError(
                f"first_sentinel is {self.first_sentinel}; it must be at least {spans}, the number of spans in a row."
            )

    @functools.cached_property
    def row_items(self) -> int:
        """The number of tokens of text in a row."""
        raw = raw_length(self.length, self.density, self.mean_span)[0]
        while _lengths(raw, self.density, self.mean_span)[0] > self.length:  # at least one span, however few tokens
            raw -= 1
        return raw

    def batch_spec(self) -> dict[str, ArraySpec]:
        targets = (self.batch_size, _lengths(self.row_items, self.density, self.mean_span)[1])
        inputs = row_arrays((self.batch_size, self.length), ["tokens"])
        return inputs | row_arrays(targets, ("targets", "mask", "bytes"))

    def items(self, document: str | bytes) -> Int[np.ndarray, " items"]:
        return np.array(self.loaded_tokenizer.encode(document), np.int32)

    def layout(self, rows, segments, positions) -> Batch:
        """tokens [batch, length], targets, mask and bytes [batch, targets]; see `SequenceToSequence`.

        A row with fewer than two tokens is padding only.
        """
        spec, end = self.batch_spec(), self.loaded_tokenizer.eod_id
        batch = {name: np.zeros((len(rows), array.shape[1]), array.dtype) for name, array in spec.items()}
        for number, (row, real) in enumerate(zip(rows, segments > 0)):
            tokens = row[real]
            if len(tokens) < 2:
                continue
            rng = np.random.default_rng([self.seed, zlib.crc32(tokens.tobytes())])
            mask = noise_mask(len(tokens), self.density, self.mean_span, rng)
            inputs, targets = corrupt(tokens, mask, self.first_sentinel, end)
            batch["tokens"][number, : len(inputs)] = inputs
            batch["targets"][number, : len(targets)] = targets
            batch["mask"][number, : len(targets)] = 1
            batch["bytes"][number, : len(targets)] = self._byte_lengths[targets]
            sentinels = np.concatenate([mask[:1], mask[1:] & ~mask[:-1]])[mask]
            batch["bytes"][number, np.flatnonzero(sentinels) + np.arange(sentinels.sum())] = 0
        return batch


def _lengths(raw: int, density: float, mean_span: float) -> tuple[int, int]:
    noise, spans = noise_counts(raw, density, mean_span)
    return raw - noise + spans + 1, noise + spans + 1
