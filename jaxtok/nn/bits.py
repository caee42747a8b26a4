"""Converts bits to codes and back: ELM's vocabulary decomposition (section 3). For arrays of NumPy and of JAX."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Int, Shaped

MAX_BITS = 31
"""The most bits of a code, which is an int32."""


def pack_bits(bits: Shaped[Array, "*shape bits"], sub_codes: int = 1) -> Int[Array, "*shape sub_codes"]:
    """Cuts the bits into `sub_codes` runs, each a number whose first bit is the most significant.

    Raises:
      ValueError: `sub_codes` does not divide the bits, or a run has more than 31.
    """
    count = bits.shape[-1]
    check_bits(count, sub_codes)
    runs = bits.astype(np.int32).reshape(*bits.shape[:-1], sub_codes, count // sub_codes)
    return (runs << np.arange(runs.shape[-1] - 1, -1, -1, dtype=np.int32)).sum(-1, dtype=np.int32)


def unpack_bits(codes: Int[Array, "*shape sub_codes"], count: int) -> Int[Array, "*shape bits"]:
    """The inverse of `pack_bits`, int32; `count` is the number of bits in all sub-codes together."""
    sub_codes = codes.shape[-1]
    check_bits(count, sub_codes)
    shifts = np.arange(count // sub_codes - 1, -1, -1, dtype=np.int32)
    bits = (codes.astype(np.int32)[..., None] >> shifts) & 1
    return bits.reshape(*codes.shape[:-1], count)


def check_bits(count: int, sub_codes: int) -> None:
    """Raises ValueError if `count` bits cannot be cut into `sub_codes` equal sub-codes of at most `MAX_BITS`."""
    if count < 1 or sub_codes < 1 or count % sub_codes:
        raise ValueError(
            f"bits is {count} and sub_codes {sub_codes}; both must be positive, and sub_codes must divide bits."
        )
    if count // sub_codes > MAX_BITS:
        raise ValueError(
            f"bits is {count} in {sub_codes} sub-codes; a sub-code must have at most {MAX_BITS}: choose more sub_codes."
        )
