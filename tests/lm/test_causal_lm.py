"""What every CausalLM promises, for each model that test files define as `CAUSAL_LMS` (tests/collector.py)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.losses import cross_entropy

BATCH, LENGTH = 3, 10


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params, tokens, **kwargs):
    return model.apply({"params": params}, tokens, **kwargs)


def some_tokens(model, batch=BATCH, length=LENGTH, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, model.config.vocab_size)


def assert_close(ours, reference, rtol=1e-5):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=rtol * np.abs(reference).max())


def test_logits(causal_lm):
    model, params = causal_lm
    logits, cache = apply(model, params, some_tokens(model))
    assert logits.shape == (BATCH, LENGTH, model.config.vocab_size)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    assert cache is None


def test_parameters_are_float32(causal_lm):
    _, params = causal_lm
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_every_parameter_gets_a_gradient(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = model.apply({"params": params}, tokens[:, :-1])
            return cross_entropy(logits, tokens[:, 1:]).mean()

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert jnp.isfinite(leaf).all(), path
        key_bias = [k.key for k in path[-2:]] == ["key", "bias"]
        if key_bias and not model.config.rotary_fraction:
            continue  # it adds the same to all scores of a query, which softmax does not see
        assert jnp.abs(leaf).max() > 1e-7, path


def test_a_token_changes_nothing_before_it(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    before, _ = apply(model, params, tokens)
    for place in (1, LENGTH - 1):
        after, _ = apply(model, params, tokens.at[:, place].add(1) % model.config.vocab_size)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (jnp.abs(after[:, place:] - before[:, place:]).max((0, 2)) > 1e-4).all()


def test_parts_compose_to_the_whole(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    embedded = model.apply({"params": params}, tokens, method="embed")
    hidden, _ = model.apply({"params": params}, embedded, method="hidden")
    assert embedded.shape[:2] == hidden.shape[:2] == (BATCH, LENGTH)
    assert_close(model.apply({"params": params}, hidden, method="head"), apply(model, params, tokens)[0])


def test_cached_equals_uncached_with_rows_of_different_lengths(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    full, _ = apply(model, params, tokens)
    lengths = np.array([2, 6, 4])

    padded = jnp.where(jnp.arange(6) < lengths[:, None], tokens[:, :6], 0)
    logits, cache = apply(model, params, padded, cache=model.init_cache(BATCH, LENGTH))
    np.testing.assert_array_equal(cache.length, [6, 6, 6])
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], full[row, :length])

    cache, rows = cache.truncate(lengths), np.arange(BATCH)
    for step in range(LENGTH - 6):  # one by one, each row at its own place
        logits, cache = apply(model, params, tokens[rows, lengths + step][:, None], cache=cache)
        assert_close(logits[:, 0], full[rows, lengths + step])
        np.testing.assert_array_equal(cache.length, lengths + step + 1)


def test_a_cached_chunk_is_causal(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    full, _ = apply(model, params, tokens)
    _, cache = apply(model, params, tokens[:, :6], cache=model.init_cache(BATCH, LENGTH))
    logits, _ = apply(model, params, tokens[:, 6:], cache=cache)
    assert_close(logits, full[:, 6:])


def test_a_packed_row_equals_its_documents_alone(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    packed = {
        "segments": jnp.broadcast_to(jnp.array([1] * 4 + [2] * 5 + [0]), tokens.shape),
        "positions": jnp.broadcast_to(jnp.array([*range(4), *range(5), 0]), tokens.shape),
    }
    logits, _ = apply(model, params, tokens, **packed)
    for start, stop in ((0, 4), (4, 9)):
        alone = jnp.zeros_like(tokens).at[:, : stop - start].set(tokens[:, start:stop])
        assert_close(logits[:, start:stop], apply(model, params, alone)[0][:, : stop - start])
    # Nothing leaks: another first document changes no bit of the second one.
    other = tokens.at[:, :4].add(1) % model.config.vocab_size
    np.testing.assert_array_equal(apply(model, params, other, **packed)[0][:, 4:], logits[:, 4:])
    # Without segments it would: the test is not blind.
    assert jnp.abs(apply(model, params, other)[0] - apply(model, params, tokens)[0])[:, 4:].max() > 1e-3


def test_bfloat16(causal_lm):
    """A model of bfloat16 activations has float32 logits, near those of the float32 model."""
    model, params = causal_lm
    tokens = some_tokens(model)
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    logits, cache = apply(half, params, tokens, cache=half.init_cache(BATCH, LENGTH))
    assert logits.dtype == jnp.float32
    assert cache.keys.dtype == jnp.bfloat16
    reference, _ = apply(model, params, tokens)
    assert 1e-4 < np.abs(logits - reference).max() / np.abs(reference).max() < 0.1
