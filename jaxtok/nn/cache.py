"""The key-value cache of a decoder: static shapes, a length of its own for every row, a position for every slot."""

from __future__ import annotations

from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

EMPTY = -1
"""The position of a slot that holds nothing."""


@flax.struct.dataclass
class KVCache:
    """Keys (after rotation) and values of every layer, and the positions of their tokens.

    Which queries see a slot depends on its position, not on its number, so slots can be dropped and moved. A row's next
    token goes to slot `length`, and slots from there on are empty. A layer or head that keeps fewer tokens than the
    longest of its row has more empty slots.
    """

    keys: Float[Array, "layers batch slots heads head_dim"]
    values: Float[Array, "layers batch slots heads head_dim"]
    positions: Int[Array, "#layers batch slots #heads"]
    """The position of each slot's token; -1: the slot is empty. Layers and heads share one until `gather` keeps
    different slots in each."""
    length: Int[Array, " batch"]
    context: tuple[Array, Array] | None = None
    """The keys and values of what cross-attention looks at, in the same layout; None: there is none (yet)."""
    prompts: Int[Array, " batch"] | None = None
    """The lengths of the rows' prompts, for a model that depends on them; None: nobody has asked."""

    rewindable: ClassVar[bool] = True

    @classmethod
    def init(
        cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype=jnp.float32, context_slots: int = 0
    ) -> KVCache:
        def empty(slots):
            return jnp.zeros((layers, batch, slots, heads, head_dim), dtype)

        context = (empty(context_slots), empty(context_slots)) if context_slots else None
        positions = jnp.full((1, batch, slots, 1), EMPTY, jnp.int32)
        return cls(empty(slots), empty(slots), positions, jnp.zeros(batch, jnp.int32), context)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    @property
    def next_position(self) -> Int[Array, " batch"]:
        """One above the largest position of each row. It is not the length once slots have been dropped."""
        return self.positions.max((0, 2, 3)) + 1

    def newest(self, new: int) -> Int[Array, "batch new"]:
        """The numbers of each row's last `new` slots."""
        return self.length[:, None] - new + jnp.arange(new)

    def advance(self, positions: Int[Array, "#batch new"]) -> KVCache:
        """Counts new slots, for tokens at these positions; each layer then appends its keys and values.

        A token at position -1 is padding: its slot stays empty. The caller must see to it that length + new <= slots;
        tokens beyond that are lost.
        """
        rows, new = jnp.arange(self.length.shape[0])[:, None], positions.shape[1]
        longer = self.replace(length=self.length + new)
        positions = jnp.broadcast_to(positions, (len(rows), new)).astype(jnp.int32)
        slots = longer.newest(new)
        return longer.replace(positions=self.positions.at[:, rows, slots].set(positions[None, :, :, None], mode="drop"))

    def append(self, layer, keys: Array, values: Array) -> KVCache:
        """Writes one layer's keys and values [batch, new, heads, head_dim] to each row's last `new` slots."""
        batch, new = keys.shape[:2]
        index = (layer, jnp.arange(batch)[:, None], self.newest(new))
        return self.replace(
            keys=self.keys.at[index].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[index].set(values.astype(self.values.dtype), mode="drop"),
        )

    def truncate(self, length: Int[Array, " batch"]) -> KVCache:
        """Empties the slots from `length` on, for each row. It never lengthens a row."""
        length = jnp.minimum(self.length, length)
        kept = (jnp.arange(self.slots) < length[:, None])[None, :, :, None]
        return self.replace(positions=jnp.where(kept, self.positions, EMPTY), length=length)

    def keep_newest(self, new: int, index: Int[Array, "batch new"], count: Int[Array, " batch"]) -> KVCache:
        """Of each row's last `new` slots, keeps the first `count` of `index` (from 0), in that order."""
        rows, first = jnp.arange(self.length.shape[0])[:, None], self.length - new
        source, target = first[:, None] + index, self.newest(new)

        def moved(x):
            return x.at[:, rows, target].set(x.at[:, rows, source].get(mode="clip"), mode="drop")

        kept = self.replace(keys=moved(self.keys), values=moved(self.values), positions=moved(self.positions))
        return kept.truncate(first + count)

    def gather(
        self,
        index: Int[Array, "batch kept"] | Int[Array, "layers batch kept"] | Int[Array, "layers batch heads kept"],
        count: Int[Array, ...] | None = None,
    ) -> KVCache:
        """Keeps the slots `index` of each row, or of each layer, or of each of its heads, in that order.

        The positions move with the slots. The new cache has `kept` slots; a longer index makes room for later tokens.

        Args:
          count: how many of the kept slots hold a token; the others are empty. Its shape is [batch], or that of the
            index without its last dimension. Default: all of them.
        """
        kept = index.shape[-1]
        if index.ndim == 2:
            index = index[None]
        index = jnp.moveaxis(index, 3, 2) if index.ndim == 4 else index[..., None]  # [#layers, batch, kept, #heads]
        count = jnp.full(self.length.shape, kept, jnp.int32) if count is None else jnp.minimum(count, kept)
        if count.ndim == 1:
            count = count[None]
        count = count if count.ndim == 3 else count[..., None]  # [#layers, batch, #heads]
        positions = jnp.take_along_axis(self.positions, index, axis=2, mode="clip")
        return self.replace(
            keys=jnp.take_along_axis(self.keys, index[..., None], axis=2, mode="clip"),
            values=jnp.take_along_axis(self.values, index[..., None], axis=2, mode="clip"),
            positions=jnp.where(jnp.arange(kept)[:, None] < count[:, :, None], positions, EMPTY),
            length=count.max((0, 2)).astype(jnp.int32),
        )


def check_row(length: int, longest: int, segments: Array | None, cache: KVCache | None) -> None:
    """Checks the arguments of a causal model's call.

    Raises:
      ValueError: the row has more than `longest` tokens, or there are both segments and a cache.
    """
    if length > longest:
        raise ValueError(f"there are {length} tokens in a row; the model's max_length is {longest}.")
    if cache is not None and segments is not None:
        raise ValueError("segments and a cache were given together; a cached row is one segment.")


def places_of(x: Array, cache: KVCache | None) -> Int[Array, "batch length"]:
    """The positions of new tokens x [batch, length, ...]: 0, 1, ..., or those after what each row's cache holds."""
    first = jnp.zeros((len(x), 1), jnp.int32) if cache is None else cache.next_position[:, None]
    return first + jnp.arange(x.shape[1])


def entered(
    x: Array, positions: Array | None, cache: KVCache | None, first_layer: int = 0
) -> tuple[Int[Array, "#batch length"], KVCache | None]:
    """The positions of tokens x [batch, length, ...] that enter a stack, and the cache with slots for them.

    Tokens that enter at a layer after the first are in the newest slots already. Without a cache, and if they are not
    given, the positions have a batch of 1, as all rows are equal.
    """
    if cache is not None and first_layer:
        if positions is None:
            positions = jnp.take_along_axis(cache.positions.max((0, 3)), cache.newest(x.shape[1]), axis=1)
        return positions, cache
    if positions is None:
        positions = places_of(x[:1] if cache is None else x, cache)
    return positions, None if cache is None else cache.advance(positions)
