"""Masked words: some places of a row are chosen and hidden, on the device; the Task is to predict what stood there.

This is BERT's objective (arXiv 1810.04805, section 3.1), with as many places in a row as in `google-research/electra`
(`pretrain_helpers.mask`). All shapes are static: a row has a fixed number of slots, of which some may have weight 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.lm.bert import Bert, BertConfig
from jaxtok.lm.fitting import fit_text
from jaxtok.nn.losses import bits_per_byte, cross_entropy
from jaxtok.protocols import Batch, Data, Params, Sums, Task


class Slots(NamedTuple):
    """The chosen places of each row. A slot that is left over has place 0 and weight 0."""

    places: Int[Array, "batch slots"]
    weights: Float[Array, "batch slots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """How many places of a row are chosen, and what hides them. Defaults: ELECTRA's, with BERT's word pieces."""

    rate: float = 0.15
    """The part of a row's real places that is chosen."""
    mask_share: float = 0.85
    """The part of the chosen places that becomes the mask; BERT: 0.8."""
    random_share: float = 0.0
    """The part of the chosen places that becomes any word of the vocabulary; BERT: 0.1. The rest stays as it is."""
    mask_id: int = 103
    kept_ids: tuple[int, ...] = (101, 102)
    """Ids that are never chosen, besides the mask itself; by default [CLS] and [SEP]."""
    with_replacement: bool = False
    """Whether a place may be chosen more than once (the authors' code); otherwise all are distinct (the paper)."""

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"masking.rate is {self.rate}; it must be in (0, 1).")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError(
                f"masking.mask_share is {self.mask_share} and random_share {self.random_share}; "
                "they must be 0 or more, and their sum at most 1."
            )
        if min(self.mask_id, *self.kept_ids, 0) < 0:
            raise ValueError(f"masking.mask_id is {self.mask_id} and kept_ids {self.kept_ids}; ids must be 0 or more.")

    def check(self, vocab_size: int) -> None:
        """Raises a ValueError if an id is not in the vocabulary; a vocab_size of 0 is not known yet, and passes."""
        highest = max(self.mask_id, *self.kept_ids, 0)
        if vocab_size and highest >= vocab_size:
            raise ValueError(
                f"masking has the id {highest}, but the model's vocab_size is {vocab_size}; "
                "raise that, or give ids below it."
            )

    def slots(self, length: int) -> int:
        """The number of slots of a row of `length` places."""
        return max(1, int((self.rate + 0.005) * length))

    def candidates(self, tokens: Int[Array, "batch length"], real: Array) -> Bool[Array, "batch length"]:
        """The places that may be chosen."""
        return (real > 0) & ~jnp.isin(tokens, jnp.array((self.mask_id, *self.kept_ids)))

    def choose(self, rng: jax.Array, candidates: Bool[Array, "batch length"], real: Array) -> Slots:
        """round(rate * real places) of the candidates, at least one where there is one, and at most `slots`."""
        count = self.slots(candidates.shape[1])
        wanted = jnp.clip(jnp.round(self.rate * jnp.sum(real > 0, 1).astype(jnp.float32)), 1, count)
        available = jnp.sum(candidates, 1)
        score = jax.random.gumbel(rng, (*candidates.shape, count) if self.with_replacement else candidates.shape)
        if self.with_replacement:
            places = jnp.argmax(jnp.where(candidates[..., None], score, -jnp.inf), 1)
            wanted = jnp.where(available > 0, wanted, 0)
        else:
            _, places = jax.lax.top_k(jnp.where(candidates, score, -jnp.inf), count)
            wanted = jnp.minimum(wanted, available)
        valid = jnp.arange(count) < wanted[:, None]
        return Slots(jnp.where(valid, places, 0).astype(jnp.int32), valid.astype(jnp.float32))

    def hide(
        self,
        tokens: Int[Array, "batch length"],
        slots: Slots,
        draws: Float[Array, "batch slots"],
        random_ids: Int[Array, "batch slots"] | None = None,
    ) -> Int[Array, "batch length"]:
        """The row as the model sees it.

        Args:
          draws: uniform in [0, 1). A place becomes the mask below mask_share, then its entry of `random_ids` below
            mask_share + random_share, and stays as it is above.
        """
        masked, changed = draws < self.mask_share, draws < self.mask_share + self.random_share
        values = jnp.full_like(slots.places, self.mask_id)
        if random_ids is not None:
            values = jnp.where(masked, values, random_ids)
        return put(tokens, slots.places, slots.weights * changed, values)


def take(x: Array, places: Int[Array, "batch slots"]) -> Array:
    """x[b, places[b, n]] for x [batch, length, ...]."""
    return jax.vmap(lambda row, at: jnp.take(row, at, axis=0))(x, places)


def put(x: Int[Array, "batch length *rest"], places: Int[Array, "batch slots"], weights: Array, values: Array) -> Array:
    """x with `values` [batch, slots, ...] at the places whose weight is not 0.

    A place that occurs more than once gets the mean of its values, rounded down, as in the authors' code.
    """
    counted = (weights > 0).astype(x.dtype)
    sums = jax.vmap(lambda row, at, v: jnp.zeros_like(row).at[at].add(v))
    ones = counted.reshape(*counted.shape, *[1] * (x.ndim - 2))
    total = sums(x, places, values.astype(x.dtype) * ones)
    number = sums(x, places, jnp.broadcast_to(ones, values.shape))
    return jnp.where(number > 0, total // jnp.maximum(number, 1), x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedWords(Task):
    """Trains an encoder to predict hidden words. A batch has

    tokens  int32    [batch, length]
    types   int32    the kinds of the tokens (BERT's first and second sentence)
    mask    float32  1 for real tokens, 0 for padding
    bytes   int32    how many bytes of text a token stands for
    """

    counted = "words"

    model: BertConfig
    masking: Masking = Masking()

    def __post_init__(self):
        if not self.model.mask_head:
            raise ValueError("model.mask_head is False; it must be True, as this head predicts the masked words.")
        self.masking.check(self.model.vocab_size)

    def module(self) -> Bert:
        return self.model.module()

    def fit(self, data: Data, train: Any = None) -> MaskedWords:
        """See `jaxtok.lm.fitting.fit_text`."""
        return fit_text(self, data)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        self.masking.check(self.model.vocab_size)
        return self.module().init(rng, batch["tokens"], method="everything")["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        nats, correct, slots, _ = self.predict(params, batch, rng, train=True)
        sums = {"nats": nats * slots.weights, "right": correct * slots.weights, "words": slots.weights}
        return {name: jnp.sum(x) for name, x in sums.items()}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy of all hidden words in nats; also logs the accuracy."""
        words = sums["words"]
        return weighted_mean(sums["nats"], words), {"accuracy": weighted_mean(sums["right"], words)}

    def predict(self, params: Params, batch: Batch, rng: jax.Array, train: bool = False):
        """Returns nats and whether the likeliest word is right, for each slot; the slots; and the bytes of each."""
        choose, draw, any_word, dropout = jax.random.split(rng, 4)
        tokens, real = batch["tokens"], batch["mask"]
        slots = self.masking.choose(choose, self.masking.candidates(tokens, real), real)
        shape = slots.places.shape
        random_ids = jax.random.randint(any_word, shape, 0, self.model.vocab_size)
        hidden = self.masking.hide(tokens, slots, jax.random.uniform(draw, shape), random_ids)
        logits = slot_logits(self.model, params, hidden, real, batch["types"], slots, dropout if train else None)
        targets = take(tokens, slots.places)
        correct = (logits.argmax(-1) == targets).astype(jnp.float32)
        return cross_entropy(logits, targets), correct, slots, take(batch["bytes"], slots.places)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        nats, correct, slots, text_bytes = self.predict(params, batch, rng)
        of_slots = {"nats": nats, "right": correct, "words": jnp.ones_like(nats), "bytes": text_bytes}
        return {name: jnp.sum(x * slots.weights) for name, x in of_slots.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats a hidden word), bits_per_byte of the hidden text, accuracy, and words, their number."""
        return {
            "loss": sums["nats"] / sums["words"],
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "accuracy": sums["right"] / sums["words"],
            "words": sums["words"],
        }

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["tokens"].shape
        slots = self.masking.slots(length)
        return 3 * rows * (length * self.model.flops(length) + slots * self.model.mask_head_flops())


def slot_logits(
    model: BertConfig, params: Params, tokens: Array, real: Array, types: Array, slots: Slots, dropout: Any
) -> Float[Array, "batch slots vocab"]:
    """Logits of the words at the slots, in float32."""
    module, rngs = model.module(), None if dropout is None else {"dropout": dropout}
    hidden = module.apply({"params": params}, tokens, real > 0, types, deterministic=dropout is None, rngs=rngs)
    return module.apply({"params": params}, hidden, slots.places, method="masked_words")


def weighted_mean(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """The total over the weight with the authors' 1e-6 in the denominator: 0 where the weight is 0."""
    return total / (weight + 1e-6)
