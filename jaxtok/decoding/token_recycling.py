"""Token Recycling (arXiv 2408.08696): drafts from the successors that each token had when the model last read it.

The adjacency matrix M [vocab, k] holds, for each token, the k likeliest next tokens after its last occurrence in any
tree, verified or not. A draft is a tree of a fixed shape, the template: the node of rank r below a node with token t
holds M[t, r]. After the model has read the tree, the k likeliest tokens after *each* of its nodes, accepted or not, are
written back (section 3.2 of the paper).

The authors' code has k = 8 in two places, of which only one is an option; here it is one option. It reads no row of
logits of the prompt; `update_from_prompt` does. It stops before the update in a request's last step; here the last step
is observed like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.decoding.protocols import Drafter, Verified
from jaxtok.weights import open_safetensors, write_weights

NodePath = tuple[int, ...]
"""A node of a template: the ranks on the way from the root to it. The root is ()."""


@dataclasses.dataclass(frozen=True)
class TreeTemplate:
    """The shape of a draft: a set of paths of ranks, closed under prefixes.

    Nodes are numbered by level, in a level by their paths; the root, node 0, has no path in the list.

    >>> template = TreeTemplate.of([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    >>> template.parents.tolist(), template.ranks.tolist(), template.levels[1]
    ([-1, 0, 0, 1, 1, 2], [-1, 0, 1, 0, 1, 0], slice(3, 6, None))
    >>> template.prune([9, 6, 3, 5, 1, 2], 4).paths
    ((0,), (1,), (0, 0))
    """

    paths: tuple[NodePath, ...]

    def __post_init__(self):
        known = {()}
        for path in self.paths:
            if not path or min(path) < 0:
                raise ValueError(f"a path of the template is {path}; it must have at least one rank, each at least 0.")
            if path in known:
                raise ValueError(f"the template has the path {path} twice.")
            if path[:-1] not in known:
                raise ValueError(f"the template has the path {path}, but not {path[:-1]} before it.")
            known.add(path)
        if list(self.paths) != sorted(self.paths, key=_order):
            raise ValueError("the template's paths must be in the order of their levels; make it with TreeTemplate.of.")

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]]) -> TreeTemplate:
        """The template of paths in any order."""
        return cls(tuple(sorted((tuple(int(rank) for rank in path) for path in paths), key=_order)))

    @classmethod
    def of_children(cls, counts: Mapping[str, int]) -> TreeTemplate:
        """The template in which a node has children of rank 0, 1, ..., by their number.

        Args:
          counts: by the node's path, a digit a rank; nodes that are not listed are leaves.

        >>> TreeTemplate.of_children({"": 2, "0": 1}).paths
        ((0,), (1,), (0, 0))
        """
        return cls.of([*map(int, path), rank] for path, count in counts.items() for rank in range(count))

    @classmethod
    def chain(cls, length: int) -> TreeTemplate:
        """The likeliest successor of the likeliest successor, and so on."""
        if length < 1:
            raise ValueError(f"length is {length}; a chain has at least one token.")
        return cls(tuple((0,) * (depth + 1) for depth in range(length)))

    @property
    def nodes(self) -> int:
        """The number of nodes, the root included."""
        return 1 + len(self.paths)

    @functools.cached_property
    def parents(self) -> Int[np.ndarray, " nodes"]:
        """The number of each node's parent; -1 for the root."""
        number = {path: index for index, path in enumerate(((), *self.paths))}
        return np.array([-1, *(number[path[:-1]] for path in self.paths)], np.int32)

    @functools.cached_property
    def ranks(self) -> Int[np.ndarray, " nodes"]:
        """The rank of each node among the successors of its parent; -1 for the root."""
        return np.array([-1, *(path[-1] for path in self.paths)], np.int32)

    @functools.cached_property
    def levels(self) -> tuple[slice, ...]:
        """The nodes of level 1, 2, ..."""
        depth = np.array([len(path) for path in self.paths])
        starts = 1 + np.searchsorted(depth, np.arange(1, depth.max(initial=0) + 2))
        return tuple(slice(int(low), int(high)) for low, high in itertools.pairwise(starts))

    def prune(self, counts: Sequence[float], size: int) -> TreeTemplate:
        """The `size` nodes that were accepted most often, the root included; of equals, the lower ones.

        Args:
          counts: how often each node was accepted, the root first, as `jaxtok.decoding.width.Counted` counts. A node
            counts no more than its parent, so that what is left is closed under prefixes.
        """
        if len(counts) != self.nodes:
            raise ValueError(f"there are {len(counts)} counts, but the template has {self.nodes} nodes.")
        if not 1 <= size <= self.nodes:
            raise ValueError(f"size is {size}; the template has {self.nodes} nodes.")
        useful = np.array(counts, np.float64)
        for node in range(1, self.nodes):
            useful[node] = min(useful[node], useful[self.parents[node]])
        kept = np.argsort(-useful[1:], kind="stable")[: size - 1]
        return TreeTemplate.of(self.paths[node] for node in kept)


def _order(path: NodePath) -> tuple[int, NodePath]:
    return len(path), path


AUTHORS_TREE = TreeTemplate.of_children(
    {"": 8}
    | {"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1}
    | {"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1}
    | {"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1}
    | {"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1}
    | {"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1}
    | {"00000": 2, "00010": 1}
)
"""The authors' template, which their code calls 2.2.2: 80 nodes and the root, on six levels."""


TEMPLATES = {
    "2.2.2": AUTHORS_TREE,
    "11": TreeTemplate.of_children({"": 4, "0": 2, "1": 1, "00": 2, "000": 1}),
    "chain": TreeTemplate.chain(4),
}
"""Templates by name; smaller ones are for large batches, as the cost of a step grows with rows times nodes."""

KIND = "token_recycling"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRecycling(Drafter):
    """A `jaxtok.decoding.protocols.Drafter` whose state is the adjacency matrix M.

    The state of an earlier generation, `Generation.state.drafter`, is a hot start: give it as `drafter_state`. By
    default a generation begins cold, with zeros.

    >>> import jax.numpy as jnp
    >>> drafter = TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0), (0, 1), (1, 0)]), k=3)
    >>> matrix = jnp.zeros((6, 3), int).at[jnp.array([3, 4, 1])].set(jnp.array([[4, 1, 2], [5, 3, 0], [2, 2, 0]]))
    >>> tokens, parents = drafter.propose(matrix, jnp.array([[0, 3, 0, 0]]), jnp.array([2]))
    >>> tokens.tolist(), parents.tolist()
    ([[3, 4, 1, 5, 3, 2]], [[-1, 0, 0, 1, 1, 2]])
    """

    template: TreeTemplate = AUTHORS_TREE
    k: int = 8
    """The number of successors of a token."""
    shared: bool = True
    """Whether all rows of a batch read and write one matrix. Otherwise each row has its own: [batch, vocab, k]."""
    update_from_prompt: bool = False
    """Whether the successors of the prompt's tokens are written too, which needs logits of the whole prompt."""

    chain = False

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1.")
        if (rank := self.template.ranks.max()) >= self.k:
            raise ValueError(
                f"the template has the rank {rank}; k = {self.k} successors have the ranks 0 to {self.k - 1}."
            )

    @property
    def nodes(self) -> int:
        return self.template.nodes

    def init(self, batch: int, room: int, vocab: int) -> Int[Array, "*batch vocab k"]:
        if self.k > vocab:
            raise ValueError(f"k is {self.k}; a vocabulary of {vocab} has no more successors.")
        return jnp.zeros((vocab, self.k) if self.shared else (batch, vocab, self.k), jnp.int32)

    def propose(
        self, state: Int[Array, "*batch vocab k"], text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        parents, ranks = self.template.parents, self.template.ranks
        rows = jnp.arange(text.shape[0])[:, None]
        tokens = text[rows, length[:, None] - 1]
        for level in self.template.levels:  # all levels read the old matrix
            above = tokens[:, parents[level]]
            here = state[above, ranks[level]] if self.shared else state[rows, above, ranks[level]]
            tokens = jnp.concatenate([tokens, here], axis=1)
        return tokens, jnp.broadcast_to(jnp.asarray(parents), tokens.shape)

    def observe(self, state: Int[Array, "*batch vocab k"], verified: Verified) -> Int[Array, "*batch vocab k"]:
        read = (verified.parents >= 0).at[:, 0].set(True) & (verified.count > 0)[:, None]
        return self._write(state, verified.tokens, verified.logits, read)

    def begin(
        self,
        state: Int[Array, "*batch vocab k"],
        text: Int[Array, "batch room"],
        length: Int[Array, " batch"],
        logits: Float[Array, "batch prompt vocab"],
    ) -> Int[Array, "*batch vocab k"]:
        self._check(state, text.shape[0], logits.shape[-1])
        if not self.update_from_prompt:
            return state
        prompt = logits.shape[1]
        return self._write(state, text[:, :prompt], logits, jnp.arange(prompt) < length[:, None] - 1)

    def _write(self, state, tokens: Int[Array, "batch nodes"], logits, read: Bool[Array, "batch nodes"]):
        """M[token] = the k likeliest tokens after each node that was read. Of nodes with the same token, the last one
        counts: that with the highest row, and in it the highest number. So the order of writes does not matter."""
        top = jax.lax.top_k(logits, self.k)[1].astype(state.dtype)
        if self.shared:
            return _write_last(state, tokens.reshape(-1), top.reshape(-1, self.k), read.reshape(-1))
        return jax.vmap(_write_last)(state, tokens, top, read)

    def _check(self, state: Array, batch: int, vocab: int) -> None:
        shape = (vocab, self.k) if self.shared else (batch, vocab, self.k)
        if state.shape != shape:
            raise ValueError(
                f"the matrix of successors is of shape {state.shape}; for k = {self.k} and the model's vocabulary of "
                f"{vocab} it must be {shape}: give one that was made with this model."
            )

    def save(self, path: str | Path, state: Int[Array, "vocab k"], tokenizer: str = "") -> Path:
        """Writes the matrix to a safetensors file, in place of an earlier one.

        Args:
          tokenizer: something by which the tokenizer is known again, such as its name; `load` compares it.

        Raises:
          ValueError: each row has a matrix of its own, which says nothing about other prompts; or the name does not end
            in .safetensors.
        """
        if state.ndim != 2:
            raise ValueError("each row has a matrix of its own; only a shared one can be saved.")
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path} must end in .safetensors.")
        facts = {"kind": KIND, "vocab_size": str(state.shape[0]), "k": str(state.shape[1]), "tokenizer": tokenizer}
        return write_weights(path, {"adjacency": np.asarray(state, np.int32)}, facts, replace=True)

    def load(self, path: str | Path, vocab: int, tokenizer: str = "") -> Int[Array, "vocab k"]:
        """The matrix in a file that `save` wrote, for a model of `vocab` tokens.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it holds something else, or the matrix of another vocabulary, tokenizer or k.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a file that was saved with a matrix of successors.")
        with open_safetensors(path) as file:
            found = file.metadata() or {}
            if found.get("kind") != KIND or "adjacency" not in file.keys():  # noqa: SIM118
                raise ValueError(f"{path} holds {found.get('kind', 'no kind')!r}, not the matrix of {KIND}.")
            matrix = np.asarray(file.get_tensor("adjacency"))
        for name, ours, theirs in (
            ("vocabulary size", vocab, matrix.shape[0]),
            ("k", self.k, matrix.shape[-1]),
            ("tokenizer", tokenizer, found.get("tokenizer", "")),
        ):
            if ours != theirs:
                raise ValueError(f"{path} is of the {name} {theirs!r}, but {ours!r} is asked for.")
        if matrix.min() < 0 or matrix.max() >= vocab:
            raise ValueError(f"{path} is damaged: it has ids outside of 0 to {vocab - 1}.")
        return jnp.asarray(matrix, jnp.int32)


def _write_last(
    matrix: Int[Array, "vocab k"], tokens: Int[Array, " nodes"], top: Int[Array, "nodes k"], read: Bool[Array, " nodes"]
) -> Int[Array, "vocab k"]:
    """The matrix after writing the rows `top` of the nodes that were read; of the same token, that of the last node."""
    vocab, number = matrix.shape[0], jnp.arange(tokens.shape[0])
    last = jnp.full(vocab, -1).at[jnp.where(read, tokens, vocab)].max(number, mode="drop")
    kept = read & (last[tokens] == number)
    return matrix.at[jnp.where(kept, tokens, vocab)].set(top, mode="drop")
