"""Rows for encoders: [CLS] a [SEP] b [SEP]."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import check_spec

from jaxtok.data.encoders import EncoderData

DATASETS = {"encoders": lambda texts, folder: EncoderData(corpus=str(texts), length=16, batch_size=4, **IDS)}

IDS = {"cls_id": 300, "sep_id": 301, "pad_id": 302}


def laid_out(count, length=16, **options):
    data = EncoderData(length=length, batch_size=2, **IDS, **{"single": 0.0, "short": 0.0, **options})
    rows = np.zeros((2, length - 3, 2), np.int32)
    rows[0, :count] = np.stack([np.arange(count) + 1, np.full(count, 2)], 1)
    segments = (np.arange(length - 3) < [[count], [0]]).astype(np.int32)
    return data.layout(rows, segments, np.zeros_like(segments))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 13), single=st.sampled_from([0.0, 1.0]))
def test_a_row_holds_its_text(count, single):
    batch = laid_out(count, single=single)
    tokens = batch["tokens"][0]
    text = list(range(1, count + 1))
    half = count if single else min(count, 6)
    expected = [300, *text[:half], 301, *([*text[half:], 301] if half < count else [])]
    assert tokens.tolist() == expected + [302] * (16 - len(expected))
    assert batch["mask"][0].sum() == len(expected) and batch["bytes"][0].sum() == 2 * count
    assert batch["types"][0].tolist() == [int(half + 1 < k < len(expected)) for k in range(16)]
    assert not batch["mask"][1].any() and (batch["tokens"][1] == 302).all()


def test_short_rows():
    sizes = set()
    for count in range(5, 14):
        size = int(laid_out(count, short=1.0)["mask"][0].sum())
        assert 5 <= size <= count + 3 or count + 3 < 8
        sizes.add(size)
    assert len(sizes) > 2


def test_every_byte_of_the_documents_is_in_a_row(tmp_path):
    texts = {f"{k}.txt": f"text {k} " * (k % 5 + 1) for k in range(40)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    data = EncoderData(corpus=str(tmp_path), length=19, batch_size=4, short=0.0, **IDS)
    batches = list(data.eval_batches("train"))
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    for batch in batches:
        check_spec(batch, data)
    found = bytes(t for t in tokens.ravel().tolist() if t < 256)
    read = b"".join(bytes(data.items(document)[:-1, 0].tolist()) for document in data._documents("train"))
    assert found == read and found


def test_the_same_seed_gives_the_same_rows(tmp_path):
    (tmp_path / "a.txt").write_text("some words, and then some more.\n" * 2000)
    data = EncoderData(corpus=str(tmp_path / "a.txt"), length=19, batch_size=4, **IDS)
    first, again = (next(iter(data.train_batches())) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 4}, "length is 4"), ({"single": 1.5}, "single is 1.5"), ({"cls_id": -1}, "cls_id is -1")],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderData(**options)
