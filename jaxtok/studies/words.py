"""Measures for models of masked words: what errors in characters cost, and whether their states tell texts apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxtok.data.word_pieces import WordPieceText
from jaxtok.lm.whole_words import WordModeling
from jaxtok.protocols import Batch, Params
from jaxtok.studies.probes import PACKAGES, linear_probe, package_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSize:
    """Measures `input_params`: how many parameters there are between the text and the vectors that the body reads."""

    def __call__(self, task: WordModeling, params: Params, data: WordPieceText) -> dict[str, float]:
        return {"input_params": float(task.input_params())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordNoise:
    """Measures what errors in words cost: `nats_per_word_N` with errors in N % of them, and `rise_N` over none.

    The words that are predicted are the true ones, and errors are the same for every model.
    """

    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    batches: int = 64
    """The number of batches of the test split; 0: all."""

    def __call__(self, task: WordModeling, params: Params, data: WordPieceText) -> dict[str, float]:
        def nats(rate):
            noisy = dataclasses.replace(data, noise=rate, eval_limit=self.batches)
            return task.evaluate(params, noisy.eval_batches("test"))["nats_per_word"]

        clean, found = nats(0.0), {}
        for rate in self.rates:
            found[f"nats_per_word_{percent(rate)}"] = noisy = nats(rate)
            found[f"rise_{percent(rate)}"] = noisy - clean
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageOfWords:
    """Measures how well logistic regression on the task's `features` tells from which of Python's packages a row is.

    It learns from clean rows of the training files. `package_accuracy` is that on rows of the test files, where each
    package counts the same, and `package_accuracy_N` that with errors in N % of the words.
    """

    packages: tuple[str, ...] = PACKAGES
    rows: int = 192
    """The number of rows of each package for training; fewer if it has fewer."""
    test_rows: int = 64
    rates: tuple[float, ...] = (0.1, 0.2, 0.4)

    def __call__(self, task: WordModeling, params: Params, data: WordPieceText) -> dict[str, float]:
        def features(split, count, rate):
            batch, labels = rows_of(dataclasses.replace(data, noise=rate), self.packages, split, count)
            size, found = 64, []
            for start in range(0, len(labels), size):
                part = {name: array[start : start + size] for name, array in batch.items()}
                pad = size - len(part["mask"])
                part = {name: np.pad(a, ((0, pad), *[(0, 0)] * (a.ndim - 1))) for name, a in part.items()}
                found.append(np.asarray(_features(task, params, part))[: size - pad])
            return np.concatenate(found), labels

        judge = linear_probe(*features("train", self.rows, 0.0))
        found = {"package_accuracy": judge(*features("test", self.test_rows, 0.0))}
        for rate in self.rates:
            found[f"package_accuracy_{percent(rate)}"] = judge(*features("test", self.test_rows, rate))
        return found


def percent(rate: float) -> str:
    return f"{100 * rate:g}"


_features = jax.jit(lambda task, params, batch: task.features(params, batch), static_argnums=0)


def rows_of(data: WordPieceText, packages: Sequence[str], split: str, count: int) -> tuple[Batch, np.ndarray]:
    """Returns full rows of the packages' files, as `package_rows` does, and their labels."""

    def rows(document):
        items = data.items(document)
        return items.reshape(-1, data.length, items.shape[-1])[:-1]

    items, labels = package_rows(data, packages, split, count, rows)
    return data.layout(items, np.ones(items.shape[:2], np.int32), np.zeros(items.shape[:2], np.int32)), labels
