"""A decoder-only language model around any stack: embedding, blocks, final norm, head. It fills the CausalLM waist.

From input embeddings to hidden states it is a module of its own, `Backbone`, for systems that embed something else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.nn.cache import KVCache, check_row, entered
from jaxtok.nn.norms import NORMS
from jaxtok.nn.relative import RelativeBias, distance_buckets
from jaxtok.nn.transformer import Stack, StackConfig, layer_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """A decoder of any kind; a subclass says which, by its `projection`."""

    vocab_size: int = 0
    """Rows of the embedding, all of which take part in the softmax; 0: the tokenizer's ids, rounded up to 128."""
    max_length: int = 2048
    """The longest context, in tokens."""
    final_norm: str = ""
    """The norm before the head; empty: the same as `norm`."""
    tie_embeddings: bool = True
    learned_positions: bool = False
    """Whether a learned vector for each of the `max_length` positions is added to the embedding."""
    relative_buckets: int = 0
    """Buckets of distances, each with a learned bias on attention scores that all layers share (T5); 0: no bias."""
    relative_distance: int = 128
    """The distance from which on all are in the last bucket."""
    scale_embeddings: bool = False
    """Whether the embedding is multiplied by sqrt(d_model), a factor that is rounded to `dtype` (Gemma)."""

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be positive, or 0 to take the tokenizer's.")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 1.")
        if self.final_norm and self.final_norm not in NORMS:
            raise ValueError(f"final_norm is {self.final_norm!r}; it must be one of {', '.join(NORMS)}.")
        if self.relative_buckets < 0:
            raise ValueError(f"relative_buckets is {self.relative_buckets}; it must be positive, or 0 for no bias.")
        if self.relative_buckets:
            distance_buckets(self.relative_buckets, self.relative_distance)

    def module(self) -> nn.Module:
        """The language model."""
        return Decoder(self)

    def flops(self, length: int) -> float:
        """Forward FLOPs of one token at a context of `length`: those of the blocks and the head."""
        return self.stack_flops(length) + 2 * self.vocab_size * self.d_model


class Backbone(nn.Module):
    """Input embeddings to hidden states: positions, blocks, final norm. It has no vocabulary."""

    config: DecoderConfig

    def setup(self):
        cfg = self.config
        self.stack = Stack(cfg)
        if cfg.learned_positions:
            init = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), (None, "d_model"))
            self.positions = self.param("positions", init, (cfg.max_length, cfg.d_model), cfg.param_dtype)
        if cfg.relative_buckets:
            self.relative_bias = RelativeBias(
                cfg.num_heads, cfg.relative_buckets, cfg.relative_distance, cfg.causal, param_dtype=cfg.param_dtype
            )
        self.final_norm = cfg.norm_module(kind=cfg.final_norm)
        self.embedding_dropout = nn.Dropout(cfg.dropout)

    def __call__(self, x: Float[Array, "batch length d_model"], **options: Any):
        """As `hidden`."""
        return self.hidden(x, **options)

    def hidden(
        self,
        x: Float[Array, "batch length d_model"],
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        layers: tuple[int, int] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """Hidden states after the final norm, from input embeddings; and the cache. See `jaxtok.protocols.CausalLM`.

        Args:
          positions: default: 0, 1, ..., or those after what each row's cache holds.
          segments: tokens attend within their own segment only; not together with a cache.
          mask: who sees whom among these tokens; default: each sees those up to itself.
          layers: only these run; default: all.
          cache: keys and values of the tokens before, from `init_cache` or an earlier call.

        Raises:
          ValueError: more tokens than max_length, or segments together with a cache.
        """
        cfg, (batch, length) = self.config, x.shape[:2]
        check_row(length, cfg.max_length, segments, cache)
        first, end = layer_range(layers, cfg.num_layers)
        # The bias takes indices in the row for positions: within a segment distances are the same, and rows share it.
        places, known = entered(x, None if segments is not None else positions, cache, first)
        positions = jnp.broadcast_to(places if positions is None else positions, (batch, length))
        if first == 0:
            if cfg.learned_positions:
                x = x + jnp.take(self.positions.astype(x.dtype), positions, axis=0)
            x = self.embedding_dropout(x, deterministic)
        bias = ()
        if cfg.relative_buckets:
            bias = (self.relative_bias(places, places if cache is None else known.positions),)
        x, cache = self.stack(x, positions, segments, cache, deterministic, bias=bias, mask=mask, layers=(first, end))
        return self.final_norm(x) if end == cfg.num_layers else x, cache

    def init_cache(self, batch: int, length: int) -> KVCache:
        return self.config.init_cache(batch, length)


class TokensToLogits(nn.Module):
    """The embedding and the head around `hidden`: what causal models share whose tokens have a vector each."""

    config: Any

    def setup(self):
        cfg = self.config
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0; it must be the number of rows of the embedding.")

        def matrix(name):
            init = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), ("vocab", "d_model"))
            value = self.param(name, init, (cfg.vocab_size, cfg.d_model), cfg.param_dtype)
            return gather(value.astype(cfg.dtype), "vocab", "d_model")

        self.embedding = matrix("embedding")
        self.head_matrix = self.embedding if cfg.tie_embeddings else matrix("head_matrix")

    def __call__(
        self, tokens: Int[Array, "batch length"], **options: Any
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        """Logits of the token after each one (float32), and the cache with these tokens in it.

        Args:
          tokens: ids below vocab_size.
          options: see `hidden`.
        """
        x, cache = self.hidden(self.embed(tokens), **options)
        return self.head(x), cache

    def embed(self, tokens) -> Float[Array, "batch length d_model"]:
        """The input embeddings."""
        return constrain(jnp.take(self.embedding, tokens, axis=0), "d_model")

    def head(self, x) -> Float[Array, "batch length vocab"]:
        """Logits in float32, from hidden states after the final norm."""
        logits = jnp.einsum("bld,vd->blv", x, self.head_matrix, preferred_element_type=jnp.float32)
        return constrain(logits, "vocab")


class Decoder(TokensToLogits, Backbone):
    """Tokens to next-token logits; see `jaxtok.protocols.CausalLM`."""

    config: DecoderConfig

    def setup(self):
        Backbone.setup(self)
        super().setup()

    def embed(self, tokens) -> Float[Array, "batch length d_model"]:
        """The input embeddings."""
        x = super().embed(tokens)
        return x * jnp.asarray(self.config.d_model**0.5, x.dtype) if self.config.scale_embeddings else x


def init_params(model: nn.Module, rng: jax.Array, *inputs: Any) -> Any:
    """The parameters as plain arrays, without the boxes in which Linen keeps the names of their logical axes."""
    return nn.meta.unbox(model.init(rng, *inputs)["params"])
