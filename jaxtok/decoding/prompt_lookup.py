"""Prompt lookup decoding (Saxena 2023): drafts what followed the last tokens when they occurred earlier in the text.

This drafter needs no model. It takes the longest n-gram, of at most `longest` tokens, that ends the text and also
occurs earlier in it; what follows it there is the draft, a chain. It helps if a text repeats itself or its prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxtok.decoding.protocols import Drafter


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """A drafter without a state: it needs only the text.

    >>> import jax.numpy as jnp
    >>> text = jnp.array([[5, 6, 7, 8, 9, 6, 7, 0, 0, 0]])
    >>> tokens, parents = PromptLookup(tokens=4).propose((), text, jnp.array([7]))
    >>> tokens[0, 1:].tolist(), parents[0].tolist()
    ([8, 9, 6, 7], [-1, 0, 1, 2, 3])
    """

    longest: int = 3
    """The most tokens of an n-gram; shorter ones are tried if it does not occur earlier."""
    tokens: int = 10
    """The most tokens of a draft."""
    take: Literal["last", "first"] = "last"
    """Which of several occurrences is taken: the last, or the first (as in transformers)."""
    ends: tuple[int, ...] = ()
    """A draft ends before the first of these tokens."""

    def __post_init__(self):
        for field in ("longest", "tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.take not in ("last", "first"):
            raise ValueError(f"take is {self.take!r}; it must be one of last, first.")

    chain = True

    @property
    def nodes(self) -> int:
        return 1 + self.tokens

    def propose(
        self, state: tuple[()], text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        return jax.vmap(self._propose)(text, length)

    def _propose(self, text: Int[Array, " room"], length: Int[Array, ""]):
        room = text.shape[0]
        begin = jnp.arange(room)  # where a continuation might begin
        same, matched = (begin > 0) & (begin < length), jnp.zeros(room, jnp.int32)
        for back in range(1, self.longest + 1):
            suffix = text[jnp.maximum(length - back, 0)]
            same &= (begin >= back) & (jnp.roll(text, back) == suffix)
            matched += same
        best = matched.max()
        first = jnp.where(matched == best, begin, -1 if self.take == "last" else room)
        first = first.max() if self.take == "last" else first.min()
        index = first + jnp.arange(self.tokens)
        draft = text[jnp.minimum(index, room - 1)]
        ended = jnp.cumsum(jnp.isin(draft, jnp.array(self.ends, jnp.int32))) > 0
        some = (best > 0) & (index < length) & ~ended
        tokens = jnp.concatenate([text[None, length - 1], draft])
        parents = jnp.where(jnp.concatenate([jnp.array([False]), some]), jnp.arange(-1, self.tokens), -1)
        return tokens, parents
