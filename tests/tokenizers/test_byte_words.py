"""Words by BERT's rule, and their arrays."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxtok.tokenizers import load_tokenizer
from jaxtok.tokenizers.byte_words import CLS, PAD, SEP, UNK, basic_words, collate, symbol_mask, word_array
from jaxtok.verbs import tokenizer

# Rust's rule also drops characters that Unicode has not assigned or has left to private use, and its older tables
# lack the punctuation of newer editions. So only characters that are the same in an old and a new edition are compared.
TEXT = st.text(
    st.characters(exclude_categories=["Cn", "Co", "Cs"]).filter(
        lambda c: unicodedata.category(c) == unicodedata.ucd_3_2_0.category(c)
    )
)


@given(TEXT)
def test_words_are_those_of_bert(text):
    normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    theirs = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    assert basic_words(text) == [word.encode() for word in theirs]


def test_words():
    assert basic_words("Don't (naïve) 東京x\u200b y\x00z\n") == [
        *[b"Don", b"'", b"t", b"(", "naïve".encode(), b")"],
        *["東".encode(), "京".encode(), b"x", b"yz"],
    ]
    assert basic_words(b"a \xff\xfeb, c") == [b"a", b"\xff\xfeb", b",", b"c"]


@given(st.binary())
def test_any_bytes_are_words(data):
    words = basic_words(data)
    assert all(words)
    assert "".join(w.decode(errors="surrogateescape") for w in words).split() == [
        "".join(w.decode(errors="surrogateescape") for w in words)
    ] * bool(words)


def test_arrays_of_words():
    array, cut = word_array([CLS, b"ab", b"x" * 100, b"", b"\xff", SEP], 4)
    assert cut == 1
    assert array.tolist() == [
        [CLS, PAD, PAD, PAD],
        [97, 98, PAD, PAD],
        [120] * 4,
        [UNK, PAD, PAD, PAD],
        [255, PAD, PAD, PAD],
        [SEP, PAD, PAD, PAD],
    ]
    with pytest.raises(ValueError, match="a word is the number 3; numbers must be symbols, 256 to 260"):
        word_array([3], 4)


def test_rows_of_words():
    ids, symbols, real, cut = collate([[CLS, b"abcde"], [b"x"]], max_bytes=3, length=3)
    assert ids.shape == (2, 3, 3) and cut == 1
    assert real.tolist() == [[True, True, False], [True, False, False]]
    assert symbols[0].tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    np.testing.assert_array_equal(symbols, symbol_mask(ids))
    with pytest.raises(ValueError, match="length is 1; it must be at least 2"):
        collate([[CLS, b"a"]], max_bytes=3, length=1)


def test_pieces_of_words_have_no_space(tmp_path):
    for number in range(80):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox jumps, and lazy dogs go on with their walk")
    tokenizer(tmp_path / "words.model", corpus=str(tmp_path), vocab_size=295, model_type="bpe", words=True)
    trained = load_tokenizer(tmp_path / "words.model")
    pieces = [trained.token_bytes(i) for i in range(trained.vocab_size)]
    assert not any(b" " in piece for piece in pieces if len(piece) > 1)
    assert any(len(piece) > 2 for piece in pieces)
