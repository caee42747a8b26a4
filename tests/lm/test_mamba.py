"""Mamba's exact statements, and what it refuses; tests/lm/test_causal_lm.py has what every language model promises."""

from __future__ import annotations

import dataclasses
import functools

import causal_lms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtok.decoding import PromptLookup, Sampling, generate, parse_evictor
from jaxtok.interop.mamba import config_from
from jaxtok.lm.decoder import init_params
from jaxtok.lm.mamba import PUBLISHED, Mamba, MambaConfig
from jaxtok.nn.mamba import Mixer, MixerConfig, by_columns, selective_scan
from jaxtok.training.optimizer import decayed

SIZES = {"num_layers": 2, "d_model": 16, "state_size": 4, "vocab_size": 32, "max_length": 80}

TASKS = {"mamba": lambda: tiny.text(MambaConfig(**SIZES | {"vocab_size": 64, "max_length": 32}))}

CAUSAL_LMS = {"mamba": lambda: Mamba(MambaConfig(**SIZES, tie_embeddings=False))}

MIXER = MixerConfig(d_model=8, state_size=4)


@functools.cache
def noisy(config):
    return causal_lms.noisy_params(Mamba(config))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(length=37):
    a = -np.exp(random(6, 4, seed=3))
    return random(2, length, 6), np.abs(random(2, length, 6, seed=1)), a, *random(2, 2, length, 4, seed=2)


def test_the_ways_to_scan_agree():
    """Outputs, last state and gradients, with a state before and with places where it begins anew."""
    keep = (np.arange(37) % 11 > 0) * np.ones((2, 1))
    found = []
    for method, part in (("scan", 8), ("scan", 0), ("associative", 8), ("associative", 0), ("associative", 64)):

        @jax.jit
        def run(args, state, method=method, part=part):
            def total(args, state):
                y, last = selective_scan(*args, state=state, keep=keep, method=method, part=part)
                return jnp.sum(jnp.sin(y)) + jnp.sum(last**2), (y, last)

            return jax.grad(total, (0, 1), has_aux=True)(args, state)

        found.append(run(inputs(), random(2, 6, 4, seed=5)))
    for other in found[1:]:
        for ours, theirs in zip(*map(jax.tree.leaves, (other, found[0])), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_a_token_without_a_step_changes_no_state():
    u, delta, a, b, c = inputs()
    delta[:, 5:] = 0
    whole = selective_scan(u, delta, a, b, c)[1]
    np.testing.assert_array_equal(whole, selective_scan(u[:, :5], delta[:, :5], a, b[:, :5], c[:, :5])[1])


def test_numbers_that_are_kept_have_no_order():
    u, delta, a, b, c = inputs()
    order = [2, 0, 3, 1]
    moved, last = selective_scan(u, delta, a[:, order], b[..., order], c[..., order])
    y, state = selective_scan(u, delta, a, b, c)
    np.testing.assert_allclose(moved, y, atol=1e-5)
    np.testing.assert_allclose(last, state[..., order], atol=1e-6)


@pytest.mark.parametrize("use_bias", [False, True])
def test_padding_anywhere_is_never_seen(use_bias):
    """Also between tokens, and where projections have biases; other code lets those at padding into the convolution."""
    config = MambaConfig(**SIZES, use_bias=use_bias)
    model, params = Mamba(config), noisy(config)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 9))
    positions = np.array([[-1, -1, 0, 1, -1, 2, 3, 4, -1], [*range(9)]])
    apply = jax.jit(lambda tokens, **options: model.apply({"params": params}, tokens, **options))
    logits, cache = apply(tokens, positions=positions, cache=model.init_cache(2, 9))
    real = positions[0] >= 0
    alone, kept = apply(tokens[:1, real], cache=model.init_cache(1, 5))
    np.testing.assert_allclose(logits[0, real], alone[0], atol=1e-5)
    np.testing.assert_allclose(cache.conv[:, 0], kept.conv[:, 0], atol=1e-6)
    np.testing.assert_allclose(cache.states[:, 0], kept.states[:, 0], atol=1e-6)
    assert cache.next_position.tolist() == [5, 9]


def test_any_split_is_the_whole():
    config = MambaConfig(**SIZES)
    model, params = Mamba(config), noisy(config)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 12))
    apply = jax.jit(lambda tokens, **options: model.apply({"params": params}, tokens, **options))
    whole, _ = apply(tokens)
    for splits in ((1, 2, 12), (5, 12), (0, 12)):
        cache, found, start = model.init_cache(2, 12), [], 0
        for end in splits:
            if end > start:
                logits, cache = apply(tokens[:, start:end], cache=cache)
                found.append(logits)
            start = end
        np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-5 * np.abs(whole).max())
    assert jax.tree.map(jnp.shape, model.init_cache(2, 10)) == jax.tree.map(jnp.shape, model.init_cache(2, 10_000))


def test_drafts_and_what_a_state_cannot_do():
    config = MambaConfig(**SIZES)
    model, params = Mamba(config), noisy(config)
    prompts = [[3, 1, 4, 1, 5], [9]]
    greedy = {"max_new_tokens": 16, "chooser": Sampling(temperature=0)}
    plain = generate(model, params, prompts, **greedy)
    drafted = generate(model, params, prompts, drafter=PromptLookup(), **greedy)
    assert drafted.tokens == plain.tokens
    with pytest.raises(ValueError, match="it must be None, as tokens cannot be taken out of the cache of Mamba"):
        generate(model, params, prompts, evictor=parse_evictor("streaming:8"), **greedy)
    cache = model.init_cache(1, 4)
    with pytest.raises(ValueError, match="the state of a Mamba cannot be rewound"):
        cache.truncate(jnp.array([1]))
    with pytest.raises(ValueError, match="nothing can be gathered or evicted"):
        cache.gather(jnp.array([[0]]))
    tokens = jnp.zeros((1, 4), int)
    with pytest.raises(ValueError, match="a mask is given"):
        model.apply({"params": params}, tokens, mask=jnp.ones((1, 4, 4), bool))
    with pytest.raises(ValueError, match="the cache is of 3 rows; there are 1 rows"):
        model.apply({"params": params}, tokens, cache=model.init_cache(3, 4))


@functools.partial(jax.jit, static_argnames=("orders", "slices", "config"))
def mixed(orders, params, x, slices=5, config=MIXER):
    return Mixer(config, orders, slices=slices).apply({"params": params}, x)[0]


@functools.cache
@jax.jit
def three_orders():
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * random(*leaf.shape, seed=leaf.size),
        init_params(Mixer(MIXER, 3), jax.random.key(0), jnp.zeros((1, 5, 8))),
    )


def test_orders():
    """Two equal directions do not tell a row from its reverse; a silent third one is as if there were two."""
    params, x = three_orders(), random(2, 20, 8)
    two = {name: params[name] for name in params if name != "across"}
    alike = {**two, "backward": two["forward"]}
    forwards, backwards = mixed(2, alike, x), mixed(2, alike, x[:, ::-1])
    np.testing.assert_allclose(backwards[:, ::-1], forwards, atol=1e-5)
    rank = MIXER.rank
    silent = params["across"] | {
        "skip": jnp.zeros(MIXER.channels),
        "selection": params["across"]["selection"].at[:, rank + MIXER.state_size :].set(0),
    }
    np.testing.assert_allclose(mixed(3, {**params, "across": silent}, x), mixed(2, two, x), atol=1e-6)
    one = {name: two[name] for name in two if name != "backward"}
    assert np.abs(mixed(2, two, x) - mixed(1, one, x)).max() > 1e-3


def test_the_third_order_can_be_undone():
    x = random(1, 60, 2)
    for slices in (1, 2, 3, 5, 12, 60):
        np.testing.assert_array_equal(by_columns(by_columns(x, slices), 60 // slices), x)


def test_published_sizes():
    """As counted in the authors' checkpoints."""
    counted = {
        "130m": 129_135_360,
        "370m": 371_516_416,
        "790m": 793_204_224,
        "1.4b": 1_372_178_432,
        "2.8b": 2_768_345_600,
    }
    for name, count in counted.items():
        config = PUBLISHED[name]
        embedding = config.vocab_size * config.d_model
        assert embedding + config.num_layers * (config.mixer_params() + config.d_model) + config.d_model == count
    shapes = jax.eval_shape(lambda: init_params(Mamba(PUBLISHED["130m"]), jax.random.key(0), jnp.zeros((1, 1), int)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == counted["130m"]


def test_initial_step_sizes_and_what_decays():
    config = MambaConfig(**SIZES | {"num_layers": 1, "d_model": 256})
    params = jax.jit(lambda: init_params(Mamba(config), jax.random.key(0), jnp.zeros((1, 1), int)))()
    forward = params["stack"]["blocks"]["mixer"]["forward"]
    steps = jax.nn.softplus(forward["steps_bias"])
    assert 0.001 <= steps.min() < 0.002 and 0.08 < steps.max() <= 0.1001
    np.testing.assert_allclose(np.exp(forward["a_log"][0, 0]), [1, 2, 3, 4], rtol=1e-6)
    kept = decayed(forward)
    assert {name for name, decays in kept.items() if not decays} == {"a_log", "skip", "steps_bias", "conv_bias"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand": 1.3}, r"expand is 1.3; expand \* d_model = 20.8 must be a whole number"),
        ({"state_size": 0}, "state_size is 0; it must be at least 1"),
        ({"conv_kernel": 0}, "conv_kernel is 0; it must be at least 1"),
        ({"time_step_rank": -1}, "time_step_rank is -1; it must be at least 1, or 0"),
        ({"time_step_min": 0.2}, "time_step_min is 0.2 and time_step_max 0.1"),
        ({"method": "parallel"}, "method is 'parallel'; it must be one of auto, scan, associative"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MambaConfig(**SIZES), **fields)


def test_orders_that_cannot_be_are_refused():
    params, x = three_orders(), jnp.zeros((1, 20, 8))
    with pytest.raises(ValueError, match="slices is 3; it must divide the number of tokens, 20"):
        mixed(3, params, x, slices=3)
    with pytest.raises(ValueError, match="orders is 4"):
        mixed(4, params, x)
    with pytest.raises(ValueError, match="orders is 2, and a cache, segments or padding are given"):
        Mixer(MIXER, 2).apply({"params": params}, x, segments=jnp.zeros((1, 20), int))


def test_other_kinds_are_refused_by_name():
    with pytest.raises(ValueError, match="the model is a falcon_mamba; its norms of B, C and the steps are not here"):
        config_from({"model_type": "falcon_mamba"})
    with pytest.raises(ValueError, match="the model is a Mamba2; it must be a mamba"):
        config_from({"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2"}})
    original = config_from(
        {"d_model": 8, "n_layer": 1, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    )
    assert (original.vocab_size, original.d_model, original.num_layers) == (50280, 8, 1)


def gradient_memory(part: int, length: int = 1024) -> float:
    """The bytes that the compiler needs for the gradient of a scan of 128 channels of 16 states."""
    shapes = [(1, length, 128), (1, length, 128), (128, 16), (1, length, 16), (1, length, 16)]
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]

    def total(*args):
        return jnp.sum(jnp.sin(selective_scan(*args, method="scan", part=part)[0]))

    program = jax.jit(jax.grad(total, tuple(range(5)))).lower(*arrays).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_a_gradient_in_parts_takes_little_memory():
    """At most 0.15 of a scan's that keeps the state of every token. Its time is in configs/lm/README.md."""
    assert gradient_memory(64) <= 0.15 * gradient_memory(0)
