"""Whole words masked, and their pieces predicted: the objective that models of words and of subwords share.

Batches are those of `jaxtok.data.word_pieces.WordPieceText`, whose rows are words. With the same key all models choose
the same words, and are compared by the loss of a word, which is the sum over its pieces.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.lm.bert import Bert, BertConfig
from jaxtok.lm.fitting import fit_text
from jaxtok.lm.masked_words import Masking, Slots, put, take
from jaxtok.nn.losses import bits_per_byte, cross_entropy, masked_mean
from jaxtok.protocols import Batch, Data, Params, Sums, Task
from jaxtok.tokenizers.byte_words import CLS, MASK, PAD, SEP, UNK

WORD_MASKING = Masking(mask_share=0.8, random_share=0.1, mask_id=MASK, kept_ids=(PAD, CLS, SEP, UNK))


def choose_words(rng: jax.Array, batch: Batch, masking: Masking) -> tuple[Slots, Float[Array, "batch slots"]]:
    """The words of each row that are predicted, and a number in [0, 1) for each that says what is read there.

    The same for every model that reads these rows with this key.
    """
    choose, draw = jax.random.split(rng)
    candidates = masking.candidates(batch["words"][..., 0], batch["mask"])
    slots = masking.choose(choose, candidates, candidates)
    return slots, jax.random.uniform(draw, slots.places.shape)


class Predicted(NamedTuple):
    """What a model said of the pieces of the chosen words."""

    nats: Float[Array, "batch slots pieces"]
    weights: Float[Array, "batch slots pieces"]
    """1 where there is a piece, else 0."""
    correct: Bool[Array, "batch slots pieces"]
    """The likeliest piece is the right one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordModeling(Task):
    """Base of tasks that predict the pieces of masked words, of batches of `jaxtok.data.word_pieces.WordPieceText`."""

    counted = "words"

    model: Any
    masking: Masking = WORD_MASKING
    """Of words, by their first symbol; mask_share, random_share, rest: masked, another word of the batch, itself."""

    def __post_init__(self):
        if self.masking.with_replacement:
            raise ValueError("masking.with_replacement is True; words are chosen once: set False.")

    def fit(self, data: Data, train: Any = None) -> WordModeling:
        """See `jaxtok.lm.fitting.fit_text`."""
        return fit_text(self, data)

    @abc.abstractmethod
    def predict(self, params: Params, batch: Batch, rng: jax.Array, train: bool = False) -> tuple[Predicted, Slots]:
        """What the model says of the words that the key chooses."""

    @abc.abstractmethod
    def features(self, params: Params, batch: Batch) -> Float[Array, "batch d_model"]:
        """A vector for each row: the mean of the hidden states of its words."""

    def loss(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross entropy of all pieces of all masked words, in nats a piece; also logs that of a word."""
        found, _ = self.predict(params, batch, rng, train=True)
        total = jnp.sum(found.nats * found.weights)
        words = jnp.sum(found.weights[..., 0])
        metrics = {"nats_per_word": total / jnp.maximum(words, 1)}
        return masked_mean(found.nats, found.weights), metrics

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        found, slots = self.predict(params, batch, rng)
        there = found.weights[..., 0]
        rest = (found.correct | (found.weights == 0)).all(-1)
        of_slots = {
            "words": there,
            "bytes": take(batch["bytes"], slots.places) * there,
            "right_words": rest * there,
            "cut": take(batch["cut"], slots.places) * there,
        }
        of_pieces = {"nats": found.nats, "pieces": jnp.ones_like(found.nats), "right": found.correct}
        of_pieces = {name: x * found.weights for name, x in of_pieces.items()}
        return {name: jnp.sum(x) for name, x in (of_slots | of_pieces).items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Of the masked words, which are the same in every evaluation and for every model:

        loss             nats a piece
        nats_per_word    the sum over a word's pieces
        bits_per_byte    of their pieces' text
        accuracy         of pieces; word_accuracy: of whole words
        words            how many; pieces_per_word
        cut              the share of words with more bytes or pieces than are kept
        """
        return {
            "loss": sums["nats"] / sums["pieces"],
            "nats_per_word": sums["nats"] / sums["words"],
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "accuracy": sums["right"] / sums["pieces"],
            "word_accuracy": sums["right_words"] / sums["words"],
            "words": sums["words"],
            "pieces_per_word": sums["pieces"] / sums["words"],
            "cut": sums["cut"] / sums["words"],
        }


def scored(logits, pieces, weights) -> Predicted:
    """Of the pieces [batch, slots, pieces] (-1: none) of slots with weights."""
    there = (pieces >= 0) * weights[..., None]
    correct = logits.argmax(-1) == pieces
    return Predicted(cross_entropy(logits, jnp.maximum(pieces, 0)), there, correct)


def mean_state(hidden, mask) -> Float[Array, "batch d_model"]:
    """The mean of the states at the real places of each row."""
    hidden, mask = hidden.astype(jnp.float32), mask[..., None]
    return jnp.sum(hidden * mask, 1) / jnp.maximum(jnp.sum(mask, 1), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubwordWords(WordModeling):
    """BERT with whole-word masking: the row's words as a row of pieces, in which each piece of a masked word is masked.

    The last four rows of the embedding are the mask, [CLS], [SEP] and padding: vocab_size has to leave them room behind
    the tokenizer's ids.
    """

    model: BertConfig
    max_tokens: int = 0
    """Pieces of a row, of which a word beyond is not seen; 0: twice its words."""

    def __post_init__(self):
        super().__post_init__()
        if not self.model.mask_head:
            raise ValueError("model.mask_head is False; pieces are predicted by this head: set it.")
        if self.max_tokens < 0 or self.max_tokens > self.model.max_length:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; it must be 0 or more, and at most the model's max_length = "
                f"{self.model.max_length}."
            )

    def module(self) -> Bert:
        return self.model.module()

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, jnp.zeros(batch["mask"].shape, jnp.int32), method="everything")["params"]

    def predict(self, params: Params, batch: Batch, rng: jax.Array, train: bool = False) -> tuple[Predicted, Slots]:
        choose, swap, dropout = jax.random.split(rng, 3)
        slots, draws = choose_words(choose, batch, self.masking)
        targets = take(batch["pieces"], slots.places)
        masking, draws = self.masking, draws[..., None]
        random = jax.random.randint(swap, targets.shape, 0, self.model.vocab_size - 4)
        read = jnp.where(draws < masking.mask_share + masking.random_share, random, targets)
        read = jnp.where(draws < masking.mask_share, self.model.vocab_size - 1, read)
        pieces = put(batch["inputs"], slots.places, slots.weights, jnp.where(targets >= 0, read, -1))
        tokens, real, starts = self.row(pieces, batch)
        rngs = {"dropout": dropout} if train else None
        hidden = self.module().apply({"params": params}, tokens, real, deterministic=not train, rngs=rngs)
        places = take(starts, slots.places)[..., None] + jnp.arange(targets.shape[-1])
        there = (places < tokens.shape[1]) & (targets >= 0)
        flat = jnp.where(there, places, 0).reshape(len(places), -1)
        logits = self.module().apply({"params": params}, hidden, flat, method="masked_words")
        return scored(logits.reshape(*targets.shape, -1), jnp.where(there, targets, -1), slots.weights), slots

    def row(self, pieces: Int[Array, "batch length pieces"], batch: Batch):
        """The pieces one after the other, which of them are real, and where each word begins; [batch, tokens]."""
        first, top = batch["words"][..., :1], self.model.vocab_size
        pieces = jnp.where(batch["mask"][..., None] > 0, pieces, -1)
        for symbol, token in ((CLS, top - 2), (SEP, top - 3)):
            only = jnp.full(pieces.shape[-1:], -1).at[0].set(token)
            pieces = jnp.where(first == symbol, only, pieces)
        ends = jnp.cumsum(jnp.sum(pieces >= 0, -1), axis=1)
        starts = ends - jnp.sum(pieces >= 0, -1)
        places = jnp.arange(self.max_tokens or 2 * pieces.shape[1])
        word = jax.vmap(lambda e: jnp.searchsorted(e, places, side="right"))(ends)
        real = places < ends[:, -1:]
        word = jnp.where(real, word, 0)
        number = jnp.where(real, places - take(starts, word), 0)
        tokens = jnp.take_along_axis(take(pieces, word), number[..., None], axis=2)[..., 0]
        return jnp.where(real, tokens, top - 4), real, starts

    def features(self, params: Params, batch: Batch) -> Float[Array, "batch d_model"]:
        tokens, real, _ = self.row(batch["inputs"], batch)
        return mean_state(self.module().apply({"params": params}, tokens, real), real)

    def input_params(self) -> int:
        """Numbers in the table of pieces."""
        return self.model.vocab_size * self.model.embedding_width

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["words"].shape[:2]
        tokens = self.max_tokens or 2 * length
        pieces = self.masking.slots(length) * batch["pieces"].shape[-1]
        return 3 * rows * (tokens * self.model.flops(tokens) + pieces * self.model.mask_head_flops())
