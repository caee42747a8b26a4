import ast
import dataclasses
import re

import pytest

from jaxtok import systems
from jaxtok.configuration import differences, from_json, load_config, override, to_json
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.elm import ElmStudy
from jaxtok.studies.growth import GrowthStudy
from jaxtok.training.experiment import Experiment

CONFIGS = systems.configs()
STUDIES = (GrowthStudy, Comparison, ElmStudy)


@pytest.mark.parametrize("entry", CONFIGS.values(), ids=CONFIGS)
def test_every_config_says_how_to_run_it_and_survives_json(entry):
    config = load_config(entry.name)
    assert isinstance(config, STUDIES if entry.verb == "study" else Experiment)
    assert from_json(to_json(config)) == config
    assert isinstance(config, STUDIES) or config.name == entry.name
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
        ("nothing.py", None, r"there is no config '.*nothing\.py'; `jaxtok train --help` lists those there are\."),
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
