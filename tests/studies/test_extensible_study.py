"""The experiment of configs/decoding/extensible_study.py, and its measure."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from jaxtok.configuration import load_config
from jaxtok.lm.extensible import ExtensibleConfig, ExtensibleModeling
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.losses import cross_entropy
from jaxtok.protocols import FROZEN
from jaxtok.studies.extensible import ValueOfContext, write_topics
from jaxtok.training.mesh import unboxed


def test_the_measure(tmp_path):
    """No context is the chunk alone, raw context the whole window; rows are of one document."""
    lm = LanguageModeling(
        model=LlamaConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=24, vocab_size=384, max_length=24)
    )
    model = ExtensibleConfig(lm=lm, layers=1, session=8, scale=4)
    task = ExtensibleModeling(model=model, chunk=8, scales=(4,))
    data = tiny.TextData(corpus=str(write_topics(tmp_path / "topics.jsonl")), length=32, batch_size=8)
    params = unboxed(task.init(jax.random.key(0), next(iter(data.eval_batches()))))
    measure = ValueOfContext(raw=(16,), scales=(4,), sessions=(8, 24))
    rows = np.concatenate(list(measure.rows(data)))
    assert len(rows) > 200 and (rows[:, 1:] < 256).all()  # an end of a document would be 256
    found = measure(task, params, data)
    assert found.keys() == {"no_context", "raw_16", "ets_4", "untrained_4", "ets_4_session_24"}
    assert found["ets_4"] == found["untrained_4"] != found["ets_4_session_24"]
    for name, start in (("no_context", 24), ("raw_16", 8)):
        logits, _ = lm.module().apply({"params": params[FROZEN]}, rows[:, start:])
        nats = cross_entropy(logits[:, -8:-1], rows[:, -7:]).mean()
        assert found[name] == pytest.approx(float(nats), rel=1e-5)


@pytest.mark.slow
def test_extensible_embeddings_are_worth_less_than_raw_context_and_more_than_none(tmp_path):
    """Also at k that training never saw; a tokenizer that has not learned is worth least."""
    study = dataclasses.replace(load_config("extensible_study"), workdir=str(tmp_path))
    assert study.run()
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    nats = result["test"]
    print({name: round(value, 4) for name, value in nats.items()})
    assert nats["untrained_8"] > nats["ets_8"] > nats["ets_2"] > nats["raw_96"]
    assert nats["ets_32"] < nats["no_context"]
