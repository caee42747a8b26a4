"""The transformer stack that systems share; what a projection is, each of them says."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.kernels.attention import IMPLEMENTATIONS, Implementation
from jaxtok.nn.attention import attend, visible_slots, visible_tokens
from jaxtok.nn.cache import KVCache, entered
from jaxtok.nn.norms import NORMS, Norm, unit_length
from jaxtok.nn.rotary import RopeScaling, apply_rotary, apply_rotary_table, rotary_dim

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "projections": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


DTYPES = ("float32", "bfloat16", "float16")
PARAM_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes and options of a stack of blocks; a subclass says what a projection is."""

    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    num_kv_heads: int = 0
    """Heads of keys and values, each shared by as many queries; 0: as many as heads."""
    head_size: int = 0
    """Channels of a head; 0: d_model / num_heads."""
    norm: str = "layernorm"
    norm_eps: float = 0.0
    """0: the norm's own (`jaxtok.nn.norms.NORMS`)."""
    post_norm: bool = False
    """norm(x + f(x)) (BERT) instead of x + f(norm(x))."""
    causal: bool = True
    mask_keys: bool = False
    """Segments are 1 for real tokens and 0 for padding, and padding sees the real ones (encoders of Hugging Face)."""
    window: int = 0
    """A token sees so many at most, itself included; 0: all."""
    full_layers: tuple[int, ...] = ()
    """Layers without the window."""
    scale_scores: bool = True
    """Divide attention scores by sqrt(head_dim)."""
    scale_by_layer: bool = False
    """Divide them also by 1, 2, ... in the first, second, ... layer."""
    softmax1: bool = False
    """Attention weights exp(s_i) / (1 + sum_j exp(s_j))."""
    qk_norm: bool = False
    """An RMS norm on each head's queries and keys, in front of the rotation."""
    cosine_scores: bool = False
    """Queries and keys of length 1, behind the rotation; with `scale_scores` off, scores are their cosines."""
    cross: bool = False
    """Blocks also attend to a context (an encoder's states), between self-attention and MLP."""
    rotary_fraction: float = 0.25
    """The part of each head that is rotated; 0: no position embedding in the stack."""
    rotary_base: float = 10000.0
    rotary_scaling: RopeScaling | None = None
    rotary_table: bool = False
    """The rotation is given as a table for each call (`apply_rotary_table`) instead of by positions."""
    modulation: bool = False
    """A condition shifts and scales what comes out of a block's norms and gates what its parts add (DiT's adaLN)."""
    dropout: float = 0.0
    """On the embeddings and on what each part of a block adds to the residual stream."""
    drop_path: float = 0.0
    """A part of a block is left out of a row with a probability that rises linearly from 0 in the first layer to this
    in the last (stochastic depth, arXiv 1603.09382). If it is positive, it stands in for `dropout` in the blocks."""
    attention_dropout: float = 0.0
    """On attention weights."""
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of activations and matmul operands; norms, softmax and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "projections", "dots"] = "none"
    """What the backward pass finds stored in a block: everything; only its input; also what attention takes and gives;
    or all its matrix products."""
    attention: Implementation = "auto"
    """See `jaxtok.kernels.attention`."""
    unroll: int = 1
    """Layers in one iteration of the scan over layers: more compile longer and may run faster."""

    def __post_init__(self):
        for field in ("num_layers", "d_model", "num_heads", "unroll"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("num_kv_heads", "head_size", "window", "norm_eps"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.d_model % self.num_heads and not self.head_size:
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide d_model = {self.d_model}; set head_size too."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}."
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}, which is unknown; it can be {', '.join(NORMS)}.")
        for field in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1).")
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction is {self.rotary_fraction}; it must be in [0, 1].")
        rotated = rotary_dim(self.head_dim, self.rotary_fraction)
        if self.rotary_fraction and (rotated == 0 or rotated % 2):
            raise ValueError(
                f"rotary_fraction is {self.rotary_fraction}, which rotates {rotated} of the {self.head_dim} channels "
                "of a head; it must be a positive even number of channels (or the fraction 0)."
            )
        for field, allowed in (("dtype", DTYPES), ("param_dtype", PARAM_DTYPES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be {', '.join(allowed)}.")
        if self.modulation and self.post_norm:
            raise ValueError("modulation is True, but post_norm too; only blocks with the norm in front are modulated.")
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention is {self.attention!r}; it can be {', '.join(IMPLEMENTATIONS)}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; it can be {', '.join(REMAT_POLICIES)}.")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def output_init_std(self) -> float:
        """GPT-NeoX's `wang_init`: 2 / (layers sqrt(d))."""
        return 2 / self.num_layers / math.sqrt(self.d_model)

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        """The module that maps [..., d_model] to [..., features] in one of the places of `GROUPS`, or with a modulation
        from the condition, in the place "modulation"."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a projection is.")

    def projection_params(self) -> int:
        """Numbers in one block's projections, each of which costs 2 FLOPs a token in the forward pass."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a projection is.")

    def stack_flops(self, length: int) -> float:
        """Forward FLOPs of one token in the stack, at a context of `length` (counted whole, masked or not)."""
        return self.num_layers * (2 * self.projection_params() + 4 * self.num_heads * self.head_dim * length)

    def init_cache(self, batch: int, slots: int, context_slots: int = 0) -> KVCache:
        """An empty cache of the stack's keys and values, and of those of its context."""
        dtype = jnp.dtype(self.dtype)
        return KVCache.init(self.num_layers, batch, slots, self.kv_heads, self.head_dim, dtype, context_slots)

    def norm_module(self, name: str | None = None, kind: str = "") -> Norm:
        """A norm of the stack's kind, or of another."""
        return Norm(kind or self.norm, eps=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class _Attention(nn.Module):
    """What self- and cross-attention have in common: projections to heads, and from them."""

    config: StackConfig

    def heads(self, x, group, count, deterministic):
        cfg = self.config
        y = cfg.projection(group, count * cfg.head_dim, name=group)(x, deterministic=deterministic)
        axis = "heads" if count == cfg.num_heads else "kv_heads"
        y = constrain(y.reshape(*y.shape[:-1], count, cfg.head_dim), axis, "head_dim")
        if cfg.qk_norm and group in ("query", "key"):
            y = cfg.norm_module(f"{group}_norm", "rms")(y)
        return y

    def sow_scored(self, q, k):
        """For losses on attention scores, q k^T / sqrt(head_dim)."""
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)

    def options(self, deterministic):
        cfg = self.config
        options: dict[str, Any] = {"softmax1": cfg.softmax1}
        if cfg.attention_dropout and not deterministic:
            options |= {"dropout": cfg.attention_dropout, "rng": self.make_rng("dropout")}
        return options

    def output(self, y, deterministic):
        cfg = self.config
        y = constrain(y, "heads", "head_dim").reshape(*y.shape[:-2], cfg.num_heads * cfg.head_dim)
        y = cfg.projection("output", cfg.d_model, name="output")(y, deterministic=deterministic)
        return checkpoint_name(y, "projection")


class SelfAttention(_Attention):
    """Multi-head attention between tokens, between projections."""

    @nn.compact
    def __call__(
        self, x, positions, segments, cache: KVCache | None, layer, deterministic, bias=(), rotary=None, mask=None
    ):
        cfg = self.config
        q = self.heads(x, "query", cfg.num_heads, deterministic)
        k, v = (self.heads(x, group, cfg.kv_heads, deterministic) for group in ("key", "value"))
        if cfg.rotary_table:
            q, k = apply_rotary_table(q, rotary), apply_rotary_table(k, rotary)
        elif cfg.rotary_fraction:
            rotate = functools.partial(
                apply_rotary, fraction=cfg.rotary_fraction, base=cfg.rotary_base, scaling=cfg.rotary_scaling
            )
            q, k = rotate(q, positions), rotate(k, positions)
        if cfg.cosine_scores:
            q, k = unit_length(q), unit_length(k)
        if not cfg.scale_scores:
            q = q * math.sqrt(cfg.head_dim)
        if cfg.scale_by_layer:
            q = q / (layer + 1).astype(q.dtype)
        window = cfg.window or None
        if cfg.window and cfg.full_layers:
            full = jnp.isin(layer, jnp.array(cfg.full_layers, jnp.int32))
            window = jnp.where(full, jnp.iinfo(jnp.int32).max // 2, cfg.window)
        if cfg.mask_keys and segments is not None:
            segments = (jnp.ones_like(segments), segments)
        self.sow_scored(q, k)
        # Where layers have kept other slots, each has a bias of its own.
        bias = tuple(b[layer] if b.ndim == 5 else b for b in bias)
        options = {"bias": bias, **self.options(deterministic)}
        if cache is not None:
            cache = cache.append(layer, k, v)
            k, v = (stored[layer].astype(q.dtype) for stored in (cache.keys, cache.values))
            y = attend(q, k, v, visible=visible_slots(cache, layer, positions, mask=mask, window=window), **options)
        elif mask is not None:
            y = attend(q, k, v, visible=visible_tokens(mask, positions, window, segments), **options)
        else:
            options |= {"causal": cfg.causal, "window": window, "segments": segments}
            y = attend(q, k, v, implementation=cfg.attention, **options)
        return self.output(y, deterministic), cache


class CrossAttention(_Attention):
    """Multi-head attention from tokens to a context, whose keys and values a cache keeps from the first call on."""

    @nn.compact
    def __call__(self, x, context, bias, cache: KVCache | None, layer, deterministic):
        cfg = self.config
        q = self.heads(x, "query", cfg.num_heads, deterministic)
        if not cfg.scale_scores:
            q = q * math.sqrt(cfg.head_dim)
        if context is None:
            k, v = (stored[layer].astype(q.dtype) for stored in cache.context)
        else:
            k, v = (self.heads(context, group, cfg.kv_heads, deterministic) for group in ("key", "value"))
            if cache is not None:
                keys, values = cache.context
                cache = cache.replace(
                    context=(
                        keys.at[layer].set(k.astype(keys.dtype)),
                        values.at[layer].set(v.astype(values.dtype)),
                    )
                )
        self.sow_scored(q, k)
        y = attend(q, k, v, causal=False, bias=bias, **self.options(deterministic))
        return self.output(y, deterministic), cache


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); or with the norms behind the sums."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        carry,
        layer,
        positions,
        segments,
        deterministic,
        bias=(),
        context=None,
        context_bias=(),
        rotary=None,
        condition=None,
        mask=None,
    ):
        cfg = self.config
        x, cache = carry

        def dropout(y):
            y = constrain(y, "d_model")
            if not cfg.drop_path:
                return nn.Dropout(cfg.dropout)(y, deterministic)
            if deterministic:
                return y
            kept = 1 - cfg.drop_path * layer / max(cfg.num_layers - 1, 1)
            rows = jax.random.bernoulli(self.make_rng("dropout"), kept, (y.shape[0], 1, 1))
            return jnp.where(rows, y / kept, 0).astype(y.dtype)

        if cfg.modulation:
            project = cfg.projection("modulation", 6 * cfg.d_model, name="modulation")
            parts = jnp.split(project(nn.silu(condition)), 6, axis=-1)
            modulations = {"attention": parts[:3], "ffn": parts[3:]}

        def around(part, name):  # residual and norm
            norm = cfg.norm_module(f"norm_{name}")
            if cfg.modulation and name in modulations:
                shift, scale, gate = modulations[name]
                return x + dropout(gate * part(norm(x) * (1 + scale) + shift))
            y = part(x if cfg.post_norm else norm(x))
            return norm(x + dropout(y)) if cfg.post_norm else x + dropout(y)

        def attention(y):
            nonlocal cache
            module = SelfAttention(cfg, name="attention")
            y, cache = module(y, positions, segments, cache, layer, deterministic, bias, rotary, mask)
            return y

        def cross_attention(y):
            nonlocal cache
            y, cache = CrossAttention(cfg, name="cross")(y, context, context_bias, cache, layer, deterministic)
            return y

        def ffn(y):
            return cfg.projection("ffn", cfg.d_model, name="ffn")(y, deterministic=deterministic)

        x = around(attention, "attention")
        if cfg.cross:
            x = around(cross_attention, "cross")
        x = around(ffn, "ffn")
        self.sow("intermediates", "hidden", x)
        return (x, cache), None


class Stack(nn.Module):
    """`num_layers` blocks with their parameters stacked along a first axis and scanned over."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        positions: Int[Array, "batch length"] | None,
        segments: Int[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        *,
        bias: tuple[Array, ...] = (),
        context: Float[Array, "batch slots d_context"] | None = None,
        context_bias: tuple[Array, ...] = (),
        rotary: Float[Array, "#batch length pairs 2"] | None = None,
        condition: Float[Array, "batch 1 d_model"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        layers: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """Returns the hidden states after the last block, and the cache with the new tokens in it.

        Args:
          positions: default: 0, 1, ..., or those after what each row's cache holds.
          bias: added to the scores of self-attention in every layer; see `attend`. With a fifth dimension before the
            others, each layer has its own.
          context: what `cross` attends to. With a cache that holds its keys and values already, it can be None.
          context_bias: as `bias`, for cross-attention.
          rotary: with `rotary_table`, the table that turns the queries and keys of these places.
          condition: with `modulation`, what every layer projects to its shifts, scales and gates.
          mask: who sees whom among these tokens, in place of causality; a cache's tokens are seen as without it.
          layers: (a, b), to run the layers from number a on and before number b only. With a cache, a = 0 gives it new
            tokens; with a > 0, x are the states of its newest tokens, which the earlier layers have already. Only the
            layers that run are written.

        Raises:
          ValueError: the config asks for a table or a condition, and there is none; or there are no such layers.
        """
        cfg = self.config
        first, end = layer_range(layers, cfg.num_layers)
        for name, needed, given in (("rotary", cfg.rotary_table, rotary), ("condition", cfg.modulation, condition)):
            if needed and given is None:
                raise ValueError(f"the stack's config needs the argument {name}; give it.")
        block: Any = Block
        if cfg.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False, static_argnums=(5,))
        if self.is_initializing():
            first, end = 0, cfg.num_layers
        elif first == end:
            return x, cache
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 9),
            length=end - first,
            unroll=min(cfg.unroll, end - first),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if end - first < cfg.num_layers:
            scan = nn.map_variables(scan, "params", lambda params: jax.tree.map(lambda leaf: leaf[first:end], params))
        positions, cache = entered(x, positions, cache, first)
        (x, cache), _ = scan(cfg, name="blocks")(
            (x, cache),
            jnp.arange(first, end),
            positions,
            segments,
            deterministic,
            bias,
            context,
            context_bias,
            rotary,
            condition,
            mask,
        )
        return x, cache


def layer_range(layers: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """The first layer that runs, and the one before which it ends.

    Raises:
      ValueError: there are no such layers.
    """
    first, end = layers or (0, count)
    if not 0 <= first <= end <= count:
        raise ValueError(f"layers is {layers}; it must be (a, b) with 0 <= a <= b <= {count}, the number of layers.")
    return first, end
