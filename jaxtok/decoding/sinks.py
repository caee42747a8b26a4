"""Attention sinks (StreamingLLM, arXiv 2309.17453): the first tokens and the last ones stay in the cache.

Unlike the paper's, keys keep the positions of their tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxtok.decoding.protocols import keep_slots
from jaxtok.protocols import CausalLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinksAndRecent:
    """A `jaxtok.decoding.protocols.Evictor` without a state: the first `sinks` and the last `recent` tokens stay.

    >>> import jax.numpy as jnp
    >>> from jaxtok.nn.cache import KVCache
    >>> cache = KVCache.init(1, 1, 8, 1, 2).advance(jnp.arange(7)[None])
    >>> evictor = SinksAndRecent(sinks=1, recent=3, every=2)
    >>> cache, _ = evictor.evict((), cache, jnp.array([True]), size=6)
    >>> cache.positions[0, 0, :, 0].tolist()
    [0, 4, 5, 6, -1, -1]
    """

    sinks: int = 4
    recent: int = 252
    every: int = 16
    """The number of tokens between two evictions."""

    observes = False

    def __post_init__(self):
        for field, low in (("sinks", 0), ("recent", 1), ("every", 1)):
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {low}.")

    @property
    def slots(self) -> int:
        return self.sinks + self.recent

    def fit(self, model: CausalLM, prompt: int, new: int) -> SinksAndRecent:
        return self

    def init(self, cache: Any) -> tuple[()]:
        return ()

    def budget_of(self, state: tuple[()]) -> int:
        return self.slots

    def observe(self, state, cache, sown, path, count) -> tuple[()]:
        return ()

    def evict(self, state: tuple[()], cache: Any, rows: Bool[Array, " batch"], size: int) -> tuple[Any, tuple[()]]:
        number = jnp.arange(self.slots)
        index = jnp.where(number < self.sinks, number, number - self.slots + cache.length[:, None])
        return cache.gather(*keep_slots(index, rows, cache.length, size)), ()
