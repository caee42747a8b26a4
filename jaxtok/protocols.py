"""The waists of the package: the few interfaces through which all its parts fit together.

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

FROZEN = "frozen"
"""The part of a task's parameters, by its name at the top, that never trains: the optimizer has no state for it."""

Batch = Mapping[str, np.ndarray]
"""What a data pipeline yields. A batch of text has, each of shape [batch, length]:

tokens     int32    the inputs
targets    int32    the token that follows each input
positions  int32    the input's position, from 0, in the part of its document that the row holds
segments   int32    1, 2, ... for the documents in a row, 0 for padding; no attention crosses segments
mask       float32  1 where the target counts in the loss, else 0
bytes      int32    how many bytes of text the target stands for (0 for special tokens and padding)

A batch of images has

images     uint8    [batch, height, width, channels], of volumes [batch, depth, height, width, channels]; some data
                    have float32 in [0, 1] instead
labels     int32    [batch], the class
mask       float32  [batch], 1 where the image counts, 0 where it only fills the batch

A batch of codes has, in place of the images,

codes      int32    [batch, positions, sub_codes], as an `ImageTokenizer` makes them
"""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a batch, over all processes."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    """The logical axis of each dimension (`batch`, `length`, ...); None for a dimension that no mesh divides."""


@dataclasses.dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens by their roles."""

    bos: int | None = None
    """Begins a text."""
    eos: tuple[int, ...] = ()
    """Each of them ends a text; the first one ends a document."""
    pad: int | None = None
    """Fills up rows."""
    unk: int | None = None
    """Stands for text that the vocabulary lacks; nothing is encoded to it here, as that would lose the text."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Lossless: `decode(encode(x)) == x` for every byte string x.

    A tokenizer whose vocabulary goes beyond single bytes also has `vocabulary() -> list[bytes]`: the bytes of each id
    (none for special tokens). One that was made by merges, and whose file has them, also has
    `merges() -> list[tuple[bytes, bytes]]`: the merges in their order.
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


@runtime_checkable
class ChatTokenizer(Protocol):
    """A `Tokenizer` that reads the texts of chat templates, in which special tokens are written by their names."""

    def encode_chat(self, text: str) -> list[int]: ...


class Cache(Protocol):
    """What a causal model keeps of earlier tokens: a pytree of static shapes, in which each row has its own length.

    `init_cache` makes an empty one, and `apply` returns it with the new tokens in it. `jaxtok.nn.cache.KVCache` has
    slots of keys and values; the state of a state-space model has no slots, and is not rewindable.
    """

    length: jax.Array
    """[batch] int32: how many tokens each row has taken and not dropped."""
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

        An index of [layers, batch, kept] or [layers, batch, heads, kept] keeps other slots in each layer, or in each
        head of each layer. `count` says how many of the kept slots hold something; its shape is [batch], or that of the
        index without the last dimension. Default: all of them.
        """
        ...


@runtime_checkable
class CausalLM(Protocol):
    """A Linen module from tokens [batch, length] to next-token logits [batch, length, vocab].

    It is used with explicit parameters, as `model.apply({"params": params}, tokens, ...)`. `method="embed"`, `"hidden"`
    and `"head"` call its parts: `head(hidden(embed(tokens)))` is the whole. `hidden` takes the options of `apply`, and

    layers  (a, b): only layers a, ..., b - 1 run. With a > 0, the input is what the earlier layers returned for the
            same tokens. What belongs to the embeddings (positions, dropout) is applied only if a = 0, and the final
            norm only after the last layer: `layers=(count, count)` applies the final norm alone. With a cache, a = 0
            appends the tokens to it; with a > 0 they are its newest tokens already, and the layers that run write
            their part of it.
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
          segments: [batch, length] int32; a token sees those of its own segment only. Not together with a cache.
          mask: [batch or 1, length, length] bool: which of these tokens each of them sees, in place of all up to
            itself; for a draft tree, whose positions are depths. Each also sees what the cache holds at its position
            or before. In either case it sees no farther back than a window reaches.
        """
        ...

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty `Cache` with room for `length` tokens in each of `batch` rows."""
        ...


class Batches(Protocol):
    """Training batches, without end."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]:
        """Returns where the iterator is in the rows of this process, as values that JSON can hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to where the iterators were that returned this state; those of several processes are one dictionary."""
        ...

    def close(self) -> None: ...


class Data(Protocol):
    """Where batches come from: a frozen dataclass, so that a run's config can hold it.

    `rows` are the rows of each batch that this process needs; default: all. They are the same however they are divided.
    Data of text, and only these, are a `jaxtok.data.text.TextData`, which says what tokenizer they have.
    """

    batch_size: int
    """Rows of a batch, over all devices and processes."""
    unit: str
    """What speed is measured in: tokens, words or images."""
    source: str
    """The name of the field that says where the data come from: corpus, images or path."""
    seed: int
    """The seed of the order of training."""
    eval_limit: int
    """How many batches an evaluation has, of rows from all over the split; 0: the whole split."""

    @property
    def units(self) -> int:
        """How many of `unit` a batch has, padding included."""
        ...

    def train_batches(self, rows: range | None = None) -> Batches: ...
    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split; the last batch is filled up with rows that do not count."""
        ...

    def batch_spec(self) -> dict[str, ArraySpec]:
        """Returns what each array of a batch is, over all processes; it does not open the data."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """Data whose rows have a class."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label; empty if the source does not name them."""
        ...


Sums = Mapping[str, Any]
"""What an evaluation has added up, by name: floats, or float64 arrays for the sums that are arrays."""


class Task(abc.ABC):
    """Something that learns: what the one training loop trains. A task is a frozen dataclass with this base.

    Required are `counted`, `model` (a field, or a property of a wrapper; itself a frozen dataclass), `init`, `sums`,
    `metrics`, `flops`, and `loss_sums` with `loss_of` (or `loss` alone, for a task whose batches are never accumulated
    in parts); the rest has the defaults below.
    """

    counted: ClassVar[str]
    """The name of the sum that counts what is evaluated (tokens, words, images); an evaluation of 0 is an error."""
    model: Any
    """The config of the model that learns."""
    guard: Callable[[Sequence[Mapping[str, float]]], str] | None = None
    """A rule that ends a run which is not worth going on with, a frozen dataclass (`jaxtok.vision.collapse`). The loop
    calls it with the newest logged rows of training (at most 1,000, each with its `step`) and ends the run with the
    sentence that it returns, unless that is empty. With a rule, the first step is logged too. None: there is none."""

    def module(self) -> Any | None:
        """Returns the Linen module whose parameters are the task's: `task.module().apply({"params": params}, ...)`.

        None (the default): there is no such module, as the parameters are those of several, or of a wrapper.
        """
        return None

    def decoding(self, params: Params) -> tuple[Any, Params, dict[str, Any]]:
        """Returns how the model generates: a `CausalLM`, its parameters, and options of `jaxtok.decoding.generate`.

        Default: the module with the task's parameters, and no options. A task around a language model has its own.
        """
        return self.module(), params, {}

    def with_model(self, **fields: Any) -> Task:
        """Returns the task with some fields of its model replaced."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **fields))

    @abc.abstractmethod
    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """New parameters, in Linen's boxes where they have logical axes (`flax.linen.meta`; the loop unboxes them)."""

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        """What the loss and its metrics are made of: a pytree whose sum over the parts of a batch is that of the batch.

        A mean has its sum and its count here, as a mean over a batch is not the mean of the means over its parts.
        """
        raise ValueError(
            f"a {type(self).__name__} does not say how its loss adds up over the parts of a batch (loss_sums); "
            "train.accumulate must be 1."
        )

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns what `loss` returns, from the `loss_sums` of a batch.

        Args:
          params: for state that no gradient moves; there is no gradient through them.
        """
        raise NotImplementedError

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics to log (scalars, those of the step that is logged).

        Values that are not logged but passed to `after_step` are in the metrics under `state`.
        """
        return self.loss_of(self.loss_sums(params, batch, rng, step), jax.lax.stop_gradient(params), step)

    @abc.abstractmethod
    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """What an evaluation adds up over its batches. Pure; it is compiled once for each task.

        Args:
          rng: for what is drawn (positions to hide, gates); it is the same in every evaluation.
        """

    @abc.abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns what an evaluation reports, from the sums over all batches."""

    @abc.abstractmethod
    def flops(self, batch: Batch) -> float:
        """Model FLOPs of one training step on the batch (forward and backward, no recomputation)."""

    def fit(self, data: Data, train: Any = None) -> Task:
        """Returns the task fitted to the data; one that fits already comes back equal. Default: every task fits.

        Args:
          data: may be opened (a tokenizer, the names of classes).
          train: the run's `jaxtok.training.experiment.TrainConfig`, for what depends on the optimizer.

        Raises:
          ValueError: they do not fit: too small a vocabulary, too long rows, too many classes, ...
        """
        return self

    def trainable(self, params: Params) -> Params | None:
        """Returns a pytree that broadcasts against `params`: 1 for an entry that trains, 0 for one that stays.

        None (the default): all entries train.
        """
        return None

    def after_step(self, params: Params, metrics: dict[str, Any], step: jax.Array) -> Params:
        """Returns the parameters after update number `step`, with state that no gradient moves (a controller, running
        means) brought up to date.

        It is called in the compiled step, with the metrics of the whole batch. Such state is a part of the parameters,
        so it is sharded, saved and restored with them; `trainable` is 0 for it. Default: the same parameters.
        """
        return params

    def load_weights(self, params: Params) -> Params:
        """Returns the new parameters of a run, in which some are replaced by those of files. Default: none are.

        It is called before the data are opened, with abstract parameters.
        """
        return params

    def batch_sums(self, params: Params, batch: Batch, rng: jax.Array, **options: Any) -> dict[str, Any]:
        """Calls `sums`, compiled. A task that runs Python between compiled parts does so here, and may take options."""
        return _compiled_sums(self, params, batch, rng)

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """Returns the `metrics` of the sums over all batches, which are added up in float64.

        Args:
          rng: the key of batch n is this one with n folded in; default: the key of seed n.
          options: of `batch_sums`, if the task has some.

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
    """Returns the sums over all batches, in float64.

    Args:
      parts: the sums of each batch.
      counted: the name of the sum that counts what is evaluated.

    Raises:
      ValueError: there was nothing to count.
    """
    total: dict[str, Any] = {}
    for part in parts:
        sums = jax.device_get(part)
        total = {name: total.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
    if not np.sum(total.get(counted, 0.0)):
        raise ValueError(f"the evaluation data hold no {counted} that count; choose a larger data set or split.")
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in total.items()}


@runtime_checkable
class Surgery(Protocol):
    """A pure function from one model to another: growth, an adapter, another vocabulary.

    It can be a stage of a run (`Experiment.stages`), make a run's first parameters from another model's
    (`Experiment.start`), or do the work of a verb such as `jaxtok grow`. It is a frozen dataclass, so that a run's
    config can hold it.
    """

    steps: int
    """The number of training steps after it, if it is a stage of a run; the learning-rate schedule starts anew."""
    optimizer: Literal["keep", "reset"]
    """keep: `params` takes the optimizer's state and returns the new one; reset: it takes None and returns None."""

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """Returns the task and the data after it.

        Raises:
          ValueError: it cannot change this task; the message names the task or its model.
        """
        ...

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        """Returns the parameters and the optimizer's state after it. Inside a run it is compiled on the run's mesh.

        `task` and `data` are those before it.

        Raises:
          ValueError: the parameters or the optimizer's state cannot be changed.
        """
        ...

    def towards(self, task: Task) -> Surgery:
        """Returns this surgery with the settings that it leaves open taken from `task`, which is to come out of it."""
        ...


class Format(Protocol):
    """The file layout of other code. One table of names, with transposes and splits, serves both directions."""

    name: str
    holds: str
    """The kinds of models that it holds, for messages."""
    is_file: bool
    """Whether it is one file; otherwise it is a folder."""

    def owns(self, task: Task) -> bool:
        """Whether a model of this task can be written in this format."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether the folder or file is in this format; only names and headers are looked at."""
        ...

    def read(self, path: Path, like: Task | None = None, **options: Any) -> Any:
        """Returns the `jaxtok.model.Model` in the folder or file.

        If the files are bare tensors, the sizes come from `like`; otherwise only its other settings are taken. The
        model's `data` is None if the files do not say what it was trained on. The options are the format's own:
        keyword arguments with defaults.
        """
        ...

    def write(self, path: Path, model: Any, **options: Any) -> Path:
        """Writes a `jaxtok.model.Model`; the inverse of `read`. A failure leaves nothing at the path."""
        ...


@runtime_checkable
class ImageSource(Data, Protocol):
    """Data whose batches are images or volumes, for code that goes through the images of a split one by one."""

    classes: tuple[str, ...]
    """The names of the classes, by label; empty if there are none."""
    flip: bool
    """Whether training may show the mirror image, left to right, in place of an image."""

    def count(self, split: str) -> int:
        """How many images the split has."""
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """A Task that turns images or volumes into codes and back, with parameters such as `init` makes.

    An image has one or several sub-codes at each of its positions. Codes are int32 [batch, positions, sub_codes]:
    positions are those of `code_shape` in row-major order, and sub-code i is in 0..code_values[i] - 1.
    """

    image_shape: tuple[int, ...]
    """(height, width, channels) of an image, or (depth, height, width, channels) of a volume."""
    code_shape: tuple[int, ...]
    """The shape of an image's positions: (rows, columns), (depth, rows, columns), or (length,) for a row of codes."""
    code_values: tuple[int, ...]
    """How many values each sub-code of a position has; its length is the number of sub-codes."""
    prefixes: tuple[int, ...]
    """If the codes are ordered, the numbers of first positions that can be decoded without the rest, in rising order;
    the last one is all positions. Empty if only whole images can be decoded."""
    draws_codes: bool
    """Whether codes are drawn by the tokenizer's definition, so that `encode` needs a key."""
    draws_images: bool
    """Whether images are drawn given their codes (rectified flow, diffusion), so that `decode` needs a key."""

    def encode(self, params: Params, images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Returns the codes of images float32 [batch, *image_shape] in [0, 1].

        Without a key, the same images have the same codes.

        Raises:
          ValueError: the images are of another shape or type, or a key is needed.
        """
        ...

    def decode(self, params: Params, codes: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Returns the images, float32 [batch, *image_shape] and not limited to [0, 1], of codes or of a prefix of them.

        An image depends only on its own codes, the key and its index in the batch.

        Raises:
          ValueError: the codes are of another shape or out of range, or a key is needed.
        """
        ...


OnProgress = Callable[[float], None]
"""Called from time to time with the share of the work that is done, the last time with 1."""


@runtime_checkable
class ImageGenerator(Protocol):
    """A Task whose model draws codes of images, which the `ImageTokenizer` of these codes decodes."""

    code_shape: tuple[int, ...]
    """The shape of the positions that are drawn: the tokenizer's, or (n,), where n is one of its prefixes."""
    code_values: tuple[int, ...]
    """How many values each sub-code has. Their product is the tokenizer's (see `jaxtok.data.codes.regroup`)."""
    num_classes: int
    """How many classes the model knows; 0: none."""
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
        """Draws codes int32 [batch, positions, sub_codes]: an image for each condition, a class or None for no class.

        An image depends only on its condition, the key and its index in the batch. `sampling` is an instance of the
        class of that name; None: its defaults.

        Raises:
          ValueError: a condition is out of range.
        """
        ...


@runtime_checkable
class TextGenerator(Protocol):
    """A Task whose model continues text in its own way; the tasks of causal language models do not need it."""

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
        """Returns up to `max_bytes` bytes after each prompt. A row depends only on its prompt, `rng` and its number.

        Args:
          sampling: a `jaxtok.decoding.Sampling`, or another chooser of the model's tokens.
          rng: a key; needed unless the temperature is 0.
          on_text: called with the new bytes of each row, as they come (streaming).
          logprobs: also return, for each row, the log probabilities of its tokens in nats, by the model's own
            distribution before `sampling`. Tokens are bytes, units, and what ends words and texts, so that their sum
            is the log probability of the whole row.

        Raises:
          ValueError: there is no prompt or no room, or a key is needed.
        """
        ...
