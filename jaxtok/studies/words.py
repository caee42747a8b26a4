"""Measures of models of masked words: how much errors in characters cost, and whether their states tell texts apart."""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtok.data.corpora import split_of
from jaxtok.data.word_pieces import WordPieceText
from jaxtok.lm.whole_words import WordModeling
from jaxtok.nn.losses import cross_entropy
from jaxtok.protocols import Batch, Params

PACKAGES = ("asyncio", "distutils", "email", "encodings", "idlelib", "importlib", "lib2to3", "multiprocessing")
"""Of Python's library, with files in the training and in the test split (Python 3.11)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSize:
    """input_params: numbers between the text and the vectors of what the body reads."""

    def __call__(self, task: WordModeling, params: Params, data: WordPieceText) -> dict[str, float]:
        return {"input_params": float(task.input_params())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordNoise:
    """What reading words with errors costs: `nats_per_word_N` at N % of them, and `rise_N` over none.

    The words that are predicted are the true ones, and errors are the same for every model.
    """

    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    batches: int = 64
    """Of the test split; 0: all."""

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
    """From which package of Python's library is a row? Logistic regression on the task's `features`, which stay.

    Learned from the training files' rows as they are. `package_accuracy` is on rows of the test files, where each
    package counts the same, and `package_accuracy_N` with errors in N % of the words.
    """

    packages: tuple[str, ...] = PACKAGES
    rows: int = 192
    """Of each package, for training; fewer where it has fewer."""
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

        judge = linear_probe(*features("train", self.rows, 0.0), len(self.packages))
        found = {"package_accuracy": judge(*features("test", self.test_rows, 0.0))}
        for rate in self.rates:
            found[f"package_accuracy_{percent(rate)}"] = judge(*features("test", self.test_rows, rate))
        return found


def percent(rate: float) -> str:
    return f"{100 * rate:g}"


_features = jax.jit(lambda task, params, batch: task.features(params, batch), static_argnums=0)


def rows_of(data: WordPieceText, packages: Sequence[str], split: str, count: int) -> tuple[Batch, np.ndarray]:
    """Full rows of the packages' files in a split, `count` of each at most, and their labels; the same in each call.

    Raises:
      ValueError: a package has no row there.
    """
    root, rng = Path(sysconfig.get_paths()["stdlib"]), np.random.default_rng(0)
    items, labels = [], []
    for label, package in enumerate(packages):
        files = sorted(path for path in (root / package).rglob("*.py") if "test" not in str(path.relative_to(root)))
        texts = [path.read_bytes() for path in files if split_of(path.relative_to(root).as_posix()) == split]
        found = [data.items(text).reshape(-1, data.length, data.items(text).shape[-1])[:-1] for text in texts]
        rows = np.concatenate(found) if found else ()
        if not len(rows):
            raise ValueError(f"the {split} split has no row of the package {package}; choose other packages.")
        items.append(rows[rng.permutation(len(rows))[:count]])
        labels += [label] * len(items[-1])
    rows = np.concatenate(items)
    return data.layout(rows, np.ones(rows.shape[:2], np.int32), np.zeros(rows.shape[:2], np.int32)), np.array(labels)


def linear_probe(x: np.ndarray, labels: np.ndarray, classes: int, penalty: float = 1e-3, steps: int = 300):
    """Logistic regression with a quadratic penalty on standardised features, by Adam on all rows, classes balanced.

    Returns the function from other features and labels to the mean over the classes of the accuracy.
    """
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    standard = (x - mean) / deviation
    weights = (len(labels) / classes / np.maximum(np.bincount(labels, minlength=classes), 1))[labels]
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def loss(w):
        nats = cross_entropy(standard @ w["kernel"] + w["bias"], labels)
        return jnp.mean(nats * weights) + penalty * jnp.sum(jnp.square(w["kernel"]))

    @jax.jit
    def fit():
        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        start = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
        return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[0][0]

    w = jax.device_get(fit())

    def judge(y: np.ndarray, truth: np.ndarray) -> float:
        guess = ((y - mean) / deviation @ w["kernel"] + w["bias"]).argmax(-1)
        return float(np.mean([np.mean(guess[truth == k] == k) for k in np.unique(truth)]))

    return judge
