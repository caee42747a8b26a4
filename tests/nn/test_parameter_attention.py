"""Exact properties of parameter attention (TokenFormer's specification, sections 2.1 and 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.norms import Norm
from jaxtok.nn.parameter_attention import (
    GROUPS,
    NORMALIZATIONS,
    ParameterAttention,
    ParameterAttentionStack,
    TokenCounts,
    normalize_scores,
    uniform_counts,
)

BATCH, D_IN, D_OUT, TOKENS = 3, 12, 10, 9


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, K, V = normal(0, BATCH, D_IN), normal(1, TOKENS, D_IN), normal(2, TOKENS, D_OUT)


@functools.partial(jax.jit, static_argnames=("kind", "options"))
def pattention(x, keys, values, kind="l2_norm_gelu", mask=None, options=()):
    layer = ParameterAttention(features=values.shape[1], num_tokens=len(keys), normalization=kind, **dict(options))
    return layer.apply({"params": {"keys": keys, "values": values}}, x, mask)


@functools.partial(jax.jit, static_argnames="kind")
def gradients(x, keys, values, kind="l2_norm_gelu"):
    """With respect to x, keys and values, of a loss with no symmetry."""
    return jax.grad(lambda *args: jnp.sum(jnp.sin(pattention(*args, kind))), argnums=(0, 1, 2))(x, keys, values)


def close(a, b, tolerance=2e-6):
    return np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("norm_tokens", [0, 4])
def test_the_weights_have_the_norm_tau(norm_tokens):
    scores = normal(3, BATCH, TOKENS)
    tau2 = norm_tokens or TOKENS
    for kind in ("l2_norm", "gelu_l2_norm"):
        square = jnp.sum(normalize_scores(scores, kind, norm_tokens=norm_tokens) ** 2, -1)
        np.testing.assert_allclose(square, tau2, rtol=1e-6)
    # l2_norm_gelu: the norm is taken before the GELU, which is the exact one.
    s = normalize_scores(scores, "l2_norm", norm_tokens=norm_tokens)
    exact = normalize_scores(scores, "l2_norm_gelu", norm_tokens=norm_tokens)
    np.testing.assert_allclose(exact, s * jax.scipy.stats.norm.cdf(s), atol=1e-6)


def test_softmax_weights_add_up_to_their_number_and_do_not_overflow():
    weights = normalize_scores(1000 * normal(3, BATCH, TOKENS), "softmax", norm_tokens=4)
    np.testing.assert_allclose(weights.sum(-1), TOKENS, rtol=1e-6)  # norm_tokens does not act on it


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_scale_invariance_is_that_of_the_norm_before_the_gelu(kind):
    invariant = kind in ("l2_norm_gelu", "l2_norm")
    for a in (0.01, 30.0):
        assert close(pattention(a * X, K, V, kind), pattention(X, K, V, kind)) == invariant
        assert close(pattention(X, a * K, V, kind), pattention(X, K, V, kind)) == invariant
    assert close(pattention(X, K, V, kind, options=(("scale", 0.37),)), pattention(X, K, V, kind)) == invariant


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "l2_norm", "gelu_l2_norm", "softmax"])
def test_gradients_are_orthogonal_to_what_the_function_is_invariant_to(kind):
    dx, dk, dv = gradients(X, K, V, kind)
    assert all(jnp.abs(g).max() > 1e-3 for g in (dx, dk, dv))
    along_x = jnp.abs(jnp.sum(X * dx, -1)) / (jnp.linalg.norm(X, axis=-1) * jnp.linalg.norm(dx, axis=-1))
    along_k = jnp.abs(jnp.sum(K * dk)) / (jnp.linalg.norm(K) * jnp.linalg.norm(dk))
    invariant = kind in ("l2_norm_gelu", "l2_norm")
    assert (along_x.max() < 1e-5) == invariant
    assert (along_k < 1e-5) == invariant


def test_backward_pass_is_the_papers():
    """dA = r (u - s (s . u) / tau^2) with u = g_W * GELU'(s), r = tau / |A|."""
    scores, cotangent = normal(3, BATCH, TOKENS), normal(4, BATCH, TOKENS)
    ours = jax.vjp(normalize_scores, scores)[1](cotangent)[0]
    r = TOKENS**0.5 / jnp.linalg.norm(scores, axis=-1, keepdims=True)
    s = r * scores
    u = cotangent * (jax.scipy.stats.norm.cdf(s) + s * jax.scipy.stats.norm.pdf(s))
    np.testing.assert_allclose(ours, r * (u - s * jnp.sum(s * u, -1, keepdims=True) / TOKENS), atol=1e-5)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_the_order_of_the_parameter_tokens_does_not_matter(kind):
    order = jax.random.permutation(jax.random.key(5), TOKENS)
    assert close(pattention(X, K[order], V[order], kind), pattention(X, K, V, kind))
    assert not close(pattention(X, K[order], V, kind), pattention(X, K, V, kind), 1e-2)


def test_a_parameter_free_layernorm_before_it_only_centres():
    centred = K - K.mean(1, keepdims=True)
    x = 5 * X + 2
    assert close(pattention(Norm("layernorm_nonparam").apply({}, x), K, V), pattention(x, centred, V), 1e-5)
    assert not close(pattention(x, K, V), pattention(x, centred, V), 1e-2)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_token_whose_scores_are_all_zero_is_finite(kind, eps):
    def loss(scores):
        return jnp.sum(jnp.sin(1 + normalize_scores(scores, kind, eps=eps)))

    scores = normal(3, BATCH, TOKENS).at[1].set(0)
    weights = normalize_scores(scores, kind, eps=eps)
    gradient = jax.grad(loss)(scores)
    assert jnp.isfinite(weights).all() and jnp.isfinite(gradient).all()
    assert (weights[1] == (1 if kind == "softmax" else 0)).all()
    # The other tokens are as without it.
    np.testing.assert_array_equal(weights[0], normalize_scores(scores[:1], kind, eps=eps)[0])
    if "l2_norm" in kind:
        assert (gradient[1] == 0).all()


def test_a_masked_pair_has_score_zero():
    mask = jnp.arange(TOKENS) < 5
    for kind in NORMALIZATIONS:
        masked = pattention(X, K, V, kind, mask)
        assert close(masked, pattention(X, K * mask[:, None], V, kind))
    # not minus infinity: under softmax it still has a weight
    assert not close(pattention(X, K, V, "softmax", mask), pattention(X, K[:5], V[:5], "softmax"), 1e-2)


def test_norm_tokens_fix_tau_while_zero_keys_are_appended():
    new = normal(6, 4, D_OUT)
    grown = (jnp.concatenate([K, jnp.zeros((4, D_IN))]), jnp.concatenate([V, new]))
    for kind in ("l2_norm_gelu", "gelu_l2_norm", "l2_norm"):
        assert close(pattention(X, *grown, kind, options=(("norm_tokens", TOKENS),)), pattention(X, K, V, kind))
    # With the current number, gelu_l2_norm is scaled by exactly rho; l2_norm_gelu changes otherwise.
    rho = ((TOKENS + 4) / TOKENS) ** 0.5
    assert close(pattention(X, *grown, "gelu_l2_norm"), rho * pattention(X, K, V, "gelu_l2_norm"))
    assert not close(pattention(X, *grown), pattention(X, K, V), 1e-3)
    assert not close(pattention(X, *grown), rho * pattention(X, K, V), 1e-3)


def test_epsilon_is_added_to_the_norm():
    scores = normal(3, BATCH, TOKENS)
    norm = jnp.linalg.norm(scores, axis=-1, keepdims=True)
    np.testing.assert_allclose(normalize_scores(scores, "l2_norm", eps=0.5), 3 * scores / (norm + 0.5), rtol=1e-6)


def test_tanh_gelu_is_another_function():
    scores = normal(3, BATCH, TOKENS)
    tanh, exact = (normalize_scores(scores, "gelu", tanh_gelu=t) for t in (True, False))
    np.testing.assert_allclose(tanh, jax.nn.gelu(scores, approximate=True), atol=1e-6)
    assert 1e-5 < jnp.abs(tanh - exact).max() < 1e-2


def test_bfloat16_operands_accumulate_in_float32():
    """4096 equal squares: a bfloat16 sum would stall at 256 of them."""
    n = 4096
    keys, values = jnp.full((n, 8), 0.125), jnp.full((n, 4), 1 / 1024)
    y = pattention(jnp.ones((1, 8)), keys, values, "l2_norm", options=(("dtype", jnp.bfloat16),))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), n / 1024, rtol=1e-2)  # each weight is 1
    # The scores themselves stay float32: a difference that bfloat16 cannot hold moves the weights.
    keys = jnp.full((2, 256), 1.0).at[1, 0].set(2.0)
    weights = pattention(jnp.ones((1, 256)), keys, jnp.eye(2), "softmax", options=(("dtype", jnp.bfloat16),))
    np.testing.assert_allclose(weights[0].astype(jnp.float32), 2 * jax.nn.softmax(jnp.array([0.0, 1.0])), rtol=1e-2)


def test_dropout_acts_on_the_weights():
    layer = ParameterAttention(features=TOKENS, num_tokens=TOKENS, normalization="softmax", dropout=0.5)
    params = {"params": {"keys": K, "values": jnp.eye(TOKENS)}}
    weights = layer.apply(params, X)
    dropped = layer.apply(params, X, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, 2 * weights), rtol=1e-6)
    assert 0 < jnp.mean(dropped == 0) < 1


def test_token_counts():
    counts = uniform_counts(6, 20, output=5)
    assert counts == TokenCounts(query=6, key=6, value=6, output=5, ffn=20)
    assert counts.total() == 43
    assert TokenCounts(ffn=30) | counts == uniform_counts(6, 30, output=5)
    assert uniform_counts(6, 20).output == 6


@pytest.mark.parametrize("group", GROUPS)
def test_impossible_counts_are_refused_by_name(group):
    good = uniform_counts(4, 8)
    with pytest.raises(ValueError, match=rf"tokens\.{group} is 0"):
        ParameterAttentionStack(tokens=TokenCounts(**vars(good) | {group: 0}))
    with pytest.raises(ValueError, match=rf"norm_tokens\.{group} is -1"):
        ParameterAttentionStack(tokens=good, norm_tokens=TokenCounts(**{group: -1}))


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match=r"normalization .*'l1'.*l2_norm_gelu"):
        normalize_scores(K, "l1")
    with pytest.raises(ValueError, match=r"normalization is 'l1'.*l2_norm_gelu"):
        ParameterAttentionStack(normalization="l1")
