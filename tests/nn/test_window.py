"""Attention in a window, computed block by block, equals attention with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.attention import attend


@pytest.mark.parametrize(("length", "window", "kv_heads"), [(23, 5, 4), (24, 8, 2), (9, 1, 4), (11, 5, 1)])
def test_blocks_are_a_mask(length, window, kv_heads):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, kv_heads, kv_heads))
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    for given in (None, segments):

        def loss(window, q, k, v, given=given):
            y = attend(q, k, v, window=window, segments=given)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

        grad = jax.value_and_grad(loss, (1, 2, 3), has_aux=True)
        (_, blocks), ours = jax.jit(grad, static_argnums=0)(window, q, k, v)
        (_, mask), expected = jax.jit(grad)(jnp.int32(window), q, k, v)
        np.testing.assert_allclose(blocks, mask, atol=1e-5)
        for a, b in zip(ours, expected):
            np.testing.assert_allclose(a, b, atol=1e-5)
