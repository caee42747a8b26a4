"""The flash attention kernel (interpreted) against the definition as plain operations: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.kernels.attention import dot_product_attention, kernel_flops
from jaxtok.training.mesh import MeshConfig, make_layout

BATCH, HEADS, LENGTH = 2, 2, 128


def arrays(head_dim, seed=0, batch=BATCH):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (batch, LENGTH, HEADS, head_dim)) for key in keys]


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def value_and_gradients(q, k, v, direction, segments, causal, implementation):
    def inner(q, k, v):
        y = dot_product_attention(q, k, v, causal=causal, segments=segments, implementation=implementation)
        return jnp.sum(y * direction), y

    return jax.value_and_grad(inner, argnums=(0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize(
    ("head_dim", "causal", "segmented"), [(64, True, True), (96, True, False), (128, False, True), (16, False, False)]
)
def test_kernel_equals_definition(head_dim, causal, segmented):
    q, k, v, direction = arrays(head_dim)
    segments = jnp.broadcast_to(1 + jnp.arange(LENGTH) // 50, (BATCH, LENGTH)) if segmented else None
    ours, theirs = (
        value_and_gradients(q, k, v, direction, segments, causal=causal, implementation=implementation)
        for implementation in ("splash_interpreted", "xla")
    )
    for a, b in zip(jax.tree.leaves((ours[0][1], ours[1])), jax.tree.leaves((theirs[0][1], theirs[1]))):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices; tests/conftest.py simulates them")
def test_on_a_mesh_each_device_has_rows_and_heads_of_its_own():
    q, k, v, _ = arrays(16, batch=4)
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    run = functools.partial(dot_product_attention, implementation="splash_interpreted")
    with layout.active():
        compiled = jax.jit(run).lower(q, k, v).compile()
    np.testing.assert_allclose(compiled(q, k, v), dot_product_attention(q, k, v, implementation="xla"), atol=1e-5)
    assert not any(kind in compiled.as_text() for kind in ("all-gather(", "all-reduce(", "all-to-all("))


def test_what_the_kernel_does_not_take():
    q, k, v, _ = (x[:, :100] for x in arrays(16))
    with pytest.raises(ValueError, match="length 100 is no multiple of 128"):
        dot_product_attention(q, k, v, implementation="splash")
    plain = dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_array_equal(dot_product_attention(q, k, v), plain)  # auto, which is this one on a CPU


def test_kernel_flops_are_of_the_lanes_that_are_used():
    shapes = [(1, 4, 4), (2, 3, 256, 64), (2, 3, 256, 64)]
    forward = kernel_flops("%splash_mha_fwd_segmented_residuals.3 = ", shapes)
    assert forward == 2 * 2 * 2 * 3 * 256 * 256 / 2 * 128
    assert kernel_flops("%splash_mha_dkv_no_residuals = ", shapes) == 2.5 * forward
    assert kernel_flops("%another_kernel", shapes) == 0
