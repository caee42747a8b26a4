"""The Q-Former (BLIP-2, arXiv 2301.12597), and the causal one of SEED (arXiv 2307.08041, section 3.1).

It is a BERT with a few learned queries, which read an image by cross-attention in every second layer and share
self-attention with a text. Queries and text have an MLP each. It runs in four regimes:

1. queries only: query i sees the queries up to itself (causal), or all of them;
2. text only: every token sees all tokens that are not padding;
3. both: queries see queries as in 1, and all else is open, but for padding;
4. a text after queries: it is causal, and sees the keys and values of all queries, which ran before it as in 1.

The authors' code makes queries causal if and only if there are 32 of them; here `causal` says it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxtok.axes import constrain, gather
from jaxtok.nn.activations import gelu
from jaxtok.nn.linear import MLP, Linear, LinearStack
from jaxtok.nn.transformer import REMAT_POLICIES, MultiHead

MASKED = -10000.0
"""What is added to the score of a key that is not seen. A row that sees nothing attends as if it saw everything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig(LinearStack):
    """Defaults: SEED's, of the size of BERT-base."""

    num_queries: int = 32
    causal: bool = True
    """Whether a query sees only the queries up to itself."""
    cross_every: int = 2
    """Layers 0, n, 2 n, ... have cross-attention, for this n."""
    context_width: int = 1408
    """The channels of what is read by cross-attention."""
    vocab_size: int = 30523
    """The tokens of texts: BERT's, and a last one that begins a caption (bos). 0: there are no texts."""
    max_positions: int = 512
    norm_eps: float = 1e-12
    post_norm: bool = True
    rotary_fraction: float = 0.0
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        for field in ("num_queries", "cross_every", "context_width", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be positive, or 0 for no texts.")

    @property
    def output_init_std(self) -> float:
        return self.init_std

    def linear(self, features: int, axes: tuple[str, str], std: float, bias: bool | None, name: str | None) -> Linear:
        """A projection; an `init_std` of 0 stands for 1 / sqrt(fan-in), which narrow models need to learn at all."""
        if std:
            return super().linear(features, axes, std, bias, name)
        fan_in, dtypes = nn.initializers.lecun_normal(), {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Linear(features, axes, self.use_bias if bias is None else bias, fan_in, **dtypes, name=name)

    @property
    def bos_id(self) -> int:
        """The id that begins a caption."""
        return self.vocab_size - 1

    def without_text(self) -> QFormerConfig:
        """The config of the part that reads images."""
        return dataclasses.replace(self, vocab_size=0)

    def flops(self, context: int, tokens: int = 0) -> float:
        """The forward FLOPs of all queries with `context` states to read, or of that many tokens of text."""
        length = tokens or self.num_queries
        own = length * self.stack_flops(length)
        if tokens:
            return own
        crossed = -(-self.num_layers // self.cross_every)
        per = 2 * self.d_model * (2 * length * self.d_model + 2 * context * self.context_width)
        return own + crossed * (per + 4 * length * context * self.d_model)


@flax.struct.dataclass
class _Call:
    """The arguments that all layers of a call share."""

    bias: Float[Array, "#batch 1 #length slots"]
    image: Float[Array, "batch context width"] | None
    image_mask: Bool[Array, "batch context"] | None
    queries: int = flax.struct.field(pytree_node=False, default=0)
    keep: bool = flax.struct.field(pytree_node=False, default=False)
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)


class _Attention(MultiHead):
    """Attention of x to itself after what came before, or to a context; and its keys and values."""

    @nn.compact
    def __call__(self, x, context=None, past=None, *, deterministic, **options):
        cfg, of = self.config, x if context is None else context
        q = self.heads(x, "query", cfg.num_heads, deterministic)
        k, v = (self.heads(of, group, cfg.kv_heads, deterministic) for group in ("key", "value"))
        kept = (k, v)
        if past is not None:
            k, v = (jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in zip(past, kept))
        return self.output(self.attend(q, k, v, deterministic, causal=False, **options), deterministic), kept


class _Layer(nn.Module):
    """Self-attention of all tokens; then, for queries, cross-attention and their MLP, and for text its own MLP."""

    config: QFormerConfig
    cross: bool

    @nn.compact
    def __call__(self, x, past, call: _Call):
        cfg = self.config

        def added(x, y, name):
            y = nn.Dropout(cfg.dropout)(constrain(y, "d_model"), call.deterministic)
            return cfg.norm_module(f"norm_{name}")(x + y)

        y, kept = _Attention(cfg, name="attention")(x, past=past, bias=(call.bias,), deterministic=call.deterministic)
        x = added(x, y, "attention")
        parts, n = [], call.queries
        if n:
            q = x[:, :n]
            if self.cross:
                seen = jnp.ones((1, call.image.shape[1]), bool) if call.image_mask is None else call.image_mask
                visible = jnp.broadcast_to(seen[:, None, None], (len(seen), 1, n, seen.shape[1]))
                y, _ = _Attention(cfg, name="cross")(q, call.image, visible=visible, deterministic=call.deterministic)
                q = added(q, y, "cross")
            parts.append(added(q, MLP(cfg, cfg.d_model, name="query_ffn")(q), "query"))
        if x.shape[1] > n:
            t = x[:, n:]
            parts.append(added(t, MLP(cfg, cfg.d_model, name="text_ffn")(t), "text"))
        return jnp.concatenate(parts, axis=1), kept if call.keep else None


class _Group(nn.Module):
    """A layer with cross-attention and those without that follow it."""

    config: QFormerConfig
    layers: int

    @nn.compact
    def __call__(self, x, past, call: _Call):
        kept = []
        for number in range(self.layers):
            before = None if past is None else past[number]
            x, new = _Layer(self.config, cross=number == 0, name=f"layer_{number}")(x, before, call)
            kept.append(new)
        return x, tuple(kept)


class QFormer(nn.Module):
    """Queries and texts to hidden states."""

    config: QFormerConfig

    def setup(self):
        cfg = self.config
        init = nn.initializers.normal(cfg.init_std or cfg.d_model**-0.5)

        def table(name, rows, axis):
            value = self.param(
                name, nn.with_logical_partitioning(init, (axis, "d_model")), (rows, cfg.d_model), cfg.param_dtype
            )
            return gather(value.astype(cfg.dtype), axis, "d_model")

        self.queries = table("queries", cfg.num_queries, None)
        self.norm_embedding = cfg.norm_module()
        self.embedding_dropout = nn.Dropout(cfg.dropout)
        if cfg.vocab_size:
            self.embedding = table("embedding", cfg.vocab_size, "vocab")
            self.position_embedding = table("position_embedding", cfg.max_positions, None)
            self.head_dense = cfg.linear(cfg.d_model, ("d_model", "channels"), cfg.init_std, True, None)
            self.head_norm = cfg.norm_module()
            bias = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", bias, (cfg.vocab_size,), cfg.param_dtype)
        group: Any = _Group
        if cfg.remat != "none":
            group = nn.remat(group, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        groups, rest = divmod(cfg.num_layers, cfg.cross_every)
        if groups:
            scan = nn.scan(
                group,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=groups,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.groups = scan(cfg, cfg.cross_every)
        if rest:
            self.rest = group(cfg, rest)

    def __call__(
        self,
        image: Float[Array, "batch context width"] | None = None,
        tokens: Int[Array, "batch length"] | None = None,
        mask: Shaped[Array, "batch length"] | None = None,
        *,
        image_mask: Bool[Array, "batch context"] | None = None,
        past: Any = None,
        keep: bool = False,
        queries: int | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch tokens d_model"], Any]:
        """Hidden states of the queries, if there is an image, and of the tokens, if there are some.

        Args:
          image: what the queries read.
          mask: 1 for real tokens, 0 for padding; default: all are real.
          image_mask: which parts of the image are there; default: all.
          past: the keys and values of queries that ran before, for regime 4.
          keep: whether the keys and values of self-attention are returned, for `past`.
          queries: how many of the queries run, the first ones; default: all.

        Returns:
          Hidden states, and keys and values or None.

        Raises:
          ValueError: there is neither an image nor a text, or the text is longer than the positions.
        """
        cfg, count = self.config, 0
        parts = []
        if image is not None:
            count = cfg.num_queries if queries is None else queries
            if not 1 <= count <= cfg.num_queries:
                raise ValueError(f"queries is {count}; it must be from 1 to the {cfg.num_queries} of the model.")
            parts.append(jnp.broadcast_to(self.queries[:count], (len(image), count, cfg.d_model)))
        if tokens is not None:
            if not cfg.vocab_size:
                raise ValueError("vocab_size is 0: this Q-Former reads no texts.")
            if tokens.shape[1] > cfg.max_positions:
                raise ValueError(f"a text has {tokens.shape[1]} tokens; there are {cfg.max_positions} positions.")
            words = jnp.take(self.embedding, tokens, axis=0) + self.position_embedding[: tokens.shape[1]]
            parts.append(words)
            mask = jnp.ones(tokens.shape) if mask is None else mask
        if not parts:
            raise ValueError("there is neither an image nor a text; give one of them.")
        x = jnp.concatenate(parts, axis=1)
        x = self.embedding_dropout(self.norm_embedding(x), deterministic)
        before = 0 if past is None else _slots(past)
        bias = attention_bias(count, mask if tokens is not None else None, before, cfg.causal)
        image = None if image is None else image.astype(cfg.dtype)
        call = _Call(bias, image, image_mask, count, keep, deterministic)
        of_groups, of_rest = (None, None) if past is None else past
        kept: list[Any] = [None, None]
        if hasattr(self, "groups"):
            x, kept[0] = self.groups(x, of_groups, call)
        if hasattr(self, "rest"):
            x, kept[1] = self.rest(x, of_rest, call)
        return x, tuple(kept) if keep else None

    def logits(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length vocab"]:
        """Logits of the next token in float32, from hidden states of text."""
        x = self.head_norm(gelu(self.head_dense(x)))
        logits = jnp.einsum("bld,vd->blv", x, self.embedding, preferred_element_type=jnp.float32)
        return constrain(logits + self.head_bias.astype(jnp.float32), "vocab")

    def caption(
        self,
        image: Float[Array, "batch context width"],
        tokens: Int[Array, "batch length"],
        mask: Any = None,
        **options: Any,
    ) -> Float[Array, "batch length vocab"]:
        """The logits of a caption's next tokens, which sees the image through the queries' keys and values only
        (regime 4)."""
        image_mask = options.pop("image_mask", None)
        _, past = self(image, image_mask=image_mask, keep=True, **options)
        x, _ = self(None, tokens, mask, past=past, **options)
        return self.logits(x)

    def all_parts(self, image, tokens=None):
        """Runs everything once, for initialisation."""
        x, _ = self(image, tokens)
        return x if tokens is None else self.logits(x)


def _slots(past: Any) -> int:
    of_groups, of_rest = past
    return of_rest[0][0].shape[1] if of_groups is None else of_groups[0][0].shape[2]


def attention_bias(
    queries: int, mask: Shaped[Array, "batch length"] | None = None, before: int = 0, causal: bool = True
) -> Float[Array, "#batch 1 #total slots"]:
    """What is added to the scores of self-attention: 0 where a key is seen, and otherwise `MASKED`.

    Two reasons for not seeing a key do not add up.

    Args:
      queries: the number of queries that run.
      mask: 1 for the real tokens of the text; None: there is no text.
      before: the number of cached queries, which a text sees all of (regime 4).
    """
    among = jnp.tril(jnp.ones((queries, queries))) if causal else jnp.ones((queries, queries))
    if mask is None:
        return (1 - among)[None, None] * MASKED
    real, length = mask.astype(jnp.float32)[:, None, None], mask.shape[1]
    if before:
        seen = jnp.concatenate([jnp.ones((length, before)), jnp.tril(jnp.ones((length, length)))], axis=1)
        real = jnp.concatenate([jnp.ones((len(mask), 1, 1, before)), real], axis=-1)
    elif queries:
        seen = jnp.ones((queries + length,) * 2).at[:queries, :queries].set(among)
        real = jnp.concatenate([jnp.ones((len(mask), 1, 1, queries)), real], axis=-1)
    else:
        seen = jnp.ones((1, length))
    return (1 - seen * real) * MASKED
