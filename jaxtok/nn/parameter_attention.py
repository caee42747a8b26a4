"""Parameter attention (Pattention): a linear projection as attention from tokens to learned key-value pairs.

TokenFormer, arXiv 2410.23168, section 3.2: Pattention(X; K, V) = Theta(X K^T) V. The number of pairs is the capacity,
so a trained layer grows by appending pairs. There is no bias and no factor 1/sqrt(d).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtok.axes import constrain, gather
from jaxtok.nn.activations import gelu
from jaxtok.nn.transformer import StackConfig

NORMALIZATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax", "gelu", "l2_norm", "gelu_layer_norm")
"""The first three are in the authors' PyTorch code; the others are in their TPU code only."""

GROUPS = ("query", "key", "value", "output", "ffn")
"""The five parameter attentions of a block."""


def normalize_scores(
    scores: Float[Array, "*batch param_tokens"],
    kind: str = "l2_norm_gelu",
    *,
    norm_tokens: int = 0,
    eps: float = 0.0,
    tanh_gelu: bool = False,
) -> Float[Array, "*batch param_tokens"]:
    """Theta, the weights of the value parameters (the paper's Eq. 5), in float32.

    With A the scores, n their number and tau = sqrt(`norm_tokens` or n):
        l2_norm_gelu     GELU(tau A / |A|)                    gelu             GELU(A)
        gelu_l2_norm     tau GELU(A) / |GELU(A)|              l2_norm          tau A / |A|
        softmax          n softmax(A)                         gelu_layer_norm  LayerNorm(GELU(A)), no parameters

    `norm_tokens` fixes tau while n grows: then new pairs with zero keys change nothing (the TPU code's `zoom_dim`).
    The PyTorch code has an exact GELU and no epsilon; the TPU code has the tanh form and adds `eps` to the norm
    (1e-5 for l2_norm_gelu, 1e-8 for the others). A token whose scores are all zero gets zero weights and zero
    gradient, where the authors' division gives NaN.
    """
    a = scores.astype(jnp.float32)
    tau = math.sqrt(norm_tokens or a.shape[-1])

    def l2(x):
        square = jnp.sum(jnp.square(x), -1, keepdims=True)
        some = square > 0
        square = jnp.where(some, square, 1.0)
        inverse = 1 / (jnp.sqrt(square) + eps) if eps else jax.lax.rsqrt(square)
        return x * jnp.where(some, tau * inverse, 0.0)

    match kind:
        case "l2_norm_gelu":
            return gelu(l2(a), tanh_gelu)
        case "gelu_l2_norm":
            return l2(gelu(a, tanh_gelu))
        case "softmax":
            return a.shape[-1] * jax.nn.softmax(a, -1)
        case "gelu":
            return gelu(a, tanh_gelu)
        case "l2_norm":
            return l2(a)
        case "gelu_layer_norm":
            return jax.nn.standardize(gelu(a, tanh_gelu), -1, epsilon=1e-6)
        case _:
            raise ValueError(f"normalization is {kind!r}; it must be one of {', '.join(NORMALIZATIONS)}.")


def attention_weights(
    scores: Float[Array, "*batch param_tokens"], *, kind: str, norm_tokens: int, eps: float, tanh_gelu: bool, dtype: Any
) -> Float[Array, "*batch param_tokens"]:
    """`normalize_scores` in `dtype`. The backward pass keeps the scores, and nothing that is computed after them."""
    if kind == "l2_norm_gelu":
        return _l2_norm_gelu(scores, math.sqrt(norm_tokens or scores.shape[-1]), eps, tanh_gelu, dtype)

    def theta(scores):
        weights = normalize_scores(scores, kind, norm_tokens=norm_tokens, eps=eps, tanh_gelu=tanh_gelu)
        return weights.astype(dtype)

    return jax.checkpoint(theta, prevent_cse=False)(scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _l2_norm_gelu(scores: Array, tau: float, eps: float, tanh_gelu: bool, dtype: Any) -> Array:
    """GELU(s) with s = tau A / (|A| + eps)."""
    return _l2_norm_gelu_forward(scores, tau, eps, tanh_gelu, dtype)[0]


def _l2_norm_gelu_forward(scores, tau, eps, tanh_gelu, dtype):
    square = jnp.sum(jnp.square(scores), -1, keepdims=True)
    some = square > 0  # else the weights and the gradient are 0
    norm = jnp.sqrt(jnp.where(some, square, 1.0))
    factor = jnp.where(some, tau / (norm + eps), 0.0)
    return gelu(scores * factor, tanh_gelu).astype(dtype), (scores, norm, factor)


def _l2_norm_gelu_backward(tau, eps, tanh_gelu, dtype, kept, gradient):
    """With u the gradient of s, dA = tau u / (|A| + eps) - s (s . u) / (tau |A|).

    GELU' costs more than the rest together. It is computed once, for u, which is written to memory; otherwise TPUs
    would compute it again in each of the three products that use u.
    """
    scores, norm, factor = kept
    s = scores * factor
    slope = jax.jvp(lambda x: gelu(x, tanh_gelu), (s,), (jnp.ones_like(s),))[1]
    u = gradient.astype(jnp.float32) * slope
    dot = jnp.sum(s * u, -1, keepdims=True)
    u, dot = jax.lax.optimization_barrier((u.astype(dtype), dot))
    return (factor * u.astype(jnp.float32) - s * jnp.where(factor > 0, dot / (tau * norm), 0.0),)


_l2_norm_gelu.defvjp(_l2_norm_gelu_forward, _l2_norm_gelu_backward)


class ParameterAttention(nn.Module):
    """Y = Theta(c X K^T) V, for X [..., d_in], K [param_tokens, d_in] and V [param_tokens, features].

    The scores, their norm and the weights are float32; the two products take operands of `dtype`.
    """

    features: int
    num_tokens: int
    normalization: str = "l2_norm_gelu"
    norm_tokens: int = 0
    eps: float = 0.0
    tanh_gelu: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    key_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    value_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch d_in"],
        mask: Bool[Array, "*#batch param_tokens"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch features"]:
        """`mask` multiplies the scores, as in the authors' code: a masked pair has score 0 (not minus infinity)."""
        shape = (self.num_tokens, x.shape[-1])
        key_init = nn.with_logical_partitioning(self.key_init, ("param_tokens", "d_model"))
        value_init = nn.with_logical_partitioning(self.value_init, ("param_tokens", "d_model"))
        keys = self.param("keys", key_init, shape, self.param_dtype)
        values = self.param("values", value_init, (self.num_tokens, self.features), self.param_dtype)

        keys, values = (gather(p.astype(self.dtype), "param_tokens", None) for p in (keys, values))
        x = x.astype(self.dtype)
        scores = jnp.einsum("...d,nd->...n", x, keys, preferred_element_type=jnp.float32)
        scores = constrain(scores, "param_tokens")
        if self.scale != 1.0:
            scores = scores * self.scale
        if mask is not None:
            scores = scores * mask
        weights = attention_weights(
            scores,
            kind=self.normalization,
            norm_tokens=self.norm_tokens,
            eps=self.eps,
            tanh_gelu=self.tanh_gelu,
            dtype=self.dtype,
        )
        weights = nn.Dropout(self.dropout)(weights, deterministic)
        return jnp.einsum("...n,nd->...d", weights, values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """A number for each of the five parameter attentions of a block."""

    query: int = 0
    key: int = 0
    value: int = 0
    output: int = 0
    ffn: int = 0

    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __or__(self, other: TokenCounts) -> TokenCounts:
        """These counts, with the other's counts in place of zeros."""
        return TokenCounts(**{g: getattr(self, g) or getattr(other, g) for g in GROUPS})


def uniform_counts(attention: int, ffn: int, output: int | None = None) -> TokenCounts:
    """Counts in the authors' form: a number for query, key and value, one for the output, one for the feed-forward."""
    return TokenCounts(query=attention, key=attention, value=attention, output=output or attention, ffn=ffn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterAttentionStack(StackConfig):
    """A transformer stack whose projections are parameter attentions; its feed-forward is a single one."""

    tokens: TokenCounts = uniform_counts(attention=576, ffn=2304)
    """The number of parameter tokens of each group, in every layer."""
    norm_tokens: TokenCounts = TokenCounts()
    """tau^2 of each group's normalisation; 0: its number of tokens. Growth fixes it to preserve the function."""
    normalization: str = "l2_norm_gelu"
    normalization_eps: float = 0.0
    tanh_gelu: bool = False
    pattention_dropout: float = 0.0
    norm: str = "layernorm_nonparam"

    def __post_init__(self):
        super().__post_init__()
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {self.normalization!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
        if not 0 <= self.pattention_dropout < 1:
            raise ValueError(f"pattention_dropout is {self.pattention_dropout}; it must be in [0, 1).")
        for group in GROUPS:
            if getattr(self.tokens, group) < 1:
                raise ValueError(f"tokens.{group} is {getattr(self.tokens, group)}; it must be at least 1.")
            if getattr(self.norm_tokens, group) < 0:
                raise ValueError(f"norm_tokens.{group} is {getattr(self.norm_tokens, group)}; it must be 0 or more.")

    def projection(self, group: str, features: int, name: str | None = None) -> ParameterAttention:
        return ParameterAttention(
            features=features,
            num_tokens=getattr(self.tokens, group),
            norm_tokens=getattr(self.norm_tokens, group),
            normalization=self.normalization,
            eps=self.normalization_eps,
            tanh_gelu=self.tanh_gelu,
            dropout=self.pattention_dropout,
            key_init=nn.initializers.normal(self.init_std),
            value_init=nn.initializers.normal(self.output_init_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def projection_params(self) -> int:
        """The number of parameters in one block's projections."""
        return 2 * self.d_model * self.tokens.total()


def group_of(path: Sequence[Any]) -> str | None:
    """The group of a parameter (or of its moment) by its path in the tree; None if it holds no parameter tokens."""
    keys = [getattr(k, "key", None) for k in path]
    return keys[-2] if len(keys) > 1 and keys[-1] in ("keys", "values") and keys[-2] in GROUPS else None


def new_token_mask(params: Any, old: TokenCounts) -> Any:
    """1 for the parameter tokens after the first `old` of their group, 0 for all else; broadcasts against `params`."""

    def mask(path, leaf):
        if (group := group_of(path)) is None:
            return jnp.zeros((), jnp.float32)
        return (jnp.arange(leaf.shape[-2]) >= getattr(old, group)).astype(jnp.float32)[:, None]

    return jax.tree_util.tree_map_with_path(mask, params)
