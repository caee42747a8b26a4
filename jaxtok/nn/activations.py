"""Activation functions that `jax.nn` has in another form."""

from __future__ import annotations

import math

import jax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*shape"], tanh: bool = False) -> Float[Array, "*shape"]:
    """x Phi(x), with Phi from erf as in PyTorch, or from tanh (arXiv 1606.08415, section 2).

    `jax.nn.gelu` has erfc for the exact form: more digits far below 0, where the result is 0 but for 1e-7, at a
    multiple of the work.
    """
    if tanh:
        return jax.nn.gelu(x, approximate=True)
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))
