"""A model as one works with it: task, parameters, tokenizer and data in one object."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxtok.decoding import Constrained, Drafter, Evictor, Generation, Piece, Sampling, Vocabulary, generate
from jaxtok.decoding import constraint as parse
from jaxtok.decoding.protocols import SelfDrafter
from jaxtok.protocols import CausalLM, ChatTokenizer, ImageTokenizer, Params, TextGenerator, Tokenizer
from jaxtok.tokenizers.chat import Message, read_template
from jaxtok.training.mesh import make_layout
from jaxtok.vision.images import as_float

Split = Literal["train", "validation", "test", "all"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What every verb, notebook and study works with; `jaxtok.open` makes it, from a run or from a `Format`.

    >>> model = jaxtok.open(run)
    >>> model
    Model(LanguageModeling of TokenFormerConfig, 3,472 parameters, step 4, from run)
    >>> logits, _ = model.module.apply({"params": model.params}, model.ids("number 1")[None])
    >>> logits.shape
    (1, 9, 384)
    """

    task: Any
    """A Task (`jaxtok.protocols.Task`)."""
    params: Params
    data: Any
    """A Data (`jaxtok.protocols.Data`): what the model was trained on, or would be."""
    tokenizer: Tokenizer | None = None
    """None if the data are not text."""
    begin: tuple[int, ...] = ()
    """Ids that begin every text."""
    ends: tuple[int, ...] = ()
    """Ids each of which ends a text."""
    pad: int | None = None
    """The id that fills up rows, if there is one."""
    path: Path | None = None
    """Where the model was read from."""
    step: int = 0
    """How many updates it has had."""

    def __repr__(self) -> str:
        kind = f"{type(self.task).__name__} of {type(self.task.model).__name__}"
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        origin = f", from {self.path.name}" if self.path else ""
        return f"Model({kind}, {count:,} parameters, step {self.step}{origin})"

    @property
    def module(self) -> nn.Module:
        """The Linen module, which is used with `params`.

        Raises:
          ValueError: the task has several modules, or none.
        """
        if (module := self.task.module()) is None:
            raise ValueError(f"{self._subject} has no single module; use the methods of its task with model.params.")
        return module

    def ids(self, text: str | bytes) -> Int[Array, " length"]:
        """Returns the ids of a text, after those that begin every text.

        >>> jaxtok.open(run).ids("ab").tolist()
        [256, 97, 98]

        Raises:
          ValueError: the model is not of text.
        """
        return jnp.array(self._ids(text), jnp.int32)

    def _ids(self, prompt: str | bytes | Sequence[int]) -> list[int]:
        """The ids of a text, after those that begin every text; ids are taken as they are."""
        if not isinstance(prompt, str | bytes):
            return [*prompt]
        tokenizer = self._text_tokenizer()
        # An empty text of a model whose texts nothing begins follows the end of another.
        return [*self.begin, *tokenizer.encode(prompt)] or [self.ends[0] if self.ends else tokenizer.eod_id]

    def logits(
        self, inputs: str | bytes | Int[Array, " length"] | Int[Array, "batch length"]
    ) -> Float[Array, "*batch length vocab"]:
        """Returns the logits of the token after each position, from a causal language model.

        >>> jaxtok.open(run).logits("number 1").shape
        (9, 384)

        Args:
          inputs: a text, to which the ids that begin every text are added; or ids, which are taken as they are.

        Raises:
          ValueError: the model is not a causal language model.
        """
        if not self._is_causal:
            raise ValueError(f"{self._subject} has no logits of next tokens; give a causal language model.")
        ids = self.ids(inputs) if isinstance(inputs, str | bytes) else jnp.asarray(inputs, jnp.int32)
        logits = _logits(self.module, self.params, ids[None] if ids.ndim == 1 else ids)
        return logits[0] if ids.ndim == 1 else logits

    @overload
    def generate(self, prompt: str | bytes = "", max_new_tokens: int = 0, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str | bytes], max_new_tokens: int = 0, **options: Any) -> list[str]: ...
    def generate(self, prompt="", max_new_tokens=0, *, on_text=None, stream=False, logprobs=False, **options):
        """Continues a prompt, or several as a batch; returns the new text.

        >>> model = jaxtok.open(run)
        >>> len(model.generate("number ", max_new_tokens=5, stop_at_end=False)) <= 5
        True
        >>> len(model.generate(["number ", "twice "], max_new_tokens=5, temperature=0.0))
        2
        >>> text, numbers = model.generate("number ", max_new_tokens=5, stop_at_end=False, logprobs=True)
        >>> len(numbers), max(numbers) < 0
        (5, True)

        Args:
          prompt: a text, or several; an empty one begins a new document.
          max_new_tokens: the largest number of new tokens for each prompt (of bytes, for models that generate words);
            0: 200, or fewer if the model's context has less room.
          on_text: called with the number of a prompt and its new text, as it comes.
          stream: write a single prompt and its text to the standard output, as it comes.
          logprobs: also return the log probabilities of the new tokens, as `generate_bytes`: (text, numbers), or for
            several prompts (texts, rows of numbers).
          options: of `generate_bytes`. Bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: as `generate_bytes`.
        """
        single = isinstance(prompt, str | bytes)
        prompts = [prompt] if single else list(prompt)
        if stream and not single:
            raise ValueError("stream is for a single prompt; use on_text for several.")
        decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]

        def say(row: int, new: bytes, final: bool = False) -> None:
            if text := decoders[row].decode(new, final):
                if on_text:
                    on_text(row, text)
                if stream:
                    print(text, end="", flush=True, file=sys.stdout)

        if stream:
            print(prompt if isinstance(prompt, str) else prompt.decode(errors="replace"), end="", flush=True)
        texts, numbers = self.generate_bytes(
            prompts, max_new_tokens, on_bytes=say if on_text or stream else None, logprobs=True, **options
        )
        if on_text or stream:
            for row in range(len(prompts)):
                say(row, b"", final=True)
        if stream:
            print()
        decoded = [text.decode(errors="replace") for text in texts]
        found = (decoded[0], numbers[0]) if single else (decoded, numbers)
        return found if logprobs else found[0]

    def chat(
        self,
        messages: str | Sequence[Message],
        max_new_tokens: int = 0,
        *,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> str:
        """Returns the model's answer in a chat, by the template of its tokenizer.

        Args:
          messages: what was said so far, each with `role` (system, user or assistant) and `content`; a text is a single
            message of a user.
          max_new_tokens: as of `generate`.
          on_text: called with new text, as it comes.
          options: of `generate_bytes`.

        Raises:
          ValueError: there is no template, or it refuses the messages; or as `generate_bytes`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def say(row: int, new: bytes) -> None:
            if text := decoder.decode(new):
                on_text(text)

        ids = self.chat_ids(messages)
        (answer,) = self.generate_bytes([ids], max_new_tokens, on_bytes=say if on_text else None, **options)
        if on_text and (rest := decoder.decode(b"", final=True)):
            on_text(rest)
        return answer.decode(errors="replace")

    def chat_ids(self, messages: str | Sequence[Message]) -> list[int]:
        """Returns the ids of a chat, up to the beginning of the model's answer.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        tokenizer, place = self._text_tokenizer(), Path(self.data.tokenizer)
        if isinstance(self.task, TextGenerator) or not isinstance(tokenizer, ChatTokenizer):
            raise ValueError(f"{self._subject} has no chat template; give a language model whose tokenizer has one.")
        template = read_template(place if place.is_dir() else place.parent)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return tokenizer.encode_chat(template.text(messages))

    def generate_bytes(
        self,
        prompts: Sequence[str | bytes | Sequence[int]],
        max_new_tokens: int = 0,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_at_end: bool = True,
        on_bytes: Callable[[int, bytes], None] | None = None,
        logprobs: bool = False,
        constraint: str = "",
        drafter: Drafter | SelfDrafter | None = None,
        drafter_state: Any = None,
        evictor: Evictor | None = None,
        on_end: Callable[[Generation], None] | None = None,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Continues each prompt; returns the exact new bytes.

        Args:
          prompts: texts to continue, or their ids, which are taken as they are.
          max_new_tokens: as of `generate`.
          temperature: below 1 favours likely tokens, above 1 unlikely ones; 0: always take the likeliest.
          top_k: draw only from the k likeliest tokens; 0: from all.
          top_p: draw only from the likeliest tokens that together have this probability; 1: from all.
          seed: another seed gives another text.
          stop: also stop after any of these texts, each of a single token (with bytes: a single character).
          stop_at_end: stop when the model ends the document.
          on_bytes: called with the number of a prompt and its new bytes, every few tokens.
          logprobs: also return, for each prompt, the log probabilities of its new tokens in nats, by the model's own
            distribution (before temperature, top_k and top_p), with that of the token that ended the text if one did.
          constraint: what the new text must be, as `jaxtok.decoding.constraint` takes it: regex:EXPRESSION,
            json:SCHEMA or grammar:FILE.
          drafter, drafter_state, evictor: as of `jaxtok.decoding.generate`; not for models that generate words.
          on_end: called with the whole generation, in whose state are those of drafter and chooser.

        Raises:
          ValueError: the model generates no text, a text of `stop` is not a single token, or as
            `jaxtok.decoding.generate`.
        """
        tokenizer = self._text_tokenizer()
        sampling, rng = Sampling(temperature=temperature, top_k=top_k, top_p=top_p), jax.random.key(seed)

        def report(texts: Sequence[bytes]) -> None:
            for row, new in enumerate(texts):
                on_bytes(row, new)

        if isinstance(self.task, TextGenerator):
            if stop:
                raise ValueError(f"{self._subject} does not stop at texts; leave out stop.")
            if constraint or drafter or evictor:
                raise ValueError(f"{self._subject} generates words; leave out constraint, drafter and evictor.")
            given = [text.encode() if isinstance(text, str) else text for text in prompts]
            return self.task.continue_text(
                self.params,
                given,
                max_bytes=max_new_tokens or 200,
                sampling=sampling,
                rng=rng,
                on_text=report if on_bytes else None,
                logprobs=logprobs,
            )
        module, params, options = self.task.decoding(self.params)
        if not isinstance(module, CausalLM):
            raise ValueError(f"{self._subject} does not generate text; give a language model.")
        stops = [tokenizer.encode(text) for text in stop]
        if long := [text for text, tokens in zip(stop, stops) if len(tokens) != 1]:
            raise ValueError(f"stop has {long[0]!r}, which is not a single token; choose texts that are.")

        def bytes_of(tokens: Sequence[int]) -> bytes:
            return b"".join(tokenizer.token_bytes(token) for token in tokens)

        def report_tokens(new: Piece) -> None:
            report([bytes_of(tokens) for tokens in new.tokens])

        ids = [self._ids(prompt) for prompt in prompts]
        room = module.config.max_length - max(map(len, ids), default=0)
        chooser, ends = sampling, self.ends if stop_at_end else ()
        errors = contextlib.nullcontext()
        if constraint:
            vocabulary = _vocabulary(tokenizer, self.ends)
            errors = vocabulary.errors()
            chooser = Constrained(vocabulary=vocabulary, sampling=sampling, constraint=parse(constraint))
            ends = vocabulary.eos  # with which a complete text ends, whatever stop_at_end says
        given = {"drafter": drafter, "drafter_state": drafter_state, "evictor": evictor}
        options |= {name: value for name, value in given.items() if value is not None}
        with errors:
            made = generate(
                module,
                params,
                ids,
                max_new_tokens=max_new_tokens or max(1, min(200, room)),
                chooser=chooser,
                rng=rng,
                stop_tokens=[*(token for (token,) in stops), *ends],
                num_ids=min(tokenizer.vocab_size, self.task.model.vocab_size),
                on_tokens=report_tokens if on_bytes else None,
                chunk=4,
                **options,
            )
        if on_end:
            on_end(made)
        texts = [bytes_of(row) for row in made.tokens]
        return (texts, made.logprobs) if logprobs else texts

    def evaluate(self, corpus: str = "", split: Split = "validation", batches: int = 0) -> dict[str, float]:
        """Measures the model on a split: loss and bits per byte of text, or what its task measures.

        >>> numbers = jaxtok.open(run).evaluate(split="test", batches=1)
        >>> 0 < numbers["bits_per_byte"] < 12
        True

        Args:
          corpus: a corpus to use in place of the model's own, of the same kind: python, a file or folder, tfds:NAME
            or arrayrecord:PATTERN (for images: emoji, sprites, digits, folder:PATH, tfds:NAME or arrayrecord:PATTERN).
          split: the part of the corpus; files are split by a hash of their path.
          batches: the number of batches; 0: all.
        """
        data = self.on(corpus, batches)
        if self.tokenizer is not None:
            self.task.fit(data)  # which refuses ids that the model does not have
        return self.task.evaluate(self.params, data.eval_batches(split))

    def encode(
        self, images: UInt8[np.ndarray, "batch ..."] | Float[np.ndarray, "batch ..."], rng: jax.Array | None = None
    ) -> Int[np.ndarray, "batch positions sub_codes"]:
        """Encodes images on all devices of this process.

        Args:
          images: of the tokenizer's `image_shape`, as bytes, or as floats in [0, 1].
          rng: a key, which is used if the tokenizer draws its codes.

        Raises:
          ValueError: the model is not an image tokenizer.
        """
        task = self._image_tokenizer()
        key = rng if task.draws_codes else None
        return _on_devices(lambda params, x: task.encode(params, as_float(x), key), self.params, images)

    def decode(
        self, codes: Int[np.ndarray, "batch positions sub_codes"], rng: jax.Array | None = None
    ) -> Float[np.ndarray, "batch ..."]:
        """Decodes codes on all devices of this process, to images that are not limited to [0, 1].

        Args:
          codes: of whole images, or of a prefix that the tokenizer can decode.
          rng: a key, which is used if the tokenizer draws its images.

        Raises:
          ValueError: the model is not an image tokenizer.
        """
        task = self._image_tokenizer()
        key = rng if task.draws_images else None
        return _on_devices(lambda params, x: task.decode(params, x, key), self.params, codes)

    def on(self, corpus: str = "", batches: int = 0) -> Any:
        """Returns the model's data, of another corpus if one is named, with `batches` in an evaluation (0: all).

        Raises:
          ValueError: nothing says what data the model is of.
        """
        if self.data is None:
            raise ValueError(f"nothing says what data {self.path or 'this model'} is of; open it with its config.")
        source = {self.data.source: corpus} if corpus else {}
        return dataclasses.replace(self.data, eval_limit=batches, **source)

    @property
    def _subject(self) -> str:
        """How an error message begins."""
        model = f"{self.path} is" if self.path else "this is"
        return f"{model} a model of {type(self.task).__name__}, which"

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self._subject} does not read text; give a model of text.")
        return self.tokenizer

    def _image_tokenizer(self) -> Any:
        if not isinstance(self.task, ImageTokenizer):
            raise ValueError(f"{self._subject} is not an image tokenizer; give a run of one.")
        return self.task

    @property
    def _is_causal(self) -> bool:
        return isinstance(self.task.module(), CausalLM) and not isinstance(self.task, TextGenerator)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, ends: tuple[int, ...]) -> Vocabulary:
    """The vocabulary of constraints, one for all calls, as compiled programs belong to it."""
    return Vocabulary(tokenizer, ends or None)


@jax.jit(static_argnums=0)
def _logits(module: nn.Module, params: Params, ids: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
    return module.apply({"params": params}, ids)[0].astype(jnp.float32)


def _on_devices(function: Callable[[Params, jax.Array], jax.Array], params: Params, array: np.ndarray) -> np.ndarray:
    """Applies a function to the rows of an array, with rows added until the devices divide them."""
    layout = make_layout()
    count, added = len(array), -len(array) % layout.mesh.size
    padded = np.concatenate([array, np.repeat(array[-1:], added, axis=0)])
    with layout.active():
        axes = ("batch", *[None] * (padded.ndim - 1))
        rows = jax.device_put(padded, layout.sharding(axes, padded.shape, "the batch"))
        return np.asarray(function(jax.device_put(params, layout.replicated), rows))[:count]
