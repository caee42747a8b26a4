import ast
import dataclasses
import importlib
import re
from typing import Any, ClassVar

import pytest

from jaxtok import configuration, systems
from jaxtok.configuration import differences, from_json, load_config, override, to_json
from jaxtok.training.experiment import Experiment

CONFIGS = systems.configs()


@pytest.mark.parametrize("entry", CONFIGS.values(), ids=CONFIGS)
def test_every_config_says_how_to_run_it_and_survives_json(entry):
    config = load_config(entry.name)
    assert callable(config.run) if entry.verb == "study" else isinstance(config, Experiment)
    assert from_json(to_json(config)) == config
    assert entry.verb == "study" or config.name == entry.name
    assert entry.about, f"{entry.file} should say in a line of its docstring what {entry.name} is"
    named = "|".join(e.name for e in systems.config_entries(entry.file))
    docstring = ast.get_docstring(ast.parse(entry.file.read_text()), clean=False)
    assert re.search(rf"^    jaxtok \w+ ({named})\b", docstring, re.M)


def test_every_file_is_found_by_names_of_which_no_two_are_the_same():
    files = sorted(systems.configs_folder().rglob("*.py"))
    names = [entry.name for file in files for entry in systems.config_entries(file)]
    assert {entry.file for entry in CONFIGS.values()} == set(files)
    assert sorted(names) == sorted(CONFIGS) and len(files) > 20


def small():
    return load_config("tokenformer_small")


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


def test_one_config_of_a_file_with_several(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('configs = {"one": 1, "two": lambda: 2}\n')
    assert (load_config(f"{file}:one"), load_config(f"{file}:two")) == (1, 2)
    assert load_config(f"{CONFIGS['hat_3b'].file}:hat_3b") == load_config("hat_3b")
    with pytest.raises(ValueError, match=r"mine\.py defines one, two; name one of them, as .*mine\.py:one\."):
        load_config(file)
    with pytest.raises(ValueError, match=r"mine\.py defines no 'tow'; did you mean two\?"):
        load_config(f"{file}:tow")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.py", None, r"there is no config '.*nothing\.py'; `jaxtok list` shows them\."),
        ("tokenformer_smal", None, r"there is no config '.*tokenformer_smal'; did you mean tokenformer_small\?"),
        ("mrt5_small.py", None, r"did you mean mrt5_small\?"),
        ("empty.py", "x = 1\n", "defines no `config`"),
        ("README.md", "# jaxtok\n", "it must be a Python file that defines one, or the name of a config"),
        ("syntax.py", "config = (\n", r"syntax\.py cannot be used, line 1: SyntaxError: "),
        ("wrong.py", "\nconfig = nothing\n", r"wrong\.py cannot be used, line 2: NameError: "),
        ("late.py", "configs = {'a': lambda: nothing}\n", r"late\.py cannot be used, line 1: NameError: "),
    ],
)
def test_what_is_no_config_is_answered_in_a_sentence(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        load_config(tmp_path / name)
    assert "\n" not in str(error.value)


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
    with pytest.raises(ValueError, match="gives Box the fields colour; it has none such"):
        from_json(stored | {"colour": 1})


def test_types_that_have_moved_are_there():
    for old, new in configuration.MOVED.items():
        module, _, name = new.partition(":")
        assert dataclasses.is_dataclass(getattr(importlib.import_module(module), name, None)), old
        assert new not in configuration.MOVED, f"{old} -> {new} has moved on"
