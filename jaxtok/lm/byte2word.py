"""Byte2Word (Lee, Guo & Qiu, arXiv 2211.12677): an encoder over words that are pooled from their bytes.

A word's bytes are embedded, and attention with one learned query pools them into the word's vector: a table of 261 rows
takes the place of BERT's 30,522 subwords. BERT's body runs over these vectors. In training whole words are masked, and
the subword pieces of each are predicted from its one hidden state.

The paper came without code and leaves details open. Its abstract claims BERT's quality with a tenth of BERT's input
embedding. The form of the pooling, the sizes below and the masking shares are this package's choice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxtok.axes import constrain, gather
from jaxtok.lm.masked_words import Slots, put, take
from jaxtok.lm.text_classification import TextClassification
from jaxtok.lm.whole_words import Predicted, WordModeling, choose_words, mean_state, score_pieces
from jaxtok.nn.activations import gelu
from jaxtok.nn.linear import Linear, LinearStack
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import Batch, Params
from jaxtok.tokenizers.byte_words import CLS, MASK, PAD, symbol_mask, word_array

BYTE_VOCAB = 261
"""The number of byte ids: the 256 bytes, and the symbols of `jaxtok.tokenizers.byte_words`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Byte2WordConfig(LinearStack):
    """Defaults: BERT-base's body, with BERT's subwords as targets."""

    vocab_size: int = 30522
    """The number of pieces that can be predicted; 0: the tokenizer's, rounded up to 128."""
    max_length: int = 128
    """The longest row, in words."""
    max_bytes: int = 24
    """Bytes of a word that are read; longer words are cut."""
    max_pieces: int = 6
    """Pieces of a word that are predicted; longer words are cut."""
    type_vocab_size: int = 2
    pool_heads: int = 12
    pooling: Literal["factored", "plain"] = "factored"
    """How the pooling is computed: from small tables of scores and values (factored), or byte by byte (plain). The
    results are equal."""
    query: Literal["learned", "constant", "length", "first_byte"] = "learned"
    """The pooling's query. learned: W_q q + b_q of a learned vector q; constant: q itself; length or first_byte: as
    learned, but q also has a learned part for the word's length or its first byte."""
    num_queries: int = 1
    """Queries of the pooling; each pools a vector, and W_o joins them."""
    pool_mlp_dim: int = 0
    """Hidden units of a residual MLP after the pooling; 0: no MLP."""
    pool_norm: bool = False
    """Whether a layer norm is applied to the pooled vector before positions and types are added."""
    post_norm: bool = True
    causal: bool = False
    mask_keys: bool = True
    rotary_fraction: float = 0.0
    norm_eps: float = 1e-12
    dropout: float = 0.1
    piece_head: bool = True
    """Whether there is a head that predicts pieces; nothing else needs the vocabulary."""
    num_classes: int = 0
    """Classes of a classifier of the whole text (dense, tanh, dense on the first word's state); 0: no classifier."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("max_length", "max_bytes", "max_pieces", "type_vocab_size", "pool_heads", "num_queries"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("vocab_size", "pool_mlp_dim", "num_classes"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.d_model % self.pool_heads:
            raise ValueError(f"pool_heads is {self.pool_heads}, which does not divide d_model = {self.d_model}.")
        for field, allowed in {"pooling": POOLINGS, "query": QUERIES}.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")

    @property
    def output_init_std(self) -> float:
        return self.init_std

    def linear(self, features: int, axes: tuple[str, str], std: float, bias: bool | None, name: str | None) -> Linear:
        return Linear(
            features=features,
            axes=axes,
            use_bias=self.use_bias if bias is None else bias,
            kernel_init=nn.initializers.truncated_normal(std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def input_params(self) -> int:
        """The number of parameters between bytes and word vectors: tables of bytes and positions, and the pooling.

        By default that is d (4d + 4 + 1 + 261 + max_bytes); BERT has 30,522 d.
        """
        d, queries = self.d_model, self.num_queries
        conditions = {"length": self.max_bytes, "first_byte": BYTE_VOCAB}.get(self.query, 0)
        projection = 0 if self.query == "constant" else d * d + d
        total = d * (BYTE_VOCAB + self.max_bytes + conditions + queries) + projection  # tables and the query
        total += 2 * (d * d + d) + queries * d * d + d  # keys, values and the output
        if self.pool_mlp_dim:
            total += 2 * d * self.pool_mlp_dim + self.pool_mlp_dim + d
        return total + (2 * d if self.pool_norm else 0)

    def pooling_flops(self) -> float:
        """Forward FLOPs of pooling one word of `max_bytes`, without the output projection that both forms have."""
        d, m = self.d_model, self.max_bytes
        if self.pooling == "factored":
            return 2 * m * d * 2 * self.num_queries
        return 4 * m * d * d + 4 * m * d * self.num_queries

    def flops(self, length: int) -> float:
        """Forward FLOPs of one word in a row of `length`, without the head."""
        d = self.d_model
        pooled = self.pooling_flops() + 2 * self.num_queries * d * d + 4 * d * self.pool_mlp_dim
        return pooled + self.stack_flops(length)

    def head_flops(self) -> float:
        """Forward FLOPs of predicting one piece."""
        return 2 * self.d_model * (self.d_model + self.vocab_size)


POOLINGS = ("factored", "plain")
QUERIES = ("learned", "constant", "length", "first_byte")


class _Projection(nn.Module):
    """Returns x W for each x, and b apart, for a caller that adds up projected rows before it adds the bias once."""

    features: int
    axes: tuple[str, str]
    std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, *xs: Float[Array, "... d_in"]) -> tuple[Array, ...]:
        def param(name, init, shape, axes):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
            return gather(value.astype(self.dtype), *axes)

        kernel = param(
            "kernel", nn.initializers.truncated_normal(self.std), (xs[0].shape[-1], self.features), self.axes
        )
        bias = param("bias", nn.initializers.zeros, (self.features,), self.axes[1:])
        return *(x @ kernel for x in xs), bias


class BytePooling(nn.Module):
    """Bytes to word vectors: W_o concat_h softmax_j((W_q q + b_q)_h (W_k e_j + b_k)_h / sqrt(d_h)) (W_v e_j + b_v)_h.

    e_j is the embedding of the word's byte j plus that of position j. As e_j is a sum of rows of two small tables, so
    are its key and its value; and as q depends on the word's length or first byte at most, so is its score. The
    factored form looks these rows up.
    """

    config: Byte2WordConfig

    @nn.compact
    def __call__(
        self, byte_ids: Int[Array, "batch words bytes"], byte_mask: Shaped[Array, "batch words bytes"]
    ) -> Float[Array, "batch words d_model"]:
        cfg = self.config
        d, h, m = cfg.d_model, cfg.pool_heads, byte_ids.shape[-1]
        if m > cfg.max_bytes:
            raise ValueError(f"there are {m} bytes in a word, but the model's max_bytes is {cfg.max_bytes}.")
        byte_mask = byte_mask.astype(bool)

        def table(name, rows):
            init = nn.with_logical_partitioning(nn.initializers.truncated_normal(cfg.init_std), (None, "d_model"))
            return gather(self.param(name, init, (rows, d), cfg.param_dtype).astype(cfg.dtype), None, "d_model")

        def projection(name, axes, std):
            return _Projection(d, axes, std, cfg.dtype, cfg.param_dtype, name=name)

        embedding, places = table("byte_embedding", BYTE_VOCAB), table("byte_position", cfg.max_bytes)[:m]
        q, condition = self._queries(table, projection, byte_ids, byte_mask)
        key, value = projection("key", _IN, cfg.init_std), projection("value", _IN, 1 / math.sqrt(d))
        scale = 1 / math.sqrt(d // h)
        if cfg.pooling == "plain":
            e = jnp.take(embedding, byte_ids, axis=0) + places
            k, bias = key(e)
            k = (k + bias).reshape(*byte_ids.shape, h, -1)
            words = jnp.take(q, condition, axis=0)
            scores = jnp.einsum("bnqhd,bnmhd->bnmqh", words, k, preferred_element_type=jnp.float32) * scale
            weights = _softmax(scores, byte_mask)
            v, bias = value(e)
            v = (v + bias).reshape(*byte_ids.shape, h, -1)
            y = jnp.einsum("bnmqh,bnmhd->bnqhd", weights.astype(v.dtype), v)
        else:

            def tables(projected):
                of_bytes, of_places, bias = projected
                return of_bytes.reshape(-1, h, d // h), (of_places + bias).reshape(-1, h, d // h)

            def scored(rows):
                return jnp.einsum("cqhd,rhd->crqh", q, rows, preferred_element_type=jnp.float32) * scale

            of_bytes, of_places = map(scored, tables(key(embedding, places)))
            if q.shape[0] == 1:
                scores = jnp.take(of_bytes[0], byte_ids, axis=0) + of_places[0]
            else:
                scores = of_bytes[condition[..., None], byte_ids] + jnp.take(of_places, condition, axis=0)
            weights = _softmax(constrain(scores, None, None, "heads"), byte_mask)
            of_bytes, of_places = tables(value(embedding, places))
            w = weights.astype(of_bytes.dtype)
            v = constrain(jnp.take(of_bytes, byte_ids, axis=0), None, "heads", "head_dim")
            y = jnp.einsum("bnmqh,bnmhd->bnqhd", w, v) + jnp.einsum("bnmqh,mhd->bnqhd", w, of_places)
        output = _Projection(d, _OUT, 1 / math.sqrt(d), cfg.dtype, cfg.param_dtype, name="output")
        y = sum(output(y.reshape(*y.shape[:2], -1)))
        if cfg.pool_mlp_dim:
            hidden = cfg.linear(cfg.pool_mlp_dim, ("d_model", "mlp"), cfg.init_std, True, "up")(y)
            y = y + cfg.linear(d, ("mlp", "d_model"), cfg.init_std, True, "down")(gelu(constrain(hidden, "mlp")))
        if cfg.pool_norm:
            y = Norm("layernorm", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")(y)
        return constrain(y, "d_model")

    def _queries(self, table, projection, byte_ids, byte_mask):
        """Projected queries [conditions, queries, heads, head_dim], and the condition of each word [batch, words]."""
        cfg = self.config
        q, condition = table("query", cfg.num_queries)[None], jnp.zeros(byte_ids.shape[:2], jnp.int32)
        if cfg.query == "length":
            q = q + table("query_length", cfg.max_bytes)[:, None]
            condition = jnp.maximum(byte_mask.sum(-1), 1) - 1
        elif cfg.query == "first_byte":
            q = q + table("query_first_byte", BYTE_VOCAB)[:, None]
            condition = byte_ids[..., 0]
        if cfg.query != "constant":
            q = sum(projection("query_projection", _IN, cfg.init_std)(q))
        return q.reshape(*q.shape[:2], cfg.pool_heads, -1), condition


_IN, _OUT = ("d_model", "heads"), ("heads", "d_model")


def _softmax(scores, mask):
    """Softmax over bytes; uniform for a word without real ones."""
    return jax.nn.softmax(jnp.where(mask[..., None, None], scores, -1e30), axis=2)


class Byte2Word(nn.Module):
    """Bytes of words to hidden states of words; the methods `pieces` and `classes` are heads on them."""

    config: Byte2WordConfig

    def setup(self):
        cfg = self.config

        def table(name, rows, axis=None):
            init = nn.with_logical_partitioning(nn.initializers.truncated_normal(cfg.init_std), (axis, "d_model"))
            value = self.param(name, init, (rows, cfg.d_model), cfg.param_dtype)
            return gather(value.astype(cfg.dtype), axis, "d_model")

        def norm():
            return Norm("layernorm", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype)

        def linear(features, axes):
            return cfg.linear(features, axes, cfg.init_std, True, None)

        self.pool = BytePooling(cfg)
        self.position_embedding = table("position_embedding", cfg.max_length)
        self.type_embedding = table("type_embedding", cfg.type_vocab_size)
        self.embedding_norm = norm()
        self.embedding_dropout = nn.Dropout(cfg.dropout)
        self.stack = Stack(cfg)
        if cfg.piece_head:
            if not cfg.vocab_size:
                raise ValueError("vocab_size is 0; it must be the number of pieces.")
            self.piece_position = table("piece_position", cfg.max_pieces)
            self.head_dense, self.head_norm = linear(cfg.d_model, ("d_model", "channels")), norm()
            self.head_matrix = table("head_matrix", cfg.vocab_size, "vocab")
            bias = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", bias, (cfg.vocab_size,), cfg.param_dtype)
        if cfg.num_classes:
            self.classifier_dense = linear(cfg.d_model, ("d_model", "channels"))
            self.classifier = linear(cfg.num_classes, ("d_model", "classes"))

    def __call__(
        self,
        byte_ids: Int[Array, "batch words bytes"],
        byte_mask: Shaped[Array, "batch words bytes"],
        word_mask: Shaped[Array, "batch words"] | None = None,
        *,
        positions: Int[Array, "batch words"] | None = None,
        types: Int[Array, "batch words"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch words d_model"]:
        """Hidden states after the last block.

        Args:
          byte_ids: bytes below 256; from 256 on, the symbols of `jaxtok.tokenizers.byte_words`.
          byte_mask: true for real symbols. A word without any pools all symbols equally; `word_mask` should hide it.
          word_mask: true for words, false for padding, which words do not see. Default: there is no padding.
          positions: of the words; default: 0, 1, ...
          types: ids of the types (BERT's first and second sentence); default: 0.

        Raises:
          ValueError: more words, or more bytes in a word, than the model has positions for.
        """
        return self.encode(
            self.pool(byte_ids, byte_mask), word_mask, positions=positions, types=types, deterministic=deterministic
        )

    def encode(self, words, word_mask=None, *, positions=None, types=None, deterministic: bool = True):
        """Hidden states from word vectors [batch, words, d_model], which come from `pool` or from a `WordTable`."""
        cfg, (batch, length) = self.config, words.shape[:2]
        if length > cfg.max_length:
            raise ValueError(f"there are {length} words in a row, but the model's max_length is {cfg.max_length}.")
        positions = jnp.broadcast_to(jnp.arange(length) if positions is None else positions, (batch, length))
        x = words + jnp.take(self.position_embedding, positions, axis=0)
        x = x + jnp.take(self.type_embedding, jnp.zeros((batch, length), jnp.int32) if types is None else types, axis=0)
        x = self.embedding_dropout(constrain(self.embedding_norm(x), "d_model"), deterministic)
        segments = None if word_mask is None else (word_mask > 0).astype(jnp.int32)
        x, _ = self.stack(x, positions, segments, deterministic=deterministic)
        return x

    def vectors(self, byte_ids, byte_mask):
        """The words' vectors [batch, words, d_model], which depend only on their bytes."""
        return self.pool(byte_ids, byte_mask)

    def pieces(
        self, hidden: Float[Array, "batch slots d_model"], number: Int[Array, "batch slots"] | None = None
    ) -> Float[Array, "batch slots ... vocab"]:
        """Logits (float32) of piece `number` of each word; by default of all `max_pieces`, on an axis of their own."""
        if number is None:
            u = hidden[:, :, None] + self.piece_position
        else:
            u = hidden + jnp.take(self.piece_position, number, axis=0)
        y = self.head_norm(gelu(self.head_dense(u)))
        logits = jnp.einsum("...d,vd->...v", y, self.head_matrix, preferred_element_type=jnp.float32) + self.head_bias
        return constrain(logits, *[None] * (logits.ndim - 3), "vocab")

    def classes(self, hidden: Float[Array, "batch words d_model"]) -> Float[Array, "batch classes"]:
        """Logits (float32) of the text's class, from its first word, which is [CLS]."""
        return self.classifier(jnp.tanh(self.classifier_dense(hidden[:, 0]))).astype(jnp.float32)

    def everything(self, byte_ids, byte_mask, word_mask=None, **kwargs):
        """The outputs of all heads that the config asks for; `init` calls this to make all parameters."""
        heads = {"hidden": self(byte_ids, byte_mask, word_mask, **kwargs)}
        if self.config.piece_head:
            heads["pieces"] = self.pieces(heads["hidden"])
        if self.config.num_classes:
            heads["classes"] = self.classes(heads["hidden"])
        return heads


def init_params(config: Byte2WordConfig, rng: jax.Array) -> Params:
    """All parameters, those of the heads too, as plain arrays."""
    ids = jnp.full((1, 1, 1), CLS, jnp.int32)
    return nn.meta.unbox(Byte2Word(config).init(rng, ids, jnp.ones_like(ids), method="everything")["params"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteWords(WordModeling):
    """Byte2Word's objective: to predict each piece of a masked word from the word's state and the piece's number."""

    model: Byte2WordConfig

    def __post_init__(self):
        super().__post_init__()
        if not self.model.piece_head:
            raise ValueError("model.piece_head is False; it must be True, as this head predicts the pieces.")

    def module(self) -> Byte2Word:
        return Byte2Word(self.model)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        words = batch["words"]
        return self.module().init(rng, words, symbol_mask(words), batch["mask"], method="everything")["params"]

    def predict(self, params: Params, batch: Batch, rng: jax.Array, train: bool = False) -> tuple[Predicted, Slots]:
        choose, swap, dropout = jax.random.split(rng, 3)
        slots, draws = choose_words(choose, batch, self.masking)
        read = self.masked(batch, slots, draws, swap)
        apply = functools.partial(self.module().apply, {"params": params})
        rngs = {"dropout": dropout} if train else None
        hidden = apply(read, symbol_mask(read), batch["mask"], deterministic=not train, rngs=rngs)
        logits = apply(take(hidden, slots.places), method="pieces")
        return score_pieces(logits, take(batch["pieces"], slots.places), slots.weights), slots

    def masked(self, batch: Batch, slots: Slots, draws, rng: jax.Array) -> Int[Array, "batch length max_bytes"]:
        """The rows as the model reads them: a masked word is the one symbol MASK."""
        masking, words = self.masking, batch["words"]
        rows, length, m = words.shape
        swapped = jax.random.randint(rng, slots.places.shape, 0, rows * length)
        other = jnp.take(words.reshape(-1, m), swapped, axis=0)
        word = masking.candidates(other[..., 0], jnp.take(batch["mask"].reshape(-1), swapped))
        symbol = jnp.full((m,), PAD, words.dtype).at[0].set(MASK)
        is_mask = (draws < masking.mask_share) | ~word  # a word that would be swapped for padding is masked
        changed = slots.weights * (draws < masking.mask_share + masking.random_share)
        return put(words, slots.places, changed, jnp.where(is_mask[..., None], symbol, other))

    def features(self, params: Params, batch: Batch) -> Float[Array, "batch d_model"]:
        words, mask = batch["words"], batch["mask"]
        return mean_state(self.module().apply({"params": params}, words, symbol_mask(words), mask), mask)

    def input_params(self) -> int:
        """The number of parameters between bytes and word vectors."""
        return self.model.input_params()

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["words"].shape[:2]
        pieces = self.masking.slots(length) * self.model.max_pieces
        return 3 * rows * (length * self.model.flops(length) + pieces * self.model.head_flops())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteWordsClassification(TextClassification):
    """Fine-tunes the whole model on texts with a class. A batch has

    words   int32    [batch, length, max_bytes]; the first word of each row is [CLS]
    mask    float32  [batch, length], 1 for words, 0 for padding
    labels  int32    [batch]
    """

    model: Byte2WordConfig

    def module(self) -> Byte2Word:
        return Byte2Word(self.model)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        words = batch["words"]
        return self.module().init(rng, words, symbol_mask(words), batch["mask"], method="everything")["params"]

    def logits(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> Float[Array, "batch classes"]:
        words, apply = batch["words"], functools.partial(self.module().apply, {"params": params})
        rngs = None if rng is None else {"dropout": rng}
        hidden = apply(words, symbol_mask(words), batch["mask"], deterministic=rng is None, rngs=rngs)
        return apply(hidden, method="classes")

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass."""
        rows, length = batch["words"].shape[:2]
        return 3 * rows * length * self.model.flops(length)


class WordTable:
    """The vectors of words, each of which is computed once, as it depends only on its bytes."""

    def __init__(self, config: Byte2WordConfig, params: Params):
        self._config, self._params = config, params
        self._number: dict[bytes | int, int] = {}
        self._vectors = np.zeros((0, config.d_model), np.float32)
        self._pool = jax.jit(functools.partial(Byte2Word(config).apply, method="vectors"))

    def __len__(self) -> int:
        return len(self._number)

    def __call__(self, words: Sequence[bytes | int]) -> Float[np.ndarray, "words d_model"]:
        """The vectors of these words, for `Byte2Word.encode`; a word given as a number is a symbol, such as CLS."""
        new = [word for word in dict.fromkeys(words) if word not in self._number]
        if new:
            ids, _ = word_array(new, self._config.max_bytes)
            size = 1 << (len(new) - 1).bit_length()  # few shapes, few compilations
            ids = np.concatenate([ids, np.full((size - len(new), ids.shape[1]), PAD, np.int32)])[None]
            vectors = np.asarray(self._pool({"params": self._params}, ids, symbol_mask(ids))[0, : len(new)])
            self._number |= {word: len(self._number) + i for i, word in enumerate(new)}
            self._vectors = np.concatenate([self._vectors, vectors.astype(np.float32)])
        return self._vectors[[self._number[word] for word in words]]


PUBLISHED = {"base": Byte2WordConfig()}
"""BERT-base's body; the paper's other sizes could not be confirmed."""
