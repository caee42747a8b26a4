import dataclasses
import importlib
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jaxtok import configuration
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
        "--stages.0.init",
        "copy",
        "--data.length",
        "64",
    ]
    config = override(small(), arguments, "jaxtok train")
    assert (config.train.steps, config.task.model.tokens.ffn, config.stages[0].init) == (7, 99, "copy")
    assert config.task.model.tokens.query == small().task.model.tokens.query
    assert differences(config, small()) == [
        "task.model.tokens.ffn: 99, not 144",
        "data.length: 64, not 128",
        "train.steps: 7, not 400",
        "stages.0.init: copy, not zero_keys",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    RENAMED: ClassVar[dict[str, str]] = {"breadth": "width"}
    RETIRED: ClassVar[dict[str, Any]] = {"depth": 1}

    width: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box(Shape):
    RETIRED: ClassVar[dict[str, Any]] = {"lids": (1, 2)}

    height: int = 0


def test_older_stored_configs_are_read_by_the_names_of_today(monkeypatch):
    """A class that has moved, fields with another name and without one, also of the class it inherits from."""
    here = f"{Box.__module__}:Box"
    stored = {"type": "jaxtok.gone.nowhere:Case", "breadth": 3, "depth": 1, "lids": [1, 2], "height": 4}
    with pytest.raises(ValueError, match=r"names jaxtok\.gone\.nowhere:Case, which is unknown"):
        from_json(stored)
    monkeypatch.setitem(configuration.MOVED, "jaxtok.gone.nowhere:Case", here)
    assert from_json([stored]) == (Box(width=3, height=4),)
    assert from_json(to_json(Box(width=3))) == Box(width=3)
    for field, value in (("depth", 2), ("lids", [1])):
        with pytest.raises(ValueError, match=rf"gives Box the field {field} = .*{value if field == 'depth' else 1}"):
            from_json(stored | {field: value})
    with pytest.raises(ValueError, match="gives Box the fields colour; it has no such"):
        from_json(stored | {"colour": 1})


def test_types_that_have_moved_are_there():
    for old, new in configuration.MOVED.items():
        module, _, name = new.partition(":")
        assert dataclasses.is_dataclass(getattr(importlib.import_module(module), name, None)), old
        assert new not in configuration.MOVED, f"{old} -> {new} has moved on"


def test_missing_config_files_and_files_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        load_config(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="defines no `config`"):
        load_config(tmp_path / "empty.py")
