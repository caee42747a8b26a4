"""Words in units: rules, ids, long words, and that pooled and plain rows hold the same text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import check_spec

from jaxtok.data.word_units import (
    RULES,
    NormalizedText,
    WordUnitText,
    count_words,
    load_units,
    long_words_of,
    spaced_words,
)
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece

DATASETS = {
    "word_units": lambda texts, folder: WordUnitText(corpus=str(texts), length=8, batch_size=4, max_units=6),
    "normalized": lambda texts, folder: NormalizedText(corpus=str(texts), length=16, batch_size=4),
}

TEXT = "The cat sat-on a mat: 'so {what}' -- naïve, no = @-@ <unk> supercalifragilistic.\nNext\tline\n"
DOCUMENTS = [TEXT, "", "one", "  two  words ", "a b c\nd e f " * 5]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("units") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "subwords.model"
    return {
        "bytes": "bytes",
        "characters": "characters:abcdefghijklmnopqrstuvwxyzï",
        "subwords": str(train_sentencepiece(DOCUMENTS * 3, path, vocab_size=300)),
    }


KINDS = ["bytes", "characters", "subwords"]


def test_the_rules():
    read = "The cat sat - on a mat : ' so { what } ' -- naïve , no supercalifragilistic . Next line"
    assert b" ".join(spaced_words(TEXT, "paper")).decode() == read
    assert spaced_words(b"a-b  c\n\xff", "spaces") == [b"a-b", b"c", b"\xff"]
    assert spaced_words("It's {2} Über--x", "letters") == [b"it", b"s", b"ber", b"x"]
    assert spaced_words("}: a!?", "paper") == [b"}", b":", b"a", b"!", b"?"]


def test_ids_of_units(tokenizers):
    units = load_units("bytes")  # ByT5's
    assert units.encode(b"a\x00\xff") == [100, 3, 258] and units.size == 384
    assert [unit for unit in range(384) if units.allowed[unit]] == [0, *range(3, 259)]
    units = load_units(tokenizers["characters"])
    assert units.encode("abï".encode()) == [1, 2, 27] and units.allowed.all()
    tokenizer = load_tokenizer(tokenizers["subwords"])
    units = load_units(tokenizers["subwords"])
    assert sorted(i + (i < tokenizer.eod_id) for i in range(300) if i != tokenizer.eod_id) == list(range(1, 300))
    assert units.leading_space and units.pieces[0] == b""


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(word=st.binary(min_size=1, max_size=12) | st.text(min_size=1, max_size=8).map(str.encode))
def test_any_word_survives(tokenizers, kind, word):
    units = load_units(tokenizers[kind])
    for spaced in (False, True):
        ids = units.encode(word, spaced)
        assert all(0 < i < units.size and units.allowed[i] for i in ids)
        assert units.decode([*ids, 0, 0], spaced) == word


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(text=st.text(alphabet="ab ï\n-'", max_size=30))
def test_texts_survive_and_bytes_add_up(tokenizers, rule, kind, text):
    data = WordUnitText(tokenizer=tokenizers[kind], rule=rule, max_units=3)
    words = data.words(text)
    assert all(1 <= len(units) <= 3 for units, _ in words)
    read = text.encode() if rule == "lossless" else b" ".join(spaced_words(text, rule))
    assert sum(size for _, size in words) == len(read)
    plain = NormalizedText(tokenizer=tokenizers[kind], rule=rule).items(text)
    assert plain[:, 2].sum() == len(read)
    whole = WordUnitText(tokenizer=tokenizers[kind], rule=rule, max_units=99)
    assert whole.join(b"", [units for units, _ in whole.words(text)]) == read


def test_continuations_begin_with_a_space_where_there_is_none():
    data = WordUnitText(rule="spaces")
    words = [units for units, _ in data.words("b c")]
    assert data.join(b"a", words) == b" b c" and data.join(b"a\n", words) == data.join(b"", words) == b"b c"
    assert data.join(b"a", []) == b""
    assert WordUnitText(rule="lossless").join(b"a", words) == b"bc"


@pytest.mark.parametrize(
    ("how", "expected"), [("split", [b"super", b"calif", b"ragil", b"istic"]), ("cut", [b"super"])]
)
def test_long_words_are_split_or_cut_and_counted(corpus, how, expected):
    data = WordUnitText(corpus=corpus, rule="spaces", max_units=5, long_words=how)
    units = load_units("bytes")
    assert [units.decode(word) for word, _ in data.words("supercalifragilistic")] == expected
    assert [size for _, size in data.words("supercalifragilistic a")] == ([5, 5, 5, 6, 1] if how == "split" else [6, 1])
    counts = count_words(data, "all")
    found = long_words_of(data, counts)
    assert found["words"] == counts.total() == sum(len(text.split()) for text in DOCUMENTS)
    over = [len(word.encode()) - 5 for text in DOCUMENTS for word in text.split() if len(word.encode()) > 5]
    assert found["long_words"] == len(over) == 4
    assert found["units_cut"] == (sum(over) if how == "cut" else 0)


def test_rows_are_padded_with_the_end_mark(corpus):
    data = WordUnitText(corpus=corpus, rule="spaces", length=8, batch_size=4, max_units=6)
    for batch in data.eval_batches("all"):
        check_spec(batch, data)
        for words, lengths in (("words", "lengths"), ("targets", "target_lengths")):
            np.testing.assert_array_equal((batch[words] != 0).sum(-1), batch[lengths])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rule is 'other'; it must be one of paper, spaces, letters, lossless"):
        WordUnitText(rule="other")
    with pytest.raises(ValueError, match="long_words is 'drop'"):
        WordUnitText(long_words="drop")
    with pytest.raises(ValueError, match="rule is 'other'"):
        NormalizedText(rule="other")
