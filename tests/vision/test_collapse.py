"""What tells of a tokenizer's collapse, and the rule that ends a dead run."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.vision.collapse import CollapseGuard, code_health, code_sums


def test_health_is_that_of_the_images_that_count():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(6, 3, 2)).astype(np.float32)
    ids = rng.integers(0, 10, (6, 3))
    mask = np.array([1, 1, 0, 1, 1, 0], np.float32)
    own = codes[mask > 0]
    whole = code_health(code_sums(codes, mask, ids, 10))
    np.testing.assert_allclose(whole["code_std"], own.std(0).mean(), rtol=1e-5)
    assert whole["codes_used"] == len(np.unique(ids[mask > 0]))
    shares = np.bincount(ids[mask > 0].ravel(), minlength=10) / own[..., 0].size
    entropy = -sum(p * np.log(p) for p in shares if p)
    np.testing.assert_allclose(whole["code_perplexity"], np.exp(entropy), rtol=1e-5)
    parts = [code_sums(codes[n : n + 3], mask[n : n + 3], ids[n : n + 3], 10) for n in (0, 3)]
    added = code_health({name: parts[0][name] + parts[1][name] for name in parts[0]})
    for name, value in whole.items():
        np.testing.assert_allclose(added[name], value, rtol=1e-5)
    assert code_health(code_sums(jnp.ones((4, 3, 2)), jnp.ones(4)))["code_std"] == 0


def rows(steps, **numbers):
    return [{"step": step} | {name: value(step) for name, value in numbers.items()} for step in steps]


def test_a_run_is_dead_if_a_number_stays_too_small():
    guard = CollapseGuard(patience=100, gap_patience=300)
    falls = rows(range(0, 400, 10), code_std=lambda step: 0.16 * 0.5 ** (step / 20))
    verdicts = [guard(falls[:n]) for n in range(1, len(falls) + 1)]
    first = next(row["step"] for row in falls if row["code_std"] < 0.01)
    died = next(row["step"] for row, verdict in zip(falls, verdicts) if verdict)
    assert died == first + 100  # and not before
    message = verdicts[died // 10]
    assert message.startswith(f"the tokenizer has collapsed: code_std has been below 0.01 since step {first} ")
    assert message.endswith(".") and message.count(". ") == 0  # one sentence
    gap = rows(range(0, 400, 10), code_std=lambda _: 0.5, null_gap=lambda step: 0.0)
    assert not guard(gap[:30]) and "the decoder does without the codes" in guard(gap)
    used = rows(range(0, 110, 10), code_std=lambda _: 0.5, codes_used=lambda _: 1.0)
    assert "codes_used" in guard(used) and not guard(used[:-1])


def test_a_run_that_recovers_or_says_nothing_lives():
    guard = CollapseGuard(patience=100)
    healthy = rows(range(0, 1000, 10), code_std=lambda step: 0.0 if step % 90 else 0.2, null_gap=lambda _: 0.2)
    assert not any(guard(healthy[:n]) for n in range(1, 101))
    assert not guard(rows(range(0, 1000, 10), loss=lambda _: 1.0))  # none of the numbers
    with pytest.raises(ValueError, match=r"guard\.patience is 0; it must be at least 1"):
        CollapseGuard(patience=0)
