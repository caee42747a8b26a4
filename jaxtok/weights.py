"""Reads and writes files of named tensors, none of which can run code: safetensors, .npz, and PyTorch's (which need
PyTorch)."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".ckpt", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)


def open_safetensors(path: Path) -> Any:
    """Opens a safetensors file.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        return safetensors.safe_open(path, framework="flax")  # unlike "numpy", it knows bfloat16
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again.") from error


def get_tensor(file: Any, name: str, path: Path) -> np.ndarray:
    """A tensor of a safetensors file that is open.

    Raises:
      ValueError: it is of a type that NumPy does not have, such as float8.
    """
    try:
        return np.asarray(file.get_tensor(name))
    except (AttributeError, safetensors.SafetensorError) as error:
        raise _without_scales(path, name, file.get_slice(name).get_dtype()) from error


def _without_scales(path: Path, name: str, dtype: Any) -> ValueError:
    return ValueError(f"{name} in {path} holds {dtype}, which are not weights without their scales.")


def tensor_names(path: Path) -> list[str] | None:
    """The names of the tensors in a file, from its header; None for a PyTorch file, which must be read whole for them.

    Raises:
      ValueError: the file is damaged.
    """
    if path.suffix == ".safetensors":
        return list(open_safetensors(path).keys())
    if path.suffix == ".npz":
        with _open_npz(path) as file:
            return list(file.files)
    return None


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[Any]:
    try:
        with zipfile.ZipFile(path) as file:
            file.namelist()
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not an .npz file of numbers ({error}); fetch it again.") from error


def torch_for(purpose: str) -> Any:
    """The torch module. Raises ImportError, which names the purpose, if PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{purpose} needs PyTorch; pip install torch, or convert the file to model.safetensors first."
        ) from None
    return torch


def read_weights(path: str | Path, which: str = "") -> dict[str, np.ndarray]:
    """The tensors in a file (.safetensors, .npz, or PyTorch's), or in all such files of a folder; floats in float32.

    DataParallel's prefix `module.` is taken off the names.

    Args:
      which: the table of tensors to read from a PyTorch file that holds several, such as `model` and `ema`.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder.
      ValueError: a file is damaged, holds objects that could run code, or holds no table of tensors or several of them;
        or two files of the folder have a name in common.
    """
    path = Path(path)
    if path.is_dir():
        found: dict[str, np.ndarray] = {}
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path} holds no file of weights; it must hold one of {', '.join(SUFFIXES)}.")
        for file in files:
            part = read_weights(file)
            if both := sorted(found.keys() & part.keys()):
                raise ValueError(f"two files in {path} have a tensor {both[0]}; remove one of the files.")
            found |= part
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .safetensors, .npz or PyTorch file.")
    if path.suffix == ".safetensors":
        open_safetensors(path)  # raises a clear error if the file is damaged
        with safetensors.safe_open(path, framework="numpy") as file:
            found = {name: get_tensor(file, name, path) for name in file.keys()}  # noqa: SIM118
    elif path.suffix == ".npz":
        with _open_npz(path) as file:
            found = {name: file[name] for name in file.files}
            if odd := [name for name, x in found.items() if x.dtype.kind not in "iubcf"]:
                raise ValueError(f"{odd[0]} holds {found[odd[0]].dtype}")
    if path.suffix in (".safetensors", ".npz"):
        found = {name: x if x.dtype.kind in "iubc" else x.astype(np.float32) for name, x in found.items()}
    else:
        table = _torch_table(path, which)
        if small := [name for name, t in table.items() if t.is_floating_point() and t.element_size() < 2]:
            raise _without_scales(path, small[0], table[small[0]].dtype)
        found = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in table.items()}
    return {name.removeprefix("module."): x for name, x in found.items()}


def _torch_table(path: Path, which: str) -> Mapping[str, Any]:
    torch = torch_for(f"reading {path.name}")
    try:  # a training's options are often a Namespace, which holds values only
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects other than tensors, numbers, texts and an argparse.Namespace, which could run code "
            f"({str(error).splitlines()[0][:120]}); if you trust the file, save its state dict alone."
        ) from error
    except Exception as error:  # zip and PyTorch each raise their own types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is damaged or not a PyTorch file ({reason[0][:120]}); fetch it again.") from error

    def is_table(value):
        return isinstance(value, Mapping) and value and all(isinstance(x, torch.Tensor) for x in value.values())

    if is_table(state):
        return state
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, no table of tensors by name; save a state dict.")
    tables = [name for name, value in state.items() if is_table(value)]
    if not tables:
        odd = next((f" ({name!r} is no tensor)" for name, x in state.items() if not isinstance(x, torch.Tensor)), "")
        raise ValueError(f"{path} holds no table of tensors by name{odd}; save a model's state dict.")
    if which and which not in tables:
        raise ValueError(f"which is {which!r}, but {path} holds {', '.join(tables)}.")
    if not which and len(tables) > 1:
        raise ValueError(f"{path} holds {' and '.join(tables)}; choose one, such as which = {tables[-1]!r}.")
    return state[which or tables[0]]


def write_weights(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    facts: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Path:
    """Writes .safetensors, .npz, or a PyTorch file (`TORCH_SUFFIXES`). A failure leaves no new file.

    Args:
      facts: texts by name, for the header of a .safetensors file.
      replace: whether an earlier file is replaced; it stays if the writing fails.

    Raises:
      FileExistsError: the file exists already, and is not to be replaced.
      ValueError: the name has another ending.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}.")
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; choose another name (nothing was written).")
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    half_done = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".safetensors":
            safetensors.numpy.save_file(arrays, half_done, metadata=dict(facts) if facts else None)
        elif path.suffix == ".npz":
            with half_done.open("wb") as file:  # given a name, NumPy would add its suffix
                np.savez(file, **arrays)
        else:
            torch = torch_for(f"writing {path.name}")
            torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, half_done)
        half_done.replace(path)
    finally:
        half_done.unlink(missing_ok=True)
    return path
