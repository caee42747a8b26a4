"""Ordinary projections for the transformer stack: matrices and an MLP."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtok.axes import constrain, gather
from jaxtok.nn.activations import gelu
from jaxtok.nn.transformer import StackConfig


class Linear(nn.Module):
    """x W (+ b), with W [d_in, features]."""

    features: int
    axes: tuple[str, str] = ("d_model", "heads")
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"], deterministic: bool = True) -> Float[Array, "*batch features"]:
        def param(name, init, shape, axes):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
            return gather(value.astype(self.dtype), *axes)

        y = x.astype(self.dtype) @ param("kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        if self.use_bias:
            axis = "channels" if self.axes[1] == "d_model" else self.axes[1]
            y = y + param("bias", nn.initializers.zeros, (self.features,), (axis,))
        return y


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, tanh=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearStack(StackConfig):
    """A transformer stack with linear projections and an MLP of one hidden layer."""

    mlp_dim: int = 3072
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    gated: bool = False
    """Whether the MLP is down(activation(gate x) * up x) instead of down(activation(up x)) (arXiv 2002.05202)."""
    use_bias: bool = True
    qkv_bias: bool | None = None
    """Whether queries, keys and values have a bias; None: as `use_bias`."""
    mlp_bias: bool | None = None
    """Whether the MLP has biases; None: as `use_bias`."""
    mlp_dropout: float = 0.0
    """The dropout of the MLP's hidden units."""

    def __post_init__(self):
        super().__post_init__()
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_dim is {self.mlp_dim}; it must be at least 1.")
        if not 0 <= self.mlp_dropout < 1:
            raise ValueError(f"mlp_dropout is {self.mlp_dropout}; it must be in [0, 1).")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}.")

    def kernel_init(self, axes: tuple[str, str], std: float) -> nn.initializers.Initializer:
        """How a matrix with these axes begins."""
        return nn.initializers.normal(std)

    def linear(self, features: int, axes: tuple[str, str], std: float, bias: bool | None, name: str | None) -> Linear:
        return Linear(
            features=features,
            axes=axes,
            use_bias=self.use_bias if bias is None else bias,
            kernel_init=self.kernel_init(axes, std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        if group == "ffn":
            return MLP(self, features, name=name)
        if group == "modulation":  # of standard deviation 0: at first, a block changes nothing
            return self.linear(features, ("d_model", "modulation"), 0.0, True, name)
        if group == "output":
            return self.linear(features, ("heads", "d_model"), self.output_init_std, None, name)
        axis = "heads" if group == "query" or self.kv_heads == self.num_heads else "kv_heads"
        return self.linear(features, ("d_model", axis), self.init_std, self.qkv_bias, name)

    def projection_params(self) -> int:
        heads = 2 * (self.num_heads + self.kv_heads) * self.head_dim
        return self.d_model * (heads + (3 if self.gated else 2) * self.mlp_dim)


class MLP(nn.Module):
    """down(activation(up x)), or down(activation(gate x) * up x)."""

    config: LinearStack
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"], deterministic: bool = True) -> Float[Array, "*batch features"]:
        cfg = self.config

        def hidden(name):
            layer = cfg.linear(cfg.mlp_dim, ("d_model", "mlp"), cfg.init_std, cfg.mlp_bias, name)
            return constrain(layer(x), "mlp")

        # As in ParameterAttention, the backward pass computes what is between the products again.
        activation = jax.checkpoint(ACTIVATIONS[cfg.activation], prevent_cse=False)
        y = activation(hidden("gate")) * hidden("up") if cfg.gated else activation(hidden("up"))
        y = nn.Dropout(cfg.mlp_dropout)(y, deterministic)
        return cfg.linear(self.features, ("mlp", "d_model"), cfg.output_init_std, cfg.mlp_bias, "down")(y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaStack(LinearStack):
    """Blocks as in Llama: RMS norms, rotary positions, SwiGLU, no biases."""

    norm: str = "rms"
    norm_eps: float = 1e-5
    rotary_fraction: float = 1.0
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    full_layers: tuple[int, ...] = ()
    """The layers without the window."""

    @property
    def output_init_std(self) -> float:
        return self.init_std

    def window_of(self, layer):
        if not self.window or not self.full_layers:
            return super().window_of(layer)
        full = jnp.isin(layer, jnp.array(self.full_layers, jnp.int32))
        return jnp.where(full, jnp.iinfo(jnp.int32).max // 2, self.window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTStack(LinearStack):
    """Blocks as in timm's ViT: pre-norm with epsilon 1e-6, every token sees every token, an MLP with the exact GELU."""

    norm_eps: float = 1e-6
    causal: bool = False
    rotary_fraction: float = 0.0
    key_bias: bool = True
    """Whether keys have a bias, which softmax does not see (EVA's have none)."""

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        if group == "key" and not self.key_bias:
            return self.linear(features, ("d_model", "heads"), self.init_std, False, name)
        return super().projection(group, features, name)

    @property
    def output_init_std(self) -> float:
        return self.init_std
