"""Tiny cases of tasks, and the batches that several of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jaxtok.data.encoders import EncoderData
from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.data.text import TextData
from jaxtok.lm.electra import ElectraConfig
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.protocols import ArraySpec, Batch
from jaxtok.training.experiment import Experiment, TrainConfig

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 8, "vocab_size": 64, "max_length": 32}
"""The sizes of a decoder that eight devices can divide."""

TOKENFORMER = TokenFormerConfig(**SIZES, rotary_fraction=1.0, tokens=uniform_counts(16, 32))


@dataclasses.dataclass(frozen=True)
class Case:
    """A task in a tiny size that eight devices can divide; the contract tests train and evaluate it on every mesh."""

    task: Any
    data: Any
    batch: dict[str, np.ndarray]
    """A batch like those of the data."""
    unfit: dict[str, str] = dataclasses.field(default_factory=dict)
    """The meshes that it does not fit, with the reason."""
    train: TrainConfig = TrainConfig()
    drawn: bool = False
    """Whether an evaluation draws (hidden positions, tables, gates), so that it depends on how the data are batched."""

    rounding: float = 1e-6
    """The size of a gradient's entries up to which a gradient that is 0 in theory (of keys' biases) is taken to be
    rounding: larger where a loss has larger gradients."""

    @property
    def experiment(self) -> Experiment:
        return Experiment(task=self.task, data=self.data, train=self.train)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A surgery on a tiny case; tests/transfer/test_surgeries.py holds it to the contract."""

    surgery: Any
    before: Case
    refused: Any
    """A task that it cannot change."""
    staged: bool = True
    """Whether it can be a stage of a run on texts with a vocabulary of any size, as which it is then tested."""


def zeros(data: Any) -> dict[str, np.ndarray]:
    """An empty batch."""
    return {name: np.zeros(array.shape, array.dtype) for name, array in data.batch_spec().items()}


def typed(data: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch in the data's order and dtypes."""
    return {name: np.asarray(batch[name]).astype(array.dtype) for name, array in data.batch_spec().items()}


def check_spec(batch: Batch, data: Any) -> None:
    """Checks that a whole batch is what the data's `batch_spec` says."""
    spec = {name: (array.shape, np.dtype(array.dtype)) for name, array in data.batch_spec().items()}
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec


def text(model: Any) -> Case:
    """Two documents in most rows, and padding at the end of some."""
    data = TextData(length=16, batch_size=8)
    rng = np.random.default_rng(0)
    shape = (data.batch_size, data.length)
    ends = rng.integers(3, 20, (data.batch_size, 1))
    index = np.broadcast_to(np.arange(data.length), shape)
    segments = np.where(index < ends, 1, 2) * (index < ends + 10)
    batch = {
        "tokens": rng.integers(0, model.vocab_size, shape),
        "targets": rng.integers(0, model.vocab_size, shape),
        "positions": np.where(index < ends, index, index - ends),
        "segments": segments,
        "mask": segments > 0,
        "bytes": np.ones(shape),
    }
    return Case(LanguageModeling(model=model), data, typed(data, batch))


def pairs(task: Any, drawn: bool = False) -> Case:
    """Inputs and targets of several lengths."""
    data = SpanCorruption(length=16, batch_size=8, density=0.3, mean_span=2.0)
    rng = np.random.default_rng(0)
    shape = data.batch_spec()["targets"].shape
    mask = np.arange(shape[1]) < rng.integers(3, shape[1], (8, 1))
    batch = {
        "tokens": rng.integers(2, task.model.vocab_size, (8, 16)) * (np.arange(16) < rng.integers(5, 17, (8, 1))),
        "targets": rng.integers(2, task.model.vocab_size, shape) * mask,
        "mask": mask,
        "bytes": mask,
    }
    return Case(task, data, typed(data, batch), drawn=drawn)


ENCODER = ElectraConfig(
    num_layers=2, d_model=16, num_heads=8, mlp_dim=32, embedding_size=8, vocab_size=64, max_positions=16
)


def encoder(task: Any, unfit: Mapping[str, str] | None = None) -> Case:
    """Rows of [CLS] a [SEP] b [SEP] and padding."""
    data = EncoderData(length=16, batch_size=8)
    rng = np.random.default_rng(0)
    index, ends = np.arange(data.length), rng.integers(7, 16, (data.batch_size, 1))
    special = (index == 0) | (index == 5) | (index == ends)
    batch = {
        "tokens": np.where(special, 1, rng.integers(4, 64, (data.batch_size, data.length))),
        "types": index + 0 * ends > 5,
        "mask": index <= ends,
        "bytes": ~special,
    }
    return Case(task, data, typed(data, batch), dict(unfit or {}), drawn=True)


def labelled(case: Case, classes: int) -> Case:
    """The same rows with a class each."""
    rows = len(case.batch["mask"])
    labels = np.random.default_rng(1).integers(0, classes, rows).astype(np.int32)
    data = LabelledRows(case.data, classes)
    return dataclasses.replace(case, data=data, batch={**case.batch, "labels": labels}, drawn=False)


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Rows of other data, with a class each."""

    rows: Any
    count: int
    source: ClassVar[str] = "corpus"

    batch_size = property(lambda self: self.rows.batch_size)
    unit = property(lambda self: self.rows.unit)
    units = property(lambda self: self.rows.units)
    classes = property(lambda self: tuple(map(str, range(self.count))))

    def batch_spec(self) -> dict[str, ArraySpec]:
        return self.rows.batch_spec() | {"labels": ArraySpec((self.batch_size,), np.int32, ("batch",))}
