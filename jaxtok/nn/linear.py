"""Ordinary projections for the transformer stack: matrices and a GELU MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearStack(StackConfig):
    """A transformer stack with linear projections and a GELU MLP."""

    mlp_dim: int = 3072
    use_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_dim is {self.mlp_dim}; it must be at least 1.")

    def linear(self, features: int, axes: tuple[str, str], std: float, name: str | None) -> Linear:
        return Linear(
            features=features,
            axes=axes,
            use_bias=self.use_bias,
            kernel_init=nn.initializers.normal(std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        if group == "ffn":
            return MLP(self, features, name=name)
        if group == "output":
            return self.linear(features, ("heads", "d_model"), self.output_init_std, name)
        return self.linear(features, ("d_model", "heads"), self.init_std, name)

    def projection_params(self) -> int:
        return 4 * self.d_model**2 + 2 * self.d_model * self.mlp_dim


class MLP(nn.Module):
    """W2 GELU(W1 x), with the exact GELU."""

    config: LinearStack
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"], deterministic: bool = True) -> Float[Array, "*batch features"]:
        cfg = self.config
        y = constrain(cfg.linear(cfg.mlp_dim, ("d_model", "mlp"), cfg.init_std, "up")(x), "mlp")
        y = jax.checkpoint(gelu, prevent_cse=False)(y)  # as in ParameterAttention: keeps its input and output only
        return cfg.linear(self.features, ("mlp", "d_model"), cfg.output_init_std, "down")(y)
