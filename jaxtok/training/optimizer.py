"""Optimizers from optax by name, and the learning-rate schedules of GPT-NeoX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("adamw", "lion", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "exponential", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer, its schedule and clipping; defaults: the TokenFormer recipe."""

    name: Literal["adamw", "lion", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 6e-4
    min_learning_rate: float = 6e-5
    """No learning rate behind the warm-up is below it."""
    schedule: Literal["cosine", "linear", "exponential", "constant"] = "cosine"
    warmup: float = 0.01
    """The part of the steps in which the rate rises from 0."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; not on the scales and biases of norms, nor on biases."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    bias_correction: bool = True
    """Adam's division of the moments by 1 - b^t; BERT's and ELECTRA's code has none."""
    warmup_times_decay: bool = False
    """The rate decays from the first step on, and the warm-up is a factor of it (BERT's and ELECTRA's code)."""
    layer_decay: float = 1.0
    """In a stack of n layers, layer i (from 0) learns at the rate times this to the power n + 1 - i, what is in front
    of the layers at n + 2, and what is behind them at 0 (ELECTRA's fine-tuning)."""

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name is {self.name!r}; it can be {', '.join(OPTIMIZERS)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; it can be {', '.join(SCHEDULES)}.")
        if self.learning_rate <= 0 or not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"learning_rate is {self.learning_rate} and min_learning_rate {self.min_learning_rate}; "
                "the first must be positive and the second between 0 and the first."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a part of the steps, in [0, 1).")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be in (0, 1].")
        if self.clip < 0 or self.weight_decay < 0:
            raise ValueError(f"clip is {self.clip} and weight_decay {self.weight_decay}; neither can be negative.")


def learning_rate(config: OptimizerConfig, step: Any, steps: int) -> jax.Array:
    """The rate of update `step` (from 0) in a run of `steps`, as GPT-NeoX's AnnealingLR has it, in float32.

    With w = warmup * steps, which is not rounded, the rate is lr * step / w up to step w (so the very first update has
    rate 0), and behind it, never below the minimum (with `warmup_times_decay`, w = 0 in what follows, and step / w is a
    factor of it):
        cosine       min + (lr - min) / 2 * (1 + cos(pi (step - w) / (steps - w)))
        linear       lr (steps - step) / (steps - w)
        exponential  lr exp(-0.693 (step - w) / (steps - w))
        constant     lr
    """
    high, low = config.learning_rate, config.min_learning_rate
    step = jnp.asarray(step, jnp.float32)
    warm = config.warmup * steps
    part = step / steps if config.warmup_times_decay else (step - warm) / (steps - warm)
    match config.schedule:
        case "cosine":
            rate = low + (high - low) / 2 * (1 + jnp.cos(math.pi * part))
        case "linear":
            rate = high * (1 - part)
        case "exponential":
            rate = high * jnp.exp(-0.693 * part)
        case _:
            rate = jnp.full_like(step, high)
    rate = jnp.maximum(rate, low)
    if config.warmup_times_decay and warm:
        return rate * jnp.minimum(step / warm, 1)
    return jnp.where(step <= warm, high * step / warm, rate) if warm else rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The direction of the update, to be multiplied by minus the learning rate."""
    scale = {
        "adamw": lambda: _adam(config),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "sgd": lambda: optax.trace(config.b1),
    }[config.name]()
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(scale)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if config.layer_decay < 1:
        parts.append(optax.stateless(lambda updates, _: decay_by_layer(updates, config.layer_decay)))
    return without_frozen(optax.chain(*parts))


def without_frozen(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of all parameters but those under `frozen` at the top of the tree, which stay and have no state."""

    def rest(tree):
        return {name: part for name, part in tree.items() if name != "frozen"} if is_split(tree) else tree

    def is_split(tree):
        return isinstance(tree, Mapping) and "frozen" in tree

    def update(updates, state, params=None):
        changed, state = optimizer.update(rest(updates), state, rest(params))
        if is_split(updates):
            changed = {**changed, "frozen": jax.tree.map(jnp.zeros_like, updates["frozen"])}
        return changed, state

    return optax.GradientTransformation(lambda params: optimizer.init(rest(params)), update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's Adam, whose first moments are (1 - b1^t) and second moments (1 - b2^t) of what they are corrected to."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.bias_correction:
        return adam

    def update(updates, state, params=None):
        _, state = adam.update(updates, state, params)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


_IN_FRONT = re.compile(r"(^|_)(embeddings?|positions)(_|$)")


def decay_by_layer(updates: Any, decay: float) -> Any:
    """Updates of a model with one stack of layers (parameters under `blocks`), smaller the further from its end.

    Raises:
      ValueError: there is no stack, or more than one.
    """
    paths = jax.tree_util.tree_leaves_with_path(updates)
    stacks = {path[: _block(path)]: len(leaf) for path, leaf in paths if _block(path) is not None}
    if len(stacks) != 1:
        raise ValueError(f"layer_decay needs a model with one stack of layers; this one has {len(stacks)}.")
    (count,) = stacks.values()

    def scaled(path, update):
        if _block(path) is not None:
            factor = decay ** (count + 1 - jnp.arange(count, dtype=update.dtype))
            return update * factor.reshape(-1, *[1] * (update.ndim - 1))
        in_front = any(_IN_FRONT.search(key.key) for key in path)
        return update * decay ** (count + 2) if in_front else update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _block(path: Any) -> int | None:
    """Where in a path the layers of a stack are."""
    return next((k for k, key in enumerate(path) if key.key == "blocks"), None)


def decayed(params: Any) -> Any:
    """True for the parameters under weight decay: all but scales and biases."""
    kept = ("scale", "bias", "head_bias")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in kept, params)
