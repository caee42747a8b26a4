"""The key-value cache: every row has a length of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.cache import KVCache

LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM = 2, 3, 7, 2, 4


def new(seed, count):
    shape = (BATCH, count, HEADS, HEAD_DIM)
    return jax.random.normal(jax.random.key(seed), shape), jax.random.normal(jax.random.key(seed + 100), shape)


def filled(lengths):
    """A cache with 5 tokens a row in both layers, truncated to `lengths`."""
    cache = KVCache.init(LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM)
    for layer in range(LAYERS):
        cache = cache.append(layer, *new(layer, 5))
    return cache.advance(5).truncate(jnp.array(lengths))


def test_init_is_empty():
    cache = KVCache.init(LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM, jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.slots == SLOTS
    np.testing.assert_array_equal(cache.length, [0, 0, 0])


def test_append_writes_one_layer_behind_each_rows_length():
    lengths = [1, 4, 5]
    before = filled(lengths)
    keys, values = new(7, 2)
    after = jax.jit(KVCache.append)(before, 1, keys, values)
    np.testing.assert_array_equal(after.length, lengths)  # counted by advance, when all layers have written
    np.testing.assert_array_equal(after.advance(2).length, [3, 6, 7])
    for row, start in enumerate(lengths):
        np.testing.assert_array_equal(after.keys[1, row, start : start + 2], keys[row])
        np.testing.assert_array_equal(after.values[1, row, start : start + 2], values[row])
    # Nothing else is touched.
    touched = (np.arange(SLOTS) >= np.array(lengths)[:, None]) & (np.arange(SLOTS) < np.array(lengths)[:, None] + 2)
    np.testing.assert_array_equal(after.keys[0], before.keys[0])
    np.testing.assert_array_equal(np.asarray(after.keys[1])[~touched], np.asarray(before.keys[1])[~touched])
    np.testing.assert_array_equal(np.asarray(after.values[1])[~touched], np.asarray(before.values[1])[~touched])


def test_append_keeps_the_cache_dtype():
    cache = KVCache.init(LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM, jnp.bfloat16).append(0, *new(0, 2))
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16


def test_truncate_forgets_and_never_lengthens():
    cache = filled([5, 3, 1])
    np.testing.assert_array_equal(cache.truncate(jnp.array([2, 4, 0])).length, [2, 3, 0])
    # What is appended afterwards replaces what was forgotten.
    keys, values = new(8, 1)
    after = cache.truncate(jnp.array([2, 4, 0])).append(0, keys, values)
    np.testing.assert_array_equal(after.keys[0, jnp.arange(BATCH), jnp.array([2, 3, 0])], keys[:, 0])


def test_gather_keeps_slots_in_the_order_asked_for():
    cache = filled([5, 5, 5])
    index = jnp.array([[4, 0, 2], [0, 1, 2], [3, 3, 1]])
    kept = jax.jit(KVCache.gather)(cache, index)
    assert kept.slots == 3
    np.testing.assert_array_equal(kept.length, [3, 3, 3])
    for row in range(BATCH):
        np.testing.assert_array_equal(kept.keys[:, row], cache.keys[:, row, index[row]])
        np.testing.assert_array_equal(kept.values[:, row], cache.values[:, row, index[row]])
    np.testing.assert_array_equal(cache.gather(index, jnp.array([1, 2, 3])).length, [1, 2, 3])
