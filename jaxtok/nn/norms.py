"""Normalisations over the last axis, in float32 whatever the compute dtype."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NORMS = ("layernorm", "layernorm_nonparam", "rmsnorm", "scalenorm")


class Norm(nn.Module):
    """One of `NORMS`, as GPT-NeoX defines them.

    layernorm           (x - mean) / sqrt(var + 1e-5) * scale + bias
    layernorm_nonparam  the same without scale and bias (TokenFormer's blocks)
    rmsnorm             x / (rms(x) + 1e-8) * scale; epsilon is added to the root, not under it
    scalenorm           x / max(|x|, 1e-8) * g, with one number g
    """

    kind: str = "layernorm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        def param(name, init, shape, axes):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)

        width = (x.shape[-1],)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        y = x.astype(jnp.float32)
        match self.kind:
            case "layernorm" | "layernorm_nonparam":
                y = y - y.mean(-1, keepdims=True)
                y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-5)
                if self.kind == "layernorm":
                    y = y * param("scale", ones, width, ("channels",)) + param("bias", zeros, width, ("channels",))
            case "rmsnorm":
                rms = jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True))
                y = y / (rms + 1e-8) * param("scale", ones, width, ("channels",))
            case "scalenorm":
                length = jnp.sqrt(jnp.sum(jnp.square(y), -1, keepdims=True))
                y = y / jnp.maximum(length, 1e-8) * param("scale", ones, (1,), (None,))
            case _:
                raise ValueError(f"norm {self.kind!r} is unknown; it can be {', '.join(NORMS)}.")
        return y.astype(self.dtype)
