"""Runs that an older version saved (tests/goldens/runs) are opened, evaluated, resumed and continued as it would do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jaxtok.training.checkpoints import read_config
from jaxtok.training.loop import train
from jaxtok.verbs import evaluate, generate


@pytest.fixture
def runs(request, tmp_path, monkeypatch):
    """A copy of the folder, in which the process works, as the runs' corpus has a relative path."""
    shutil.copytree(request.config.getoption("--goldens") / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["grown/checkpoints/2", "grown", "mrt5", "vit", "adapted"])
def test_an_old_run_has_the_old_numbers_and_texts(runs, name):
    expected = json.loads((runs / "expected.json").read_text())[name]
    row = evaluate(runs / name)
    assert row["step"] == expected["step"]
    for metric, number in expected["evaluated"].items():
        np.testing.assert_allclose(row[metric], number, rtol=1e-4, err_msg=metric)
    if "generated" in expected:
        options = {"temperature": 0.0, "max_new_tokens": 6, "stream": False}
        (text,) = generate(runs / name, prompt=("document",), **options)
        assert list(text) == expected["generated"]


@pytest.mark.parametrize("name", ["grown", "mrt5", "vit", "adapted"])
def test_an_old_run_is_resumed(runs, name):
    """Each resumes with its moments, its position in the data and, for the TokenFormer, both growths."""
    expected = json.loads((runs / "expected.json").read_text())[name]
    experiment = read_config(runs / name)
    if name == "grown":
        shutil.rmtree(runs / name / "checkpoints" / "6")
    result = train(experiment, quiet=True)
    assert result.step == experiment.total_steps and not result.interrupted
    for metric, number in expected["resumed"].items():
        np.testing.assert_allclose(result.metrics[metric], number, rtol=1e-4, err_msg=metric)
