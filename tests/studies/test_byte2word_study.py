"""The claim of Byte2Word, measured (slow); its measures on a model that has learned nothing."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxtok.configuration import load_config
from jaxtok.data.word_pieces import WordPieceText
from jaxtok.lm.byte2word import Byte2WordConfig, ByteWords, init_params
from jaxtok.studies.words import InputSize, PackageOfWords, WordNoise, rows_of
from jaxtok.verbs import tokenizer


def test_measures():
    model = Byte2WordConfig(
        num_layers=1,
        d_model=16,
        num_heads=2,
        pool_heads=2,
        mlp_dim=16,
        vocab_size=384,
        max_length=16,
        max_bytes=12,
        max_pieces=4,
    )
    task, params = ByteWords(model=model), init_params(model, jax.random.key(0))
    data = WordPieceText(length=16, batch_size=8, max_bytes=12, max_pieces=4)
    assert InputSize()(task, params, data) == {"input_params": model.input_params()}
    noise = WordNoise(rates=(0.5,), batches=2)(task, params, data)
    assert noise["rise_50"] != 0 and 4 < noise["nats_per_word_50"] < 16  # chance: ln(384) a piece
    found = PackageOfWords(packages=("asyncio", "email"), rows=24, test_rows=16, rates=())(task, params, data)
    assert 0.3 < found["package_accuracy"] <= 1


def test_rows_of_packages():
    data = WordPieceText(length=16, batch_size=8)
    batch, labels = rows_of(data, ("asyncio", "email"), "train", 5)
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert batch["mask"].min() == 1  # full rows
    again, _ = rows_of(data, ("asyncio", "email"), "train", 5)
    np.testing.assert_array_equal(batch["words"], again["words"])
    with pytest.raises(ValueError, match="the train split of python has no row of nothing"):
        rows_of(data, ("nothing",), "train", 5)


@pytest.mark.slow
def test_words_from_bytes_are_as_good_as_subwords(tmp_path):
    """The loss of a word is about the same with a third of the input's numbers (the abstract: on par with a tenth)."""
    study = load_config("byte2word_study")
    tokenizer(tmp_path / "words.model", vocab_size=2000, model_type="bpe", words=True)
    arms = tuple(
        dataclasses.replace(arm, data=dataclasses.replace(arm.data, tokenizer=str(tmp_path / "words.model")))
        for arm in study.arms
    )
    study = dataclasses.replace(study, arms=arms, workdir=str(tmp_path / "study"))
    assert study.run()
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    ours, theirs = (results[f"{arm.name}/0"]["test"] for arm in arms)
    assert ours["input_params"] < 0.4 * theirs["input_params"]
    assert ours["nats_per_word"] < 1.1 * theirs["nats_per_word"]
    assert ours["package_accuracy"] > 2 / 9
