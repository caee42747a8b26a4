"""What the test files say of their systems, found in these files, so that no list has to be edited beside them.

A test file adds its systems to the contract tests by defining, next to its own tests, one of

    TASKS = {name: function that makes a tiny.Case}    a task with its data
    CAUSAL_LMS = {name: function}                      a causal language model, as a Linen module
    IMAGE_TOKENIZERS = {name: function}                an image tokenizer
    IMAGE_GENERATORS = {name: function}                a model that draws codes of images, of four classes
    DATASETS = {name: function}                        data; the function gets a file of texts and an empty folder
    SURGERIES = {name: function}                       a surgery with a task, as a tiny.Operation

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
