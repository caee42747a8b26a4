"""Drafts what followed the longest suffix of the text that also occurs earlier in it (arXiv 2411.10666).

A suffix automaton finds this suffix, of any length, in amortised constant time a token, but its states are linked lists
and tables that grow with the text. Here the same suffix is found by comparing all places of the text at once, one more
token back in each round, until none of them matches: at most room times its length comparisons a step, in static
shapes, all rows at once. There is no state.

Unlike `PromptLookup`, n-grams have no longest length, and a copy that reaches the end of the text goes on with what it
has copied (as in LZ77), so that a text that repeats itself with a short period still gets a whole draft. Several
copies, of which each begins with another token, make a tree.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxtok.decoding.protocols import Drafter


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuffixAutomaton(Drafter):
    """A drafter without a state: it needs only the text.

    >>> import jax.numpy as jnp
    >>> text = jnp.array([[5, 6, 7, 8, 9, 6, 7, 0], [1, 2, 2, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]])
    >>> tokens, parents = SuffixAutomaton(tokens=4).propose((), text, jnp.array([7, 3, 3]))
    >>> tokens[:, 1:].tolist()[:2], parents.tolist()[1:]
    ([[8, 9, 6, 7], [2, 2, 2, 2]], [[-1, 0, 1, 2, 3], [-1, -1, -1, -1, -1]])
    >>> text = jnp.array([[5, 6, 8, 6, 7, 6]])
    >>> tokens, parents = SuffixAutomaton(tokens=2, matches=2).propose((), text, jnp.array([6]))
    >>> tokens[0, 1:].tolist(), parents[0].tolist()
    ([7, 6, 8, 6], [-1, 0, 1, 0, 3])
    """

    tokens: int = 10
    """The number of tokens of a copy."""
    matches: int = 1
    """The number of copies. Each begins with another token: what followed the longest suffix of which this is true."""

    def __post_init__(self):
        for field in ("tokens", "matches"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")

    @property
    def nodes(self) -> int:
        return 1 + self.matches * self.tokens

    @property
    def chain(self) -> bool:
        return self.matches == 1

    def propose(
        self, state: tuple[()], text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        rows, length = jnp.arange(text.shape[0])[:, None], length[:, None]
        matched = suffix_matches(text, length)
        tokens, parents = [text[rows, length - 1]], [jnp.full(length.shape, -1)]
        for copy in range(self.matches):
            best = matched.max(1, keepdims=True)
            latest = jnp.argmax(matched[:, ::-1] == best, 1, keepdims=True)  # of the longest
            last = text.shape[1] - 1 - latest
            copied = last + jnp.arange(self.tokens) % jnp.maximum(length - last, 1)
            first = copy * self.tokens
            above = jnp.arange(first, first + self.tokens).at[0].set(0)
            tokens.append(text[rows, copied])
            parents.append(jnp.where(best > 0, above, -1))
            matched = jnp.where(text == text[rows, last], 0, matched)
        return jnp.concatenate(tokens, 1), jnp.concatenate(parents, 1)


def suffix_matches(text: Int[Array, "batch room"], length: Int[Array, "batch 1"]) -> Int[Array, "batch room"]:
    """How many tokens before each place are equal to the last ones of the text; 0 where nothing is after the place.

    >>> import jax.numpy as jnp
    >>> suffix_matches(jnp.array([[1, 2, 3, 1, 2, 0]]), jnp.array([[5]])).tolist()
    [[0, 0, 2, 0, 0, 0]]
    """
    rows, place = jnp.arange(text.shape[0])[:, None], jnp.arange(text.shape[1])

    def longer(carry):
        back, same, matched = carry
        same &= (place >= back) & (jnp.roll(text, back, 1) == text[rows, length - back])
        return back + 1, same, matched + same

    some = (place > 0) & (place < length)
    carry = jnp.int32(1), some, jnp.zeros(text.shape, jnp.int32)
    return jax.lax.while_loop(lambda carry: carry[1].any(), longer, carry)[2]
