"""The claim of HAT in small: at equal compute it is ahead of a Transformer on bytes."""

import dataclasses
import json

import pytest
from tiny import zeros

from jaxtok.configuration import load_config


def test_arms_have_the_same_compute():
    study = load_config("hat_study")
    flops = []
    for arm in study.arms:
        flops.append(arm.train.steps * arm.task.flops(zeros(arm.data)))
    assert max(flops) < 1.02 * min(flops)


@pytest.mark.slow
def test_words_beat_bytes(tmp_path):
    study = load_config("hat_study")
    arms = study.arms[:2]  # the third needs a tokenizer of its own
    study = dataclasses.replace(study, arms=arms, workdir=str(tmp_path))
    assert study.run()
    results = json.loads((tmp_path / "results.json").read_text())
    hat, flat = (results[f"{arm.name}/0"]["test"] for arm in arms)
    assert hat["bits_per_byte"] < flat["bits_per_byte"] - 0.2
