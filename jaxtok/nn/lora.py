"""LoRA (Hu et al., arXiv 2106.09685): a trained difference of low rank for each of some matrices of any model.

y = x W + b becomes y = x (W + s D) + b, with D = U V of rank r and s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv
2312.03732). This module works on trees of parameters: `merge` adds the differences to the matrices, so no model needs
to know of LoRA. A step costs a copy of these matrices and one of their gradient; the optimizer has no state for the
base.

An adapter is a tree {"pairs": {site: {"in", "out"}}, "saved": parameters that are trained whole}. For a kernel [...,
d_in, d_out], whose first axis may be that of stacked layers, "in" is U [..., d_in, r] and "out" is V [..., r, d_out].
In PEFT's terms, in = A^T and out = B^T.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

Params = Any
TABLES = ("embedding", "head_matrix")
"""Matrices [vocab, d_model] that can have a difference too: the input embedding and the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices have a difference, and of what rank."""

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    """Whether a difference is scaled by alpha / sqrt(rank) instead of alpha / rank."""
    targets: tuple[str, ...] = (r".*/kernel",)
    """Regular expressions that match whole paths of parameters, such as `.*/attention/(query|value)/kernel`; by default
    every projection."""
    joint: tuple[str, ...] = ()
    """Regular expressions, each of whose parameters share one difference with one U. They take precedence over
    `targets`. PEFT does this for GPT-2, whose queries, keys and values are one matrix:
    `.*/attention/(query|key|value)/kernel`."""
    ranks: tuple[tuple[str, int], ...] = ()
    """Pairs (expression, rank): a path has the rank of the first expression that matches it, instead of `rank`."""
    alphas: tuple[tuple[str, float], ...] = ()
    """Pairs (expression, alpha), as in `ranks`."""
    saved: tuple[str, ...] = ()
    """Regular expressions that match the paths of parameters that are trained whole."""
    dropout: float = 0.0
    """The dropout of a difference's inputs in training. It drops the same channels for all tokens of a step. (PEFT
    draws anew for each token, which is impossible for a difference that is added to the matrix.)"""

    def __post_init__(self):
        for rank in (self.rank, *(rank for _, rank in self.ranks)):
            if rank < 1:
                raise ValueError(f"lora.rank is {rank}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be in [0, 1).")
        if not self.targets and not self.joint and not self.saved:
            raise ValueError("lora.targets, joint and saved are empty; one of them must name parameters to train.")

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """The place of a difference: one parameter, or several that are joined along their last axis."""

    paths: tuple[str, ...]
    ranks: tuple[int, ...]
    """The rank in each layer, 0 for none; one number if there are no layers."""
    scales: tuple[float, ...]
    """The factor s in each layer; one number if there are no layers."""
    widths: tuple[int, ...]
    """The columns of each parameter."""
    lookup: bool = False
    """Whether the matrix is a table whose rows are looked up."""
    transposed: bool = False
    """Whether the matrix is [d_out, d_in], as that of a head is."""

    @property
    def name(self) -> str:
        return "+".join(self.paths)

    @property
    def rank(self) -> int:
        return max(self.ranks)


def find_sites(config: LoraConfig, params: Params) -> tuple[Site, ...]:
    """The differences that a config asks for in a model's parameters (or in their shapes).

    Raises:
      ValueError: an expression matches nothing, or something that is no matrix.
    """
    shapes = {path: value_of(leaf).shape for path, leaf in flat(params).items()}

    def site(paths: Sequence[str], field: str) -> Site:
        first, shape = paths[0], shapes[paths[0]]
        last = first.rsplit("/", 1)[-1]
        table = last in TABLES
        layers = shape[0] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or (not table and last != "kernel"):
            raise ValueError(f"lora.{field} has {first} of shape {shape}, which is no projection; leave it out.")
        rank = next((rank for pattern, rank in config.ranks if re.fullmatch(pattern, first)), config.rank)
        alpha = next((alpha for pattern, alpha in config.alphas if re.fullmatch(pattern, first)), config.alpha)
        return Site(
            paths=tuple(paths),
            ranks=(rank,) * layers,
            scales=(config.scale(rank, alpha),) * layers,
            widths=tuple(shapes[path][-1] for path in paths),
            lookup=last == "embedding",
            transposed=last == "head_matrix",
        )

    def matched(pattern: str, field: str) -> list[str]:
        paths = [path for path in shapes if re.fullmatch(pattern, path)]
        if not paths:
            names = [path for path in shapes if path.rsplit("/", 1)[-1] in ("kernel", *TABLES)]
            there = f"those that can have a difference are {', '.join(names)[:300]}" if names else "no other fits"
            raise ValueError(f"lora.{field} has {pattern!r}, which is no parameter of the model; {there}.")
        return paths

    def order(path: str) -> tuple[int, str]:
        name = path.split("/")[-2] if "/" in path else path
        return (_JOINT.index(name) if name in _JOINT else len(_JOINT), path)

    sites = [site(sorted(matched(pattern, "joint"), key=order), "joint") for pattern in config.joint]
    taken = {path for one in sites for path in one.paths}
    for pattern in config.targets:
        new = [path for path in matched(pattern, "targets") if path not in taken]
        sites += [site([path], "targets") for path in new]
        taken.update(new)
    return tuple(sites)


_JOINT = ("query", "key", "value")


def saved_paths(config: LoraConfig, params: Params) -> tuple[str, ...]:
    """The parameters that are trained whole.

    Raises:
      ValueError: an expression matches no parameter.
    """
    paths, found = list(flat(params)), []
    for pattern in config.saved:
        matched = [path for path in paths if re.fullmatch(pattern, path)]
        if not matched:
            raise ValueError(f"lora.saved has {pattern!r}, which is no parameter; there are {', '.join(paths)[:300]}.")
        found += matched
    return tuple(dict.fromkeys(found))


def init_adapter(rng: jax.Array, sites: Sequence[Site], saved: Sequence[str], params: Params) -> Params:
    """An adapter that changes nothing yet: U is uniform within 1/sqrt(d_in) and V zero; for a table, U is zero and V
    normal.

    If the parameters are in Linen's boxes, so is the adapter; a mesh then divides it as it divides them.
    """
    leaves, pairs = flat(params), {}
    for key, site in zip(jax.random.split(rng, max(len(sites), 1)), sites):
        first = leaves[site.paths[0]]
        *stack, rows, _ = value_of(first).shape
        columns = sum(site.widths)
        shape_in, shape_out = (*stack, rows, site.rank), (*stack, site.rank, columns)
        if site.lookup:
            u, v = jnp.zeros(shape_in), jax.random.normal(key, shape_out)
        elif site.transposed:
            bound = 1 / math.sqrt(columns)
            u, v = jnp.zeros(shape_in), jax.random.uniform(key, shape_out, minval=-bound, maxval=bound)
        else:
            bound = 1 / math.sqrt(rows)
            u, v = jax.random.uniform(key, shape_in, minval=-bound, maxval=bound), jnp.zeros(shape_out)
        pair = {"in": u, "out": v}
        names = getattr(first, "names", None)
        if names is not None:
            *of_stack, of_rows, of_columns = names
            axes = {"in": (*of_stack, of_rows, None), "out": (*of_stack, None, of_columns)}
            pair = {part: nn.LogicallyPartitioned(array, axes[part]) for part, array in pair.items()}
        pairs[site.name] = pair
    return {"pairs": pairs, "saved": nested({path: leaves[path] for path in saved})}


def differences(sites: Sequence[Site], pairs: Mapping[str, Any], dropout: float = 0.0, rng: Any = None) -> Params:
    """The difference s U V of each parameter that has one, by path, in float32."""
    found = {}
    for number, site in enumerate(sites):
        u, v = (pairs[site.name][part].astype(jnp.float32) for part in ("in", "out"))
        scale = jnp.array(site.scales, jnp.float32)
        if rng is not None and dropout and not site.lookup:  # of rows of U, or of columns of a head's V
            inputs = (*v.shape[:-2], 1, v.shape[-1]) if site.transposed else (*u.shape[:-1], 1)
            kept = jax.random.bernoulli(jax.random.fold_in(rng, number), 1 - dropout, inputs) / (1 - dropout)
            u, v = (u, v * kept) if site.transposed else (u * kept, v)
        joined = (u * (scale[:, None, None] if u.ndim == 3 else scale[0])) @ v
        parts = jnp.split(joined, np.cumsum(site.widths)[:-1], axis=-1)
        found |= dict(zip(site.paths, parts))
    return found


def merge(
    params: Params,
    sites: Sequence[Site],
    adapter: Params,
    *,
    weight: float = 1.0,
    dropout: float = 0.0,
    rng: Any = None,
) -> Params:
    """The parameters plus `weight` times the adapter's differences; the adapter's saved parameters replace theirs.

    A weight of -1 takes the differences out again. Adapters can be merged one after the other.

    Raises:
      ValueError: the adapter is for matrices of another width.
    """
    leaves = flat(params)
    check(params, sites, adapter)
    if weight > 0:
        leaves |= flat(adapter.get("saved", {}))
    for path, delta in differences(sites, adapter["pairs"], dropout, rng).items():
        leaves[path] = (leaves[path].astype(jnp.float32) + weight * delta).astype(leaves[path].dtype)
    return nested(leaves)


def check(params: Params, sites: Sequence[Site], adapter: Params) -> None:
    """Raises ValueError if an adapter is not for this model; the message names the parameter and the shapes."""
    leaves = flat(params)
    for site in sites:
        if missing := [path for path in site.paths if path not in leaves]:
            raise ValueError(f"the adapter is for {missing[0]}, which the model does not have.")
        shapes = [leaves[path].shape for path in site.paths]
        *stack, rows, _ = shapes[0]
        wanted = {"in": (*stack, rows, site.rank), "out": (*stack, site.rank, sum(s[-1] for s in shapes))}
        for part, shape in wanted.items():
            if (ours := adapter["pairs"][site.name][part].shape) != shape:
                raise ValueError(
                    f"the adapter's part {part!r} of {site.name} has shape {ours}; for this model it must have {shape}."
                )
    for path, array in flat(adapter.get("saved", {})).items():
        if path not in leaves or leaves[path].shape != array.shape:
            there = leaves[path].shape if path in leaves else "no such parameter"
            raise ValueError(f"the adapter saved {path} of shape {array.shape}, but the model has {there}.")


def flat(tree: Params) -> dict[str, Any]:
    """The leaves of a tree by their paths, still in Linen's boxes if they are in any."""
    return {"/".join(path): leaf for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def nested(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `flat`."""
    return flax.traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def value_of(leaf: Any) -> Any:
    """The array in one of Linen's boxes, or the leaf itself."""
    return leaf.value if isinstance(leaf, nn.meta.Partitioned) else leaf
