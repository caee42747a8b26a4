import dataclasses
from pathlib import Path

import pytest

from jaxtok.configuration import differences, from_json, load_config, override, to_json
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.elm import ElmStudy
from jaxtok.studies.growth import GrowthStudy
from jaxtok.training.experiment import Experiment

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/**/*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_says_how_to_run_it_and_survives_json(path):
    config = load_config(path)
    assert isinstance(config, Experiment | GrowthStudy | Comparison | ElmStudy)
    assert from_json(to_json(config)) == config
    assert f"configs/{path.parent.name}/{path.name}" in path.read_text().split('"""')[1]


def small():
    return load_config(CONFIGS[0].parent / "tokenformer_small.py")


def test_dotted_overrides_reach_every_depth():
    arguments = [
        "--train.steps",
        "7",
        "--task.model.tokens.ffn",
        "99",
        "--growth.0.init",
        "copy",
        "--data.length",
        "64",
    ]
    config = override(small(), arguments, "jaxtok train")
    assert (config.train.steps, config.task.model.tokens.ffn, config.growth[0].init) == (7, 99, "copy")
    assert config.task.model.tokens.query == small().task.model.tokens.query
    assert differences(config, small()) == [
        "task.model.tokens.ffn: 99, not 144",
        "data.length: 64, not 128",
        "train.steps: 7, not 400",
        "growth.0.init: copy, not zero_keys",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task.model.num-head 2", "--task.model.num-heads"),
        ("--task.model.num-heads 7", "does not divide d_model"),
        ("--task.model.remat half", "'none', 'full', 'projections', 'dots'"),
        ("--train.steps many", "--train.steps"),
        ("--task.model.normalization l2", "gelu_l2_norm"),
    ],
)
def test_wrong_overrides_name_what_is_known_or_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit):
        override(small(), arguments.split(), "jaxtok train")
    written = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in written


def test_stored_configs_name_only_known_classes_and_fields():
    stored = to_json(small())
    with pytest.raises(ValueError, match="os:system"):
        from_json({**stored, "task": {"type": "os:system", "command": "true"}})
    with pytest.raises(ValueError, match="colour"):
        from_json({**stored, "colour": 1})
    with pytest.raises(ValueError, match="cannot hold"):
        to_json(dataclasses.replace(small(), task=object()))


def test_missing_config_files_and_files_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        load_config(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="defines no `config`"):
        load_config(tmp_path / "empty.py")
