"""Comparisons at a tiny size: arms run, resume, are measured again where needed, and make a table and a plot."""

import dataclasses
import json

import pytest

from jaxtok.configuration import override
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.transformer import TransformerConfig
from jaxtok.studies.comparison import Comparison, spread
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Width:
    """Measures nothing but what it is given."""

    times: int = 1

    def __call__(self, task, params, data):
        wide = task.model.d_model > 8
        return {"width": self.times * task.model.d_model * data.length} if wide else {}


@pytest.fixture
def comparison(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(100):
        (corpus / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * 6)

    def arm(name, d_model):
        model = TransformerConfig(num_layers=1, d_model=d_model, num_heads=1, mlp_dim=8, max_length=16)
        return Experiment(
            name=name,
            task=LanguageModeling(model=model),
            data=TextData(corpus=str(corpus), length=16, batch_size=4, shuffle_window=8, eval_limit=2),
            train=TrainConfig(steps=2, log_every=1, eval_every=1, checkpoint_every=1, tensorboard=False),
            mesh=MeshConfig(data=1),
        )

    return Comparison(
        arms=(arm("narrow", 8), arm("wide", 16)),
        measures=(Width(),),
        columns=("bits_per_byte", "width"),
        workdir=str(tmp_path / "comparison"),
    )


def test_arms_run_resume_and_are_measured_anew(comparison, tmp_path, capsys):
    assert comparison.run()
    file = tmp_path / "comparison" / "results.json"
    first = json.loads(file.read_text())
    assert set(first) == {"narrow/0", "wide/0"}
    assert first["wide/0"]["test"]["width"] == 256 and "width" not in first["narrow/0"]["test"]
    table = (tmp_path / "comparison" / "results.md").read_text().splitlines()
    assert len(table) == 4 and table[2].endswith("|  |")
    assert (tmp_path / "comparison" / "curves.png").stat().st_size > 10_000
    capsys.readouterr()

    assert comparison.run() and "is complete" in capsys.readouterr().out
    changed = dataclasses.replace(comparison, measures=(Width(times=2),))
    assert changed.run()
    again = json.loads(file.read_text())
    assert again["wide/0"]["test"]["width"] == 512
    assert again["wide/0"]["test"]["bits_per_byte"] == first["wide/0"]["test"]["bits_per_byte"]  # not trained again

    other = dataclasses.replace(comparison.arms[1], train=dataclasses.replace(comparison.arms[1].train, steps=3))
    with pytest.raises(ValueError, match="holds a run of 2 steps, not of 3"):
        dataclasses.replace(comparison, arms=(comparison.arms[0], other)).run()


def test_bad_comparisons_are_refused(comparison):
    with pytest.raises(ValueError, match="each another name"):
        dataclasses.replace(comparison, arms=comparison.arms[:1] * 2)
    with pytest.raises(ValueError, match="seeds is empty"):
        dataclasses.replace(comparison, seeds=())


def test_fields_are_set_from_the_command_line(comparison):
    changed = override(comparison, ["--seeds", "3", "4", "--arms.1.train.steps", "7"], "jaxtok study")
    assert changed.seeds == (3, 4) and changed.arms[1].train.steps == 7 and changed.arms[0] == comparison.arms[0]


def test_spread():
    assert spread([1.0]) == "1.000" and spread([1.0, 2.0, 1.5]) == "1.500 ±0.500"
