"""Scores of other evictors, and evictors by name: window, StreamingLLM, SnapKV, TOVA, expected attention.

| name | scores a token by | paper |
|---|---|---|
| `keyformer` | all attention it got, under noise | arXiv 2403.09054 |
| `h2o` | all attention it got | arXiv 2306.14048 |
| `window` | its position | |
| `streaming` | its position; four sinks | arXiv 2309.17453 |
| `snapkv` | the attention it gets from the last 32 tokens, pooled over neighbours | arXiv 2404.14469 |
| `tova` | the attention it gets from the last token, over the heads of a layer | arXiv 2401.06104 |
| `expected` | the attention expected of future queries, times the norm of its value | arXiv 2510.00636 |
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.decoding.eviction import Eviction, Scorer, Seen, _per_head, masked_softmax, slot_scores, turned
from jaxtok.decoding.keyformer import H2O, Keyformer
from jaxtok.nn.cache import EMPTY, KVCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recency(Scorer):
    """The position: the oldest tokens go. With sinks, it is StreamingLLM (arXiv 2309.17453), without, a window."""

    observes = False

    def score(self, scores: None, memory: tuple[()], cache: KVCache, config: Any) -> Array:
        return _per_head(cache).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """The mean attention that the last `window` tokens give a token (arXiv 2404.14469, section 4).

    The mean is pooled over `pool` neighbours, and a head of keys has the mean over its query heads. The paper evicts
    once, after the prompt; here the window moves on with the text, and the last queries are remembered. With a window
    of 1 and no pooling, it is TOVA's score (arXiv 2401.06104).
    """

    window: int = 32
    pool: int = 5

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1.")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}; it must be odd.")

    @property
    def original_only(self) -> bool:
        return self.window > 1

    def init(self, cache: KVCache, config: Any) -> tuple[None, dict[str, Array]]:
        layers, batch, _, _, dim = cache.keys.shape
        queries = jnp.zeros((layers, batch, self.window, config.num_heads, dim), cache.keys.dtype)
        return None, {"queries": queries, "places": jnp.full((batch, self.window), EMPTY, jnp.int32)}

    def observe(self, scores: None, memory: dict[str, Array], seen: Seen) -> tuple[None, dict[str, Array]]:
        last = seen.count[:, None] + jnp.arange(self.window)

        def newest(old, new):  # the last `window` of the old and the first `count` new ones
            both = jnp.concatenate([old, new.astype(old.dtype)], 1)
            return jnp.take_along_axis(both, last.reshape(*last.shape, *[1] * (old.ndim - 2)), axis=1)

        queries = jax.lax.map(lambda both: newest(both[0], seen.of_path(both[1])), (memory["queries"], seen.queries))
        return None, {"queries": queries, "places": newest(memory["places"], seen.places)}

    def score(self, scores: None, memory: dict[str, Array], cache: KVCache, config: Any) -> Array:
        places = memory["places"]
        real = (places != EMPTY)[:, None, None, :, None]
        oldest = jnp.where(places == EMPTY, cache.next_position[:, None], places).min(1)[:, None, None]

        def of_layer(inputs):
            layer, queries, positions = inputs
            weights = masked_softmax(*slot_scores(cache, config, layer, queries, places))
            mean = jnp.where(real, weights, 0).sum((2, 3)) / (jnp.maximum(real.sum(3), 1) * weights.shape[2])[:, :, 0]
            if self.pool == 1:
                return mean
            # Neighbours are those by position, which is not the order of the slots; the window is not pooled.
            order = jnp.argsort(jnp.where(positions == EMPTY, jnp.iinfo(jnp.int32).max, positions))
            mean = jnp.where((positions != EMPTY) & (positions < oldest), mean, 0)
            summed = jax.lax.reduce_window(
                jnp.take_along_axis(mean, order, -1), 0.0, jax.lax.add, (1, 1, self.pool), (1, 1, 1), "SAME"
            )
            return jnp.put_along_axis(mean, order, summed / self.pool, -1, inplace=False)

        return jax.lax.map(of_layer, (jnp.arange(len(cache.keys)), memory["queries"], _per_head(cache)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """The attention that future queries are expected to give a token, times the norm of its value (arXiv 2510.00636).

    Queries before their rotation count as normal, with mean mu and covariance S over all tokens after the first
    `skip`. Turned by the mean rotation R of the next `future` positions, the expectation of exp(q k / sqrt(d)) is

        exp(mu R k / sqrt(d) + k R S R k / 2d),

    which is normalised over the slots, averaged over the query heads that share a key, and multiplied by |v|.
    """

    future: int = 512
    skip: int = 4

    def __post_init__(self):
        if self.future < 1 or self.skip < 0:
            raise ValueError(f"future is {self.future} and skip is {self.skip}; they must be at least 1 and 0.")

    def init(self, cache: KVCache, config: Any) -> tuple[None, dict[str, Array]]:
        layers, batch, _, _, dim = cache.keys.shape
        heads = config.num_heads
        return None, {
            "count": jnp.zeros(batch, jnp.float32),
            "sum": jnp.zeros((layers, batch, heads, dim), jnp.float32),
            "products": jnp.zeros((layers, batch, heads, dim, dim), jnp.float32),
        }

    def observe(self, scores: None, memory: dict[str, Array], seen: Seen) -> tuple[None, dict[str, Array]]:
        real = (jnp.arange(seen.path.shape[1]) < seen.count[:, None]) & (seen.number >= self.skip)

        def of_layer(inputs):
            queries, total, products = inputs
            back = turned(seen.config, seen.of_path(queries).astype(jnp.float32), -seen.places[:, :, None])
            back = jnp.where(real[:, :, None, None], back, 0)
            return total + back.sum(1), products + jnp.einsum("bnhd,bnhe->bhde", back, back)

        total, products = jax.lax.map(of_layer, (seen.queries, memory["sum"], memory["products"]))
        return None, {"count": memory["count"] + real.sum(1), "sum": total, "products": products}

    def score(self, scores: None, memory: dict[str, Array], cache: KVCache, config: Any) -> Array:
        batch, dim = len(cache.length), cache.keys.shape[-1]
        count = jnp.maximum(memory["count"], 1)
        rotation = self._rotation(config, cache.next_position, dim)
        visible = (_per_head(cache) != EMPTY)[:, :, :, None]

        def of_layer(inputs):
            layer, total, products, visible = inputs
            mean = total / count[:, None, None]
            covariance = products / count[:, None, None, None] - mean[..., :, None] * mean[..., None, :]
            mean = jnp.einsum("bhd,bde->bhe", mean, rotation)
            covariance = jnp.einsum("bdi,bhde,bej->bhij", rotation, covariance, rotation)
            keys = cache.keys[layer].astype(jnp.float32)
            mean = mean.reshape(batch, keys.shape[2], -1, dim)
            covariance = covariance.reshape(*mean.shape, dim)
            x = jnp.einsum("bgrd,bsgd->bgrs", mean, keys) / dim**0.5
            x += jnp.einsum("bsgi,bgrij,bsgj->bgrs", keys, covariance, keys) / (2 * dim)
            norm = jnp.linalg.norm(cache.values[layer].astype(jnp.float32), axis=-1)
            return masked_softmax(x, visible).mean(2) * jnp.moveaxis(norm, 2, 1)

        layers = jnp.arange(len(cache.keys))
        return jax.lax.map(of_layer, (layers, memory["sum"], memory["products"], visible))

    def _rotation(self, config: Any, first: Int[Array, " batch"], dim: int) -> Float[Array, "batch head_dim head_dim"]:
        """The mean over the next positions of the matrices by which rows are turned."""
        unit = jnp.broadcast_to(jnp.eye(dim), (len(first), self.future, dim, dim))
        return turned(config, unit, (first[:, None] + jnp.arange(self.future))[:, :, None]).mean(1)


EVICTORS: dict[str, dict[str, Any]] = {
    "keyformer": {"scorer": Keyformer()},
    "h2o": {"scorer": H2O, "recent": 0.5},
    "window": {"scorer": Recency(), "recent": 1},
    "streaming": {"scorer": Recency(), "recent": 1, "sinks": 4},
    "snapkv": {"scorer": SnapKV(), "recent": SnapKV().window},
    "tova": {"scorer": SnapKV(window=1, pool=1), "recent": 1, "scope": "layer"},
    "expected": {"scorer": ExpectedAttention(), "recent": 1, "sinks": 4},
}
"""The evictors of `parse_evictor`, without their budgets."""


def parse_evictor(text: str) -> Eviction:
    """The evictor that a short text names: NAME:BUDGET, and options after commas.

    A budget without a point is a number of slots in each head, one with a point a fraction of each row's prompt. The
    options are the fields of `Eviction` that are numbers or words, and those of the scorer.

    Raises:
      ValueError: the text names none.

    >>> parse_evictor("keyformer:0.5").budget, parse_evictor("h2o:128,sinks=4,every=16").every
    (0.5, 16)
    """
    what = f"the evictor is {text!r}; it must be NAME:BUDGET, such as keyformer:0.5 or h2o:128"
    head, *options = text.split(",")
    name, _, budget = head.partition(":")
    if name not in EVICTORS:
        raise ValueError(f"{what}, where NAME is one of {', '.join(EVICTORS)}.")
    fields: dict[str, Any] = {"budget": _number(budget)} | EVICTORS[name]
    if isinstance(fields["budget"], str):
        raise ValueError(f"{what}.")
    scorer, of_scorer = fields["scorer"], {}
    own = {field.name for field in dataclasses.fields(Eviction)} - {"scorer", "budget", "config", "prompt"}
    theirs = {field.name for field in dataclasses.fields(scorer)}
    for option in options:
        key, _, value = option.partition("=")
        if key not in own | theirs:
            raise ValueError(f"{what}; its option {key!r} must be one of {', '.join(sorted(own | theirs))}.")
        (fields if key in own else of_scorer)[key] = _number(value)
    try:
        return Eviction(**fields | {"scorer": dataclasses.replace(scorer, **of_scorer)})
    except TypeError as error:
        raise ValueError(f"{what}; an option has a value of the wrong kind ({error}).") from None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
