"""The waists of the house: the few interfaces through which everything plugs into everything.

Each is a structural `Protocol`: a class fills a waist by having its methods, without importing this module. What is
written against a waist (the training loop, sampling, evaluation, ...) works for every system that fills it.

Axis names, used in every shape of the package: batch, length, heads, head_dim, d_model, param_tokens, vocab, layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

Params = Any
"""A pytree of arrays: the parameters of a model."""

Batch = Mapping[str, np.ndarray]
"""What a data pipeline yields. A batch of text has, each of shape [batch, length]:

tokens     int32    the inputs
targets    int32    the token that follows each input
positions  int32    the input's place in its document, as far as this row holds it, from 0
segments   int32    1, 2, ... for the documents in a row, 0 for padding; no attention crosses segments
mask       float32  1 where the target counts in the loss, else 0
bytes      int32    how many bytes of text the target stands for (0 for special tokens and padding)

A batch of images has

images     uint8    [batch, height, width, channels]; or float32 in [0, 1], where that is so
labels     int32    [batch], the class
mask       float32  [batch], 1 where the image counts, 0 where it only fills the batch

and a batch of codes, in place of the images,

codes      int32    [batch, positions, sub_codes], as an `ImageTokenizer` makes them
"""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a batch, over all processes."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    """The logical axis of each dimension (`batch`, `length`, ...); None: a dimension that no mesh divides."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Lossless: `decode(encode(x)) == x` for every byte string x."""

    name: str
    vocab_size: int
    eod_id: int
    """Ends a document; also the first input, from which a document's first token is predicted."""

    def encode(self, text: str | bytes) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> bytes: ...
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; special tokens stand for none."""
        ...


class Cache(Protocol):
    """What a causal model keeps of the tokens before: a pytree of static shapes; rows have lengths of their own.

    `init_cache` makes it empty, and `apply` returns it with the new tokens in it. `jaxtok.nn.cache.KVCache` has slots
    with keys and values; the state of a state-space model has none, and is not rewindable.
    """

    length: jax.Array
    """[batch] int32: how many tokens each row has taken, and not dropped since."""
    rewindable: bool
    """Whether `truncate` and `gather` are possible; otherwise they raise a ValueError."""

    @property
    def next_position(self) -> jax.Array:
        """[batch] int32: one above the largest position of each row. Dropping earlier tokens does not change it."""
        ...

    def truncate(self, length: jax.Array) -> Cache:
        """Forgets what each row took after its first `length` [batch] tokens; never lengthens."""
        ...

    def gather(self, index: jax.Array, count: jax.Array | None = None) -> Cache:
        """Keeps the slots `index` [batch, kept] of each row, in that order, with their positions.

        With an index [layers, batch, kept] or [layers, batch, heads, kept] these differ. `count`, of the shape of the
        index but its last dimension or [batch], says how many of them hold something; default: all.
        """
        ...


class CausalLM(Protocol):
    """A Linen module from tokens [batch, length] to next-token logits [batch, length, vocab].

    Used with explicit parameters, as `model.apply({"params": params}, tokens, ...)`. `method="embed"`, `"hidden"` and
    `"head"` give the parts: `head(hidden(embed(tokens)))` is the whole. `hidden` takes the options of `apply`, and

    layers  (a, b): only the layers from number a on and before number b run. With a > 0, the input is what earlier
            layers gave for the same tokens. What belongs to the embeddings (positions, dropout) is applied where a = 0,
            and the final norm after the last layer: `layers=(count, count)` is the final norm alone. With a cache,
            a = 0 gives it new tokens; otherwise they are its newest ones, and those layers that run are written.
    """

    config: Any
    """Has at least `vocab_size`, `max_length` and `num_layers`."""

    def apply(
        self,
        variables: Mapping[str, Params],
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Any | None = None,
        deterministic: bool = True,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        """Returns logits and the cache, with the new tokens appended (None if none was given).

        Args:
          positions: [batch or 1, length] int32; default: 0, 1, ..., or from the cache's `next_position` on. With a
            cache, a token at position -1 is padding: it leaves no trace, and its logits mean nothing.
          segments: [batch, length] int32; tokens see those of their own segment only. Not together with a cache.
          mask: [batch or 1, length, length] bool, who sees whom among these tokens, in place of "those up to itself":
            a draft tree, with positions by depth. Each also sees what the cache holds at its position or before, and in
            either case no farther back than a window reaches.
        """
        ...

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty `Cache` with room for `length` tokens in each of `batch` rows."""
        ...


class Batches(Protocol):
    """Batches of training, without end; its state goes through JSON, and is that of all processes' rows."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to where an iterator was whose state this is (those of several processes, as one dictionary)."""
        ...

    def close(self) -> None: ...


class Data(Protocol):
    """Where batches come from; a frozen dataclass, so that a run's config tells it.

    `rows` are those of each batch that a process needs; by default all. The rows are the same however they are divided.
    """

    batch_size: int
    """Rows of a batch, over all devices and processes."""

    def train_batches(self, rows: range | None = None) -> Batches: ...
    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split; the last batch is filled up with rows that do not count."""
        ...

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array in a batch of all processes; told without opening the data."""
        ...


class Task(Protocol):
    """Something that learns: what the one training loop trains.

    A task may also have `after_step(params, metrics, step) -> params`, for state that no gradient moves (a controller,
    a moving average): it is called in the compiled step, behind the update number `step`, with the metrics of the whole
    batch. Such state is a part of the parameters, so it is sharded, saved and restored with them; `trainable` says 0.
    With `check(experiment)`, it can refuse data or an optimizer that do not fit its own config, by a ValueError.
    """

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """New parameters, in Linen's boxes where they have logical axes (`flax.linen.meta`; the loop unboxes them)."""
        ...

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics to log (scalars, averaged over the steps between two log lines)."""
        ...

    def evaluate(self, params: Params, batches: Iterable[Batch]) -> dict[str, float]: ...

    def trainable(self, params: Params) -> Params | None:
        """A pytree that broadcasts against `params`: 1 where an entry trains and 0 where it stays; None: all train."""
        ...

    def flops(self, batch: Batch) -> float:
        """Model FLOPs of one training step on the batch (forward and backward, no recomputation)."""
        ...


class Surgery(Protocol):
    """A pure function from one model to another: growth, an adapter, another vocabulary.

    It is used from the command line, and as a stage inside a run (`Experiment.stages`), on any mesh. It is a frozen
    dataclass, so that a run's config tells it.
    """

    steps: int
    """As a stage of a run: training steps after it, with the learning-rate schedule starting anew."""
    optimizer: Literal["keep", "reset"]
    """Whether the optimizer's state is taken along or starts anew."""

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task and the data afterwards. Raises a ValueError for a task that it cannot change."""
        ...

    def params(self, task: Task, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        """The parameters and the optimizer's state (None if it starts anew) afterwards; compiled, on the run's mesh.

        `task` is the one before.
        """
        ...


class Format(Protocol):
    """Somebody else's layout of files. One table of names, with transposes and splits, serves both directions."""

    name: str

    def owns(self, task: Task) -> bool:
        """Whether a model of this task can be written in this format."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether the folder or file is in this format; looks at names and headers only."""
        ...

    def read(self, path: Path, like: Task | None = None) -> Any:
        """A `jaxtok.model.Model`. `like` says the sizes, where the files are bare tensors."""
        ...

    def write(self, path: Path, model: Any, **options: Any) -> Path:
        """Writes a `jaxtok.model.Model`; the inverse of `read`."""
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to grids of codes and back: a Task, whose parameters are what `init` makes."""

    image_size: int
    """Side of the images in pixels."""
    grid: tuple[int, int]
    """Rows and columns of positions; position n is row-major."""
    sub_codes: int
    """Codes at each position."""
    vocab_size: int
    """Values of each of them."""

    def encode(self, params: Params, images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Codes int32 [batch, positions, sub_codes] of images [batch, height, width, channels] in [0, 1].

        Without a key, the same images have the same codes; a tokenizer whose codes are drawn by its definition raises
        a ValueError that says so.
        """
        ...

    def decode(self, params: Params, codes: jax.Array) -> jax.Array:
        """Images [batch, height, width, channels] in float32, not limited to [0, 1]."""
        ...


@runtime_checkable
class TextGenerator(Protocol):
    """A Task whose model continues text in a way of its own; those of causal language models need none."""

    def continue_text(
        self,
        params: Params,
        prompts: Sequence[bytes],
        *,
        max_bytes: int,
        sampling: Any,
        rng: jax.Array | None,
        on_text: Callable[[list[bytes]], None] | None = None,
        logprobs: bool = False,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Up to `max_bytes` bytes after each prompt. A row depends on its prompt, `rng` and its number only.

        Args:
          sampling: a `jaxtok.decoding.Sampling`, or another chooser of the model's tokens.
          rng: a key; needed unless the temperature is 0.
          on_text: called with the new bytes of each row, as they come (streaming).
          logprobs: return the log probabilities as well: for each row those of its tokens in nats, by the model's own
            distribution before `sampling`. Tokens are bytes, units, and what ends words and texts; the sum is that of
            the whole row.

        Raises:
          ValueError: there is no prompt or no room, or a key is needed.
        """
        ...
