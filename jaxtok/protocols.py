"""The waists of the house: the few interfaces through which everything plugs into everything.

Each is a structural `Protocol`: a class fills a waist by having its methods, without importing this module. Only `Task`
is a base class, for what most tasks share. What is written against a waist (the training loop, sampling, evaluation,
...) works for every system that fills it.

Axis names, used in every shape of the package: batch, length, heads, head_dim, d_model, param_tokens, vocab, layers.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

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

images     uint8    [batch, height, width, channels]; or float32 in [0, 1], where that is so. Volumes have a depth,
                    [batch, depth, height, width, channels]
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


@dataclasses.dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens by their roles."""

    bos: int | None = None
    """Begins a text."""
    eos: tuple[int, ...] = ()
    """Each of them ends a text; the first one ends a document."""
    pad: int | None = None
    """Fills rows up."""
    unk: int | None = None
    """Stands for what the vocabulary has not; no text is encoded to it here, as that would lose the text."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Lossless: `decode(encode(x)) == x` for every byte string x.

    Where there is a vocabulary beyond single bytes, `vocabulary() -> list[bytes]` gives the bytes of each id (none for
    special tokens); where it was made by merges and the file has them, `merges() -> list[tuple[bytes, bytes]]` gives
    these in their order.
    """

    name: str
    vocab_size: int
    eod_id: int
    """Ends a document; also the first input, from which a document's first token is predicted. It is special.eos[0]."""
    special: Special

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
    unit: str
    """What speed is counted in: tokens, words or images."""
    source: str
    """The name of the field that says where the data come from: corpus, images or path."""

    @property
    def units(self) -> int:
        """How many of `unit` a batch has, padding included."""
        ...

    def train_batches(self, rows: range | None = None) -> Batches: ...
    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split; the last batch is filled up with rows that do not count."""
        ...

    def batch_spec(self) -> dict[str, ArraySpec]:
        """What each array of a batch of all processes is; told without opening the data."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """Data whose rows have a class."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label; empty where the source tells none."""
        ...


Sums = Mapping[str, Any]
"""What an evaluation has added up, by name: a float or, of a sum that is an array, a float64 array."""


class Task(abc.ABC):
    """Something that learns: what the one training loop trains. A task is a frozen dataclass with this base.

    Required are `counted`, `init`, `loss`, `sums`, `metrics` and `flops`; the rest has the defaults below.
    """

    counted: ClassVar[str]
    """The name of the sum that counts what an evaluation is of (tokens, words, images); 0 of them are refused."""

    @abc.abstractmethod
    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """New parameters, in Linen's boxes where they have logical axes (`flax.linen.meta`; the loop unboxes them)."""

    @abc.abstractmethod
    def loss(
        self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics to log (scalars, averaged over the steps between two log lines).

        What is no number and goes to `after_step` is under `state` in the metrics.
        """

    @abc.abstractmethod
    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """What an evaluation adds up over its batches. Pure; it is compiled once for each task.

        Args:
          rng: for what is drawn (places to hide, gates), the same in every evaluation.
        """

    @abc.abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]:
        """What an evaluation reports, from the sums over all batches."""

    @abc.abstractmethod
    def flops(self, batch: Batch) -> float:
        """Model FLOPs of one training step on the batch (forward and backward, no recomputation)."""

    def fit(self, data: Data, train: Any = None) -> Task:
        """The task made to fit the data; a task that fits already comes back equal. Default: it fits any.

        Args:
          data: may be opened (a tokenizer, the names of classes).
          train: the run's `jaxtok.training.experiment.TrainConfig`, for what depends on the optimizer.

        Raises:
          ValueError: they do not fit: too small a vocabulary, too long rows, too many classes, ...
        """
        return self

    def trainable(self, params: Params) -> Params | None:
        """A pytree that broadcasts against `params`: 1 where an entry trains, 0 where it stays. Default, None: all
        train."""
        return None

    def after_step(self, params: Params, metrics: dict[str, Any], step: jax.Array) -> Params:
        """The parameters after update number `step`, for state that no gradient moves (a controller, running means).

        It is called in the compiled step, with the metrics of the whole batch. Such state is a part of the parameters,
        so it is sharded, saved and restored with them, and `trainable` says 0. Default: they stay.
        """
        return params

    def load_weights(self, params: Params) -> Params:
        """New parameters with those that come from files, when a run begins. Default: none do."""
        return params

    def batch_sums(self, params: Params, batch: Batch, rng: jax.Array, **options: Any) -> dict[str, Any]:
        """`sums`, compiled. A task that has to run Python between compiled parts does so here, and may have options."""
        return _compiled_sums(self, params, batch, rng)

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """The `metrics` of the sums over all batches, added up in float64.

        Args:
          rng: the key of batch n is this one with n folded in; default: the key of seed n.
          options: of `batch_sums`, where the task has some.

        Raises:
          ValueError: there was nothing to count (`counted` is 0).
        """

        def parts():
            for number, batch in enumerate(batches):
                key = jax.random.key(number) if rng is None else jax.random.fold_in(rng, number)
                yield self.batch_sums(params, batch, key, **options)

        return self.metrics(add_up(parts(), self.counted))


_compiled_sums = jax.jit(lambda task, params, batch, rng: task.sums(params, batch, rng), static_argnums=0)


def add_up(parts: Iterable[Mapping[str, Any]], counted: str) -> Sums:
    """The sums of all batches, in float64.

    Args:
      parts: the sums of each batch.
      counted: the name of that one which counts what the evaluation is of.

    Raises:
      ValueError: there was nothing to count.
    """
    total: dict[str, Any] = {}
    for part in parts:
        found = jax.device_get(part)
        total = {name: total.get(name, 0.0) + np.asarray(value, np.float64) for name, value in found.items()}
    if not np.sum(total.get(counted, 0.0)):
        raise ValueError(f"the evaluation data hold no {counted} that count; choose a larger data set or split.")
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in total.items()}


@runtime_checkable
class Surgery(Protocol):
    """A pure function from one model to another: growth, an adapter, another vocabulary.

    It is a stage inside a run (`Experiment.stages`), makes a run's beginning from another model (`Experiment.start`),
    and is behind verbs such as `jaxtok grow`. It is a frozen dataclass, so that a run's config tells it.
    """

    steps: int
    """As a stage of a run: training steps after it, with the learning-rate schedule starting anew."""
    optimizer: Literal["keep", "reset"]
    """keep: `params` gets the optimizer's state and gives the one afterwards; reset: it gets None, and gives None."""

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task and the data afterwards.

        Raises:
          ValueError: it cannot change this task; the message names the task or its model.
        """
        ...

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        """The parameters and the optimizer's state afterwards. Inside a run it is compiled on the run's mesh.

        `task` and `data` are those before.

        Raises:
          ValueError: the parameters or the optimizer's state cannot be changed.
        """
        ...

    def towards(self, task: Task) -> Surgery:
        """This surgery, with what it leaves open taken from the task that is to come out of it."""
        ...


class Format(Protocol):
    """Somebody else's layout of files. One table of names, with transposes and splits, serves both directions."""

    name: str
    holds: str
    """The kinds of models, for messages."""
    is_file: bool
    """Whether it is one file; else it is a folder."""

    def owns(self, task: Task) -> bool:
        """Whether a model of this task can be written in this format."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether the folder or file is in this format; looks at names and headers only."""
        ...

    def read(self, path: Path, like: Task | None = None, **options: Any) -> Any:
        """A `jaxtok.model.Model`.

        `like` says the sizes, where the files are bare tensors; else its other settings are taken. `data` is None where
        the files do not say what the model was trained on. Options are the format's own, keywords with defaults.
        """
        ...

    def write(self, path: Path, model: Any, **options: Any) -> Path:
        """Writes a `jaxtok.model.Model`; the inverse of `read`. A failure leaves nothing at the path."""
        ...


@runtime_checkable
class ImageSource(Data, Protocol):
    """Data whose batches are of images or volumes, for what looks at the images of a split one by one."""

    classes: tuple[str, ...]
    """Names of the classes, by label; empty where there are none."""
    flip: bool
    """Whether training may show the mirror image, left to right, in place of an image."""
    eval_limit: int
    """Batches in an evaluation, of images from all over the split; 0: the whole split."""

    def count(self, split: str) -> int:
        """How many images the split has."""
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images or volumes to codes and back: a Task, whose parameters are what `init` makes.

    An image has one or several sub-codes at each of its positions. Codes are int32 [batch, positions, sub_codes]:
    positions are those of `code_shape` in row-major order, and sub-code i is in 0..code_values[i] - 1.
    """

    image_shape: tuple[int, ...]
    """(height, width, channels) of an image, or (depth, height, width, channels) of a volume."""
    code_shape: tuple[int, ...]
    """Of the positions of an image: (rows, columns), (depth, rows, columns), or (length,) of a row of codes."""
    code_values: tuple[int, ...]
    """How many values each sub-code of a position has; its length is the number of sub-codes."""
    prefixes: tuple[int, ...]
    """If the codes are ordered: how many of an image's first positions can be decoded without the rest, rising; the
    last of them is all positions. Empty where only whole images can be decoded."""
    draws_codes: bool
    """Whether codes are drawn by the tokenizer's definition, so that `encode` needs a key."""
    draws_images: bool
    """Whether images are drawn given their codes (rectified flow, diffusion), so that `decode` needs a key."""

    def encode(self, params: Params, images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Codes of images float32 [batch, *image_shape] in [0, 1].

        Without a key, the same images have the same codes. A ValueError tells images of another shape or type, and that
        a key is needed.
        """
        ...

    def decode(self, params: Params, codes: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Images float32 [batch, *image_shape], not limited to [0, 1], of codes of whole images or of a prefix of them.

        An image depends on its own codes, the key and its place in the batch only. A ValueError tells codes of another
        shape or out of range, and that a key is needed.
        """
        ...


OnProgress = Callable[[float], None]
"""Called from time to time with the share of the work that is done, the last time with 1."""


@runtime_checkable
class ImageGenerator(Protocol):
    """A Task whose model draws codes of images, which the `ImageTokenizer` of these codes decodes."""

    code_shape: tuple[int, ...]
    """Of the positions that are drawn; that of the tokenizer, or (n,), where n is one of the tokenizer's prefixes."""
    code_values: tuple[int, ...]
    """How many values each sub-code has. Their product is that of the tokenizer's: `jaxtok.data.codes.regroup`."""
    num_classes: int
    """0: the model knows no classes."""
    sampling: type
    """A frozen dataclass of the options of a draw, each with its default."""

    def draw(
        self,
        params: Params,
        conditions: Sequence[int | None],
        rng: jax.Array,
        *,
        sampling: Any = None,
        on_progress: OnProgress | None = None,
    ) -> jax.Array:
        """Codes int32 [batch, positions, sub_codes], an image for each condition: a class, or None for no class.

        An image depends on its condition, the key and its place in the batch only. `sampling` is an instance of the
        class of that name (None: its defaults). A ValueError tells conditions that are out of range.
        """
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
