"""Whole-word masking: whole words are masked and their pieces predicted, by models of words and of subwords alike.

Batches are those of `jaxtok.data.word_pieces.WordPieceText`, whose rows are words. With the same key, all models choose
the same words. They are compared by the loss of a word, which is the sum over its pieces.
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
from jaxtok.nn.losses import bits_per_byte, cross_entropy, mean
from jaxtok.protocols import Batch, Data, Params, Sums, Task
from jaxtok.tokenizers.byte_words import CLS, MASK, PAD, SEP, UNK

WORD_MASKING = Masking(mask_share=0.8, random_share=0.1, mask_id=MASK, kept_ids=(PAD, CLS, SEP, UNK))


def choose_words(rng: jax.Array, batch: Batch, masking: Masking) -> tuple[Slots, Float[Array, "batch slots"]]:
    """The words of each row to predict, and for each a number in [0, 1) that says what the model reads there.

    Both are the same for every model that reads these rows with this key.
    """
    choose, draw = jax.random.split(rng)
    candidates = masking.candidates(batch["words"][..., 0], batch["mask"])
    slots = masking.choose(choose, candidates, candidates)
    return slots, jax.random.uniform(draw, slots.places.shape)


class Predicted(NamedTuple):
    """How a model predicted the pieces of the chosen words."""

    nats: Float[Array, "batch slots pieces"]
    weights: Float[Array, "batch slots pieces"]
    """1 where there is a piece, else 0."""
    correct: Bool[Array, "batch slots pieces"]
    """Whether the likeliest piece is the right one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordModeling(Task):
    """The base of tasks that predict the pieces of masked words; see `jaxtok.data.word_pieces.WordPieceText`."""

    counted = "words"

    model: Any
    masking: Masking = WORD_MASKING
    """The masking of words, whose ids are first symbols. In place of a chosen word stand the mask (mask_share), another
    word of the batch (random_share) or itself (the rest)."""

    def __post_init__(self):
        if self.masking.with_replacement:
            raise ValueError("masking.with_replacement is True; it must be False, as a word is chosen once.")

    def fit(self, data: Data, train: Any = None) -> WordModeling:
        """See `jaxtok.lm.fitting.fit_text`."""
        return fit_text(self, data)

    @abc.abstractmethod
    def predict(self, params: Params, batch: Batch, rng: jax.Array, train: bool = False) -> tuple[Predicted, Slots]:
        """How the model predicts the words that the key chooses, and their slots."""

    @abc.abstractmethod
    def features(self, params: Params, batch: Batch) -> Float[Array, "batch d_model"]:
        """A vector for each row: the mean of its hidden states."""

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        predicted, _ = self.predict(params, batch, rng, train=True)
        nats, pieces = jnp.sum(predicted.nats * predicted.weights), jnp.sum(predicted.weights)
        return {"nats": nats, "pieces": pieces, "words": jnp.sum(predicted.weights[..., 0])}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy of all pieces of masked words, in nats a piece; also logs nats a word."""
        return mean(sums["nats"], sums["pieces"]), {"nats_per_word": mean(sums["nats"], sums["words"])}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        predicted, slots = self.predict(params, batch, rng)
        words = predicted.weights[..., 0]
        right = (predicted.correct | (predicted.weights == 0)).all(-1)
        of_slots = {
            "words": words,
            "bytes": take(batch["bytes"], slots.places) * words,
            "right_words": right * words,
            "cut": take(batch["cut"], slots.places) * words,
        }
        of_pieces = {"nats": predicted.nats, "pieces": jnp.ones_like(predicted.nats), "right": predicted.correct}
        of_pieces = {name: x * predicted.weights for name, x in of_pieces.items()}
        return {name: jnp.sum(x) for name, x in (of_slots | of_pieces).items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns, of the masked words, which are the same in every evaluation and for every model:

        loss             nats a piece
        nats_per_word    nats a word, the sum over its pieces
        bits_per_byte    bits a byte of the words' text
        accuracy         the share of the pieces that are right
        word_accuracy    the share of the words whose pieces are all right
        words            their number
        pieces_per_word  the mean number of a word's pieces
        cut              the share of the words with more bytes or pieces than are kept
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


def score_pieces(logits, pieces, weights) -> Predicted:
    """How logits [batch, slots, pieces, vocab] predict `pieces` [batch, slots, pieces] (-1: none) of weighted slots."""
    counted = (pieces >= 0) * weights[..., None]
    correct = logits.argmax(-1) == pieces
    return Predicted(cross_entropy(logits, jnp.maximum(pieces, 0)), counted, correct)


def mean_state(hidden, mask) -> Float[Array, "batch d_model"]:
    """The mean of the states at the real places of each row."""
    hidden, mask = hidden.astype(jnp.float32), mask[..., None]
    return jnp.sum(hidden * mask, 1) / jnp.maximum(jnp.sum(mask, 1), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubwordWords(WordModeling):
    """BERT with whole-word masking. It reads the words as one row of pieces, and masks every piece of a masked word.

    The last four rows of the embedding are padding, [SEP], [CLS] and the mask: vocab_size must leave room for them
    after the tokenizer's ids.
    """

    model: BertConfig
    max_tokens: int = 0
    """Pieces of a row; the model does not see those beyond. 0: twice the number of words."""

    def __post_init__(self):
        super().__post_init__()
        if not self.model.mask_head:
            raise ValueError("model.mask_head is False; it must be True, as this head predicts the pieces.")
        if self.max_tokens < 0 or self.max_tokens > self.model.max_length:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; it must be from 0 to model.max_length = {self.model.max_length}."
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
        seen = (places < tokens.shape[1]) & (targets >= 0)
        flat = jnp.where(seen, places, 0).reshape(len(places), -1)
        logits = self.module().apply({"params": params}, hidden, flat, method="masked_words")
        return score_pieces(logits.reshape(*targets.shape, -1), jnp.where(seen, targets, -1), slots.weights), slots

    def row(self, pieces: Int[Array, "batch length pieces"], batch: Batch):
        """The pieces in a row and which are real, both [batch, tokens]; and where each word begins, [batch, length]."""
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
        """The number of parameters in the table of pieces."""
        return self.model.vocab_size * self.model.embedding_width

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["words"].shape[:2]
        tokens = self.max_tokens or 2 * length
        pieces = self.masking.slots(length) * batch["pieces"].shape[-1]
        return 3 * rows * (tokens * self.model.flops(tokens) + pieces * self.model.mask_head_flops())
