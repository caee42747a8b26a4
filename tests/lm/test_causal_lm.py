"""What every CausalLM promises, tested on the models that test files define as `CAUSAL_LMS` (tests/collector.py), and
on two more."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect
from recurrent import Recurrent, RecurrentConfig

from jaxtok.lm.t5 import T5, Conditioned, T5Config, condition
from jaxtok.nn.losses import cross_entropy

BATCH, LENGTH = 3, 10
MODELS = collect("CAUSAL_LMS")


def conditioned():
    """T5's decoder with an input for each row."""
    module = T5(T5Config(num_layers=2, d_model=16, num_heads=2, head_size=8, mlp_dim=24, vocab_size=32))
    params = jax.tree.map(lambda leaf: leaf / 2, noisy_params(Pair(module)))  # T5 does not divide its scores
    inputs = jax.random.randint(jax.random.key(7), (BATCH, 5), 1, 32)
    encoded = module.apply({"params": params}, inputs, method="encode")
    return Conditioned(module), condition(module, params, encoded)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An encoder-decoder that is initialised from one array, as a decoder is."""

    module: T5

    def init(self, rng, tokens):
        return self.module.init(rng, tokens, tokens)


def recurrent():
    model = Recurrent(RecurrentConfig())
    return model, noisy_params(model)


OTHERS = {"recurrent": recurrent, "t5_conditioned": conditioned}

NO_SLOTS = "a state has no slots, so none can be dropped, moved or hidden (test_a_state_refuses_what_it_cannot_do)"
OF_SLOTS = {
    "test_cached_equals_uncached_with_rows_of_different_lengths": NO_SLOTS,
    "test_truncated_equals_never_seen": NO_SLOTS,
    "test_a_tree_is_its_branches": NO_SLOTS,
    "test_a_branch_of_a_tree_is_kept": NO_SLOTS,
    "test_slots_can_be_moved": NO_SLOTS,
    "test_a_dropped_slot_is_a_hidden_one": NO_SLOTS,
    "test_slots_are_dropped_by_layer_and_by_head": NO_SLOTS,
}
EXCEPTIONS = {
    "recurrent": OF_SLOTS,
    "mamba": OF_SLOTS,
    "t5_conditioned": {
        "test_every_parameter_gets_a_gradient": "its encoder has run already; tests/lm/test_t5_parity.py has gradients",
        "test_a_packed_row_equals_its_documents_alone": "its rows are not packed, as each has an input of its own",
        "test_bfloat16": "it is no module that takes another config; tests/lm/test_t5.py has bfloat16",
    },
}
"""The reason why a test is not run, by model and test."""


LIKE_ANOTHER = ("mistral", "opt", "semi_lexinvariant", "transformer", "word_pooled_plain")
"""Models with the layers of another one (Llama; lexinvariant; GPT-2); they run with --slow."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_ANOTHER)) for name in [*MODELS, *OTHERS]],
)
def causal_lm(request):
    if request.param in OTHERS:
        return OTHERS[request.param]()
    model = MODELS[request.param]()
    return model, noisy_params(model)


@pytest.fixture(autouse=True)
def exceptions(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("causal_lm")
    if reason := EXCEPTIONS.get(name, {}).get(request.node.originalname):
        pytest.skip(reason)


@functools.partial(jax.jit, static_argnames=("model", "method", "layers"))
def apply(model, params, x, method=None, **kwargs):
    return model.apply({"params": params}, x, **({"method": method} if method else {}), **kwargs)


def hidden(model, params, x, **kwargs):
    return apply(model, params, x, method="hidden", **kwargs)


def some_tokens(model, batch=BATCH, length=LENGTH, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, model.config.vocab_size)


def assert_close(ours, reference, rtol=1e-5):
    chex.assert_trees_all_close(np.asarray(ours), np.asarray(reference), rtol=0, atol=rtol * np.abs(reference).max())


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

    found = gradient(params)
    chex.assert_tree_all_finite(found)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        key_bias = [k.key for k in path[-2:]] == ["key", "bias"]
        if key_bias and not model.config.rotary_fraction:
            continue  # it adds the same to all scores of a query, which softmax does not see
        assert jnp.abs(leaf).max() > 1e-7, path


def test_a_token_changes_nothing_before_it(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    before, _ = apply(model, params, tokens)
    for position in (1, LENGTH - 1):
        after, _ = apply(model, params, tokens.at[:, position].add(1) % model.config.vocab_size)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (jnp.abs(after[:, position:] - before[:, position:]).max((0, 2)) > 1e-4).all()


def test_parts_compose_to_the_whole(causal_lm):
    model, params = causal_lm
    tokens = some_tokens(model)
    embedded = apply(model, params, tokens, method="embed")
    states, _ = hidden(model, params, embedded)
    assert embedded.shape[:2] == states.shape[:2] == (BATCH, LENGTH)
    assert_close(apply(model, params, states, method="head"), apply(model, params, tokens)[0])


def test_layer_ranges_compose(causal_lm):
    model, params = causal_lm
    tokens, count = some_tokens(model), model.config.num_layers
    whole = apply(model, params, tokens)[0]
    x = apply(model, params, tokens, method="embed")
    y, _ = hidden(model, params, x, layers=(0, 1))
    assert_close(apply(model, params, hidden(model, params, y, layers=(1, count))[0], method="head"), whole)
    # the final norm alone is the range after the last layer
    assert jnp.abs(hidden(model, params, y, layers=(count, count))[0] - y).max() > 1e-3
    with pytest.raises(ValueError, match=f"it must be .* <= {count}, the number of layers"):
        hidden(model, params, x, layers=(1, count + 1))


def test_layer_ranges_compose_with_a_cache(causal_lm):
    model, params = causal_lm
    tokens, count = some_tokens(model), model.config.num_layers
    _, cache = apply(model, params, tokens[:, :6], cache=model.init_cache(BATCH, LENGTH))
    whole, expected = apply(model, params, tokens[:, 6:], cache=cache)
    x = apply(model, params, tokens[:, 6:], method="embed")
    # A draft of the first layer, token by token; then the others, all tokens at once.
    drafted, states = cache, []
    for position in range(4):
        y, drafted = hidden(model, params, x[:, position : position + 1], layers=(0, 1), cache=drafted)
        states.append(y)
    chex.assert_trees_all_equal(drafted.length, expected.length)
    for after, before in zip(arrays(drafted), arrays(cache), strict=True):
        if after.ndim > 2 and after.shape[0] == count:  # the keys, values or states of the other layers
            chex.assert_trees_all_equal(after[1:], before[1:])
    y, found = hidden(model, params, jnp.concatenate(states, 1), layers=(1, count), cache=drafted)
    assert_close(apply(model, params, y, method="head"), whole)
    chex.assert_trees_all_close(arrays(found), arrays(expected), atol=1e-5)


def arrays(cache):
    """All but a lexinvariant model's keys."""
    return [leaf for leaf in jax.tree.leaves(cache) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


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
    for step in range(LENGTH - 6):  # one by one, each row at its own position
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
    # Without segments it would, so the test can fail.
    assert jnp.abs(apply(model, params, other)[0] - apply(model, params, tokens)[0])[:, 4:].max() > 1e-3


def test_bfloat16(causal_lm):
    """A model of bfloat16 activations has float32 logits, near those of the float32 model."""
    model, params = causal_lm
    tokens = some_tokens(model)
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    logits, cache = apply(half, params, tokens, cache=half.init_cache(BATCH, LENGTH))
    assert logits.dtype == jnp.float32
    kept = {leaf.dtype for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    states = {jnp.dtype("float32")} if hasattr(model.config, "state_size") else set()  # which would drift
    assert kept == {jnp.dtype("bfloat16")} | states
    reference, _ = apply(model, params, tokens)
    assert 1e-4 < np.abs(logits - reference).max() / np.abs(reference).max() < 0.15


def filled(model, params, tokens, lengths, slots=LENGTH):
    """A cache with the first `lengths` tokens of each row."""
    _, cache = apply(model, params, tokens, cache=model.init_cache(BATCH, slots))
    return cache.truncate(jnp.asarray(lengths))


def continued(model, params, tokens, lengths, following):
    """Without a cache, the logits of what follows the first `lengths` tokens of each row (one array, or a list)."""
    rows = np.zeros((BATCH, LENGTH), np.int32)
    for row, length in enumerate(lengths):
        rows[row, : length + len(following[row])] = [*tokens[row, :length], *following[row]]
    logits = np.asarray(apply(model, params, jnp.asarray(rows))[0])
    return [logits[row, n : n + len(following[row])] for row, n in enumerate(lengths)]


def test_truncated_equals_never_seen(causal_lm):
    model, params = causal_lm
    tokens, lengths = some_tokens(model), np.array([2, 5, 3])
    cache = filled(model, params, tokens, lengths)
    np.testing.assert_array_equal(cache.length, lengths)
    np.testing.assert_array_equal(cache.next_position, lengths)
    following = some_tokens(model, length=3, seed=9)
    logits, _ = apply(model, params, following, cache=cache)
    expected = continued(model, params, tokens, lengths, following)
    for row in range(BATCH):
        assert_close(logits[row], expected[row])


def test_padding_leaves_no_trace(causal_lm):
    """Rows of unequal lengths without truncation: a token at position -1 is not seen."""
    model, params = causal_lm
    tokens, lengths = some_tokens(model), jnp.array([2, 6, 4])
    positions = jnp.where(jnp.arange(6) < lengths[:, None], jnp.arange(6), -1)
    cache = model.init_cache(BATCH, LENGTH)
    logits, cache = apply(model, params, tokens[:, :6], positions=positions, cache=cache)
    np.testing.assert_array_equal(cache.next_position, lengths)
    full, _ = apply(model, params, tokens)
    rows = np.arange(BATCH)
    assert_close(logits[rows, lengths - 1], full[rows, lengths - 1])
    for step in range(3):
        logits, cache = apply(model, params, tokens[rows, lengths + step][:, None], cache=cache)
        assert_close(logits[:, 0], full[rows, lengths + step])


PARENTS = (-1, -1, 0, 0, 1, 3)
"""Of the nodes of a tree of new tokens; -1: the text before them."""
PATHS = ((0, 2), (0, 3, 5), (1, 4))
ANCESTORS = np.zeros((len(PARENTS), len(PARENTS)), bool)
for node, parent in enumerate(PARENTS):
    ANCESTORS[node] = ANCESTORS[parent] if parent >= 0 else False
    ANCESTORS[node, node] = True
DEPTHS = ANCESTORS.sum(1) - 1


def test_a_tree_is_its_branches(causal_lm):
    model, params = causal_lm
    tokens, lengths = some_tokens(model, length=5), np.array([2, 5, 3])
    tree = some_tokens(model, length=len(PARENTS), seed=5)
    cache = filled(model, params, tokens, lengths, slots=5 + len(PARENTS))
    positions = jnp.asarray(lengths[:, None] + DEPTHS)
    cached, _ = apply(model, params, tree, positions=positions, mask=jnp.asarray(ANCESTORS)[None], cache=cache)
    # without a cache, for the row that has all tokens
    mask = np.tril(np.ones((5 + len(PARENTS),) * 2, bool))
    mask[5:, 5:] = ANCESTORS
    both, at = jnp.concatenate([tokens, tree], 1), jnp.concatenate([jnp.arange(5), 5 + DEPTHS])[None]
    uncached, _ = apply(model, params, both, positions=at, mask=jnp.asarray(mask)[None])
    for path in PATHS:
        expected = continued(model, params, tokens, lengths, tree[:, path])
        for row, length in enumerate(lengths):
            assert_close(cached[row, np.array(path)], expected[row])
            if length == 5:
                assert_close(uncached[row, 5 + np.array(path)], expected[row])
    # the branches differ, so the test can fail
    plain, _ = apply(model, params, tree, positions=positions, cache=cache)
    assert jnp.abs(plain - cached)[:, 1:].max() > 1e-3


def test_a_branch_of_a_tree_is_kept(causal_lm):
    """Accepted slots are gathered next to the text; positions move with them, and the text continues."""
    model, params = causal_lm
    tokens, lengths = some_tokens(model, length=5), np.array([2, 5, 3])
    tree, following = some_tokens(model, length=len(PARENTS), seed=5), some_tokens(model, length=2, seed=6)
    slots = 5 + len(PARENTS)
    cache = filled(model, params, tokens, lengths, slots)
    positions = jnp.asarray(lengths[:, None] + DEPTHS)
    _, cache = apply(model, params, tree, positions=positions, mask=jnp.asarray(ANCESTORS)[None], cache=cache)
    index = np.tile(np.arange(slots), (BATCH, 1))
    for row, (length, path) in enumerate(zip(lengths, PATHS)):
        index[row, length : length + len(path)] = length + np.array(path)
    kept = lengths + [len(path) for path in PATHS]
    cache = cache.gather(jnp.asarray(index), jnp.asarray(kept))
    np.testing.assert_array_equal(cache.length, kept)
    np.testing.assert_array_equal(cache.next_position, kept)
    logits, _ = apply(model, params, following, cache=cache)
    accepted = [[*tree[row, np.array(path)], *following[row]] for row, path in enumerate(PATHS)]
    for row, expected in enumerate(continued(model, params, tokens, lengths, accepted)):
        assert_close(logits[row], expected[-2:])


def test_slots_can_be_moved(causal_lm):
    """Who sees a slot depends on its position, so other orders, in each row, layer and head, change nothing."""
    model, params = causal_lm
    tokens, rng = some_tokens(model), np.random.default_rng(0)
    cache = filled(model, params, tokens[:, :6], [6, 6, 6])
    expected, _ = apply(model, params, tokens[:, 6:], cache=cache)
    layers, _, _, heads, _ = cache.keys.shape
    for shape in ((BATCH,), (layers, BATCH), (layers, BATCH, heads)):
        index = np.broadcast_to(np.arange(LENGTH), (*shape, LENGTH)).copy()
        index[..., :6] = rng.permuted(index[..., :6], axis=-1)
        moved = cache.gather(jnp.asarray(index), jnp.full(BATCH, 6))
        np.testing.assert_array_equal(moved.next_position, 6)
        assert_close(apply(model, params, tokens[:, 6:], cache=moved)[0], expected)


def test_a_dropped_slot_is_a_hidden_one(causal_lm):
    """Positions stay, though the length shrinks."""
    model, params = causal_lm
    tokens, gone = some_tokens(model), np.array([1, 4, 2])
    cache = filled(model, params, tokens[:, :6], [6, 6, 6])
    index = np.stack([np.delete(np.arange(LENGTH), slot) for slot in gone])
    cache = cache.gather(jnp.asarray(index), jnp.full(BATCH, 5))
    np.testing.assert_array_equal(cache.length, 5)
    np.testing.assert_array_equal(cache.next_position, 6)
    logits, _ = apply(model, params, tokens[:, 6:], cache=cache)
    mask = np.tile(np.tril(np.ones((LENGTH, LENGTH), bool)), (BATCH, 1, 1))
    mask[np.arange(BATCH), 6:, gone] = False
    expected, _ = apply(model, params, tokens, mask=jnp.asarray(mask))
    assert_close(logits, expected[:, 6:])
    assert jnp.abs(expected - apply(model, params, tokens)[0])[:, 6:].max() > 1e-3


def test_slots_are_dropped_by_layer_and_by_head(causal_lm):
    model, params = causal_lm
    tokens, position = some_tokens(model), 6
    cache = filled(model, params, tokens[:, :position], [position] * 3)
    layers, _, _, heads, _ = cache.keys.shape
    rest = np.array([slot for slot in range(LENGTH) if slot != 2])
    index = np.broadcast_to(np.arange(LENGTH - 1), (layers, BATCH, heads, LENGTH - 1)).copy()
    count = np.full((layers, BATCH, heads), position)
    index[1:], count[1:] = rest, position - 1
    expected, _ = hidden(model, params, apply(model, params, tokens, method="embed"), layers=(0, 1))
    mask = np.tril(np.ones((LENGTH, LENGTH), bool))
    mask[position:, 2] = False
    expected, _ = hidden(model, params, expected, mask=jnp.asarray(mask)[None], layers=(1, layers))
    expected = apply(model, params, expected, method="head")[:, position]
    for given in ((index[:, :, 0], count[:, :, 0]), (index, count)):  # of all layers but the first; of all their heads
        kept = cache.gather(*map(jnp.asarray, given))
        np.testing.assert_array_equal(kept.next_position, position)
        logits, after = apply(model, params, tokens[:, position : position + 1], cache=kept)
        assert_close(logits[:, 0], expected)
        np.testing.assert_array_equal(after.next_position, position + 1)
    # In one head of each, it is as if only that slot of this head were empty.
    index[1:, :, 1:], count[1:, :, 1:] = np.arange(LENGTH - 1), position
    kept = cache.gather(jnp.asarray(index), jnp.asarray(count))
    logits, _ = apply(model, params, tokens[:, position : position + 1], cache=kept)
    positions = np.broadcast_to(cache.positions, (layers, BATCH, LENGTH, heads)).copy()
    positions[1:, :, 2, 0] = -1
    hollow = cache.replace(positions=jnp.asarray(positions))
    assert_close(logits, apply(model, params, tokens[:, position : position + 1], cache=hollow)[0])
    if heads > 1:
        assert jnp.abs(logits[:, 0] - expected).max() > 1e-4


def test_a_step_compiles_once(causal_lm):
    """Whatever the rows hold."""
    model, params = causal_lm
    tokens, cache = some_tokens(model), model.init_cache(BATCH, LENGTH)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, token, cache):
        return model.apply({"params": params}, token, cache=cache)

    for position in range(3):
        _, cache = step(params, tokens[:, position : position + 1], cache)
    if cache.rewindable:
        step(params, tokens[:, :1], cache.truncate(jnp.array([0, 1, 2])))


def test_a_state_refuses_what_it_cannot_do():
    model, params = recurrent()
    tokens = some_tokens(model)
    _, cache = apply(model, params, tokens, cache=model.init_cache(BATCH, LENGTH))
    assert not cache.rewindable
    with pytest.raises(ValueError, match="give padding the position -1"):
        cache.truncate(jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match="has no slots"):
        cache.gather(jnp.zeros((BATCH, 1), jnp.int32))
    with pytest.raises(ValueError, match="mask is given"):
        apply(model, params, tokens, mask=jnp.ones((1, LENGTH, LENGTH), bool))
