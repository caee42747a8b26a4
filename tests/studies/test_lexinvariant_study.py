"""What a lexinvariant model is measured with: n-grams, ciphers and symbolic tasks, each against a plain definition."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import text

from jaxtok.configuration import load_config
from jaxtok.lm.decoder import init_params
from jaxtok.lm.lexinvariant import Bin, LexinvariantConfig, LexinvariantModeling
from jaxtok.studies.lexinvariant import (
    ByPosition,
    Cipher,
    InContext,
    adaptive_bigram,
    adaptive_unigram,
    cipher_accuracy,
    copy_last,
    decipher,
    lookup,
    most_frequent,
    ngrams_by_position,
    permutation,
    plot_by_position,
    solve,
    train_probe,
    tuned_unigram,
)
from jaxtok.training.loop import train
from jaxtok.verbs import evaluate, generate

VOCAB = 11
LETTERS = set(b"abcdefghijklmnopqrstuvwxyz ")
CONFIG = LexinvariantConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=24, vocab_size=VOCAB, max_length=64)
TASK = LexinvariantModeling(model=CONFIG)
STANDARD = dataclasses.replace(TASK, random_symbols=0.0)
BATCH = text(CONFIG).batch


def some_params(task):
    return init_params(task.module(), jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def by_hand(batch, probability):
    """-log p of each target, from the tokens of its document before it."""
    nats = np.zeros(batch["tokens"].shape)
    for row, index in np.ndindex(nats.shape):
        start = index - batch["positions"][row, index] if batch["segments"][row, index] else index
        context = batch["tokens"][row, start : index + 1].tolist()
        nats[row, index] = -math.log(probability(context, int(batch["targets"][row, index])))
    return nats


def unigram(context, v, a=0.2):
    return (context.count(v) + a) / (len(context) + a * VOCAB)


def bigram(context, v, b=5.0):
    followers = collections.Counter(after for x, after in itertools.pairwise(context) if x == context[-1])
    return (followers[v] + b * unigram(context, v)) / (followers.total() + b)


def test_adaptive_ngrams_are_their_definitions():
    real = BATCH["segments"] > 0
    words = [BATCH[name] for name in ("tokens", "targets", "positions")]
    for model, definition in ((adaptive_unigram, unigram), (adaptive_bigram, bigram)):
        np.testing.assert_allclose(
            np.asarray(model(*words, VOCAB))[real], by_hand(BATCH, definition)[real], rtol=1e-5, err_msg=str(definition)
        )
        total = sum(
            np.exp(-np.asarray(model(words[0], np.full_like(words[0], v), words[2], VOCAB))) for v in range(VOCAB)
        )
        np.testing.assert_allclose(total, 1, rtol=1e-5)
        renamed = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
        moved = model(renamed[words[0]], renamed[words[1]], words[2], VOCAB)
        np.testing.assert_allclose(moved, model(*words, VOCAB), rtol=1e-5)


def test_ngrams_by_position_are_means_over_real_tokens():
    found = ngrams_by_position([BATCH, BATCH], VOCAB, edges=(0, 4, 16), a=0.2)
    nats, mask = by_hand(BATCH, bigram), BATCH["mask"] > 0
    for part in found["bigram"]:
        here = mask & (BATCH["positions"] >= part.first) & (BATCH["positions"] <= part.last)
        assert part.tokens == 2 * here.sum() and part.nats == pytest.approx(nats[here].mean(), rel=1e-5)
    steady = BATCH | {"tokens": np.full_like(BATCH["tokens"], 3), "targets": np.full_like(BATCH["targets"], 3)}
    assert tuned_unigram([steady], VOCAB) == 0.05  # of one symbol only: the least smoothing
    assert tuned_unigram([BATCH], VOCAB) == 0.4  # of random symbols: the most


def test_lookup_can_be_solved_by_its_rule():
    examples = lookup(jax.random.key(0), 200, 4, VOCAB)
    tokens = np.asarray(examples.tokens)
    assert examples.chance == (1 / 4,) and examples.answers == 1 and tokens.shape == (200, 4 * 4 + 3)
    last = 0
    for row in tokens:
        context, (query, colon, answer) = row[:-3].reshape(4, 4), row[-3:]
        assert set(context[:, 1]) == {colon} and len(set(context[:, 3])) == 1
        table = dict(zip(context[:, 0], context[:, 2]))
        assert len({*table, *table.values(), colon, context[0, 3]}) == 10
        assert table[query] == answer
        last += query == context[-1, 0]
    assert copy_last(examples) == (pytest.approx(last / 200),) and 0.1 < last / 200 < 0.4
    assert most_frequent(examples) == (0.0,)
    assert len(set(tokens[:, 1])) > 5  # nothing is the same in all examples


def test_permutation_can_be_solved_by_its_rule():
    vocab = 20
    examples = permutation(jax.random.key(0), 100, 2, 3, vocab)
    tokens = np.asarray(examples.tokens)
    assert tokens.shape == (100, 2 * 8 + 7) and examples.answers == 3
    assert examples.chance == pytest.approx((1 / 3, 1 / 2, 1, 1 / 6))
    orders = set()
    for row in tokens:
        groups = np.append(row, row[7]).reshape(3, 8)
        assert len(set(groups[:, 3])) == len(set(groups[:, 7])) == 1 and groups[0, 3] != groups[0, 7]
        assert len(set(groups[:, :3].ravel()) | set(groups[0, [3, 7]])) == 11
        order = [groups[0, :3].tolist().index(symbol) for symbol in groups[0, 4:7]]
        np.testing.assert_array_equal(groups[:, 4:7], groups[:, order])
        orders.add(tuple(order))
    assert len(orders) == 6
    assert copy_last(examples)[-1] == most_frequent(examples)[-1] == 0


def test_tasks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="has 12 different symbols, but the vocabulary has 11"):
        lookup(jax.random.key(0), 1, 5, VOCAB)
    with pytest.raises(ValueError, match="has 14 different symbols"):
        permutation(jax.random.key(0), 1, 3, 3, VOCAB)
    with pytest.raises(ValueError, match="pairs is 0; it must be at least 1"):
        lookup(jax.random.key(0), 1, 0, VOCAB)
    with pytest.raises(ValueError, match=r"target is 'next'"):
        train_probe(TASK, {}, iter([]), target="next")
    with pytest.raises(ValueError, match="steps is 0"):
        train_probe(TASK, {}, iter([]), steps=0)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A task whose model knows the text: its likeliest next token is the one `ahead` positions later."""

    ahead: int

    def module(self):
        return self

    def apply(self, variables, tokens, keys):
        known = jnp.roll(variables["params"], -self.ahead, axis=1)[:, : tokens.shape[1]]
        return jax.nn.one_hot(known, 20), None


def test_answers_are_read_where_they_are_predicted():
    examples = permutation(jax.random.key(0), 50, 2, 3, 20)
    assert solve(Oracle(1), examples.tokens, examples) == (1, 1, 1, 1)
    assert solve(Oracle(0), examples.tokens, examples) == (0, 0, 0, 0)
    assert solve(Oracle(2), examples.tokens, examples)[:2] == (0, 0)
    one = lookup(jax.random.key(0), 50, 4, 20)
    assert solve(Oracle(1), one.tokens, one) == (1,)
    chance = solve(TASK, some_params(TASK), lookup(jax.random.key(1), 200, 2, VOCAB))
    assert chance[0] < 0.6  # random weights


def test_deciphering_finds_the_best_one_to_one_map():
    rng = np.random.default_rng(0)
    vocab, length = 4, 15
    log_p = np.log(rng.dirichlet(np.ones(vocab), length))
    cipher = rng.integers(0, vocab, length)
    for stop, found in zip((3, 15), decipher(log_p, cipher, (3, 15))):
        value = lambda to: sum(log_p[t, to[cipher[t]]] for t in range(stop))  # noqa: B023, E731
        assert value(found) == pytest.approx(max(map(value, itertools.permutations(range(vocab)))))
    # Where the probe is right nearly everywhere, the map is right about everything that was seen.
    truth = rng.permutation(vocab)
    sure = np.log(np.full((length, vocab), 0.1))
    sure[np.arange(length), truth[cipher]] = np.log(0.7)
    sure[0] = np.log(0.25)
    np.testing.assert_array_equal(decipher(sure, cipher, (length,))[0], truth)


def test_a_probe_reads_learned_embeddings_but_not_random_ones():
    """The standard model's hidden states name the symbol; a lexinvariant model without training knows nothing."""
    found = {}
    for task in (STANDARD, TASK):
        params = some_params(task)
        probe = train_probe(task, params, itertools.repeat(BATCH), steps=80, learning_rate=1e-2)
        found[task.random_symbols] = cipher_accuracy(task, params, probe, [BATCH], edges=(0, 8, 16))
    assert [(part.first, part.last) for part in found[0]] == [(0, 7), (8, 15)]
    assert sum(part.tokens for part in found[0]) == BATCH["mask"].sum()
    assert all(part.probe > 0.95 and part.mapped > 0.95 for part in found[0]), found[0]
    assert all(part.probe < 0.5 and part.mapped < 0.5 for part in found[1]), found[1]


def test_a_plot_is_written(tmp_path):
    curve = [Bin(0, 0, 3.0, 0.1, 5.0), Bin(1, 1, 2.0, 0.1, 5.0)]
    file = plot_by_position({"a, plain": curve, "a, permuted": curve}, tmp_path / "plot.png", uniform=3.3)
    assert file.stat().st_size > 1000


def small_study(tmp_path, steps, **options):
    study = load_config("lexinvariant_study")
    arms = tuple(
        dataclasses.replace(
            arm,
            data=dataclasses.replace(arm.data, **options),
            train=dataclasses.replace(
                arm.train,
                steps=steps,
                tensorboard=False,
                optimizer=dataclasses.replace(arm.train.optimizer, warmup=min(100 / steps, 0.5)),
            ),
        )
        for arm in study.arms
    )
    return dataclasses.replace(study, arms=arms, workdir=str(tmp_path / "study"))


@pytest.mark.slow
def test_a_study_measures_and_plots(tmp_path):
    study = small_study(tmp_path, 1, length=16, batch_size=2, eval_limit=1)
    study = dataclasses.replace(
        study,
        arms=study.arms[:1],
        measures=(ByPosition(batches=1), Cipher(steps=1, batches=1), InContext(pairs=(2,), examples=(1,), count=4)),
        test_batches=1,
    )
    assert study.run()
    numbers = json.loads((tmp_path / "study" / "results.json").read_text())["lexinvariant/0"]["test"]
    for name in ("plain_0_0", "permuted_8_15", "bigram_8_15", "cipher_map", "lookup_2_chance", "permutation_1_first"):
        assert math.isfinite(numbers[name]), name
    assert (tmp_path / "study" / "by_position.png").exists()
    run = tmp_path / "study" / "seed0" / "lexinvariant"
    (more,) = generate(run, prompt=("def abc",), max_new_tokens=3, stop_at_end=False, stream=False)
    assert LETTERS.issuperset(more) and len(more) <= 3
    assert evaluate(run, batches=1)["loss"] == pytest.approx(numbers["loss"], rel=0.5)
    with pytest.raises(ValueError, match="cannot represent the character 'D'"):
        generate(run, prompt=("Def",), stream=False)


@pytest.mark.slow
def test_the_papers_claims_in_small(tmp_path):
    """The lexinvariant model's loss falls along the context and does not see that letters are renamed; the standard one
    with the same body is far better, and far worse than guessing where they are. (Measured, last bin: 3.22 and 3.23 on
    renamed text, from 3.61 in the first; standard 2.32 and 4.99.)"""
    lexinvariant, standard, _ = small_study(tmp_path, 250, batch_size=16).arms
    bins = {}
    for arm in (lexinvariant, standard):
        result = train(dataclasses.replace(arm, workdir=str(tmp_path / arm.name)), quiet=True)
        for permuted in (False, True):
            parts = result.task.nats_by_position(result.params, arm.data.eval_batches("test"), permuted=permuted)
            bins[arm.name, permuted] = parts
    plain, renamed = bins["lexinvariant", False], bins["lexinvariant", True]
    assert plain[0].nats - plain[-1].nats > 0.1
    for one, other in zip(plain[4:], renamed[4:]):
        assert abs(one.nats - other.nats) < 0.03
    assert bins["standard", False][-1].nats < plain[-1].nats - 0.3
    assert bins["standard", True][-1].nats > math.log(28)
