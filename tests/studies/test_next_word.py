"""Next-word accuracy is that of generation, for word-pooled and for plain models, and is right for each frequency."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.data.word_units import NormalizedText, WordUnitText
from jaxtok.decoding.sampling import Sampling
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.word_pooled import PlainConfig, WordPooledConfig, WordPooling, init_params
from jaxtok.studies.next_word import Guess, NextWordAccuracy, generated, plain_guesses, pooled_guesses
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece

RNG = np.random.default_rng(0)
WORDS = ["a", "ba", "ab", "abb"]
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(3, 12), p=[0.7, 0.1, 0.1, 0.1])) for _ in range(40)]
SIZES = {"d_model": 16, "num_layers": 1, "num_heads": 1, "dropout": 0.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("next_word") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def pooled(corpus):
    sizes = {"max_units": 4, "max_words": 8, "prefixes": 1, "unit_layers": 1, "encoder_heads": 1, "encoder_mlp_dim": 8}
    characters = "characters:ab"
    model = WordPooledConfig(**SIZES | sizes | {"vocab_size": 259, "encoder_dropout": 0.0})
    data = WordUnitText(corpus=corpus, tokenizer=characters, rule="spaces", length=8, batch_size=4, max_units=4)
    return WordPooling(model=model, tokenizer=characters, rule="spaces"), data


def plain_case(corpus, tokenizer):
    vocab = load_tokenizer(tokenizer).vocab_size
    model = PlainConfig(**SIZES, mlp_dim=16, vocab_size=vocab, max_length=32)
    data = NormalizedText(corpus=corpus, tokenizer=tokenizer, rule="spaces", length=20, batch_size=4)
    return LanguageModeling(model=model), data


@pytest.fixture(scope="module", params=["characters: ab", "subwords"])
def plain(request, corpus, tmp_path_factory):
    tokenizer = request.param
    if tokenizer == "subwords":
        path = tmp_path_factory.mktemp("tokenizer") / "subwords.model"
        tokenizer = str(train_sentencepiece(TEXTS, path, vocab_size=270, model_type="bpe"))
    return plain_case(corpus, tokenizer)


def fresh(task):
    return jax.jit(functools.partial(init_params, task.model))(jax.random.key(0))


def bigrams(params, rows):
    """Parameters with which the next token depends only on the last one, with the frequencies of the rows."""
    ids = np.unique(np.concatenate(rows))
    params = dict(params, stack=jax.tree.map(jnp.zeros_like, params["stack"]))
    params["embedding"] = (
        params["embedding"].at[ids].set(np.random.default_rng(1).normal(size=(len(ids), SIZES["d_model"])))
    )
    embedded = np.asarray(params["embedding"])[ids]
    hidden = (embedded - embedded.mean(1, keepdims=True)) / np.sqrt(embedded.var(1, keepdims=True) + 1e-5)
    counts = np.full((len(ids), len(params["embedding"])), 1e-5)
    for row in rows:
        np.add.at(counts, (np.searchsorted(ids, row[:-1]), row[1:]), 1)
    head = np.linalg.lstsq(hidden, np.log(counts / counts.sum(1, keepdims=True)), rcond=None)[0].T
    return params | {"head_matrix": jnp.asarray(head, jnp.float32)}


def test_words_of_a_plain_model_are_those_that_it_generates(plain):
    task, data = plain
    tokenizer = load_tokenizer(data.tokenizer)
    rows = [[tokenizer.eod_id, *tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]
    params = bigrams(fresh(task), rows)
    batches = list(data.eval_batches("all"))[:2]
    guesses = list(plain_guesses(task, params, batches, tokenizer))
    assert {guess.word.decode() for guess in guesses} <= set(WORDS)
    greedy = [
        right
        for batch in batches
        for right in generated(task, params, batch, tokenizer, sampling=Sampling(temperature=0))
    ]
    assert [guess.right for guess in guesses] == greedy
    assert 0 < sum(greedy) < len(greedy)
    drawn = [
        right
        for seed in range(4)
        for batch in batches
        for right in generated(task, params, batch, tokenizer, rng=jax.random.key(seed))
    ]
    expected = np.array([guess.probability for guess in guesses])
    error = np.sqrt((expected * (1 - expected)).mean() / len(drawn))
    assert abs(np.mean(drawn) - expected.mean()) < 4 * error


def test_words_of_a_pooled_model_are_those_that_it_generates(pooled):
    task, data = pooled
    params = fresh(task)
    params["head_matrix"] = 20 * params["head_matrix"].at[3:].set(0)
    batches = list(data.eval_batches("all"))[:3]
    guesses = list(pooled_guesses(task, params, batches))
    tokenizer = load_tokenizer(data.tokenizer)
    greedy = [
        right
        for batch in batches
        for right in generated(task, params, batch, tokenizer, sampling=Sampling(temperature=0))
    ]
    assert [guess.right for guess in guesses] == greedy
    assert {guess.word.decode() for guess in guesses} == set(WORDS)


def test_context(pooled, corpus):
    """Each model is asked for the same words, where its rows hold whole documents."""
    task, data = pooled
    data = dataclasses.replace(data, length=400, batch_size=1)
    task = dataclasses.replace(task, model=dataclasses.replace(task.model, max_words=400))
    params = fresh(task)
    other, text = plain_case(corpus, "characters: ab")
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, max_length=1000))
    text = dataclasses.replace(text, length=1000, batch_size=1)
    untrained = fresh(other)
    assert sum(len(t.split()) + 1 for t in TEXTS) <= 400 and sum(len(t) + 1 for t in TEXTS) <= 1000
    for context in (0, 2):
        found = collections.Counter(g.word for g in pooled_guesses(task, params, data.eval_batches("all"), context))
        theirs = plain_guesses(other, untrained, text.eval_batches("all"), load_tokenizer(text.tokenizer), context)
        expected = collections.Counter(word.encode() for t in TEXTS for word in t.split()[context:])
        assert found == expected
        assert collections.Counter(g.word for g in theirs) == expected


def test_buckets():
    guesses = [
        Guess(b"new", True, 0.5),
        Guess(b"rare", False, 0.25),
        Guess(b"rare", True, 0.75),
        Guess(b"the", True, 1.0),
    ]
    counts = collections.Counter({b"rare": 2, b"the": 50})
    found = NextWordAccuracy(edges=(0, 10)).summary(guesses, counts)
    assert found == {
        "next_word_accuracy": 0.75,
        "sampled_word_accuracy": 0.625,
        "words": 4.0,
        "next_word_accuracy_0": 1.0,
        "sampled_word_accuracy_0": 0.5,
        "words_0": 1.0,
        "next_word_accuracy_1_10": 0.5,
        "sampled_word_accuracy_1_10": 0.5,
        "words_1_10": 2.0,
        "next_word_accuracy_above_10": 1.0,
        "sampled_word_accuracy_above_10": 1.0,
        "words_above_10": 1.0,
    }
    with pytest.raises(ValueError, match="edges are"):
        NextWordAccuracy(edges=(10, 0))


def test_as_a_measure(pooled, corpus):
    task, data = pooled
    measure = NextWordAccuracy(split="train", batches=1)
    params = fresh(task)
    found = measure(task, params, data)
    assert found["words"] > 0 and found["words_0"] == 0 and "next_word_accuracy_0" not in found
    assert measure(object(), params, data) == {}
