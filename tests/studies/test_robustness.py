"""Word accuracy of models of tokens is that of the words, and noises are measured by name."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from jaxtok.data.noise import Noise
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.studies import robustness
from jaxtok.studies.robustness import Robustness, flat_word_accuracy
from jaxtok.tokenizers import ByteTokenizer
from jaxtok.tokenizers.words import WordSplitter

TEXTS = ["one two three\nfour ", "", "five six", "a"]


@pytest.fixture
def data(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text + "!")
    return TextData(corpus=str(tmp_path), length=12, batch_size=2)


def test_a_word_is_right_if_all_its_bytes_are(data, monkeypatch):
    monkeypatch.setattr(robustness, "_hits", lambda task, params, batch: ~np.isin(batch["targets"], [*b"oi"]))
    splitter = WordSplitter("whitespace", 16)
    whole = TextData(corpus=data.corpus, length=64, batch_size=2)
    share = flat_word_accuracy(None, None, whole.eval_batches("all"), ByteTokenizer(), splitter)
    words = [word for text in TEXTS for word in splitter.split(text + "!")]
    assert share == pytest.approx(np.mean([not {*b"oi"} & {*word} for word in words]))
    cut = flat_word_accuracy(None, None, data.eval_batches("all"), ByteTokenizer(), splitter)
    assert 0 < cut < 1  # of the words that are not cut at the end of a row


def test_noises_are_measured_by_name(data):
    task = LanguageModeling(
        model=LlamaConfig(num_layers=1, d_model=8, num_heads=1, mlp_dim=8, vocab_size=257, max_length=12)
    )
    params = nn.meta.unbox(task.init(jax.random.key(0), next(iter(data.eval_batches("all")))))
    measure = Robustness(noises=(Noise("swap"), Noise("upper")), split="all", bytes=8)
    found = measure(task, params, data)
    names = {"bits_per_byte", "word_accuracy"}
    assert found.keys() == {name + ending for name in names for ending in ("", "_swap_0.1", "_upper")}
    assert found["bits_per_byte"] == pytest.approx(8.5, abs=0.5)  # and ends of documents, which have no byte
    assert found["bits_per_byte"] != found["bits_per_byte_upper"]
