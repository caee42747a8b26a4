"""Drafts what followed the longest suffix of the text that also occurs earlier in it (arXiv 2411.10666).

A suffix automaton finds this suffix, of any length, in amortised constant time a token, but its states are linked lists
and tables that grow with the text. Here the same suffix is found by comparing all places of the text at once, one more
token back in each round, until none of them matches: at most room times its length comparisons a step, in static
shapes, all rows at once. There is no state.

Unlike `PromptLookup`, n-grams have no longest length, and a copy that reaches the end of the text goes on with what it
has copied (as in LZ77), so that a text that repeats itself with a short period still gets a whole draft.
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
    """

    tokens: int = 10
    """The number of tokens of a draft."""

    chain = True

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1.")

    @property
    def nodes(self) -> int:
        return 1 + self.tokens

    def propose(
        self, state: tuple[()], text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        rows, length = jnp.arange(text.shape[0])[:, None], length[:, None]
        matched = suffix_matches(text, length)
        best = matched.max(1, keepdims=True)
        last = text.shape[1] - 1 - jnp.argmax(matched[:, ::-1] == best, 1, keepdims=True)  # the latest of the longest
        copied = last + jnp.arange(self.tokens) % jnp.maximum(length - last, 1)
        tokens = jnp.concatenate([text[rows, length - 1], text[rows, copied]], 1)
        return tokens, jnp.where(best > 0, jnp.arange(-1, self.tokens), -1)


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
