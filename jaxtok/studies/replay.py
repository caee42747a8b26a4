"""The steps that a drafter needs for a known text, without the model that says it.

What a greedy model says does not depend on the drafts, so its text is generated once, and drafters are then replayed on
it. This is exact for drafters that look at the text only, and not at logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxtok.decoding import CachedTokens, Drafter, Engine

_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Nothing(Drafter):
    """A drafter that proposes nothing, but makes the model read `nodes` tokens a step, as another one does."""

    nodes: int
    chain = False

    def propose(self, state, text, length):
        return jnp.zeros((len(text), self.nodes), jnp.int32), jnp.full((len(text), self.nodes), -1, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A chooser of texts that are known: [batch, most] tokens."""

    draws = False

    def init(self, batch: int) -> None:
        return None

    def choose(self, logits, keys, state):
        number, texts = state
        return texts[jnp.arange(len(number)), number], (number + 1, texts)


@flax.struct.dataclass
class _NoCache:
    """What the engine asks of a cache: positions, which nothing looks at here."""

    next_position: Int[Array, " batch"]


class _NoModel(CachedTokens):
    """What takes the model's place: its logits are not looked at."""

    rewindable = True

    def read(self, params, tokens, cache, positions=None, mask=None, sow=False):
        return jnp.zeros((*tokens.shape, 1)), cache, None

    def keep(self, params, tokens, before, after, path, count, chain):
        return after


def replay(
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    state: Any = None,
    in_turn: bool = False,
) -> tuple[list[int], Any]:
    """The steps in which a model would give each text with the drafts, if it says these texts, and the last state.

    Args:
      drafter: one that does not look at logits.
      prompts, texts: the ids before each text and its own; a text has at least one.
      state: the drafter's first state; default: a new one.
      in_turn: whether the texts come one after the other with one state; if not, in batches, each with the first state.
    """
    engine = Engine(model=_NoModel(None), chooser=Recorded(), drafter=drafter)
    room, most = max(map(len, prompts)), max(map(len, texts))
    size = 1 if in_turn else min(_BATCH, len(prompts))
    steps: list[int] = []
    for first in range(0, len(prompts), size):
        # The last batch is filled up, so that one program serves all.
        numbers = [min(first + n, len(prompts) - 1) for n in range(size)]
        given, said = np.zeros((size, room), np.int32), np.zeros((size, most), np.int32)
        for row, number in enumerate(numbers):
            given[row, : len(prompts[number])] = prompts[number]
            said[row, : len(texts[number])] = texts[number]
        lengths, ends = (np.array([len(of[number]) for number in numbers], np.int32) for of in (prompts, texts))
        counts, after = _replayed(engine, state, given, lengths, said, ends)
        steps += np.asarray(counts)[: min(size, len(prompts) - first)].tolist()
        state = after if in_turn else state
    return steps, after


@functools.partial(jax.jit, static_argnames="engine")
def _replayed(
    engine: Engine,
    drafter: Any,
    prompts: Int[Array, "batch room"],
    lengths: Int[Array, " batch"],
    texts: Int[Array, "batch most"],
    ends: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Any]:
    batch, most = texts.shape
    said = (jnp.zeros(batch, jnp.int32), jnp.pad(texts, ((0, 0), (0, 1))))
    begun = engine.begin(_NoCache(lengths), prompts, new=most, lengths=lengths, rng=jax.random.key(0), chooser=said)
    begun = begun.replace(limit=lengths + ends)
    if drafter is None:
        drafter = engine.drafter.init(batch, begun.text.shape[1], 0)
    drafter = engine.drafter.begin(drafter, begun.text, begun.length, jnp.zeros((*prompts.shape, 1)))
    step = functools.partial(engine.step, None)
    state = jax.lax.while_loop(lambda state: state.live.any(), step, begun.replace(drafter=drafter))
    return state.steps, state.drafter
