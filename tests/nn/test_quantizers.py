"""Exact statements about quantisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.nn.bits import pack_bits, unpack_bits
from jaxtok.nn.quantizers import (
    BinaryQuantizer,
    GumbelQuantizer,
    NearestQuantizer,
    gumbel_temperature,
    perplexity,
)


def vectors(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_params(module, x, seed=0):
    variables = jax.tree.map(
        lambda x: x.value, jax.jit(module.init)(jax.random.key(seed), x), is_leaf=lambda x: hasattr(x, "names")
    )
    apply = jax.jit(module.apply, static_argnames=("method", "train", "temperature"))
    return functools.partial(apply, variables), variables["params"]


@functools.partial(jax.jit, static_argnames="sub_codes")
def there_and_back(bits, sub_codes):
    codes = pack_bits(bits, sub_codes)
    return codes, unpack_bits(codes, bits.shape[-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 31), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_bits_and_codes_are_one_to_one(size, sub_codes, seed):
    bits = np.random.default_rng(seed).integers(0, 2, (2, 3, size * sub_codes))
    codes, again = there_and_back(bits, sub_codes)
    assert codes.shape == (2, 3, sub_codes) and codes.dtype == jnp.int32
    assert np.array_equal(again, bits)
    text = "".join(map(str, bits[0, 0, :size]))
    assert int(codes[0, 0, 0]) == int(text, 2)  # the first bit is the most significant


def test_bits_that_are_refused():
    for count, sub_codes, message in (
        (32, 1, "at most 31"),
        (0, 1, "positive"),
        (6, 4, "must divide bits"),
        (6, 0, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_bits(jnp.zeros((1, count), jnp.int32), sub_codes)


@pytest.mark.parametrize("tanh", [False, True])
def test_binary(tanh):
    x = vectors(0, 2, 4, 4, 8)
    module = BinaryQuantizer(6, 5, 2, tanh=tanh)
    apply, params = with_params(module, x)
    z, p = apply(x, method="activations")
    fixed, half = apply(x), apply(x, jnp.full((2, 4, 4, 6), 0.5))
    assert np.array_equal(fixed.codes, half.codes)  # u = 1/2 is the comparison with 1/2
    assert np.array_equal(unpack_bits(fixed.codes, 6), p > 0.5)
    np.testing.assert_array_equal(apply(fixed.codes, method="embed"), fixed.vectors)
    # the gradient passes straight through, so that of z is the table's rows, whatever the code
    y = vectors(1, 2, 4, 4, 5)
    for draws in (None, jnp.zeros_like(z), jnp.ones_like(z)):
        slope = jax.grad(lambda x, draws=draws: jnp.sum(apply(x, draws).vectors * y))(x)
        by_z = jax.grad(lambda x: jnp.sum(apply(x, method="activations")[0] * (y @ params["embedding"].T)))(x)
        np.testing.assert_allclose(slope, by_z, rtol=1e-5, atol=1e-6)
    if not tanh:
        assert np.all((fixed.loss >= 0.1966) & (fixed.loss <= 0.25))
        rise = jax.grad(lambda x: -apply(x).loss.mean())(x)  # the official loss draws every z upwards
        up = jax.grad(lambda x: apply(x, method="activations")[0].mean())(x)
        assert float(jnp.sum(rise * up)) > 0
    else:
        assert set(np.unique(fixed.vectors - fixed.vectors + jnp.where(p[..., :5] > 0.5, 1, -1))) <= {-1, 1}
    corrected, _ = with_params(module.clone(corrected=True), x)
    np.testing.assert_allclose(corrected(x).loss, (p * (1 - p)).mean((1, 2, 3)), rtol=1e-5)


def test_bits_are_drawn_with_their_probabilities():
    x = jnp.broadcast_to(vectors(2, 1, 1, 1, 8), (10_000, 1, 1, 8))
    apply, _ = with_params(BinaryQuantizer(6, 5), x[:1])
    _, p = apply(x[:1], method="activations")
    bits = unpack_bits(apply(x, jax.random.uniform(jax.random.key(0), (10_000, 1, 1, 6))).codes, 6)
    sigma = np.sqrt(p * (1 - p) / 10_000)
    assert np.all(np.abs(bits.mean(0) - p[0]) < 4 * sigma[0])


def test_nearest():
    x = vectors(3, 2, 4, 4, 6)
    beta, module = 0.3, NearestQuantizer(16, 6, 0.3)
    apply, params = with_params(module, x)
    table = params["embedding"]
    rows = apply(table.reshape(1, 4, 4, 6))
    assert np.array_equal(rows.codes.reshape(-1), np.arange(16))
    assert np.all(rows.loss == 0) and float(rows.metrics["perplexity"]) == pytest.approx(16, rel=1e-4)
    same = apply(jnp.broadcast_to(table[3], (1, 4, 4, 6)))
    assert np.all(same.codes == 3) and float(same.metrics["perplexity"]) == pytest.approx(1, rel=1e-4)
    q = apply(x)
    distances = np.sum((np.asarray(x)[..., None, :] - np.asarray(table)) ** 2, -1)
    assert np.array_equal(q.codes[..., 0], distances.argmin(-1))
    assert np.array_equal(apply(q.codes, method="embed"), jnp.take(table, q.codes[..., 0], axis=0))

    def loss(x, table):
        return module.apply({"params": {"embedding": table}}, x).loss.mean()

    dx, dtable = jax.grad(loss, (0, 1))(x, table)
    nearest = jnp.take(table, q.codes[..., 0], axis=0)
    np.testing.assert_allclose(dx, 2 * (x - nearest) / x.size, rtol=1e-4, atol=1e-8)
    expected = np.zeros_like(table)
    np.add.at(expected, np.asarray(q.codes[..., 0]), 2 * beta * np.asarray(nearest - x) / x.size)
    np.testing.assert_allclose(dtable, expected, rtol=1e-4, atol=1e-7)


def test_gumbel():
    assert float(gumbel_temperature(0)) == 1 and float(gumbel_temperature(150_000)) == 1 / 16
    assert float(gumbel_temperature(10**7)) == 1 / 16
    x = vectors(4, 2, 2, 2, 6)
    apply, params = with_params(GumbelQuantizer(16, 6), x)
    hard, noisy = apply(x), apply(x, 5 * vectors(5, 2, 2, 2, 16))
    assert np.array_equal(hard.codes, apply(x, jnp.zeros((2, 2, 2, 16)), temperature=0.1).codes)
    assert not np.array_equal(hard.codes, noisy.codes)
    np.testing.assert_allclose(hard.vectors, jnp.take(params["embedding"], hard.codes[..., 0], axis=0), rtol=1e-6)
    soft = apply(x, train=True)
    assert np.abs(soft.vectors - hard.vectors).max() > 0.1
    assert np.all(soft.loss >= 0)


def test_perplexity():
    assert float(perplexity(jnp.ones(7))) == pytest.approx(7, rel=1e-5)
    assert float(perplexity(jnp.array([0.0, 9, 0]))) == pytest.approx(1, rel=1e-5)
