"""The key-value cache: every row has a length of its own, and every slot a position."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.cache import KVCache

LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM = 2, 3, 7, 2, 4


def new(seed, count):
    shape = (BATCH, count, HEADS, HEAD_DIM)
    return jax.random.normal(jax.random.key(seed), shape), jax.random.normal(jax.random.key(seed + 100), shape)


def filled(lengths):
    """A cache with 5 tokens a row in both layers, at positions 0 to 4, truncated to `lengths`."""
    cache = KVCache.init(LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM).advance(jnp.arange(5)[None])
    for layer in range(LAYERS):
        cache = cache.append(layer, *new(layer, 5))
    return cache.truncate(jnp.array(lengths))


def test_init_is_empty():
    cache = KVCache.init(LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM, jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.slots == SLOTS
    chex.assert_trees_all_equal(cache.positions, jnp.full((1, BATCH, SLOTS, 1), -1))
    chex.assert_trees_all_equal((cache.length, cache.next_position), (jnp.zeros(BATCH, jnp.int32),) * 2)


def test_new_slots_come_after_each_rows_length():
    lengths = [1, 4, 5]
    before = filled(lengths)
    keys, values = new(7, 2)
    positions = jnp.array([[9, 8], [4, 4], [5, -1]])
    after = jax.jit(KVCache.append)(before.advance(positions), 1, keys, values)
    np.testing.assert_array_equal(after.length, [3, 6, 7])
    np.testing.assert_array_equal(after.next_position, [10, 5, 6])
    touched = (np.arange(SLOTS) >= np.array(lengths)[:, None]) & (np.arange(SLOTS) < np.array(lengths)[:, None] + 2)
    for row, start in enumerate(lengths):
        np.testing.assert_array_equal(after.keys[1, row, start : start + 2], keys[row])
        np.testing.assert_array_equal(after.values[1, row, start : start + 2], values[row])
        np.testing.assert_array_equal(after.positions[0, row, start : start + 2, 0], positions[row])
    # Nothing else is touched.
    np.testing.assert_array_equal(after.keys[0], before.keys[0])
    for a, b in ((after.keys[1], before.keys[1]), (after.values[1], before.values[1])):
        np.testing.assert_array_equal(np.asarray(a)[~touched], np.asarray(b)[~touched])
    np.testing.assert_array_equal(np.asarray(after.positions)[0, ~touched], np.asarray(before.positions)[0, ~touched])


def test_append_keeps_the_cache_dtype():
    cache = KVCache.init(LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM, jnp.bfloat16).advance(jnp.zeros((1, 2), jnp.int32))
    cache = cache.append(0, *new(0, 2))
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16


def test_what_is_beyond_the_last_slot_is_lost():
    cache = filled([5, 5, 5])
    after = cache.advance(5 + jnp.arange(4)[None]).append(0, *new(3, 4))
    np.testing.assert_array_equal(after.keys[:, :, :5], cache.keys[:, :, :5])
    np.testing.assert_array_equal(
        after.truncate(jnp.array([7, 6, 5])).positions[0, :, 5:, 0], [[5, 6], [5, -1], [-1] * 2]
    )


def test_truncate_forgets_and_never_lengthens():
    cache = filled([5, 3, 1]).truncate(jnp.array([2, 4, 0]))
    np.testing.assert_array_equal(cache.length, [2, 3, 0])
    np.testing.assert_array_equal(cache.next_position, [2, 3, 0])
    np.testing.assert_array_equal((cache.positions >= 0).sum((0, 2, 3)), [2, 3, 0])
    # What is appended afterwards replaces what was forgotten.
    keys, values = new(8, 1)
    after = cache.advance(jnp.array([[7]])).append(0, keys, values)
    np.testing.assert_array_equal(after.keys[0, jnp.arange(BATCH), jnp.array([2, 3, 0])], keys[:, 0])


def test_gather_keeps_slots_in_the_order_asked_for():
    cache = filled([5, 5, 5])
    index = jnp.array([[4, 0, 2], [0, 1, 2], [3, 3, 1]])
    kept = jax.jit(KVCache.gather)(cache, index)
    assert kept.slots == 3
    np.testing.assert_array_equal(kept.length, [3, 3, 3])
    np.testing.assert_array_equal(kept.positions[0, :, :, 0], index)
    np.testing.assert_array_equal(kept.next_position, [5, 3, 4])
    for row in range(BATCH):
        np.testing.assert_array_equal(kept.keys[:, row], cache.keys[:, row, index[row]])
        np.testing.assert_array_equal(kept.values[:, row], cache.values[:, row, index[row]])
    fewer = cache.gather(index, jnp.array([1, 2, 3]))
    np.testing.assert_array_equal(fewer.length, [1, 2, 3])
    np.testing.assert_array_equal(fewer.positions[0, :, :, 0], [[4, -1, -1], [0, 1, -1], [3, 3, 1]])


@pytest.mark.parametrize("by_head", [False, True])
def test_gather_by_layer_and_head(by_head):
    """Gathering equals loops, also when the positions have these dimensions already."""
    cache, rng = filled([5, 4, 3]), np.random.default_rng(0)
    for _ in range(2):
        shape = (LAYERS, BATCH, HEADS) if by_head else (LAYERS, BATCH)
        index, count = rng.integers(0, 5, (*shape, 4)), rng.integers(0, 5, shape)
        kept = cache.gather(jnp.asarray(index), jnp.asarray(count))
        positions = np.broadcast_to(cache.positions, (LAYERS, BATCH, cache.slots, HEADS))
        assert kept.positions.shape == (LAYERS, BATCH, 4, HEADS if by_head else 1)
        ours = np.broadcast_to(kept.positions, (LAYERS, BATCH, 4, HEADS))
        for layer, row, head in np.ndindex(LAYERS, BATCH, HEADS):
            at = (layer, row, head) if by_head else (layer, row)
            for slot, old in enumerate(index[at]):
                np.testing.assert_array_equal(kept.keys[layer, row, slot, head], cache.keys[layer, row, old, head])
                np.testing.assert_array_equal(kept.values[layer, row, slot, head], cache.values[layer, row, old, head])
                expected = positions[layer, row, old, head] if slot < count[at] else -1
                assert ours[layer, row, slot, head] == expected
        np.testing.assert_array_equal(kept.length, count.max((0, 2)) if by_head else count.max(0))
        # A longer index makes room for what comes after.
        cache = kept.gather(jnp.broadcast_to(jnp.arange(SLOTS), (BATCH, SLOTS)), kept.length)
        assert cache.slots == SLOTS
        after = cache.advance(jnp.full((BATCH, 1), 9))
        np.testing.assert_array_equal((after.positions == 9).sum(2), 1)
