"""Lexinvariant language models (arXiv 2305.16349): fresh random vectors in every sequence, not learned embeddings.

A model p is lexinvariant if p(x_1..x_n) = p(pi(x_1)..pi(x_n)) for every permutation pi of the vocabulary. Here,
every symbol v gets a vector E_v ~ N(0, I) for each sequence, and this table is at both ends of the model:
h = body(E[x_1]..E[x_n]), logits = s h E^T. A prediction can then depend only on which symbols of the sequence are the
same; with a long enough context, the model learns to decipher them.

The body can be any `jaxtok.lm.decoder.Backbone` (a Transformer, Llama, GPT-2, TokenFormer, ...). A semi-lexinvariant
model also has a learned table W; in each sequence, a random part of the symbols has random rows in place of W's.

A row E_v is a hash of the sequence's key and v, so a whole table need not exist: `block` rows at a time are drawn when
they are needed, and drawn again in the backward pass.

The authors released no code, so s, the initialisation and the position of the norms are our choice: s = d^-1/2 gives
logits of a standard deviation near 1; s = 1 is the paper's plain inner product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.axes import constrain, gather
from jaxtok.lm.decoder import Backbone, DecoderConfig
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.nn.cache import KVCache
from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.losses import cross_entropy, text_metrics
from jaxtok.protocols import Batch, Params, Sums, add_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class LexinvariantConfig(LinearStack, DecoderConfig):
    """The paper's body, a T5-style decoder; defaults: its 150M size for characters."""

    num_layers: int = 12
    d_model: int = 1024
    num_heads: int = 8
    mlp_dim: int = 4096
    vocab_size: int = 128
    max_length: int = 512
    norm: str = "rms"
    rotary_fraction: float = 0.0
    relative_buckets: int = 32
    activation: str = "gelu_tanh"
    use_bias: bool = False

    def linear(self, features: int, axes: tuple[str, str], std: float, bias: bool | None, name: str | None) -> Linear:
        """A projection with entries of variance 1 / d_in, as the random rows have a norm near sqrt(d)."""
        d_in = {"d_model": self.d_model, "heads": self.num_heads * self.head_dim, "mlp": self.mlp_dim}[axes[0]]
        return super().linear(features, axes, d_in**-0.5, bias, name)


PUBLISHED = {"150m-characters": LexinvariantConfig(), "150m-subwords": LexinvariantConfig(vocab_size=32000)}
"""The paper's body with its vocabularies: ASCII, and the subwords of T5."""


def sequence_keys(key: Key[Array, ""], batch: int) -> Key[Array, " batch"]:
    """A key for each row of a batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def random_rows(
    keys: Key[Array, " batch"], symbols: Int[Array, "batch n"], width: int
) -> Float[Array, "batch n width"]:
    """The rows E_v ~ N(0, I) of these symbols in each sequence's table, float32; key and symbol determine a row."""

    def row(key, symbol):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 0), symbol), (width,))

    return jax.vmap(jax.vmap(row, (None, 0)))(keys, symbols)


def random_mask(keys: Key[Array, " batch"], symbols: Int[Array, "batch n"], part: float) -> Bool[Array, "batch n"]:
    """Whether each symbol's row in a sequence is random: true with probability `part`, by key and symbol."""

    def one(key, symbol):
        return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, 1), symbol), part)

    return jax.vmap(jax.vmap(one, (None, 0)))(keys, symbols)


@flax.struct.dataclass
class LexinvariantCache(KVCache):
    """Keys and values, and the random key of each row's table, which stays the same while the row grows."""

    tables: Key[Array, " batch"] | None = None


class Lexinvariant(Backbone):
    """Tokens to next-token logits with a table for each sequence; see `jaxtok.protocols.CausalLM`.

    Every method takes the tables as `keys`, one for each row, or as `table`, the vectors themselves. Without either,
    they come from `seed` and the number of the row.
    """

    random_symbols: float = 1.0
    """The probability p that a symbol has a random row. 1: a lexinvariant model; 0: a standard language model with a
    tied table; between them: a semi-lexinvariant one."""
    readout_scale: float = 0.0
    """The factor s of the logits; 0: d_model^-1/2."""
    block: int = 0
    """The number of rows of a table that exist at a time; 0: all."""
    seed: int = 0
    """The seed of the tables if no keys are given."""

    def setup(self):
        super().setup()
        cfg = self.config
        _check(cfg, self.random_symbols, self.readout_scale, self.block)
        if self.random_symbols < 1:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "d_model"))
            value = self.param("embedding", init, (cfg.vocab_size, cfg.d_model), cfg.param_dtype)
            self.embedding = gather(value.astype(cfg.dtype), "vocab", "d_model")

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        cache: LexinvariantCache | None = None,
        deterministic: bool = True,
        keys: Key[Array, " batch"] | None = None,
        table: Float[Array, "batch vocab d_model"] | None = None,
    ) -> tuple[Float[Array, "batch length vocab"], LexinvariantCache | None]:
        """Logits of the token after each one (float32), and the cache with these tokens appended.

        Args:
          tokens: ids from 0 to vocab_size - 1; others give NaN. The documents of a row share a table, but do not see
            each other.
          positions, segments, mask: as in `jaxtok.lm.decoder.Decoder`.
          cache: from `init_cache` or an earlier call; its tables are used.

        Raises:
          ValueError: more tokens than max_length, or segments, keys or a table together with a cache.
        """
        if cache is not None:
            if keys is not None or table is not None:
                raise ValueError("keys or a table are given together with a cache, which has its own; leave them out.")
            keys = cache.tables
        if table is None and not self.block:
            table = self.table(self._keys(keys, tokens.shape[0]))
        x, cache = self.hidden(
            self.embed(tokens, keys=keys, table=table),
            positions=positions,
            segments=segments,
            mask=mask,
            cache=cache,
            deterministic=deterministic,
        )
        return self.head(x, keys=keys, table=table), cache

    def table(self, keys: Key[Array, " batch"]) -> Float[Array, "batch vocab d_model"] | Float[Array, "vocab d_model"]:
        """Each sequence's whole table, or W if no symbol is random."""
        if not self.random_symbols:
            return self.embedding
        symbols = jnp.broadcast_to(jnp.arange(self.config.vocab_size), (keys.shape[0], self.config.vocab_size))
        learned = self.embedding if self.random_symbols < 1 else None
        return constrain(self._rows(keys, symbols, learned), "batch", "vocab", "d_model")

    def embed(self, tokens, *, keys=None, table=None) -> Float[Array, "batch length d_model"]:
        """The input embeddings: each token's row of its sequence's table."""
        cfg = self.config
        if table is None and not self.random_symbols:
            table = self.embedding
        if table is None:
            learned = jnp.take(self.embedding, tokens, axis=0) if self.random_symbols < 1 else None
            x = self._rows(self._keys(keys, tokens.shape[0]), tokens, learned)
        elif table.ndim == 2:
            x = jnp.take(table, tokens, axis=0)
        else:
            x = jnp.take_along_axis(table.astype(cfg.dtype), tokens[..., None], axis=1)
        x = jnp.where(((tokens >= 0) & (tokens < cfg.vocab_size))[..., None], x, jnp.nan)
        if cfg.scale_embeddings:
            x = x * jnp.asarray(cfg.d_model**0.5, x.dtype)
        return constrain(x, "d_model")

    def head(self, x, *, keys=None, table=None) -> Float[Array, "batch length vocab"]:
        """Logits s x E^T in float32, from hidden states x after the final norm."""
        if table is None and not (self.block and self.random_symbols):
            table = self.table(self._keys(keys, x.shape[0]))
        if table is None:
            read = lambda part: self._readout(x, self._block(self._keys(keys, x.shape[0]), *part))  # noqa: E731
            logits = jnp.moveaxis(jax.lax.map(read, self._parts()), 0, -2)
            logits = logits.reshape(*x.shape[:2], -1)[..., : self.config.vocab_size]
        else:
            logits = self._readout(x, table)
        return constrain(logits, "vocab")

    def nats(
        self,
        tokens: Int[Array, "batch length"],
        targets: Int[Array, "batch length"],
        *,
        keys: Key[Array, " batch"] | None = None,
        table: Float[Array, "batch vocab d_model"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch length"]:
        """-log p(target) at each position. With `block`, only that many rows, or logits of a token, exist at a time.

        Args:
          options: positions, segments and deterministic, as for a call.
        """
        if table is not None or not (self.block and self.random_symbols):
            logits, _ = self(tokens, keys=keys, table=table, **options)
            return cross_entropy(logits, targets)
        keys = self._keys(keys, tokens.shape[0])
        x, _ = self.hidden(self.embed(tokens, keys=keys), **options)

        def add(carry, part):  # one block's share of the softmax
            top, total, chosen = carry
            symbols = part[0] + jnp.arange(self.block)
            logits = constrain(self._readout(x, self._block(keys, *part)), "vocab")
            logits = jnp.where(symbols < self.config.vocab_size, logits, -jnp.inf)
            higher = jnp.maximum(top, jax.lax.stop_gradient(logits.max(-1)))
            total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
            index = targets - part[0]
            of_target = jnp.take_along_axis(logits, jnp.clip(index, 0, self.block - 1)[..., None], -1)[..., 0]
            inside = (index >= 0) & (index < self.block) & (targets < self.config.vocab_size)
            return (higher, total, jnp.where(inside, of_target, chosen)), None

        lowest = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
        start = (lowest, jnp.zeros(targets.shape), jnp.full(targets.shape, jnp.nan))
        (top, total, chosen), _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), start, self._parts())
        return top + jnp.log(total) - chosen

    def init_cache(self, batch: int, length: int, keys: Key[Array, " batch"] | None = None) -> LexinvariantCache:
        """An empty cache; `keys` are the random keys of the rows' tables."""
        cache = super().init_cache(batch, length)
        fields = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
        return LexinvariantCache(**fields, tables=self._keys(keys, batch))

    def _keys(self, keys, batch):
        return sequence_keys(jax.random.key(self.seed), batch) if keys is None else keys

    def _rows(self, keys, symbols, learned):
        rows = random_rows(keys, symbols, self.config.d_model).astype(self.config.dtype)
        if self.random_symbols == 1:
            return rows
        return jnp.where(random_mask(keys, symbols, self.random_symbols)[..., None], rows, learned)

    def _parts(self):
        """The first symbol of each block of the vocabulary, and its rows of W (None if there is no W)."""
        cfg = self.config
        count = -(-cfg.vocab_size // self.block)
        learned = None
        if self.random_symbols < 1:
            learned = jnp.pad(self.embedding, ((0, count * self.block - cfg.vocab_size), (0, 0)))
            learned = learned.reshape(count, self.block, cfg.d_model)
        return self.block * jnp.arange(count), learned

    def _block(self, keys, first, learned):
        symbols = jnp.broadcast_to(first + jnp.arange(self.block), (keys.shape[0], self.block))
        return constrain(self._rows(keys, symbols, learned), "batch", "vocab", "d_model")

    def _readout(self, x, table):
        table = table.astype(x.dtype)
        of_table = "vd" if table.ndim == 2 else "bvd"
        logits = jnp.einsum(f"bld,{of_table}->blv", x, table, preferred_element_type=jnp.float32)
        return logits * (self.readout_scale or self.config.d_model**-0.5)


def _check(config: DecoderConfig, random_symbols: float, readout_scale: float, block: int) -> None:
    if not 0 <= random_symbols <= 1:
        raise ValueError(f"random_symbols is {random_symbols}; it is a probability, so it must be in [0, 1].")
    if not 0 <= readout_scale < math.inf:
        raise ValueError(f"readout_scale is {readout_scale}; it must be positive, or 0 for d_model^-1/2.")
    if block < 0:
        raise ValueError(f"block is {block}; it must be positive, or 0 for the whole table at once.")
    if not 0 < config.vocab_size < 2**31:
        raise ValueError(f"vocab_size is {config.vocab_size}; it must be positive and below 2^31.")
    if not config.tie_embeddings:
        raise ValueError(
            "tie_embeddings is False; it must be True, as the model reads out with the rows that it reads in."
        )


class Bin(NamedTuple):
    """The loss at the positions `first` to `last` (included) of documents, counted as in `nats_by_position`."""

    first: int
    last: int
    nats: float
    """The mean over tokens and over draws of the tables."""
    stderr: float
    """The standard error of that mean over draws; 0 if nothing is drawn."""
    tokens: float


def position_edges(length: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ..., length: where each bin of positions begins, and where the last one ends."""
    return (0, *(2**k for k in range((length - 1).bit_length())), length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LexinvariantModeling(LanguageModeling):
    """Trains a lexinvariant, semi-lexinvariant or standard language model on rows of text.

    A row is a sequence: it has one table, whatever documents it holds. The end-of-document token is a symbol like any
    other. Evaluation and generation use the learned table if there is one.
    """

    random_symbols: float = 1.0
    """The probability p that a symbol has a random row; see `Lexinvariant`."""
    readout_scale: float = 0.0
    """The factor s of the logits; 0: d_model^-1/2."""
    block: int = 0
    """The number of rows of a table that exist at a time; 0: all, which is faster for small vocabularies."""
    draws: int = 4
    """How many tables an evaluation draws for each sequence."""
    seed: int = 0
    """The seed of the tables in evaluation and generation."""

    def __post_init__(self):
        vocab = self.model.vocab_size or 1  # 0 is not known yet
        sized = dataclasses.replace(self.model, vocab_size=vocab)
        _check(sized, self.random_symbols, self.readout_scale, self.block)
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; it must be at least 1.")

    def module(self, training: bool = False) -> Lexinvariant:
        """The model. Only in training does a semi-lexinvariant one have random rows."""
        part = self.random_symbols if training or self.random_symbols == 1 else 0.0
        scale, block = self.readout_scale, self.block
        return Lexinvariant(self.model, random_symbols=part, readout_scale=scale, block=block, seed=self.seed)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        return _position_sums(self, (0, 2**31 - 1), False, params, batch, rng)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats a token, the mean over `draws` tables for each sequence), loss_stderr (its standard error
        over the draws), perplexity, bits_per_byte, tokens and bytes."""
        nats, tokens = sums["nats"].sum(1), float(sums["tokens"].sum())
        loss = nats / tokens
        mean = text_metrics({"nats": float(nats.mean()), "tokens": tokens, "bytes": sums["bytes"]})
        return mean | {"loss": float(loss.mean()), "loss_stderr": _stderr(loss)}

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """See `Task.evaluate`; without `rng`, the tables are drawn from `seed`."""
        return super().evaluate(params, batches, jax.random.key(self.seed) if rng is None else rng, **options)

    def nats_by_position(
        self, params: Params, batches: Iterable[Batch], *, edges: tuple[int, ...] = (), permuted: bool = False
    ) -> list[Bin]:
        """The loss by position in the context, counted from a document's beginning in its row.

        Args:
          edges: where bins begin, and where the last one ends, in rising order; default: `position_edges`.
          permuted: whether the symbols of each sequence are renamed, in each draw, by a random permutation of them all.

        Raises:
          ValueError: there was no target to predict, or the edges do not rise.
        """
        edges = tuple(edges)
        if len(edges) == 1 or any(stop <= start for start, stop in itertools.pairwise(edges)):
            raise ValueError(f"edges is {edges}; it must be at least two numbers in rising order.")
        batches = iter(batches)
        first = list(itertools.islice(batches, 1))
        edges = edges or position_edges(max((batch["tokens"].shape[1] for batch in first), default=1))
        seed = jax.random.key(self.seed)
        sums = add_up(
            (
                _position_sums(self, edges, permuted, params, batch, jax.random.fold_in(seed, number))
                for number, batch in enumerate(itertools.chain(first, batches))
            ),
            self.counted,
        )
        nats, tokens = sums["nats"], sums["tokens"]
        means = nats / np.maximum(tokens, 1)
        return [
            Bin(start, stop - 1, float(means[:, k].mean()), _stderr(means[:, k]), float(tokens[k]))
            for k, (start, stop) in enumerate(itertools.pairwise(edges))
        ]

    def _nats(self, params, batch, rng=None, *, keys=None):
        if batch["tokens"].shape[1] < 2:
            raise ValueError(
                "rows hold 1 token; data.length must be at least 2, as a lexinvariant model knows nothing of a single "
                "symbol."
            )
        options: dict[str, Any] = {}
        if rng is not None:
            keys = sequence_keys(jax.random.fold_in(rng, 0), batch["tokens"].shape[0])
            options["rngs"] = {"dropout": jax.random.fold_in(rng, 1)}
        return self.module(training=rng is not None).apply(
            {"params": params},
            batch["tokens"],
            batch["targets"],
            positions=batch["positions"],
            segments=batch["segments"],
            deterministic=rng is None,
            keys=keys,
            method="nats",
            **options,
        )


def _stderr(draws: np.ndarray) -> float:
    return float(draws.std(ddof=1) / math.sqrt(len(draws))) if len(draws) > 1 else 0.0


def permute_symbols(
    key: Key[Array, ""], batch: dict[str, Int[Array, "batch length"]], vocab: int
) -> dict[str, Int[Array, "batch length"]]:
    """Each array of tokens, with the symbols of each row renamed by the row's own random permutation."""
    keys = sequence_keys(key, next(iter(batch.values())).shape[0])
    renamed = jax.vmap(lambda key: jax.random.permutation(key, vocab))(keys)
    return {name: jnp.take_along_axis(renamed, tokens, axis=1) for name, tokens in batch.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _position_sums(task: LexinvariantModeling, edges: tuple[int, ...], permuted: bool, params, batch, key):
    """The sums of nats [draws, bins], tokens [bins] and bytes."""
    batch = dict(batch)
    bins = jnp.searchsorted(jnp.array(edges), batch["positions"], side="right") - 1  # positions outside count nowhere
    inside = jax.nn.one_hot(bins, len(edges) - 1) * batch["mask"][..., None]

    def draw(number):
        tables, names = jax.random.split(jax.random.fold_in(key, number))
        words = {name: batch[name] for name in ("tokens", "targets")}
        words = permute_symbols(names, words, task.model.vocab_size) if permuted else words
        nats = task._nats(params, batch | words, keys=sequence_keys(tables, batch["tokens"].shape[0]))
        return jnp.einsum("bl,blk->k", nats, inside)

    drawn = permuted or task.random_symbols == 1
    nats = jax.lax.map(draw, jnp.arange(task.draws if drawn else 1))
    return {"nats": nats, "tokens": inside.sum((0, 1)), "bytes": jnp.sum(batch["bytes"] * batch["mask"])}
