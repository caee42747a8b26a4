"""Growth: when it preserves the function and when it does not (specification, section 4), and what happens next."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import TOKENFORMER, Operation, text

from jaxtok.data.text import TextData
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenCounts, TokenFormerConfig, uniform_counts
from jaxtok.lm.transformer import TransformerConfig, matched_transformer
from jaxtok.model import Model
from jaxtok.nn.losses import cross_entropy
from jaxtok.nn.parameter_attention import GROUPS, NORMALIZATIONS, new_token_mask
from jaxtok.training.experiment import Experiment
from jaxtok.training.loop import start_from
from jaxtok.transfer.growth import Growth, grow, grown_config, why_not_exact

COUNTS = TokenCounts(query=6, key=7, value=8, output=5, ffn=12)
UNEVEN = TokenCounts(query=9, key=8, value=21, output=6, ffn=13)
DOUBLE = TokenCounts(**{g: 2 * n for g, n in vars(COUNTS).items()})
CONFIG = TokenFormerConfig(
    num_layers=2, d_model=16, num_heads=2, rotary_fraction=0.5, tokens=COUNTS, vocab_size=24, max_length=12
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 24)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda: init_params(Decoder(CONFIG), jax.random.key(0), TOKENS))
    return jax.tree.map(lambda x: 8 * x, init())  # far from the linear regime


@functools.partial(jax.jit, static_argnames="config")
def logits_of(config, params):
    return Decoder(config).apply({"params": params}, TOKENS[:, :-1])[0]


@functools.partial(jax.jit, static_argnames="config")
def gradient_of(config, params):
    def loss(params):
        logits, _ = Decoder(config).apply({"params": params}, TOKENS[:, :-1])
        return cross_entropy(logits, TOKENS[:, 1:]).mean()

    return jax.grad(loss)(params)


def same(a, b, tolerance=1e-5):
    return jnp.abs(a - b).max() < tolerance * jnp.abs(b).max()


def each_group(params):
    """The five groups' keys and values, by group."""
    blocks = params["stack"]["blocks"]
    return {g: blocks["ffn"] if g == "ffn" else blocks["attention"][g] for g in GROUPS}


def tokens_only(params, counts):
    """The parameters cut back to the first `counts` tokens."""

    def cut(group, leaf):
        return leaf[:, : getattr(counts, group)]

    blocks = params["stack"]["blocks"]
    attention = {g: jax.tree.map(functools.partial(cut, g), blocks["attention"][g]) for g in GROUPS[:-1]}
    blocks = blocks | {"attention": attention, "ffn": jax.tree.map(functools.partial(cut, "ffn"), blocks["ffn"])}
    return params | {"stack": {"blocks": blocks}}


# The whole table, for one parameter attention.


@pytest.fixture(scope="module")
def projection():
    """Inputs, and the parameters of a feed-forward of 12 tokens."""
    x, keys, values = (jax.random.normal(jax.random.key(i), (n, 16)) for i, n in enumerate((7, 12, 12)))
    return x, {"ffn": {"keys": keys, "values": values}}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_why_not_exact_says_exactly_when_the_function_changes(projection, normalization, eps):
    config = dataclasses.replace(CONFIG, normalization=normalization, normalization_eps=eps)
    x, old = projection

    def output(config, params):
        return config.projection("ffn", 16).apply({"params": params["ffn"]}, x)

    before = output(config, old)
    to = TokenCounts(ffn=24)
    for init in ("zero_keys", "copy", "random"):
        for scale in ("auto", "fixed", "current"):
            reason = why_not_exact(config, init, scale)
            grown = grow(config, old, to=to, rng=KEY, init=init, scale=scale)
            # New values that are large enough to show.
            new = grown.params["ffn"]["values"]
            if init != "copy":
                new = new.at[12:].multiply(100)
            after = output(grown.config, {"ffn": grown.params["ffn"] | {"values": new}})
            assert same(after, before) == (reason is None), (init, scale, reason)
            assert same(after, before) or not same(after, before, 1e-3), "neither equal nor clearly different"
            if reason is None:
                grow(config, old, to=to, rng=KEY, init=init, scale=scale, exact=True)
            else:
                with pytest.raises(ValueError, match="would not preserve the function: ") as error:
                    grow(config, old, to=to, rng=KEY, init=init, scale=scale, exact=True)
                assert reason in str(error.value)


def test_reasons_name_the_way_out():
    softmax = dataclasses.replace(CONFIG, normalization="softmax")
    assert "exp(0) = 1" in why_not_exact(softmax, "zero_keys")
    assert "scale = fixed" in why_not_exact(CONFIG, "zero_keys", "current")
    assert "scale = current" in why_not_exact(CONFIG, "copy", "fixed")
    assert "random" in why_not_exact(CONFIG, "random")


def test_zero_keys_with_the_current_tau_scale_gelu_l2_norm_by_rho(projection):
    config = dataclasses.replace(CONFIG, normalization="gelu_l2_norm")
    x, old = projection
    grown = grow(config, old, to=TokenCounts(ffn=19), rng=KEY, scale="current")
    before, after = (c.projection("ffn", 16).apply({"params": p["ffn"]}, x) for c, p in ((config, old), grown[:2]))
    assert same(after, (19 / 12) ** 0.5 * before)


# The whole model.


def test_uneven_growth_of_all_groups(params):
    before = logits_of(CONFIG, params)
    exact = grow(CONFIG, params, to=UNEVEN, rng=KEY, exact=True)
    assert exact.config.tokens == UNEVEN
    assert exact.config.norm_tokens == COUNTS
    assert same(logits_of(exact.config, exact.params), before)
    for options in ({"scale": "current"}, {"init": "random"}):
        other = grow(CONFIG, params, to=UNEVEN, rng=KEY, **options)
        assert other.config == dataclasses.replace(CONFIG, tokens=UNEVEN)
        assert not same(logits_of(other.config, other.params), before, 1e-2)


def test_copies_preserve_the_function(params):
    grown = grow(CONFIG, params, to=DOUBLE, rng=KEY, init="copy", exact=True)
    assert grown.config == dataclasses.replace(CONFIG, tokens=DOUBLE)
    assert same(logits_of(grown.config, grown.params), logits_of(CONFIG, params))
    for group, leaf in each_group(grown.params).items():
        n = getattr(COUNTS, group)
        np.testing.assert_array_equal(leaf["keys"][:, n:], leaf["keys"][:, :n])
        assert (leaf["values"][:, n:] == 0).all()


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_alone(params, group):
    to = TokenCounts(**{group: getattr(COUNTS, group) + 5})
    grown = grow(CONFIG, params, to=to, rng=KEY)
    assert grown.config.tokens == to | COUNTS
    assert grown.config.norm_tokens == TokenCounts(**{group: getattr(COUNTS, group)})
    assert same(logits_of(grown.config, grown.params), logits_of(CONFIG, params))
    changed = {
        g for g, leaf in each_group(grown.params).items() if leaf["keys"].shape != each_group(params)[g]["keys"].shape
    }
    assert changed == {group}


@pytest.mark.parametrize("init", ["zero_keys", "random", "copy"])
def test_growing_then_cutting_is_the_identity(params, init):
    before = jax.tree.map(np.array, params)
    grown = grow(CONFIG, params, to=DOUBLE, rng=KEY, init=init)
    jax.tree.map(np.testing.assert_array_equal, tokens_only(grown.params, COUNTS), before)
    jax.tree.map(np.testing.assert_array_equal, params, before)  # grow is pure


def test_new_rows(params):
    """Random rows are as in a new model, differ between groups and layers, and are reproducible."""
    to = TokenCounts(**{g: n + 400 for g, n in vars(COUNTS).items()})
    zero_keys, again, other = (grow(CONFIG, params, to=to, rng=k).params for k in (KEY, KEY, jax.random.key(4)))
    random = grow(CONFIG, params, to=to, rng=KEY, init="random").params
    seen = set()
    for group in GROUPS:
        n = getattr(COUNTS, group)
        new = {name: each_group(random)[group][name][:, n:] for name in ("keys", "values")}
        for name, std in (("keys", CONFIG.init_std), ("values", CONFIG.output_init_std)):
            assert abs(new[name].std() / std - 1) < 0.05
            seen |= {float(new[name][0, 0, 0]) / std, float(new[name][1, 0, 0]) / std}
        assert (each_group(zero_keys)[group]["keys"][:, n:] == 0).all()
        values = [each_group(tree)[group]["values"][:, n:] for tree in (zero_keys, again, other)]
        assert abs(values[0].std() / CONFIG.output_init_std - 1) < 0.05
        np.testing.assert_array_equal(values[0], values[1])
        assert (values[0] != values[2]).mean() > 0.99
    assert len(seen) == 4 * len(GROUPS)


def test_two_growths_are_one(params):
    middle = grow(CONFIG, params, to=UNEVEN, rng=KEY)
    far = TokenCounts(**{g: n + 3 for g, n in vars(UNEVEN).items()})
    twice = grow(middle.config, middle.params, to=far, rng=jax.random.key(5), exact=True)
    once = grow(CONFIG, params, to=far, rng=KEY)
    assert twice.config == once.config
    assert same(logits_of(twice.config, twice.params), logits_of(CONFIG, params))
    assert same(logits_of(once.config, once.params), logits_of(CONFIG, params))
    # The values are random, but at the same positions.
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a == 0, b == 0),
        jax.tree.map(lambda leaf: leaf["keys"], each_group(twice.params), is_leaf=lambda x: "keys" in x),
        jax.tree.map(lambda leaf: leaf["keys"], each_group(once.params), is_leaf=lambda x: "keys" in x),
    )


def test_copies_after_a_fixed_tau(params):
    """tau^2 of 12 for 13 tokens becomes 24 for 26."""
    first = grow(CONFIG, params, to=UNEVEN, rng=KEY)
    to = TokenCounts(**{g: 2 * n for g, n in vars(UNEVEN).items()})
    second = grow(first.config, first.params, to=to, rng=KEY, init="copy", exact=True)
    assert second.config.norm_tokens == DOUBLE
    assert same(logits_of(second.config, second.params), logits_of(CONFIG, params))
    # and on, with zero keys, the number stays
    third = grow(second.config, second.params, to=TokenCounts(ffn=30), rng=KEY)
    assert third.config.norm_tokens == DOUBLE
    assert third.config.tokens == TokenCounts(ffn=30) | to


# Learning afterwards.


def test_new_tokens_learn_after_zero_keys(params):
    grown = grow(CONFIG, params, to=UNEVEN, rng=KEY)
    gradient = gradient_of(grown.config, grown.params)
    for group, leaf in each_group(gradient).items():
        n = getattr(COUNTS, group)
        assert (leaf["values"][:, n:] == 0).all()  # the weights of zero scores are 0
        assert (jnp.abs(leaf["keys"][:, n:]).max((1, 2)) > 1e-7).all()
    # One step later the new values learn too: no dead state.
    stepped = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), jax.tree.map(np.asarray, grown.params), gradient)
    for group, leaf in each_group(gradient_of(grown.config, stepped)).items():
        assert (jnp.abs(leaf["values"][:, getattr(COUNTS, group) :]).max((1, 2)) > 1e-7).all()


def test_copies_learn_through_their_values(projection):
    x, old = projection
    config, params, _ = grow(CONFIG, old, to=TokenCounts(ffn=24), rng=KEY, init="copy")

    def loss(params):
        return jnp.sum(jnp.sin(config.projection("ffn", 16).apply({"params": params["ffn"]}, x)))

    gradient = jax.grad(loss)(params)["ffn"]
    assert (jnp.abs(gradient["values"][12:]).max(1) > 1e-3).all()


def test_the_mask_of_new_tokens(params):
    grown = grow(CONFIG, params, to=UNEVEN, rng=KEY).params
    mask = jax.tree.map(jnp.broadcast_to, new_token_mask(grown, COUNTS), jax.tree.map(jnp.shape, grown))
    assert sum(leaf.sum() for leaf in jax.tree.leaves(mask)) == 2 * 2 * 16 * (UNEVEN.total() - COUNTS.total())
    for group, leaf in each_group(mask).items():
        n = getattr(COUNTS, group)
        for name in ("keys", "values"):
            assert (leaf[name][:, :n] == 0).all()
            assert (leaf[name][:, n:] == 1).all()
    assert (mask["embedding"] == 0).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3, b2=0.95),
        optax.lion(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0, 1e-3, 10))),
        optax.sgd(1e-3),
    ],
    ids=["adamw", "lion", "chain", "sgd"],
)
def test_moments_of_old_tokens_are_kept_and_new_ones_zero(params, optimizer):
    state = jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), jax.eval_shape(optimizer.init, params))
    grown = grow(CONFIG, params, state, to=UNEVEN, rng=KEY)
    shapes = jax.eval_shape(optimizer.init, grown.params)
    assert jax.tree.structure(grown.opt_state) == jax.tree.structure(shapes)
    for leaf, like, old in zip(*map(jax.tree.leaves, (grown.opt_state, shapes, state)), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        if leaf.ndim > 1:
            assert (leaf[:, : old.shape[1]] == 3).all()
            assert (leaf[:, old.shape[1] :] == 0).all()
        else:
            assert (leaf == 3).all()
    jax.eval_shape(optimizer.update, grown.params, grown.opt_state, grown.params)  # fits the grown parameters


def test_moments_that_cannot_grow_are_refused():
    config = dataclasses.replace(CONFIG, d_model=128, tokens=uniform_counts(128, 128))
    params = jax.eval_shape(lambda: init_params(Decoder(config), KEY, TOKENS))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    state = optax.adafactor(1e-3).init(params)  # rows and columns instead of a number for each parameter
    with pytest.raises(ValueError, match=r"v_row.*keys.* of shape \(2, 128\).*reset"):
        grow(config, params, state, to=TokenCounts(ffn=256), rng=KEY)


# Refusals.


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (TokenCounts(ffn=11), {}, "ffn has 12 parameter tokens and cannot grow to 11.*12 or more"),
        (COUNTS, {}, "every group already has"),
        (TokenCounts(), {}, "every group already has"),
        (
            TokenCounts(value=12),
            {"init": "copy"},
            "value has 8 parameter tokens; copies must make a multiple of that, not 12",
        ),
        (DOUBLE, {"init": "zero_both"}, "zero_both.*neither ever gets a gradient.*zero_keys or copy"),
        (DOUBLE, {"init": "ones"}, "init is 'ones'.*zero_keys, copy, random"),
        (DOUBLE, {"scale": "big"}, "scale is 'big'.*auto, fixed, current"),
    ],
)
def test_impossible_growth_is_refused(params, to, options, message):
    with pytest.raises(ValueError, match=message):
        grow(CONFIG, params, to=to, rng=KEY, **options)


def test_an_impossible_plan_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"steps.*0.*at least 1"):
        Growth(to=DOUBLE, steps=0)
    with pytest.raises(ValueError, match="zero_both"):
        Growth(to=DOUBLE, init="zero_both")


# As a surgery.

DATA = TextData(length=8, batch_size=2)


def test_the_task_grows_with_its_model(params):
    task = LanguageModeling(model=CONFIG)
    state = optax.adam(1e-3).init(params)
    surgery = Growth(to=UNEVEN, train="new")
    new_only, data = surgery.task(task, DATA)
    grown, opt_state = surgery.params(task, DATA, params, state, KEY)
    assert data is DATA
    expected = grow(CONFIG, params, state, to=UNEVEN, rng=KEY)
    assert new_only == LanguageModeling(model=expected.config, frozen_tokens=COUNTS)
    jax.tree.map(np.testing.assert_array_equal, (grown, opt_state), (expected.params, expected.opt_state))
    assert new_only.trainable(grown)["embedding"] == 0
    everything, _ = Growth(to=UNEVEN).task(task, DATA)
    assert everything.trainable(grown) is None


def test_a_model_without_parameter_tokens_cannot_grow():
    task = LanguageModeling(model=TransformerConfig(d_model=16, num_heads=2))
    with pytest.raises(ValueError, match="TransformerConfig has no parameter tokens"):
        Growth(to=UNEVEN).task(task, DATA)


def test_a_larger_run_starts_with_a_smaller_model(params):
    """`Experiment.start` names what would change the function; without a surgery, the sizes must fit."""
    source = Model(task=LanguageModeling(model=CONFIG), params=params, data=DATA)
    larger = LanguageModeling(model=grown_config(CONFIG, UNEVEN))
    run, lines = Experiment(task=larger, data=DATA, start=Growth()), []
    started = start_from(run, source, say=lines.append)
    expected, _ = Growth(to=UNEVEN).params(source.task, DATA, params, None, jax.random.key(run.train.seed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), started, expected)
    assert lines == []
    current = dataclasses.replace(larger, model=dataclasses.replace(larger.model, norm_tokens=TokenCounts()))
    start_from(dataclasses.replace(run, task=current), source, say=lines.append)
    (line,) = lines
    assert "model.norm_tokens." in line
    with pytest.raises(ValueError, match=r"has the shape .* in the first and has the shape .*set `start`"):
        start_from(dataclasses.replace(run, start=None), source)


def operation() -> Operation:
    growth = Growth(to=uniform_counts(32, 64), init="random", optimizer="keep", steps=2)
    return Operation(growth, text(TOKENFORMER), text(matched_transformer(TOKENFORMER)).task)


SURGERIES = {"growth": operation}
