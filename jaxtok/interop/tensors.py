"""Conversion between the named tensors of other code and our parameters, by one table of names for both directions.

A table has a `Source` for each of our parameters: its name there, and how it is laid out. `read_params` and
`write_params` are inverse functions over such a table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.protocols import Params
from jaxtok.weights import get_tensor, open_safetensors, read_weights, write_weights

Place = tuple[str, ...]
"""A path in our parameter tree."""

CONVOLUTION = (2, 3, 1, 0)
"""`Source.axes` of PyTorch's Conv2d [out, in, height, width]."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter is in their tensors, and how it is laid out there."""

    name: str
    """The name of their tensor; `{layer}` stands for a number, and ours is then a stack of theirs."""
    transpose: bool = False
    """Whether their axes are ours in reverse, as in PyTorch's Linear, which holds [out, in]."""
    axes: tuple[int, ...] = ()
    """Their axes in our order, if that is another one."""
    part: int | None = None
    """Which part of their tensor it is, if that joins several of ours (queries, keys and values)."""
    axis: int = -1
    """The axis of theirs along which parts are joined."""
    padding: int = 0
    """The number of unused entries after ours along that axis: left out when read, 0 when written."""
    before: int = 0
    """The number of unused entries before ours along that axis."""
    ones: int = 0
    """The number of leading axes of size 1 that theirs has and ours lacks; negative: that ours has and theirs lacks."""
    first: int = 0
    """The number of the stack's first layer."""
    step: int = 1
    """How far apart the numbers of the stack's layers are."""
    also: tuple[str, ...] = ()
    """Other names under which it is found."""

    def number(self, index: int) -> int:
        """Returns their number of a layer of our stack."""
        return self.first + self.step * index

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns a parameter, or one layer of it, as it is laid out there."""
        if self.transpose:
            array = array.T
        elif self.axes:
            array = array.transpose(np.argsort(self.axes))
        return array.reshape((1,) * self.ones + array.shape[max(-self.ones, 0) :])

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Inverts `theirs`."""
        array = array.reshape((1,) * -self.ones + array.shape[max(self.ones, 0) :])
        return array.T if self.transpose else array.transpose(self.axes) if self.axes else array


Table = Mapping[Place, Source]
Shapes = Mapping[Place, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A parameter, or one layer of it, in one of their tensors."""

    place: Place
    index: int | None
    """The number of the layer in our stack."""
    source: Source
    shape: tuple[int, ...]
    """The shape there."""


def _tensors(table: Table, shapes: Shapes) -> dict[str, list[_Piece]]:
    """Returns their names, and the pieces in each tensor in the order in which they are joined."""
    if nameless := [place for place in shapes if place not in table]:
        raise ValueError(f"the format has no name for the parameter {'/'.join(nameless[0])} of this model.")
    found: dict[str, list[_Piece]] = {}
    for place, source in table.items():
        stacked = "{layer}" in source.name
        shape = shapes[place][1:] if stacked else shapes[place]
        theirs = source.theirs(np.broadcast_to(np.float32(0), shape)).shape
        for index in range(shapes[place][0]) if stacked else [None]:
            name = source.name if index is None else source.name.format(layer=source.number(index))
            found.setdefault(name, []).append(_Piece(place, index, source, theirs))
    return {name: sorted(pieces, key=lambda piece: piece.source.part or 0) for name, pieces in found.items()}


def _joined_shape(pieces: list[_Piece]) -> tuple[int, ...]:
    shape, source = list(pieces[0].shape), pieces[0].source
    if len(pieces) > 1 or source.padding or source.before:
        shape[source.axis] = sum(piece.shape[source.axis] for piece in pieces) + source.padding + source.before
    return tuple(shape)


def read_params(
    table: Table,
    shapes: Shapes,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = None,
    aliases: Callable[[str], Iterable[str]] = lambda name: (name,),
    ignored: Callable[[str], Any] = lambda name: False,
) -> Params:
    """Returns our parameter tree from their tensors.

    Args:
      table: a source for each of our parameters.
      shapes: the shape of each of our parameters.
      tensors: their tensors, by name.
      dtype: the dtype of the parameters; None: that of the tensors.
      aliases: the names under which a tensor is looked for, the likeliest first.
      ignored: whether a tensor that the table does not name may be there.

    Raises:
      ValueError: tensors are missing, unknown, of another shape, or no weights; the message names them.
    """
    left = {name for name in tensors if not ignored(name)}
    flat: dict[Place, np.ndarray] = {}
    problems: list[str] = []
    for name, pieces in _tensors(table, shapes).items():
        wanted, source = _joined_shape(pieces), pieces[0].source
        layer = {} if pieces[0].index is None else {"layer": source.number(pieces[0].index)}
        names = [name, *(other.format(**layer) for other in source.also)]
        held = next((n for known in names for n in aliases(known) if n in tensors), None)
        if held is None:
            problems.append(f"{name} is missing")
            continue
        left.discard(held)
        array = checked(held, tensors[held])
        if _without_ones(array.shape) != _without_ones(wanted):
            problems.append(f"{held} has shape {tuple(array.shape)} instead of {wanted}")
            continue
        array, start = array.reshape(wanted), source.before
        for piece in pieces:
            part = array
            if len(pieces) > 1 or source.padding or source.before:
                stop = start + piece.shape[source.axis]
                part = np.moveaxis(np.moveaxis(array, source.axis, 0)[start:stop], 0, source.axis)
                start = stop
            part = piece.source.ours(part)
            if piece.place not in flat:
                flat[piece.place] = np.empty(shapes[piece.place], dtype or part.dtype)
            flat[piece.place][... if piece.index is None else piece.index] = part
    problems += [f"{name} is unknown" for name in sorted(left)]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"the tensors do not fit the config: {'; '.join(problems[:8])}{more}.")
    return flax.traverse_util.unflatten_dict(flat)


def checked(name: str, array: Any) -> np.ndarray:
    """Returns an array of weights.

    Raises:
      ValueError: it does not hold floats of 16 bits or more, or not all of them are finite.
    """
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise ValueError(f"{name} holds {array.dtype}, which are not weights without their scales.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity, so it is damaged; fetch the weights again.")
    return array


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def write_params(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name, from our parameter tree or one of its form (a gradient); inverts `read_params`.

    Raises:
      ValueError: the table has no name for a parameter.
    """
    flat = {place: np.asarray(leaf) for place, leaf in flax.traverse_util.flatten_dict(params).items()}
    found = {}
    for name, pieces in _tensors(table, {place: leaf.shape for place, leaf in flat.items()}).items():
        source = pieces[0].source
        arrays = [p.source.theirs(flat[p.place] if p.index is None else flat[p.place][p.index]) for p in pieces]
        for unused, at in ((source.padding, len(arrays)), (source.before, 0)):
            if unused:
                shape = list(arrays[0].shape)
                shape[source.axis] = unused
                arrays.insert(at, np.zeros(shape, arrays[0].dtype))
        array = np.concatenate(arrays, source.axis) if len(arrays) > 1 else arrays[0]
        found[name] = np.ascontiguousarray(array).reshape(array.shape)  # the reshape keeps scalars
    return found


def shapes_of(init: Callable[[], Params]) -> Shapes:
    """Returns parameter paths to shapes, from a function that makes the parameters, without making any array."""
    tree = nn.meta.unbox(jax.eval_shape(init))
    return {place: leaf.shape for place, leaf in flax.traverse_util.flatten_dict(tree).items()}


def expected_shapes(config: Any) -> Shapes:
    """Returns the parameter paths of a `Decoder` to shapes, from its config."""
    return shapes_of(lambda: init_params(Decoder(config), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files; each is read when it is used."""

    def __init__(self, files: dict[str, Path]):
        self._files = files
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files[name]
        return get_tensor(self._file(path), name, path)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def read_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """Returns the tensors in model.safetensors or pytorch_model.bin (needs PyTorch), or in the shards of one of them.

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ValueError: a file is damaged, or a shard lacks a tensor that the index names.
    """
    if (path := folder / "model.safetensors").is_file():
        return Tensors(dict.fromkeys(open_safetensors(path).keys(), path))
    if (path := folder / "model.safetensors.index.json").is_file():
        shard_of = _shards(path)
        for shard in set(shard_of.values()):
            _must_hold(shard, open_safetensors(shard).keys(), shard_of, path)
        return Tensors(shard_of)
    for name in ("pytorch_model.bin", "mp_rank_00_model_states.pt"):
        if (path := folder / name).is_file():
            return read_weights(path, "module")  # the key under which DeepSpeed keeps the model
    if (path := folder / "pytorch_model.bin.index.json").is_file():
        shard_of, found = _shards(path), {}
        for shard in set(shard_of.values()):
            held = read_weights(shard)
            _must_hold(shard, held, shard_of, path)
            found |= held
        return found
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin; fetch the weights too.")


def _shards(index: Path) -> dict[str, Path]:
    """Returns the names of tensors to their files, from the index of a folder's shards."""
    try:
        shard_of = {str(name): str(shard) for name, shard in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged: it has no table weight_map of names and files; fetch it again."
        ) from error
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; it must be a file of the same folder.")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} does not exist, but {index.name} names it; fetch it too.")
    return {name: index.parent / shard for name, shard in shard_of.items()}


def _must_hold(shard: Path, held: Iterable[str], shard_of: Mapping[str, Path], index: Path) -> None:
    known = set(held)
    if missing := [name for name, where in shard_of.items() if where == shard and name not in known]:
        raise ValueError(f"{shard} has no tensor {missing[0]}, but {index.name} names it; fetch both again.")


def save_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = 5 * 10**9, torch_bin: bool = False
) -> None:
    """Writes model.safetensors, or shards of at most so many bytes and their index; or pytorch_model.bin in float32."""
    if torch_bin:
        write_weights(folder / "pytorch_model.bin", {name: x.astype(np.float32) for name, x in tensors.items()})
        return
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    metadata = {"format": "pt"}
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], folder / "model.safetensors", metadata=metadata)
        return
    file_of = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(shard, folder / file, metadata=metadata)
        file_of |= dict.fromkeys(shard, file)
    size = sum(array.nbytes for shard in shards for array in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, FOLDER.part, whose files are moved to `folder` at the end; an error removes it."""
    folder = folder.resolve()  # "." has no name
    half_done = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(parents=True)
    try:
        yield half_done
        if not folder.exists():
            half_done.rename(folder)
        else:
            for file in half_done.iterdir():
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(half_done, ignore_errors=True)
