"""Optimizers from optax by name, and the learning-rate schedules of GPT-NeoX."""

from __future__ import annotations

import dataclasses
import math
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
        if self.clip < 0 or self.weight_decay < 0:
            raise ValueError(f"clip is {self.clip} and weight_decay {self.weight_decay}; neither can be negative.")


def learning_rate(config: OptimizerConfig, step: Any, steps: int) -> jax.Array:
    """The rate of update `step` (from 0) in a run of `steps`, as GPT-NeoX's AnnealingLR has it, in float32.

    With w = warmup * steps, which is not rounded, the rate is lr * step / w up to step w (so the very first update has
    rate 0), and behind it, never below the minimum:
        cosine       min + (lr - min) / 2 * (1 + cos(pi (step - w) / (steps - w)))
        linear       lr (steps - step) / (steps - w)
        exponential  lr exp(-0.693 (step - w) / (steps - w))
        constant     lr
    """
    high, low = config.learning_rate, config.min_learning_rate
    step = jnp.asarray(step, jnp.float32)
    warm = config.warmup * steps
    part = (step - warm) / (steps - warm)
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
    return jnp.where(step <= warm, high * step / warm, rate) if warm else rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The direction of the update, to be multiplied by minus the learning rate."""
    scale = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "sgd": lambda: optax.trace(config.b1),
    }[config.name]()
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(scale)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts)


def decayed(params: Any) -> Any:
    """True for the parameters under weight decay: all but scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
