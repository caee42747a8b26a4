"""The growth study at a tiny size: every arm runs, the study resumes, and its table and plot show the results."""

import dataclasses
import json

import pytest

from jaxtok.configuration import load_config
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.studies.growth import ARMS, GrowthStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.logs import read_metrics
from jaxtok.training.mesh import MeshConfig


@pytest.fixture
def study(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(100):
        (corpus / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * 6)
    model = TokenFormerConfig(
        num_layers=1, d_model=16, num_heads=1, rotary_fraction=0.5, tokens=uniform_counts(12, 12), max_length=64
    )
    base = Experiment(
        task=LanguageModeling(model=model),
        data=TextData(corpus=str(corpus), length=16, batch_size=4, shuffle_window=8, eval_limit=2),
        train=TrainConfig(steps=2, log_every=1, eval_every=1, checkpoint_every=1, tensorboard=False),
        mesh=MeshConfig(data=1),
    )
    return GrowthStudy(base=base, to=uniform_counts(24, 24), steps=1, workdir=str(tmp_path / "study"))


@pytest.mark.slow
def test_arms_run_resume_and_are_reported(study, capsys, tmp_path):
    few = dataclasses.replace(study, arms=("base", "zero_keys", "scratch"))
    assert few.run()
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(results) == {"base/0", "zero_keys/0", "scratch/0"}
    grown = results["zero_keys/0"]
    assert grown["first_bits_per_byte"] == pytest.approx(results["base/0"]["validation_bits_per_byte"], abs=1e-6)
    assert grown["train_flops"] > results["base/0"]["train_flops"]
    assert grown["parameters"] == results["scratch/0"]["parameters"]
    assert (tmp_path / "study" / "loss_vs_compute.png").stat().st_size > 10_000
    capsys.readouterr()
    # with more arms later, the old results stay
    more = dataclasses.replace(study, arms=("base", "zero_keys", "scratch", "transformer"))
    assert more.run()
    again = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(again) - set(results) == {"transformer/0"} and again["base/0"] == results["base/0"]
    assert more.run()
    out = capsys.readouterr().out
    assert "is complete" in out and ARMS["transformer"].label in out
    table = (tmp_path / "study" / "results.md").read_text().splitlines()
    assert len(table) == 2 + 4 and table[0].startswith("| model")
    with pytest.raises(ValueError, match=r"steps: 2, not 1"):
        dataclasses.replace(study, steps=2).run()


@pytest.mark.slow
def test_every_arm_and_two_seeds(study, tmp_path):
    assert dataclasses.replace(study, seeds=(0, 1)).run()
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert len(results) == 2 * len(ARMS)
    assert all(0 < r["test_bits_per_byte"] < 12 for r in results.values())


def test_unknown_arms_are_named(study):
    with pytest.raises(ValueError, match="scrach"):
        dataclasses.replace(study, arms=("base", "scrach"))


@pytest.mark.slow
def test_growing_takes_less_compute_than_scratch(tmp_path):
    """The paper's claim at the quickstart's size, on Python's standard library (about seven minutes)."""
    study = load_config("quickstart")
    study = dataclasses.replace(study, arms=("base", "copy", "random", "scratch"), workdir=str(tmp_path))
    assert study.run()
    results = json.loads((tmp_path / "results.json").read_text())
    base, scratch = results["base/0"], results["scratch/0"]
    assert results["copy/0"]["first_bits_per_byte"] == pytest.approx(base["validation_bits_per_byte"], abs=1e-5)
    assert results["random/0"]["first_bits_per_byte"] > base["validation_bits_per_byte"] + 1e-3
    curve = read_metrics(study.folder("scratch", 0), "validation")
    for arm in ("copy", "random"):
        grown = results[f"{arm}/0"]
        assert grown["test_bits_per_byte"] < base["test_bits_per_byte"] - 0.1
        so_far = min(r["bits_per_byte"] for r in curve if r["train_flops"] <= grown["train_flops"])
        assert grown["validation_bits_per_byte"] < so_far  # at equal compute
        assert grown["train_flops"] < 0.6 * scratch["train_flops"]
