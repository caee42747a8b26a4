"""Several drafters in one tree, under one budget of nodes: what one of them misses, another one may have.

Nodes with the same token below the same parent are one node, whoever proposed it. Drafters come in order of priority:
the budget goes to the nodes of the first one, then to what the second one has beyond these, and so on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.decoding.protocols import Drafter, Verified


@dataclasses.dataclass(frozen=True)
class Union(Drafter):
    """A `jaxtok.decoding.protocols.Drafter`, whose state is the tuple of the drafters' states.

    A state of None in the tuple is made anew, as that of a drafter which begins cold beside one with a state of its
    own. Every drafter observes the whole tree that was verified, so that a table of successors learns from all of it.

    >>> import jax.numpy as jnp
    >>> from jaxtok.decoding import PromptLookup, SuffixAutomaton
    >>> union = Union((PromptLookup(longest=1, tokens=2, take="first"), SuffixAutomaton(tokens=3)), budget=5)
    >>> tokens, parents = union.propose(((), ()), jnp.array([[6, 7, 1, 6, 8, 6, 7, 2, 6, 7]]), jnp.array([9]))
    >>> tokens.tolist(), parents.tolist()
    ([[6, 7, 1, 2, 6]], [[-1, 0, 1, 1, 3]])
    """

    drafters: tuple[Drafter, ...]
    """In order of priority."""
    budget: int = 0
    """The most nodes of the tree, the root included; 0: enough for all."""

    chain = False

    def __post_init__(self):
        if not self.drafters:
            raise ValueError("drafters is empty; a union has at least one.")
        if other := [drafter for drafter in self.drafters if not isinstance(drafter, Drafter)]:
            raise ValueError(
                f"drafters has {other[0]}, which proposes no tree from the text; leave it out of the union."
            )
        if self.budget < 0:
            raise ValueError(f"budget is {self.budget}; it must be at least 1, or 0 for all nodes.")

    @property
    def nodes(self) -> int:
        every = 1 + sum(drafter.nodes - 1 for drafter in self.drafters)
        return min(self.budget or every, every)

    def init(self, batch: int, room: int, vocab: int) -> tuple[Any, ...]:
        return tuple(drafter.init(batch, room, vocab) for drafter in self.drafters)

    def begin(
        self,
        state: tuple[Any, ...],
        text: Int[Array, "batch room"],
        length: Int[Array, " batch"],
        logits: Float[Array, "batch prompt vocab"],
    ) -> tuple[Any, ...]:
        if not isinstance(state, tuple) or len(state) != len(self.drafters):
            raise ValueError(f"the state of a union of {len(self.drafters)} drafters is a tuple of as many states.")
        states = []
        for drafter, own in zip(self.drafters, state):
            own = drafter.init(*text.shape, logits.shape[-1]) if own is None else own
            states.append(drafter.begin(own, text, length, logits))
        return tuple(states)

    def propose(
        self, state: tuple[Any, ...], text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        batch = text.shape[0]
        all_tokens = [text[jnp.arange(batch), length - 1][:, None]]
        all_parents, before = [jnp.full((batch, 1), -1, jnp.int32)], 0
        for drafter, own in zip(self.drafters, state):
            tokens, parents = drafter.propose(own, text, length)
            all_tokens.append(tokens[:, 1:])
            all_parents.append(jnp.where(parents > 0, parents + before, parents)[:, 1:])
            before += drafter.nodes - 1
        return merge(jnp.concatenate(all_tokens, 1), jnp.concatenate(all_parents, 1), self.nodes)

    def observe(self, state: tuple[Any, ...], verified: Verified) -> tuple[Any, ...]:
        return tuple(drafter.observe(own, verified) for drafter, own in zip(self.drafters, state))


def merge(
    tokens: Int[Array, "batch nodes"], parents: Int[Array, "batch nodes"], size: int
) -> tuple[Int[Array, "batch size"], Int[Array, "batch size"]]:
    """The first `size` nodes of trees in which nodes of the same tokens, up to the root, have become one.

    Args:
      parents: as `Drafter.propose` gives them: lower than the node's own number; -1: the node is absent, and so are
        those below it. Node 0 is the root.

    >>> import jax.numpy as jnp
    >>> merge(jnp.array([[9, 4, 5, 4, 6, 5, 7]]), jnp.array([[-1, 0, 1, 0, 3, -1, 5]]), 4)[1].tolist()
    [[-1, 0, 1, 1]]
    """
    batch, nodes = tokens.shape
    rows, number = jnp.arange(batch)[:, None], jnp.arange(nodes)
    there, root = (parents >= 0).at[:, 0].set(True), number == 0
    above = jnp.where(root, 0, jnp.maximum(parents, 0))
    # Two nodes are the same if their tokens are, and those 1, 2, 4, ... edges above them.
    same = (tokens[:, :, None] == tokens[:, None]) | (root[:, None] & root)
    same &= there[:, :, None] & there[:, None] & (root[:, None] == root)
    jump = above
    for _ in range((nodes - 1).bit_length()):
        same &= same[rows[..., None], jump[:, :, None], jump[:, None]]
        jump = jump[rows, jump]
    first = jnp.argmax(same, -1)
    kept = same[:, number, number] & (first == number)  # a node below an absent one is not the same as itself
    place = jnp.cumsum(kept, 1) - 1
    target = jnp.where(kept, place, size)
    new_parents = jnp.where(root, -1, place[rows, first[rows, above]])
    return (
        jnp.zeros((batch, size), tokens.dtype).at[rows, target].set(tokens, mode="drop"),
        jnp.full((batch, size), -1, jnp.int32).at[rows, target].set(new_parents.astype(jnp.int32), mode="drop"),
    )
