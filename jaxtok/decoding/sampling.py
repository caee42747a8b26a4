"""Sampling: greedy, temperature, top-k and top-p (nucleus). Each option means the same for every model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxtok.decoding.protocols import Chooser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The restrictions apply in this order: temperature, top_k, top_p.

    It is a `jaxtok.decoding.protocols.Chooser` without a state.

    >>> import jax.numpy as jnp
    >>> Sampling(top_k=2).restrict(jnp.array([1.0, 3.0, 2.0, 0.0])).tolist()
    [-inf, 0.0, -1.0, -inf]
    """

    temperature: float = 1.0
    """Logits are divided by it; 0: the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens; of equal ones, those with the lower ids. 0: all."""
    top_p: float = 1.0
    """Only the smallest set of most likely tokens whose probability is at least p (arXiv 1904.09751); 1: all."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive, or 0 for greedy decoding.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be positive, or 0 for no limit.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")

    def restrict(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        """The logits, in float32, from whose softmax a token is drawn: at most 0, minus infinity for excluded tokens.

        At temperature 0, only the most likely token is left.
        """
        logits = logits.astype(jnp.float32)
        vocab = logits.shape[-1]
        if self.temperature == 0:
            greedy = jnp.arange(vocab) == logits.argmax(-1, keepdims=True)
            return jnp.where(greedy, 0.0, -jnp.inf)
        # With the largest logit at 0, a tiny temperature sends the others to minus infinity and nothing to NaN.
        logits = (logits - logits.max(-1, keepdims=True)) / self.temperature
        if not 0 < self.top_k < vocab and self.top_p == 1:
            return logits
        kept, ids = jax.lax.top_k(logits, min(self.top_k or vocab, vocab))
        if self.top_p < 1:
            probability = jax.nn.softmax(kept)
            more_likely = jnp.cumsum(probability, -1) - probability
            kept = jnp.where((more_likely < self.top_p).at[..., 0].set(True), kept, -jnp.inf)
        return jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, kept, -1, inplace=False)

    @property
    def draws(self) -> bool:
        return self.temperature > 0

    def init(self, batch: int) -> tuple[()]:
        return ()

    def choose(
        self, logits: Float[Array, "batch *parts vocab"], keys: Key[Array, " batch"], state: Any = ()
    ) -> tuple[Int[Array, "batch ..."], Any]:
        """A token for each row, drawn with the row's key; the parts of a token are drawn independently."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32), state
        drawn = jax.vmap(jax.random.categorical)(keys, self.restrict(logits))
        return drawn.astype(jnp.int32), state


def sampling_key(rng: jax.Array | None, chooser: Chooser) -> jax.Array:
    """The key, or a constant one if it is None and not needed.

    Raises:
      ValueError: the key is None, and the chooser draws.
    """
    if rng is None and chooser.draws:
        raise ValueError("rng is None; give a key such as jax.random.key(0), or decode with temperature 0.")
    return jax.random.key(0) if rng is None else rng


def row_keys(rng: jax.Array, rows: int) -> Key[Array, " rows"]:
    """The key of each row: `rng` folded with the row's number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))


def token_keys(keys: Key[Array, " rows"], number: Int[Array, " rows"] | int) -> Key[Array, " rows"]:
    """The key of each row's new token with this number: the row's key folded with the number."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))


def sample(
    logits: Float[Array, "batch vocab"], rng: jax.Array | None, sampling: Sampling = Sampling()
) -> Int[Array, " batch"]:
    """One token for each row. Each row has a key of its own, so rows do not depend on each other.

    It is the first new token that generation with `rng` draws. `rng` is not used (and may be None) at temperature 0.

    >>> import jax, jax.numpy as jnp
    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), None, Sampling(temperature=0)).tolist()
    [1]
    """
    keys = row_keys(sampling_key(rng, sampling), len(logits))
    return sampling.choose(logits, token_keys(keys, 0))[0]
