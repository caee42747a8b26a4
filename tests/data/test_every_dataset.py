"""What all data promise. A test file of data adds its own as `DATASETS` (tests/collector.py)."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import pkgutil

import chex
import numpy as np
import pytest
from collector import collect
from tiny import check_spec

import jaxtok.data
from jaxtok.data.text import TextData
from jaxtok.training.checkpoints import example_batch
from jaxtok.training.mesh import AxisRules

DATASETS = collect("DATASETS")
DOCUMENTS = [f"Line {i}: the quick brown fox, é and ü, jumps over {i % 7} lazy dogs.\n" * (i % 5) for i in range(80)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(params=DATASETS)
def data(request, texts, tmp_path):
    return DATASETS[request.param](texts, tmp_path)


def first(iterator, count=2):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def test_batches_are_what_the_data_say(data):
    """Batches of training and of an evaluation, and the empty one that programs are compiled with."""
    for batch in (*first(data.train_batches()), *data.eval_batches("validation"), example_batch(data)):
        check_spec(batch, data)


def test_axes_are_known(data):
    """Each dimension has a name that the rules of a mesh can divide, or none; the first is that of rows."""
    known = {field.name for field in dataclasses.fields(AxisRules)}
    for array in data.batch_spec().values():
        assert len(array.axes) == len(array.shape) and array.axes[0] == "batch" and array.shape[0] == data.batch_size
        assert set(array.axes) <= known | {None}
    assert data.unit in ("tokens", "words", "images") and data.units >= data.batch_size
    assert {data.source, "seed", "eval_limit"} <= {field.name for field in dataclasses.fields(data)}
    if isinstance(data, TextData):
        assert data.loaded_tokenizer.vocab_size > 0
    else:
        assert not hasattr(data, "tokenizer")


def test_rows_of_a_process_are_those_of_the_whole(data):
    some = range(1, 3)
    pairs = zip(first(data.train_batches()), first(data.train_batches(some)), strict=True)
    for whole, part in (*pairs, *zip(data.eval_batches("validation"), data.eval_batches("validation", some))):
        chex.assert_trees_all_equal({name: array[1:3] for name, array in whole.items()}, part)


def test_training_goes_on_where_it_was(data):
    batches = data.train_batches()
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = next(batches)
    batches.close()
    resumed = data.train_batches()
    resumed.set_state(state)
    chex.assert_trees_all_equal(next(resumed), expected)
    resumed.close()


def test_the_last_batch_of_an_evaluation_is_filled_with_what_does_not_count(data):
    *_, last = data.eval_batches("validation")
    assert np.isin(last["mask"], (0, 1)).all() and last["mask"].any()


def test_all_data_of_the_package_are_here(texts, tmp_path):
    found = {type(make(texts, tmp_path / name)) for name, make in DATASETS.items()}
    for module in pkgutil.iter_modules(jaxtok.data.__path__, "jaxtok.data."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and kind.__module__ == module.name and hasattr(kind, "batch_spec"):
                assert kind in found, kind
