"""The waists of decoding: the model that is decoded, and the three things that can be combined with it.

All four are hashable (frozen dataclasses, Linen modules): they hold options, and their arrays are in explicit states,
pytrees of static shapes that are parts of `jaxtok.decoding.engine.State`. Axes: batch, room (the most tokens of a
text), nodes (of a draft), parts (of a token that has several, such as sub-codes; usually there is no such axis), vocab.
"""

from __future__ import annotations

import abc
from typing import Any, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.protocols import CausalLM, Params


class TokenModel(Protocol):
    """What the engine decodes, in its smallest form: one step from a token to logits and a new state.

    A `jaxtok.protocols.CausalLM` need not implement this: `jaxtok.decoding.CachedTokens` does it for any of them. Other
    models (words and then bytes, an encoder-decoder, images) define here what a step is, and the engine does the rest.
    """

    def step(
        self, params: Params, tokens: Int[Array, "batch ..."], state: Any, live: Bool[Array, " batch"]
    ) -> tuple[Float[Array, "batch *parts vocab"], Any, Bool[Array, " batch"]]:
        """Reads each row's newest token and gives the logits of the next one.

        Args:
          params: the parameters.
          tokens: the newest token of each row, which the state has not seen.
          state: any pytree whose shapes stay the same.
          live: the rows that still generate. The results of the others are not used, and their states may change.

        Returns:
          The logits in float32, the new state, and which rows have logits. A row that waits for others (say, until all
          have ended their words) has none: it chooses no token in this step and gets the same token again in the next.
        """
        ...


@runtime_checkable
class Prompted(Protocol):
    """A `CausalLM` whose layers depend on where a row's prompt ends."""

    def prompted(self, cache: Any, prompts: Int[Array, " batch"], new: int = 0) -> Any:
        """The cache of rows whose prompts have these lengths; `new` tokens are to follow them."""
        ...


class Chooser(Protocol):
    """Maps logits and its own state to tokens: `jaxtok.decoding.Sampling`, a constraint, or a recorded text."""

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, so that a key is needed."""
        ...

    def init(self, batch: int) -> Any:
        """The chooser's state before the first token: arrays whose first axis is the batch."""
        ...

    def choose(
        self, logits: Float[Array, "batch *parts vocab"], keys: Key[Array, " batch"], state: Any
    ) -> tuple[Int[Array, "batch ..."], Any]:
        """A token for each row, and the state after it.

        A row's token must depend only on the row's own logits, key and state. The engine keeps the results of exactly
        one call for every token that a row gets, in their order, with or without drafts, so a state can count tokens;
        for rows that get no token, both results are thrown away.
        """
        ...


@flax.struct.dataclass
class Verified:
    """The outcome of a draft, for `Drafts.observe`. In a `Union`, each drafter gets the tree of all of them."""

    tokens: Int[Array, "batch nodes"]
    """The tokens as they were proposed; node 0 is the newest token of the row."""
    parents: Int[Array, "batch nodes"]
    logits: Float[Array, "batch nodes vocab"]
    """The model's own logits after each node; those of absent nodes (parent -1) mean nothing."""
    path: Int[Array, "batch nodes"]
    """The accepted nodes in their order, node 0 first; entries from `count` on mean nothing."""
    count: Int[Array, " batch"]
    """How many tokens the row got: one after each node of the path. 0: the row had stopped."""
    chosen: Int[Array, "batch nodes"]
    """The tokens that the row got; entries from `count` on mean nothing."""
    live: Bool[Array, " batch"] | None = None
    """Whether a row goes on, so that it will get another draft."""


class Drafts(abc.ABC):
    """What a `Drafter` and a `SelfDrafter` have in common. By default, there is no state.

    Drafts change the speed and never the output, whatever is proposed (`jaxtok.decoding.engine`). An auxiliary model's
    parameters, a table of successors and the like are in the state, which can be kept for the next generation.
    """

    nodes: int
    """The number of nodes of a tree, its root included. It is static."""
    chain: bool
    """Whether the parent of each node is always the one before it (or none), for models that take no trees."""

    def init(self, batch: int, room: int, vocab: int) -> Any:
        """A new state, for texts of at most `room` tokens, prompts included."""
        return ()

    def begin(
        self,
        state: Any,
        text: Int[Array, "batch room"],
        length: Int[Array, " batch"],
        logits: Float[Array, "batch prompt vocab"],
    ) -> Any:
        """The state at the beginning of a generation, from a new one, or from one that was kept.

        Args:
          text, length: the prompts, as in `propose`.
          logits: the model's own after each token of a prompt except its last one (the others mean nothing). Its head
            runs on the prompt only if they are used.
        """
        return state

    def observe(self, state: Any, verified: Verified) -> Any:
        """The state after a step."""
        return state


class Drafter(Drafts):
    """Proposes a tree of tokens that may follow; the model then verifies all of them in one step.

    A drafter is a frozen dataclass with this base.
    """

    @abc.abstractmethod
    def propose(
        self, state: Any, text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        """The tree's tokens, and the number of each node's parent, which is lower than the node's own; -1: the node is
        absent. The entries of node 0, the root, are not read: it is the newest token of the row, text[length - 1]."""


class SelfDrafter(Drafts):
    """Runs the model's own first layers, so that the engine verifies a draft by the others alone.

    Its drafts are chains of `nodes` tokens, the row's newest one included.
    """

    chain = True
    layers: int
    """How many layers `draft` runs, at least 1 and not all."""

    @abc.abstractmethod
    def draft(
        self,
        model: CausalLM,
        params: Params,
        state: Any,
        newest: Int[Array, " batch"],
        cache: Any,
        positions: Int[Array, "batch nodes"],
    ) -> tuple[Int[Array, "batch nodes"], Float[Array, "batch nodes d_model"], Any]:
        """Drafts what follows the newest token of each row, which the cache has not seen.

        Args:
          positions: those of the chain's tokens.

        Returns:
          The chain's tokens, the newest one first; their hidden states after the first `layers` layers; and the cache
          with these tokens appended, as `model.hidden(..., layers=(0, layers))` appends them.
        """


class Evictor(Protocol):
    """Decides which slots of the cache stay, so that its size does not grow with the text."""

    slots: int
    """The most slots that stay in each row (in each layer, or in each of its heads)."""
    every: int
    """How many more slots a row may fill before it is evicted from. A draft is accepted only up to that boundary, which
    makes the output with drafts equal to the output without."""
    observes: bool
    """Whether the evictor needs `observe`."""

    def fit(self, model: CausalLM, prompt: int, new: int) -> Evictor:
        """The evictor for a model, prompts of at most `prompt` tokens (padding included) and `new` new ones a row.

        `generate` calls it; an `Engine` takes an evictor that is fitted already, where that is needed.
        """
        ...

    def init(self, cache: Any) -> Any:
        """The evictor's state before it has observed anything; arrays that belong to slots have the cache's axis of
        slots. `cache.length` is that of each row's prompt without its last token."""
        ...

    def budget_of(self, state: Any) -> Int[Array, " batch"] | int:
        """The slots that stay in each row: `slots`, or fewer in some rows."""
        ...

    def observe(
        self, state: Any, cache: Any, sown: Any, path: Int[Array, "batch new"], count: Int[Array, " batch"]
    ) -> Any:
        """The evictor's state after a step of the model, or after the prompt.

        Args:
          cache: the cache with the new tokens appended.
          sown: the model's `intermediates`: the queries and keys of each layer, [layers, batch, new, heads, head_dim]
            (as `SelfAttention` sows them).
          path, count: which of these new tokens are in the cache now: the first `count` of `path`, in the last `count`
            slots that are in use.
        """
        ...

    def evict(self, state: Any, cache: Any, rows: Bool[Array, " batch"], size: int) -> tuple[Any, Any]:
        """The cache with `size` slots, of which at most the budget is in use in the chosen rows, and the state that
        belongs to it. In the other rows all slots that are in use stay. See `KVCache.gather`."""
        ...
