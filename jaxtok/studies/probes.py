"""What a trained encoder is good for: telling from which package of Python's library a text is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxtok.data.corpora import open_corpus
from jaxtok.data.encoders import EncoderData
from jaxtok.data.text import TextData
from jaxtok.lm.bert import Bert, BertConfig
from jaxtok.lm.electra import ReplacedTokens
from jaxtok.lm.text_classification import TextClassification
from jaxtok.protocols import ArraySpec, Batch, Params
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.loop import initial_state, make_train_step
from jaxtok.training.mesh import one_device
from jaxtok.training.optimizer import OptimizerConfig

PACKAGES = (
    "asyncio",
    "distutils",
    "email",
    "encodings",
    "idlelib",
    "importlib",
    "lib2to3",
    "multiprocessing",
    "unittest",
)
"""The packages of Python 3.11 that have several files in the training split and one in the test split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageProbe:
    """A measure of `jaxtok.studies.comparison`: learns from the training files to tell a row's package, and reports
    how often it is right for rows of the test files, where each package counts the same.

    linear_accuracy     by logistic regression on the mean of the encoder's last states, which stay as they are
    finetuned_accuracy  by the whole encoder, trained with a head on the first token and rates that decay by layers
    """

    packages: tuple[str, ...] = PACKAGES
    rows: int = 192
    """The number of rows of each package for training; fewer if it has fewer."""
    test_rows: int = 64
    steps: int = 150
    """The number of steps of fine-tuning; 0: none."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-3,
        min_learning_rate=0.0,
        schedule="linear",
        warmup=0.1,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        layer_decay=0.8,
    )

    def __call__(self, task: Any, params: Params, data: EncoderData) -> dict[str, float]:
        model, params = encoder(task, params)
        train = rows_of(data, self.packages, "train", self.rows)
        test = rows_of(data, self.packages, "test", self.test_rows)
        states = [features(model, params, rows) for rows in (train, test)]
        judge = linear_probe(states[0], train["labels"])
        found = {"linear_accuracy": judge(states[1], test["labels"])}
        if self.steps:
            found["finetuned_accuracy"] = self._finetune(model, params, train, test, data)
        return found

    def _finetune(self, model: BertConfig, params: Params, train: Batch, test: Batch, data: EncoderData) -> float:
        task = TextClassification(model=without_heads(model, num_classes=len(self.packages)))
        config = TrainConfig(steps=self.steps, optimizer=self.optimizer, seed=data.seed)
        shapes, layout = _Rows(data.batch_size, data.length), one_device()
        state = initial_state(task, config, shapes, layout)
        state = state.replace(params=jax.tree.map(jnp.array, task.start_from(params, state.params)))
        step = make_train_step(task, config, self.steps, shapes, layout)
        rng = np.random.default_rng(data.seed)
        with layout.active():
            for _ in range(self.steps):
                chosen = rng.choice(len(train["labels"]), data.batch_size, replace=False)
                state, _ = step(state, {name: array[chosen] for name, array in train.items()})
        return task.evaluate(state.params, batched(test, data.batch_size))["mean_class_accuracy"]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The shapes of a batch of labelled rows."""

    batch_size: int
    length: int

    def batch_spec(self) -> dict[str, ArraySpec]:
        spec = EncoderData(length=self.length, batch_size=self.batch_size).batch_spec()
        return spec | {"labels": ArraySpec((self.batch_size,), np.int32, ("batch",))}


def encoder(task: Any, params: Params) -> tuple[BertConfig, Params]:
    """Returns the encoder that a Task trains, and its parameters.

    Raises:
      ValueError: the Task trains no encoder.
    """
    if isinstance(task, ReplacedTokens):
        return task.export(params)
    if isinstance(task.module(), Bert):
        return task.model, params
    raise ValueError(f"{type(task).__name__} trains no encoder; measure MaskedWords or ReplacedTokens.")


def without_heads(model: BertConfig, num_classes: int = 0) -> BertConfig:
    """Returns the encoder alone, or with a head for classes."""
    off = dict.fromkeys(("mask_head", "pooler", "next_sentence", "replaced_head"), False)
    known = {field.name for field in dataclasses.fields(model)}
    return dataclasses.replace(model, num_classes=num_classes, **{k: v for k, v in off.items() if k in known})


def package_rows(
    data: TextData, packages: Sequence[str], split: str, count: int, rows: Callable[[str | bytes], Sequence[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of the files of packages, `count` of each (or as many as there are), and their labels.

    They are drawn from all of a package's files, and are the same in each call.

    Args:
      rows: returns the rows of a document.

    Raises:
      ValueError: a package has no row in this split.
    """
    corpus, rng = open_corpus(data.corpus, split, text_field=data.text_field), np.random.default_rng(0)
    items: list[np.ndarray] = []
    labels: list[int] = []
    for label, package in enumerate(packages):
        files = [k for k in range(len(corpus)) if corpus.file(k).startswith(f"{package}/")]
        candidates = [row for k in files for row in rows(corpus[k])]
        if not candidates:
            raise ValueError(f"the {split} split of {data.corpus} has no row of {package}; choose other packages.")
        chosen = rng.permutation(len(candidates))[:count]
        items += [candidates[k] for k in chosen]
        labels += [label] * len(chosen)
    return np.stack(items), np.array(labels, np.int32)


def rows_of(data: EncoderData, packages: Sequence[str], split: str, count: int) -> Batch:
    """Returns rows [CLS] text [SEP] of the files of packages, as `package_rows` does, with their labels."""
    data = dataclasses.replace(data, single=1.0, short=0.0)
    width = data.row_items

    def rows(document):
        tokens = data.items(document)[:-1]
        return [tokens[i : i + width] for i in range(0, len(tokens) - width, width)]

    items, labels = package_rows(data, packages, split, count, rows)
    batch = data.layout(items, np.ones(items.shape[:2], np.int32), np.zeros(()))
    return {**batch, "labels": labels}


def batched(rows: Batch, size: int) -> Iterator[Batch]:
    """Yields batches of a size; the last one is filled up with empty rows."""
    for start in range(0, len(rows["labels"]), size):
        part = {name: array[start : start + size] for name, array in rows.items()}
        empty = size - len(part["labels"])
        yield {name: np.pad(a, ((0, empty), *[(0, 0)] * (a.ndim - 1))) for name, a in part.items()}


@functools.partial(jax.jit, static_argnums=0)
def _mean_states(model, params, batch):
    hidden = model.module().apply({"params": params}, batch["tokens"], batch["mask"] > 0, batch["types"])
    mask = batch["mask"][..., None]
    return (hidden.astype(jnp.float32) * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


def features(model: BertConfig, params: Params, rows: Batch, size: int = 64) -> Float[np.ndarray, "rows d_model"]:
    """Returns the mean of the last states of each row."""
    model = without_heads(model)
    return np.concatenate([_mean_states(model, params, batch) for batch in batched(rows, size)])[: len(rows["labels"])]


def linear_probe(
    x: Float[np.ndarray, "rows features"], labels: np.ndarray, penalty: float = 1e-3
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Fits a logistic regression on standardised features, with balanced classes.

    It minimises the mean cross entropy + penalty * |weights|^2. Returns the function from other features and labels to
    the accuracy, averaged over the classes.
    """
    regression = LogisticRegression(C=1 / (2 * penalty * len(labels)), class_weight="balanced", max_iter=1000)
    probe = make_pipeline(StandardScaler(), regression).fit(x, labels)
    return lambda y, truth: float(balanced_accuracy_score(truth, probe.predict(y)))
