"""Collects what the test files define about their systems, so that no other list has to be edited.

A test file adds its systems to the contract tests by defining, next to its own tests, one of these

    TASKS = {name: function}                           a task with its data, as a tiny.Case
    CAUSAL_LMS = {name: function}                      a causal language model, as a Linen module
    TEXT_GENERATORS = {name: function}                 a task that continues texts of bytes in its own way, and a
                                                       function that makes its parameters from a key
    IMAGE_TOKENIZERS = {name: function}                an image tokenizer
    IMAGE_GENERATORS = {name: function}                a model that draws codes of images, with four classes
    DATASETS = {name: function}                        data; the function gets a file of texts and an empty folder
    SURGERIES = {name: function}                       a surgery with a task, as a tiny.Operation
    EVIDENCE = {system: {column: where}}               what shows a tick of the catalogue's grid, for test_systems.py:
                                                       `task`, an entry of TASKS, for training, evaluation and meshes;
                                                       `formats`, cases of interop/test_formats.py, for import and
                                                       export; for another column, an entry of CAUSAL_LMS or a test.
                                                       A system that is not here has the entries of its own name

as a literal dictionary at the top level of the file.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


@functools.cache
def collect(variable: str) -> dict[str, Any]:
    """The entries of the dictionaries of this name in all test files.

    The files are imported under the names that pytest gives them, so that each is imported once.

    Raises:
      ValueError: two files use a name.
    """
    found: dict[str, Any] = {}
    for file in sorted(TESTS.glob("*/test_*.py")):
        if not re.search(rf"^{variable} = {{", file.read_text(), re.M):
            continue
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))
        entries = getattr(importlib.import_module(file.stem), variable)
        if twice := found.keys() & entries.keys():
            raise ValueError(f"{file.name} defines {variable}[{min(twice)!r}], which another file has already.")
        found |= entries
    return found
