"""Text in small alphabets: nothing is lost after the reduction, and other text is refused."""

from __future__ import annotations

import pickle
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtok.data.reduced import ReducedText
from jaxtok.protocols import Tokenizer
from jaxtok.tokenizers import AlphabetTokenizer, load_tokenizer, token_byte_lengths

DATASETS = {"reduced": lambda texts, folder: ReducedText(corpus=str(texts), length=16, batch_size=4)}

LETTERS, ASCII = load_tokenizer("letters"), load_tokenizer("ascii")


def test_ids_are_as_documented():
    assert (LETTERS.vocab_size, LETTERS.eod_id, ASCII.vocab_size, ASCII.eod_id) == (28, 27, 128, 0)
    assert LETTERS.encode("az b") == [0, 25, 26, 1]
    assert ASCII.encode("Hi!\n") == [72, 105, 33, 10]
    for tokenizer in (LETTERS, ASCII):
        assert isinstance(tokenizer, Tokenizer) and tokenizer.token_bytes(tokenizer.eod_id) == b""
        np.testing.assert_array_equal(
            token_byte_lengths(tokenizer), np.arange(tokenizer.vocab_size) != tokenizer.eod_id
        )
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.name == tokenizer.name and copy.encode("abc") == tokenizer.encode("abc")


@given(st.text() | st.binary())
def test_any_text_is_reduced_and_the_reduced_text_survives(data):
    for tokenizer in (LETTERS, ASCII):
        reduced = tokenizer.reduce(data)
        assert tokenizer.reduce(reduced) == reduced
        ids = tokenizer.encode(reduced)
        assert tokenizer.decode(ids) == reduced and tokenizer.eod_id not in ids
        assert len(ids) == len(reduced)


@given(st.text(string.printable))
def test_ascii_is_all_there(text):
    assert ASCII.decode(ASCII.encode(text)) == text.encode() == ASCII.reduce(text)


def test_other_text_is_refused():
    for tokenizer, text, named in ((LETTERS, "a B", "'B'"), (LETTERS, "é", r"'\\xe9'"), (ASCII, "a\0", r"'\\x00'")):
        with pytest.raises(ValueError, match=f"{tokenizer.name} cannot represent the character {named}"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="alphabet is 'greek'; it must be one of letters, ascii"):
        AlphabetTokenizer("greek")
    with pytest.raises(ValueError, match="tokenizer is 'bytes'; it must be one of letters, ascii"):
        ReducedText(tokenizer="bytes")


def test_rows_are_of_the_reduced_text(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"Ünï-code {i}, and SOME\n\n letters: {'x' * i}!")
    data = ReducedText(corpus=str(tmp_path), length=16, batch_size=4)
    (document,) = {bytes(d) for d in data._documents("all") if b" 0," in d}
    items = data.items(document)
    text = b" n code and some letters "
    assert data.loaded_tokenizer.decode(items[:, 1]) == text == data.loaded_tokenizer.reduce(document)
    assert items[0, 0] == items[-1, 1] == 27 and items[:, 2].sum() == len(text)
    batch = next(iter(data.train_batches()))
    assert batch["tokens"].max() <= 27 and batch["tokens"].shape == (4, 16)
