"""A batch in parts makes the update of the whole batch, whatever counts in each of its parts."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import collect

from jaxtok.cli import main
from jaxtok.lm.mrt5 import MrT5Training
from jaxtok.protocols import Task
from jaxtok.training.checkpoints import load
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import initial_state, make_train_step
from jaxtok.training.mesh import MeshConfig, make_layout, one_device, unboxed
from jaxtok.training.optimizer import OptimizerConfig

TASKS = collect("TASKS")
SGD = OptimizerConfig(
    name="sgd",
    learning_rate=0.1,
    min_learning_rate=0.1,
    schedule="constant",
    warmup=0.0,
    clip=0.0,
    weight_decay=0.0,
    b1=0.0,
)


def half(batch, number):
    return {name: jnp.asarray(array)[number * len(array) // 2 :][: len(array) // 2] for name, array in batch.items()}


WHOLE = {"seed_alignment": "each pair is compared with all of the batch; the task has parts of its own"}
"""The tasks whose loss is not made of those of the parts of a batch, each with the reason."""


@pytest.mark.parametrize("name", [name for name in TASKS if name not in WHOLE])
def test_a_part_with_nothing_in_it_changes_no_loss(name):
    """The sums of every task are those of the rows that count, so that an empty part adds nothing to a mean."""
    case, rng = TASKS[name](), np.random.default_rng(0)
    task = case.task
    if name == "bae":
        task = dataclasses.replace(task, discriminator=None)  # whose weight is a mean over the parts
    shapes = unboxed(jax.eval_shape(task.init, jax.random.key(0), case.batch))
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), shapes)
    full = half(case.batch, 0)
    empty = {name: jnp.zeros_like(array) for name, array in full.items()}
    sums = jax.jit(lambda batch, key: task.loss_sums(params, batch, jax.random.key(key), jnp.int32(0)))
    one, other = sums(full, 0), sums(empty, 1)
    alone, _ = task.loss_of(one, params, jnp.int32(0))
    both, _ = task.loss_of(jax.tree.map(jnp.add, one, other), params, jnp.int32(0))
    assert np.isfinite(alone) and float(alone) != 0
    np.testing.assert_allclose(both, alone, rtol=1e-6)


def update(task, data, batch, accumulate, layout):
    """The gradient of a step, which is what the optimizer keeps, and what it logs."""
    train = TrainConfig(accumulate=accumulate, optimizer=SGD)
    state = jax.block_until_ready(initial_state(task, train, data, layout))  # one program at a time on a mesh
    with layout.active():
        batch = layout.put(batch, range(data.batch_size), data.batch_spec())
        state, metrics = make_train_step(task, train, 10, data, layout)(state, batch)
    return jax.device_get((state.opt_state, metrics))


def assert_same_update(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-6))
    chex.assert_trees_all_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)


def uneven(case):
    """The case's batch with few targets in its second half."""
    batch = {name: array.copy() for name, array in case.batch.items()}
    batch["mask"][len(batch["mask"]) // 2 :, 3:] = 0
    return batch


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", ["t5", pytest.param("tokenformer", marks=pytest.mark.slow)])
def test_parts_of_unequal_counts_on_a_mesh(name):
    case = TASKS[name]()
    batch, layout = uneven(case), make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    whole = update(case.task, case.data, batch, 1, one_device())
    parts = update(case.task, case.data, batch, 2, layout)
    assert_same_update(parts, whole)


@pytest.mark.parametrize("regulariser", [pytest.param("gate_mean", marks=pytest.mark.slow), "gate_var"])
def test_every_term_of_mrt5s_loss_has_its_own_count(regulariser):
    """Among them a variance, which is no mean of the parts' variances, and the controller's deletion rate."""
    case = TASKS["mrt5"]()
    model = dataclasses.replace(case.task.model, dropout=0.0)
    options = {"target_rate": 0.5, "score_weight": 0.5, "regulariser": regulariser}
    task = MrT5Training(model=model, **options)
    batch = uneven(case)
    batch["tokens"][: len(batch["tokens"]) // 2, 5:] = 0  # short inputs, where the targets are long
    whole, parts = (update(task, case.data, batch, n, one_device()) for n in (1, 4))
    assert_same_update(parts, whole)
    assert float(whole[1]["regulariser"]) != 0


CONFIG = """
from jaxtok.data.character_edits import CharacterEdits
from jaxtok.lm.t5 import SequenceToSequence, T5Config
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

config = Experiment(
    task=SequenceToSequence(
        model=T5Config(num_layers=1, d_model=16, num_heads=2, head_size=8, mlp_dim=32, vocab_size=384)
    ),
    data=CharacterEdits(corpus=CORPUS, edit="vowels", length=32, batch_size=8, eval_limit=1, shuffle_window=1),
    train=TrainConfig(steps=2, tensorboard=False, optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, warmup=0.0)),
    mesh=MeshConfig(data=1),
)
"""


def test_the_verb_trains_the_same_model_in_parts(tmp_path):
    """On pairs of which some have many targets, and others, which are nothing but vowels, few."""
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(("bcdfgh" if number % 3 else "aeiouu") * 9)
    (tmp_path / "config.py").write_text(CONFIG.replace("CORPUS", repr(str(tmp_path / "texts"))))
    for parts in ("1", "4"):
        options = ["--train.accumulate", parts, "--workdir", str(tmp_path / parts)]
        assert main(["train", str(tmp_path / "config.py"), *options]) == 0
    whole, parts = load(tmp_path / "1"), load(tmp_path / "4")
    counts = next(whole.data.train_batches())["mask"].reshape(4, -1).sum(1)
    assert counts.max() > 1.2 * counts.min(), counts
    chex.assert_trees_all_close(parts.params, whole.params, rtol=0, atol=1e-6)
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("1", "4")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


class Whole(Task):
    """A task that says its loss, but not what it is made of."""

    counted, init, sums, metrics, flops = "rows", None, None, None, None


def test_a_loss_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match=r"a Whole does not say how its loss adds up .* train\.accumulate must be 1"):
        Whole().loss_sums(None, {}, None, None)


def test_the_discriminators_batch_norms_are_said_to_see_parts(caplog):
    case = TASKS["bae"]()
    case.task.fit(case.data, TrainConfig(accumulate=2, optimizer=case.train.optimizer))
    assert f"batch norms see {case.data.batch_size // 2} images at a time" in caplog.text
