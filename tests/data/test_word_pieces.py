"""Rows of words with their pieces, and errors in words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny import check_spec

from jaxtok.data.word_pieces import WordPieceText
from jaxtok.tokenizers.byte_words import CLS, PAD, SEP, basic_words

DATASETS = {
    "word_pieces": lambda texts, folder: WordPieceText(
        corpus=str(texts), length=8, batch_size=4, max_bytes=4, max_pieces=3, noise=0.2
    )
}

DATA = WordPieceText(length=6, batch_size=2, max_bytes=4, max_pieces=3, shuffle_window=1)
"""A tokenizer whose pieces are bytes."""


def test_rows():
    rows = DATA.items(b"ab, abcdef g h").reshape(-1, 6, 4 + 3 + 3 + 2)
    batch = DATA.layout(rows, np.ones(rows.shape[:2], np.int32), np.zeros(rows.shape[:2], np.int32))
    assert batch["words"][..., 0].tolist() == [
        [CLS, ord("a"), ord(","), ord("a"), ord("g"), SEP],
        [CLS, ord("h"), SEP, PAD, PAD, PAD],
    ]
    assert batch["words"][0, 3].tolist() == list(b"abcd")
    assert batch["pieces"][0].tolist() == [
        [-1] * 3,
        [97, 98, -1],
        [44, -1, -1],
        [97, 98, 99],
        [103, -1, -1],
        [-1] * 3,
    ]
    assert batch["bytes"].tolist() == [[0, 2, 1, 3, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["cut"].tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6]
    assert batch["mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(batch["pieces"], batch["inputs"])
    check_spec(batch, dataclasses.replace(DATA, batch_size=2))


def test_rows_of_a_corpus_begin_and_end(tmp_path):
    """Each row is a part of one document, and only what packing leaves empty is padded."""
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 9)
    (tmp_path / "no_word.txt").write_text(" \n")
    data = dataclasses.replace(DATA, corpus=str(tmp_path), batch_size=4)
    rows = [row for batch in data.eval_batches("all") for row in zip(batch["words"][..., 0], batch["mask"])]
    full = [row for row, mask in rows if mask.any()]
    assert len(full) == 8 * 3 + 1 and all(row[0] == CLS and SEP in row for row in full)
    assert all(len(set(row) - {CLS, SEP, PAD}) <= 1 for row in full)


def test_noise_is_read_and_not_predicted():
    text = b"some words of a text that has enough of them for a few errors to be made"
    clean = DATA.items(text)
    noisy = dataclasses.replace(DATA, noise=1.0).items(text)
    words, pieces, inputs, rest = slice(0, 4), slice(4, 7), slice(7, 10), slice(10, 12)
    for part in (pieces, rest):
        np.testing.assert_array_equal(clean[:, part], noisy[:, part])
    changed = (clean[:, words] != noisy[:, words]).any(1)
    assert changed.sum() > 10 and ((clean[:, inputs] != noisy[:, inputs]).any(1) <= changed).all()
    np.testing.assert_array_equal(noisy, dataclasses.replace(DATA, noise=1.0).items(text))
    assert (noisy != dataclasses.replace(DATA, noise=1.0, noise_seed=1).items(text)).any()


def test_each_word_has_one_error():
    data = dataclasses.replace(DATA, length=60, max_bytes=24, noise=1.0)
    text = "some words, Слово and \udcffb, have one error each: a letter goes, moves, is another or new"
    words = basic_words(text.encode(errors="surrogateescape"))
    for old, row in zip(words, data.items(text.encode(errors="surrogateescape"))[1:, :24], strict=False):
        new = bytes(row[row < 256].astype(np.uint8)).decode(errors="surrogateescape")
        old = old.decode(errors="surrogateescape")
        assert new and abs(len(old) - len(new)) <= 1
        if len(old) == len(new):
            different = [i for i, (a, b) in enumerate(zip(old, new)) if a != b]
            assert len(different) <= 1 or (len(different) == 2 and sorted(old) == sorted(new))


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="length is 2; it must be at least 3"):
        WordPieceText(length=2)
    with pytest.raises(ValueError, match="max_pieces is 0; it must be at least 1"):
        WordPieceText(max_pieces=0)
    with pytest.raises(ValueError, match=r"noise is 1\.5; it must be in"):
        WordPieceText(noise=1.5)
