"""Ahead-of-time loading of experts (M2R2, arXiv 2502.02040): which ones to load, and a simulation of what it saves.

In a mixture of experts whose experts do not fit into fast memory, those of layer i + m can be loaded while layer i
computes, if they are known: M2R2 predicts them from its accelerated residual stream. All times here are simulated, in
any unit; nothing is measured on hardware.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NONE = -1
"""In place of a predicted expert: nothing is loaded."""


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """The outcome of a simulation."""

    hits: int
    """Requests whose expert was in fast memory, or on its way there."""
    misses: int
    stall: Float[np.ndarray, "tokens layers"]
    """How long each layer waited for its experts."""
    total_time: float
    """When the last layer of the last token has computed: all compute times and all stalls."""


def simulate_expert_prefetch(
    required: Int[np.ndarray, "tokens layers top_k"],
    predicted: Int[np.ndarray, "tokens layers top_k"] | None = None,
    *,
    capacity: int,
    t_load: float,
    t_compute: float = 1.0,
    lead: int = 1,
    experts: int | None = None,
) -> Prefetch:
    """Simulates fast memory for `capacity` experts in each layer (the least recently used goes) and one channel.

    Before layer l of a token, loads are issued for the experts predicted for layer l + lead of the same token, if it
    exists, that are absent; those that are present count as used. Then each required expert is a hit if it is present,
    though it may still be loading, or else a miss, which is loaded. The channel loads one expert at a time, in their
    order. The layer computes when all its experts are there.

    Args:
      required: the experts of each token and layer.
      predicted: the predicted ones, or -1 for none; None: loading on demand only. With predicted = required, the
        prediction is perfect.
      capacity: the experts of a layer that fit.
      t_load, t_compute: the time of loading one expert, and of one layer's computing.
      experts: the number of experts of a layer, to check ids by; default: not checked above.

    Raises:
      ValueError: a size or time is impossible, or an id is not that of an expert.

    >>> required = np.zeros((1, 3, 1), int)  # a token, three layers, one expert in each
    >>> simulate_expert_prefetch(required, capacity=1, t_load=1).total_time
    6.0
    >>> simulate_expert_prefetch(required, predicted=required, capacity=1, t_load=1).total_time
    5.0
    """
    required = np.asarray(required)
    if required.ndim != 3 or (predicted is not None and np.shape(predicted)[:2] != required.shape[:2]):
        shapes = required.shape, None if predicted is None else np.shape(predicted)
        raise ValueError(f"required and predicted have the shapes {shapes}; both must be [tokens, layers, top_k].")
    tokens, layers, top_k = required.shape
    if capacity < top_k:
        raise ValueError(f"capacity is {capacity}; it must be at least top_k = {top_k}, the experts of a layer.")
    if lead < 1 or not (t_load >= 0 and t_compute >= 0):
        raise ValueError(
            f"lead is {lead}, t_load {t_load} and t_compute {t_compute}; lead must be at least 1, times at least 0."
        )
    for name, ids, lowest in (("required", required, 0), ("predicted", predicted, NONE)):
        wrong = [] if ids is None else np.ravel(ids)[(np.ravel(ids) < lowest) | (np.ravel(ids) >= (experts or np.inf))]
        if len(wrong):
            raise ValueError(f"{name} has the id {wrong[0]}; experts are 0 to {experts - 1 if experts else '...'}.")

    memory: list[dict[int, float]] = [{} for _ in range(layers)]  # expert -> when it is ready; the least used first
    now = free = 0.0  # the end of the last computing; when the channel is free
    hits = misses = 0
    stall = np.zeros((tokens, layers))

    def use(layer: int, expert: int) -> float | None:
        """When a present expert is ready; None: it is absent."""
        slots = memory[layer]
        if expert not in slots:
            return None
        slots[expert] = slots.pop(expert)  # now the most recently used
        return slots[expert]

    def load(layer: int, expert: int) -> float:
        nonlocal free
        slots = memory[layer]
        if len(slots) == capacity:
            del slots[next(iter(slots))]
        free = max(now, free) + t_load
        slots[expert] = free
        return free

    for token in range(tokens):
        for layer in range(layers):
            if predicted is not None and layer + lead < layers:
                for expert in map(int, predicted[token, layer + lead]):
                    if expert == NONE:
                        continue
                    if use(layer + lead, expert) is None:
                        load(layer + lead, expert)
            ready = now
            for expert in map(int, required[token, layer]):
                present = use(layer, expert)
                hits, misses = hits + (present is not None), misses + (present is None)
                ready = max(ready, load(layer, expert) if present is None else present)
            stall[token, layer] = ready - now
            now = ready + t_compute
    return Prefetch(hits, misses, stall, now)


def predict_experts(
    states: Float[Array, "layers *tokens d_model"],
    scores: Callable[[int, Array], Float[Array, "*tokens experts"]],
    lead: int,
    top_k: int,
    num_layers: int,
) -> Int[Array, "predicted *tokens top_k"]:
    """The experts of layer i + lead, as its own router chooses them from a state before layer i.

    Args:
      states: the stream (p of M2R2, or h) before layers 0, 1, ...; not necessarily before all layers.
      scores: the scores of a layer's experts from a state, with the layer's norm.
      num_layers: how many layers the model has.

    Returns:
      Row i is the prediction for layer i + lead, for all i with such a layer.
    """
    count = min(len(states), num_layers - lead)
    return jnp.stack([jax.lax.top_k(scores(layer + lead, states[layer]), top_k)[1] for layer in range(count)])


def recall(predicted: Int[Array, "*shape top"], required: Int[Array, "*shape top_k"]) -> Float[Array, ""]:
    """The share of required experts that are among the predicted ones; with equally many, it is also the precision."""
    return (required[..., :, None] == predicted[..., None, :]).any(-1).mean()
