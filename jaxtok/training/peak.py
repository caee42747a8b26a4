"""The arithmetic rate that a device can reach: published for accelerators, measured for a CPU."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

PEAK_FLOPS = {  # dense bfloat16, per device, as the vendors publish it
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


@functools.cache
def peak_flops(kind: str | None = None) -> float | None:
    """Returns the FLOP/s of one device; None if its kind is unknown. On a CPU, float32 products are measured, once."""
    device = jax.devices()[0]
    kind = kind or device.device_kind
    if device.platform == "cpu":
        return matmul_rate()
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def matmul_rate(n: int = 2048, seconds: float = 0.5) -> float:
    """Returns the FLOP/s of float32 products of n x n matrices, the best of those that fit into the time."""
    product = jax.jit(jnp.matmul)
    a = jax.random.normal(jax.random.key(0), (n, n))
    product(a, a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
