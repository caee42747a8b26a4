"""Sampling from any CausalLM with its static key-value cache: greedy, temperature, top-k and top-p (nucleus)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.protocols import CausalLM, Params

_BUCKET = 64  # prompts are padded to a multiple of this, so that those of similar length share a compiled function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The restrictions apply in this order: temperature, top_k, top_p."""

    temperature: float = 1.0
    """Logits are divided by it; 0: the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the smallest set of most likely tokens whose probability is at least p (arXiv 1904.09751); 1: all."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive, or 0 for greedy decoding.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be positive, or 0 for no limit.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")


def sampling_key(rng: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The key, or where none is needed any.

    Raises:
      ValueError: it is needed, as the temperature is not 0, and None.
    """
    if rng is None and sampling.temperature:
        raise ValueError("rng is None; give a key such as jax.random.key(0), or decode with temperature 0.")
    return jax.random.key(0) if rng is None else rng


def sample(
    logits: Float[Array, "batch vocab"], rng: jax.Array | None, sampling: Sampling = Sampling()
) -> Int[Array, " batch"]:
    """One token for each row, in float32. Each row has a key of its own, so rows do not depend on each other.

    `rng` is not used (and may be None) at temperature 0.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1)
    # With the largest logit at 0, a tiny temperature sends the others to minus infinity and nothing to NaN.
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        vocab = logits.shape[-1]
        logits, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
        if sampling.top_p < 1:
            probability = jax.nn.softmax(logits)
            more_likely = jnp.cumsum(probability, -1) - probability
            logits = jnp.where(more_likely < sampling.top_p, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(logits.shape[0]))
    choice = jax.vmap(jax.random.categorical)(keys, logits)
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], -1)[:, 0]


def generate(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    rng: jax.Array | None = None,
    stop_tokens: Collection[int] = (),
    num_ids: int | None = None,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    chunk: int = 16,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its prompt, on `rng` and on its place in the batch, not on the other rows nor on `chunk`.

    Args:
      model: with a config that has `vocab_size` and `max_length`; hashable, as Linen modules with frozen configs are.
      params: its parameters.
      prompts: token ids, of any lengths.
      max_new_tokens: at most so many for each prompt.
      sampling: how a token is chosen.
      rng: a key; needed unless the temperature is 0.
      stop_tokens: a row ends behind the first of these.
      num_ids: only ids below this are chosen: the tokenizer's vocabulary size, where the model's is padded.
      on_tokens: called with each row's new tokens, every `chunk` tokens (streaming).
      chunk: tokens a row between two of these calls.

    Returns:
      The new tokens of each row, without the prompt, including the stop token that ended the row if one did.

    Raises:
      ValueError: no prompt, an empty one or one with an unknown id; more tokens than max_length; no rng.
    """
    vocab, max_length = model.config.vocab_size, model.config.max_length
    num_ids = vocab if num_ids is None else num_ids
    if max_new_tokens < 1 or chunk < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and chunk is {chunk}; both must be at least 1.")
    if not 1 <= num_ids <= vocab:
        raise ValueError(f"num_ids is {num_ids}; it must be between 1 and the model's vocab_size = {vocab}.")
    rng = sampling_key(rng, sampling)
    lengths = _check_prompts(prompts, vocab)
    if max(lengths) + max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and max_new_tokens = {max_new_tokens} exceed the model's max_length = "
            f"{max_length}; shorten one of them."
        )

    padded = min(-(-max(lengths) // _BUCKET) * _BUCKET, max_length)
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = _prefill(model, params, tokens, np.array(lengths, np.int32), max_new_tokens)
    stop = np.array(sorted(stop_tokens), np.int32)
    rows: list[list[int]] = [[] for _ in prompts]
    done = 0
    while done < max_new_tokens:
        until = min(done + chunk, max_new_tokens) if on_tokens else max_new_tokens
        state = _decode(model, sampling, num_ids, params, state, rng, stop, until)
        new = [row[row >= 0].tolist() for row in jax.device_get(state.new_tokens)[:, done:until]]
        rows = [row + tokens for row, tokens in zip(rows, new, strict=True)]
        if on_tokens:
            on_tokens(new)
        if jax.device_get(state.stopped).all():
            break
        done = until
    return rows


@flax.struct.dataclass
class _State:
    """Decoding between two tokens. The cache holds all but the last token of each row."""

    cache: Any
    last: Int[Array, " batch"]
    new_tokens: Int[Array, "batch max_new_tokens"]  # -1 where there is none (yet)
    stopped: Bool[Array, " batch"]
    step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _prefill(
    model, params, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], max_new_tokens
) -> _State:
    batch, length = tokens.shape
    slots = min(length + max_new_tokens, model.config.max_length)
    # The logits are not used, so the compiler drops the head; the first decoding step runs the last token again.
    _, cache = model.apply({"params": params}, tokens, cache=model.init_cache(batch, slots))
    return _State(
        cache=cache.truncate(lengths - 1),
        last=jnp.take_along_axis(tokens, lengths[:, None] - 1, 1)[:, 0],
        new_tokens=jnp.full((batch, max_new_tokens), -1, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("model", "sampling", "num_ids"), donate_argnames="state")
def _decode(model, sampling, num_ids, params, state: _State, rng, stop: Int[Array, " stops"], until) -> _State:
    """Decodes up to token number `until`, or until all rows have stopped."""

    def step(state: _State) -> _State:
        logits, cache = model.apply({"params": params}, state.last[:, None], cache=state.cache)
        token = sample(logits[:, 0, :num_ids], jax.random.fold_in(rng, state.step), sampling)
        return _State(
            cache=cache,
            last=token,
            new_tokens=state.new_tokens.at[:, state.step].set(jnp.where(state.stopped, -1, token)),
            stopped=state.stopped | jnp.isin(token, stop),
            step=state.step + 1,
        )

    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.stopped.all(), step, state)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> list[int]:
    """The prompts' lengths."""
    if not len(prompts):
        raise ValueError("there is no prompt; give at least one.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; begin it with the tokenizer's eod_id.")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab:
            raise ValueError(
                f"prompt {number} has the id {low if low < 0 else high}, but the model's vocabulary has the ids 0 to "
                f"{vocab - 1}; encode it with the model's own tokenizer."
            )
    return [len(prompt) for prompt in prompts]
