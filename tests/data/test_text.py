"""Rows hold every token of the documents once, with the right targets, and training resumes exactly."""

import itertools
import json

import numpy as np
import pytest
import sentencepiece

from jaxtok.data.corpora import open_corpus
from jaxtok.data.text import TextData
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece

DATASETS = {"text": lambda texts, folder: TextData(corpus=str(texts), length=16, batch_size=4)}

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "the", "sea", "with", "great", "joy"]
DOCUMENTS = [" ".join(WORDS[i % 5 : i % 5 + i % 12] * (i % 3 + 1)) + f"\n{i}é" * (i % 4) for i in range(60)]
KINDS = ["bytes", "sentencepiece", "prefixed"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    assert "" in DOCUMENTS
    return str(path)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    prefixed = root / "prefixed.model"
    with prefixed.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS), model_writer=file, vocab_size=300, byte_fallback=True, minloglevel=2
        )
    plain = train_sentencepiece(DOCUMENTS, root / "plain.model", vocab_size=300)
    return {"bytes": "bytes", "sentencepiece": str(plain), "prefixed": str(prefixed)}


@pytest.fixture
def data(corpus):
    return lambda **options: TextData(
        **{"corpus": corpus, "length": 16, "batch_size": 4, "shuffle_window": 8} | options
    )


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def stream(batches, name):
    """The values at all positions that are not padding, in order."""
    return np.concatenate([batch[name][batch["segments"] > 0] for batch in batches])


def documents_of(batches, tokenizer):
    """The documents that end in the rows, from the targets."""
    targets = stream(batches, "targets")
    ends = np.flatnonzero(targets == tokenizer.eod_id)
    return [tokenizer.decode(ids[:-1]) for ids in np.split(targets, ends + 1)[: len(ends)]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_the_documents(data, tokenizers, kind):
    text = data(tokenizer=tokenizers[kind])
    tokenizer = load_tokenizer(text.tokenizer)
    batches = list(text.eval_batches("all"))
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            name: ((4, 16), np.float32 if name == "mask" else np.int32)
            for name in ("tokens", "targets", "positions", "segments", "mask", "bytes")
        }
    assert documents_of(batches, tokenizer) == [text.encode() for text in DOCUMENTS]
    tokens, targets = stream(batches, "tokens"), stream(batches, "targets")
    assert tokens[0] == tokenizer.eod_id
    np.testing.assert_array_equal(tokens[1:], targets[:-1])  # also across rows


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_documents(data, tokenizers, kind):
    for split in ("train", "all"):
        text = data(tokenizer=tokenizers[kind])
        batches = list(text.eval_batches(split))
        expected = sum(len(document.encode()) for document in open_corpus(text.corpus, split))
        assert sum(int(batch["bytes"].sum()) for batch in batches) == expected
        eod = load_tokenizer(text.tokenizer).eod_id
        assert not stream(batches, "bytes")[stream(batches, "targets") == eod].any()
        assert stream(batches, "bytes").min() >= 0


def test_segments_and_positions_follow_the_documents(data):
    text = data()
    batches = list(text.eval_batches("all"))
    tokens, segments, positions = (
        np.concatenate([b[name] for b in batches]) for name in ("tokens", "segments", "positions")
    )
    padding = segments == 0
    assert 0 < padding.sum() < 64 and not np.concatenate([b["mask"] for b in batches])[padding].any()
    for row in range(len(tokens)):
        segment, position = 1, -1
        for index in np.flatnonzero(~padding[row]):
            starts = tokens[row, index] == 256 and index > 0
            segment, position = (segment + 1, 0) if starts else (segment, position + 1)
            assert (segments[row, index], positions[row, index]) == (segment, position)


def test_documents_need_not_be_isolated(data):
    isolated, joined = list(data().eval_batches("all")), list(data(isolate_documents=False).eval_batches("all"))
    for a, b in zip(isolated, joined, strict=True):
        real = a["segments"] > 0
        np.testing.assert_array_equal(b["segments"], real)
        np.testing.assert_array_equal(b["positions"], np.where(real, np.arange(16), 0))
        for name in ("tokens", "targets", "mask", "bytes"):
            np.testing.assert_array_equal(a[name], b[name])


def test_mask_eod_leaves_out_the_first_target(data):
    for usual, masked in zip(data().eval_batches("all"), data(mask_eod=True).eval_batches("all"), strict=True):
        np.testing.assert_array_equal(usual["mask"], usual["segments"] > 0)
        np.testing.assert_array_equal(masked["mask"], usual["mask"] * (usual["tokens"] != 256))
    assert sum((b["tokens"] == 256).sum() for b in data().eval_batches("all")) == len(DOCUMENTS)


def test_what_begins_a_text_is_given_and_not_predicted(data):
    """Of the ids that begin a text, none is a target of the loss; the end is, also if it is the padding's id."""
    begun = data(begin=(250, 251), ends=(0, 256), pad=0)
    usual, batches = list(data().eval_batches("all")), list(begun.eval_batches("all"))
    tokens, targets, mask = (stream(batches, name) for name in ("tokens", "targets", "mask"))
    assert tokens[:2].tolist() == [250, 251] and targets[0] == 251 and mask[0] == 0 and mask[1] == 1
    assert (mask == 0).sum() == (tokens == 250).sum() == len(DOCUMENTS)
    assert (targets[mask > 0] == 0).sum() == len(DOCUMENTS)
    same = np.where(stream(usual, "targets") == 256, 0, stream(usual, "targets"))
    np.testing.assert_array_equal(targets[mask > 0], same)
    np.testing.assert_array_equal(stream(batches, "bytes")[mask > 0], stream(usual, "bytes"))
    np.testing.assert_array_equal(*(stream(list(d.eval_batches("all")), "tokens") for d in (data(begin=()), data())))
    masked = list(data(begin=(250, 251), mask_eod=True).eval_batches("all"))
    assert not np.isin(stream(masked, "tokens")[stream(masked, "mask") > 0], (250, 251)).any()


def test_an_evaluation_can_leave_documents_whole(data):
    """Only a document that is longer than a row is cut, and each of its parts begins as it does."""
    cut, whole = data(begin=(250, 251)), data(begin=(250, 251), whole_documents=True)
    batches = list(whole.eval_batches("all"))
    parts = []
    for batch in batches:
        for tokens, segments, targets, mask in zip(*(batch[n] for n in ("tokens", "segments", "targets", "mask"))):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                assert tokens[here][:2].tolist() == [250, 251], "no row goes on without it"
                parts.append(bytes(i for i in targets[here & (mask > 0)] if i < 256))
    pieces = sorted(text.encode()[i : i + n] for text in DOCUMENTS for i, n in spans(len(text.encode()) + 1))
    assert sorted(parts) == pieces
    for name in ("bytes", "mask"):
        assert sum(b[name].sum() for b in batches) == sum(b[name].sum() for b in cut.eval_batches("all"))
    limited = list(data(whole_documents=True, eval_limit=3).eval_batches("all"))
    assert len(limited) == 3
    assert_equal(take(iter(cut.train_batches()), 3), take(iter(whole.train_batches()), 3))
    with pytest.raises(ValueError, match="length is 2; it must be more than the 2 ids of begin"):
        data(begin=(250, 251), whole_documents=True, length=2)
    with pytest.raises(ValueError, match=r"ends is \(-1,\); ids must be at least 0"):
        data(ends=(-1,))


def spans(count):
    """The starts and lengths of the parts of a document with `count` targets, in rows of 16 after two ids."""
    starts = [0, *range(15, count, 14)]
    return list(zip(starts, [15] + [14] * (len(starts) - 1)))


@pytest.mark.parametrize(
    ("options", "step"),
    [({"shuffle_window": 1, "prefetch": 0}, 1), ({}, 7), ({"length": 100, "batch_size": 2}, 5)],
)
def test_training_resumes_exactly(data, options, step):
    text = data(**options)
    epoch = sum(int((b["segments"] > 0).sum()) for b in text.eval_batches("train")) // (text.batch_size * text.length)
    reference = take(text.train_batches(), 2 * epoch + 8)
    running = text.train_batches()
    for consumed in range(2 * epoch + 4):
        if consumed % step == 0:
            state, at = json.loads(json.dumps(running.get_state())), consumed
            resumed = text.train_batches()
            resumed.set_state(state)
            assert_equal(take(resumed, 4), reference[at : at + 4])
        assert_equal([next(running)], [reference[consumed]])
    running.set_state(state)  # back, in an iterator that was in use
    assert_equal(take(running, 4), reference[at : at + 4])


def test_every_epoch_is_a_new_order_of_all_documents(data):
    text = data(shuffle_window=1)
    train = sorted(t.encode() for t in open_corpus(text.corpus))
    documents = documents_of(take(text.train_batches(), 150), load_tokenizer("bytes"))
    first, second = documents[: len(train)], documents[len(train) : 2 * len(train)]
    assert sorted(first) == sorted(second) == train
    assert first != second and first != train


def test_seed_and_window_set_the_order(data):
    first = take(data().train_batches(), 10)
    assert_equal(first, take(data().train_batches(), 10))
    other = take(data(seed=1).train_batches(), 10)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other))
    unshuffled = take(data(shuffle_window=1).train_batches(), 10)
    rows = [sorted(map(tuple, np.concatenate([b["targets"] for b in batches]))) for batches in (first, unshuffled)]
    assert rows[0] == rows[1]  # 40 rows are 5 windows
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, unshuffled))


def test_streams_have_documents_of_their_own(data):
    text = data(shuffle_window=1, streams=2)
    train = [t.encode() for t in open_corpus(text.corpus)]
    for stream, rows in enumerate((range(0, 2), range(2, 4))):
        batches = take(text.train_batches(rows), 150)
        assert batches[0]["tokens"].shape == (2, 16)
        share = train[stream::2]
        assert sorted(documents_of(batches, load_tokenizer("bytes"))[: len(share)]) == sorted(share)


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("parts", [[range(0, 2), range(2, 4)], [range(i, i + 1) for i in range(4)], [range(1, 3)]])
def test_rows_are_the_same_however_they_are_divided(data, streams, parts):
    text = data(streams=streams)
    whole = take(text.train_batches(), 12)
    for rows in parts:
        wanted = [{name: array[rows.start : rows.stop] for name, array in batch.items()} for batch in whole]
        assert_equal(take(text.train_batches(rows), 12), wanted)


def test_a_state_of_all_streams_resumes_those_that_are_needed(data):
    text = data(streams=4)
    running = text.train_batches()
    for _ in range(5):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    assert sorted(state) == ["0", "1", "2", "3"]
    following = take(running, 3)
    resumed = text.train_batches(range(1, 3))
    resumed.set_state(state)
    assert_equal(take(resumed, 3), [{name: array[1:3] for name, array in batch.items()} for batch in following])


def test_processes_share_the_rows_of_an_evaluation(data):
    text = data()
    alone = list(text.eval_batches("train"))
    parts = [list(text.eval_batches("train", range(i, i + 1))) for i in range(4)]
    together = [{name: np.concatenate([part[name] for part in batch]) for name in batch[0]} for batch in zip(*parts)]
    assert all(len(part) == len(alone) for part in parts)
    assert_equal(together, alone)


def test_an_evaluation_can_be_repeated_and_limited(data):
    batches = data().eval_batches("train")
    whole = list(batches)
    assert len(whole) > 3
    assert_equal(list(batches), whole)
    limited = list(data(eval_limit=2).eval_batches("train"))
    assert_equal(limited, list(data(eval_limit=2, seed=1).eval_batches("train")))  # the same for all seeds
    everything = list(data(eval_limit=1000).eval_batches("train"))
    assert_equal(limited, everything[:2])
    assert sum(b["bytes"].sum() for b in everything) == sum(b["bytes"].sum() for b in whole)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(everything, whole))  # rows from all over


def test_workers_do_not_change_the_batches(data):
    assert_equal(take(data(workers=2).train_batches(), 12), take(data().train_batches(), 12))


def test_errors_say_what_to_change(data, tmp_path):
    for options, message in [
        ({"length": 0}, "length is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"workers": -1}, "workers is -1"),
        ({"eval_limit": -1}, "eval_limit is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            data(**options)
    with pytest.raises(ValueError, match="streams is 3; it must divide batch_size = 4"):
        data(streams=3)
    with pytest.raises(ValueError, match=r"fewer documents .* than data.streams = 128"):
        data(batch_size=128, streams=128).train_batches()
    with pytest.raises(FileNotFoundError, match="missing"):
        data(tokenizer=str(tmp_path / "missing")).train_batches()
