"""Measures for `jaxtok.studies.comparison`: what misspelt text costs a model, and how many words it gets right."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxtok.data.noise import Noise, noisy
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.protocols import Batch, Params, Tokenizer
from jaxtok.tokenizers.words import WordSplitter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness:
    """Measures bits per byte and word accuracy of held-out text, clean and with each noise (`word_accuracy_swap_0.1`).

    A word counts as right if each of its bytes is the likeliest after the true bytes before it. Models of tokens are
    measured on the same words: a word is right if all tokens with any of its bytes are right.
    """

    noises: tuple[Noise, ...] = ()
    splitter: WordSplitter = WordSplitter(max_word_size=16)
    """What words are, as in the data of a word model."""
    split: str = "test"
    bytes: int = 0
    """About how many bytes of text are measured; 0: the whole split."""

    def __call__(self, task: Any, params: Params, data: TextData) -> dict[str, float]:
        found = {}
        for noise in (None, *self.noises):
            held_out = self._part((data if noise is None else noisy(data, noise)).eval_batches(self.split))
            if isinstance(task, LanguageModeling):
                held_out = list(held_out)
                accuracy = flat_word_accuracy(task, params, held_out, data.loaded_tokenizer, self.splitter)
                numbers = task.evaluate(params, held_out) | {"word_accuracy": accuracy}
            else:
                numbers = task.evaluate(params, held_out)
            ending = "" if noise is None else f"_{noise.name}"
            found |= {f"{name}{ending}": numbers[name] for name in ("bits_per_byte", "word_accuracy")}
        return found

    def _part(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        seen = 0
        for batch in batches:
            yield batch
            seen += int(batch["bytes"].sum())
            if self.bytes and seen >= self.bytes:
                return


def flat_word_accuracy(
    task: LanguageModeling, params: Params, batches: Iterable[Batch], tokenizer: Tokenizer, splitter: WordSplitter
) -> float:
    """Returns the share of words whose bytes a model of tokens gets right, among those that are whole in their row."""
    right = words = 0
    for batch in batches:
        hits = np.asarray(_hits(task, params, batch))
        for row in range(len(hits)):
            for segment in range(1, batch["segments"][row].max() + 1):
                positions = np.flatnonzero(batch["segments"][row] == segment)
                inputs, targets = batch["tokens"][row, positions], batch["targets"][row, positions]
                pieces = [b"" if t == tokenizer.eod_id else tokenizer.token_bytes(int(t)) for t in targets]
                ok = np.repeat(hits[row, positions], [len(piece) for piece in pieces])
                found = splitter.split(b"".join(pieces))
                ends = np.cumsum([0, *map(len, found)])
                whole = slice(int(inputs[0] != tokenizer.eod_id), len(found) - int(targets[-1] != tokenizer.eod_id))
                for start, end in list(itertools.pairwise(ends))[whole]:
                    words += 1
                    right += bool(ok[start:end].all())
    return right / max(words, 1)


@functools.partial(jax.jit, static_argnums=0)
def _hits(task: LanguageModeling, params: Params, batch: Batch) -> jax.Array:
    logits, _ = task.module().apply(
        {"params": params}, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
    )
    return logits.argmax(-1) == batch["targets"]
