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

from jaxtok.data.corpora import named, newly_read, open_corpus
from jaxtok.data.streams import StreamBatches
from jaxtok.protocols import ArraySpec, Batch, Tokenizer
from jaxtok.tokenizers import load_tokenizer, token_byte_lengths

_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)  # documents are tokenised ahead, in order
_SAMPLED_ROWS = 16384  # the rows from which the batches of a limited evaluation are chosen


@dataclasses.dataclass(frozen=True)
class TextData:
    """Text as packed rows of tokens.

    A document t1..tn has the inputs [b, t1..tn] and the targets [t1..tn, e], where b begins every text (see `begin`)
    and e ends a document. Documents are laid end to end and cut into rows, so that a row that continues a document has
    the token before the cut as its first input.

    Other layouts of text are subclasses: `items` turns a document into the items that are packed, `layout` turns packed
    rows into a batch, and `batch_spec` gives its shapes. Order, packing, shares of processes and resumption are the
    same for all.

    Raises:
        ValueError: a number is out of range.
    """

    unit: ClassVar[str] = "tokens"
    source: ClassVar[str] = "corpus"

    corpus: str = "python"
    """The documents; see `jaxtok.data.corpora.open_corpus`."""
    tokenizer: str = "bytes"
    """The tokenizer; see `jaxtok.tokenizers.load_tokenizer`."""
    length: int = 256
    """The number of tokens in a row."""
    batch_size: int = 32
    """The number of rows in a batch, over all devices and processes."""
    seed: int = 0
    """The seed of the order of the training documents and rows."""
    text_field: str = "text"
    """The field of a JSONL, Parquet or TFDS row that holds the text."""
    isolate_documents: bool = True
    """Whether there is no attention across documents; if not, a row is one segment with positions 0..length-1
    (GPT-NeoX's recipe)."""
    mask_eod: bool = False
    """Whether positions whose input begins a document are left out of the loss (GPT-NeoX's `eod_mask_loss`)."""
    streams: int = 1
    """The number of shares of the training documents; each fills its part of every batch. A process reads only the
    shares of its rows: on a pod, choose a multiple of the number of processes. The batches depend on it."""
    shuffle_window: int = 1024
    """The number of training rows of a stream that are shuffled together, so that a batch does not hold neighbouring
    rows of one document; 1: none."""
    prefetch: int = 4
    """The number of batches that a thread makes ahead."""
    workers: int = 0
    """The number of processes that tokenise for training; 0: a thread of this process. The batches do not depend on
    it."""
    eval_limit: int = 0
    """The number of batches in an evaluation, of rows from all over the split; 0: the whole split."""
    begin: tuple[int, ...] | None = None
    """The ids that begin every text. None: the one that ends a document. (): none are written before a text, so that a
    document follows the end of the one before it."""
    ends: tuple[int, ...] = ()
    """The ids each of which ends a text; the first one ends a document. (): those that the tokenizer's names tell."""
    pad: int | None = None
    """The id by which other programs fill up rows, for exports; here, the mask and the segments say what is padding."""
    whole_documents: bool = False
    """Whether no document is cut in an evaluation unless it is longer than a row; then each of its parts begins as the
    document does, with the token before the cut after that. If not, its rows are cut like those of training."""

    def __post_init__(self):
        least = dict(length=1, batch_size=1, seed=0, streams=1, shuffle_window=1, prefetch=0, workers=0, eval_limit=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if self.batch_size % self.streams:
            raise ValueError(f"streams is {self.streams}; it must divide batch_size = {self.batch_size}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be below 2**32.")
        for field in ("begin", "ends"):
            if any(i < 0 for i in getattr(self, field) or ()):
                raise ValueError(f"{field} is {getattr(self, field)}; ids must be at least 0.")
        if self.whole_documents and len(self.begin or ()) >= self.length:
            raise ValueError(f"length is {self.length}; it must be more than the {len(self.begin)} ids of begin.")

    def train_batches(self, rows: range | None = None) -> StreamBatches:
        """Endless batches, in a new order each epoch; or only these rows of each, for a process that needs no others.

        Only the streams that have some of the rows are read, and the rows are the same however they are divided.

        Raises:
            ValueError: there are fewer documents than streams.
        """
        documents = self._documents("train")
        if len(documents) < self.streams:
            raise ValueError(
                f"the train split of {self.corpus} has fewer documents ({len(documents)}) than data.streams = "
                f"{self.streams}; give more documents, or choose fewer streams."
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
        return _TextBatches(streams, self)

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split for each `iter`, in the order of the corpus (with `whole_documents`: nearly in that
        order; with `eval_limit`: over shuffled rows).

        With `rows`, each batch has only these rows; the whole split is read for them. The last batch is filled up with
        padding.
        """
        documents = self._documents(split)
        pack = self._pack_whole if self.whole_documents else self._pack
        packed = pack(documents.shuffle(0) if self.eval_limit else documents)
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
        """The number of items in a packed row."""
        return self.length

    def items(self, document: str | bytes) -> Int[np.ndarray, "items ..."]:
        """The items of a document, with which rows are packed; here an item is an input, its target and the target's
        bytes, which are -1 for an id of `begin`: it is given, not predicted."""
        ids = [*self.opening_ids, *self.loaded_tokenizer.encode(document), self.end_id]
        items = np.empty((len(ids) - 1, 3), np.int32)
        inputs, targets, lengths = items.T
        inputs[:], targets[:] = ids[:-1], ids[1:]
        given = len(self.opening_ids) - 1
        lengths[:given], lengths[given:-1], lengths[-1] = -1, self._byte_lengths[targets[given:-1]], 0
        # Without the space that some tokenizers write before a text.
        more = lengths[given:].sum() - len(document if isinstance(document, bytes) else document.encode())
        lengths[given] = max(lengths[given] - more, 0)
        return items

    @property
    def end_id(self) -> int:
        """The id that ends a document."""
        return self.ends[0] if self.ends else self.loaded_tokenizer.eod_id

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """The inputs before a document's first token."""
        return self.begin or (self.end_id,)

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
          positions: the number of an item in its document, from 0 at the first one that the row holds.
        """
        tokens, targets, lengths = np.ascontiguousarray(np.moveaxis(rows, -1, 0))
        mask = segments > 0
        if not self.isolate_documents:
            segments = mask.astype(np.int32)
            positions = np.where(mask, np.arange(mask.shape[1], dtype=np.int32), 0)
        mask = mask & (lengths >= 0)
        if self.mask_eod:
            mask &= ~np.isin(tokens, self.opening_ids)
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": positions,
            "segments": segments,
            "mask": mask.astype(np.float32),
            "bytes": np.maximum(lengths, 0),
        }

    def _documents(self, split: str) -> grain.MapDataset[str | bytes]:
        return grain.MapDataset.source(open_corpus(self.corpus, split, text_field=self.text_field))

    def _pack(self, documents: grain.MapDataset[str | bytes], workers: int = 0) -> grain.IterDataset[dict[str, Any]]:
        """Rows of `example`: int32 [row_items, ...], with the segment and position of each item."""
        self.loaded_tokenizer  # noqa: B018 (its errors are raised here, not in a worker)
        examples = documents.map(self._example).to_iter_dataset(_READ)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its absl flags before it starts processes
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16)
            examples = examples.mp_prefetch(options)
        return _Pack(examples, length_struct={"example": self.row_items})

    def _pack_whole(self, documents: grain.MapDataset[str | bytes]) -> grain.IterDataset[dict[str, Any]]:
        """As `_pack`, with documents that are cut only if they are longer than a row."""
        parts = grain.experimental.FlatMapIterDataset(documents.map(self.items).to_iter_dataset(_READ), _Parts(self))
        return grain.experimental.FirstFitPackIterDataset(
            parts, length_struct={"example": self.row_items}, num_packing_bins=self.batch_size, shuffle_bins=False
        )

    def _batch(
        self, packed: grain.IterDataset[dict[str, Any]], size: int, rows: range, limit: int = 0
    ) -> grain.IterDataset[Batch]:
        """Batches of `size` rows, reduced to `rows`."""
        pad = functools.partial(grain.experimental.batch_and_pad, batch_size=size)
        batches = packed.batch(size, batch_fn=pad).map(functools.partial(self._layout, part=rows))
        if limit:
            batches = grain.experimental.LimitIterDataset(batches, limit)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self.prefetch)

    @functools.cached_property
    def loaded_tokenizer(self) -> Tokenizer:
        """The tokenizer that `tokenizer` names."""
        return load_tokenizer(self.tokenizer, self.ends[0] if self.ends else None)

    @functools.cached_property
    def _byte_lengths(self) -> Int[np.ndarray, " vocab"]:
        return token_byte_lengths(self.loaded_tokenizer)

    def _example(self, document: str | bytes) -> dict[str, np.ndarray]:
        return {"example": self.items(document)}

    def _layout(self, packed: dict[str, np.ndarray], part: range) -> Batch:
        names = ("example", "example_segment_ids", "example_positions")
        return self.layout(*(packed[name][part.start : part.stop] for name in names))


def row_arrays(shape: tuple[int, int], names: Iterable[str]) -> dict[str, ArraySpec]:
    """The specs of arrays [batch, length], which are int32 except for `mask`, which is float32."""
    return {name: ArraySpec(shape, np.float32 if name == "mask" else np.int32, ("batch", "length")) for name in names}


@dataclasses.dataclass(frozen=True)
class _Parts(grain.experimental.FlatMapTransform):
    """Cuts the items of a document into parts that fit a row."""

    data: TextData

    def flat_map(self, items: Int[np.ndarray, "items ..."]) -> list[dict[str, np.ndarray]]:
        size, again = self.data.row_items, items[:0]
        if type(self.data).layout is TextData.layout:  # the items are tokens
            given = self.data.begin or ()
            again = np.array([(i, 0, -1) for i in given], np.int32).reshape(-1, 3)
        starts = range(size, len(items), size - len(again))
        rest = [np.concatenate([again, items[start : start + size - len(again)]]) for start in starts]
        return [{"example": part} for part in [items[:size], *rest] if len(part)]


_READING = 2  # how corpora are read; 1: without the files of `newly_read`


class _TextBatches(StreamBatches):
    """Batches whose state says how the corpus was read, so that a run goes on with the same texts or not at all."""

    def __init__(self, streams: dict[int, grain.DatasetIterator[Batch]], data: TextData):
        super().__init__(streams)
        self._data = data

    def get_state(self) -> dict[str, Any]:
        return {stream: {**state, "reading": _READING} for stream, state in super().get_state().items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `StreamBatches`. Raises ValueError if a run of an older version did not read all of the corpus."""
        state = {stream: dict(at) for stream, at in state.items()}
        if {at.pop("reading", 1) for at in state.values()} != {_READING} and (
            files := newly_read(self._data.corpus, self._data.text_field)
        ):
            raise ValueError(
                f"the run was saved when {len(files)} of the files of {self._data.corpus} were left out or were plain "
                f"text ({named(files)}); move them elsewhere to go on with the texts that were read, or choose another "
                "--workdir to train on all."
            )
        super().set_state(state)


class _Pack(grain.experimental.ConcatThenSplitIterDataset):
    """Grain's packing, with a state that survives JSON, in which Grain and Orbax save it.

    Grain (0.2.18) compares tuples to see whether a document is cut; JSON turns them into lists, which look like cuts.
    """

    def __iter__(self) -> grain.DatasetIterator:
        iterator = super().__iter__()
        set_state = iterator.set_state

        def set_json_state(state: dict[str, Any]) -> None:
            cuts = {name: tuple(cut) for name, cut in state["remainder_slices"].items()}
            set_state({**state, "remainder_slices": cuts})

        iterator.set_state = set_json_state
        return iterator
