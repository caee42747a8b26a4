"""Learn Your Tokens: word-pooled tokenization (Thawani et al., Findings of EMNLP 2023, arXiv 2310.11628).

The units of a word (bytes, characters or subwords: eByte, eChar, eSub) are pooled by a small transformer into a few
vectors, a decoder runs over these, and a small causal transformer spells the next word from the last of them. All
words of a batch are pooled at once, and spelled at once.

The authors' code (avi-jit/eTok) is followed where the paper leaves things open. It has three peculiarities, each of
which is a switch of the config: `prefix_ids`, `mask_pads`, `loss_on_pads`. A fourth, that its forward pass lengthens
the caller's words in place, is not copied. Its dropout on attention weights and inside the encoder's MLP is not here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather, joined_rows
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.lm import decoder
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.cache import KVCache
from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import Batch, Params

END = 0
"""The unit that ends a word, and fills up the rest of its canvas. No real unit has this number."""
HIDDEN = -1e30
"""What is added to the score of a key that is not to be seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPooledConfig:
    """Sizes and switches; defaults: the authors', for bytes (config.json's names in brackets)."""

    vocab_size: int = 384
    """Units, the end mark 0 included; 384 are ByT5's bytes; 0: the data's, rounded up to 128. [vocab_size]"""
    max_units: int = 16
    """Units of the longest word (the canvas). [canvas_size]"""
    max_words: int = 192
    """The longest context, in words. [block_size]"""
    prefixes: int = 4
    """Vectors a word. [num_prefix]"""
    d_model: int = 512
    num_layers: int = 8
    """Of the decoder over words. [n_layer]"""
    num_heads: int = 8
    """Of the decoder over words and of the speller. [n_head]"""
    unit_layers: int = 2
    """Of the word encoder, and of the speller. [n_e2e_layer]"""
    encoder_heads: int = 4
    """[n_e2e_head]"""
    encoder_mlp_dim: int = 2048
    """PyTorch's default, whatever d_model."""
    dropout: float = 0.1
    """On embeddings and on what each half of a block adds to the residual stream."""
    encoder_dropout: float = 0.1
    """In the word encoder; PyTorch's default."""
    prefix_ids: Literal["own", "official"] = "own"
    """own: the prefixes have embeddings of their own; official: prefix i has row `canvas + i` of the units and then
    the prefixes, where the canvas is as wide as the batch."""
    mask_pads: bool = False
    """No place of a word sees the padding behind its end mark. Without it (official), only padding does not see
    padding, so that a word's vectors depend on the width of the canvas. Recommended for new models."""
    loss_on_pads: bool = True
    """The loss is a mean over the whole canvas of each word (official); or over its units and one end mark."""
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "projections", "dots"] = "none"

    def __post_init__(self):
        least = dict(max_units=1, max_words=2, prefixes=1, unit_layers=1, encoder_mlp_dim=1, vocab_size=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if self.vocab_size == 1:
            raise ValueError("vocab_size is 1, which is the end mark alone; it must be at least 2 (or 0).")
        if self.d_model % self.encoder_heads:
            raise ValueError(
                f"encoder_heads is {self.encoder_heads}, which does not divide d_model = {self.d_model}; choose a divisor."
            )
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout is {self.encoder_dropout}; it must be in [0, 1).")
        if self.prefix_ids not in ("own", "official"):
            raise ValueError(f"prefix_ids is {self.prefix_ids!r}; it can be own, official.")
        if self.prefix_ids == "official" and self.vocab_size and self.max_units > self.vocab_size:
            raise ValueError(
                f"max_units is {self.max_units}, above vocab_size = {self.vocab_size}, where prefix_ids = official finds "
                "no rows for the prefixes; choose fewer units, or prefix_ids = own."
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
        """PyTorch's `TransformerEncoderLayer`s: norms behind the sums, ReLU."""
        return self._stack(
            EncoderStack,
            num_layers=self.unit_layers,
            num_heads=self.encoder_heads,
            mlp_dim=self.encoder_mlp_dim,
            activation="relu",
            post_norm=True,
            causal=False,
            dropout=self.encoder_dropout,
        )

    @property
    def body(self) -> LinearStack:
        """GPT blocks over the words' vectors."""
        sizes = dict(num_layers=self.num_layers, num_heads=self.num_heads, mlp_dim=4 * self.d_model)
        return self._stack(BlockStack, dropout=self.dropout, **sizes)

    @property
    def speller(self) -> LinearStack:
        """The same blocks over the units of a word."""
        return dataclasses.replace(self.body, num_layers=self.unit_layers)

    def flops(self) -> float:
        """Forward FLOPs of one word, in a full row: the encoder, the decoder, the speller and the head."""
        canvas, context = self.prefixes + self.max_units, self.max_words * self.prefixes
        small = canvas * (self.encoder.stack_flops(canvas) + self.speller.stack_flops(canvas))
        head = 2 * self.max_units * self.vocab_size * self.d_model
        return small + self.prefixes * self.body.stack_flops(context) + head


class BlockStack(LinearStack):
    """minGPT's blocks: every matrix begins with the same deviation."""

    @property
    def output_init_std(self) -> float:
        return self.init_std


class EncoderStack(BlockStack):
    """Queries, keys and values begin as PyTorch's packed matrix of all three does: Xavier's, uniform."""

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        if group not in ("query", "key", "value"):
            return super().projection(group, features, name)
        packed = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")  # 6 / (d + 3 d), the bound's square
        return Linear(features, kernel_init=packed, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class WordPooled(nn.Module):
    """Words, as units behind each other [words, units], to logits of their units.

    In shapes: p prefixes, and units as wide as the batch has them, at most `max_units`.
    """

    config: WordPooledConfig

    def setup(self):
        cfg = self.config
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0; set it to the number of units.")

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
        units: Int[Array, "batch words units"],
        lengths: Int[Array, "batch words"],
        *,
        positions: Int[Array, "batch words"] | None = None,
        segments: Int[Array, "batch words"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch words units vocab"]:
        """Logits of every unit of every word, from the words and units in front of it (float32).

        Those of a row's first word mean nothing: nothing predicts it.

        Args:
          units: each word's, filled up with `END`.
          lengths: how many they are. A word that fills the canvas has no end mark.
          positions: of the words in their document; default: 0, 1, ...
          segments: words attend within their document only.

        Raises:
          ValueError: words are longer than max_units, or more than max_words.
        """
        embedded = self._embed(units, deterministic)
        pooled = self._pool(embedded, lengths, deterministic)
        z, _ = self.body(pooled, positions=positions, segments=segments, deterministic=deterministic)
        before = jnp.pad(z[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        return self._spell(before, embedded[:, :, self.config.prefixes :], deterministic)

    def pool(
        self, units: Int[Array, "batch words units"], lengths: Int[Array, "batch words"], deterministic: bool = True
    ) -> Float[Array, "batch words prefixes d_model"]:
        """Each word's vectors, from its own units alone."""
        return self._pool(self._embed(units, deterministic), lengths, deterministic)

    def body(
        self,
        pooled: Float[Array, "batch words prefixes d_model"],
        *,
        positions: Int[Array, "batch words"] | None = None,
        segments: Int[Array, "batch words"] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch words prefixes d_model"], KVCache | None]:
        """What the decoder over words makes of their vectors, and the cache with these words appended.

        The vectors of a word see those of earlier words, and the earlier ones of the same word.
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
        units: Int[Array, "batch words units"],
        deterministic: bool = True,
    ) -> Float[Array, "batch words units vocab"]:
        """Logits of the units of each word, whose predecessor the decoder turned into z."""
        return self._spell(z, self._embed(units, deterministic)[:, :, self.config.prefixes :], deterministic)

    def spell_first(
        self, z: Float[Array, "rows prefixes d_model"], cache: KVCache
    ) -> tuple[Float[Array, "rows vocab"], KVCache]:
        """Logits of the first unit of the words behind z; and the cache, for `spell_next`."""
        x, cache = self.speller(z + self.unit_positions[: self.config.prefixes], _places(z), None, cache)
        return self._head(x[:, -1]), cache

    def spell_next(self, unit: Int[Array, " rows"], cache: KVCache) -> tuple[Float[Array, "rows vocab"], KVCache]:
        """Logits of the unit behind the one that was chosen."""
        x = jnp.take(self.embedding, unit, axis=0) + 2 * jnp.take(self.unit_positions, cache.length, axis=0)
        x, cache = self.speller(x[:, None], cache.length[:, None], None, cache)
        return self._head(x[:, 0]), cache

    def _embed(self, units, deterministic):
        """The canvas of each word, [batch, words, prefixes + units, d_model]: prefixes and units, with positions."""
        cfg, width = self.config, units.shape[2]
        if width > cfg.max_units:
            raise ValueError(f"a word has {width} units, but the model's max_units is {cfg.max_units}.")
        prefixes = self.prefix_embedding
        if cfg.prefix_ids == "official":
            prefixes = jnp.concatenate([self.embedding, prefixes])[width : width + cfg.prefixes]
        x = jnp.take(self.embedding, units, axis=0)
        x = jnp.concatenate([jnp.broadcast_to(prefixes, (*x.shape[:2], *prefixes.shape)), x], 2)
        return self.input_dropout(x + self.unit_positions[: x.shape[2]], deterministic)

    def _pool(self, embedded, lengths, deterministic):
        cfg, (batch, words, canvas, _) = self.config, embedded.shape
        with joined_rows():
            x = constrain(embedded.reshape(batch * words, canvas, -1), "d_model")
            pad = jnp.arange(canvas) > lengths.reshape(-1, 1) + cfg.prefixes  # the first padding unit is the end mark
            hidden = pad[:, None, :] if cfg.mask_pads else pad[:, None, :] & pad[:, :, None]
            bias = jnp.where(hidden, HIDDEN, 0.0)[:, None]
            x, _ = self.encoder(x, _places(x), None, None, deterministic, bias=bias)
        return x[:, : cfg.prefixes].reshape(batch, words, cfg.prefixes, -1)

    def _spell(self, z, embedded_units, deterministic):
        """The prefixes' places of a word's canvas hold z; its units get their positions a second time."""
        batch, words, p, d = z.shape
        with joined_rows():
            x = jnp.concatenate([z, embedded_units[:, :, :-1]], 2).reshape(batch * words, -1, d)
            x = constrain(self.input_dropout(x + self.unit_positions[: x.shape[1]], deterministic), "d_model")
            x, _ = self.speller(x, _places(x), None, None, deterministic)
            logits = constrain(self._head(x[:, p - 1 :]), "vocab")
        return logits.reshape(batch, words, *logits.shape[1:])

    def _head(self, x):
        return jnp.einsum("...d,vd->...v", x, self.head_matrix, preferred_element_type=jnp.float32)


def _places(x: Float[Array, "rows places d_model"]) -> Int[Array, "rows places"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(BlockStack, DecoderConfig):
    """The authors' baseline: the decoder over units alone. As released, it has no positions at all."""

    vocab_size: int = 384
    max_length: int = 192
    num_layers: int = 8
    d_model: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    rotary_fraction: float = 0.0
    tie_embeddings: bool = False
    dropout: float = 0.1


def init_params(config: WordPooledConfig | PlainConfig, rng: jax.Array) -> Any:
    """The parameters as plain arrays."""
    if isinstance(config, PlainConfig):
        return decoder.init_params(decoder.Decoder(config), rng, jnp.zeros((1, 1), jnp.int32))
    words = jnp.zeros((1, 2), jnp.int32)
    return decoder.init_params(WordPooled(config), rng, jnp.zeros((1, 2, 1), jnp.int32), words)


def unit_weights(
    lengths: Int[Array, "*words"], width: int, mask: Float[Array, "*words"], on_pads: bool
) -> Float[Array, "*words units"]:
    """Which units count in the loss of the words in `mask`: all, or each word's own and one end mark."""
    if on_pads:
        return jnp.broadcast_to(mask[..., None], (*mask.shape, width)).astype(jnp.float32)
    own = (jnp.arange(width) <= lengths[..., None]) & (lengths[..., None] > 0)
    return own * mask[..., None]


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
    """The words behind z, unit after unit, with what was chosen fed back; all rows at once.

    Args:
      model, params: the model and its parameters.
      z: the decoder's vectors of the words before, from any number of rows and words.
      rng: a key; not needed for greedy spelling.
      allowed: the units that can be chosen at each place (or at all of them, where there is one row only).
      sampling: how a unit is chosen.
      stop: a word is over behind its first end mark, and `END` fills its canvas. Otherwise it goes on to the end of the
        canvas (the authors' validation).
    """
    cfg, rows = model.config, len(z)
    spell = functools.partial(model.apply, {"params": params})
    slots, stack = cfg.prefixes + cfg.max_units, cfg.speller
    cache = KVCache.init(stack.num_layers, rows, slots, stack.kv_heads, stack.head_dim, jnp.dtype(cfg.dtype))
    logits, cache = spell(z, cache, method="spell_first")
    rng = jax.random.key(0) if rng is None else rng
    allowed = jnp.ones((1, cfg.vocab_size), bool) if allowed is None else allowed
    allowed = jnp.broadcast_to(allowed, (cfg.max_units, cfg.vocab_size))

    def step(state):
        k, units, over, logits, cache = state
        unit = sample(jnp.where(allowed[k], logits, -jnp.inf), jax.random.fold_in(rng, k), sampling)
        unit = jnp.where(over, END, unit).astype(jnp.int32) if stop else unit.astype(jnp.int32)
        logits, cache = spell(unit, cache, method="spell_next")
        return k + 1, units.at[:, k].set(unit), over | (unit == END) if stop else over, logits, cache

    units = jnp.full((rows, cfg.max_units), END, jnp.int32)
    start = (jnp.zeros((), jnp.int32), units, jnp.zeros(rows, bool), logits, cache)
    return jax.lax.while_loop(lambda s: (s[0] < cfg.max_units) & ~s[2].all(), step, start)[1]


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stop"))
def guess_words(
    model: WordPooled,
    params: Params,
    units: Int[Array, "batch words units"],
    lengths: Int[Array, "batch words"],
    rng: jax.Array | None = None,
    *,
    positions: Int[Array, "batch words"] | None = None,
    segments: Int[Array, "batch words"] | None = None,
    sampling: Sampling = Sampling(temperature=0),
    stop: bool = True,
) -> Int[Array, "batch words max_units"]:
    """Every word of every row but the first, spelled from the true words in front of it; of the first, nothing."""
    apply = functools.partial(model.apply, {"params": params})
    pooled = apply(units, lengths, method="pool")
    z, _ = apply(pooled, positions=positions, segments=segments, method="body")
    batch, words = lengths.shape
    spelled = spell_words(model, params, z.reshape(batch * words, *z.shape[2:]), rng, sampling=sampling, stop=stop)
    spelled = spelled.reshape(batch, words, -1)
    return jnp.pad(spelled[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=END)


def word_accuracies(
    spelled: Int[Array, "*words width"], truth: Int[Array, "*words units"]
) -> tuple[Bool[Array, "*words width"], Bool[Array, "*words"]]:
    """Whether each unit is right, where the word has one (elsewhere false); and whether the whole canvas is.

    The authors' two accuracies are the right units over all units, and the mean of the second: "banker" for "bank" is
    wrong.
    """
    more = spelled.shape[-1] - truth.shape[-1]
    truth = jnp.pad(truth, [(0, 0)] * (truth.ndim - 1) + [(0, more)], constant_values=END)
    same = spelled == truth
    return same & (truth != END), same.all(-1)
