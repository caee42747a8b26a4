"""Sampling: the distribution of one token, and generation that equals the uncached model token for token."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxtok.decoding import Sampling, generate, sample
from jaxtok.decoding.sampling import _decode, _prefill
from jaxtok.lm.lexinvariant import Lexinvariant

GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
NEW = 12
KEY = jax.random.key(0)

# One token.

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


# Generation.


@functools.partial(jax.jit, static_argnames="model")
def next_token(model, params, tokens, length, num_ids):
    logits = model.apply({"params": params}, tokens)[0][0, length - 1]
    return jnp.where(jnp.arange(logits.shape[0]) < num_ids, logits, -jnp.inf).argmax()


def greedy_without_cache(model, params, prompt, new, num_ids=1000):
    tokens = np.zeros((1, model.config.max_length), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + new):
        tokens[0, length] = next_token(model, params, tokens, length, num_ids)
    return tokens[0, len(prompt) : len(prompt) + new].tolist()


def greedy(model, params, prompts=PROMPTS, **options):
    return generate(model, params, prompts, **{"max_new_tokens": NEW, "sampling": GREEDY} | options)


@pytest.fixture
def alike_rows_lm(causal_lm):
    """A model that says the same in each row of a batch."""
    if isinstance(causal_lm[0], Lexinvariant):
        pytest.skip("each row has a table of its own; tests/lm/test_lexinvariant.py generates with them")
    return causal_lm


def test_greedy_equals_the_uncached_model_token_for_token(alike_rows_lm):
    model, params = alike_rows_lm
    rows = greedy(model, params)
    assert rows == [greedy_without_cache(model, params, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in rows}) == len(rows)
    assert max(len(set(row)) for row in rows) > 1, "a model that says one thing only tests nothing"


def test_rows_of_a_batch_equal_single_rows(alike_rows_lm):
    model, params = alike_rows_lm
    assert greedy(model, params) == [greedy(model, params, [prompt])[0] for prompt in PROMPTS]
    # With random sampling a row depends on its place, but not on what else is there.
    first, second = (
        generate(model, params, [PROMPTS[0], other, [7]], max_new_tokens=NEW, rng=KEY) for other in PROMPTS[1:]
    )
    assert first[0] == second[0] == generate(model, params, PROMPTS[:1], max_new_tokens=NEW, rng=KEY)[0]
    assert first[2] == second[2]
    assert first[1] != second[1]


def test_streaming_equals_not_streaming(causal_lm):
    model, params = causal_lm
    sampling = Sampling(temperature=1.5, top_k=20)
    whole = generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=sampling, rng=KEY)
    assert all(len(row) == NEW for row in whole)
    for chunk in (5, 1, 100):
        calls = []
        rows = generate(
            model, params, PROMPTS, max_new_tokens=NEW, sampling=sampling, rng=KEY, on_tokens=calls.append, chunk=chunk
        )
        assert rows == whole
        assert [list(itertools.chain(*parts)) for parts in zip(*calls)] == whole
        assert len(calls) == -(-NEW // chunk)
        assert all(len(new) <= chunk for call in calls for new in call)
    other = generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=sampling, rng=jax.random.key(1))
    assert other != whole


def test_a_row_ends_behind_its_stop_token(causal_lm):
    model, params = causal_lm
    whole = greedy(model, params)
    for stop in ({whole[0][3]}, {row[4] for row in whole}):
        expected = []
        for row in whole:
            ends = [i + 1 for i, token in enumerate(row) if token in stop]
            expected.append(row[: ends[0]] if ends else row)
        assert greedy(model, params, stop_tokens=stop) == expected
        calls = []
        assert greedy(model, params, stop_tokens=stop, on_tokens=calls.append, chunk=2) == expected
        assert [list(itertools.chain(*parts)) for parts in zip(*calls)] == expected
        assert len(calls) == -(-max(map(len, expected)) // 2)  # no further than the longest row


def test_padding_rows_of_the_vocabulary_are_never_chosen(alike_rows_lm):
    model, params = alike_rows_lm
    real = 6
    prompts = [[3, 1, 4], [1], [2]]
    rows = greedy(model, params, prompts, num_ids=real)
    assert rows == [greedy_without_cache(model, params, prompt, NEW, real) for prompt in prompts]
    assert rows != greedy(model, params, prompts)
    rows = generate(model, params, prompts, max_new_tokens=NEW, rng=KEY, num_ids=real, sampling=Sampling(temperature=9))
    assert {token for row in rows for token in row} <= set(range(real))


def test_up_to_the_last_place_of_the_context(alike_rows_lm):
    model, params = alike_rows_lm
    longest = model.config.max_length - NEW
    prompts = [[i % 7 for i in range(longest)], [5], [6]]
    assert greedy(model, params, prompts) == [greedy_without_cache(model, params, prompt, NEW) for prompt in prompts]
    with pytest.raises(ValueError, match=f"prompt of {longest} tokens and max_new_tokens = {NEW + 1}.*{longest + NEW}"):
        greedy(model, params, prompts, max_new_tokens=NEW + 1)


def test_prompts_of_similar_length_share_the_compiled_functions(causal_lm):
    model, params = causal_lm
    greedy(model, params)
    sizes = _prefill._cache_size(), _decode._cache_size()
    greedy(model, params, [[1] * 20, [2], [3, 4]])
    greedy(model, params, on_tokens=lambda new: None, chunk=3)
    assert sizes == (_prefill._cache_size(), _decode._cache_size())


def test_bfloat16_models_generate(causal_lm):
    model, params = causal_lm
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    rows = greedy(half, params)
    assert [len(row) for row in rows] == [NEW] * 3
    # Rounding may turn a close call; not the first token of every row.
    assert any(a[0] == b[0] for a, b in zip(rows, greedy(model, params)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty.*eod_id"),
        ([[1], [2, 32]], {}, "prompt 1 has the id 32.*0 to 31"),
        ([[-1]], {}, "prompt 0 has the id -1.*0 to 31"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"chunk": 0}, "chunk is 0"),
        ([[1]], {"max_new_tokens": 82}, "max_new_tokens = 82 exceed the model's max_length = 8[02]"),
        ([[1]], {"num_ids": 33}, "num_ids is 33.*vocab_size = 32"),
        ([[1]], {"sampling": Sampling()}, "rng is None.*temperature 0"),
    ],
)
def test_impossible_requests_are_refused(causal_lm, prompts, options, message):
    model, params = causal_lm
    with pytest.raises(ValueError, match=message):
        greedy(model, params, prompts, **options)
