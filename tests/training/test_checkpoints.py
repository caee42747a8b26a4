import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.lm.tokenformer import uniform_counts
from jaxtok.training.checkpoints import Checkpoints, fork, load
from jaxtok.training.loop import train
from jaxtok.transfer.growth import Growth


def test_a_fork_goes_on_where_the_run_was(short, tmp_path):
    """A fork has the parameters, the moments and the position in the data: trained on, it sees the next batches."""
    train(short, quiet=True)
    fork(short.workdir, tmp_path / "fork", steps=3)
    old, new = load(short.workdir), load(tmp_path / "fork")
    chex.assert_trees_all_equal(old.params, new.params)
    chex.assert_trees_all_equal(old.opt_state(), new.opt_state())
    assert (new.meta.step, new.meta.flops) == (0, old.meta.flops)
    batches = short.data.train_batches()
    seen = [next(batches) for _ in range(7)]
    with Checkpoints(tmp_path / "fork") as checkpoints:
        batches = short.data.train_batches()
        batches.set_state(checkpoints.data(0))
        following = next(batches)
    np.testing.assert_array_equal(following["tokens"], seen[6]["tokens"])
    result = train(new.experiment, quiet=True)
    assert result.step == 3 and result.flops == pytest.approx(1.5 * old.meta.flops)
    with pytest.raises(FileExistsError, match="fork"):
        fork(short.workdir, tmp_path / "fork")


def test_a_fork_may_have_other_data_and_another_optimizer_but_not_another_model(short, tmp_path):
    train(short, quiet=True)
    new = load(fork(short.workdir, tmp_path / "fork", steps=2)).experiment
    wider = dataclasses.replace(new.task, model=dataclasses.replace(new.task.model, d_model=32))
    with pytest.raises(ValueError, match=r"task\.model\.d_model: 32, not 16"):
        train(dataclasses.replace(new, task=wider), quiet=True)
    optimizer = dataclasses.replace(new.train.optimizer, name="lion")
    changed = dataclasses.replace(
        new,
        data=dataclasses.replace(new.data, seed=3, length=8),
        train=dataclasses.replace(new.train, optimizer=optimizer),
    )
    assert train(changed, quiet=True).step == 2


def test_a_grown_fork_has_the_same_function(short, tmp_path):
    train(short, quiet=True)
    fork(short.workdir, tmp_path / "grown", steps=2, surgery=Growth(to=uniform_counts(10, 20), steps=2))
    old, new = load(short.workdir), load(tmp_path / "grown")
    tokens = jnp.arange(12).reshape(2, 6)
    logits = [jax.jit(r.task.module().apply)({"params": r.params}, tokens)[0] for r in (old, new)]
    np.testing.assert_allclose(*logits, atol=1e-6)
    assert new.opt_state() is None  # reset: training starts with fresh moments
    assert train(new.experiment, quiet=True).step == 2


def test_steps_can_be_named_and_missing_ones_are(short, tmp_path):
    train(short, quiet=True)
    assert load(f"{short.workdir}/checkpoints/2").meta.step == 2
    with pytest.raises(FileNotFoundError, match="of step 3"):
        load(f"{short.workdir}/checkpoints/3")
    with pytest.raises(FileNotFoundError, match="is not a run"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load(tmp_path)


def test_old_checkpoints_go_and_the_newest_stay(short):
    few = dataclasses.replace(short, train=dataclasses.replace(short.train, keep_checkpoints=2))
    directory = train(few, quiet=True).directory
    assert sorted(p.name for p in (directory / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "6"]
