"""Continues texts with tokens from the engine, up to a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtok.decoding.engine import Engine, State, new_tokens
from jaxtok.protocols import Params

OnText = Callable[[list[bytes]], None]
"""A function that is called with the new bytes of each row."""


class Continued(NamedTuple):
    """The continuation of a row of text."""

    text: bytes
    tokens: list[int]
    logprobs: list[float]
    """The log probability of each token in nats; see `jaxtok.decoding.engine.State`."""


def continue_texts(
    engine: Engine,
    params: Params,
    state: State,
    read: Callable[[int, list[int]], bytes],
    max_bytes: int,
    on_text: OnText | None = None,
    chunk: int = 16,
) -> list[Continued]:
    """The continuation of each row, up to `max_bytes` bytes of text or to its stop token.

    Args:
      engine, params, state: see `Engine.run`.
      read: maps the number of a row and its new tokens to bytes; further tokens must only append bytes. Bytes that it
        gives for no tokens are from an earlier call: they count towards `max_bytes`, and on_text does not get them.
      max_bytes: further bytes are cut off, and so are the tokens that are not needed for the rest.
      on_text: called about every `chunk` tokens.
    """
    params = engine.prepared(params)
    shown = [read(row, [])[:max_bytes] for row in range(len(state.live))]
    while True:
        tokens, logprobs = new_tokens(state)
        texts = [read(row, new)[:max_bytes] for row, new in enumerate(tokens)]
        if on_text and texts != shown:
            on_text([text[len(before) :] for text, before in zip(texts, shown)])
        shown = texts
        state = state.replace(live=state.live & jnp.array([len(text) < max_bytes for text in texts]))
        live = jax.device_get(state.live)
        if not live.any():
            return [_cut(read, row, max_bytes, *new) for row, new in enumerate(zip(tokens, logprobs))]
        most = max(max_bytes - len(text) for text, alive in zip(texts, live) if alive)
        fewest = min(len(new) for new, alive in zip(tokens, live) if alive)
        state = engine.run(params, state, fewest + (min(most, chunk) if on_text else most))


def _cut(read, row: int, max_bytes: int, tokens: list[int], logprobs: list[float]) -> Continued:
    text, count = read(row, tokens)[:max_bytes], len(tokens)
    while count and len(read(row, tokens[: count - 1])) >= max_bytes:
        count -= 1
    return Continued(text, tokens[:count], logprobs[:count])


def texts_and_logprobs(
    rows: Sequence[Continued], logprobs: bool
) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
    """The result of `jaxtok.protocols.TextGenerator.continue_text`."""
    texts = [row.text for row in rows]
    return (texts, [row.logprobs for row in rows]) if logprobs else texts
