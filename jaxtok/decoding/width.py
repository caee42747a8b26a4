"""How many nodes of a draft pay: the measured time of a step by its width, against the tokens that it then gives.

A step of 64 tokens costs about as much as a step of one where a model's weights must be fetched for each step, as on an
accelerator with few rows. It costs more where arithmetic is the limit, as on a CPU or with many rows; then a small tree
is faster than a large one, or than none. `fit_width` measures this for a model, a batch and a drafter.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.decoding.engine import CachedTokens, Engine, State, padded_prompts
from jaxtok.decoding.protocols import Drafter, Verified
from jaxtok.decoding.sampling import Sampling
from jaxtok.protocols import CausalLM, Params


@dataclasses.dataclass(frozen=True)
class Limited(Drafter):
    """A drafter of which only some nodes are proposed. Its state is that of the drafter.

    >>> import jax.numpy as jnp
    >>> from jaxtok.decoding import PromptLookup
    >>> limited = Limited(PromptLookup(tokens=4), kept=(0, 1, 2))
    >>> tokens, parents = limited.propose((), jnp.array([[5, 6, 7, 8, 9, 6, 7, 0]]), jnp.array([7]))
    >>> tokens[0, 1:].tolist(), parents[0].tolist()
    ([8, 9], [-1, 0, 1])
    """

    inner: Drafter
    kept: tuple[int, ...]
    """The numbers of these nodes, 0 (the root) first, in rising order. A node whose parent is left out is absent."""

    def __post_init__(self):
        if not self.kept or self.kept[0] != 0 or any(low >= high for low, high in zip(self.kept, self.kept[1:])):
            raise ValueError(f"kept is {self.kept}; it must be rising numbers of nodes, of which the first is 0.")
        if self.kept[-1] >= self.inner.nodes:
            raise ValueError(
                f"kept has the node {self.kept[-1]}; the drafter has the nodes 0 to {self.inner.nodes - 1}."
            )

    @property
    def nodes(self) -> int:
        return len(self.kept)

    @property
    def chain(self) -> bool:
        return self.inner.chain and self.kept == tuple(range(self.nodes))

    def init(self, batch: int, room: int, vocab: int) -> Any:
        return self.inner.init(batch, room, vocab)

    def begin(
        self,
        state: Any,
        text: Int[Array, "batch room"],
        length: Int[Array, " batch"],
        logits: Float[Array, "batch prompt vocab"],
    ) -> Any:
        return self.inner.begin(state, text, length, logits)

    def propose(
        self, state: Any, text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        tokens, parents = self.inner.propose(state, text, length)
        kept = np.array(self.kept)
        number = np.full(self.inner.nodes + 1, -1)  # the last entry is that of parent -1
        number[kept] = np.arange(len(kept))
        return tokens[:, kept], jnp.asarray(number)[parents[:, kept]]

    def observe(self, state: Any, verified: Verified) -> Any:
        return self.inner.observe(state, verified)


@dataclasses.dataclass(frozen=True)
class Counted(Drafter):
    """A drafter whose state also counts how often each node was accepted; the root's count is that of the steps."""

    inner: Drafter

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    @property
    def chain(self) -> bool:
        return self.inner.chain

    def init(self, batch: int, room: int, vocab: int) -> tuple[Any, Int[Array, " nodes"]]:
        return self.inner.init(batch, room, vocab), jnp.zeros(self.nodes, jnp.int32)

    def begin(self, state, text, length, logits) -> tuple[Any, Int[Array, " nodes"]]:
        own = self.inner.init(*text.shape, logits.shape[-1]) if state[0] is None else state[0]
        return self.inner.begin(own, text, length, logits), state[1]

    def propose(self, state, text, length):
        return self.inner.propose(state[0], text, length)

    def observe(self, state, verified: Verified) -> tuple[Any, Int[Array, " nodes"]]:
        passed = jnp.arange(self.nodes) < verified.count[:, None]
        nodes = jnp.where(passed, verified.path, self.nodes)
        return self.inner.observe(state[0], verified), state[1].at[nodes].add(1, mode="drop")


def most_accepted(counts: Sequence[int], size: int) -> tuple[int, ...]:
    """The `size` nodes that were accepted most often, the root included, in rising order; of equals, the first ones.

    >>> most_accepted([9, 2, 5, 5, 1], 3)
    (0, 2, 3)
    """
    best = 1 + np.argsort(-np.asarray(counts)[1:], kind="stable")[: size - 1]
    return (0, *sorted(best.tolist()))


@dataclasses.dataclass(frozen=True)
class Widths:
    """What steps of several widths cost and give; width 1 is plain decoding."""

    seconds: Mapping[int, float]
    """The time of a step, drafting included."""
    tokens: Mapping[int, float]
    """The tokens that a row gets from a step, estimated from those of the whole tree."""

    def best(self, least_gain: float = 1.0) -> int:
        """The width with the most tokens a second; 1 if none has `least_gain` times those of plain decoding.

        >>> widths = Widths({1: 1.0, 4: 1.2, 16: 2.0}, {1: 1.0, 4: 1.5, 16: 1.8})
        >>> widths.best(), widths.best(1.3)
        (4, 1)
        """
        rates = {width: self.tokens[width] / seconds for width, seconds in self.seconds.items()}
        width = max(rates, key=rates.__getitem__)
        return width if rates[width] >= least_gain * rates[1] else 1


def fit_width(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    drafter: Drafter,
    *,
    state: Any = None,
    widths: Sequence[int] = (2, 4, 8, 16, 32, 64),
    new_tokens: int = 64,
    stop_tokens: Collection[int] = (),
    least_gain: float = 1.05,
    repeats: int = 3,
) -> tuple[Drafter | None, Widths]:
    """The drafter with as many nodes as are the fastest for batches such as these prompts; None: no drafts.

    The prompts are continued greedily, once with the whole tree, which tells how often each of its nodes is accepted,
    and then with the most accepted nodes for each width, which is timed.

    Args:
      prompts: a batch of the size and of about the lengths that are meant.
      drafter, state: the drafter and its first state, which is also that of the result; default: a new one.
      widths: the widths that are tried, beside 1 and all nodes; those that the drafter does not reach are left out.
      new_tokens: the most new tokens of each prompt.
      stop_tokens: a row ends after the first of these.
      least_gain: how much faster than plain decoding drafts must be; otherwise the result is None.
      repeats: how often each width is timed, after a first time that compiles it.
    """
    params = jax.device_put(params)
    tokens, lengths = padded_prompts(prompts, model.config.vocab_size, model.config.max_length, new_tokens)

    def timed(drafter: Drafter | None, state: Any) -> tuple[float, Any]:
        engine, times = Engine(model=CachedTokens(model), chooser=Sampling(temperature=0), drafter=drafter), []
        options = {"new": new_tokens, "stop": sorted(stop_tokens), "drafter": state}
        for _ in range(1 + repeats):
            begun = jax.block_until_ready(engine.prefill(params, tokens, lengths, **options))
            seconds, ended = timed_run(engine, params, begun)
            times.append(seconds / int(ended.steps.max()))
        return statistics.median(times[1:]), ended.drafter

    counting = None if state is None else (state, jnp.zeros(drafter.nodes, jnp.int32))
    whole, (_, counts) = timed(Counted(drafter), counting)
    counts = np.asarray(counts)
    seconds, given = {1: timed(None, None)[0], drafter.nodes: whole}, {1: 1.0, drafter.nodes: counts.sum() / counts[0]}
    limited = {
        width: Limited(drafter, most_accepted(counts, width)) for width in sorted(widths) if 1 < width < drafter.nodes
    }
    for width, smaller in limited.items():
        seconds[width], _ = timed(smaller, state)
        given[width] = counts[list(smaller.kept)].sum() / counts[0]
    found = Widths(dict(sorted(seconds.items())), dict(sorted(given.items())))
    best = found.best(least_gain)
    return {1: None, drafter.nodes: drafter, **limited}[best], found


def timed_run(engine: Engine, params: Params, state: State) -> tuple[float, State]:
    """The seconds of `Engine.run`, and the state after it."""
    params = engine.prepared(params)
    start = time.perf_counter()
    ended = jax.block_until_ready(engine.run(params, state))
    return time.perf_counter() - start, ended
