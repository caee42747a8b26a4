"""Files of named tensors, in formats that cannot run code: safetensors, and PyTorch's, which need PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


def open_safetensors(path: Path) -> Any:
    """A file of tensors, open.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return safetensors.safe_open(path, framework="flax")  # unlike "numpy", it knows bfloat16
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); fetch it again.") from error


def torch_for(purpose: str) -> Any:
    """PyTorch, which only this needs."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{purpose} needs PyTorch; pip install torch, or convert the file to model.safetensors first."
        ) from None
    return torch


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors in a file (.safetensors, else PyTorch's), or in all such files of a folder; floats in float32.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder.
      ValueError: it is damaged, holds more than tensors, or two files of the folder have a name in common.
    """
    path = Path(path)
    if path.is_dir():
        found: dict[str, np.ndarray] = {}
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".th", ".bin"))
        if not files:
            raise FileNotFoundError(f"{path} holds no .safetensors, .pth, .pt, .th or .bin.")
        for file in files:
            part = read_weights(file)
            if both := sorted(found.keys() & part.keys()):
                raise ValueError(f"two files in {path} have a tensor {both[0]}; leave one of them there.")
            found |= part
        return found
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}.")
    if path.suffix == ".safetensors":
        open_safetensors(path)  # a damaged one is an error that says so
        with safetensors.safe_open(path, framework="numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: x if x.dtype.kind in "iub" else x.astype(np.float32) for name, x in found.items()}
    torch = torch_for(f"reading {path.name}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch each have their own
        said = str(error).strip().splitlines()
        raise ValueError(
            f"{path} is no whole file of PyTorch tensors, or holds other objects beside them "
            f"({said[0][:120] if said else type(error).__name__})."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is no table of tensors by name; save its state_dict alone.")
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in state.items()}


def write_weights(path: str | Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes .safetensors, or a PyTorch file where the name ends otherwise.

    Raises:
      FileExistsError: there is such a file already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name (nothing was written).")
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    half_done = path.with_name(path.name + ".part")
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, half_done)
    else:
        torch = torch_for(f"writing {path.name}")
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, half_done)
    half_done.rename(path)
    return path
