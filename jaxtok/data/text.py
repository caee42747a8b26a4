"""Text as packed rows of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from jaxtok.data.corpora import open_corpus
from jaxtok.data.streams import StreamBatches
from jaxtok.protocols import ArraySpec, Batch, Tokenizer
from jaxtok.tokenizers import load_tokenizer, token_byte_lengths

_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)  # documents tokenised ahead, in order
_SAMPLED_ROWS = 16384  # among which the batches of a limited evaluation are chosen


@dataclasses.dataclass(frozen=True)
class TextData:
    """Text as packed rows of tokens.

    A document t1..tn has the inputs [eod, t1..tn] and the targets [t1..tn, eod]. Documents are laid end to end and cut
    into rows, so that a row that continues a document has the token before the cut as its first input.

    Other layouts of text are subclasses: `items` says what of a document is packed, `layout` what a batch of rows of
    these is, and `batch_spec` its shapes; order, packing, shares of processes and resumption are the same for all.

    Raises:
        ValueError: a number is out of range.
    """

    unit: ClassVar[str] = "tokens"
    source: ClassVar[str] = "corpus"

    corpus: str = "python"
    """See `jaxtok.data.corpora.open_corpus`."""
    tokenizer: str = "bytes"
    """See `jaxtok.tokenizers.load_tokenizer`."""
    length: int = 256
    """Tokens a row."""
    batch_size: int = 32
    """Rows a batch, over all devices and processes."""
    seed: int = 0
    """Of the order of the training documents and rows."""
    text_field: str = "text"
    """The field of a JSONL, Parquet or TFDS row."""
    isolate_documents: bool = True
    """No attention across documents; if not, a row is one segment with positions 0..length-1 (GPT-NeoX's recipe)."""
    mask_eod: bool = False
    """Leave positions whose input is the end-of-document token out of the loss (GPT-NeoX's `eod_mask_loss`)."""
    streams: int = 1
    """Shares of the training documents, each of which fills its part of every batch. A process reads those of its rows
    only: on a pod, choose a multiple of the number of processes. The batches depend on it."""
    shuffle_window: int = 1024
    """Training rows of a stream that are shuffled, lest a batch be neighbouring rows of one document; 1: none."""
    prefetch: int = 4
    """Batches made ahead by a thread."""
    workers: int = 0
    """Processes that tokenise for training; 0: a thread of this process. The batches are the same."""
    eval_limit: int = 0
    """Batches in an evaluation, of rows from all over the split; 0: the whole split."""

    def __post_init__(self):
        least = dict(length=1, batch_size=1, seed=0, streams=1, shuffle_window=1, prefetch=0, workers=0, eval_limit=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field}={value}: choose at least {low}")
        if self.batch_size % self.streams:
            raise ValueError(f"streams={self.streams} does not divide batch_size={self.batch_size}: choose a divisor")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed}: choose one below 2**32")

    def train_batches(self, rows: range | None = None) -> StreamBatches:
        """Batches without end, in a new order each epoch, or these rows of each (for a process that needs no others).

        Only the streams that have some of the rows are read, and the rows are the same however they are divided.

        Raises:
            ValueError: there are fewer documents than streams.
        """
        documents = self._documents("train")
        if len(documents) < self.streams:
            raise ValueError(
                f"the train split of {self.corpus} has fewer documents ({len(documents)}) than data.streams = "
                f"{self.streams}: give more documents, or choose fewer streams"
            )
        rows = range(self.batch_size) if rows is None else rows
        size = self.batch_size // self.streams
        streams = {}
        for stream in range(rows.start // size, -(-rows.stop // size)):
            first = stream * size
            part = range(max(rows.start - first, 0), min(rows.stop - first, size))
            share = documents[stream :: self.streams].shuffle(self.seed).repeat()
            packed = self._pack(share, -(-self.workers * len(part) // len(rows)))
            if self.shuffle_window > 1:
                packed = grain.experimental.WindowShuffleIterDataset(
                    packed, window_size=self.shuffle_window, seed=self.seed
                )
            streams[stream] = iter(self._batch(packed, size, part))
        return StreamBatches(streams)

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split in the order of the corpus (under `eval_limit`: over shuffled rows), anew each `iter`.

        With `rows`, these of each batch; the whole split is read for them. The last batch is filled up with padding.
        """
        documents = self._documents(split)
        packed = self._pack(documents.shuffle(0) if self.eval_limit else documents)
        if self.eval_limit:  # a fair sample, the same for all seeds: rows of many documents
            packed = grain.experimental.WindowShuffleIterDataset(packed, window_size=_SAMPLED_ROWS, seed=0)
        rows = range(self.batch_size) if rows is None else rows
        return self._batch(packed, self.batch_size, rows, self.eval_limit)

    def batch_spec(self) -> dict[str, ArraySpec]:
        """See `jaxtok.protocols.Data`."""
        names = ("tokens", "targets", "positions", "segments", "mask", "bytes")
        return row_arrays((self.batch_size, self.length), names)

    @property
    def units(self) -> int:
        return self.batch_size * self.length

    @property
    def row_items(self) -> int:
        """Items a row is packed with."""
        return self.length

    def items(self, document: str | bytes) -> Int[np.ndarray, "items ..."]:
        """A document as what rows are packed with; here of each place the input, the target and the target's bytes."""
        tokenizer = self.loaded_tokenizer
        ids = tokenizer.encode(document)
        items = np.empty((len(ids) + 1, 3), np.int32)
        inputs, targets, lengths = items.T
        inputs[0] = targets[-1] = tokenizer.eod_id
        inputs[1:] = targets[:-1] = ids
        lengths[:] = self._byte_lengths[targets]
        # Less the space that some tokenizers write in front of a text.
        lengths[0] -= lengths.sum() - len(document if isinstance(document, bytes) else document.encode())
        return items

    def layout(
        self,
        rows: Int[np.ndarray, "batch items ..."],
        segments: Int[np.ndarray, "batch items"],
        positions: Int[np.ndarray, "batch items"],
    ) -> Batch:
        """The batch of some rows.

        Args:
          rows: packed items of documents; 0 in padding.
          segments: 1, 2, ... for the documents in a row, 0 for padding.
          positions: of an item in its document, as far as the row holds it.
        """
        tokens, targets, lengths = np.ascontiguousarray(np.moveaxis(rows, -1, 0))
        mask = segments > 0
        if not self.isolate_documents:
            segments = mask.astype(np.int32)
            positions = np.where(mask, np.arange(mask.shape[1], dtype=np.int32), 0)
        if self.mask_eod:
            mask &= tokens != self.loaded_tokenizer.eod_id
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": positions,
            "segments": segments,
            "mask": mask.astype(np.float32),
            "bytes": lengths,
        }

    def _documents(self, split: str) -> grain.MapDataset[str | bytes]:
        return grain.MapDataset.source(open_corpus(self.corpus, split, text_field=self.text_field))

    def _pack(self, documents: grain.MapDataset[str | bytes], workers: int = 0) -> grain.IterDataset[dict[str, Any]]:
        """Rows of `example`: int32 [row_items, ...], with the segment and position of each item."""
        self.loaded_tokenizer  # noqa: B018 (what is wrong with it is said here, not in a worker)
        examples = documents.map(self._example).to_iter_dataset(_READ)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its absl flags before it starts processes
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16)
            examples = examples.mp_prefetch(options)
        return _Pack(examples, length_struct={"example": self.row_items})

    def _batch(
        self, packed: grain.IterDataset[dict[str, Any]], size: int, rows: range, limit: int = 0
    ) -> grain.IterDataset[Batch]:
        """Batches of `size` rows, of which `rows` are given out."""
        pad = functools.partial(grain.experimental.batch_and_pad, batch_size=size)
        batches = packed.batch(size, batch_fn=pad).map(functools.partial(self._layout, part=rows))
        if limit:
            batches = grain.experimental.LimitIterDataset(batches, limit)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self.prefetch)

    @functools.cached_property
    def loaded_tokenizer(self) -> Tokenizer:
        """What `tokenizer` names."""
        return load_tokenizer(self.tokenizer)

    @functools.cached_property
    def _byte_lengths(self) -> Int[np.ndarray, " vocab"]:
        return token_byte_lengths(self.loaded_tokenizer)

    def _example(self, document: str | bytes) -> dict[str, np.ndarray]:
        return {"example": self.items(document)}

    def _layout(self, packed: dict[str, np.ndarray], part: range) -> Batch:
        names = ("example", "example_segment_ids", "example_positions")
        return self.layout(*(packed[name][part.start : part.stop] for name in names))


def row_arrays(shape: tuple[int, int], names: Iterable[str]) -> dict[str, ArraySpec]:
    """Arrays [batch, length] of int32, but for `mask`, which is float32."""
    return {name: ArraySpec(shape, np.float32 if name == "mask" else np.int32, ("batch", "length")) for name in names}


class _Pack(grain.experimental.ConcatThenSplitIterDataset):
    """Grain's packing, with a state that can go through JSON, as Grain and Orbax save it.

    Grain (0.2.18) tells by comparing tuples whether a document is cut, and takes the lists that JSON makes of them for
    cuts.
    """

    def __iter__(self) -> grain.DatasetIterator:
        iterator = super().__iter__()
        set_state = iterator.set_state

        def set_json_state(state: dict[str, Any]) -> None:
            cuts = {name: tuple(cut) for name, cut in state["remainder_slices"].items()}
            set_state({**state, "remainder_slices": cuts})

        iterator.set_state = set_json_state
        return iterator
