"""Learn Your Tokens: word-pooled tokenization (Thawani et al., Findings of EMNLP 2023, arXiv 2310.11628).

The units of a word (bytes, characters or subwords: eByte, eChar, eSub) are pooled by a small transformer into a few
vectors, a decoder runs over these, and a small causal transformer spells the next word from the decoder's output. All
words of a batch are pooled at once and spelled at once.

What the paper leaves open follows the authors' code (avi-jit/eTok). It has three peculiarities, each of which is a
switch of the config: `prefix_ids`, `mask_pads` and `loss_on_pads`. A fourth, that its forward pass lengthens the
caller's words in place, is not copied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather, rows_only
from jaxtok.data.word_units import BYTE_OFFSET, RULES, WordRule, WordUnitText, load_units
from jaxtok.data.words import WordText
from jaxtok.decoding.engine import Engine, State
from jaxtok.decoding.protocols import Chooser
from jaxtok.decoding.sampling import Sampling, sampling_key
from jaxtok.decoding.text import Continued, OnText, continue_texts, texts_and_logprobs
from jaxtok.lm import decoder
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.fitting import fit_text
from jaxtok.nn.cache import KVCache
from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.losses import bits_per_byte, cross_entropy, mean
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import Batch, Data, Params, Sums, Task

END = 0
"""The unit that ends a word and fills the rest of its canvas. No real unit has this number."""
HIDDEN = -1e30
"""The bias of a hidden key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPooledConfig:
    """Sizes and switches, with their names in the authors' config.json in brackets. Defaults: theirs for bytes."""

    vocab_size: int = 384
    """The number of units, end mark included; 384: ByT5's ids; 0: the data's units, rounded up to 128. [vocab_size]"""
    max_units: int = 16
    """The units of the longest word, which is the width of the canvas. [canvas_size]"""
    max_words: int = 192
    """The longest context, in words. [block_size]"""
    prefixes: int = 4
    """The number of vectors of a word. [num_prefix]"""
    d_model: int = 512
    num_layers: int = 8
    """The number of layers of the decoder over words. [n_layer]"""
    num_heads: int = 8
    """The number of heads of the decoder over words and of the speller. [n_head]"""
    unit_layers: int = 2
    """The number of layers of the word encoder, and of the speller. [n_e2e_layer]"""
    encoder_heads: int = 4
    """The number of heads of the word encoder. [n_e2e_head]"""
    encoder_mlp_dim: int = 2048
    """Hidden units of the word encoder's MLPs; PyTorch's default, whatever d_model is."""
    dropout: float = 0.1
    """Dropout of embeddings, attention weights, and what each half of a block adds to the residual stream."""
    encoder_dropout: float = 0.1
    """Dropout in the word encoder; PyTorch's default."""
    prefix_ids: Literal["own", "official"] = "own"
    """The embeddings of the prefixes. own: they have their own; official: prefix i has row `canvas + i` of a table of
    the units and then the prefixes, where `canvas` is the width of the batch."""
    mask_pads: bool = False
    """Whether the padding after a word's end mark is hidden from the whole word, as is best for new models. If not
    (official), it is hidden only from padding, so that a word's vectors depend on the width of the canvas."""
    loss_on_pads: bool = True
    """Whether the loss is a mean over the whole canvas of each word (official) or over its units and one end mark."""
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "projections", "dots"] = "none"

    def __post_init__(self):
        least = dict.fromkeys(
            ("max_units", "prefixes", "d_model", "unit_layers", "encoder_heads", "encoder_mlp_dim"), 1
        )
        least |= dict(max_words=2, vocab_size=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if self.vocab_size == 1:
            raise ValueError(
                "vocab_size is 1, which is the end mark alone; it must be at least 2, or 0 for the data's units."
            )
        if self.d_model % self.encoder_heads:
            raise ValueError(
                f"encoder_heads is {self.encoder_heads}, which does not divide d_model = {self.d_model}; "
                "choose a divisor."
            )
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout is {self.encoder_dropout}; it must be in [0, 1).")
        if self.prefix_ids not in ("own", "official"):
            raise ValueError(f"prefix_ids is {self.prefix_ids!r}; it must be one of own, official.")
        if self.prefix_ids == "official" and self.vocab_size and self.max_units > self.vocab_size:
            raise ValueError(
                f"max_units is {self.max_units}, above vocab_size = {self.vocab_size}, where prefix_ids = official "
                "finds no rows for the prefixes; lower max_units, or set prefix_ids to own."
            )
        _ = self.body, self.encoder  # checks the rest

    @property
    def max_length(self) -> int:
        """The longest row of data, in words."""
        return self.max_words

    def _stack(self, cls: type[LinearStack], **options: Any) -> LinearStack:
        shared = ("d_model", "init_std", "dtype", "param_dtype", "remat")
        return cls(rotary_fraction=0.0, **{name: getattr(self, name) for name in shared} | options)

    @property
    def encoder(self) -> LinearStack:
        """The word encoder: PyTorch's `TransformerEncoderLayer`, with norms after the sums and ReLU."""
        return self._stack(
            EncoderStack,
            num_layers=self.unit_layers,
            num_heads=self.encoder_heads,
            mlp_dim=self.encoder_mlp_dim,
            activation="relu",
            post_norm=True,
            causal=False,
            dropout=self.encoder_dropout,
            attention_dropout=self.encoder_dropout,
            mlp_dropout=self.encoder_dropout,
        )

    @property
    def body(self) -> LinearStack:
        """The decoder over words: GPT blocks over the words' vectors."""
        sizes = dict(num_layers=self.num_layers, num_heads=self.num_heads, mlp_dim=4 * self.d_model)
        return self._stack(BlockStack, dropout=self.dropout, attention_dropout=self.dropout, **sizes)

    @property
    def speller(self) -> LinearStack:
        """The speller: the same blocks over the units of a word."""
        return dataclasses.replace(self.body, num_layers=self.unit_layers)

    def flops(self) -> float:
        """Forward FLOPs of one word in a full row, with all places of its canvas."""
        canvas, context = self.prefixes + self.max_units, self.max_words * self.prefixes
        small = canvas * (self.encoder.stack_flops(canvas) + self.speller.stack_flops(canvas))
        head = 2 * self.max_units * self.vocab_size * self.d_model
        return small + self.prefixes * self.body.stack_flops(context) + head


class BlockStack(LinearStack):
    """minGPT's blocks, whose matrices are all initialised with the same standard deviation."""

    @property
    def output_init_std(self) -> float:
        return self.init_std


class EncoderStack(BlockStack):
    """PyTorch's blocks, which initialise queries, keys and values as one packed matrix: Xavier's, uniform."""

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        if group not in ("query", "key", "value"):
            return super().projection(group, features, name)
        packed = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")  # the square of the bound is 6 / (d + 3 d)
        return Linear(features, kernel_init=packed, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class WordPooled(nn.Module):
    """Words, each a row of units, to logits of the units of the words after them.

    In shapes, `units` is the width of the batch, at most `max_units`.
    """

    config: WordPooledConfig

    def setup(self):
        cfg = self.config
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0; it must be the number of units.")

        def table(name, rows, axis, std):
            init = nn.with_logical_partitioning(nn.initializers.normal(std), (axis, "d_model"))
            value = self.param(name, init, (rows, cfg.d_model), cfg.param_dtype)
            return gather(value.astype(cfg.dtype), axis, "d_model")

        self.embedding = table("embedding", cfg.vocab_size, "vocab", cfg.init_std)
        self.prefix_embedding = table("prefix_embedding", cfg.prefixes, None, cfg.init_std)
        self.unit_positions = table("unit_positions", cfg.prefixes + cfg.max_units, None, 0.0)
        self.word_positions = table("word_positions", cfg.max_words * cfg.prefixes, None, 0.0)
        self.encoder = Stack(cfg.encoder)
        self.stack = Stack(cfg.body)
        self.final_norm = Norm(dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        self.speller = Stack(cfg.speller)
        self.head_matrix = table("head_matrix", cfg.vocab_size, "vocab", cfg.init_std)
        self.input_dropout = nn.Dropout(cfg.dropout)

    def __call__(
        self,
        words: Int[Array, "batch words units"],
        lengths: Int[Array, "batch words"],
        targets: Int[Array, "batch words units"],
        *,
        positions: Int[Array, "batch words"] | None = None,
        segments: Int[Array, "batch words"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch words units vocab"]:
        """Logits of every unit of the word after each one, from the words and the units before it; float32.

        Args:
          words: the units of each word, filled up with `END`. A word without units is the start of a document.
          lengths: the number of each word's units. A word that fills the canvas has no end mark.
          targets: the words that follow, in the same form.
          positions: those of the words in their document; default: 0, 1, ...
          segments: words attend within their own document only.

        Raises:
          ValueError: words are longer than max_units, or more than max_words.
        """
        pooled = self.pool(words, lengths, deterministic)
        z, _ = self.body(pooled, positions=positions, segments=segments, deterministic=deterministic)
        return self.spell(z, targets, deterministic)

    def pool(
        self, words: Int[Array, "batch words units"], lengths: Int[Array, "batch words"], deterministic: bool = True
    ) -> Float[Array, "batch words prefixes d_model"]:
        """The vectors of each word, from its own units alone."""
        self._check(words)
        cfg, (batch, count, width) = self.config, words.shape
        prefixes = self.prefix_embedding
        if cfg.prefix_ids == "official":
            prefixes = jnp.concatenate([self.embedding, prefixes])[width : width + cfg.prefixes]
        with rows_only():
            rows, canvas = batch * count, cfg.prefixes + width
            x = self._embed(words.reshape(rows, width))
            x = jnp.concatenate([jnp.broadcast_to(prefixes, (rows, *prefixes.shape)), x], 1)
            x = constrain(self.input_dropout(x + self.unit_positions[:canvas], deterministic), "d_model")
            pad = jnp.arange(canvas) > lengths.reshape(rows, 1) + cfg.prefixes  # the first padding unit is the end mark
            hidden = pad[:, None, :] if cfg.mask_pads else pad[:, None, :] & pad[:, :, None]
            bias = jnp.where(hidden, HIDDEN, 0.0)[:, None]
            x, _ = self.encoder(x, _places(x), deterministic=deterministic, bias=(bias,))
        return x[:, : cfg.prefixes].reshape(batch, count, cfg.prefixes, -1)

    def body(
        self,
        pooled: Float[Array, "batch words prefixes d_model"],
        *,
        positions: Int[Array, "batch words"] | None = None,
        segments: Int[Array, "batch words"] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch words prefixes d_model"], KVCache | None]:
        """The outputs of the decoder over words for their vectors, and the cache with these words appended.

        A vector sees all vectors of earlier words, and the earlier ones of its own word.
        """
        cfg, (batch, words, p, _) = self.config, pooled.shape
        if words > cfg.max_words:
            raise ValueError(f"there are {words} words in a row, but the model's max_words is {cfg.max_words}.")
        if positions is None:
            start = jnp.zeros((batch, 1), jnp.int32) if cache is None else cache.length[:, None] // p
            positions = start + jnp.arange(words)
        places = (positions[..., None] * p + jnp.arange(p)).reshape(batch, words * p)
        x = pooled.reshape(batch, words * p, -1) + jnp.take(self.word_positions, places, axis=0)
        x = constrain(self.input_dropout(x, deterministic), "d_model")
        segments = None if segments is None else jnp.repeat(segments, p, axis=1)
        x, cache = self.stack(x, places, segments, cache, deterministic)
        return self.final_norm(x).reshape(pooled.shape), cache

    def spell(
        self,
        z: Float[Array, "batch words prefixes d_model"],
        targets: Int[Array, "batch words units"],
        deterministic: bool = True,
    ) -> Float[Array, "batch words units vocab"]:
        """Logits of the units of each target, from the decoder's output z for the word before it.

        z takes the prefixes' places in the target's canvas. The positions of units are added twice, as by the authors.
        """
        self._check(targets)
        batch, words, p, d = z.shape
        with rows_only():
            units = targets.reshape(batch * words, -1)[:, :-1]
            x = self._embed(units) + self.unit_positions[p : p + units.shape[1]]
            x = jnp.concatenate([z.reshape(batch * words, p, d), self.input_dropout(x, deterministic)], 1)
            x = constrain(self.input_dropout(x + self.unit_positions[: x.shape[1]], deterministic), "d_model")
            x, _ = self.speller(x, _places(x), deterministic=deterministic)
            logits = constrain(self._head(x[:, p - 1 :]), "vocab")
        return logits.reshape(batch, words, *logits.shape[1:])

    def spell_first(
        self, z: Float[Array, "rows prefixes d_model"], cache: KVCache
    ) -> tuple[Float[Array, "rows vocab"], KVCache]:
        """Logits of the first unit of the words after z; and the cache, for `spell_next`."""
        x, cache = self.speller(z + self.unit_positions[: self.config.prefixes], _places(z), None, cache)
        return self._head(x[:, -1]), cache

    def spell_next(self, unit: Int[Array, " rows"], cache: KVCache) -> tuple[Float[Array, "rows vocab"], KVCache]:
        """Logits of the unit after the chosen one; and the cache with it appended."""
        x = jnp.take(self.embedding, unit, axis=0) + 2 * jnp.take(self.unit_positions, cache.length, axis=0)
        x, cache = self.speller(x[:, None], cache.length[:, None], None, cache)
        return self._head(x[:, 0]), cache

    def _embed(self, units):
        return jnp.take(self.embedding, units, axis=0)

    def _check(self, words):
        if (width := words.shape[2]) > self.config.max_units:
            raise ValueError(f"a word has {width} units, but the model's max_units is {self.config.max_units}.")

    def _head(self, x):
        return jnp.einsum("...d,vd->...v", x, self.head_matrix, preferred_element_type=jnp.float32)


def _places(x: Float[Array, "rows places d_model"]) -> Int[Array, "rows places"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(BlockStack, DecoderConfig):
    """The authors' baseline: the decoder over plain units. As in the released code, it has no positions at all."""

    vocab_size: int = 384
    max_length: int = 192
    num_layers: int = 8
    d_model: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    rotary_fraction: float = 0.0
    tie_embeddings: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1


def init_params(config: WordPooledConfig | PlainConfig, rng: jax.Array) -> Any:
    """The parameters as plain arrays."""
    if isinstance(config, PlainConfig):
        return decoder.init_params(decoder.Decoder(config), rng, jnp.zeros((1, 1), jnp.int32))
    word = jnp.zeros((1, 1, 1), jnp.int32)
    return decoder.init_params(WordPooled(config), rng, word, word[..., 0], word)


def unit_weights(
    lengths: Int[Array, "*words"], width: int, mask: Float[Array, "*words"], on_pads: bool
) -> Float[Array, "*words units"]:
    """Which units of the targets in `mask` count: all (`on_pads`), or each word's own and one end mark."""
    counts = jnp.full((width,), True) if on_pads else jnp.arange(width) <= lengths[..., None]
    return counts * mask[..., None]


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stop"))
def spell_words(
    model: WordPooled,
    params: Params,
    z: Float[Array, "rows prefixes d_model"],
    rng: jax.Array | None = None,
    allowed: Bool[Array, "#units vocab"] | None = None,
    *,
    sampling: Sampling = Sampling(temperature=0),
    stop: bool = True,
) -> Int[Array, "rows max_units"]:
    """Spells the words after z, unit by unit, each from the chosen ones before; all rows at once.

    Args:
      model, params: the model and its parameters.
      z: the decoder's vectors of the words before, from any number of rows and words.
      rng: a key; not needed for greedy spelling.
      allowed: the units that can be chosen at each place; a single row holds for all places.
      sampling: how a unit is chosen.
      stop: whether a word ends with its first end mark, after which `END` fills its canvas. Otherwise it goes on to the
        end of the canvas, as in the authors' validation.
    """
    cfg, rows = model.config, len(z)
    allowed = jnp.ones((1, cfg.vocab_size), bool) if allowed is None else allowed
    allowed = jnp.broadcast_to(allowed, (cfg.max_units, cfg.vocab_size))
    engine = Engine(model=WordSpelling(model), chooser=sampling)
    nothing, ends = jnp.full((rows, 1), END), [END] if stop else []
    state = engine.begin(WordSpelling.start(model, z, allowed), nothing, new=cfg.max_units, rng=rng, stop=ends)
    return engine.run(params, state).text[:, 1:]


@dataclasses.dataclass(frozen=True)
class WordSpelling:
    """The speller as a `jaxtok.decoding.TokenModel` of the units of one word, which all rows spell in step."""

    model: WordPooled

    @staticmethod
    def start(model: WordPooled, z: Float[Array, "rows prefixes d_model"], allowed: Bool[Array, "units vocab"]):
        slots = model.config.prefixes + model.config.max_units
        return model.config.speller.init_cache(len(z), slots), z, allowed

    def step(self, params: Params, units, state, live):
        (cache, z, allowed), spell = state, functools.partial(self.model.apply, {"params": params})
        logits, cache = jax.lax.cond(
            cache.length[0] == 0,
            lambda: spell(z, cache, method="spell_first"),
            lambda: spell(units, cache, method="spell_next"),
        )
        place = cache.length[0] - self.model.config.prefixes
        return jnp.where(allowed[place], logits, -jnp.inf), (cache, z, allowed), live


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stop"))
def guess_words(
    model: WordPooled,
    params: Params,
    words: Int[Array, "batch words units"],
    lengths: Int[Array, "batch words"],
    rng: jax.Array | None = None,
    *,
    positions: Int[Array, "batch words"] | None = None,
    segments: Int[Array, "batch words"] | None = None,
    sampling: Sampling = Sampling(temperature=0),
    stop: bool = True,
) -> Int[Array, "batch words max_units"]:
    """The word that the model spells after each word of each row, given the true words before it; all in parallel."""
    apply = functools.partial(model.apply, {"params": params})
    pooled = apply(words, lengths, method="pool")
    z, _ = apply(pooled, positions=positions, segments=segments, method="body")
    z = z.reshape(-1, *z.shape[2:])
    spelled = spell_words(model, params, z, rng, sampling=sampling, stop=stop)
    return spelled.reshape(*lengths.shape, -1)


def word_accuracies(
    spelled: Int[Array, "*words width"], truth: Int[Array, "*words units"]
) -> tuple[Bool[Array, "*words width"], Bool[Array, "*words"]]:
    """Whether each unit of a word is right (false at places without units); and whether the whole canvas is.

    The authors' two accuracies are the right units over all units, and the mean of the second, for which "banker" is
    wrong in place of "bank".
    """
    more = spelled.shape[-1] - truth.shape[-1]
    truth = jnp.pad(truth, [(0, 0)] * (truth.ndim - 1) + [(0, more)], constant_values=END)
    same = spelled == truth
    return same & (truth != END), same.all(-1)


def split_words(config: WordPooledConfig, units: Sequence[int]) -> list[tuple[int, ...]]:
    """The words of a row of `WordGeneration`'s units; the last word may be open."""
    words: list[list[int]] = [[]]
    for unit in units:
        if unit == END:
            words.append([])
        elif unit < config.vocab_size:
            words[-1].append(unit)
    return [tuple(word) for word in words if word]


def begin_words(
    model: WordPooled, params, words, lengths, counts, rng, allowed, *, new: int, sampling: Chooser
) -> tuple[Engine, State]:
    """The engine that adds `new` words to the first `counts` words of each row, and its first state.

    A text ends when a word begins with the end mark, which `allowed` may forbid.
    """
    cfg, steps = model.config, WordGeneration(model)
    engine = Engine(model=steps, chooser=sampling)
    allowed = np.ones((1, cfg.vocab_size), bool) if allowed is None else allowed
    allowed = jnp.broadcast_to(allowed, (cfg.max_units, cfg.vocab_size))
    first = steps.start(params, words, lengths, counts, allowed, new=new)
    ended = np.full((len(lengths), 1), END)  # ended the last word of each row
    return engine, engine.begin(first, ended, new=new * (cfg.max_units + 1) + 1, rng=rng, stop=[cfg.vocab_size])


@flax.struct.dataclass
class _Words:
    """The state between two units: no module has read the newest one."""

    body: KVCache
    """The cache of all words that have ended and been read."""
    speller: KVCache
    word: Int[Array, "batch max_units"]
    """The open word."""
    length: Int[Array, " batch"]
    """The number of its units."""
    waits: Bool[Array, " batch"]
    """Rows whose word has ended. They wait until all rows' words have, as the body costs the same for one row as
    for all."""
    left: Int[Array, " batch"]
    """The number of words that may still begin."""
    allowed: Bool[Array, "max_units vocab"]


@dataclasses.dataclass(frozen=True)
class WordGeneration:
    """The model as a `jaxtok.decoding.TokenModel` of the units of texts.

    `END` ends a word. The id `vocab_size` ends the text; it takes the place of an `END` at the beginning of a word.
    """

    model: WordPooled

    @functools.partial(jax.jit, static_argnames=("self", "new"))
    def start(self, params, words, lengths, counts, allowed, *, new: int) -> _Words:
        """The state after the words of each row, of which the first step reads the last."""
        cfg, (batch, width), rows = self.model.config, lengths.shape, jnp.arange(len(lengths))
        apply = functools.partial(self.model.apply, {"params": params})
        cache = cfg.body.init_cache(batch, (width + new) * cfg.prefixes)
        _, cache = apply(apply(words, lengths, method="pool"), cache=cache, method="body")
        return _Words(
            body=cache.truncate((counts - 1) * cfg.prefixes),
            speller=cfg.speller.init_cache(batch, cfg.prefixes + cfg.max_units),
            word=words[rows, counts - 1],
            length=lengths[rows, counts - 1],
            waits=jnp.zeros(batch, bool),
            left=jnp.full(batch, new),
            allowed=allowed,
        )

    def step(self, params: Params, units, state: _Words, live):
        cfg, rows = self.model.config, jnp.arange(len(units))
        apply = functools.partial(self.model.apply, {"params": params})
        letter = live & ~state.waits & (units != END)
        waits = live & ~letter
        word = state.word.at[rows, jnp.where(letter, state.length, cfg.max_units)].set(units, mode="drop")
        state = state.replace(word=word, length=state.length + letter, waits=waits)

        def spell():
            logits, cache = apply(units, state.speller, method="spell_next")
            cache = cache.truncate(jnp.where(letter, cache.length, state.speller.length))
            return logits, state.replace(speller=cache)

        def close():
            z, body = apply(
                apply(state.word[:, None], state.length[:, None], method="pool"), cache=state.body, method="body"
            )
            none = 0 * state.length
            logits, cache = apply(z[:, 0], state.speller.truncate(none), method="spell_first")
            return logits, state.replace(
                body=body.truncate(jnp.where(live, body.length, state.body.length)),
                speller=cache,
                word=state.word * 0,
                length=none,
                waits=waits & False,
                left=state.left - 1,
            )

        logits, state = jax.lax.cond((waits | ~live).all(), close, spell)
        place, unit = state.length[:, None], jnp.arange(cfg.vocab_size)
        may = state.allowed[jnp.minimum(place[:, 0], cfg.max_units - 1)] & (place < cfg.max_units)
        may |= (place == cfg.max_units) & (unit == END)
        logits = jnp.where(may, logits, -jnp.inf)
        first, over = place[:, 0] == 0, state.left[:, None] < 0
        stop = jnp.where(first, logits[:, END], -jnp.inf)[:, None]
        logits = logits.at[:, END].set(jnp.where(first, -jnp.inf, logits[:, END]))
        logits = jnp.concatenate([jnp.where(over, -jnp.inf, logits), jnp.where(over, 0.0, stop)], -1)
        return logits, state, ~state.waits


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPooling(Task):
    """Trains a word-pooled model on rows of words (`jaxtok.data.word_units.WordUnitText`)."""

    counted = "units"

    model: WordPooledConfig
    tokenizer: str = "bytes"
    """The tokenizer whose ids are the units; `fit` takes the data's."""
    rule: WordRule = "paper"
    """The rule for what words are; `fit` takes the data's."""

    def module(self) -> WordPooled:
        return WordPooled(self.model)

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; it must be one of {', '.join(RULES)}.")

    def fit(self, data: Data, train: Any = None) -> WordPooling:
        """The task, with the data's tokenizer and rule, and a vocab_size of 0 replaced by the number of the data's
        units, rounded up to 128.

        Raises:
          ValueError: the model has too few units, another canvas than the data, or a context shorter than their rows.
        """
        if isinstance(data, WordText) and data.max_units != self.model.max_units:  # texts are continued on the model's
            raise ValueError(
                f"data.max_units is {data.max_units}, but task.model.max_units is {self.model.max_units}; make them "
                "equal."
            )
        task = fit_text(self, data)
        if isinstance(data, WordUnitText):
            task = dataclasses.replace(task, tokenizer=data.tokenizer, rule=data.rule)
        if task.tokenizer == "bytes" and task.model.vocab_size < BYTE_OFFSET + 256:
            raise ValueError(
                f"task.model.vocab_size is {task.model.vocab_size}, but bytes are units up to {BYTE_OFFSET + 255}; "
                "raise it."
            )
        return task

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, batch["words"], batch["lengths"], batch["targets"])["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        nats, _ = self._nats(params, batch, rng)
        size, lengths, mask = nats.shape[-1], batch["target_lengths"], batch["mask"]
        trained, own = (unit_weights(lengths, size, mask, pads) for pads in (self.model.loss_on_pads, False))
        sums = {"trained": nats * trained, "units": trained, "nats": nats * own, "bytes": batch["bytes"] * mask}
        return {name: jnp.sum(x) for name, x in sums.items()}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats a unit (see `loss_on_pads`).

        Also logs bits per byte, in which each word's units and one end mark count.
        """
        logged = {"bits_per_byte": mean(sums["nats"] / math.log(2), sums["bytes"])}
        return mean(sums["trained"], sums["units"]), logged

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        nats, of_words, right = score_words(self, params, batch)
        lengths, mask = batch["target_lengths"], batch["mask"]
        trained = unit_weights(lengths, nats.shape[-1], mask, self.model.loss_on_pads)
        words = mask * (lengths > 0)
        sums = {"trained": nats * trained, "units": trained, "nats": of_words * mask, "bytes": batch["bytes"] * mask}
        sums |= {"right": right * words, "expected": jnp.exp(-of_words) * words, "words": words}
        return {name: jnp.sum(x) for name, x in sums.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns the loss of training, and what compares models of any units.

        loss                   nats a unit, as in training
        bits_per_byte          the bits of all units and end marks, over the bytes of text
        next_word_accuracy     the share of the words that greedy spelling after the true words gets right, with their
                               end (one wrong unit makes a word wrong, so the true units before it can be given)
        sampled_word_accuracy  what to expect of the same at temperature 1: the mean probability of a word
        words, bytes           the numbers of words and of bytes of text
        """
        words = max(sums["words"], 1.0)
        return {
            "loss": sums["trained"] / sums["units"],
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "next_word_accuracy": sums["right"] / words,
            "sampled_word_accuracy": sums["expected"] / words,
            "words": sums["words"],
            "bytes": sums["bytes"],
        }

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, attention counted over whole rows and canvases."""
        return 3 * math.prod(batch["lengths"].shape) * self.model.flops()

    def continue_text(
        self,
        params: Params,
        prompts: Sequence[bytes],
        *,
        max_bytes: int,
        sampling: Chooser = Sampling(),
        rng: jax.Array | None = None,
        on_text: OnText | None = None,
        logprobs: bool = False,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Up to max_bytes bytes after each prompt, fewer if the document ends. See `jaxtok.protocols.TextGenerator`.

        The last word of a prompt counts as whole. If prompt and continuation have more than `max_words` words, the
        model sees the last of them.

        Raises:
          ValueError: there is no prompt, max_bytes is less than 1, or rng is missing.
        """
        if not prompts:
            raise ValueError("there is no prompt; give at least one.")
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; it must be at least 1.")
        rng = sampling_key(rng, sampling)
        cfg, units = self.model, load_units(self.tokenizer)
        data = WordUnitText(tokenizer=self.tokenizer, rule=self.rule, max_units=cfg.max_units)
        rows = [[(), *(ids for ids, _ in data.words(prompt))] for prompt in prompts]
        starts = [len(row) for row in rows]
        allowed = np.zeros((1, cfg.vocab_size), bool)
        allowed[0, : units.size] = units.allowed[: cfg.vocab_size]
        new = max(1, min(_CHUNK, cfg.max_words // 2))
        continued, over, part = [Continued(b"", [], []) for _ in prompts], np.zeros(len(prompts), bool), 0

        def read(row: int, units: list[int]) -> bytes:
            return data.join(prompts[row], [*rows[row][starts[row] :], *split_words(cfg, units)])

        while not over.all():
            seen = [row[-(cfg.max_words - new) :] for row in rows]
            counts = np.array([len(row) for row in seen], np.int32)
            width = min(-(-max(counts) // _CHUNK) * _CHUNK, cfg.max_words - new)
            words = np.zeros((len(rows), width, cfg.max_units), np.int32)
            for row, table in zip(seen, words):
                for word, place in zip(row, table):
                    place[: len(word)] = word
            engine, state = begin_words(
                self.module(),
                params,
                words,
                (words != END).sum(-1).astype(np.int32),
                counts,
                jax.random.fold_in(rng, part),
                allowed,
                new=new,
                sampling=sampling,
            )
            part, state = part + 1, state.replace(live=jnp.asarray(~over))
            for row, more in enumerate(continue_texts(engine, params, state, read, max_bytes, on_text)):
                if over[row]:
                    continue
                before, whole = continued[row], split_words(cfg, more.tokens)
                continued[row] = Continued(more.text, before.tokens + more.tokens, before.logprobs + more.logprobs)
                over[row] = len(more.text) >= max_bytes or len(whole) < new
                rows[row] += whole
        return texts_and_logprobs(continued, logprobs)

    def _nats(self, params, batch, rng=None):
        """Nats of each unit, and whether it is the likeliest."""
        logits = self.module().apply(
            {"params": params},
            batch["words"],
            batch["lengths"],
            batch["targets"],
            positions=batch["positions"],
            segments=batch["segments"],
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        return cross_entropy(logits, batch["targets"]), logits.argmax(-1) == batch["targets"]


_CHUNK = 32  # the number of words generated at a time; contexts are padded to a multiple of it


@functools.partial(jax.jit, static_argnames="task")
def score_words(
    task: WordPooling, params: Params, batch: Batch
) -> tuple[Float[Array, "batch words units"], Float[Array, "batch words"], Bool[Array, "batch words"]]:
    """Nats of each unit of the targets, nats of each word with its end, and whether greedy spelling is right."""
    nats, likeliest = task._nats(params, batch)
    own = unit_weights(batch["target_lengths"], nats.shape[-1], jnp.ones_like(batch["mask"]), False)
    return nats, jnp.sum(nats * own, -1), jnp.all(likeliest | (own == 0), -1)


PUBLISHED = {
    "ebyte": WordPooledConfig(),
    "echar": WordPooledConfig(),
    "esub": WordPooledConfig(vocab_size=50304, max_units=8),
}
"""The authors' configurations for their three kinds of units: ByT5's bytes; characters, with room for 127 beside the
bytes that spell rarer ones (raise vocab_size for more); and GPT-2's tokens. Their canvas is as wide as the longest word
of a corpus; here, longer words are split."""
