"""Normalisations over the last axis, in float32 whatever the compute dtype."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NORMS = {
    "layernorm": 1e-5,
    "layernorm_nonparam": 1e-5,
    "rmsnorm": 1e-8,
    "scalenorm": 1e-8,
    "rms": 1e-6,
    "rms_plus_one": 1e-6,
    "none": 0.0,
}
"""The kinds of norm, and the default epsilon of each."""


class Norm(nn.Module):
    """One of `NORMS`, in float32, then rounded to `dtype`.

    layernorm           (x - mean) / sqrt(var + eps) * scale + bias
    layernorm_nonparam  the same without scale and bias (TokenFormer's blocks)
    rmsnorm             x / (rms(x) + eps) * scale; epsilon is added to the root, not under it (GPT-NeoX)
    scalenorm           x / max(|x|, eps) * g, with one number g (GPT-NeoX)
    rms                 x / sqrt(mean(x^2) + eps), rounded, then * scale (Llama, T5)
    rms_plus_one        x / sqrt(mean(x^2) + eps) * (1 + scale) (Gemma)
    none                x
    """

    kind: str = "layernorm"
    eps: float = 0.0
    """The epsilon; 0: the default in `NORMS`."""
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        def param(name, init, shape, axes):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)

        width = (x.shape[-1],)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        eps = self.eps or NORMS.get(self.kind, 0.0)
        y = x.astype(jnp.float32)
        match self.kind:
            case "none":
                pass
            case "layernorm" | "layernorm_nonparam":
                y = standardized(y, eps)
                if self.kind == "layernorm":
                    y = y * param("scale", ones, width, ("channels",)) + param("bias", zeros, width, ("channels",))
            case "rmsnorm":
                rms = jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True))
                y = y / (rms + eps) * param("scale", ones, width, ("channels",))
            case "scalenorm":
                length = jnp.sqrt(jnp.sum(jnp.square(y), -1, keepdims=True))
                y = y / jnp.maximum(length, eps) * param("scale", ones, (1,), (None,))
            case "rms" | "rms_plus_one":
                y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
                if self.kind == "rms":
                    return y.astype(self.dtype) * param("scale", ones, width, ("channels",)).astype(self.dtype)
                y = y * (1 + param("scale", zeros, width, ("channels",)))
            case _:
                raise ValueError(f"the kind of norm is {self.kind!r}; it must be one of {', '.join(NORMS)}.")
        return y.astype(self.dtype)


def standardized(x: Float[Array, "*batch d_model"], eps: float) -> Float[Array, "*batch d_model"]:
    """(x - mean) / sqrt(var + eps) over the last axis, in float32: a layer norm without scale and bias."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)


def unit_length(x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
    """x / max(|x|, 1e-12) over the last axis, in float32; 0 stays 0, with a gradient of 0 there."""
    y = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(y), -1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, y / jnp.maximum(length, 1e-12), 0.0).astype(x.dtype)
