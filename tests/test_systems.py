"""The catalogue: nothing in it is missing or untrue, and the pages' tables come from it.

Each tick of the grid has its evidence here: a task that the contract tests train, or a test.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest
from collector import collect

import jaxtok
from jaxtok.interop.formats import FORMATS
from jaxtok.systems import COLUMNS, REASONS, SYSTEMS, TABLES, configs, configs_folder, find, system, with_tables

TASKS, CAUSAL_LMS = collect("TASKS"), collect("CAUSAL_LMS")
TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS / "interop"))
from test_formats import CASES as FORMAT_CASES  # noqa: E402

BY_TASK = ("train", "evaluate", "shard")
"""Each entry of `TASKS` is trained on one device and on every mesh (tests/training/test_mesh.py) and evaluated
(tests/training/test_tasks.py)."""

EVIDENCE = collect("EVIDENCE")
"""What a system's test file says beyond its name, or where another name than the system's is meant (collector.py)."""


def evidence_of(row) -> dict:
    """By default, the entries of the system's own name."""
    entries = {"task": TASKS, "generate, cached": CAUSAL_LMS}
    own = {column: row.name for column, known in entries.items() if row.name in known}
    own |= {"formats": (row.name,)} if row.name in FORMAT_CASES and row.formats else {}
    return own | EVIDENCE.get(row.name, {})


each = pytest.mark.parametrize("row", SYSTEMS, ids=lambda row: row.name)


@each
def test_every_tick_has_its_evidence_and_every_gap_its_reason(row):
    evidence = evidence_of(row)
    if not set(BY_TASK) <= set(row.cannot):
        task = evidence.pop("task")
        assert task in TASKS, f"no test file has TASKS[{task!r}], nor has EVIDENCE another name"
    if cases := evidence.pop("formats", ()):
        assert {FORMAT_CASES[case]().format for case in cases} == set(row.formats)
        evidence |= dict.fromkeys(("import", "export"), "interop/test_formats.py::test_there_and_back_by_the_verb")
    assert set(row.cannot) <= set(COLUMNS) and set(row.cannot.values()) <= set(REASONS)
    ticks = set(COLUMNS) - set(BY_TASK) - set(row.cannot)
    assert set(evidence) == ticks, "EVIDENCE has to say where these are tested, or the row why they cannot be"
    for column, entry in evidence.items():
        if "::" in entry:
            file, test = entry.split("::")
            assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), entry
        else:
            assert column == "generate, cached" and entry in CAUSAL_LMS, entry


@each
def test_what_a_row_names_is_there(row):
    for file in (*row.modules, *row.configs):
        folder = configs_folder() if file in row.configs else ROOT / "jaxtok"
        assert (folder / file).is_file(), file
    assert (ROOT / row.page).is_file()
    assert set(row.formats) <= {form.name for form in FORMATS}
    assert bool(row.formats) == ("import" not in row.cannot or "export" not in row.cannot)
    assert not row.paper or re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/[\w-]+/[\w-]+)", row.paper)


@each
def test_published_names_are_those_of_the_table(row):
    module = importlib.import_module("jaxtok." + row.modules[0].removesuffix(".py").replace("/", "."))
    assert row.published == tuple(row.prefix + name for name in getattr(module, "PUBLISHED", ()))
    for name in row.published:
        assert jaxtok.published(name) is module.PUBLISHED[name.removeprefix(row.prefix)]


def test_names_are_unique_and_everything_belongs_to_a_row():
    names = [row.name for row in SYSTEMS]
    assert set(EVIDENCE) <= set(names) and len(set(names)) == len(names)
    sizes = [name for row in SYSTEMS for name in row.published]
    assert len(set(sizes)) == len(sizes)
    files = [file for row in SYSTEMS for file in row.configs]
    assert sorted(files) == sorted(str(path.relative_to(configs_folder())) for path in configs_folder().rglob("*.py"))
    read_only = {"gguf"}  # which the systems of "huggingface" are also read from
    assert {name for row in SYSTEMS for name in row.formats} | read_only == {form.name for form in FORMATS}


def test_patterns_find_systems_configs_and_sizes():
    found = find("*BYTE*")
    assert [row.name for row in found.systems] == ["byte2word", "byte_exact"]
    assert {"byte2word_base", "byte_exact_study", "word_pooled_ebyte"} <= {entry.name for entry in found.configs}
    assert found.published == ("word-pooled-ebyte", "byte2word-base")
    assert not find("nothing") and len(find().configs) == len(configs())
    with pytest.raises(ValueError, match=r"there is no system 'tokenfromer'; did you mean tokenformer\?"):
        system("tokenfromer")


@pytest.mark.parametrize("page", TABLES)
def test_pages_have_their_tables(page):
    text = (ROOT / page).read_text()
    assert with_tables(page, text) == text, "write them with: python -m jaxtok.systems"


def test_each_system_has_a_section_with_all_parts():
    """The paper, its symbols beside our names, a command, what was published, and where we deviate."""
    for row in SYSTEMS:
        sections = re.split("^## ", (ROOT / row.page).read_text(), flags=re.MULTILINE)
        own = [section for section in sections if f"({row.paper})" in section]
        parts = ["| here |", "\n    jaxtok ", "ublished", "### Deviations"]
        assert not row.paper or any(all(part in section for part in parts) for section in own), row.name
