"""The transformer stack that systems share. Each system defines what a projection is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.kernels.attention import IMPLEMENTATIONS, Implementation
from jaxtok.nn.attention import attend, visible_slots, visible_tokens
from jaxtok.nn.cache import KVCache, entered
from jaxtok.nn.norms import NORMS, Norm
from jaxtok.nn.rotary import RopeScaling, apply_rotary, rotary_dim
from jaxtok.protocols import Params

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
    """Sizes and options of a stack of blocks; a subclass defines what a projection is."""

    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    num_kv_heads: int = 0
    """The number of heads of keys and values, each shared by equally many query heads; 0: as many as query heads."""
    head_size: int = 0
    """The channels of a head; 0: d_model / num_heads."""
    norm: str = "layernorm"
    norm_eps: float = 0.0
    """The epsilon of the norms; 0: the norm's own (`jaxtok.nn.norms.NORMS`)."""
    post_norm: bool = False
    """Whether a part f of a block gives norm(x + f(x)) (BERT) instead of x + f(norm(x))."""
    causal: bool = True
    mask_keys: bool = False
    """Whether segments are 1 for real tokens and 0 for padding, and padding sees the real ones (encoders of Hugging
    Face)."""
    window: int = 0
    """The most tokens that a token sees, itself included; 0: all."""
    scale_scores: bool = True
    """Whether attention scores are divided by sqrt(head_dim)."""
    qk_norm: bool = False
    """Whether a norm (`head_norm`) is applied to each head's queries and keys before the rotation."""
    rotary_fraction: float = 0.25
    """The part of each head that is rotated; 0: no position embedding in the stack."""
    rotary_base: float = 10000.0
    rotary_scaling: RopeScaling | None = None
    dropout: float = 0.0
    """The dropout of the embeddings and of what each part of a block adds to the residual stream."""
    attention_dropout: float = 0.0
    """The dropout of attention weights."""
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of activations and matmul operands; norms, softmax and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "projections", "dots"] = "none"
    """What a block stores for the backward pass. none: everything; full: only its input; projections: also the inputs
    and outputs of attention; dots: all its matrix products."""
    attention: Implementation = "auto"
    """The implementation of attention; see `jaxtok.kernels.attention`."""
    unroll: int = 1
    """The layers in one iteration of the scan over layers; more take longer to compile and may run faster."""

    RETIRED: ClassVar[dict[str, Any]] = {
        "cosine_scores": False,
        "cross": False,
        "drop_path": 0.0,
        "full_layers": (),
        "modulation": False,
        "rotary_table": False,
        "scale_by_layer": False,
        "softmax1": False,
    }
    """Fields that all stacks once had, and that only the systems that use them have now."""

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
            raise ValueError(f"norm is {self.norm!r}; it must be one of {', '.join(NORMS)}.")
        for field in ("dropout", "attention_dropout"):
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
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention is {self.attention!r}; it must be one of {', '.join(IMPLEMENTATIONS)}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; it must be one of {', '.join(REMAT_POLICIES)}.")

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
        """The module that maps [..., d_model] to [..., features] as query, key, value, output or ffn of a block."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a projection is.")

    def block(self) -> type[Block]:
        return Block

    def rotate(
        self,
        q: Float[Array, "batch length heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        positions: Int[Array, "#batch length"],
    ) -> tuple[Array, Array]:
        """Rotates queries and keys by their positions."""
        if not self.rotary_fraction:
            return q, k
        options = {"fraction": self.rotary_fraction, "base": self.rotary_base, "scaling": self.rotary_scaling}
        return apply_rotary(q, positions, **options), apply_rotary(k, positions, **options)

    def scored(self, q: Array, k: Array, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """Rotated queries and keys to ones whose products, divided by sqrt(head_dim), are the scores."""
        return q if self.scale_scores else q * math.sqrt(self.head_dim), k

    def softmax(self) -> Callable[[Array], Array] | None:
        """The function that turns scores in float32 into weights, in place of softmax; None: softmax."""
        return None

    def window_of(self, layer: Int[Array, ""]) -> int | Int[Array, ""] | None:
        """The window of a layer; None: it has none."""
        return self.window or None

    def projection_params(self) -> int:
        """The number of parameters in one block's projections; each costs 2 FLOPs per token in the forward pass."""
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

    def head_norm(self, name: str | None = None) -> Norm:
        """The norm of each head's queries, or of its keys."""
        return self.norm_module(name, "rms")


@flax.struct.dataclass
class Call:
    """The arguments that all blocks of a call share."""

    positions: Int[Array, "#batch length"]
    segments: Int[Array, "batch length"] | None = None
    mask: Bool[Array, "#batch length length"] | None = None
    bias: tuple[Array, ...] = ()
    condition: Any = None
    """A further argument, for a config's own block."""
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)


class MultiHead(nn.Module):
    """What self- and cross-attention have in common: projections to heads, and from them."""

    config: StackConfig

    def heads(self, x, group, count, deterministic, decoding=False):
        cfg = self.config
        y = cfg.projection(group, count * cfg.head_dim, name=group)(x, deterministic=deterministic)
        if decoding:
            # Else the TPU compiler carries the reshape over to the weights, and copies them out of the stack each step.
            y = jax.lax.platform_dependent(y, tpu=jax.lax.optimization_barrier, default=lambda y: y)
        axis = "heads" if count == cfg.num_heads else "kv_heads"
        y = constrain(y.reshape(*y.shape[:-1], count, cfg.head_dim), axis, "head_dim")
        if cfg.qk_norm and group in ("query", "key"):
            y = cfg.head_norm(f"{group}_norm")(y)
        return y

    def attend(self, q, k, v, deterministic, **options):
        """Attention between heads. It sows the queries and keys, for evictors and for losses on the scores."""
        cfg = self.config
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        if cfg.attention_dropout and not deterministic:
            options |= {"dropout": cfg.attention_dropout, "rng": self.make_rng("dropout")}
        return attend(q, k, v, softmax=cfg.softmax(), **options)

    def output(self, y, deterministic):
        cfg = self.config
        y = constrain(y, "heads", "head_dim").reshape(*y.shape[:-2], cfg.num_heads * cfg.head_dim)
        y = cfg.projection("output", cfg.d_model, name="output")(y, deterministic=deterministic)
        return checkpoint_name(y, "projection")


class SelfAttention(MultiHead):
    """Multi-head attention between tokens, between projections."""

    @nn.compact
    def __call__(self, x, cache: KVCache | None, layer, call: Call):
        cfg, positions, segments = self.config, call.positions, call.segments
        q, k, v = (
            self.heads(x, group, count, call.deterministic, decoding=cache is not None)
            for group, count in (("query", cfg.num_heads), ("key", cfg.kv_heads), ("value", cfg.kv_heads))
        )
        q, k = cfg.scored(*cfg.rotate(q, k, positions), layer)
        window = cfg.window_of(layer)
        # Where layers have kept other slots, each has a bias of its own.
        options = {"bias": tuple(b[layer] if b.ndim == 5 else b for b in call.bias)}
        if cache is not None:
            cache = cache.append(layer, k, v)
            options["visible"] = visible_slots(cache, layer, positions, mask=call.mask, window=window)
            k, v = (stored[layer].astype(q.dtype) for stored in (cache.keys, cache.values))
        elif call.mask is not None:
            options["visible"] = visible_tokens(call.mask, positions, window, segments)
        else:
            if cfg.mask_keys and segments is not None:
                segments = (jnp.ones_like(segments), segments)
            options |= {"causal": cfg.causal, "window": window, "segments": segments}
            options["implementation"] = cfg.attention
        y = self.attend(q, k, v, call.deterministic, **options)
        return self.output(y, call.deterministic), cache


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); or with the norms after the sums."""

    config: StackConfig

    @nn.compact
    def __call__(self, carry, layer, call: Call):
        x, cache = carry
        for name, part in self.parts().items():
            x, cache = self.around(name, part, x, cache, layer, call)
        self.sow("intermediates", "hidden", x)
        return (x, cache), None

    def parts(self) -> dict[str, Callable]:
        """The parts of the block in their order; each maps (y, cache, layer, call) to what it adds, and the cache."""
        return {"attention": SelfAttention(self.config, name="attention"), "ffn": self.ffn}

    def ffn(self, y, cache, layer, call: Call):
        project = self.config.projection("ffn", self.config.d_model, name="ffn")
        return project(y, deterministic=call.deterministic), cache

    def around(self, name, part, x, cache, layer, call: Call):
        """x and the cache after a part, with its norm and its residual connection."""
        norm = self.config.norm_module(f"norm_{name}")
        y, cache = part(x if self.config.post_norm else norm(x), cache, layer, call)
        x = x + self.dropped(y, layer, call)
        return norm(x) if self.config.post_norm else x, cache

    def dropped(self, y, layer, call: Call):
        """y after dropout."""
        return nn.Dropout(self.config.dropout)(constrain(y, "d_model"), call.deterministic)


class ModulatedBlock(Block):
    """A block with DiT's adaLN (arXiv 2212.09748): x + gate part(norm(x) (1 + scale) + shift), for attention and ffn.

    The call's condition c [batch, 1 or length, d_model] gives all six as a linear map of silu(c), the projection
    `modulation`: shift, scale and gate of attention, then those of ffn. Where this begins at 0, so does each part.
    """

    def modulated(self) -> bool:
        """Whether it is; otherwise it is a `Block`."""
        return True

    @nn.compact
    def __call__(self, carry, layer, call: Call):
        if self.modulated():
            call = call.replace(condition=self.modulations(call.condition, carry[0].shape[1]))
        return super().__call__(carry, layer, call)

    def modulations(self, condition: Any, length: int) -> dict[str, Sequence[Array]]:
        """Shift, scale and gate of each part, for rows of `length` tokens."""
        project = self.config.projection("modulation", 6 * self.config.d_model, name="modulation")
        parts = jnp.split(project(nn.silu(condition)), 6, axis=-1)
        return {"attention": parts[:3], "ffn": parts[3:]}

    def around(self, name, part, x, cache, layer, call: Call):
        if not self.modulated():
            return super().around(name, part, x, cache, layer, call)
        shift, scale, gate = call.condition[name]
        norm = self.config.norm_module(f"norm_{name}")
        y, cache = part(norm(x) * (1 + scale) + shift, cache, layer, call)
        return x + self.dropped(gate * y, layer, call), cache


class Stack(nn.Module):
    """`num_layers` blocks with their parameters stacked along a first axis and scanned over."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        positions: Int[Array, "#batch length"] | None,
        segments: Int[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        *,
        bias: tuple[Array, ...] = (),
        condition: Any = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        layers: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """Returns the hidden states after the last block, and the cache with the new tokens in it.

        Args:
          positions: default: 0, 1, ..., or those after what each row's cache holds.
          bias: added to the scores of self-attention in every layer; see `attend`. With a fifth dimension before the
            others, each layer has its own.
          condition: a further argument, for the config's own block.
          mask: which of these tokens each of them sees, in place of causality; the tokens of a cache stay visible.
          layers: (a, b), to run the layers from number a on and before number b only. With a cache, a = 0 gives it new
            tokens; with a > 0, x are the states of its newest tokens, which the earlier layers have already. Only the
            layers that run are written.

        Raises:
          ValueError: there are no such layers.
        """
        cfg = self.config
        first, end = layer_range(layers, cfg.num_layers)
        block: Any = cfg.block()
        if cfg.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        if self.is_initializing():
            first, end = 0, cfg.num_layers
        elif first == end:
            return x, entered(x, positions, cache, first)[1]
        if self.has_variable("params", "blocks_0"):  # `layers_apart`
            positions, cache = entered(x, positions, cache, first)
            call = Call(positions, segments, mask, bias, condition, deterministic)
            for layer in range(first, end):
                (x, cache), _ = block(cfg, name=f"blocks_{layer}")((x, cache), jnp.asarray(layer), call)
            return x, cache
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=end - first,
            unroll=min(cfg.unroll, end - first),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if end - first < cfg.num_layers:
            scan = nn.map_variables(scan, "params", lambda params: jax.tree.map(lambda leaf: leaf[first:end], params))
        positions, cache = entered(x, positions, cache, first)
        call = Call(positions, segments, mask, bias, condition, deterministic)
        (x, cache), _ = scan(cfg, name="blocks")((x, cache), jnp.arange(first, end), call)
        return x, cache


def layers_apart(params: Params, config: Any, least: int = 2**26) -> Params:
    """The parameters of a large model on a CPU, with arrays of its own for each layer of its `stack`, without a copy.

    XLA's CPU compiler copies each layer out of the stack before products read it. Where few tokens are read, this takes
    as long as the products. A `Stack` with these parameters runs its layers one by one, which takes longer to compile.

    Args:
      config: the model's; its own parameters are returned if it is not a `StackConfig`.
      least: the bytes from which on a stack is taken apart.
    """
    blocks = params["stack"].get("blocks") if isinstance(config, StackConfig) and "stack" in params else None
    leaves = jax.tree.leaves(blocks)
    if not leaves or sum(leaf.nbytes for leaf in leaves) < least:
        return params
    if not all(map(_on_one_cpu, leaves)):
        return params
    blocks = jax.tree.map(np.asarray, blocks)
    layers = {
        f"blocks_{layer}": jax.device_put(jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks))
        for layer in range(config.num_layers)
    }
    return {**params, "stack": layers}


def _on_one_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def layer_range(layers: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """The first layer that runs, and the one before which the run ends.

    Raises:
      ValueError: there are no such layers.
    """
    first, end = layers or (0, count)
    if not 0 <= first <= end <= count:
        raise ValueError(f"layers is {layers}; it must be (a, b) with 0 <= a <= b <= {count}, the number of layers.")
    return first, end
