"""What word pooling promises: what depends on what, cached generation, the words of a text, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import causal_lms
import chex
import jax
import jax.flatten_util
import numpy as np
import optax
import pytest
from tiny import Case, typed, zeros

from jaxtok.configuration import load_config
from jaxtok.data.word_units import WordUnitText
from jaxtok.decoding.engine import new_tokens
from jaxtok.decoding.sampling import Sampling
from jaxtok.interop.word_pooled import config_from, read_folder, write_folder
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.word_pooled import (
    END,
    PUBLISHED,
    PlainConfig,
    WordPooled,
    WordPooledConfig,
    WordPooling,
    begin_words,
    guess_words,
    init_params,
    score_words,
    split_words,
    word_accuracies,
)


def case() -> Case:
    """Random words in two documents, and padding at the end of the rows; every axis of a mesh divides the words."""
    data = WordUnitText(length=16, batch_size=8, max_units=5)
    model = WordPooledConfig(
        vocab_size=384,
        max_units=5,
        max_words=16,
        prefixes=2,
        d_model=16,
        num_layers=2,
        num_heads=8,
        unit_layers=2,
        encoder_heads=4,
        encoder_mlp_dim=32,
        dropout=0.0,
        encoder_dropout=0.0,
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, data.max_units + 1, (data.batch_size, data.length + 1))
    units = rng.integers(1, model.vocab_size, (*lengths.shape, data.max_units))
    units *= np.arange(data.max_units) < lengths[..., None]
    index = np.broadcast_to(np.arange(data.length), (data.batch_size, data.length))
    segments = (1 + (index >= 7)) * (index < rng.integers(9, 17, (data.batch_size, 1)))
    batch = {
        "words": units[:, :-1],
        "lengths": lengths[:, :-1],
        "targets": units[:, 1:],
        "target_lengths": lengths[:, 1:],
        "positions": np.where(index < 7, index, index - 7),
        "segments": segments,
        "mask": segments > 0,
        "bytes": lengths[:, 1:] + 1,
    }
    return Case(WordPooling(model=model), data, typed(data, batch))


TASKS = {"word_pooled": case}

EVIDENCE = {
    "word_pooled": {
        "generate, cached": "lm/test_word_pooled.py::test_cached_generation_is_recomputation",
        "formats": ("word_pooled", "word_pooled, plain"),
    }
}

CAUSAL_LMS = {
    "word_pooled_plain": lambda: Decoder(PlainConfig(**causal_lms.SIZES | {"rotary_fraction": 0.0}, mlp_dim=64))
}


def generator():
    sizes = {
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "unit_layers": 1,
        "encoder_heads": 2,
        "encoder_mlp_dim": 16,
    }
    config = WordPooledConfig(**sizes, prefixes=2, max_words=12, max_units=6, dropout=0.0, encoder_dropout=0.0)
    return WordPooling(model=config), lambda key: init_params(config, key)


TEXT_GENERATORS = {"word_pooled": generator}

TINY = WordPooledConfig(
    vocab_size=19,
    max_units=5,
    max_words=12,
    prefixes=2,
    d_model=16,
    num_layers=2,
    num_heads=2,
    unit_layers=2,
    encoder_heads=4,
    encoder_mlp_dim=24,
    dropout=0.0,
    encoder_dropout=0.0,
)
SWITCHES = ("prefix_ids", "mask_pads", "loss_on_pads", "dropout", "encoder_dropout")
CLEAN = dataclasses.replace(TINY, mask_pads=True, loss_on_pads=False)
OFFICIAL = dataclasses.replace(TINY, prefix_ids="official")


def noisy_params(config):
    """None of them zero, and none so small that rounding hides what depends on it. The switches have no parameters."""
    return _noisy_params(dataclasses.replace(config, **{name: getattr(TINY, name) for name in SWITCHES}))


@functools.cache
def _noisy_params(config):
    @jax.jit
    def make():
        params = init_params(config, jax.random.key(0))
        flat, unflatten = jax.flatten_util.ravel_pytree(params)
        return unflatten(flat + 0.3 * jax.random.normal(jax.random.key(1), flat.shape))

    return make()


def random_words(config, batch, count, width=0, seed=0):
    """Words of 1 to `width` units, filled up with END; and their lengths."""
    rng, width = np.random.default_rng(seed), width or config.max_units
    words = rng.integers(1, config.vocab_size, (batch, count, width)).astype(np.int32)
    lengths = rng.integers(1, width + 1, (batch, count)).astype(np.int32)
    return np.where(np.arange(width) < lengths[..., None], words, END), lengths


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(config, params, *args, method="__call__", **kwargs):
    return WordPooled(config).apply({"params": params}, *args, method=method, **kwargs)


def logits_of(config, words, lengths, **kwargs):
    """Logits [batch, words - 1, units, vocab] of each word but the first, given those before it."""
    return run(config, noisy_params(config), words[:, :-1], lengths[:, :-1], words[:, 1:], **kwargs)


@pytest.mark.parametrize("config", [CLEAN, OFFICIAL], ids=["clean", "official"])
def test_a_unit_changes_nothing_before_it(config):
    words, lengths = random_words(config, 2, 6)
    lengths[:, 3], words[:, 3] = 4, np.array([3, 4, 5, 6, END])
    changed = words.copy()
    changed[:, 3, 1] = 9
    before, after = logits_of(config, words, lengths), logits_of(config, changed, lengths)
    same = np.all(np.asarray(before) == np.asarray(after), axis=(0, 3))  # [word - 1, unit], bit for bit
    assert same[:2].all() and same[2, :2].all()
    assert not same[2, 2:].any() and not same[3:].any()


def test_a_words_vectors_are_its_own():
    words, lengths = random_words(TINY, 2, 6)
    others = random_words(TINY, 2, 6, seed=1)
    mixed = [
        np.where((np.arange(6) == 3).reshape(-1, *[1] * (a.ndim - 2)), a, b) for a, b in zip((words, lengths), others)
    ]
    alone = run(TINY, noisy_params(TINY), words, lengths, method="pool")[:, 3]
    assert np.array_equal(alone, run(TINY, noisy_params(TINY), *mixed, method="pool")[:, 3])


def canvases(config):
    """The vectors of the same words on the widest canvas and on a narrower one, and which words fill the latter."""
    words, lengths = random_words(config, 3, 6, width=4)
    wide = np.pad(words, ((0, 0), (0, 0), (0, 1)), constant_values=END)
    params = noisy_params(config)
    difference = run(config, params, words, lengths, method="pool") - run(config, params, wide, lengths, method="pool")
    return np.abs(difference).max((2, 3)), lengths == 4


def test_the_width_of_the_canvas_does_not_matter_with_both_switches():
    difference, full = canvases(CLEAN)
    assert difference[~full].max() < 1e-5
    assert difference[full].min() > 1e-2  # an end mark more


@pytest.mark.parametrize("switch", [{"prefix_ids": "official"}, {"mask_pads": False}])
def test_the_width_of_the_canvas_matters_with_either_official_switch(switch):
    difference, _ = canvases(dataclasses.replace(CLEAN, **switch))
    assert difference.max(1).min() > 1e-2


def test_documents_in_a_row_do_not_see_each_other():
    words, lengths = random_words(CLEAN, 1, 7)
    others, other_lengths = random_words(CLEAN, 1, 7, seed=1)
    others[:, 3:], other_lengths[:, 3:] = words[:, 3:], lengths[:, 3:]
    context = {"segments": np.array([[1, 1, 1, 2, 2, 2]]), "positions": np.array([[0, 1, 2, 0, 1, 2]])}
    packed = logits_of(CLEAN, words, lengths, **context)[:, 3:]
    assert np.array_equal(packed, logits_of(CLEAN, others, other_lengths, **context)[:, 3:])
    one = context | {"segments": np.ones((1, 6), np.int32)}
    assert np.abs(logits_of(CLEAN, words, lengths, **one)[:, 3:] - packed).max() > 1e-2
    first = [np.roll(a, -3, 1) for a in (words, lengths)]  # the second document first
    np.testing.assert_allclose(logits_of(CLEAN, *first, **context)[:, :3], packed, atol=1e-5)


@pytest.mark.parametrize("config", [CLEAN, OFFICIAL], ids=["clean", "official"])
def test_cached_generation_is_recomputation(config):
    """Rows have contexts of different lengths; every word is spelled again after the whole text."""
    params, model = noisy_params(config), WordPooled(config)
    words, lengths = random_words(config, 3, 5)
    counts = np.array([5, 2, 3])
    allowed = np.ones((config.max_units, config.vocab_size), bool)
    allowed[0, END] = False
    greedy = Sampling(temperature=0)
    engine, state = begin_words(model, params, words, lengths, counts, None, allowed, new=4, sampling=greedy)
    new = np.full((3, 4, config.max_units), END)
    for row, units in zip(new, new_tokens(engine.run(params, state)).tokens):
        for word, spelled in zip(row, split_words(config, units), strict=True):
            word[: len(spelled)] = spelled
    for row, count in enumerate(counts):
        text = np.concatenate([words[row, :count], new[row], words[row, count:]])[None]
        logits = run(config, params, text[:, :-1], (text != END).sum(-1)[:, :-1], text[:, 1:])[0]
        expected = np.where(allowed, logits, -np.inf).argmax(-1)
        for k, word in enumerate(new[row], count):
            end = int((word != END).sum()) + 1
            np.testing.assert_array_equal(expected[k - 1, :end], word[:end])


def test_sampled_words_depend_on_the_key_and_not_on_the_rest_of_the_batch():
    words, lengths = random_words(CLEAN, 3, 4)
    draw = functools.partial(guess_words, WordPooled(CLEAN), noisy_params(CLEAN), sampling=Sampling())
    drawn = draw(words, lengths, jax.random.key(0))
    assert np.array_equal(drawn, draw(words, lengths, jax.random.key(0)))
    assert not np.array_equal(drawn, draw(words, lengths, jax.random.key(1)))
    assert np.array_equal(drawn[:1], draw(words[:1], lengths[:1], jax.random.key(0)))


@pytest.mark.parametrize("prefixes", [1, 4])
def test_any_number_of_prefixes_has_the_same_shapes(prefixes):
    config = dataclasses.replace(TINY, prefixes=prefixes)
    words, lengths = random_words(config, 2, 4)

    def shapes():
        variables = {"params": init_params(config, jax.random.key(0))}
        pooled = WordPooled(config).apply(variables, words, lengths, method="pool")
        return pooled, WordPooled(config).apply(variables, words, lengths, words)

    pooled, logits = jax.eval_shape(shapes)
    assert pooled.shape == (2, 4, prefixes, config.d_model)
    assert logits.shape == (2, 4, config.max_units, config.vocab_size)


def count(config):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def formula(c):
    blocks = (c.num_layers + c.unit_layers) * (12 * c.d_model**2 + 13 * c.d_model)
    encoder = c.unit_layers * (4 * c.d_model**2 + 2 * 2048 * c.d_model + 2048 + 9 * c.d_model)
    rows = 2 * c.vocab_size + c.prefixes + (c.prefixes + c.max_units) + c.max_words * c.prefixes + 2
    return blocks + encoder + rows * c.d_model


def test_numbers_of_parameters():
    fixture = {"num_prefix": 3, "n_embd": 12, "n_head": 3, "n_layer": 2, "n_e2e_head": 2, "n_e2e_layer": 2}
    config = config_from(fixture | {"block_size": 8, "canvas_size": 6, "vocab_size": 19})
    assert count(config) == formula(config) == 112_216
    for name, config in PUBLISHED.items():
        assert count(config) == formula(config), name
    body = PUBLISHED["ebyte"].num_layers * (12 * 512**2 + 13 * 512)
    assert round(body / 1e6, 1) == 25.2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    experiment = load_config(f"word_pooled_{name}")
    params = jax.eval_shape(lambda: experiment.task.init(jax.random.key(0), zeros(experiment.data)))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) == formula(PUBLISHED[name])


def batch_of(config, words, lengths, mask=None):
    shape = (len(words), words.shape[1] - 1)
    return {
        "words": words[:, :-1],
        "lengths": lengths[:, :-1],
        "targets": words[:, 1:],
        "target_lengths": lengths[:, 1:],
        "positions": np.broadcast_to(np.arange(shape[1]), shape),
        "segments": np.ones(shape, np.int32) if mask is None else (mask > 0).astype(np.int32),
        "mask": np.ones(shape, np.float32) if mask is None else mask,
        "bytes": lengths[:, 1:] + 1,
    }


def test_one_batch_can_be_learned_by_heart():
    task = WordPooling(model=dataclasses.replace(CLEAN, init_std=0.1, unit_layers=1, num_layers=1))
    batch = batch_of(CLEAN, *random_words(CLEAN, 2, 7))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def learn():
        params = init_params(task.model, jax.random.key(0))

        def step(state, _):
            gradient = jax.grad(lambda p: task.loss(p, batch, jax.random.key(0), 0)[0])(state[0])
            updates, moments = optimizer.update(gradient, state[1])
            return (optax.apply_updates(state[0], updates), moments), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 150)[0][0]

    learned = learn()
    metrics = task.evaluate(learned, [batch])
    assert metrics["next_word_accuracy"] == 1.0 and metrics["loss"] < 0.1
    # Greedy spelling and teacher forcing agree on whether a word is right.
    guessed = guess_words(WordPooled(task.model), learned, batch["words"], batch["lengths"])
    assert word_accuracies(guessed, batch["targets"])[1].all()


def test_greedy_accuracy_needs_no_spelling():
    """For most words, the truth is the arg-max after the true units; for some, it has another last unit."""
    params, task = noisy_params(CLEAN), WordPooling(model=CLEAN)
    words, lengths = random_words(CLEAN, 4, 6)
    truth = np.array(guess_words(WordPooled(CLEAN), params, words, lengths))
    truth[::2, :, 1] = np.where(truth[::2, :, 1] == 3, 4, 3)
    target_lengths = np.cumprod(truth != END, -1).sum(-1)
    truth = np.where(np.arange(CLEAN.max_units) < target_lengths[..., None], truth, END)
    words, lengths = words[:, :5], lengths[:, :5]
    batch = batch_of(CLEAN, np.zeros((4, 6, 5), np.int32), np.zeros((4, 6), np.int32))
    batch |= {"words": words, "lengths": lengths, "targets": truth[:, :5], "target_lengths": target_lengths[:, :5]}
    _, nats, right = score_words(task, params, batch)
    spelled = guess_words(WordPooled(CLEAN), params, words, lengths)
    np.testing.assert_array_equal(right, word_accuracies(spelled, batch["targets"])[1])
    assert 0 < right.mean() < 1
    metrics = task.evaluate(params, [batch])
    counted = target_lengths[:, :5] > 0
    assert metrics["words"] == counted.sum()
    assert metrics["sampled_word_accuracy"] == pytest.approx(np.exp(-np.asarray(nats))[counted].mean(), rel=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def jitted_loss(task, params, batch, rng):
    return task.loss(params, batch, rng, 0)


@pytest.mark.parametrize("on_pads", [True, False])
def test_the_loss_is_a_mean_over_what_counts(on_pads):
    """The mean is over whole canvases, or over units and one end mark, and never over a row of padding."""
    task, params = WordPooling(model=dataclasses.replace(CLEAN, loss_on_pads=on_pads)), noisy_params(CLEAN)
    words, lengths = random_words(CLEAN, 3, 5)
    words[2], lengths[2] = END, 0
    mask = np.ones((3, 4), np.float32)
    mask[2] = 0
    batch = batch_of(CLEAN, words, lengths, mask)
    nats = np.asarray(score_words(WordPooling(model=CLEAN), params, batch)[0])
    assert np.isfinite(nats).all()
    own = np.arange(5) <= batch["target_lengths"][..., None]
    own[2] = False
    loss, metrics = jitted_loss(task, params, batch, jax.random.key(0))
    assert loss == pytest.approx(nats[:2].mean() if on_pads else nats[own].mean(), rel=1e-5)
    bits = nats[own].sum() / np.log(2) / batch["bytes"][:2].sum()
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    metrics = task.evaluate(params, [batch])
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5) and metrics["words"] == 8
    batch["mask"] = np.zeros_like(mask)
    assert jitted_loss(task, params, batch, jax.random.key(0))[0] == 0
    with pytest.raises(ValueError, match="no units that count"):
        task.evaluate(params, [batch])


def test_dropout_is_random_in_training_only():
    task = WordPooling(model=dataclasses.replace(CLEAN, dropout=0.5, encoder_dropout=0.5))
    batch = batch_of(CLEAN, *random_words(CLEAN, 2, 4))
    losses = [float(jitted_loss(task, noisy_params(CLEAN), batch, jax.random.key(i))[0]) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


BYTES = dataclasses.replace(CLEAN, vocab_size=384)


@pytest.fixture(scope="module")
def continued():
    task, prompts = WordPooling(model=BYTES), [b"one two", b"", b"a b c d e f g h i j k l m n ", "naïve".encode()]

    def run(prompts=prompts, **options):
        return task.continue_text(noisy_params(BYTES), prompts, **{"max_bytes": 40, "rng": jax.random.key(2)} | options)

    return run


def test_texts_are_continued(continued):
    texts = continued()
    assert texts == continued()
    assert all(len(text) <= 40 for text in texts) and texts[0][:1] in (b" ", b"")
    assert not texts[1].startswith(b" ") and not texts[2].startswith(b" ")
    assert any(len(text) == 40 for text in texts)
    assert all(b"  " not in text for text in texts)
    assert continued(sampling=Sampling(temperature=0), rng=None) == continued(sampling=Sampling(temperature=0))


def test_texts_that_cannot_be_continued(continued):
    with pytest.raises(ValueError, match="no prompt"):
        continued(prompts=[])
    with pytest.raises(ValueError, match="max_bytes is 0"):
        continued(max_bytes=0)
    with pytest.raises(ValueError, match="rng is None"):
        continued(rng=None)


def test_written_then_read_is_the_same(tmp_path):
    for name, config in {
        "pooled": dataclasses.replace(CLEAN, encoder_mlp_dim=2048, dropout=0.1, encoder_dropout=0.1),
        "plain": PlainConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=64, vocab_size=19, max_length=8),
    }.items():
        params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
        again, tree = read_folder(write_folder(tmp_path / name, config, params))
        assert again == config
        chex.assert_trees_all_equal(tree, params)
    with pytest.raises(ValueError, match="encoder_mlp_dim is 24"):
        write_folder(tmp_path / "other", CLEAN, params)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="no n_layer"):
        config_from({"n_embd": 8, "n_head": 2})


def test_configs_that_cannot_be():
    for options, message in {
        ("prefixes", 0): "prefixes is 0; it must be at least 1",
        ("max_words", 1): "max_words is 1; it must be at least 2",
        ("max_units", 0): "max_units is 0",
        ("vocab_size", 1): "the end mark alone",
        ("encoder_heads", 3): "encoder_heads is 3, which does not divide",
        ("encoder_heads", 0): "encoder_heads is 0",
        ("num_heads", 3): "num_heads is 3, which does not divide",
        ("dropout", 1.0): r"dropout is 1\.0",
        ("encoder_dropout", -1.0): r"encoder_dropout is -1\.0",
        ("prefix_ids", "other"): "must be one of own, official",
    }.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **dict([options]))
    with pytest.raises(ValueError, match="finds no rows"):
        dataclasses.replace(TINY, prefix_ids="official", max_units=20)


def test_units_and_words_are_those_of_the_data():
    """Texts are continued with the task's tokenizer and rule, so they must be the ones that it was trained with."""
    model, data = (
        dataclasses.replace(TINY, vocab_size=0),
        WordUnitText(tokenizer="characters: ab", rule="spaces", max_units=5, length=8),
    )
    task = WordPooling(model=model).fit(data)
    assert (task.tokenizer, task.rule, task.fit(data)) == ("characters: ab", "spaces", task)


def test_inputs_that_cannot_be():
    with pytest.raises(ValueError, match="vocab_size is 19, but bytes are units up to 258"):
        WordPooling(model=TINY).fit(None)
    with pytest.raises(ValueError, match=r"data\.max_units is 1, but task\.model\.max_units is 5"):
        WordPooling(model=dataclasses.replace(TINY, vocab_size=384)).fit(WordUnitText(max_units=1))
    with pytest.raises(ValueError, match="rule is 'other'; it must be one of paper"):
        WordPooling(model=TINY, rule="other")
    words, lengths = random_words(TINY, 1, 3, width=6)
    with pytest.raises(ValueError, match="a word has 6 units, but the model's max_units is 5"):
        logits_of(TINY, words, lengths)
    with pytest.raises(ValueError, match="13 words in a row, but the model's max_words is 12"):
        logits_of(TINY, *random_words(TINY, 1, 14))
    words, lengths = random_words(TINY, 1, 3)
    words[0, 0, 0] = TINY.vocab_size  # there is no such unit, so the loop stops at a loss that is not a number
    assert np.isnan(logits_of(TINY, words, lengths)).any()
