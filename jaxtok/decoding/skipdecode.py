"""SkipDecode (arXiv 2307.02628): a fixed number of layers for each position, which never rises along the text.

A schedule gives every position i a budget n(i) of layers. The first `warmup` layers always run, the rest of the budget
goes to the last layers, and the layers between them are skipped: they leave the residual stream as it is. As budgets
never rise, a token never needs keys and values of a layer that an earlier token has skipped, so that nothing is
computed again, all rows of a batch run the same layers at the same step, and the cost of a generation is known before.

It changes the model: train it under the schedule (`jaxtok.transfer.skipdecode`). `SkipDecode` puts any
`jaxtok.protocols.CausalLM` under a schedule and is one itself, so that everything that decodes, drafts, evicts and
evaluates works on it. It needs of the model only the layer ranges of `hidden`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.nn.cache import entered
from jaxtok.nn.transformer import layer_range
from jaxtok.protocols import CausalLM, Params

DECAYS = ("linear", "cosine", "power", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many layers, and which, run at each position.

    The positions of a prompt have the budget `max_layers`. After them it falls to `min_layers`, which it reaches
    `length - prompt` tokens later, and at which it stays. Another row's prompt may have another length: what counts is
    the number of tokens after it.

    >>> schedule = Schedule(max_layers=7, min_layers=3, prompt=6, length=18)
    >>> schedule.budgets(18, 8).tolist()
    [7, 7, 7, 7, 7, 7, 7, 7, 6, 6, 6, 5, 5, 5, 4, 4, 4, 3]
    >>> np.flatnonzero(schedule.active(18, 8)[13]).tolist()
    [0, 4, 5, 6, 7]
    >>> schedule.stages(18, 8)[1]
    Stage(start=8, end=11, layers=(0, 3, 4, 5, 6, 7))
    """

    max_layers: int
    """The budget of the prompt's positions, n_max."""
    min_layers: int
    """The last and lowest budget, n_min."""
    warmup: int = 1
    """The number w of first layers that always run; 0: only last layers run."""
    prompt: int = 64
    """The length P of the prompt, unless a row has one of its own."""
    length: int = 160
    """The planned length S of prompt and new tokens; a setting, as the true length is not known in advance."""
    decay: Literal["linear", "cosine", "power", "step"] = "linear"
    """How the budget falls with t from 0 to 1: linearly (the paper), as (1 - cos(pi t)) / 2, as t ** power, or in
    `plateaus` equal steps, of which fewer are cheaper to compile."""
    power: float = 1.0
    """The exponent of the decay `power`; below 1 the budget falls early."""
    plateaus: int = 4
    """The number of budgets of the decay `step`."""
    custom: tuple[int, ...] = ()
    """The budgets of the positions after the prompt, in place of the decay; the last one stays."""
    prompt_budget: Literal["max_exit", "all"] = "max_exit"
    """Whether the prompt's positions have `max_layers`, or all layers of the model."""
    skip: Literal["lower", "top"] = "lower"
    """Which layers a budget leaves out: those after the first `warmup` ones, or the last ones. The second is early
    termination, the baseline; `warmup` then means nothing."""

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be 0 or more.")
        least = max(self.warmup, 1)
        if self.min_layers < least:
            raise ValueError(f"min_layers is {self.min_layers}; it must be at least {least} (and not below warmup).")
        if self.max_layers < self.min_layers:
            raise ValueError(f"max_layers is {self.max_layers}; it must be at least min_layers = {self.min_layers}.")
        if self.prompt < 1:
            raise ValueError(f"prompt is {self.prompt}; it must be at least 1, as generation follows some token.")
        if self.length <= self.prompt:
            raise ValueError(f"length is {self.length}; it must be more than prompt = {self.prompt}.")
        if self.decay not in DECAYS:
            raise ValueError(f"decay is {self.decay!r}; it must be one of {', '.join(DECAYS)}.")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power is {self.power}; it must be positive.")
        if self.plateaus < 2:
            raise ValueError(f"plateaus is {self.plateaus}; it must be at least 2.")
        for field, allowed in (("prompt_budget", ("max_exit", "all")), ("skip", ("lower", "top"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")
        if any(isinstance(n, bool) or n != int(n) for n in self.custom):
            raise ValueError(f"custom is {self.custom}; budgets are whole numbers.")
        if any(not self.min_layers <= n <= self.max_layers for n in self.custom):
            raise ValueError(
                f"custom is {self.custom}; budgets must be from min_layers = {self.min_layers} to max_layers = "
                f"{self.max_layers}."
            )
        if any(later > earlier for earlier, later in zip(self.custom, self.custom[1:])):
            raise ValueError(
                f"custom is {self.custom}; a budget must not rise, as a token would need what earlier ones skipped."
            )

    @property
    def planned(self) -> int:
        """The number of tokens after the prompt for which the budget may fall."""
        return len(self.custom) or self.length - self.prompt

    def generated(self) -> Int[np.ndarray, " planned_and_rest"]:
        """The budgets of the planned positions after the prompt, and the one at which it then stays."""
        if self.custom:
            return np.array([*self.custom, self.custom[-1]])
        high, low, span = self.max_layers, self.min_layers, self.planned
        u = np.arange(span + 1)
        if self.decay == "linear":  # in whole numbers, as ties of floor(x + 1/2) are missed in floating point
            return (2 * ((span - u) * high + u * low) + span) // (2 * span)
        t = u / span
        if self.decay == "cosine":
            fallen = (1 - np.cos(np.pi * t)) / 2
        elif self.decay == "power":
            fallen = t**self.power
        else:
            fallen = np.minimum(np.floor(self.plateaus * t), self.plateaus - 1) / (self.plateaus - 1)
        return np.floor(high - fallen * (high - low) + 0.5 + 1e-9).astype(int)

    def first_budget(self, num_layers: int) -> int:
        """The budget of the prompt's positions in a model of so many layers."""
        return num_layers if self.prompt_budget == "all" else self.max_layers

    def budgets(self, positions: int, num_layers: int) -> Int[np.ndarray, " positions"]:
        """n(i) for the positions 0, 1, ... of a row."""
        after = self.generated()[np.clip(np.arange(positions) - self.prompt, 0, self.planned)]
        return np.where(np.arange(positions) < self.prompt, self.first_budget(num_layers), after)

    def least_budgets(self, num_layers: int) -> Int[np.ndarray, " layers"]:
        """The smallest budget with which each layer runs."""
        layer = np.arange(num_layers)
        if self.skip == "top":
            return layer + 1
        return np.where(layer < self.warmup, 1, self.warmup + num_layers - layer)

    def active(self, positions: int, num_layers: int) -> Bool[np.ndarray, "positions layers"]:
        """Whether each layer runs at a position: the sets A(i), each of which holds the next."""
        return self.budgets(positions, num_layers)[:, None] >= self.least_budgets(num_layers)

    def stages(self, positions: int, num_layers: int) -> list[Stage]:
        """The longest runs of positions with the same layers."""
        active = self.active(positions, num_layers)
        starts = [0, *(np.flatnonzero((active[1:] != active[:-1]).any(1)) + 1).tolist()]
        return [
            Stage(start, end, tuple(np.flatnonzero(active[start]).tolist()))
            for start, end in zip(starts, [*starts[1:], positions])
        ]

    def mean_layers(self, new: int = 0) -> float:
        """The mean budget of the first `new` tokens after the prompt (0: the planned ones)."""
        new = new or self.planned
        return float(self.generated()[np.minimum(np.arange(new), self.planned)].mean())

    def check(self, num_layers: int) -> None:
        """Raises ValueError if a model of so many layers cannot run it."""
        if self.max_layers > num_layers:
            raise ValueError(
                f"schedule.max_layers is {self.max_layers}; it must be at most the model's num_layers = {num_layers}."
            )


class Stage(NamedTuple):
    """The positions from `start` to before `end`, which run the same layers."""

    start: int
    end: int
    layers: tuple[int, ...]


def solve_budget(num_layers: int, speedup: float, warmup: int = 1, ratio: float = 2.0) -> tuple[int, int]:
    """n_max and n_min whose mean is nearest `num_layers / speedup`.

    Among these the one whose n_max / n_min is nearest `ratio`, and of those the one with the smaller n_max.

    >>> solve_budget(24, 3), solve_budget(32, 2)
    ((11, 5), (21, 11))
    """
    if not 1 <= speedup <= num_layers:
        raise ValueError(f"speedup is {speedup}; it must be from 1 to num_layers = {num_layers}.")
    if not 0 <= warmup <= num_layers:
        raise ValueError(f"warmup is {warmup}; it must be from 0 to num_layers = {num_layers}.")
    pairs = [(high, low) for high in range(1, num_layers + 1) for low in range(max(warmup, 1), high + 1)]
    return min(pairs, key=lambda p: (abs(sum(p) / 2 - num_layers / speedup), abs(p[0] / p[1] - ratio), p[0]))


class Range(NamedTuple):
    """Neighbouring layers that run with the same budgets."""

    first: int
    end: int
    least: int
    """The smallest budget of the schedule with which they run."""


@dataclasses.dataclass(frozen=True)
class SkipDecode:
    """A CausalLM under a schedule; its parameters are the model's.

    A token runs the layers of its own position, so that trees of drafts and rows of unequal lengths may share a call.
    A layer that no token of a call needs does not run in a call with a cache. Without a cache, all layers that any
    budget reaches run, and tokens that skip one keep their state (the parallel form, for training).

    >>> from jaxtok.lm.decoder import Decoder, init_params
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> from jaxtok.decoding import Sampling, generate
    >>> size = LlamaConfig(num_layers=4, d_model=8, num_heads=2, mlp_dim=8, vocab_size=16, max_length=32)
    >>> model = SkipDecode(Decoder(size), Schedule(max_layers=4, min_layers=2, prompt=4, length=12))
    >>> params = init_params(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> made = generate(model, params, [[3, 1, 4, 1], [5]], max_new_tokens=8, chooser=Sampling(temperature=0))
    >>> [len(row) for row in made.tokens]
    [8, 8]
    """

    model: CausalLM
    schedule: Schedule

    def __post_init__(self):
        self.schedule.check(self.config.num_layers)

    @property
    def config(self) -> Any:
        return self.model.config

    def clone(self, **fields: Any) -> SkipDecode:
        """The same, with fields of the module inside replaced."""
        return dataclasses.replace(self, model=self.model.clone(**fields))

    def init(self, *args: Any, **options: Any) -> Any:
        """The module's `init`."""
        return self.model.init(*args, **options)

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache, for prompts of the schedule's length."""
        return self.prompted(self.model.init_cache(batch, length), jnp.full(batch, self.schedule.prompt, jnp.int32))

    def prompted(self, cache: Any, prompts: Int[Array, " batch"], new: int = 0) -> Any:
        """The cache of rows whose prompts have these lengths; `new` tokens are to follow them.

        Raises:
          ValueError: the model's cache does not hold the lengths of prompts.
        """
        if not hasattr(cache, "prompts"):
            raise ValueError(
                f"the cache of a {type(self.model).__name__} does not hold the lengths of prompts, on which the "
                "schedule depends; use a model with a KVCache."
            )
        if new > self.schedule.planned:
            warnings.warn(
                f"{new} new tokens are asked for, and the schedule is planned for {self.schedule.planned}; the rest "
                f"runs {self.schedule.generated()[-1]} layers.",
                stacklevel=2,
            )
        return cache.replace(prompts=jnp.asarray(prompts, jnp.int32))

    def ranges(self, layers: tuple[int, int] | None = None) -> list[Range]:
        """The layers that any budget reaches, between two layers (default: all), divided where budgets end."""
        first, end = layer_range(layers, self.config.num_layers)
        least = self.schedule.least_budgets(self.config.num_layers)
        budgets = {*self.schedule.generated().tolist(), self.schedule.first_budget(self.config.num_layers)}
        found: list[Range] = []
        for layer in range(first, end):
            reach = [budget for budget in sorted(budgets) if budget >= least[layer]]
            if not reach:
                continue
            if found and found[-1].end == layer and found[-1].least == reach[0]:
                found[-1] = found[-1]._replace(end=layer + 1)
            else:
                found.append(Range(layer, layer + 1, reach[0]))
        return found

    def budgets(
        self, positions: Int[Array, "#batch length"], prompts: Int[Array, " #batch"] | int
    ) -> Int[Array, "#batch length"]:
        """The budget of each token, by its position and the length of its row's prompt; 0 for padding (position -1)."""
        after = positions - jnp.reshape(prompts, (-1, 1))
        table = jnp.asarray(self.schedule.generated(), jnp.int32)
        budget = table[jnp.clip(after, 0, len(table) - 1)]
        budget = jnp.where(after < 0, self.schedule.first_budget(self.config.num_layers), budget)
        return jnp.where(positions < 0, 0, budget)

    def apply(
        self,
        variables: dict[str, Params],
        x: Array,
        *,
        method: str | None = None,
        mutable: Any = False,
        rngs: Any = None,
        **options: Any,
    ) -> Any:
        """As that of a `CausalLM`, with a further option of the whole and of `hidden`:

        prompts  [batch] int32, the lengths of the rows' prompts; default: those of the cache, else the schedule's.
        """
        if method not in (None, "hidden"):
            return self.model.apply(variables, x, method=method, mutable=mutable, rngs=rngs, **options)
        if method is None:
            x = self.model.apply(variables, x, method="embed")
        x, cache, sown = self._hidden(variables, x, mutable=mutable, rngs=rngs, **options)
        if method is None:
            x = self.model.apply(variables, x, method="head")
        return (x, cache) if mutable is False else ((x, cache), sown)

    def _hidden(
        self,
        variables: dict[str, Params],
        x: Float[Array, "batch length d_model"],
        *,
        positions: Int[Array, "#batch length"] | None = None,
        layers: tuple[int, int] | None = None,
        cache: Any = None,
        prompts: Int[Array, " batch"] | None = None,
        mutable: Any = False,
        rngs: Any = None,
        **options: Any,
    ) -> tuple[Array, Any, Any]:
        count = self.config.num_layers
        first, end = layer_range(layers, count)
        places, _ = entered(x, positions, cache, first)
        if prompts is None:
            prompts = self.schedule.prompt if cache is None else cache.prompts
        budget = self.budgets(places, prompts)
        lowest = self.schedule.generated()[-1]
        sown: list[tuple[int, Any]] = []

        def run(x, cache, a, b):
            # Ranges that begin later have dropout of their own.
            keys = {name: jax.random.fold_in(key, a) for name, key in rngs.items()} if rngs and a else rngs
            out = self.model.apply(
                variables,
                x,
                method="hidden",
                layers=(a, b),
                positions=positions,
                cache=cache,
                mutable=mutable,
                rngs=keys,
                **options,
            )
            if mutable is False:
                return out
            if a < b:
                sown.append((a, out[1]))
            return out[0]

        def skip(x, cache, a, b):
            """What enters and leaves at these layers if none of them runs."""
            if a == 0:
                x, cache = run(x, cache, 0, 0)
            return run(x, cache, count, count) if b == count else (x, cache)

        def masked(x, cache, part):
            y, after = run(x, cache, part.first, part.end)
            x, _ = skip(x, cache, part.first, part.end)
            return jnp.where((budget >= part.least)[..., None], y, x), after

        ranges = self.ranges((first, end))
        at = first
        for part in ranges:
            if at == 0 < part.first:
                x, cache = skip(x, cache, 0, 0)
            at = part.end
            if part.least <= lowest:
                x, cache = run(x, cache, part.first, part.end)
            elif cache is None or mutable is not False:  # what is sown has to leave the branch
                x, cache = masked(x, cache, part)
            else:
                x, cache = jax.lax.cond(
                    (budget >= part.least).any(),
                    functools.partial(masked, part=part),
                    functools.partial(skip, a=part.first, b=part.end),
                    x,
                    cache,
                )
        if at < end or first == end:
            x, cache = skip(x, cache, at, end)
        return x, cache, _joined(sown, count) if mutable is not False else None


def _joined(sown: Sequence[tuple[int, Any]], count: int) -> Any:
    """What was sown in ranges of layers as if it had been in one: stacked by layer, 0 in layers that did not run."""
    if not sown:
        return {}
    parts: list[Any] = []
    at = 0

    def zeros(tree, layers):
        return jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype), tree)

    for first, tree in sown:
        if first > at:
            parts.append(zeros(tree, first - at))
        parts.append(tree)
        at = first + jax.tree.leaves(tree)[0].shape[0]
    if at < count:
        parts.append(zeros(sown[0][1], count - at))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
