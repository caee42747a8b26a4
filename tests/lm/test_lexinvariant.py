"""Lexinvariance, exactly: what renaming, drawing and learning the rows of tables changes, and what it does not."""

from __future__ import annotations

import dataclasses
import functools
import math

import causal_lms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SIZES, TOKENFORMER, Case, text

from jaxtok.configuration import load_config
from jaxtok.decoding import Sampling, generate
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.lexinvariant import (
    PUBLISHED,
    Lexinvariant,
    LexinvariantConfig,
    LexinvariantModeling,
    position_edges,
    sequence_keys,
)
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.tokenformer import uniform_counts
from jaxtok.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxtok.transfer.growth import Growth


def case(model, **options) -> Case:
    return dataclasses.replace(text(model), task=LexinvariantModeling(model=model, **options), drawn=True)


TASKS = {
    "lexinvariant": lambda: case(LexinvariantConfig(**SIZES, mlp_dim=32)),
    "semi_lexinvariant": lambda: case(TOKENFORMER, random_symbols=0.5, block=24),
}

EVIDENCE = {"lexinvariant": {"grow": "lm/test_lexinvariant.py::test_a_body_of_parameter_tokens_grows"}}

CAUSAL_LMS = {
    "lexinvariant": lambda: Lexinvariant(
        LexinvariantConfig(**causal_lms.SIZES | causal_lms.TIED | {"rotary_fraction": 0.0})
    ),
    "semi_lexinvariant": lambda: Lexinvariant(
        LlamaConfig(**causal_lms.LLAMA | causal_lms.TIED), random_symbols=0.5, block=12
    ),
}

VOCAB, BATCH, LENGTH = 29, 3, 12  # no other axis is 29
CONFIG = LexinvariantConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, vocab_size=VOCAB, max_length=32)
PURE = Lexinvariant(CONFIG)
SEMI = Lexinvariant(CONFIG, random_symbols=0.3)


@functools.cache
def noisy_params(model):
    """Parameters, none of them zero."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    rng = np.random.default_rng(0)

    def noisy(path, leaf):
        return jnp.asarray(rng.normal(float(path[-1].key == "scale"), 0.4, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(noisy, shapes)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def call(model, params, *args, method=None, **kwargs):
    return model.apply({"params": params}, *args, method=method, **kwargs)


def some_tokens(batch=BATCH, length=LENGTH, vocab=VOCAB):
    return jax.random.randint(jax.random.key(2), (batch, length), 0, vocab)


def some_keys(seed=0, batch=BATCH):
    return sequence_keys(jax.random.key(seed), batch)


def test_renamed_symbols_have_renamed_probabilities():
    """If the rows of the tables are renamed too, hidden states stay the same and logits move."""
    params, tokens = noisy_params(PURE), some_tokens()
    table = call(PURE, params, some_keys(), method="table")
    logits, _ = call(PURE, params, tokens, table=table)
    for seed in range(20):
        renamed = np.random.default_rng(seed).permutation(VOCAB)
        moved, _ = call(PURE, params, renamed[tokens], table=jnp.zeros_like(table).at[:, renamed].set(table))
        np.testing.assert_allclose(moved[..., renamed], logits, atol=1e-5)
    assert jnp.abs(call(PURE, params, renamed[tokens], table=table)[0] - logits).max() > 1e-2  # so the test can fail


def test_each_sequence_has_a_table_of_its_own_and_each_key_one():
    params = noisy_params(PURE)
    table = call(PURE, params, some_keys(), method="table")
    assert table.shape == (BATCH, VOCAB, 16)
    assert jnp.abs(table[0, 0] - table[1, 0]).max() > 0.1 and jnp.abs(table[0, 0] - table[0, 1]).max() > 0.1
    np.testing.assert_array_equal(table, call(PURE, params, some_keys(), method="table"))
    assert jnp.abs(table - call(PURE, params, some_keys(1), method="table")).min() > 0
    assert abs(float(table.mean())) < 0.1 and abs(float(table.std()) - 1) < 0.1
    # The same text in each row: a batch of one table would give the same numbers.
    logits, _ = call(PURE, params, jnp.broadcast_to(some_tokens()[:1], (BATCH, LENGTH)))
    assert jnp.abs(logits[0] - logits[1]).max() > 1e-2


def test_a_symbol_has_one_row_wherever_it_stands():
    tokens = jnp.array([[5, 7, 5, 5]] * BATCH)
    rows = call(PURE, noisy_params(PURE), tokens, keys=some_keys(), method="embed")
    np.testing.assert_array_equal(rows[:, 0], rows[:, 2])
    table = call(PURE, noisy_params(PURE), some_keys(), method="table")
    np.testing.assert_array_equal(rows, table[:, [5, 7, 5, 5]])


def test_no_parameter_knows_the_vocabulary():
    def axes(model):
        return {size for leaf in jax.tree.leaves(noisy_params(model)) for size in leaf.shape}

    assert VOCAB not in axes(PURE) and VOCAB in axes(SEMI)


@pytest.mark.parametrize("model", [PURE, SEMI], ids=["pure", "semi"])
def test_blocks_of_a_table_give_the_same_loss_and_gradients(model):
    params, tokens, keys = noisy_params(model), some_tokens(), some_keys()

    @functools.partial(jax.jit, static_argnums=0)
    def loss(model, params):
        def mean(params):
            nats = model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], keys=keys, method="nats")
            return nats.mean(), nats

        return jax.value_and_grad(mean, has_aux=True)(params)

    (_, nats), gradient = loss(model, params)
    blocks = model.clone(block=8)  # does not divide 29
    (_, again), gradient_again = loss(blocks, params)
    np.testing.assert_allclose(again, nats, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient_again), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(call(blocks, params, tokens)[0], call(model, params, tokens)[0], atol=1e-5)


def test_without_random_symbols_it_is_the_tied_language_model():
    """Bit for bit: s = 16^-1/2 is a power of 2, by which the final norm can be scaled without rounding."""
    case = text(dataclasses.replace(CONFIG, vocab_size=64))
    model, rng = case.task.model, jax.random.key(3)
    standard = LanguageModeling(model=model)
    params = noisy_params(Decoder(model))
    same = LexinvariantModeling(model=model, random_symbols=0.0, readout_scale=1.0)
    trees = [jax.tree.structure(jax.eval_shape(task.init, rng, case.batch)) for task in (same, standard)]
    assert trees[0] == trees[1]
    loss = jax.jit(standard.loss)(params, case.batch, rng, 0)[0]
    assert jax.jit(same.loss)(params, case.batch, rng, 0)[0] == loss
    scaled = dataclasses.replace(same, readout_scale=0.0)
    assert jax.jit(scaled.loss)(params, case.batch, rng, 0)[0] != loss
    quadrupled = params | {"final_norm": {"scale": 4 * params["final_norm"]["scale"]}}
    assert jax.jit(scaled.loss)(quadrupled, case.batch, rng, 0)[0] == loss
    mine, other = (task.evaluate(params, [case.batch]) for task in (same, standard))
    assert mine["loss_stderr"] == 0 and {name: mine[name] for name in other} == pytest.approx(other, rel=1e-5)


def test_random_symbols_are_the_asked_part():
    """At 1, the rows are those of the pure model; below, a symbol's whole row is either random or learned."""
    params, keys = noisy_params(SEMI), some_keys(batch=400)
    drawn = call(PURE, noisy_params(PURE), keys, method="table")
    mixed = call(SEMI, params, keys, method="table")
    random = (mixed == drawn).all(-1)
    assert (random | (mixed == params["embedding"]).all(-1)).all()
    assert abs(float(random.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / random.size)
    assert float(random.any(0).mean()) == 1 and random[0].tolist() != random[1].tolist()
    np.testing.assert_array_equal(call(PURE.clone(random_symbols=1.0), {}, keys, method="table"), drawn)


def test_training_draws_tables_and_evaluation_of_a_semi_lexinvariant_model_does_not():
    case = text(dataclasses.replace(CONFIG, vocab_size=VOCAB))
    semi = LexinvariantModeling(model=case.task.model, random_symbols=0.3)
    params = noisy_params(SEMI)
    loss = jax.jit(lambda key: semi.loss(params, case.batch, jax.random.key(key), 0)[0])
    assert loss(0) == loss(0) != loss(1)
    learned = semi.evaluate(params, [case.batch])
    assert learned == dataclasses.replace(semi, random_symbols=0.0).evaluate(params, [case.batch])
    assert learned["loss_stderr"] == 0 and abs(learned["loss"] - loss(0)) > 1e-3


def test_symbols_that_have_not_been_seen_are_exchangeable():
    """Over draws of the tables, the first prediction is uniform over all symbols but the one that was seen."""
    draws = 2000
    logits, _ = call(PURE, noisy_params(PURE), jnp.full((draws, 1), 4), keys=some_keys(batch=draws))
    p = np.delete(np.asarray(jax.nn.softmax(logits[:, 0])), 4, axis=1)
    stderr = p.std(0, ddof=1) / math.sqrt(draws)
    assert (np.abs(p.mean(0) - p.mean()) < 4 * stderr).all()
    assert stderr.max() < 0.1 * p.mean()


def renaming_changes_nothing(task, params, tokens, draws=64):
    """-log p of a text and of the text renamed, each over draws: closer than three standard errors."""

    def nats(tokens, seed):
        rows = jnp.broadcast_to(tokens, (draws, *tokens.shape))
        found = call(task.module(), params, rows[:, :-1], rows[:, 1:], keys=some_keys(seed, draws), method="nats")
        return found.sum(1).mean(), found.sum(1).std(ddof=1) / math.sqrt(draws)

    renamed = np.random.default_rng(0).permutation(task.model.vocab_size)
    (one, error), (other, other_error) = nats(tokens, 1), nats(renamed[tokens], 2)
    return abs(one - other) < 3 * math.hypot(error, other_error)


def test_a_renamed_text_is_as_likely():
    task = LexinvariantModeling(model=CONFIG)
    assert renaming_changes_nothing(task, noisy_params(PURE), some_tokens()[0])
    standard = dataclasses.replace(task, random_symbols=0.0)
    assert not renaming_changes_nothing(standard, noisy_params(standard.module()), some_tokens()[0])


def test_padding_changes_nothing():
    task, params = LexinvariantModeling(model=CONFIG), noisy_params(PURE)
    batch = text(dataclasses.replace(CONFIG, vocab_size=VOCAB)).batch
    padding = batch["segments"] == 0
    assert padding.any()
    other = {name: np.where(padding, (batch[name] + 3) % VOCAB, batch[name]) for name in ("tokens", "targets")}
    loss = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(0), 0)[0])
    assert loss(batch) == loss(batch | other)
    words = {name: np.where(padding, batch[name], (batch[name] + 3) % VOCAB) for name in ("tokens", "targets")}
    assert loss(batch) != loss(batch | words)


@pytest.mark.parametrize("model", [PURE, SEMI.clone(block=8)], ids=["pure", "semi"])
def test_generation_keeps_each_rows_table(model):
    """Greedy decoding with the cache equals recomputing the whole text with one table; another seed, another table."""
    params, prompts = noisy_params(model), some_tokens(length=6).tolist()

    def continued(model):
        rows = generate(model, params, prompts, max_new_tokens=8, chooser=Sampling(temperature=0)).tokens
        return np.array([prompt + row for prompt, row in zip(prompts, rows)])

    found = continued(model)
    logits, _ = call(model, params, found, keys=sequence_keys(jax.random.key(model.seed), BATCH))
    np.testing.assert_array_equal(logits.argmax(-1)[:, 5:-1], found[:, 6:])
    assert (continued(model.clone(seed=1)) != found).any()


def test_a_cache_has_the_tables_it_was_made_with():
    params, tokens, keys = noisy_params(PURE), some_tokens(), some_keys(7)
    cache = PURE.init_cache(BATCH, LENGTH, keys)
    logits, cache = call(PURE, params, tokens, cache=cache)
    np.testing.assert_allclose(logits, call(PURE, params, tokens, keys=keys)[0], atol=1e-5)
    with pytest.raises(ValueError, match="a cache, which has its own"):
        PURE.apply({"params": params}, tokens, cache=cache, keys=keys)


BODIES = {
    "gpt2": GPT2Config(**SIZES, mlp_dim=32),
    "llama": LlamaConfig(**SIZES, num_kv_heads=2, mlp_dim=32, tie_embeddings=True),
    "gemma": LlamaConfig(**SIZES, mlp_dim=32, norm="rms_plus_one", tie_embeddings=True, scale_embeddings=True),
    "tokenformer": TOKENFORMER,
}


@pytest.mark.parametrize("name", BODIES)
def test_any_body_is_invariant(name):
    model = Lexinvariant(BODIES[name])
    params, tokens = noisy_params(model), some_tokens(vocab=64)
    assert 64 not in {size for leaf in jax.tree.leaves(params) for size in leaf.shape}
    table = jax.random.normal(jax.random.key(5), (BATCH, 64, 16))
    renamed = np.random.default_rng(0).permutation(64)
    logits, _ = call(model, params, tokens, table=table)
    moved, _ = call(model, params, renamed[tokens], table=jnp.zeros_like(table).at[:, renamed].set(table))
    np.testing.assert_allclose(moved[..., renamed], logits, atol=2e-5 * float(jnp.abs(logits).max()))


def test_a_body_of_parameter_tokens_grows():
    task = LexinvariantModeling(model=TOKENFORMER)
    case = text(TOKENFORMER)
    params = noisy_params(task.module())
    growth = Growth(to=uniform_counts(32, 64))
    grown, _ = growth.task(task, case.data)
    larger, _ = growth.params(task, case.data, params, None, jax.random.key(0))
    assert isinstance(grown, LexinvariantModeling) and grown.model.tokens == growth.to
    one, other = (float(t.evaluate(p, [case.batch])["loss"]) for t, p in ((task, params), (grown, larger)))
    assert other == pytest.approx(one, rel=1e-5)


def test_losses_by_position_are_parts_of_the_whole():
    task, params = LexinvariantModeling(model=CONFIG, draws=5), noisy_params(PURE)
    batch = text(dataclasses.replace(CONFIG, vocab_size=VOCAB)).batch
    assert position_edges(16) == (0, 1, 2, 4, 8, 16) and position_edges(17)[-2:] == (16, 17)
    bins = task.nats_by_position(params, [batch, batch])
    whole = task.evaluate(params, [batch, batch])
    assert [(part.first, part.last) for part in bins] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert sum(part.tokens for part in bins) == whole["tokens"] == 2 * batch["mask"].sum()
    total = sum(part.nats * part.tokens for part in bins)
    assert total / whole["tokens"] == pytest.approx(whole["loss"], rel=1e-5)
    assert all(part.stderr > 0 for part in bins) and whole["loss_stderr"] > 0
    bits = whole["loss"] * whole["tokens"] / math.log(2) / whole["bytes"]
    assert whole["bits_per_byte"] == pytest.approx(bits)
    (late,) = task.nats_by_position(params, [batch, batch], edges=(8, 16))
    assert late.tokens == bins[-1].tokens and late.nats == pytest.approx(bins[-1].nats, rel=1e-5)
    with pytest.raises(ValueError, match="no tokens that count"):
        task.nats_by_position(params, [])
    for edges in ((8,), (0, 8, 4), (0, 0)):
        with pytest.raises(ValueError, match="it must be at least two numbers in rising order"):
            task.nats_by_position(params, [batch], edges=edges)


@pytest.mark.parametrize(("name", "vocab"), [("150m-characters", 128), ("150m-subwords", 32000)])
def test_published_sizes(name, vocab):
    config = PUBLISHED[name]
    assert config.vocab_size == vocab
    shapes = jax.eval_shape(lambda: init_params(Lexinvariant(config), jax.random.key(0), jnp.zeros((1, 1), int)))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    matrices = 12 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert sum(size for size in sizes if size > 12 * 1024) == matrices == 150_994_944
    assert sum(sizes) == matrices + 25 * 1024 + 32 * 8


@pytest.mark.parametrize("name", ["characters", "subwords"])
def test_published_configs(name):
    experiment = load_config(f"lexinvariant_pile_150m_{name}")
    assert dataclasses.replace(experiment.task.model, dtype="float32", remat="none") == PUBLISHED[f"150m-{name}"]
    assert experiment.task.random_symbols == 1 and experiment.data.length == 512


def test_what_cannot_be_is_refused():
    def built(**options):
        return LexinvariantModeling(**{"model": CONFIG} | options)

    with pytest.raises(ValueError, match=r"random_symbols is 1\.2; it is a probability"):
        built(random_symbols=1.2)
    with pytest.raises(ValueError, match="readout_scale is -1"):
        built(readout_scale=-1.0)
    with pytest.raises(ValueError, match="block is -4"):
        built(block=-4)
    with pytest.raises(ValueError, match="draws is 0"):
        built(draws=0)
    with pytest.raises(ValueError, match=r"tie_embeddings is False; .* reads out with the rows that it reads in"):
        built(model=LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"vocab_size is 2147483648; .* below 2\^31"):
        built(model=dataclasses.replace(CONFIG, vocab_size=2**31))
    with pytest.raises(ValueError, match="vocab_size is 0"):
        Lexinvariant(dataclasses.replace(CONFIG, vocab_size=0)).init(jax.random.key(0), some_tokens())
    short = {name: array[:, :1] for name, array in text(CONFIG).batch.items()}
    with pytest.raises(ValueError, match="rows hold 1 token"):
        jax.eval_shape(lambda: built().loss(noisy_params(PURE), short, jax.random.key(0), 0))


@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("model", [PURE, SEMI], ids=["pure", "semi"])
def test_an_unknown_symbol_makes_no_number(model, block):
    """As with other models, the loop stops and the error says where."""
    params, tokens = noisy_params(model), some_tokens()
    fine = call(model.clone(block=block), params, tokens, tokens, method="nats")
    assert jnp.isfinite(fine).all()
    for wrong in (
        (tokens.at[0, 4].set(VOCAB), tokens),
        (tokens.at[0, 4].set(-1), tokens),
        (tokens, tokens.at[0, 4].set(VOCAB)),
    ):
        nats = call(model.clone(block=block), params, *wrong, method="nats")
        assert jnp.isnan(nats[0, 4]) and jnp.isfinite(nats[1:]).all()


@pytest.mark.slow
def test_a_small_model_learns_to_copy():
    """On 16 letters drawn from 26, twice, it learns to copy, and the loss of a renamed text is the same."""
    config = LexinvariantConfig(num_layers=2, d_model=64, num_heads=4, mlp_dim=256, vocab_size=26, max_length=32)
    task = LexinvariantModeling(model=config)
    optimizer = make_optimizer(OptimizerConfig(b2=0.98, weight_decay=0.0))
    rates = OptimizerConfig(learning_rate=6e-3, min_learning_rate=0.0, schedule="linear", warmup=50 / 600)

    def batch(key):
        half = jax.random.randint(key, (32, 16), 0, 26)
        tokens = jnp.concatenate([half, half], 1)
        ones = jnp.ones((32, 31))
        places = jnp.broadcast_to(jnp.arange(31), (32, 31))
        inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": places}
        return inputs | {"segments": jnp.ones((32, 31), int), "mask": ones, "bytes": ones}

    @jax.jit
    def step(params, state, number):
        data, rng = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        gradient = jax.grad(lambda params: task.loss(params, batch(data), rng, number)[0])(params)
        updates, state = optimizer.update(gradient, state, params)
        rate = learning_rate(rates, number, 600)
        return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), state

    params = init_params(task.module(), jax.random.key(0), jnp.zeros((1, 1), int))
    state = optimizer.init(params)
    for number in range(600):
        params, state = step(params, state, number)
    first, second = task.nats_by_position(params, [batch(jax.random.key(1))], edges=(0, 15, 31))
    assert first.nats > 3 and second.nats < 1.5, (first, second)
    assert renaming_changes_nothing(task, params, batch(jax.random.key(2))["tokens"][0])
