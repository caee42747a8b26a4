"""Language models of text and images in turn (SEED-LLaMA, arXiv 2310.01218, sections 3.2 and 3.3).

An image is `<img>`, its codes, `</img>` (`jaxtok.multimodal.image_tokens`), and a model predicts these tokens as it
does those of text. Pre-training reads pairs in both orders, documents of texts and images in turn, and plain text;
instruction tuning reads questions and counts the answers only. `AddImageTokens` gives a language model the new tokens;
with LoRA (`lora_config`), the tables and norms train whole.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.multimodal.image_tokens import ImageTextTokenizer
from jaxtok.nn.lora import LoraConfig
from jaxtok.nn.losses import bits_per_byte, mean
from jaxtok.protocols import ArraySpec, Batch, Data, Params, Sums, Task
from jaxtok.tokenizers import load_tokenizer
from jaxtok.transfer.lora import Lora

REQUESTS = (
    "Draw",
    "Paint",
    "Create an image of",
    "Please make a picture of",
    "Generate an image:",
    "Show me a picture of",
    "I would like to see",
    "Make an illustration of",
    "Produce a picture that shows",
    "Please draw",
    "Give me an image of",
    "Sketch",
    "Design a picture of",
    "Let me see",
    "Could you draw",
    "Can you paint",
    "Would you make a picture of",
    "Can you show me",
    "Could you create an image of",
    "Will you illustrate",
)
"""Requests for an image; the last six are questions. (The authors have as many of each; the words are ours.)"""
QUESTIONS_FROM = 14
REPLIES = ("Here is the image:", "Here is a picture of it:", "This is what I drew:", "Of course. Here it is:")

Part = str | Sequence[int]
"""A text, or the codes of an image."""


def write_documents(path: str | Path, documents: Iterable[Mapping[str, Any]]) -> Path:
    """Writes documents as lines of JSON, for `ImageTextData`: a file for each split, `train.jsonl` and so on.

    A document is {"parts": [...]} or, for instruction tuning, {"user": [...], "assistant": [...]}, or {"draw": caption,
    "image": codes}. A part is a text, or {"image": codes}, or the codes alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for document in documents:
            file.write(json.dumps(document, default=lambda x: np.asarray(x).tolist()) + "\n")
    return path


@dataclasses.dataclass(frozen=True)
class ImageTextData:
    """Documents of texts and images, one in each row, cut or padded to `length`. A batch is one of text
    (`jaxtok.protocols.Batch`), and has

        images  float32  [batch, length], 1 where the target is a token of an image

    The loss counts every target that is no padding; in instruction tuning, those of answers only. A row's content
    depends only on its number and the seed.

    Raises:
        ValueError: a field is out of range.
    """

    unit: ClassVar[str] = "tokens"
    source: ClassVar[str] = "path"

    path: str = "data/image_text"
    """The folder of train.jsonl, validation.jsonl and test.jsonl (`write_documents`)."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Other folders, and how often training takes a row of them, beside `path` with weight 1."""
    text_tokenizer: str = "bytes"
    """The tokenizer of text, which may have the image tokens already."""
    codes: int = 8192
    """How many values a code has."""
    image_codes: int = 32
    """The codes of an image."""
    length: int = 256
    batch_size: int = 32
    seed: int = 0
    eval_limit: int = 0
    text_first: float = 0.5
    """How often training shows a pair with its text first; an evaluation has both orders in turn."""
    swap: float = 0.5
    """How often training shows a document of several images with neighbours (image, text) swapped."""
    max_images: int = 7
    """The most images of a document; what comes after them is left out."""
    second_only: bool = False
    """Whether the loss of a pair counts its second part only."""
    style: Literal["vicuna", "llama2"] = "vicuna"
    """How questions are written: USER: ... ASSISTANT: (SEED-LLaMA 8B), or [INST] ... [/INST] (14B)."""
    prefetch: int = 4
    workers: int = 1

    def __post_init__(self):
        least = dict(codes=1, image_codes=1, length=2, batch_size=1, seed=0, eval_limit=0, max_images=1, workers=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        for field in ("text_first", "swap"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1].")
        if any(weight <= 0 for _, weight in self.mixture):
            raise ValueError(f"mixture is {self.mixture}; its weights must be positive.")
        if self.style not in ("vicuna", "llama2"):
            raise ValueError(f"style is {self.style!r}; it must be vicuna or llama2.")
        if self.image_codes + 3 > self.length:
            raise ValueError(f"length is {self.length}; it must be at least {self.image_codes + 3}, to hold an image.")

    # -- rows

    @functools.cached_property
    def loaded_tokenizer(self) -> ImageTextTokenizer:
        return ImageTextTokenizer(load_tokenizer(self.text_tokenizer), self.codes, self.image_codes)

    @property
    def opening_id(self) -> int:
        special = self.loaded_tokenizer.special
        return self.loaded_tokenizer.eod_id if special.bos is None else special.bos

    def row(self, document: Mapping[str, Any], rng: np.random.Generator | None = None) -> tuple[list[int], list[bool]]:
        """The ids of a document, from the one that begins a text to the one that ends it, and which of them count.

        Args:
          rng: for the order and the words that training draws; None: the order of the document, and fixed words.

        Raises:
          ValueError: the document has none of the forms of `write_documents`.
        """
        if "parts" in document:
            parts = self._ordered([_part(p) for p in document["parts"]], rng)
            flags = [bool(n) or not (self.second_only and len(parts) == 2) for n in range(len(parts))]
        elif "user" in document and "assistant" in document:
            opening, middle = self._turns()
            asked = [opening, *map(_part, document["user"]), middle]
            answer = [_part(p) for p in document["assistant"]]
            if answer and isinstance(answer[-1], str) and not answer[-1].rstrip().endswith((".", "!", "?")):
                answer[-1] = answer[-1].rstrip() + "."
            parts, flags = asked + answer, [False] * len(asked) + [True] * len(answer)
        elif "draw" in document and "image" in document:
            number = 0 if rng is None else int(rng.integers(len(REQUESTS)))
            reply = REPLIES[0 if rng is None else int(rng.integers(len(REPLIES)))]
            opening, middle = self._turns()
            request = f"{REQUESTS[number]} {document['draw'].rstrip('.')}{'?' if number >= QUESTIONS_FROM else '.'}"
            parts, flags = [opening + request + middle, f"{reply} ", document["image"]], [False, True, True]
        else:
            raise ValueError(
                f"a document has {', '.join(document) or 'nothing'}; it must have parts, user and assistant, or draw "
                "and image."
            )
        return self._ids(parts, flags)

    def _turns(self) -> tuple[str, str]:
        return ("USER: ", "\nASSISTANT:") if self.style == "vicuna" else ("[INST] ", " [/INST]\n")

    def _ordered(self, parts: list[Part], rng: np.random.Generator | None) -> list[Part]:
        """The parts up to the last image that is wanted, in the order that training shows."""
        pictures = [n for n, part in enumerate(parts) if not isinstance(part, str)]
        if len(pictures) > self.max_images:
            parts = parts[: pictures[self.max_images]]
        if rng is None:
            return parts
        if len(parts) == 2 and len(pictures) == 1:
            text, image = parts if isinstance(parts[0], str) else parts[::-1]
            return [text, image] if rng.random() < self.text_first else [image, text]
        if len(pictures) > 1 and rng.random() < self.swap:
            parts, n = list(parts), 0
            while n + 1 < len(parts):
                if isinstance(parts[n], str) != isinstance(parts[n + 1], str):
                    parts[n], parts[n + 1] = parts[n + 1], parts[n]
                    n += 1
                n += 1
        return parts

    def _ids(self, parts: list[Part], flags: list[bool]) -> tuple[list[int], list[bool]]:
        """A row of at most length + 1 ids. A text is cut where the row ends; an image that does not fit is left out,
        with what follows it."""
        tokenizer, room = self.loaded_tokenizer, self.length + 1
        ids, counted = [self.opening_id], [False]
        for part, flag in zip(parts, flags):
            new = tokenizer.encode(part) if isinstance(part, str) else tokenizer.image_ids(part)
            if len(ids) + len(new) > room:
                new = new[: room - len(ids)] if isinstance(part, str) else []
                ids, counted = ids + new, counted + [flag] * len(new)
                return ids, counted
            ids, counted = ids + new, counted + [flag] * len(new)
        if len(ids) < room:
            ids, counted = [*ids, tokenizer.eod_id], [*counted, True]
        return ids, counted

    def batch_of(self, rows: Sequence[tuple[list[int], list[bool]] | None]) -> Batch:
        """The batch of some rows; None is a row of padding."""
        shape, tokenizer = (len(rows), self.length), self.loaded_tokenizer
        batch = {name: np.zeros(shape, spec.dtype) for name, spec in self.batch_spec().items()}
        lengths = self._byte_lengths
        for n, row in enumerate(rows):
            if row is None:
                continue
            ids, counted = np.array(row[0], np.int32), np.array(row[1])
            size = len(ids) - 1
            batch["tokens"][n, :size], batch["targets"][n, :size] = ids[:-1], ids[1:]
            batch["positions"][n, :size], batch["segments"][n, :size] = np.arange(size), 1
            batch["mask"][n, :size] = counted[1:]
            batch["images"][n, :size] = tokenizer.is_image(ids[1:])
            batch["bytes"][n, :size] = np.where(batch["images"][n, :size] > 0, 0, lengths[ids[1:]])
        return batch

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        tokenizer = self.loaded_tokenizer
        return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int32)

    # -- data

    @property
    def units(self) -> int:
        return self.batch_size * self.length

    def batch_spec(self) -> dict[str, ArraySpec]:
        shape, axes = (self.batch_size, self.length), ("batch", "length")
        whole = ("tokens", "targets", "positions", "segments", "bytes")
        spec = {name: ArraySpec(shape, np.int32, axes) for name in whole}
        return spec | {name: ArraySpec(shape, np.float32, axes) for name in ("mask", "images")}

    def documents(self, split: str, folder: str = "") -> list[dict[str, Any]]:
        """The documents of a split.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no lines of JSON, or holds nothing.
        """
        key = (folder or self.path, split)
        if key not in self._opened:
            file = Path(key[0]) / f"{split}.jsonl"
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; write it with jaxtok.multimodal.write_documents.")
            try:
                self._opened[key] = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
            except ValueError as error:
                raise ValueError(f"{file} is not lines of JSON ({error}); write it again.") from error
            if not self._opened[key]:
                raise ValueError(f"{file} holds no documents; give some.")
        return self._opened[key]

    @functools.cached_property
    def _opened(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        return {}

    def train_batches(self, rows: range | None = None) -> Any:
        rows = range(self.batch_size) if rows is None else rows
        folders, weights = [self.path, *(f for f, _ in self.mixture)], [1.0, *(w for _, w in self.mixture)]
        shares = np.cumsum(weights) / np.sum(weights)
        documents = [self.documents("train", folder) for folder in folders]

        def one(number: int) -> tuple[list[int], list[bool]]:
            rng = np.random.default_rng((self.seed, number))
            source = documents[int(np.searchsorted(shares, rng.random(), side="right"))]
            if len(documents) == 1:
                epoch, index = divmod(number, len(source))
                return self.row(source[_order(len(source), self.seed, epoch)[index]], rng)
            return self.row(source[int(rng.integers(len(source)))], rng)

        def make(number: int) -> Batch:
            return self.batch_of([one(number * self.batch_size + row) for row in rows])

        return iter(self._in_threads(2**62, make))

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Any:
        rows = range(self.batch_size) if rows is None else rows
        documents = self.documents(split)
        order = np.random.default_rng(0).permutation(len(documents)) if self.eval_limit else np.arange(len(documents))
        batches = -(-len(documents) // self.batch_size)

        def one(number: int) -> tuple[list[int], list[bool]] | None:
            if number >= len(documents):
                return None
            document = documents[int(order[number])]
            if number % 2 and len(document.get("parts", ())) == 2:
                document = {"parts": document["parts"][::-1]}
            return self.row(document)

        def make(number: int) -> Batch:
            return self.batch_of([one(number * self.batch_size + row) for row in rows])

        return self._in_threads(min(batches, self.eval_limit or batches), make)

    def _in_threads(self, batches: int, make: Any) -> grain.IterDataset:
        buffer = max(self.prefetch, self.workers) if self.workers else 0
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=buffer)
        return grain.MapDataset.range(batches).map(make).to_iter_dataset(options)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _part(part: Any) -> Part:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and "image" in part:
        part = part["image"]
    if isinstance(part, Sequence | np.ndarray) and all(isinstance(code, int | np.integer) for code in part):
        return part
    raise ValueError(f'a part of a document is {part!r}; it must be a text or {{"image": codes}}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextModeling(LanguageModeling):
    """Next-token prediction over texts and images; also measures both apart."""

    def fit(self, data: Data, train: Any = None) -> ImageTextModeling:
        """The task with a vocabulary size of 0 replaced by the tokenizer's, rounded up to 128.

        Raises:
          ValueError: the model has fewer ids, or a shorter context.
        """
        if not isinstance(data, ImageTextData):
            raise ValueError(f"the data are {type(data).__name__}; they must be ImageTextData.")
        ids, task = data.loaded_tokenizer.vocab_size, self
        if not self.model.vocab_size:
            task = self.with_model(vocab_size=-(-ids // 128) * 128)
        if task.model.vocab_size < ids:
            raise ValueError(
                f"task.model.vocab_size is {task.model.vocab_size}, but text and images have {ids} ids; raise it, or "
                "set it to 0 to take as many."
            )
        if data.length > task.model.max_length:
            raise ValueError(
                f"data.length is {data.length}, more than task.model.max_length = {task.model.max_length}; lower the "
                "first or raise the second."
            )
        return task

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        return self._both(self._nats(params, batch, rng), batch)

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The mean cross entropy in nats a token; also logs that of text and of images apart."""
        text, images = sums["tokens"] - sums["image_tokens"], sums["image_tokens"]
        apart = {
            "text_loss": mean(sums["nats"] - sums["image_nats"], text),
            "image_loss": mean(sums["image_nats"], images),
        }
        return mean(sums["nats"], sums["tokens"]), apart

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        return self._both(self._nats(params, batch), batch)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns the loss (nats a token), text_loss and image_loss (that of either), bits_per_byte of the text, and
        the number of tokens and of image_tokens."""
        text = sums["tokens"] - sums["image_tokens"]
        text_nats = sums["nats"] - sums["image_nats"]
        return {
            "loss": sums["nats"] / sums["tokens"],
            "text_loss": text_nats / max(text, 1),
            "image_loss": sums["image_nats"] / max(sums["image_tokens"], 1),
            "bits_per_byte": bits_per_byte(text_nats, sums["bytes"]),
            "tokens": sums["tokens"],
            "image_tokens": sums["image_tokens"],
        }

    @staticmethod
    def _both(nats: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        mask, images = batch["mask"], batch["mask"] * batch["images"]
        return {
            "nats": jnp.sum(nats * mask),
            "tokens": jnp.sum(mask),
            "image_nats": jnp.sum(nats * images),
            "image_tokens": jnp.sum(images),
            "bytes": jnp.sum(batch["bytes"] * mask),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddImageTokens:
    """The surgery that gives a language model of text the tokens of images: new rows of the embedding and the head, at
    the model's own initialisation. All else is kept."""

    to: ImageTextModeling | None = None
    """The task afterwards, whose model is the old one but for its vocab_size. In `Experiment.start`, None means the
    run's own task."""
    data: ImageTextData | None = None
    """The data afterwards; None: those of the run."""
    lora: LoraConfig | None = None
    """The adapter that trains afterwards (`lora_config`); None: all parameters train."""
    first: int = 0
    """The first id whose row is new: the number of ids of the text's tokenizer. 0: the old model's vocab_size."""
    steps: int = 1000
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after image tokens were added is {self.steps}; it must be at least 1.")
        if self.first < 0:
            raise ValueError(f"first is {self.first}; it must be 0 or more.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task afterwards. Raises ValueError if the models differ in more than their vocabulary, or `to` is
        missing."""
        if not isinstance(task, LanguageModeling) or isinstance(task, ImageTextModeling):
            raise ValueError(f"a {type(task).__name__} cannot get image tokens; it must be a language model of text.")
        if self.to is None:
            raise ValueError("to is None; it must be the task with image tokens (an ImageTextModeling).")
        old, new = task.model, self.to.model
        if type(old) is not type(new) or dataclasses.replace(old, vocab_size=new.vocab_size) != new:
            raise ValueError("the model with image tokens must be the old one but for its vocab_size; copy the config.")
        if new.vocab_size <= (self.first or old.vocab_size):
            raise ValueError(
                f"the model with image tokens has {new.vocab_size} ids, and the text's are "
                f"{self.first or old.vocab_size}; its vocab_size must be larger."
            )
        return Lora(task=self.to, lora=self.lora) if self.lora else self.to, self.data or data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        model = self.to.model
        kept = min(self.first or task.model.vocab_size, task.model.vocab_size)
        new = dict(params)
        for number, name in enumerate(n for n in ("embedding", "head_matrix") if n in params):
            table = params[name]
            key = jax.random.fold_in(rng, number)
            rows = model.init_std * jax.random.normal(key, (model.vocab_size - kept, table.shape[1]))
            new[name] = jnp.concatenate([table[:kept], rows.astype(table.dtype)])
        if self.lora:
            new = Lora(task=self.to, lora=self.lora).start(new, jax.random.fold_in(rng, 2))
        return new, None

    def towards(self, task: Task) -> AddImageTokens:
        if self.to is not None:
            return self
        if isinstance(task, Lora):
            return dataclasses.replace(self, to=task.task, lora=task.lora)
        return dataclasses.replace(self, to=task)


def lora_config(tied: bool = False) -> LoraConfig:
    """SEED-LLaMA's LoRA for a Llama: rank 16, alpha 32, dropout 0.05 on all projections; the embedding, the head and
    all norms are trained whole.

    Args:
      tied: whether the head is the embedding.
    """
    return LoraConfig(
        rank=16,
        alpha=32.0,
        dropout=0.05,
        targets=(r".*/attention/(query|key|value|output)/kernel", r".*/ffn/(gate|up|down)/kernel"),
        saved=(
            "embedding",
            *(() if tied else ("head_matrix",)),
            r".*/norm_(attention|ffn)/scale",
            r"final_norm/scale",
        ),
    )


_IMAGES = 8192 + 2

PUBLISHED = {
    "seed-llama-8b": LlamaConfig(norm_eps=1e-6, max_length=2048, vocab_size=32_000 + _IMAGES),
    "seed-llama-14b": LlamaConfig(
        num_layers=40, d_model=5120, num_heads=40, mlp_dim=13824, vocab_size=32_000 + _IMAGES
    ),
}
"""SEED-LLaMA: Vicuna 7B and Llama 2 13B (chat) with 8192 codes, `<img>` and `</img>`."""
