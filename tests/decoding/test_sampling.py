"""Sampling: the distribution of one token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.decoding import Sampling, sample

KEY = jax.random.key(0)
LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.25, 0.2, 0.1]))


def draws(sampling, count=4096, logits=LOGITS):
    return np.asarray(sample(jnp.broadcast_to(logits, (count, len(logits))), KEY, sampling))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.25, 0.2, 0.1]),
        (Sampling(temperature=0.5), [0.0025, 0.16, 0.0625, 0.04, 0.01]),
        (Sampling(top_k=2), [0, 0.4, 0.25, 0, 0]),
        (Sampling(top_k=9), [0.05, 0.4, 0.25, 0.2, 0.1]),
        (Sampling(top_p=0.6), [0, 0.4, 0.25, 0, 0]),
        (Sampling(top_p=0.7), [0, 0.4, 0.25, 0.2, 0]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.7), [0, 0.4, 0.25, 0, 0]),  # 0.65 / 0.85 of the three is more than 0.7
        (Sampling(temperature=2, top_p=0.5), [0, 0.4**0.5, 0.25**0.5, 0, 0]),
    ],
    ids=str,
)
def test_distribution(sampling, expected):
    expected = np.array(expected) / np.sum(expected)
    counts = np.bincount(draws(sampling), minlength=5)
    assert (counts[expected == 0] == 0).all()
    if (expected > 0).sum() > 1:
        some = expected > 0
        assert scipy.stats.chisquare(counts[some], counts.sum() * expected[some]).pvalue > 1e-3


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert len(np.unique(draws(Sampling(top_k=2), logits=jnp.zeros(5)))) == 2


@pytest.mark.parametrize("temperature", [0, 1e-3, 1e-30])
def test_low_temperature_is_greedy(temperature):
    logits = 100 * jax.random.normal(jax.random.key(1), (50, 20))
    np.testing.assert_array_equal(sample(logits, KEY, Sampling(temperature=temperature)), logits.argmax(-1))


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jax.random.normal(jax.random.key(1), (50, 20), jnp.bfloat16)
    np.testing.assert_array_equal(sample(logits, KEY), sample(logits.astype(jnp.float32), KEY))


def test_a_rows_sample_does_not_depend_on_the_other_rows():
    logits = jax.random.normal(jax.random.key(1), (50, 20))
    np.testing.assert_array_equal(sample(logits[:7], KEY), sample(logits, KEY)[:7])
    assert len(np.unique(draws(Sampling()))) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value}; it must be"):
        Sampling(**{field: value})


def test_one_restriction_for_all():
    """Of equal logits, those with the lower ids are kept, whatever the shape."""
    logits = jnp.array([[0.0, 2.0, 1.0, 2.0, -1.0]])
    kept = lambda **limits: np.isfinite(Sampling(**limits).restrict(logits))[0].tolist()  # noqa: E731
    assert kept() == kept(top_k=0, top_p=1.0) == kept(top_k=5) == kept(top_k=9) == [True] * 5
    assert kept(top_k=1) == kept(temperature=0) == kept(top_p=1e-6) == [False, True, False, False, False]
    assert kept(top_k=3) == [False, True, True, True, False]
    assert kept(top_p=0.999999) == [True] * 5
    assert kept(top_k=3, top_p=0.999999) == [False, True, True, True, False]
    assert Sampling(top_k=2).restrict(logits).max() == 0
    parts = jnp.stack([logits, -logits], 1)
    both = Sampling(top_k=2, top_p=0.9).restrict(parts)
    for part in range(2):
        np.testing.assert_array_equal(both[:, part], Sampling(top_k=2, top_p=0.9).restrict(parts[:, part]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.integers(1, 8))
def test_top_p_is_the_smallest_set(seed, p, k):
    logits = np.random.default_rng(seed).normal(size=8).astype(np.float32)
    kept = np.isfinite(Sampling(top_k=k, top_p=p).restrict(jnp.asarray(logits)))
    among = np.where(logits >= np.sort(logits)[-k], np.exp(logits), 0)
    probability = among / among.sum()
    assert kept.any() and probability[kept].min() >= probability[~kept].max(initial=0)
    assert probability[kept].sum() >= p - 1e-5
    assert kept.sum() == 1 or probability[kept].sum() - probability[kept].min() < p + 1e-5
