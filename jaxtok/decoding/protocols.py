"""The waists of decoding: what is decoded, and the three things that can be combined with it.

All four are hashable (frozen dataclasses, Linen modules): they hold options, and their arrays are in explicit states,
pytrees of static shapes that `jaxtok.decoding.engine.State` has as its parts. Axes: batch, room (places of a text),
nodes (of a draft), parts (of a token that has several, such as sub-codes; usually there is no such axis), vocab.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.protocols import Params


class TokenModel(Protocol):
    """What the engine decodes, in its smallest form: one step from a token to logits and a new state.

    A `jaxtok.protocols.CausalLM` need not have this: the engine makes one of it. Others (words and then bytes, an
    encoder-decoder, images) say here what a step is, and the engine does the rest.
    """

    def step(
        self, params: Params, tokens: Int[Array, "batch ..."], state: Any, live: Bool[Array, " batch"]
    ) -> tuple[Float[Array, "batch *parts vocab"], Any, Bool[Array, " batch"]]:
        """Reads each row's newest token and gives the logits of the next one.

        Args:
          params: the parameters.
          tokens: the newest token of each row, which the state has not seen.
          state: of any structure, with shapes that stay.
          live: the rows that still generate. Those of the others are of no use, and their state may stay or change.

        Returns:
          The logits in float32, the new state, and in which rows there are any: a row that waits for others (until all
          have ended their words, say) chooses no token in this step and gets the same token again in the next one.
        """
        ...


class Chooser(Protocol):
    """Logits and its own state to tokens. `jaxtok.decoding.Sampling` is one; so is a constraint, or a recorded text."""

    def init(self, batch: int) -> Any:
        """Its state before the first token: arrays with the axis batch first."""
        ...

    def choose(
        self, logits: Float[Array, "batch *parts vocab"], keys: Key[Array, " batch"], state: Any
    ) -> tuple[Int[Array, "batch ..."], Any]:
        """A token for each row, and the state after it.

        A row's token must depend on its own logits, key and state only. It is called once for every token that a row
        gets, in their order, whether there are drafts or not, so what it counts is true; of rows that get none, both
        results are thrown away.
        """
        ...


@flax.struct.dataclass
class Verified:
    """What came of a draft, for `Drafter.observe`."""

    tokens: Int[Array, "batch nodes"]
    """As they were proposed; node 0 is the newest token of the row."""
    parents: Int[Array, "batch nodes"]
    logits: Float[Array, "batch nodes vocab"]
    """The model's own, after each node; of nodes that are none, of no use."""
    path: Int[Array, "batch nodes"]
    """The accepted nodes in their order, node 0 first; from `count` on of no use."""
    count: Int[Array, " batch"]
    """How many tokens the row got: one after each node of the path. 0: the row had stopped."""
    chosen: Int[Array, "batch nodes"]
    """These tokens; from `count` on of no use."""


class Drafter(Protocol):
    """Proposes a tree of tokens that may follow, of which the model then verifies all in one step.

    Drafts change the speed and never the output, whatever is proposed (`jaxtok.decoding.engine`). An auxiliary model's
    parameters, a table of successors and the like are in the state, which can be kept for the next generation.
    """

    nodes: int
    """Of a tree, its root included: static."""
    chain: bool
    """Whether the parent of each node is the one before it (or none), for models that take no trees."""

    def init(self, batch: int, room: int, vocab: int) -> Any:
        """Its state before the first step, for texts of at most `room` tokens, prompts included."""
        ...

    def propose(
        self, state: Any, text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        """The tree's tokens, and the number of each node's parent, which is lower than its own; -1: there is no such
        node. What it says of node 0, the root, is not read: that is the newest token of the row, text[length - 1]."""
        ...

    def observe(self, state: Any, verified: Verified) -> Any:
        """Its state after a step."""
        ...


class Evictor(Protocol):
    """Decides which slots of the cache stay, so that it is of the same size however long the text is."""

    slots: int
    """At most so many stay in each row (in each layer, or in each of its heads)."""
    every: int
    """A row is evicted from when it has so many more. So the cache is `slots + every` large, and a draft is accepted up
    to this boundary, which makes the output with drafts equal to that without."""
    observes: bool
    """Whether it needs `observe`."""

    def init(self, cache: Any) -> Any:
        """Its state for an empty cache: what it keeps for slots has the axis that those have in the cache."""
        ...

    def observe(
        self, state: Any, cache: Any, sown: Any, path: Int[Array, "batch new"], count: Int[Array, " batch"]
    ) -> Any:
        """Its state after a step of the model, or after the prompt.

        Args:
          cache: with the new tokens appended.
          sown: the model's `intermediates`: the queries and keys of each layer, [layers, batch, new, heads, head_dim]
            (as `SelfAttention` sows them).
          path, count: which of these new tokens are in the cache now: the first `count` of `path`, in the last `count`
            slots that are in use.
        """
        ...

    def evict(self, state: Any, cache: Any, rows: Bool[Array, " batch"], size: int) -> tuple[Any, Any]:
        """The cache with `size` slots, of which at most `slots` are in use in these rows; and the state that belongs to
        it. In the other rows all slots that are in use stay. See `KVCache.gather`."""
        ...


def keep_slots(
    index: Int[Array, " *leading kept"], rows: Bool[Array, " batch"], length: Int[Array, " batch"], size: int
) -> tuple[Int[Array, " *leading kept"], Int[Array, " batch"]]:
    """What `KVCache.gather` takes, to keep the slots `index` in these rows, and in others all that are in use.

    Args:
      index: [batch, kept], [layers, batch, kept] or [layers, batch, heads, kept].
      length: slots that are in use.
      size: slots of the new cache, of which the last ones are empty.

    Returns:
      The index with `size` slots, and how many of each row count.
    """
    kept = index.shape[-1]
    padded = jnp.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, size - kept)])
    shape = [1] * index.ndim
    shape[0 if index.ndim == 2 else 1] = len(rows)
    index = jnp.where(rows.reshape(shape), padded, jnp.arange(size))
    return index, jnp.where(rows, kept, length)
