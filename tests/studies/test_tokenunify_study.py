"""TokenUnify's study runs to its end, and a second run finds everything; pre-training helps on generated volumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtok.configuration import load_config
from jaxtok.studies.tokenunify import NONE, VolumeStudy

TOY = {"crop": (4, 16, 16), "toy_shape": (6, 24, 24), "toy_volumes": 1, "toy_test_volumes": 1, "eval_crops": 4}


def smaller(experiment, steps, model, **data):
    train = dataclasses.replace(experiment.train, steps=steps, checkpoint_every=steps)
    task = dataclasses.replace(experiment.task, model=dataclasses.replace(experiment.task.model, **model))
    return dataclasses.replace(experiment, train=train, task=task, data=dataclasses.replace(experiment.data, **data))


@pytest.mark.slow
def test_the_study_runs_to_its_end(tmp_path):
    config = load_config("tokenunify_study")
    model = {"crop": TOY["crop"], "patch": (2, 8, 8), "d_model": 16, "slices": 2}
    arms = [smaller(arm, 2, model, **TOY) for arm in config.pretraining]
    study = dataclasses.replace(
        config,
        pretraining=tuple(arms),
        finetuning=smaller(config.finetuning, 2, model, **TOY),
        seeds=(0,),
        workdir=str(tmp_path / "study"),
    )
    assert study.run()
    pictures = sorted(Path(study.workdir).glob("*.png"))
    assert [path.stem for path in pictures] == sorted(f"seed0_{name}" for name in study.names)
    assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in pictures)
    rows = (Path(study.workdir) / "results.md").read_text().splitlines()
    assert len(rows) == 2 + len(study.names) and "arand" in rows[0]
    times = [path.stat().st_mtime_ns for path in pictures]
    assert study.run()
    assert [path.stat().st_mtime_ns for path in pictures] == times


def test_arms_must_have_names_of_their_own():
    config = load_config("tokenunify_study")
    with pytest.raises(ValueError, match="the arms are named none, random, random; give each another name"):
        dataclasses.replace(config, pretraining=config.pretraining[:1] * 2)
    with pytest.raises(ValueError, match="volumes and test_volumes must be given together"):
        dataclasses.replace(config, volumes=("volume:a.h5",))


@pytest.mark.slow
def test_pretraining_helps_where_labels_are_few(tmp_path):
    """On generated volumes, with two labelled ones: at least 5 % less loss and VOI than without pre-training."""
    config: VolumeStudy = load_config("tokenunify_study")
    steps = {"random": 200, "mixture": 200}
    arms = [
        smaller(arm, steps[arm.name], {"expand": 2.0}, batch_size=8) for arm in config.pretraining if arm.name in steps
    ]
    study = dataclasses.replace(
        config,
        pretraining=tuple(arms),
        finetuning=smaller(config.finetuning, 300, {"expand": 2.0}, batch_size=8),
        seeds=(0,),
        workdir=str(tmp_path / "study"),
    )
    assert study.run()
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    for name in steps:
        for number in ("loss", "voi"):
            assert results[f"{name}/0"][number] < 0.95 * results[f"{NONE}/0"][number], (name, number)
