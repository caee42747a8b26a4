"""Pairs of inputs and targets: span corruption loses nothing, and character edits are what they say."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import check_spec

from jaxtok.data.character_edits import CharacterEdits, edited, random_letters
from jaxtok.data.span_corruption import SpanCorruption, corrupt, noise_counts, noise_mask, raw_length, restore

DATASETS = {
    "span_corruption": lambda texts, folder: SpanCorruption(corpus=str(texts), length=20, batch_size=4, mean_span=3.0),
    "character_edits": lambda texts, folder: CharacterEdits(corpus=str(texts), length=24, batch_size=4),
}

DOCUMENTS = [f"Line {i}: the quick brown fox, é and ü, jumps over {i % 7} lazy dogs.\n" * (i % 5) for i in range(80)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=2, max_size=200), st.sampled_from([0.1, 0.15, 0.5]), st.sampled_from([1.0, 3.0, 20.0]))
def test_spans_go_back_to_where_they_were(raw, density, mean_span):
    tokens = np.frombuffer(raw, np.uint8).astype(int)
    mask = noise_mask(len(tokens), density, mean_span, np.random.default_rng(len(raw)))
    noise, spans = noise_counts(len(tokens), density, mean_span)
    assert mask.sum() == noise and not mask[0] and mask[-1]
    inputs, targets = corrupt(tokens, mask, first_sentinel=1000, end=999)
    assert len(inputs) == len(tokens) - noise + spans + 1 and len(targets) == noise + spans + 1
    assert inputs[-1] == targets[-1] == 999
    np.testing.assert_array_equal(inputs[inputs > 999 - spans][:-1], 1000 - np.arange(spans))
    np.testing.assert_array_equal(restore(inputs, targets, first_sentinel=1000), tokens)


def test_all_ways_to_cut_are_equally_likely():
    """6 tokens are divided into two spans of noise (2 tokens) and two of text (4 tokens) in 1 x 3 ways."""
    rng = np.random.default_rng(0)
    masks = [tuple(noise_mask(6, 0.4, 1.0, rng)) for _ in range(3000)]
    counts = [masks.count(mask) for mask in set(masks)]
    assert len(counts) == 3 and min(counts) > 900


def test_raw_length_is_the_longest_that_fits():
    assert raw_length(1024) == (1193, 189)
    for length in (10, 57, 300):
        data = SpanCorruption(length=length, batch_size=2, density=0.3, mean_span=4.0)
        noise, spans = noise_counts(data.row_items + 1, 0.3, 4.0)
        assert data.row_items + 1 - noise + spans + 1 > length


def test_rows_hold_the_corpus(corpus):
    """The bytes are in order, with nothing between documents; sentinels have no bytes."""
    data = SpanCorruption(corpus=corpus, length=40, batch_size=3, mean_span=3.0)
    batches = list(data.eval_batches("all"))
    for batch in batches:
        check_spec(batch, data)
    found = []
    for batch in batches:
        for row in range(3):
            targets = batch["targets"][row][batch["mask"][row] > 0]
            inputs = batch["tokens"][row][batch["tokens"][row] > 0]
            if len(targets):
                found += restore(inputs, targets, 258).tolist()
                sentinels = np.arange(258, 258 - int(np.isin(inputs, range(240, 259)).sum()), -1)
                assert batch["bytes"][row].sum() == len(targets) - len(sentinels) - 1
    assert bytes(i - 3 for i in found) == "".join(DOCUMENTS).encode()


def test_training_resumes_and_divides(corpus):
    """The noise of a row depends on the row, not on which batch or process has it."""
    data = SpanCorruption(corpus=corpus, length=40, batch_size=4, mean_span=3.0, shuffle_window=4)
    batches = take(data.train_batches(), 5)
    half = take(data.train_batches(range(2, 4)), 5)
    for whole, part in zip(batches, half):
        for name in whole:
            np.testing.assert_array_equal(whole[name][2:], part[name])
    iterator = data.train_batches()
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    again = data.train_batches()
    again.set_state(state)
    for expected, ours in zip(batches[2:], take(again, 3)):
        for name in expected:
            np.testing.assert_array_equal(expected[name], ours[name])


def test_what_span_corruption_refuses():
    for options, message in (
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 0.6}, "density is 0.6"),
        ({"mean_span": 0.5}, "mean_span is 0.5"),
        ({"length": 3}, "length is 3"),
        ({"first_sentinel": 5}, "first_sentinel is 5; it must be at least 9"),
    ):
        with pytest.raises(ValueError, match=message):
            SpanCorruption(**options)
    with pytest.raises(ValueError, match="length is 1; it must be"):
        noise_mask(1, 0.15, 3.0, np.random.default_rng(0))


def test_edits():
    assert edited(b"Hello, AEIOU yes", "vowels") == b"Hll,  ys"
    assert edited(b"#baBAbAaAB", "contextual_vowels") == b"#bBAbaAB"
    assert edited(b"ABCABABCAABC", "merge") == b"DABDAD"


@pytest.mark.parametrize("edit", ["vowels", "contextual_vowels", "merge"])
def test_character_edits(edit):
    data = CharacterEdits(edit=edit, batch_size=8, examples=2000)
    (batch,) = take(data.train_batches(), 1)
    tokenizer = data.loaded_tokenizer
    for row in range(8):
        text = tokenizer.decode(batch["tokens"][row])
        assert len(text) == 63 and text[:1] == b"#" and batch["tokens"][row][63] == 1
        assert tokenizer.decode(batch["targets"][row]) == edited(text, edit)
        assert batch["mask"][row].sum() == batch["bytes"][row].sum() + 1 == len(edited(text, edit)) + 1
    shorter = np.mean([63 - len(edited(random_letters(np.random.default_rng(i), 63, edit), edit)) for i in range(300)])
    expected = {"vowels": 62 * 10 / 52, "contextual_vowels": 24, "merge": 10}[edit]
    assert abs(shorter / expected - 1) < 0.25


def test_character_edits_of_a_corpus(corpus):
    data = CharacterEdits(corpus=corpus, batch_size=2, length=21, lower=True)
    batch = next(iter(data.eval_batches("all")))
    text = data.loaded_tokenizer.decode(batch["tokens"][0])
    assert text == text.lower() and len(text) == 20
    assert data.loaded_tokenizer.decode(batch["targets"][0]) == edited(text, "vowels")
    for options, message in (({"edit": "none"}, "edit is 'none'"), ({"tokenizer": "bytes"}, "it must be byt5")):
        with pytest.raises(ValueError, match=message):
            CharacterEdits(**options)
