"""Where arrays are on many devices: a mesh, and one table of rules from logical axes to its axes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtok.axes import partition_spec
from jaxtok.protocols import ArraySpec, Batch

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
"""From the slowest connection to the fastest: neighbours in `tensor` are neighbours in the hardware."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """The mesh axes that divide each logical axis; each array takes as many of them as are free.

    Earlier fields come first: as `batch` takes `fsdp` in activations, their `d_model` stays whole along it, while that
    of parameters is divided. A logical axis that is not listed is never divided.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    vocab: tuple[str, ...] = ("tensor",)
    param_tokens: tuple[str, ...] = ("tensor", "fsdp")
    mlp: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ()
    """The mesh axes for heads of keys that several queries share; there are often fewer of them than devices."""
    d_model: tuple[str, ...] = ("fsdp",)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if unknown := [axis for axis in axes if axis not in MESH_AXES]:
                raise ValueError(
                    f"rules.{field.name} has {unknown[0]!r}, which is not a mesh axis; use {', '.join(MESH_AXES)}."
                )
            if len(set(axes)) < len(axes):
                raise ValueError(f"rules.{field.name} is {', '.join(axes)}; it must have each mesh axis at most once.")

    def pairs(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Returns `jaxtok.axes.Rules`: for (a, b), the rules a and b together, a alone, and b alone."""
        pairs = []
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            choices = [axes[:n] for n in range(len(axes), 0, -1)] + [(axis,) for axis in axes[1:]]
            pairs += [(field.name, choice) for choice in choices]
        return tuple(pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices divide the work; one of the numbers may be -1, which means the rest of the devices."""

    data: int = -1
    """The number of ways to divide batches, with all parameters on each device."""
    fsdp: int = 1
    """The number of ways to divide batches further, and with them parameters and optimizer state; the parameters of a
    layer are gathered when they are used."""
    sequence: int = 1
    """The number of ways to divide the length of rows, for long contexts; keys and values are gathered."""
    tensor: int = 1
    """The number of ways to divide parameter tokens, hidden units, heads and vocabulary; results are summed."""
    rules: AxisRules = AxisRules()

    def __post_init__(self):
        for axis in MESH_AXES:
            if (n := getattr(self, axis)) < 1 and n != -1:
                raise ValueError(f"mesh.{axis} is {n}; it must be at least 1 (or -1 for the rest of the devices).")
        if sum(getattr(self, axis) == -1 for axis in MESH_AXES) > 1:
            raise ValueError("two mesh axes are -1; only one may be the rest of the devices.")

    def shape(self, devices: int) -> dict[str, int]:
        """Returns the size of each axis.

        Raises:
          ValueError: the axes do not multiply to the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        known = math.prod(n for n in sizes.values() if n > 0)
        sizes = {axis: n if n > 0 else devices // known for axis, n in sizes.items()}
        if math.prod(sizes.values()) != devices:
            given = ", ".join(f"{axis} {getattr(self, axis)}" for axis in MESH_AXES)
            fitting = {axis: 1 for axis in MESH_AXES if getattr(self, axis) > 1} | {"data": -1}
            raise ValueError(
                f"the mesh ({given}) does not fit {devices} device{'s' * (devices != 1)}; its axes must multiply to "
                f"{devices}, as with {' '.join(f'--mesh.{axis} {n}' for axis, n in fitting.items())}."
            )
        return sizes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices and the rules in force on it."""

    mesh: Mesh
    rules: AxisRules = AxisRules()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the axis names of activations (`jaxtok.axes.constrain`) stand for axes of this mesh."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules.pairs()):
            yield

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, names: Sequence[str | None], shape: Sequence[int], what: str = "an array") -> NamedSharding:
        """Returns the sharding of an array whose axes have these names.

        Raises:
          ValueError: the mesh does not divide it.
        """
        spec = partition_spec(names, shape, self.rules.pairs(), dict(self.mesh.shape), what)
        return NamedSharding(self.mesh, spec)

    def params(self, boxed: Any) -> Any:
        """Returns the sharding of each parameter, from parameters (or their shapes) in Linen's boxes.

        Raises:
          ValueError: the mesh does not divide one of them.
        """

        def one(path, leaf):
            if not is_box(leaf):
                return self.replicated
            return self.sharding(leaf.names, leaf.value.shape, jax.tree_util.keystr(path, simple=True, separator="/"))

        return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)

    def batch(self, spec: dict[str, ArraySpec]) -> dict[str, NamedSharding]:
        """Returns the sharding of each array in a batch.

        Raises:
          ValueError: the mesh does not divide one of them.
        """
        return {name: self.sharding(a.axes, a.shape, f"the batch's {name}") for name, a in spec.items()}

    def rows(self, batch_size: int) -> range:
        """Returns the rows of a batch that this process's devices need."""
        parts = self.sharding(("batch",), (batch_size,), "the batch").addressable_devices_indices_map((batch_size,))
        bounds = [part[0].indices(batch_size) for part in parts.values()]
        return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

    def put(self, batch: Batch, rows: range, spec: dict[str, ArraySpec]) -> dict[str, jax.Array]:
        """Puts a batch on the devices of all processes; this process has `rows` of it."""

        def one(array: np.ndarray, name: str) -> jax.Array:
            size = spec[name].shape[0]

            def part(index):
                start, stop, _ = index[0].indices(size)
                return array[(slice(start - rows.start, stop - rows.start), *index[1:])]

            return jax.make_array_from_callback((size, *array.shape[1:]), shardings[name], part)

        shardings = self.batch(spec)
        return {name: one(array, name) for name, array in batch.items()}


def unboxed(boxed: Any) -> Any:
    """Returns the parameters that are in Linen's boxes."""
    return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.Partitioned)


def make_layout(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Layout:
    """Returns the layout on these devices, arranged along their connections.

    The default is all devices; in a single process, as many as the mesh has.

    Raises:
      ValueError: the mesh does not fit them.
    """
    if devices is None:
        devices = jax.devices()
        asked = math.prod(getattr(config, axis) for axis in MESH_AXES)
        if 0 < asked < len(devices) and jax.process_count() == 1:
            devices = devices[:asked]
    shape = tuple(config.shape(len(devices)).values())
    try:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):  # a shape that the torus cannot be cut into
        array = np.asarray(devices).reshape(shape)
    return Layout(Mesh(array, MESH_AXES), config.rules)


def one_device() -> Layout:
    """Returns the layout with everything on the first device."""
    return make_layout(MeshConfig(data=1), jax.local_devices()[:1])
