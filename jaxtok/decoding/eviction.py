"""Eviction from the cache by score: which tokens each head keeps, when the cache may hold only so many.

Three things are separate. A `Scorer` says how much a head needs each token (Keyformer, H2O, SnapKV, ...), a budget how
many stay, and a schedule (`every`) when the others go. `Eviction` joins them to an evictor of the engine.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.nn.cache import EMPTY, KVCache
from jaxtok.protocols import CausalLM

_BLOCK = 128  # as many queries at a time have their weights computed, so that a long prompt needs little memory
_UNSEEN = -1e30


@flax.struct.dataclass
class Seen:
    """What a scorer observes: the queries of new tokens, which are in the last `count` used slots of the cache."""

    cache: KVCache
    queries: Float[Array, "layers batch new heads head_dim"]
    """As the model computed them; token i of a row is number `path[i]`."""
    path: Int[Array, "batch new"]
    count: Int[Array, " batch"]
    """How many tokens are in the path; the rest is padding, or was a wrong draft."""
    read: Int[Array, " batch"]
    """The tokens of each row that were observed before."""
    start: Int[Array, " batch"]
    """The number of the prompt's last token, from 0."""
    config: Any = flax.struct.field(pytree_node=False)

    @property
    def number(self) -> Int[Array, "batch new"]:
        """The number of each new token in its text, from 0."""
        return self.read[:, None] + jnp.arange(self.path.shape[1])

    @property
    def places(self) -> Int[Array, "batch new"]:
        """The position of each new token."""
        return (self.cache.next_position - self.count)[:, None] + jnp.arange(self.path.shape[1])

    def of_path(self, queries: Float[Array, "batch new heads head_dim"]) -> Float[Array, "batch new heads head_dim"]:
        """One layer's queries, in the order of the path."""
        return jnp.take_along_axis(queries, self.path[:, :, None, None], axis=1)


class Scorer(abc.ABC):
    """How much each head needs each token of its cache. A frozen dataclass of options.

    Its state has two parts: scores that belong to slots (and move with them), and what it remembers besides; it may
    have neither.
    """

    observes: ClassVar[bool] = True
    """Whether it needs to see the queries of each token."""
    original_only: ClassVar[bool] = False
    """Whether what it remembers is tied to the original positions."""

    def fit(self, new: int) -> Scorer:
        """The scorer for up to `new` new tokens a row."""
        return self

    def init(self, cache: KVCache, config: Any) -> tuple[Any, Any]:
        """The scores of an empty cache, [layers, batch, heads, slots] (None: it keeps none), and its memory."""
        return None, ()

    def observe(self, scores: Any, memory: Any, seen: Seen) -> tuple[Any, Any]:
        """Scores and memory after new tokens."""
        return scores, memory

    @abc.abstractmethod
    def score(self, scores: Any, memory: Any, cache: KVCache, config: Any) -> Float[Array, "layers batch heads slots"]:
        """The score of each slot: tokens with the lowest ones are evicted. Those of empty slots mean nothing."""


@flax.struct.dataclass
class EvictionState:
    """The state of an `Eviction`."""

    budget: Int[Array, " batch"]
    start: Int[Array, " batch"]
    """The number of the prompt's last token, from 0."""
    read: Int[Array, " batch"]
    """The tokens that were observed."""
    scores: Any
    memory: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eviction:
    """A `jaxtok.decoding.protocols.Evictor`: in each head, the tokens with the highest scores stay.

    The first `sinks` tokens and the last `recent` ones stay in any case. Among equal scores, the older token stays.
    What was evicted never returns.

    >>> from jaxtok.decoding import Keyformer
    >>> from jaxtok.lm.decoder import Decoder
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> evictor = Eviction(scorer=Keyformer(), budget=0.5, sinks=4)  # half of each prompt
    >>> evictor.fit(Decoder(LlamaConfig()), prompt=100, new=20).slots
    50
    """

    scorer: Scorer
    budget: int | float
    """The slots that stay in each head: a number, or a fraction of each row's prompt."""
    recent: int | float = 0.3
    """The newest tokens that always stay: a number, or a fraction of the budget; at least one."""
    sinks: int = 0
    """The first tokens that always stay (attention sinks, arXiv 2309.17453)."""
    every: int = 1
    """The number of tokens between two evictions; up to so many more slots are in use before one. With drafts, a step
    accepts no more tokens than that."""
    scope: Literal["head", "layer", "shared"] = "head"
    """Who chooses together, by the sum of their scores: head, each head alone; layer, the heads of a layer; shared, the
    heads of the same number in all layers."""
    positions: Literal["original", "new"] = "original"
    """original: keys stay as they are, and a query has its true position. new: after an eviction, the positions are 0,
    1, ... again, and the keys are turned to them (rotary models in float32)."""
    config: Any = None
    """The model's; see `fit`."""
    prompt: int = 0
    """The most tokens of a prompt; see `fit`."""

    def __post_init__(self):
        for field in ("budget", "recent"):
            value = getattr(self, field)
            if isinstance(value, float) and not 0 < value <= 1:
                raise ValueError(f"{field} is {value}; a fraction must be above 0 and at most 1.")
            if not isinstance(value, float) and value < 1:
                raise ValueError(f"{field} is {value}; it must be at least 1, or a fraction above 0 and at most 1.")
        if self.sinks < 0 or self.every < 1:
            raise ValueError(f"sinks is {self.sinks} and every is {self.every}; they must be at least 0 and 1.")
        for field, allowed in (("scope", ("head", "layer", "shared")), ("positions", ("original", "new"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")
        if self.positions == "new" and self.scorer.original_only:
            raise ValueError(f"positions is 'new'; the scorer {self.scorer} needs the original ones.")
        recent = 1 if isinstance(self.recent, float) else self.recent
        if not isinstance(self.budget, float) and self.sinks + recent > self.budget:
            raise ValueError(
                f"sinks is {self.sinks} and recent is {self.recent}; together they must be at most the budget of "
                f"{self.budget} slots."
            )

    def fit(self, model: CausalLM, prompt: int, new: int) -> Eviction:
        """The evictor for a model, prompts of at most `prompt` tokens and `new` new ones.

        Raises:
          ValueError: the scores or positions of the model's attention cannot be computed here.
        """
        config = model.config
        if self.scorer.observes and getattr(config, "relative_buckets", 0):
            raise ValueError(
                "the model has a relative position bias, which an evictor that observes attention does not see; use "
                "one by position (window, streaming)."
            )
        if self.positions == "new":
            if getattr(config, "learned_positions", False):
                raise ValueError("positions is 'new', but the model has learned positions, which cannot be turned.")
            if getattr(config, "dtype", "float32") != "float32":
                raise ValueError(
                    f"positions is 'new', but the keys are {config.dtype}; turned again and again they would be lost "
                    "in rounding: use float32, or the original positions."
                )
        return dataclasses.replace(self, scorer=self.scorer.fit(new), config=config, prompt=prompt)

    @property
    def slots(self) -> int:
        if self.config is None:
            raise ValueError("the evictor is not fitted; call fit(model, prompt, new) first, as generate does.")
        if not isinstance(self.budget, float):
            return self.budget
        return max(_part(self.prompt, self.budget), self.sinks + 1)

    @property
    def observes(self) -> bool:
        return self.scorer.observes

    def init(self, cache: KVCache) -> EvictionState:
        lengths = cache.length
        budget = jnp.full(lengths.shape, self.slots, jnp.int32)
        if isinstance(self.budget, float):
            budget = jnp.clip(_part(lengths + 1, self.budget), self.sinks + 1, self.slots)
        scores, memory = self.scorer.init(cache, self.config)
        return EvictionState(budget, lengths, jnp.zeros_like(lengths), scores, memory)

    def budget_of(self, state: EvictionState) -> Int[Array, " batch"]:
        return state.budget

    def observe(
        self,
        state: EvictionState,
        cache: KVCache,
        sown: Any,
        path: Int[Array, "batch new"],
        count: Int[Array, " batch"],
    ) -> EvictionState:
        seen = Seen(cache, sown_queries(sown), path, count, state.read, state.start, config=self.config)
        scores, memory = self.scorer.observe(state.scores, state.memory, seen)
        return state.replace(scores=scores, memory=memory, read=state.read + count)

    def evict(
        self, state: EvictionState, cache: KVCache, rows: Bool[Array, " batch"], size: int
    ) -> tuple[KVCache, EvictionState]:
        if cache.slots == size:
            cache, state = self._drop(state, cache, rows)
        else:
            cache, state = self._keep(state, cache, rows, size)
        return (self._renumbered(cache) if self.positions == "new" else cache), state

    def _rank(self, state: EvictionState, cache: KVCache) -> Float[Array, "layers batch heads slots"]:
        """The scores by which slots stay, among those that choose together."""
        rank = self.scorer.score(state.scores, state.memory, cache, self.config)
        if self.scope == "layer":
            rank = jnp.broadcast_to(rank.sum(2, keepdims=True), rank.shape)
        elif self.scope == "shared":
            rank = jnp.broadcast_to(rank.sum(0, keepdims=True), rank.shape)
        return rank

    def _protected(self, state: EvictionState, cache: KVCache, positions: Array) -> Bool[Array, "*shape"]:
        """Whether slots with these positions [layers, batch, heads, slots] stay in any case."""
        recent = _part(state.budget, self.recent) if isinstance(self.recent, float) else self.recent
        recent = jnp.clip(recent, 1, state.budget - self.sinks)
        oldest = (cache.next_position - recent)[None, :, None, None]
        return (positions >= oldest) | ((positions >= 0) & (positions < self.sinks))

    def _keep(self, state, cache: KVCache, rows, size: int):
        """Evicts any number of tokens from a cache whose slots are in the order of their positions."""
        positions, most = _per_head(cache), min(self.slots, cache.slots)
        rank = jnp.where(self._protected(state, cache, positions), jnp.inf, self._rank(state, cache))
        rank = jnp.where(positions == EMPTY, -jnp.inf, rank)
        index = jax.lax.top_k(rank, most)[1]  # of equal ones, the older are first
        count = jnp.where(rows, jnp.minimum(state.budget, cache.length), cache.length)
        kept = jnp.arange(most) < count[None, :, None, None]
        index = jnp.sort(jnp.where(kept, index, cache.slots))
        index = jnp.pad(index, [(0, 0)] * 3 + [(0, size - most)], constant_values=cache.slots)
        scores = state.scores
        if scores is not None:
            scores = jnp.take_along_axis(scores, jnp.minimum(index, cache.slots - 1), axis=-1)
            scores = jnp.where(index < cache.slots, scores, 0)
        return cache.gather(jnp.minimum(index, cache.slots - 1), count), state.replace(scores=scores)

    def _drop(self, state, cache: KVCache, rows):
        """Evicts token after token, until each chosen row is within its budget.

        A row's last slot moves to the place of the evicted one. Nothing else moves, so that under `jit` the arrays stay
        where they are; the order of the slots is then no longer that of the positions.
        """
        cache = cache.replace(positions=jnp.broadcast_to(cache.positions, cache.keys.shape[:4]))
        layers, batch, _, heads = cache.positions.shape
        of_layers, of_rows, of_heads = jnp.ogrid[:layers, :batch, :heads]

        def beyond(cache):
            return rows & (cache.length > state.budget)

        def drop_one(carry):
            cache, rank, scores = carry
            positions, some = cache.positions, beyond(cache)
            free = (positions != EMPTY) & ~self._protected(state, cache, positions)
            lowest = jnp.where(free, rank, jnp.inf).min(2, keepdims=True)
            # Of equal ones, the newest goes.
            freed = jnp.where(free & (rank == lowest), positions, EMPTY).argmax(2)
            last = jnp.broadcast_to((cache.length - 1)[None, :, None], freed.shape)
            freed, last = (jnp.where(some[None, :, None], x, cache.slots) for x in (freed, last))

            def moved(x, empty=0):
                target, source = ((of_layers, of_rows, slot, of_heads) for slot in (freed, last))
                x = x.at[target].set(x.at[source].get(mode="clip"), mode="drop")
                return x.at[source].set(empty, mode="drop")

            cache = cache.replace(
                keys=moved(cache.keys),
                values=moved(cache.values),
                positions=moved(positions, EMPTY),
                length=cache.length - some,
            )
            return cache, moved(rank), None if scores is None else moved(scores)

        rank, scores = (None if x is None else jnp.moveaxis(x, 3, 2) for x in (self._rank(state, cache), state.scores))
        carry = (cache, rank, scores)
        cache, _, scores = jax.lax.while_loop(lambda carry: beyond(carry[0]).any(), drop_one, carry)
        return cache, state.replace(scores=None if scores is None else jnp.moveaxis(scores, 2, 3))

    def _renumbered(self, cache: KVCache) -> KVCache:
        """The cache with positions 0, 1, ... in each head, and keys that are turned to them."""
        positions = jnp.broadcast_to(cache.positions, cache.keys.shape[:4])
        order = jnp.where(positions == EMPTY, jnp.iinfo(jnp.int32).max, positions)
        rank = jnp.argsort(jnp.argsort(order, axis=2), axis=2).astype(jnp.int32)
        by = jnp.where(positions == EMPTY, 0, rank - positions)

        def turn(layer, keys):
            return keys.at[layer].set(turned(self.config, keys[layer], by[layer]))

        keys = jax.lax.fori_loop(0, len(by), turn, cache.keys)
        return cache.replace(keys=keys, positions=jnp.where(positions == EMPTY, EMPTY, rank))


def _part(number: Any, fraction: float) -> Any:
    """floor(number * fraction) in whole numbers: 0.58 of 50 is 29, which is 28 in floating point."""
    ratio = Fraction(fraction).limit_denominator(10_000)
    whole, rest = number // ratio.denominator, number % ratio.denominator
    return whole * ratio.numerator + rest * ratio.numerator // ratio.denominator


def _per_head(cache: KVCache) -> Int[Array, "layers batch heads slots"]:
    """The position of each head's slots."""
    layers, batch, slots, heads = cache.keys.shape[:4]
    return jnp.broadcast_to(jnp.moveaxis(cache.positions, 3, 2), (layers, batch, heads, slots))


def sown_queries(sown: Any) -> Float[Array, "layers batch new heads head_dim"]:
    """The queries of self-attention among a model's intermediates.

    Raises:
      ValueError: there are none.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(sown)[0]:
        if [getattr(key, "key", None) for key in path[:-1]][-2:] == ["attention", "queries"]:
            return leaf
    raise ValueError("the model does not sow the queries of its attention; use an evictor by position (streaming).")


def turned(
    config: Any, x: Float[Array, "batch length heads head_dim"], by: Int[Array, "batch length #heads"]
) -> Float[Array, "batch length heads head_dim"]:
    """x turned by so many positions, as the model turns queries and keys; unturned if its positions are not rotary."""
    if not hasattr(config, "rotate"):
        return x
    if scaling := getattr(config, "rotary_scaling", None):  # the factor on cos and sin was applied before
        config = dataclasses.replace(config, rotary_scaling=dataclasses.replace(scaling, attention_factor=1.0))
    batch, length, heads, dim = x.shape
    flat = x.reshape(batch, length * heads, 1, dim)
    by = jnp.broadcast_to(by, x.shape[:3]).reshape(batch, length * heads)
    return config.rotate(flat, flat, by)[1].reshape(x.shape)


def slot_scores(
    cache: KVCache,
    config: Any,
    layer: Int[Array, ""],
    queries: Float[Array, "batch new heads head_dim"],
    places: Int[Array, "batch new"],
) -> tuple[Float[Array, "batch kv_heads group new slots"], Bool[Array, "batch visible_heads 1 new slots"]]:
    """The scores of one layer's queries for the slots of its cache, before softmax, and which slots they see.

    Args:
      places: the positions of the queries.
    """
    batch, new, _, dim = queries.shape
    keys = cache.keys[layer]
    grouped = queries.reshape(batch, new, keys.shape[2], -1, dim)
    x = jnp.einsum("bngrd,bsgd->bgrns", grouped, keys, preferred_element_type=jnp.float32) / dim**0.5
    stored = cache.positions[layer if cache.positions.shape[0] > 1 else 0]
    stored, own = jnp.moveaxis(stored, 2, 1)[:, :, None, None], places[:, None, None, :, None]
    visible = (stored != EMPTY) & (stored <= own)
    window = config.window_of(layer) if hasattr(config, "window_of") else None
    return x, visible if window is None else visible & (stored > own - window)


Weigh = Callable[[Array, Array, Array], Array]


def received(seen: Seen, layer: Int[Array, ""], queries: Array, weigh: Weigh) -> Float[Array, "batch kv_heads slots"]:
    """What each slot of a layer gets from the new tokens, summed over them and over the query heads that share keys.

    Args:
      queries: the layer's, in their order in `seen`.
      weigh: maps scores, which of them are visible, and the numbers of the queries [batch, new] to weights, in blocks.
    """
    batch, new = seen.path.shape
    real = jnp.arange(new) < seen.count[:, None]
    block = min(new, _BLOCK)
    short = -new % block

    def cut(x):  # [blocks, batch, block, ...]
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    def add(total, inputs):
        queries, places, number, real = inputs
        x, visible = slot_scores(seen.cache, seen.config, layer, queries, places)
        weights = weigh(x, visible, number)
        return total + jnp.where(real[:, None, None, :, None], weights, 0).sum((2, 3)), None

    zeros = jnp.zeros((batch, seen.cache.keys.shape[3], seen.cache.slots), jnp.float32)
    blocks = tuple(cut(x) for x in (seen.of_path(queries), seen.places, seen.number, real))
    return jax.lax.scan(add, zeros, blocks)[0]


def masked_softmax(x: Array, visible: Array) -> Array:
    """Weights in float32 along the last axis; 0 for what is not visible."""
    return jnp.where(visible, jax.nn.softmax(jnp.where(visible, x.astype(jnp.float32), _UNSEEN)), 0)
