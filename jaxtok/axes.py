"""Logical axes: names for the dimensions of arrays, which a table of rules maps to the axes of a mesh of devices.

Parameters carry their names from `nn.with_logical_partitioning`, activations get theirs from `constrain`. The rules and
the mesh are in force inside `jaxtok.training.mesh.Layout.active`; outside of it, the names mean nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

Rules = Sequence[tuple[str, tuple[str, ...]]]
"""(logical axis, mesh axes): for each array, the first rule that holds and whose mesh axes are still free is taken."""


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, with its last dimensions named `axes` and the ones before them ("batch", "length").

    Raises:
      ValueError: the mesh does not divide one of the dimensions.
    """
    rules = nn.get_logical_axis_rules()
    if not rules:
        return x
    names = (*("batch", "length")[: x.ndim - len(axes)], *axes)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, rules, mesh.shape, "an activation"))


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter as activations use it: whole along the mesh axes that divide the batch, and divided along the others
    as its names say."""
    rules = nn.get_logical_axis_rules()
    if not rules:
        return x
    taken = nn.logical_to_mesh_axes(("batch", *axes), rules)[1:]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*taken))


@contextlib.contextmanager
def rows_only() -> Iterator[None]:
    """A context in which all axes of the mesh divide the first axis of activations, and nothing else is divided.

    It is for many short rows, such as the words of a batch, in a part of a model that is small beside the rest.
    """
    if not nn.get_logical_axis_rules():
        yield
        return
    with nn.logical_axis_rules([("batch", tuple(jax.sharding.get_abstract_mesh().axis_names))]):
        yield


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: Mapping[str, int], what: str
) -> PartitionSpec:
    """The mesh axes of each dimension of an array. An axis without a rule is not divided.

    Raises:
      ValueError: the mesh does not divide an axis; the message names it, its size and the mesh.
    """
    spec = nn.logical_to_mesh_axes(tuple(names), rules)
    for name, size, entry in zip(names, shape, spec):
        dividing = [axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if mesh[axis] > 1]
        parts = math.prod(mesh[axis] for axis in dividing)
        if size % parts:
            raise ValueError(
                f"the axis {name} of {what} has size {size}, which mesh axes {' x '.join(dividing)} = {parts} do not "
                f"divide (mesh: {', '.join(f'{axis} {n}' for axis, n in mesh.items())}); "
                f"choose another size or mesh, or another rule for {name}."
            )
    return spec
