"""Images inside a generated text: `<img>`, then exactly so many codes, then `</img>`, as SEED-LLaMA's images are.

The grammar is a mask on the logits that a counter in each row's state chooses, so it costs no call to the host.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxtok.decoding.sampling import Sampling

_BEGIN, _END = -2, -1
"""States in which only `<img>`, or only `</img>`, may follow; others: how many codes are still to come."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGrammar:
    """A `jaxtok.decoding.protocols.Chooser` whose texts have whole images only.

    >>> import jax, jax.numpy as jnp
    >>> grammar = ImageGrammar(begin=8, end=9, first=4, codes=4, length=2, chooser=Sampling(temperature=0), at="begin")
    >>> state, row = grammar.init(1), []
    >>> for _ in range(5):
    ...     token, state = grammar.choose(jnp.arange(10.0)[None], jax.random.split(jax.random.key(0), 1), state)
    ...     row.append(int(token[0]))
    >>> row
    [8, 7, 7, 9, 8]
    """

    begin: int
    """The id of `<img>`."""
    end: int
    """The id of `</img>`."""
    first: int
    """The id of the first code."""
    codes: int
    """How many codes there are."""
    length: int = 32
    """The codes of an image."""
    chooser: Any = Sampling()
    """What chooses among the tokens that may follow; SEED's demos have `Sampling(top_p=0.5)`."""
    at: Literal["text", "begin", "inside"] = "text"
    """Where a prompt ends: in text, where an image has to begin, or after `<img>`."""
    images: bool = True
    """Whether text may go on with an image."""

    def __post_init__(self):
        if self.length < 1 or self.codes < 1:
            raise ValueError(f"length is {self.length} and codes {self.codes}; both must be at least 1.")
        for field in ("begin", "end"):
            if self.first <= (value := getattr(self, field)) < self.first + self.codes or value < 0:
                raise ValueError(f"{field} is {value}; it must be an id that is no code's.")
        if self.begin == self.end:
            raise ValueError(f"begin and end are both {self.begin}; they must be two ids.")
        if self.at not in ("text", "begin", "inside"):
            raise ValueError(f"at is {self.at!r}; it must be text, begin or inside.")

    @property
    def draws(self) -> bool:
        return self.chooser.draws

    def init(self, batch: int) -> tuple[Int[Array, " batch"], Any]:
        start = {"text": 0, "begin": _BEGIN, "inside": self.length}[self.at]
        return jnp.full(batch, start, jnp.int32), self.chooser.init(batch)

    def choose(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], state: Any
    ) -> tuple[Int[Array, " batch"], Any]:
        """A token that may follow for each row, and the state after it.

        Raises:
          ValueError: the model has no such ids.
        """
        vocab = logits.shape[-1]
        if max(self.begin, self.end, self.first + self.codes - 1) >= vocab:
            raise ValueError(f"the model has {vocab} ids, fewer than the image tokens need; give its own tokenizer's.")
        left, inner = state
        ids = jnp.arange(vocab)
        is_code = (ids >= self.first) & (ids < self.first + self.codes)
        text = ~is_code & (ids != self.end)
        if not self.images:
            text &= ids != self.begin
        at = left[:, None]
        allowed = jnp.select([at > 0, at == _END, at == _BEGIN], [is_code, ids == self.end, ids == self.begin], text)
        tokens, inner = self.chooser.choose(jnp.where(allowed, logits, -jnp.inf), keys, inner)
        begun = jnp.where(tokens == self.begin, self.length, 0)
        after = jnp.select([left > 1, left == 1, left == _END], [left - 1, jnp.full_like(left, _END), 0 * left], begun)
        return tokens, (after, inner)
