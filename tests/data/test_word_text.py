"""Rows of words hold every word of the documents once, with the word that follows it."""

import itertools
import json

import numpy as np
import pytest
from tiny import check_spec

from jaxtok.data.corpora import open_corpus
from jaxtok.data.words import WordText
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece
from jaxtok.tokenizers.words import WordSplitter

DATASETS = {"words": lambda texts, folder: WordText(corpus=str(texts), length=8, batch_size=4, max_units=6)}

WORDS = ["the", "cat", "sat", "on", "mats", "and", "ran", "to", "the", "sea", "with", "üncommonlylong"]
DOCUMENTS = [" ".join(WORDS[i % 5 : i % 5 + i % 12] * (i % 3 + 1)) + f"\n{i}é" * (i % 4) for i in range(40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    assert "" in DOCUMENTS
    return str(path)


def rows_of(corpus, **options):
    data = WordText(**{"corpus": corpus, "length": 8, "batch_size": 4, "max_units": 6} | options)
    batches = list(data.eval_batches("all"))
    for batch in batches:
        check_spec(batch, data)
    return data, {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def spelled(units, lengths):
    return [tuple(word[:n].tolist()) for word, n in zip(units, lengths)]


def test_rows_hold_the_documents(corpus):
    data, rows = rows_of(corpus)
    real = rows["segments"] > 0
    words = spelled(rows["words"][real], rows["lengths"][real])
    targets = spelled(rows["targets"][real], rows["target_lengths"][real])
    documents = [[]]
    for word in targets:
        documents[-1].append(bytes(word))
        if not word:
            documents.append([])
    assert [b"".join(words).decode() for words in documents[:-1]] == DOCUMENTS
    splitter = WordSplitter("whitespace", 6)
    assert documents[:-1] == [[*splitter.split(text), b""] for text in DOCUMENTS]
    assert words[0] == () and words[1:] == targets[:-1]  # also across rows; a start follows each end
    np.testing.assert_array_equal(rows["bytes"][real], [len(word) for word in targets])
    np.testing.assert_array_equal(rows["mask"], real)
    after_word = np.arange(data.max_units) >= rows["lengths"][..., None]
    assert not rows["words"][after_word].any()
    for row in range(len(real)):
        segment, position = 1, -1
        for index in np.flatnonzero(real[row]):
            starts = rows["lengths"][row, index] == 0 and index > 0
            segment, position = (segment + 1, 0) if starts else (segment, position + 1)
            assert (rows["segments"][row, index], rows["positions"][row, index]) == (segment, position)


@pytest.mark.parametrize(("start", "end"), [(False, False), (True, False), (False, True)])
def test_start_and_end_can_be_left_out(corpus, start, end):
    _, rows = rows_of(corpus, start=start, end=end)
    real = rows["segments"] > 0
    counts = [len(WordSplitter("whitespace", 6).split(text)) for text in DOCUMENTS]
    assert real.sum() == sum(max(count - 1 + start + end, 0) for count in counts)
    assert (rows["lengths"][real] == 0).any() == start and (rows["target_lengths"][real] == 0).any() == end


def test_units_can_be_those_of_a_tokenizer(corpus, tmp_path):
    spec = str(train_sentencepiece(DOCUMENTS, tmp_path / "small.model", vocab_size=300))
    _, rows = rows_of(corpus, tokenizer=spec, max_units=3)
    tokenizer, real = load_tokenizer(spec), rows["segments"] > 0
    targets = spelled(rows["targets"][real], rows["target_lengths"][real])
    assert b"".join(tokenizer.decode(word) for word in targets) == "".join(DOCUMENTS).encode()
    assert rows["bytes"].sum() == len("".join(DOCUMENTS).encode())
    assert rows["lengths"].max() == 3


def test_training_resumes_exactly_and_can_be_divided(corpus):
    data, _ = rows_of(corpus, workers=0)

    def take(iterator, count):
        batches = list(itertools.islice(iterator, count))
        iterator.close()
        return batches

    whole = take(data.train_batches(), 12)
    running = data.train_batches()
    for _ in range(5):
        next(running)
    resumed = data.train_batches()
    resumed.set_state(json.loads(json.dumps(running.get_state())))
    for ours, expected in zip(take(resumed, 7), whole[5:]):
        for name in expected:
            np.testing.assert_array_equal(ours[name], expected[name])
    for part, expected in zip(take(data.train_batches(range(1, 3)), 4), whole):
        np.testing.assert_array_equal(part["words"], expected["words"][1:3])


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu \xff\n".encode("latin-1") * 10)
    _, rows = rows_of(str(tmp_path / "latin.txt"))
    document = open_corpus(str(tmp_path / "latin.txt"), "all")[0]
    words = spelled(rows["targets"].reshape(-1, 6), rows["target_lengths"].reshape(-1))
    assert b"".join(map(bytes, words)) == document


def test_what_cannot_be():
    with pytest.raises(ValueError, match="max_units is 0; it must be at least 1"):
        WordText(max_units=0)
    with pytest.raises(ValueError, match="mask_eod is True; in rows of words they must be"):
        WordText(mask_eod=True)
