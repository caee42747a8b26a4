"""The key-value cache of a decoder: static shapes, a length of its own for every row."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class KVCache:
    """Keys (after rotation) and values of every layer. Slots from `length` on hold nothing that counts."""

    keys: Float[Array, "layers batch slots heads head_dim"]
    values: Float[Array, "layers batch slots heads head_dim"]
    length: Int[Array, " batch"]
    context: tuple[Array, Array] | None = None
    """Keys and values of what cross-attention looks at, of the same layout; None: there is none (yet)."""

    @classmethod
    def init(
        cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype=jnp.float32, context_slots: int = 0
    ) -> KVCache:
        def empty(slots):
            return jnp.zeros((layers, batch, slots, heads, head_dim), dtype)

        context = (empty(context_slots), empty(context_slots)) if context_slots else None
        return cls(empty(slots), empty(slots), jnp.zeros(batch, jnp.int32), context)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def append(self, layer, keys: Array, values: Array) -> KVCache:
        """Writes one layer's new keys and values [batch, new, heads, head_dim] behind each row's length.

        The length stays: all layers write first, then `advance` counts the new slots. The caller sees to it that
        length + new <= slots; what is beyond is lost.
        """
        batch, new = keys.shape[:2]
        place = (layer, jnp.arange(batch)[:, None], self.length[:, None] + jnp.arange(new))
        return self.replace(
            keys=self.keys.at[place].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[place].set(values.astype(self.values.dtype), mode="drop"),
        )

    def advance(self, new: int | Array) -> KVCache:
        return self.replace(length=self.length + new)

    def truncate(self, length: Int[Array, " batch"]) -> KVCache:
        """Forgets the slots from `length` on, for each row (never lengthens)."""
        return self.replace(length=jnp.minimum(self.length, length))

    def gather(self, index: Int[Array, "batch kept"], length: Int[Array, " batch"] | None = None) -> KVCache:
        """Keeps the slots `index` of each row, in that order; `length` of them count (default: all of them)."""
        take = jax.vmap(lambda row, i: row[:, i], in_axes=(1, 0), out_axes=1)
        kept = jnp.full_like(self.length, index.shape[1]) if length is None else length
        return self.replace(keys=take(self.keys, index), values=take(self.values, index), length=kept)


def check_row(length: int, longest: int, segments: Array | None, cache: KVCache | None) -> None:
    """Of a causal model's call.

    Raises:
      ValueError: the row is longer than the model's longest, or has segments and a cache.
    """
    if length > longest:
        raise ValueError(f"there are {length} tokens in a row, but the model's max_length is {longest}.")
    if cache is not None and segments is not None:
        raise ValueError("segments and a cache were given together; a cached row is one segment.")


def places_of(x: Array, cache: KVCache | None) -> Int[Array, "batch length"]:
    """The positions of new tokens x [batch, length, ...]: 0, 1, ..., or behind what each row's cache holds."""
    first = jnp.zeros((len(x), 1), jnp.int32) if cache is None else cache.length[:, None]
    return first + jnp.arange(x.shape[1])
