"""Parameters of lower precision: float32 copies, moments and averages, on every way through a run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.cli import main
from jaxtok.door import open_model
from jaxtok.training.checkpoints import fork, load, write_config
from jaxtok.training.loop import abstract_state, train
from jaxtok.training.mesh import MeshConfig, make_layout, one_device
from jaxtok.training.optimizer import (
    Mastered,
    OptimizerConfig,
    averaged_params,
    full_params,
    make_optimizer,
    move_average,
)

SLOW = OptimizerConfig(
    learning_rate=1e-5, min_learning_rate=1e-5, schedule="constant", warmup=0.0, weight_decay=0.0, ema_decay=0.9
)


@pytest.fixture
def low(short):
    """A run of 12 steps at a low rate, with parameters in bfloat16."""
    settings = {"steps": 12, "eval_every": 0, "checkpoint_every": 6, "log_every": 6, "optimizer": SLOW}
    return dataclasses.replace(
        short,
        task=short.task.with_model(param_dtype="bfloat16"),
        train=dataclasses.replace(short.train, **settings),
    )


def started(experiment, *options):
    """The run's config in its folder, and the verb on it."""
    write_config(experiment.directory, experiment.fitted())
    assert main(["train", str(experiment.directory), *options]) == 0
    return load(experiment.directory)


def moved(before, after):
    """The share of the entries that changed."""
    pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    return np.average([float(np.mean(np.asarray(a) != np.asarray(b))) for a, b in pairs])


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_small_updates_add_up(low, tmp_path):
    """At a rate of 1e-5 nearly all float32 copies move, and parameters and averages follow; without copies few do."""
    run = started(low)
    state = run.opt_state()
    full = full_params(state, run.params)
    begin = jax.tree.map(lambda p: p.astype(jnp.float32), load(f"{low.workdir}/checkpoints/6").params)
    assert dtypes(run.params) == {"bfloat16"} and dtypes(full) == {"float32"} == dtypes(state.average)
    chex.assert_trees_all_equal(run.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), full))
    assert moved(begin, full) > 0.9 and moved(begin, state.average) > 0.9
    without = dataclasses.replace(low, workdir=str(tmp_path / "without"))
    lost = started(without, "--train.optimizer.no-master-weights")
    assert dtypes(lost.opt_state().average) == {"bfloat16"}
    assert moved(load(f"{without.workdir}/checkpoints/6").params, lost.params) < 0.5
    averaged = open_model(low.workdir, ema=True)
    assert dtypes(averaged.params) == {"bfloat16"} and moved(averaged.params, run.params) > 0


def test_resumption_is_bit_exact(low, tmp_path):
    whole = train(low, quiet=True)
    first = dataclasses.replace(low, workdir=str(tmp_path / "parts"))
    write_config(first.directory, first.fitted())
    shutil.copytree(low.directory / "checkpoints" / "6", first.directory / "checkpoints" / "6")
    parts = train(first, quiet=True)
    chex.assert_trees_all_equal(whole.params, parts.params)
    chex.assert_trees_all_equal(load(low.workdir).opt_state(), load(first.workdir).opt_state())


def test_a_run_that_was_saved_without_copies_goes_on_with_them(low, capsys):
    """As runs of older versions were, whose configs do not know the choice; its moments and its average are kept."""
    shorter = dataclasses.replace(low, train=dataclasses.replace(low.train, steps=6))
    started(shorter, "--train.optimizer.no-master-weights")
    config = json.loads((low.directory / "config.json").read_text())
    del config["train"]["optimizer"]["master_weights"]
    (low.directory / "config.json").write_text(json.dumps(config))
    assert main(["eval", str(low.directory), "--ema"]) == 0
    old = load(low.directory)
    as_they_are = dataclasses.replace(old.experiment.train.optimizer, master_weights=False)
    with_config = dataclasses.replace(old.experiment, train=dataclasses.replace(old.experiment.train, optimizer=SLOW))
    plain = old.opt_state()
    new = dataclasses.replace(old, meta=dataclasses.replace(old.meta, experiment=with_config)).opt_state()
    assert not as_they_are.master_weights and not isinstance(plain.state, Mastered)
    chex.assert_trees_all_equal(full_params(new, old.params), jax.tree.map(lambda p: p.astype(jnp.float32), old.params))
    upcast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    chex.assert_trees_all_equal(upcast(new.state.state), upcast(plain.state))
    chex.assert_trees_all_equal(new.average, upcast(plain.average))
    assert main(["train", str(low.directory), "--train.steps", "12"]) == 0
    run = load(low.directory)
    assert run.meta.step == 12 and moved(upcast(old.params), full_params(run.opt_state(), run.params)) > 0.9


def test_a_growth_that_keeps_the_optimizers_state_keeps_the_copies(experiment, tmp_path):
    """In a stage and in a fork: old rows stay as exact as they were, and new ones are those of the parameters."""
    grown = dataclasses.replace(experiment, task=experiment.task.with_model(param_dtype="bfloat16"))
    train(grown, quiet=True)
    before = load(grown.directory / "checkpoints" / "6")
    new = load(fork(grown.directory / "checkpoints" / "6", tmp_path / "fork", surgery=grown.stages[0]))
    old, full = full_params(before.opt_state(), before.params), full_params(new.opt_state(), new.params)
    chex.assert_trees_all_equal(new.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), full))
    for kind in ("keys", "values"):
        a, b = (tree["stack"]["blocks"]["attention"]["query"][kind] for tree in (old, full))
        np.testing.assert_array_equal(a, b[:, : a.shape[1]])
    assert load(grown.directory).meta.step == 10
    assert dtypes(full_params(load(grown.directory).opt_state(), load(grown.directory).params)) == {"float32"}


def test_the_plan_counts_them(low):
    """14 bytes a parameter: 2 of its own, 4 of its copy, and 8 of two moments; and 4 of its average."""

    def held(optimizer):
        train = dataclasses.replace(low.train, optimizer=optimizer)
        state = abstract_state(low.fitted().task, train, low.data, one_device())
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim)  # noqa: E731
        return size((state.params, state.opt_state)) / sum(x.size for x in jax.tree.leaves(state.params))

    assert held(dataclasses.replace(SLOW, ema_decay=0.0)) == 14 and held(SLOW) == 18
    assert held(dataclasses.replace(SLOW, master_weights=False)) == 8


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_copies_live_where_their_parameters_do(low):
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    task = low.fitted().task.with_model(num_heads=4)
    state = abstract_state(task, low.train, low.data, layout)
    places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)  # noqa: E731
    assert places(state.opt_state.state.master) == places(state.params) == places(state.opt_state.average)
    assert any(any(place.spec) for place in jax.tree.leaves(places(state.params)))


def test_an_average_of_bfloat16_moves():
    config = OptimizerConfig(ema_decay=0.999)
    state = make_optimizer(config).init({"w": jnp.full(8, 0.02, jnp.bfloat16)})
    new = {"w": jnp.full(8, 0.03, jnp.bfloat16)}
    for number in range(500):
        state = move_average(config, state, new, number + 1)
    np.testing.assert_allclose(averaged_params(state, new)["w"], 0.03 - 0.01 * 0.999**500, rtol=2e-3)
