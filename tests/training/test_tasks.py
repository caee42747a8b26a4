"""What every Task promises besides training, which is tested in tests/training/test_mesh.py."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from collector import collect
from tiny import check_spec, zeros

import jaxtok
from jaxtok import protocols
from jaxtok.data.codes import CodeData
from jaxtok.data.images import ImageData
from jaxtok.data.text import TextData
from jaxtok.data.words import WordText
from jaxtok.protocols import Task, add_up
from jaxtok.training.experiment import Experiment
from jaxtok.training.loop import train
from jaxtok.training.mesh import unboxed

TASKS = collect("TASKS")

OF_A_BATCH = ("slots",)
"""Metrics that are means over batches, whatever is in them (MrT5's row length is set by a batch's longest row)."""


@functools.cache
def started(name):
    """A case, and parameters of its shapes, none of which is zero (made without compiling `init`)."""
    case, rng = TASKS[name](), np.random.default_rng(0)
    shapes = unboxed(jax.eval_shape(case.task.init, jax.random.key(0), case.batch))
    return case, jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def inner(task):
    """The task, or the one inside a wrapper."""
    return getattr(task, "task", task)


def halves(batch):
    rows = len(batch["mask"]) // 2
    return [{name: x[:rows] for name, x in batch.items()}, {name: x[rows:] for name, x in batch.items()}]


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_adds_up(name, monkeypatch):
    """Over two halves of a batch it is the same as over the whole, and each shape of a batch is compiled once.

    The numbers have the names that the docstring of `metrics` says.
    """
    case, params = started(name)
    parts = halves(case.batch)
    shapes = 1 if case.drawn else 2
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda task, *args: task.sums(*args), n=shapes + (inner(case.task) != case.task))
    monkeypatch.setattr(protocols, "_compiled_sums", jax.jit(traced, static_argnums=0))
    found = case.task.evaluate(params, parts)
    chex.assert_tree_all_finite(found)
    assert all(type(number) is float for number in found.values()) and 0 < found["loss"] < 200
    own = "metrics" in vars(type(case.task)) and "loss" in (type(case.task).metrics.__doc__ or "")
    documented = re.findall(r"\w+", inspect.getdoc(type(case.task if own else inner(case.task)).metrics))
    assert {name if name in documented else re.sub(r"\d+", "N", name) for name in found} <= set(documented)
    assert case.task.evaluate(params, parts) == found  # what is drawn is the same each time
    one, other = (Task.batch_sums(case.task, params, part, jax.random.key(0)) for part in parts)
    chex.assert_tree_all_finite((one, other))
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    assert case.task.counted in one
    if not case.drawn:
        whole = case.task.evaluate(params, [case.batch])
        less = [{k: v for k, v in numbers.items() if k not in OF_A_BATCH} for numbers in (whole, found)]
        chex.assert_trees_all_close(*less, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_of_nothing_is_refused(name):
    case = TASKS[name]()
    with pytest.raises(ValueError, match=f"the evaluation data hold no {case.task.counted} that count; choose"):
        inner(case.task).evaluate({}, [])


@pytest.mark.parametrize("name", TASKS)
def test_the_module_has_the_parameters(name):
    """The loss applies the task's module, and it, with the task's parameters; a task without one has several."""
    case, params = started(name)
    task, shapes, applied = case.task, jax.tree.map(np.shape, params), set()

    def record(call, args, options, context):
        module = context.module
        if module.scope is not None and not module.path and "params" in module.variables:  # not inside another
            given = jax.tree.map(np.shape, dict(module.variables["params"]))
            applied.add((type(module), given.items() <= shapes.items()))
        return call(*args, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(task.loss, params, case.batch, jax.random.key(0), jax.numpy.int32(1))
    assert dataclasses.is_dataclass(task.model) and applied
    if (module := task.module()) is None:
        assert not any(own for _, own in applied)
    else:
        assert applied == {(type(getattr(module, "model", module)), True)}  # a wrapper applies the one inside


@pytest.mark.parametrize("name", TASKS)
def test_batches_and_work(name):
    """The case's batch has its data's `batch_spec`, and work is counted from shapes."""
    case = TASKS[name]()
    check_spec(case.batch, case.data)
    assert case.task.flops(case.batch) == case.task.flops(zeros(case.data)) > 1000


def test_every_task_of_the_package_is_here():
    for package in ("lm", "vision", "training"):
        for module in pkgutil.iter_modules([f"{jaxtok.__path__[0]}/{package}"], f"jaxtok.{package}."):
            importlib.import_module(module.name)

    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    known = {kind for kind in below(Task) if kind.__module__.startswith("jaxtok.") and not inspect.isabstract(kind)}
    assert known == {type(make().task) for make in TASKS.values()}


def refused(experiment, message):
    """By the verb that trains, before anything is written."""
    with pytest.raises(ValueError, match=message):
        train(experiment, quiet=True)
    assert not experiment.directory.exists()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_fits_its_data_or_refuses_them(name, tmp_path):
    """Fields that are open are taken from the data, once; sizes that are too small for them are refused."""
    case = TASKS[name]()
    model = inner(case.task).model

    def experiment(data=case.data, **fields):
        return Experiment(task=case.task.with_model(**fields), data=data, workdir=str(tmp_path / "run"))

    fitting = {}
    if isinstance(case.data, TextData) and hasattr(model, "vocab_size"):
        fitting = {"vocab_size": 0}
        found = inner(experiment(vocab_size=0).fitted().task).model.vocab_size
        assert found == -(-case.data.loaded_tokenizer.vocab_size // 128) * 128
        message = r"task\.model\.vocab_size is \d+, but (the tokenizer \w+ has|bytes are units up to) \d+"
        refused(experiment(vocab_size=64), message)
        longer = dataclasses.replace(case.data, length=model.max_length + 8)
        refused(
            experiment(longer, vocab_size=0), r"data\.length is \d+, more than task\.model\.max_length = \d+; lower"
        )
    elif isinstance(case.data, WordText) and hasattr(model, "max_units"):
        refused(experiment(max_units=9), r"data\.max_units is 5, but task\.model\.max_units is 9; make them equal")
    elif isinstance(case.data, ImageData) and hasattr(model, "num_classes"):
        fitting = {"num_classes": 10}
        refused(experiment(), r"task\.model\.num_classes is 4; it must be at least 10, .* \(0, 1, 2,")
    elif isinstance(case.data, CodeData):
        if hasattr(model, "grid"):
            other = dataclasses.replace(case.data, grid=9)
            refused(experiment(other), r"task\.model\.grid is 4, but data\.grid is 9; make them equal")
        else:
            other = dataclasses.replace(case.data, shape=(9,))
            refused(experiment(other), r"data\.shape is \(9,\), but the model has \(8,\); make them equal")
        return  # the rest of its data are files of codes: tests/data/test_codes.py
    fitted = experiment(**fitting).fitted()
    assert fitted.fitted() == fitted


def test_sums_are_added_up_in_float64():
    parts = [{"nats": jax.numpy.float32(1e-4), "words": 2.0**24, "each": np.ones(2)} for _ in range(3)]
    found = add_up(parts, "words")
    assert found["words"] == 3 * 2**24 and found["nats"] == pytest.approx(3e-4)
    np.testing.assert_array_equal(found["each"], [3, 3])
    with pytest.raises(ValueError, match="no words that count"):
        add_up([{"words": 0.0}], "words")
