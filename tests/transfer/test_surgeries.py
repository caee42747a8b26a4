"""The contract of surgeries (`jaxtok.protocols.Surgery`), for all that test files define as SURGERIES."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import pytest
import tiny
from collector import collect

from jaxtok.configuration import from_json, to_json
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.training import loop
from jaxtok.training.checkpoints import Checkpoints, load
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import compile_surgery, initial_state, train
from jaxtok.training.mesh import MeshConfig, make_layout, one_device
from jaxtok.training.optimizer import OptimizerConfig, make_optimizer
from jaxtok.vision.classification import ImageClassification
from jaxtok.vision.vit import TokenFormerViTConfig


@dataclasses.dataclass(frozen=True)
class ShorterRows:
    """Changes the data only, as no surgery of the package does."""

    steps: int = 2
    optimizer: ClassVar[str] = "keep"

    def task(self, task, data):
        if not isinstance(task, LanguageModeling):
            raise ValueError(f"a {type(task).__name__} has rows of one length.")
        return task, dataclasses.replace(data, length=data.length // 2)

    def params(self, task, data, params, opt_state, rng):
        return params, opt_state

    def towards(self, task):
        return self


def shorter_rows() -> tiny.Operation:
    model = dataclasses.replace(tiny.TOKENFORMER, num_layers=1)
    return tiny.Operation(ShorterRows(), tiny.text(model), ImageClassification(model=TokenFormerViTConfig()))


OPERATIONS = collect("SURGERIES") | {"data": shorter_rows}
KEY = jax.random.key(3)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3)


def started(case, layout):
    """A state whose moments, where a surgery keeps them, are not zero."""
    state = initial_state(case.task, TrainConfig(optimizer=OPTIMIZER), case.data, layout)
    return state.replace(opt_state=jax.tree.map(lambda x: x + jnp.ones_like(x), state.opt_state))


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]()


def test_it_is_pure_and_what_it_makes_learns(operation):
    """The arguments stay as they were, the same key gives the same parameters, and the loss and its gradient are
    finite."""
    surgery, case = operation.surgery, operation.before
    state = started(case, one_device())
    kept = state.opt_state if surgery.optimizer == "keep" else None
    stored, arrays = to_json((case.task, case.data)), jax.device_get((state.params, kept))
    task, data = surgery.task(case.task, case.data)
    operate = jax.jit(lambda params, opt_state: surgery.params(case.task, case.data, params, opt_state, KEY))
    params, opt_state = operate(state.params, kept)
    assert (opt_state is None) == (surgery.optimizer == "reset")
    assert (task, data) != (case.task, case.data)
    chex.assert_trees_all_equal(operate(state.params, kept), (params, opt_state))
    chex.assert_trees_all_equal(jax.device_get((state.params, kept)), arrays)
    assert to_json((case.task, case.data)) == stored
    gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), gradients = gradient(params, case.batch, KEY, jnp.asarray(1))
    chex.assert_tree_all_finite((loss, gradients))
    chex.assert_trees_all_equal_shapes(gradients, params)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (tests/conftest.py simulates them)")
def test_on_a_mesh_it_does_what_it_does_on_one_device(operation):
    surgery, case, found = operation.surgery, operation.before, []
    for layout in (one_device(), make_layout(MeshConfig(data=2, fsdp=2, tensor=2))):
        state = started(case, layout)
        kept = state.opt_state if surgery.optimizer == "keep" else None
        task, data, program = compile_surgery(
            surgery, case.task, case.data, state.params, kept, KEY, make_optimizer(OPTIMIZER), layout
        )
        found.append((task, data, program(state.params, kept)))
    (task, data, alone), (same_task, same_data, divided) = found
    assert (task, data) == (same_task, same_data)
    chex.assert_trees_all_close(jax.device_get(divided), jax.device_get(alone), rtol=1e-6, atol=1e-7)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(divided))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(divided))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"document {number} says: " + f"{number * number}, " * 12)
    return folder


@pytest.mark.slow  # tests/training/test_loop.py resumes across a growth
def test_as_a_stage_it_is_resumed_bit_for_bit(operation, corpus, tmp_path, monkeypatch):
    """A run that dies in the step before the surgery, in the one after it and in the last one ends like any other."""
    if not operation.staged:
        pytest.skip("it needs images, or leads to a vocabulary of its own")
    case = operation.before
    model = dataclasses.replace(case.task.model, vocab_size=384)
    experiment = Experiment(
        task=dataclasses.replace(case.task, model=model),
        data=dataclasses.replace(case.data, corpus=str(corpus), batch_size=2, eval_limit=1),
        train=TrainConfig(steps=2, log_every=1, checkpoint_every=1, tensorboard=False, optimizer=OPTIMIZER),
        mesh=MeshConfig(data=1),
        stages=(operation.surgery,),
        workdir=str(tmp_path / "whole"),
    )
    whole = train(experiment, quiet=True)
    broken = dataclasses.replace(experiment, workdir=str(tmp_path / "broken"))
    original = loop.make_train_step
    for last in (1, 2, 3):

        def dying(*args, last=last):
            step = original(*args)

            def train_step(state, batch):
                if int(state.step) == last:
                    raise KeyboardInterrupt
                return step(state, batch)

            return train_step

        with monkeypatch.context() as patch:
            patch.setattr(loop, "make_train_step", dying)
            with pytest.raises(KeyboardInterrupt):
                train(broken, quiet=True)
        with Checkpoints(broken.directory) as checkpoints:
            checkpoints.wait()
            assert checkpoints.latest_step() == last
    resumed = train(broken, quiet=True)
    assert resumed.step == whole.step == experiment.total_steps
    assert resumed.metrics == whole.metrics
    ours, theirs = load(resumed.directory), load(whole.directory)
    afterwards = operation.surgery.task(experiment.task, experiment.data)
    assert (ours.task, ours.data) == (theirs.task, theirs.data) == afterwards
    chex.assert_trees_all_equal(resumed.params, whole.params)
    chex.assert_trees_all_equal(ours.opt_state(), theirs.opt_state())


def test_it_refuses_what_it_cannot_change_by_its_name(operation):
    with pytest.raises(ValueError, match=type(operation.refused).__name__):
        operation.surgery.task(operation.refused, operation.before.data)


def test_it_is_stored_in_a_config_and_can_be_told_its_end(operation):
    surgery, case = operation.surgery, operation.before
    assert from_json(to_json(surgery)) == surgery
    task, _ = surgery.task(case.task, case.data)
    assert surgery.towards(task).task(case.task, case.data)[0] == task
