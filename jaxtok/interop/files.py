"""What formats that are one file of named tensors have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtok.weights import SUFFIXES, read_weights, tensor_names, write_weights


def has_tensors(path: Path, wanted: Callable[[Collection[str]], bool]) -> bool:
    """Whether a file's tensors have the wanted names; for a PyTorch file, only the suffix is looked at."""
    path = Path(path)
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    try:
        names = tensor_names(path)
    except ValueError:
        return False
    return names is None or wanted(names)


def read_file(path: Path, like: Any, which: str = "") -> dict[str, np.ndarray]:
    """`jaxtok.weights.read_weights`, of a model whose sizes and settings `like`, a task, says.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no task is given; or it is no file of tensors, or it does not say which are meant.
    """
    if like is None:
        raise ValueError(f"{path} holds bare tensors; give the config of the model (--config).")
    return read_weights(path, which)


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Calls `jaxtok.weights.write_weights`, and makes the folder if there is none.

    Raises:
      FileExistsError: there is such a file already.
      ValueError: the name does not have a suffix of files of tensors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_weights(path, tensors)
