"""Rectified flow between data and noise (arXiv 2209.03003, as in SD3, arXiv 2403.03206): training and sampling.

Time runs from data, t = 0, to noise, t = 1:

    x_t = t noise + (1 - t) x_0,   v = noise - x_0,   loss = mean |v(x_t, t) - v|^2

Sampling takes n Euler steps x <- x - v(x, i / n) / n for i = n, ..., 1, so the model is never asked at t = 0. All of it
is in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TIMES = ("logit_normal", "stratified", "uniform", "mode")
Times = Literal["logit_normal", "stratified", "uniform", "mode"]

Field = Callable[[Array, Array, bool], tuple[Array, Array | None]]
"""Maps x, the times [batch], and whether guidance needs it, to the velocities with and without the condition."""


def noised(x: Float[Array, "batch ..."], noise: Float[Array, "batch ..."], t: Float[Array, " batch"]) -> Array:
    """x_t = t noise + (1 - t) x."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return t * noise + (1 - t) * x


def velocity_error(
    v: Float[Array, "batch ..."], x: Float[Array, "batch ..."], noise: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """The mean squared error of a velocity, for each row."""
    return jnp.mean(jnp.square(v.astype(jnp.float32) - (noise - x)), tuple(range(1, x.ndim)))


def times_of(
    kind: Times, draws: Float[Array, " batch"], *, shift: float = 0.0, mode_scale: float = 1.29
) -> Float[Array, " batch"]:
    """Training times from raw draws, which are standard normal for logit_normal, and uniform in [0, 1) for the rest.

    logit_normal  sigmoid(shift + n)
    stratified    sigmoid(shift + Phi^-1((i + u_i) / B)), with i the number of the row in the batch
    uniform       u
    mode          1 - u - s (cos^2(pi u / 2) - 1 + u), of SD3, with the scale s
    """
    match kind:
        case "logit_normal":
            return jax.nn.sigmoid(shift + draws)
        case "stratified":
            rank = (jnp.arange(len(draws)) + draws) / len(draws)
            return jax.nn.sigmoid(shift + jax.scipy.special.ndtri(rank))
        case "uniform":
            return draws
        case "mode":
            return 1 - draws - mode_scale * (jnp.square(jnp.cos(math.pi * draws / 2)) - 1 + draws)
    raise ValueError(f"times is {kind!r}; it must be one of {', '.join(TIMES)}.")


def draw_times(rng: jax.Array, count: int, kind: Times, **options: float) -> Float[Array, " batch"]:
    """Training times of a batch; options as in `times_of`."""
    draw = jax.random.normal if kind == "logit_normal" else jax.random.uniform
    return times_of(kind, draw(rng, (count,)), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the velocities with and without the condition become one: classifier-free guidance, or APG (arXiv
    2410.02416).

    cfg: v = v_u + w (v_c - v_u). apg: of the difference d = v_c - v_u, with r <- d + momentum r over the steps,

        d = r min(1, threshold / |r|),   d <- (d - its part along v_c) + eta (its part along v_c),   v = v_c + (w - 1) d

    with norms over a whole row. Where w = 1 at all steps, there is no pass without the condition.
    """

    scale: float | Callable[[float], float] = 1.0
    """w, a number or a function of t."""
    apg: bool = False
    momentum: float | None = -0.5
    """The weight of the differences of the steps before; None: no memory of them."""
    eta: float = 0.0
    """The weight of the part of the difference along v_c."""
    threshold: float = 2.5
    """The greatest norm of the difference; 0: any."""

    def __post_init__(self):
        if not callable(self.scale) and not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be a finite number (1 is no guidance).")
        if self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}; it must be 0 or more.")

    def weights(self, steps: int) -> Float[np.ndarray, " steps"]:
        """w at each of n steps, in their order: at t = 1 first, at t = 1 / n last.

        Raises:
          ValueError: there are no steps.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1.")
        times = np.arange(steps, 0, -1) / steps
        scale = self.scale
        return np.array([scale(float(t)) if callable(scale) else scale for t in times], np.float32)

    def combine(
        self, cond: Float[Array, "batch ..."], uncond: Float[Array, "batch ..."], weight: Array | float, memory: Array
    ) -> tuple[Array, Array]:
        """The velocity, and r for the next step.

        Args:
          memory: r of the step before; zeros at first.
        """
        if not self.apg:
            return uncond + weight * (cond - uncond), memory
        axes = tuple(range(1, cond.ndim))

        def dot(a, b):
            return jnp.sum(a * b, axes, keepdims=True)

        difference = cond - uncond
        if self.momentum is not None:
            difference = memory = difference + self.momentum * memory
        if self.threshold:
            square = dot(difference, difference)
            length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
            difference *= jnp.where(square > 0, jnp.minimum(1.0, self.threshold / length), 1.0)
        along = dot(cond, cond)
        parallel = dot(difference, cond) / jnp.where(along > 0, along, 1.0) * cond
        return cond + (weight - 1) * (difference - parallel + self.eta * parallel), memory


def euler(
    field: Field, noise: Float[Array, "batch ..."], steps: int, guidance: Guidance = Guidance()
) -> Float[Array, "batch ..."]:
    """The data that the flow carries the noise to.

    Args:
      field: the velocities; it is called once a step.
      steps: the number of steps.

    Raises:
      ValueError: there are no steps.
    """
    weights = guidance.weights(steps)
    guided = bool((weights != 1).any())
    times = (np.arange(steps, 0, -1) / steps).astype(np.float32)

    def step(carry, now):
        x, memory = carry
        t, weight = now
        cond, uncond = field(x, jnp.full(len(x), t), guided)
        v = cond.astype(jnp.float32)
        if guided:
            v, memory = guidance.combine(v, uncond.astype(jnp.float32), weight, memory)
        return (x - v / steps, memory), None

    x = noise.astype(jnp.float32)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), (times, weights))
    return x
