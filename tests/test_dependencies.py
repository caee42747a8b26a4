"""pyproject.toml declares what the package imports, and nothing else."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED_BY_OTHERS = {
    "protobuf": "sentencepiece.sentencepiece_model_pb2 imports it without declaring it",
    "chex": "the tests are written with it",
}
"""Declared without an import, with the reason."""
ELSEWHERE = {
    "genlm": "genlm-control and genlm-bytes pin other versions; studies compare with them where they are installed",
    "kvpress": "needs an older transformers; the study of evictors compares with it where it is installed",
}
"""Peers that are imported in environments of their own, by their modules, with the reason why no extra has them."""
OPTIONAL = {"jaxtok/peers.py": "jaxtok.bench imports it only for --what peers"}
"""Files that need an extra, with the reason why nothing else does."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imported(at_once: bool) -> dict[str, str]:
    """The distributions whose modules jaxtok imports, each with a file that does.

    Args:
      at_once: only those that are imported with their file, not those that a function imports when it needs them.
    """
    installed_by = importlib.metadata.packages_distributions()
    found = {}
    for file in sorted((ROOT / "jaxtok").rglob("*.py")):
        if at_once and str(file.relative_to(ROOT)) in OPTIONAL:
            continue
        tree = ast.parse(file.read_text())
        for node in tree.body if at_once else ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules} - {"jaxtok"} - sys.stdlib_module_names:
                for name in installed_by.get(top, [top]):
                    found[canonical(name)] = str(file.relative_to(ROOT))
    return found


DEPENDENCIES = declared(PROJECT["dependencies"])
EXTRAS = set().union(*map(declared, PROJECT["optional-dependencies"].values()))


def test_what_is_imported_is_declared():
    assert not {name: file for name, file in imported(at_once=True).items() if name not in DEPENDENCIES}
    assert not {
        name: file
        for name, file in imported(at_once=False).items()
        if name not in DEPENDENCIES | EXTRAS | ELSEWHERE.keys()
    }


def test_what_is_declared_is_imported():
    assert sorted(DEPENDENCIES - set(imported(at_once=False))) == sorted(NEEDED_BY_OTHERS)


def test_every_folder_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for top in ("jaxtok", "configs") for file in (ROOT / top).rglob("*.py")}
    folders.add(Path("configs"))  # has the page of all families
    names = {".".join(folder.parts) for folder in folders}
    assert set(setuptools["packages"]) == {n if n.startswith("jaxtok") else f"jaxtok.{n}" for n in names}
