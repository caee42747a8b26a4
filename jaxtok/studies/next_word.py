"""Next-word accuracy of word-pooled and of plain models, by the frequency of words (arXiv 2310.11628).

A word is right if all its units and its end are. The end is the end mark in a word-pooled model; in a plain one, it is
a next token that begins with a space, or the end of the document. Both models read the true words before it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxtok.data.word_units import NormalizedText, WordUnitText, count_words, load_units
from jaxtok.decoding import Sampling, generate
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.word_pooled import WordPooling, guess_words, score_words, word_accuracies
from jaxtok.nn.losses import cross_entropy
from jaxtok.protocols import Batch, Params, Tokenizer
from jaxtok.tokenizers import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Guess:
    """A word of the text, and how a model does on it."""

    word: bytes
    right: bool
    """Whether greedy spelling gets it right."""
    probability: float
    """The probability of the word and its end: the accuracy to be expected of sampling at temperature 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextWordAccuracy:
    """A measure of a study; on models that are neither word-pooled nor plain, it is empty.

    Nothing needs to be generated: greedy spelling gets a word right if each unit is the likeliest after the true ones,
    and sampling gets it right with the word's probability. `generated` does generate.
    """

    split: str = "test"
    context: int = 1
    """The smallest number of words before the word, in its document and row."""
    edges: tuple[int, ...] = (0, 10, 100, 1000)
    """The upper edges of the buckets of words by their count in the training split: 0, 1 to 10, 11 to 100, ..."""
    documents: int = 0
    """The largest number of documents in which words are counted; 0: the whole training split."""
    batches: int = 0
    """The largest number of batches of the split; 0: all."""

    def __post_init__(self):
        if self.context < 0 or not self.edges or list(self.edges) != sorted(set(self.edges)) or self.edges[0] < 0:
            raise ValueError(
                f"context is {self.context} and edges are {self.edges}; both must be 0 or more, and edges must rise."
            )

    def __call__(self, task: Any, params: Params, data: Any) -> dict[str, float]:
        """Returns the accuracies of all words and of each bucket, greedy and expected of sampling, and the counts."""
        data = dataclasses.replace(data, eval_limit=self.batches)
        if isinstance(task, WordPooling) and isinstance(data, WordUnitText):
            guesses = list(pooled_guesses(task, params, data.eval_batches(self.split), self.context))
        elif isinstance(task, LanguageModeling) and isinstance(data, NormalizedText):
            tokenizer = load_tokenizer(data.tokenizer)
            guesses = list(plain_guesses(task, params, data.eval_batches(self.split), tokenizer, self.context))
        else:
            return {}
        return self.summary(guesses, count_words(data, "train", self.documents))

    def summary(self, guesses: Sequence[Guess], counts: Counter[bytes]) -> dict[str, float]:
        seen = np.array([counts[guess.word] for guess in guesses], np.int64)
        right = np.array([guess.right for guess in guesses], np.float64)
        probability = np.array([guess.probability for guess in guesses], np.float64)
        numbers = {}
        lows = (0, *(edge + 1 for edge in self.edges))
        highs = (*self.edges, np.iinfo(np.int64).max)
        names = [f"_{low}" if low == high else f"_{low}_{high}" for low, high in zip(lows, self.edges)]
        buckets = [("", np.ones(len(seen), bool))]
        buckets += [(name, (seen >= low) & (seen <= high)) for name, low, high in zip(names, lows, highs)]
        buckets += [(f"_above_{self.edges[-1]}", seen > self.edges[-1])]
        for name, chosen in buckets:
            if chosen.any():
                numbers[f"next_word_accuracy{name}"] = float(right[chosen].mean())
                numbers[f"sampled_word_accuracy{name}"] = float(probability[chosen].mean())
            numbers[f"words{name}"] = float(chosen.sum())
        return numbers


def pooled_guesses(task: WordPooling, params: Params, batches: Any, context: int = 1) -> Iterator[Guess]:
    """Yields a guess for every word with at least `context` words before it; parts of a long word are words."""
    units = load_units(task.tokenizer)
    for batch in batches:
        _, nats, right = map(np.asarray, score_words(task, params, batch))
        for row, position in _word_positions(batch, context):
            word = batch["targets"][row, position, : batch["target_lengths"][row, position]]
            decoded = units.decode(word.tolist(), task.rule != "lossless")
            yield Guess(decoded, bool(right[row, position]), float(np.exp(-nats[row, position])))


def _word_positions(batch: Batch, context: int) -> Iterator[tuple[int, int]]:
    real = (batch["mask"] > 0) & (batch["target_lengths"] > 0)
    for row, segments in enumerate(batch["segments"]):
        before, last = 0, -1
        for position, segment in enumerate(segments):
            before = (before if segment == last else 0) + int(batch["lengths"][row, position] > 0)
            last = segment
            if real[row, position] and before >= context:
                yield row, position


def plain_guesses(
    task: LanguageModeling, params: Params, batches: Any, tokenizer: Tokenizer, context: int = 1
) -> Iterator[Guess]:
    """Yields a guess for every word that begins and ends in its row and has at least `context` words before it."""
    pieces, begins = _pieces(tokenizer, task.model.vocab_size)
    for batch in batches:
        right, ends, nats, end_nats = map(np.asarray, _score_tokens(task, params, batch, begins))
        for row, start, stop in _words_of(batch, tokenizer, pieces, begins, context):
            word = b"".join(pieces[i] for i in batch["targets"][row, start:stop]).removeprefix(b" ")
            yield Guess(
                word,
                bool(right[row, start:stop].all() and ends[row, stop]),
                float(np.exp(-nats[row, start:stop].sum() - end_nats[row, stop])),
            )


def _words_of(
    batch: Batch, tokenizer: Tokenizer, pieces: Sequence[bytes], begins: np.ndarray, context: int
) -> Iterator[tuple[int, int, int]]:
    """Yields row, first target and the target after the last one of each word; a space that is a token comes before."""
    targets, segments, opens = batch["targets"], batch["segments"], batch["tokens"] == tokenizer.eod_id
    for row in range(len(targets)):
        starts = np.flatnonzero((segments[row] > 0) & (begins[targets[row]] | opens[row]))
        before, last = 0, -1
        for start, stop in zip(starts.tolist(), starts[1:].tolist()):
            before = before if segments[row, start] == last else 0
            last = segments[row, start]
            start += pieces[targets[row, start]] == b" "
            if start < stop and segments[row, stop] == last and pieces[targets[row, start]]:
                if before >= context:
                    yield row, start, stop
                before += 1


def _pieces(tokenizer: Tokenizer, vocab: int) -> tuple[list[bytes], np.ndarray]:
    """Returns the bytes of each id, and which ids begin a word or end the document."""
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)] + [b""] * (vocab - tokenizer.vocab_size)
    begins = np.array([piece.startswith(b" ") for piece in pieces])
    begins[tokenizer.eod_id] = True
    return pieces, begins


def _scores(
    task: LanguageModeling, params: Params, batch: Batch, begins: Bool[Array, " vocab"]
) -> tuple[Array, Array, Array, Array]:
    """Returns whether a target is the likeliest token, whether that begins a word, and the nats of either."""
    options = {"positions": batch["positions"], "segments": batch["segments"]}
    logits, _ = task.module().apply({"params": params}, batch["tokens"], **options)
    likeliest = logits.argmax(-1)
    end_nats = jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(jnp.where(begins, logits, -jnp.inf), -1)
    return likeliest == batch["targets"], begins[likeliest], cross_entropy(logits, batch["targets"]), end_nats


_score_tokens = jax.jit(_scores, static_argnums=0)


def generated(
    task: WordPooling | LanguageModeling,
    params: Params,
    batch: Batch,
    tokenizer: Tokenizer,
    *,
    context: int = 1,
    sampling: Sampling = Sampling(),
    rng: jax.Array | None = None,
    max_units: int = 60,
) -> list[bool]:
    """Returns whether each word of a batch is right when it is generated, with what was chosen fed back.

    A word-pooled model spells all words at once. A plain model goes on from the space before each word; a word of more
    than max_units tokens is wrong (the authors' limit is 60 for bytes, and 30 for others).
    """
    if isinstance(task, WordPooling):
        options = {name: batch[name] for name in ("positions", "segments")}
        spelled = guess_words(
            task.module(), params, batch["words"], batch["lengths"], rng, sampling=sampling, **options
        )
        right = np.asarray(word_accuracies(spelled, batch["targets"])[1])
        return [bool(right[index]) for index in _word_positions(batch, context)]
    pieces, begins = _pieces(tokenizer, task.model.vocab_size)
    prompts, words = [], []
    for row, start, stop in _words_of(batch, tokenizer, pieces, begins, context):
        first = start - int(batch["positions"][row, start])
        prompts.append(batch["tokens"][row, first : start + 1].tolist())
        words.append(batch["targets"][row, start:stop].tolist())
    new = generate(
        task.module(), params, prompts, max_new_tokens=max(map(len, words)) + 1, chooser=sampling, rng=rng
    ).tokens  # what comes after a word's end does not matter
    return [
        len(word) <= max_units and guess[: len(word)] == word and bool(begins[guess[len(word)]])
        for word, guess in zip(words, new)
    ]
