"""Keyformer (arXiv 2403.09054): the cache keeps the newest tokens and the key tokens, by attention under noise.

A token's score f is the sum of the weights that it gets from all queries, where the weights are a softmax of the scores
x with Gumbel noise and a temperature that rises while tokens are generated (algorithm 1):

    f_j += softmax_j((x_j + zeta_j) / tau_t),    tau_t = tau_init + t (tau_end - tau_init) / T

for the query of new token t = 1, ..., T; t = 0 for those of the prompt. Noise and temperature are for the scores only.
H2O (arXiv 2306.14048) is the same without noise and temperature.

This is the paper's algorithm. The authors' code masks instead of evicting, and no token after the prompt can become a
key token in it; tests/decoding/test_keyformer_parity.py has it as a reference.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.decoding.eviction import Scorer, Seen, masked_softmax, received
from jaxtok.nn.cache import KVCache

NOISES = ("per_step", "fixed", "gaussian", "constant", "none")
GUMBEL_MEAN, GUMBEL_STD = 0.5772, 1.2825


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyformer(Scorer):
    """The score of algorithm 1. A head of keys has the sum over the query heads that share it.

    The noise of a query is a function of the seed, the layer and the number of its token, so that drafts and other rows
    do not change it.

    >>> scorer = Keyformer(tau_end=3.0).fit(new=100)
    >>> scorer.tau(jnp.array([0, 50, 200])).tolist()
    [1.0, 2.0, 3.0]
    """

    tau_init: float = 1.0
    tau_end: float = 2.0
    noise: Literal["per_step", "fixed", "gaussian", "constant", "none"] = "per_step"
    """per_step: Gumbel, drawn for each query and key (the authors' code); fixed: once for each key; gaussian: as
    per_step, with Gumbel's mean and deviation; constant: Gumbel's mean, which changes nothing but rounding."""
    seed: int = 0
    steps: int | None = None
    """T, the new tokens after which the temperature is tau_end; None: as many as are to be generated (`fit`)."""

    def __post_init__(self):
        for field in ("tau_init", "tau_end"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}; it must be one of {', '.join(NOISES)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1, or None.")

    @property
    def original_only(self) -> bool:
        return self.noise == "fixed"  # its noise is that of a position

    def fit(self, new: int) -> Keyformer:
        return self if self.steps else dataclasses.replace(self, steps=new)

    def tau(self, step: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The temperature of queries: `tau_init` up to step 0, `tau_end` from step T on."""
        if self.tau_init == self.tau_end:
            return jnp.full(step.shape, self.tau_init, jnp.float32)
        if self.steps is None:
            raise ValueError("steps is None; the temperature needs the number of new tokens: give it, or call fit.")
        return self.tau_init + jnp.clip(step / self.steps, 0, 1) * (self.tau_end - self.tau_init)

    def init(self, cache: KVCache, config: Any) -> tuple[Array, tuple[()]]:
        layers, batch, slots, heads, _ = cache.keys.shape
        return jnp.zeros((layers, batch, heads, slots), jnp.float32), ()

    def observe(self, scores: Array, memory: tuple[()], seen: Seen) -> tuple[Array, tuple[()]]:
        def of_layer(inputs):
            layer, queries, scores = inputs

            def weigh(x, visible, number):
                tau = self.tau(number - seen.start[:, None])[:, None, None, :, None]
                return masked_softmax((x + self.drawn(layer, number, seen.cache, x.shape)) / tau, visible)

            return scores + received(seen, layer, queries, weigh)

        return jax.lax.map(of_layer, (jnp.arange(len(scores)), seen.queries, scores)), memory

    def drawn(
        self, layer: Int[Array, ""], number: Int[Array, "batch new"], cache: KVCache, shape: tuple[int, ...]
    ) -> Float[Array, "#batch #kv_heads #group #new #slots"]:
        """The noise zeta on the scores of the queries with these numbers; `shape` is that of the scores."""
        if self.noise in ("none", "constant"):
            return jnp.full((1,) * 5, GUMBEL_MEAN if self.noise == "constant" else 0.0)
        _, heads, group, _, slots = shape
        key = jax.random.fold_in(jax.random.key(self.seed), layer)
        if self.noise == "fixed":
            positions = cache.positions[layer if cache.positions.shape[0] > 1 else 0]
            positions = jnp.broadcast_to(positions, (*positions.shape[:2], heads))

            def of_key(position, head):
                return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, position), head), (group,))

            zeta = jax.vmap(jax.vmap(jax.vmap(of_key), (0, None)), (0, None))(positions, jnp.arange(heads))
            return jnp.moveaxis(zeta, 1, 3)[:, :, :, None]  # [batch, heads, group, 1, slots]

        def of_query(number):
            # Slots come first: JAX draws the same for a slot however many there are, so drafts do not change it.
            one = jax.random.fold_in(key, number)
            if self.noise == "gaussian":
                return GUMBEL_MEAN + GUMBEL_STD * jax.random.normal(one, (slots, heads, group))
            return jax.random.gumbel(one, (slots, heads, group))

        zeta = jax.vmap(jax.vmap(of_query))(number)  # [batch, new, slots, heads, group]
        return jnp.moveaxis(zeta, (3, 4), (1, 2))

    def score(self, scores: Array, memory: tuple[()], cache: KVCache, config: Any) -> Array:
        return scores


H2O = Keyformer(noise="none", tau_end=1.0)
"""Heavy hitters: the plain weights, summed."""
