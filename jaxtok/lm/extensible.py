"""Extensible Tokenization (arXiv 2401.07793): a frozen language model whose past takes one input for every k tokens.

A small causal model, the *extensible tokenizer*, reads the past in sessions of `session` tokens and gives a vector for
each token; every k-th of them, which has seen k more tokens, is an *extensible embedding* (ET). ETs are inputs of the
language model in place of token embeddings, so that its window holds k times as much. k is chosen when they are read.
Only the tokenizer learns, from the language model's loss on the text that follows, so that its ETs also serve models
that were made from this one.

Training (section 3.3, two streams): the tokenizer reads a row once; then each chunk of `chunk` tokens is predicted from
the ETs of the chunks before it. Chunks share a call of the language model where its window has room; they do not see
each other's tokens. Generation: the newest tokens are raw until the window is full; then the oldest of them become ETs.

The authors released no code. Sizes: N chunks of C tokens in a row, S tokens in a session, W slots in the window,
m = C / k ETs of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.data.text import TextData
from jaxtok.decoding.engine import CachedTokens, Engine, Piece, new_tokens
from jaxtok.decoding.protocols import Chooser
from jaxtok.decoding.sampling import Sampling
from jaxtok.lm.decoder import Decoder, DecoderConfig
from jaxtok.lm.fitting import fit_text
from jaxtok.nn.cache import places_of
from jaxtok.nn.linear import Linear
from jaxtok.nn.losses import cross_entropy, text_loss, text_metrics, text_sums
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task
from jaxtok.weights import get_tensor, open_safetensors, write_weights

TOKENIZER = "tokenizer"
"""The part of the parameters that learns, by its name at the top."""


# --- Which outputs of the tokenizer are kept, and where ETs and tokens are in the language model's rows. ---


def kept_indices(
    length: int, k: int, how: Literal["strided", "terminal", "random"] = "strided", order: Sequence[int] = ()
) -> Int[np.ndarray, " kept"]:
    """Which ceil(length / k) outputs of a session are kept as ETs (section 3.1).

    Args:
      how: strided: the last of every k, and the last of the session for what is left over; terminal: the last ones;
        random: the first ones of `order`, a permutation of the outputs, in their own order.

    Raises:
      ValueError: k is not a whole number of at least 1.

    >>> kept_indices(10, 4).tolist(), kept_indices(10, 4, "terminal").tolist()
    ([3, 7, 9], [7, 8, 9])
    """
    _check_scale(k)
    count = -(-length // k)
    if how == "terminal":
        return np.arange(length - count, length)
    if how == "random":
        if sorted(order) != list(range(length)):
            raise ValueError(f"order has {len(order)} numbers; it must be a permutation of 0 to {length - 1}.")
        return np.sort(np.asarray(order, int)[:count])
    return np.minimum(k * np.arange(1, count + 1), length) - 1


def document_indices(
    length: int, session: int, k: int, how: Literal["strided", "terminal", "random"] = "strided", seed: int = 0
) -> Int[np.ndarray, " kept"]:
    """Which outputs of a document are kept, which is read in sessions; the last one may be shorter."""
    rng, parts = np.random.default_rng(seed), [np.arange(0)]
    for start in range(0, length, session):
        size = min(session, length - start)
        parts.append(start + kept_indices(size, k, how, rng.permutation(size) if how == "random" else ()))
    return np.concatenate(parts)


def smallest_scale(document: int, raw: int, window: int, scales: Iterable[int]) -> int:
    """The smallest k at which a document and `raw` tokens, those that are to be generated included, fit the window.

    Raises:
      ValueError: there is none.
    """
    scales = sorted(scales)
    for k in scales:
        _check_scale(k)
        if -(-document // k) + raw <= window:
            return k
    raise ValueError(
        f"a document of {document} tokens and {raw} raw ones do not fit a window of {window} slots, even with "
        f"k = {scales[-1]}; shorten one of them."
    )


class Layout(NamedTuple):
    """A row of the language model in training: ETs, and then chunks of tokens."""

    positions: Int[Array, " slots"]
    """In slots: ET e (from 0) is at e, and token j (from 0) of chunk i at (i - 1) m + j, as if it were alone."""
    mask: Bool[Array, "slots slots"]
    """Which slots each slot sees: an ET those up to itself; a token the ETs of earlier chunks, and its own chunk up to
    itself."""
    sources: Int[Array, "chunks chunk"]
    """The slots at which each token of the chunks is predicted: that before it, or the last ET before the chunk."""


def row_layout(chunks: Int[Array, " chunks"], chunk: int, per_chunk: int, ets: int) -> Layout:
    """The layout of a row with some ETs and some chunks.

    Args:
      chunks: the numbers of the chunks, from 1.
      chunk: C, the tokens of a chunk.
      per_chunk: m, the ETs of a chunk.
      ets: the ETs in the row; those after the last one that a chunk sees have no effect.
    """
    number = jnp.arange(ets + len(chunks) * chunk)
    raw, place = number >= ets, number - ets
    group, within = place // chunk, place % chunk
    before = jnp.where(raw, (chunks[group] - 1) * per_chunk, number + 1)  # how many of the ETs a slot sees
    positions = jnp.where(raw, before + within, number)
    own = raw & raw[:, None] & (group == group[:, None]) & (within <= within[:, None])
    mask = own | (~raw & (number < before[:, None]))
    sources = ets + jnp.arange(len(chunks))[:, None] * chunk + jnp.arange(chunk) - 1
    return Layout(positions, mask, sources.at[:, 0].set((chunks - 1) * per_chunk - 1))


@functools.cache
def _capacity(window: int, k: int, session: int) -> int:
    total = ets = raw = 0
    while True:
        total, raw = total + window - ets - raw, window - ets
        freed = min(raw, session) // k
        if freed * (k - 1) < 1:
            return total
        ets, raw = ets + freed, raw - freed * k


def _check_scale(k: int, name: str = "k") -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{name} is {k!r}; it must be a whole number of at least 1.")


def check_rows(length: int, k: int, chunk: int, session: int, window: int) -> None:
    """Checks that rows of `length` tokens can be trained on at k.

    Raises:
      ValueError: they cannot.
    """
    _check_scale(k)
    for name, part, whole, size in (("k", k, "chunk", chunk), ("chunk", chunk, "session", session)):
        if size % part:
            raise ValueError(f"{name} is {part}, which does not divide {whole} = {size}.")
    if length % chunk or length < 2 * chunk:
        raise ValueError(
            f"a row has {length} tokens; it must have at least two chunks, of {chunk} tokens each: the first one is "
            "only read, the others are predicted."
        )
    chunks, per_chunk = length // chunk, chunk // k
    if (slots := (chunks - 1) * per_chunk + chunk) > window:
        raise ValueError(
            f"chunk {chunks} of {chunk} tokens, after {per_chunk} ETs for each chunk before it, takes {slots} slots, "
            f"but the window has {window}; shorten rows or chunks, or raise k."
        )


def shared_calls(length: int, k: int, chunk: int, window: int) -> tuple[int, int, int]:
    """The ETs of a row of `length` tokens, the chunks that share a call of the language model, and the calls.

    All calls have as many chunks as fit the window after the ETs of the last one. (In the paper's figure 3, earlier
    calls, which see fewer ETs, have more.)
    """
    chunks = length // chunk
    ets = (chunks - 1) * (chunk // k)
    together = min((window - ets) // chunk, chunks - 1)
    return ets, together, -(-(chunks - 1) // together)


# --- The two models. ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensibleConfig:
    """A frozen language model with an extensible tokenizer. Defaults: the paper's, but for the language model."""

    lm: Any
    """The task of the frozen language model, such as a `LanguageModeling`; its module is any `CausalLM` that takes
    masks."""
    layers: int = 8
    """The blocks of the tokenizer, which begin as the first ones of the language model; 0: it is a table of embeddings
    alone."""
    body: DecoderConfig | None = None
    """A tokenizer of other sizes, which begins at random; `layers` and the language model's vocabulary replace its own.
    None: a copy of the language model's beginning, which must then be a decoder."""
    projection: bool = False
    """Whether a matrix maps the tokenizer's outputs to the language model's width where they differ (our addition)."""
    output_norm: bool = True
    """Whether the outputs have a final norm, which begins as the language model's."""
    session: int = 4096
    """S, the most tokens that the tokenizer reads together: nothing passes from one session to the next."""
    window: int = 0
    """W, the slots of the language model that are used; 0: all of its context."""
    scale: int = 16
    """k in evaluation and generation. The same parameters serve any other, too."""

    def __post_init__(self):
        if self.layers < 0 or self.session < 1 or self.window < 0:
            raise ValueError(
                f"layers is {self.layers}, session {self.session} and window {self.window}; session must be at least "
                "1, the others 0 or more."
            )
        _check_scale(self.scale, "scale")
        lm = self.lm.model
        if self.body is None and not isinstance(lm, DecoderConfig):
            raise ValueError(
                f"body is None, and the language model is a {type(lm).__name__}, no decoder whose first layers could "
                "be copied; set body to the sizes of a tokenizer of its own."
            )
        if self.body is None and self.layers > lm.num_layers:
            raise ValueError(f"layers is {self.layers}; the language model has {lm.num_layers} to copy.")
        if self.body and self.body.vocab_size not in (0, lm.vocab_size) and lm.vocab_size:
            raise ValueError(
                f"body.vocab_size is {self.body.vocab_size}, but the language model has {lm.vocab_size}; make them "
                "equal, or set it to 0."
            )
        if self.body and self.body.d_model != lm.d_model and not self.projection:
            raise ValueError(
                f"body.d_model is {self.body.d_model} and the language model's is {lm.d_model}; make them equal, or "
                "set projection to True."
            )
        if self.window > lm.max_length:
            raise ValueError(f"window is {self.window}; the language model's max_length is {lm.max_length}.")
        if self.session > (longest := (self.body or lm).max_length):
            raise ValueError(f"session is {self.session}; the tokenizer's max_length is {longest}.")
        if self.scale > min(self.session, self.slots):
            raise ValueError(
                f"scale is {self.scale}; it must be at most the session's {self.session} tokens and the window's "
                f"{self.slots} slots."
            )

    @property
    def tokenizer(self) -> DecoderConfig:
        """The tokenizer's own config; with `layers` = 0, its blocks are not used."""
        given, lm = self.body or self.lm.model, self.lm.model
        return dataclasses.replace(
            given,
            num_layers=max(self.layers, 1),
            vocab_size=lm.vocab_size,
            tie_embeddings=True,
            final_norm=given.final_norm if self.output_norm else "none",
        )

    @property
    def slots(self) -> int:
        return self.window or self.lm.model.max_length

    @property
    def vocab_size(self) -> int:
        return self.lm.model.vocab_size

    @property
    def num_layers(self) -> int:
        return self.lm.model.num_layers

    @property
    def max_length(self) -> int:
        """The longest text that can be generated: its ETs, at k = `scale`, and its last tokens fill the window."""
        return _capacity(self.slots, self.scale, self.session)


class ExtensibleTokenizer(Decoder):
    """Tokens to a vector each, in the space of a language model's input embeddings."""

    bare: bool = False
    """Whether there are no blocks."""
    width: int = 0
    """The language model's width; a matrix maps to it if it differs."""

    def setup(self):
        super().setup()
        if self.width != self.config.d_model:
            cfg = self.config
            self.projection = Linear(
                self.width, ("d_model", "channels"), False, dtype=cfg.dtype, param_dtype=cfg.param_dtype
            )

    def __call__(
        self, tokens: Int[Array, "batch length"], segments: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length width"]:
        """The outputs of sessions, one in each row, at positions 0, 1, ...; documents may be kept apart in them."""
        x = self.embed(tokens)
        x = self.final_norm(x) if self.bare else self.hidden(x, segments=segments)[0]
        return self.projection(x) if self.width != self.config.d_model else x


@flax.struct.dataclass
class StreamingCache:
    """The window of the language model: ETs, and after them the raw tokens since. A `jaxtok.protocols.Cache`."""

    window: Any
    """The language model's cache of W slots."""
    raw: Int[Array, "batch slots"]
    """The raw tokens, which the tokenizer will read."""
    num_raw: Int[Array, " batch"]
    num_ets: Int[Array, " batch"]
    length: Int[Array, " batch"]

    rewindable: ClassVar[bool] = False

    @property
    def next_position(self) -> Int[Array, " batch"]:
        return self.length

    def truncate(self, length):
        raise ValueError("tokens that became extensible embeddings cannot be taken back; nothing can be truncated.")

    def gather(self, index, count=None):
        raise ValueError("several tokens share a slot of extensible embeddings; nothing can be gathered.")


class Extensible(nn.Module):
    """A frozen language model with its extensible tokenizer. Parameters: {"frozen": the former's, "tokenizer": ...}.

    Called with tokens it is a `jaxtok.protocols.CausalLM` that reads texts beyond its window as they come (section
    3.4, "online"): as soon as ETs and raw tokens fill the W slots, the oldest of the raw ones (at most S, whole
    multiples of k) are read by the tokenizer as a session and become ETs. Whenever a token is predicted, at most W - 1
    slots are in use, but for the last token of `max_length`.
    """

    config: ExtensibleConfig

    def setup(self):
        cfg = self.config
        self.frozen = cfg.lm.module()
        self.tokenizer = ExtensibleTokenizer(cfg.tokenizer, bare=not cfg.layers, width=cfg.lm.model.d_model)

    def outputs(
        self, tokens: Int[Array, "batch length"], segments: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length d_model"]:
        """The tokenizer's outputs for rows that are cut into sessions; the last one may be shorter."""
        batch, length = tokens.shape
        session = min(self.config.session, length)
        if not length:
            return jnp.zeros((batch, 0, self.config.lm.model.d_model))

        def cut(x):
            return jnp.pad(x, ((0, 0), (0, -length % session))).reshape(-1, session)

        y = self.tokenizer(cut(tokens), None if segments is None else cut(segments))
        return y.reshape(batch, -1, y.shape[-1])[:, :length]

    def nats(
        self,
        tokens: Int[Array, "batch length"],
        targets: Int[Array, "batch length"],
        k: int,
        chunk: int,
        segments: Int[Array, "batch length"] | None = None,
        outputs: Float[Array, "batch length d_model"] | None = None,
    ) -> tuple[Float[Array, "batch predicted"], dict[str, Array]]:
        """-log p of the tokens of chunks 2 to N, each from the ETs of earlier chunks and its own chunk (Eq. 3).

        Args:
          tokens: N chunks of `chunk` tokens.
          targets: the token after each one. Those of tokens C - 1 to NC - 2 are predicted.
          segments: neither ETs nor tokens see those of another document.
          outputs: the tokenizer's, if they are known.

        Returns:
          The nats, and sums for the ratio of the ETs' size to that of embeddings of tokens.

        Raises:
          ValueError: the length, k and the chunk do not fit each other and the window.
        """
        cfg, (batch, length) = self.config, tokens.shape
        check_rows(length, k, chunk, cfg.session, cfg.slots)
        ets, together, calls = shared_calls(length, k, chunk, cfg.slots)
        chunks = length // chunk
        outputs = self.outputs(tokens, segments) if outputs is None else outputs
        vectors = outputs[:, k - 1 :: k][:, :ets]

        def cut(x):
            return x.reshape(batch, chunks, chunk)

        of_ets = None if segments is None else segments[:, k - 1 :: k][:, :ets]
        predicted = jnp.roll(targets, 1, axis=1)  # the token that each token is: the target of the one before it

        def call(module, carry, numbers):
            layout = row_layout(numbers, chunk, chunk // k, ets)

            def chosen(x):
                return cut(x)[:, numbers - 1].reshape(batch, -1)

            raw = module.frozen.embed(chosen(tokens))
            mask = layout.mask[None]
            if segments is not None:
                own = jnp.concatenate([of_ets, chosen(segments)], 1)
                mask = mask & (own[:, :, None] == own[:, None, :])
            x = jnp.concatenate([vectors.astype(raw.dtype), raw], 1)
            x, _ = module.frozen.hidden(x, positions=layout.positions[None], mask=mask)
            x = jnp.take(x, layout.sources.reshape(-1), axis=1)
            return carry, cross_entropy(module.frozen.head(x), chosen(predicted))

        scan = nn.scan(nn.remat(call, prevent_cse=False), variable_broadcast="params", split_rngs={"params": False})
        numbers = jnp.minimum(2 + jnp.arange(calls * together), chunks)  # the last call may repeat the last chunk
        _, nats = scan(self, None, numbers.reshape(calls, together))
        nats = jnp.moveaxis(nats.reshape(calls, batch, together * chunk), 0, 1).reshape(batch, -1)
        tokens_squared = jnp.mean(jnp.square(self.frozen.embed(tokens).astype(jnp.float32)))
        squares = {"et_square": jnp.mean(jnp.square(vectors.astype(jnp.float32))), "token_square": tokens_squared}
        return nats[:, : length - chunk], jax.lax.stop_gradient(squares)

    def read(
        self, parts: Sequence[Int[Array, "batch tokens"] | Float[Array, "batch ets d_model"]], cache: Any = None
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        """Logits after each raw token and ET of some parts, and the language model's own cache (None if none was
        given)."""
        x = [self.frozen.embed(part) if jnp.ndim(part) == 2 else part for part in map(jnp.asarray, parts)]
        x = jnp.concatenate([part.astype(self.config.lm.model.dtype) for part in x], 1)
        x, cache = self.frozen.hidden(x, cache=cache)
        return self.frozen.head(x), cache

    def embed(self, tokens):
        """The language model's input embeddings of raw tokens."""
        return self.frozen.embed(tokens)

    def hidden(self, x, *, cache=None, **options):
        """The language model's hidden states, of texts that fit its window.

        Raises:
          ValueError: there is a cache, which takes tokens.
        """
        if cache is not None:
            raise ValueError("a cache of extensible embeddings takes tokens, not embeddings; call the whole model.")
        return self.frozen.hidden(x, **options)

    def head(self, x):
        """The language model's logits."""
        return self.frozen.head(x)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> StreamingCache:
        slots, none = self.config.slots, jnp.zeros(batch, jnp.int32)
        lm = self.config.lm.module() if self.scope is None else self.frozen  # no modules are made inside of a call
        window = lm.init_cache(batch, min(slots, length))
        return StreamingCache(window, jnp.zeros((batch, slots), jnp.int32), none, none, none)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        cache: StreamingCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length vocab"], StreamingCache | None]:
        """Logits of the token after each one, in float32, and the cache with these tokens in it.

        Args:
          positions: -1 says that a token is padding; nothing else in them matters, as tokens come in their order.

        Raises:
          ValueError: there are segments or a mask, or more tokens than `max_length`.
        """
        if segments is not None or mask is not None:
            raise ValueError(
                "segments or a mask are given; a model whose past becomes extensible embeddings reads one text a row, "
                "token after token."
            )
        (batch, length), cfg = tokens.shape, self.config
        if length > cfg.max_length:
            raise ValueError(
                f"there are {length} tokens in a row; at k = {cfg.scale}, the window of {cfg.slots} slots is full "
                f"after {cfg.max_length}. Raise scale or window."
            )
        if self.is_initializing():
            self.tokenizer(tokens)
            return self.frozen(tokens)
        streaming = self.init_cache(batch, length) if cache is None else cache
        if positions is None:
            positions = places_of(tokens, streaming)
        real = jnp.broadcast_to(positions >= 0, tokens.shape)
        order = jnp.argsort(~real, axis=1, stable=True)  # the real ones first
        tokens = jnp.take_along_axis(tokens, order, axis=1)
        x, streaming = self._stream(tokens, real.sum(1, dtype=jnp.int32), streaming)
        x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        return self.frozen.head(x), None if cache is None else streaming

    def _stream(self, tokens, count, cache):
        """Hidden states after each of the first `count` tokens of the rows, and the cache."""
        slots = self.config.slots
        (batch, length), rows = tokens.shape, jnp.arange(tokens.shape[0])[:, None]
        new = min(length, slots)

        def body(module, carry):  # up to the next time that the window is full
            x, done, cache = carry
            used = cache.num_ets + cache.num_raw
            take = jnp.minimum(count - done, slots - used)
            number = jnp.arange(new)
            valid = number < take[:, None]
            block = jnp.take_along_axis(tokens, done[:, None] + number, axis=1, mode="clip")
            places = jnp.where(valid, used[:, None] + number, -1)
            y, window = module.frozen.hidden(module.frozen.embed(block), positions=places, cache=cache.window)
            at = jnp.where(valid, cache.num_raw[:, None] + number, slots)
            cache = cache.replace(
                window=window.truncate(used + take),
                raw=cache.raw.at[rows, at].set(block, mode="drop"),
                num_raw=cache.num_raw + take,
                length=cache.length + take,
            )
            last, cache = module._close(jnp.take_along_axis(y, jnp.maximum(take - 1, 0)[:, None, None], axis=1), cache)
            y = jnp.where((number == take[:, None] - 1)[..., None], last, y)
            x = x.at[rows, jnp.where(valid, done[:, None] + number, length)].set(y.astype(x.dtype), mode="drop")
            return x, done + take, cache

        def goes_on(done, cache):
            return (done < count) & (cache.num_ets + cache.num_raw < slots)

        x = jnp.zeros((batch, length, self.config.lm.model.d_model), self.config.lm.model.dtype)
        carry = (x, jnp.zeros_like(count), cache)
        if length == 1:
            x, _, cache = body(self, carry)
        else:
            # Tokens beyond `max_length`, which only drafts have, are lost.
            x, _, cache = nn.while_loop(lambda _, carry: goes_on(*carry[1:]).any(), body, self, carry)
        return x, cache

    def _close(self, last, cache):
        """The hidden state after the newest token, and the cache, after rows whose window is full got ETs."""
        cfg, slots, k = self.config, self.config.slots, self.config.scale
        if k == 1:
            return last, cache  # nothing would become free
        longest = min(slots, cfg.session)
        # the most ETs and raw tokens after a session, over all that may be in the window before it
        most = max(raw - min(raw, longest) // k * (k - 1) for raw in range(slots + 1) if min(raw, longest) >= k)
        fresh = jnp.where(cache.num_ets + cache.num_raw >= slots, jnp.minimum(cache.num_raw, longest) // k, 0)
        full = fresh * (k - 1) > 0

        def close(module, last, cache):
            rows, number = jnp.arange(len(cache.length))[:, None], jnp.arange(most)
            vectors = module.tokenizer(cache.raw[:, :longest])[:, k - 1 :: k]
            rest = cache.raw[rows, jnp.minimum(fresh[:, None] * k + jnp.arange(slots), slots - 1)]
            left = cache.num_raw - fresh * k
            raw = jnp.take_along_axis(rest, jnp.maximum(number - fresh[:, None], 0), axis=1, mode="clip")
            ets = jnp.take_along_axis(vectors, jnp.minimum(number, vectors.shape[1] - 1)[None, :, None], axis=1)
            raw = module.frozen.embed(raw)
            x = jnp.where((number < fresh[:, None])[..., None], ets.astype(raw.dtype), raw)
            valid = full[:, None] & (number < (fresh + left)[:, None])
            places = jnp.where(valid, cache.num_ets[:, None] + number, -1)
            window = cache.window
            window = window.truncate(jnp.where(full, cache.num_ets, window.length))
            before = window.length
            x, window = module.frozen.hidden(x, positions=places, cache=window)
            newest = jnp.take_along_axis(x, jnp.maximum(fresh + left - 1, 0)[:, None, None], axis=1, mode="clip")
            return jnp.where(full[:, None, None], newest, last), cache.replace(
                window=window.truncate(before + jnp.where(full, fresh + left, 0)),
                raw=jnp.where(full[:, None], rest, cache.raw),
                num_raw=jnp.where(full, left, cache.num_raw),
                num_ets=cache.num_ets + jnp.where(full, fresh, 0),
            )

        return nn.cond(full.any(), close, lambda _, last, cache: (last, cache), self, last, cache)


# --- What learns. ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensibleModeling(Task):
    """Trains an extensible tokenizer on rows of text, by the two streams of section 3.3.

    Parameters are those of `Extensible`. k is drawn anew in every step, for the whole batch. Neither model has dropout.
    """

    counted = "tokens"

    model: ExtensibleConfig
    chunk: int = 512
    """C, the tokens that are predicted together. It must be small beside the window: with much raw context, the
    tokenizer would learn nothing."""
    scales: tuple[int, ...] = (2, 4, 8, 16, 32)
    """What k is drawn from in training."""

    def __post_init__(self):
        if self.chunk < 1 or not self.scales:
            raise ValueError(f"chunk is {self.chunk} and scales are {self.scales}; give at least one of each.")
        for k in (*self.scales, self.model.scale):
            check_rows(2 * self.chunk, k, self.chunk, self.model.session, self.model.slots)

    def module(self) -> Extensible:
        return Extensible(self.model)

    def with_model(self, **fields: Any) -> ExtensibleModeling:
        """The task with some fields of its model replaced, or of the language model."""
        own = {field.name for field in dataclasses.fields(self.model)}
        changes = {name: value for name, value in fields.items() if name in own}
        if len(changes) < len(fields):
            lm = self.model.lm.with_model(**{name: value for name, value in fields.items() if name not in own})
            changes = {"lm": lm, **changes}
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **changes))

    def fit(self, data: Data, train: Any = None) -> ExtensibleModeling:
        """See `jaxtok.lm.fitting.fit_text`; rows may be longer than the window, if their ETs fit it."""
        task = fit_text(self, data)
        if isinstance(data, TextData):
            for k in (*self.scales, self.model.scale):
                check_rows(data.length, k, self.chunk, self.model.session, self.model.slots)
        return task

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        base, tokenizer = jax.random.split(rng)
        short = {name: array[:, : self.chunk] for name, array in batch.items()}  # rows may exceed the context
        return self.start(self.model.lm.init(base, short), tokenizer)

    def start(self, lm: Params, rng: jax.Array) -> Params:
        """The parameters with a language model's as the frozen ones, and a tokenizer that is a copy of its beginning
        (or begins at random, if it has sizes of its own).

        Raises:
          ValueError: the language model's parameters are not those of a decoder.
        """
        cfg = self.model
        module = ExtensibleTokenizer(cfg.tokenizer, bare=not cfg.layers, width=cfg.lm.model.d_model)
        with nn.logical_axis_rules(()):  # a row of one token cannot be divided
            new = functools.partial(module.init, rng, jnp.zeros((1, 1), jnp.int32))
            if cfg.body is not None:
                return {FROZEN: lm, TOKENIZER: new()["params"]}
            names = jax.eval_shape(new)["params"]
        if missing := sorted(names.keys() - lm.keys()):
            raise ValueError(
                f"the language model has no parameters {missing[0]!r} to copy; set body to the sizes of a tokenizer of "
                "its own."
            )
        copy = {name: lm[name] for name in names}
        if "stack" in copy:
            copy["stack"] = jax.tree.map(lambda x: x[: cfg.layers], copy["stack"])
        return {FROZEN: lm, TOKENIZER: copy}

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        params = {**params, FROZEN: jax.lax.stop_gradient(params[FROZEN])}
        drawn = jax.random.randint(rng, (), 0, len(self.scales))
        return jax.lax.switch(drawn, [functools.partial(self._sums, k) for k in self.scales], params, dict(batch))

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats a token; also logs bits per byte, and how large ETs are beside
        embeddings of tokens (the ratio of their root mean squares)."""
        loss, metrics = text_loss(sums)
        ratio = jnp.sqrt(sums["et_square"] / jnp.maximum(sums["token_square"], 1e-30))
        return loss, metrics | {"et_size": ratio}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        sums = self._sums(self.model.scale, params, batch)
        return {name: sums[name] for name in ("nats", "tokens", "bytes")}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats a token, of chunks 2 to N at k = `model.scale`), perplexity, bits_per_byte, tokens and
        bytes."""
        return text_metrics(sums)

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step, the mean over `scales`. Gradients of the language model are computed of its
        activations only: twice its forward pass, not three times."""
        cfg, (rows, length) = self.model, batch["tokens"].shape

        def of_lm(k):
            ets, together, calls = shared_calls(length, k, self.chunk, cfg.slots)
            shape = (rows * calls, ets + together * self.chunk)
            return 2 / 3 * cfg.lm.flops({"tokens": np.broadcast_to(np.int32(0), shape)})

        tokenizer = cfg.tokenizer.stack_flops(min(cfg.session, length)) if cfg.layers else 0.0
        return 3 * rows * length * tokenizer + sum(map(of_lm, self.scales)) / len(self.scales)

    def _sums(self, k, params, batch):
        nats, squares = self.module().apply(
            {"params": params},
            batch["tokens"],
            batch["targets"],
            k,
            self.chunk,
            segments=batch["segments"],
            method="nats",
        )
        counted = slice(self.chunk - 1, -1)
        return text_sums(nats, batch["mask"][:, counted], batch["bytes"][:, counted]) | squares


# --- Texts after documents. ---


def generate_after(
    config: ExtensibleConfig,
    params: Params,
    parts: Sequence[Int[Array, "batch tokens"] | Float[Array, "batch ets d_model"]],
    *,
    max_new_tokens: int,
    chooser: Chooser = Sampling(),
    rng: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    num_ids: int | None = None,
) -> Piece:
    """Continues raw tokens after ETs, such as a question after documents that were read before it.

    Args:
      parts: raw tokens and ETs in any order; the last one is raw.
      max_new_tokens: the most new tokens of each row; the rest is as in `jaxtok.decoding.generate`.

    Raises:
      ValueError: the last part is not raw tokens, or has unknown ids; or parts and new tokens exceed the language
        model's window.
    """
    if not len(parts) or jnp.ndim(parts[-1]) != 2 or not parts[-1].shape[1]:
        raise ValueError("the last part must be raw tokens, at least one in each row.")
    for part in map(np.asarray, parts):
        if part.ndim == 2 and part.size and not 0 <= part.min() <= part.max() < config.vocab_size:
            raise ValueError(
                f"a part has ids from {part.min()} to {part.max()}; they must be from 0 to {config.vocab_size - 1}."
            )
    last, slots = parts[-1], sum(part.shape[1] for part in parts)
    if slots + max_new_tokens > config.slots:
        raise ValueError(
            f"the parts take {slots} slots, and max_new_tokens is {max_new_tokens}; the window has {config.slots}. "
            "Choose a larger k (smallest_scale), or fewer of one."
        )
    model, lm = config.lm.module(), params[FROZEN]
    cache = model.init_cache(len(last), slots + max_new_tokens)
    if slots > 1:
        cache = _prefilled(config, params, [*parts[:-1], last[:, :-1]], cache)
    engine = Engine(model=CachedTokens(model), chooser=chooser, num_ids=num_ids)
    state = engine.begin(cache, last, new=max_new_tokens, rng=rng, stop=sorted(stop_tokens))
    return new_tokens(engine.run(engine.prepared(lm), state))


@functools.partial(jax.jit, static_argnames="config")
def _prefilled(config, params, parts, cache):
    return Extensible(config).apply({"params": params}, parts, cache, method="read")[1]


# --- Documents that are read once, and used at any k ("offline"). ---


def tokenizer_hash(params: Params) -> str:
    """A hash of the tokenizer's parameters, by which saved outputs know their model. The language model's are left
    out, as outputs do not depend on them."""
    digest = hashlib.sha256()
    flat = flax.traverse_util.flatten_dict(params[TOKENIZER], sep="/")
    for name in sorted(flat):
        array = np.asarray(flat[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="config")
def _outputs(config, params, tokens):
    return Extensible(config).apply({"params": params}, tokens, method="outputs")


def read_documents(
    config: ExtensibleConfig, params: Params, documents: Mapping[str, Sequence[int]], batch: int = 8
) -> dict[str, Float[np.ndarray, "tokens d_model"]]:
    """The tokenizer's outputs for each token of some documents, whose sessions are read `batch` at a time.

    Raises:
      ValueError: a document has an id that the vocabulary lacks.
    """
    config = dataclasses.replace(config, scale=1)  # which has no part in it, so that all scales share a program
    sessions: list[np.ndarray] = []
    for name, ids in documents.items():
        ids = np.asarray(ids, np.int32).reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < config.vocab_size:
            raise ValueError(
                f"{name} has ids from {ids.min()} to {ids.max()}; they must be from 0 to {config.vocab_size - 1}."
            )
        sessions += [ids[start : start + config.session] for start in range(0, len(ids), config.session)]
    rows = np.zeros((-(-len(sessions) // batch) * batch, max(map(len, sessions), default=1)), np.int32)
    for row, ids in zip(rows, sessions):
        row[: len(ids)] = ids
    found = [np.asarray(_outputs(config, params, rows[at : at + batch])) for at in range(0, len(rows), batch)]
    parts = iter(y[: len(ids)] for y, ids in zip((y for part in found for y in part), sessions))
    empty = np.zeros((0, config.lm.model.d_model), np.float32)
    counts = {name: -(-len(ids) // config.session) for name, ids in documents.items()}
    return {name: np.concatenate([empty, *(next(parts) for _ in range(n))]) for name, n in counts.items()}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Saved outputs of documents, of which `ets` takes those of any k.

    >>> saved = save_documents(folder / "documents.safetensors", config, params, {"a": range(10), "b": [3, 1, 4]})
    >>> saved.ets("a", k=4).shape, saved.ets("b", k=2).shape
    ((3, 16), (2, 16))
    """

    path: Path
    session: int
    lengths: dict[str, int]
    """The tokens of each document."""

    def ets(
        self, name: str, k: int, how: Literal["strided", "terminal", "random"] = "strided", seed: int = 0
    ) -> Float[np.ndarray, "ets d_model"]:
        """The extensible embeddings of a document.

        Args:
          how: which outputs of each session are kept; see `kept_indices`.
          seed: of the random ones.

        Raises:
          ValueError: there is no such document, or k is not a whole number of at least 1.
        """
        if name not in self.lengths:
            raise ValueError(f"{self.path} has no document {name!r}; it has {', '.join(self.lengths) or 'none'}.")
        index = document_indices(self.lengths[name], self.session, k, how, seed)
        return get_tensor(open_safetensors(self.path), name, self.path)[index]


def save_documents(
    path: str | Path,
    config: ExtensibleConfig,
    params: Params,
    documents: Mapping[str, Sequence[int]],
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Documents:
    """Reads documents, and saves the tokenizer's output for each of their tokens in a safetensors file.

    Raises:
      FileExistsError: the file exists already.
      ValueError: a document has an id that the vocabulary lacks.
    """
    outputs = read_documents(config, params, documents)
    facts = {"tokenizer": tokenizer_hash(params), "session": str(config.session)}
    tensors = {name: y.astype(jnp.dtype(dtype)) for name, y in outputs.items()}
    return open_documents(write_weights(path, tensors, facts), params)


def open_documents(path: str | Path, params: Params) -> Documents:
    """Opens what `save_documents` wrote.

    Args:
      params: those of the model that is to read the ETs, of which only the tokenizer's matter.

    Raises:
      ValueError: the file is not one of documents, or was made by another tokenizer.
    """
    path = Path(path)
    file = open_safetensors(path)
    facts = file.metadata() or {}
    if not {"tokenizer", "session"} <= facts.keys():
        raise ValueError(f"{path} holds no documents' outputs; give a file that save_documents wrote.")
    if facts["tokenizer"] != tokenizer_hash(params):
        raise ValueError(f"{path} was made by another tokenizer than this model's; save the documents again.")
    lengths = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
    return Documents(path, int(facts["session"]), lengths)
