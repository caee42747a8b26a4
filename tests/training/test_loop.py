"""The loop: resumption is bit-exact, also across a growth; interruptions, bad numbers and wrong configs end well."""

import dataclasses
import itertools
import json
import os
import re
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.cli import main
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import uniform_counts
from jaxtok.lm.transformer import matched_transformer
from jaxtok.studies.recovery import compare
from jaxtok.training import loop
from jaxtok.training.checkpoints import load, write_config
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import train
from jaxtok.training.optimizer import learning_rate
from jaxtok.transfer.growth import Growth


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def numbers(directory):
    """The logged numbers that do not depend on the clock."""
    clock = (
        "seconds_per_step",
        "tokens_per_second",
        "words_per_second",
        "images_per_second",
        "fraction_of_peak",
        "train_seconds",
    )
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(directory)]


def train_killed_at(experiment, steps, monkeypatch):
    """Trains, with the process dying (without saving) when the batch of each of these steps is fetched."""
    for step in steps:
        original = loop.make_train_step

        def dying(*args, step=step, original=original):
            inner = original(*args)

            def train_step(state, batch):
                if int(state.step) == step:
                    raise KeyboardInterrupt
                return inner(state, batch)

            return train_step

        with monkeypatch.context() as patch:
            patch.setattr(loop, "make_train_step", dying)
            with pytest.raises(KeyboardInterrupt):
                train(experiment, quiet=True)
    return train(experiment, quiet=True)


def test_resumption_is_bit_exact_across_a_growth(experiment, tmp_path, monkeypatch):
    whole = train(experiment, quiet=True)
    assert (whole.step, whole.interrupted) == (10, False)
    assert whole.task.model.tokens == uniform_counts(12, 24)
    # dies in the first stage, between its last checkpoint and the growth's first one, and in the second
    broken = dataclasses.replace(experiment, workdir=str(tmp_path / "broken"))
    resumed = train_killed_at(broken, [3, 6, 9], monkeypatch)
    assert equal(whole.params, resumed.params)
    assert numbers(whole.directory) == numbers(resumed.directory)
    assert whole.metrics == resumed.metrics and whole.flops == resumed.flops
    a, b = load(whole.directory), load(resumed.directory)
    assert equal(a.opt_state(), b.opt_state()) and a.meta.task == b.meta.task
    # a finished run is left as it is
    again = train(experiment, quiet=True)
    assert equal(whole.params, again.params) and again.metrics == whole.metrics


def test_signal_saves_and_leaves_and_the_run_resumes(short, tmp_path, monkeypatch):
    whole = train(dataclasses.replace(short, workdir=str(tmp_path / "whole")), quiet=True)
    original = loop.make_train_step

    def interrupted_step(*args):
        inner = original(*args)

        def train_step(state, batch):
            if int(state.step) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(state, batch)

        return train_step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", interrupted_step)
        first = train(short, quiet=True)
    assert first.interrupted and first.step == 3
    assert load(short.workdir).meta.step == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back
    second = train(short, quiet=True)
    assert not second.interrupted and equal(whole.params, second.params)


def test_a_loss_that_is_not_finite_stops_with_step_and_batch(short, monkeypatch):
    short = dataclasses.replace(short, train=dataclasses.replace(short.train, seed=5))  # compiled separately
    original = LanguageModeling.loss

    def loss(self, params, batch, rng, step):
        value, metrics = original(self, params, batch, rng, step)
        return jnp.where(step == 3, jnp.nan, value), metrics

    monkeypatch.setattr(LanguageModeling, "loss", loss)
    with pytest.raises(FloatingPointError, match=r"at step 4.*last checkpoint is of step 2"):
        train(short, quiet=True)
    batch = np.load(f"{short.workdir}/nonfinite_step_4.npz")
    assert batch["tokens"].shape == (4, 16)
    assert load(short.workdir).meta.step == 2


def test_a_guard_sees_every_logged_row_and_ends_a_dead_run(short, monkeypatch):
    """The first step is logged too; a resumed run is judged by the rows before it as well."""
    seen = []

    def guard(rows):
        seen.append([row["step"] for row in rows])
        return "it is dead." if len(rows) == 4 else ""

    short = dataclasses.replace(short, train=dataclasses.replace(short.train, log_every=2, checkpoint_every=2))
    monkeypatch.setattr(LanguageModeling, "guard", staticmethod(guard))
    with pytest.raises(loop.DeadRun, match=r"^it is dead\.$"):
        train(short, quiet=True)
    assert seen == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6]]
    assert [row["step"] for row in read_metrics(short.workdir, "train")] == [1, 2, 4, 6]
    assert load(short.workdir).meta.step == 4
    seen.clear()
    with pytest.raises(loop.DeadRun):
        train(short, quiet=True)
    assert seen == [[1, 2, 4, 6]]


def test_another_config_in_the_same_folder_is_refused(short):
    train(short, quiet=True)
    other = dataclasses.replace(short, data=dataclasses.replace(short.data, seed=1))
    with pytest.raises(ValueError, match=r"data\.seed: 1, not 0"):
        train(other, quiet=True)
    more_logs = dataclasses.replace(short, train=dataclasses.replace(short.train, eval_every=1))
    assert train(more_logs, quiet=True).step == 6


def test_accumulation_gives_the_same_update(short, tmp_path):
    # one document a row and full rows, so that every part has as many targets
    short = dataclasses.replace(short, train=dataclasses.replace(short.train, steps=2))
    parts = dataclasses.replace(
        short, train=dataclasses.replace(short.train, accumulate=2), workdir=str(tmp_path / "parts")
    )
    a, b = train(short, quiet=True), train(parts, quiet=True)
    chex.assert_trees_all_close(a.params, b.params, rtol=2e-4, atol=2e-5)
    with pytest.raises(ValueError, match="accumulate"):
        dataclasses.replace(short, train=dataclasses.replace(short.train, accumulate=3))


def test_training_only_new_tokens_leaves_all_else(experiment):
    new = dataclasses.replace(experiment, stages=(Growth(to=uniform_counts(12, 24), steps=3, train="new"),))
    result = train(new, quiet=True)
    before = load(f"{new.workdir}/checkpoints/6").params
    after = result.params
    assert equal(before["embedding"], after["embedding"]) and equal(before["final_norm"], after["final_norm"])
    for group, old in (("query", 8), ("output", 8)):
        a, b = before["stack"]["blocks"]["attention"][group], after["stack"]["blocks"]["attention"][group]
        assert jnp.array_equal(a["keys"], b["keys"][:, :old]) and jnp.array_equal(a["values"], b["values"][:, :old])
        assert float(jnp.abs(b["keys"][:, old:]).min()) > 0  # zero when they were appended


def rates(directory):
    return [row["learning_rate"] for row in read_metrics(directory, "train")]


@pytest.fixture
def typed(short):
    """The run, and the verb that trains it, with more options."""
    write_config(short.directory, short.fitted())
    return short.directory, lambda *options: main(["train", str(short.directory), *options])


def test_a_finished_run_is_trained_longer(short, typed, tmp_path, monkeypatch, capsys):
    """What it was stays as it was; the steps that are added have a schedule of their own."""
    directory, verb = typed
    assert verb() == 0
    before, first = load(directory), rates(directory)
    assert verb("--train.steps", "10") == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        "6/10: 4 more steps, in which the learning rate begins anew: a warm-up of 0 steps to 0.01, then cosine"
        in printed
    )
    run = load(directory)
    assert (run.meta.step, run.meta.stage_start, run.meta.schedule_end) == (10, 6, 10)
    chex.assert_trees_all_equal(load(f"{directory}/checkpoints/6").params, before.params)
    assert rates(directory)[:6] == first
    expected = [learning_rate(short.train.optimizer, step, 4) for step in range(4)]
    np.testing.assert_allclose(rates(directory)[6:], expected, rtol=1e-6)
    assert [row["step"] for row in read_metrics(directory, "validation")] == [5, 6, 10]
    # the same command leaves it, and so does the run by its own name
    assert verb("--train.steps", "10") == 0 and verb() == 0
    assert load(directory).meta.step == 10 and len(rates(directory)) == 10
    # fewer steps are refused
    assert verb("--train.steps", "8") == 1
    assert "train.steps: 8, not 10" in (error := " ".join(capsys.readouterr().err.split()))
    assert "can be raised, but not lowered" in error and "remove" not in error
    # one that is interrupted before, between and in the added steps comes to the same
    broken = dataclasses.replace(short, workdir=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        train_killed_at(broken, [3], patch)
    broken = dataclasses.replace(broken, train=dataclasses.replace(broken.train, steps=10))
    resumed = train_killed_at(broken, [6, 7, 9], monkeypatch)
    assert equal(resumed.params, run.params) and equal(load(broken.workdir).opt_state(), run.opt_state())
    assert numbers(broken.workdir) == numbers(directory)


def test_more_steps_before_the_end_come_after_those_that_were_planned(short, tmp_path, monkeypatch):
    """So that it does not matter when they are asked for; twice is twice."""
    more = [dataclasses.replace(short, train=dataclasses.replace(short.train, steps=steps)) for steps in (8, 9)]
    for experiment in (short, *more):
        late = train(experiment, quiet=True)
    early = [dataclasses.replace(run, workdir=str(tmp_path / "early")) for run in (short, *more)]
    with monkeypatch.context() as patch:
        original = loop.Checkpoints.save
        patch.setattr(
            loop.Checkpoints, "save", lambda self, meta, *a: 1 / 0 if meta.step == 6 else original(self, meta, *a)
        )
        with pytest.raises(ZeroDivisionError):
            train(early[0], quiet=True)
    assert load(early[0].workdir).meta.step == 4
    for experiment in early[1:]:
        result = train(experiment, quiet=True)
    assert equal(late.params, result.params) and rates(late.directory) == rates(result.directory)


def test_the_last_stage_can_be_longer_and_no_other(experiment):
    train(experiment, quiet=True)
    growth = dataclasses.replace(experiment.stages[0], steps=6)
    result = train(dataclasses.replace(experiment, stages=(growth,)), quiet=True)
    assert result.step == 12 and load(experiment.workdir).meta.stage_start == 10
    first = dataclasses.replace(experiment, stages=(growth,), train=dataclasses.replace(experiment.train, steps=8))
    with pytest.raises(ValueError, match=r"train\.steps: 8, not 6"):
        train(first, quiet=True)


def test_a_run_that_cannot_be_evaluated_does_not_begin(short, typed, monkeypatch, capsys):
    directory, verb = typed
    original = TextData.eval_batches
    empty = lambda batch: {name: np.zeros_like(array) for name, array in batch.items()}  # noqa: E731
    monkeypatch.setattr(TextData, "eval_batches", lambda *args: map(empty, original(*args)))
    assert verb() == 1
    assert "holds no tokens that count, so the run could not be evaluated" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in directory.iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", [1, 2], ids=["between checkpoints", "at a checkpoint"])
def test_what_an_evaluation_fails_at_is_saved(short, finished, monkeypatch, number):
    calls, original = itertools.count(1), LanguageModeling.evaluate
    with monkeypatch.context() as patch:
        evaluate = lambda *args: 1 / 0 if next(calls) == number else original(*args)  # noqa: E731
        patch.setattr(LanguageModeling, "evaluate", evaluate)
        with pytest.raises(ZeroDivisionError):
            train(short, quiet=True)
    assert load(short.workdir).meta.step == 4 + number
    train(short, quiet=True)
    assert compare(short.directory, finished) == []


def test_growth_keeps_the_validation_loss(experiment):
    """With zero keys and fixed tau, the first loss after the growth is the old model's."""
    train(experiment, quiet=True)
    before, after = load(f"{experiment.workdir}/checkpoints/6"), load(f"{experiment.workdir}/checkpoints/8")
    assert after.task.model.norm_tokens == uniform_counts(8, 16)
    rows = read_metrics(experiment.workdir, "train")
    batch = next(iter(experiment.data.eval_batches("validation")))
    small = jax.jit(before.task.module().apply)({"params": before.params}, batch["tokens"])[0]
    growth = experiment.stages[0]
    task, _ = growth.task(before.task, before.data)
    params, _ = growth.params(before.task, before.data, before.params, None, jax.random.key(0))
    large = jax.jit(task.module().apply)({"params": params}, batch["tokens"])[0]
    np.testing.assert_allclose(small, large, atol=1e-6)
    assert rows[6]["learning_rate"] == 0.0  # the schedule starts anew


def test_the_model_takes_the_tokenizers_vocabulary(short):
    assert short.fitted().task.model.vocab_size == 384
    small = dataclasses.replace(short.task, model=dataclasses.replace(short.task.model, vocab_size=128))
    with pytest.raises(ValueError, match="vocab_size"):
        dataclasses.replace(short, task=small).fitted()
    with pytest.raises(ValueError, match=r"data\.length"):
        dataclasses.replace(short, data=dataclasses.replace(short.data, length=128)).fitted()


def test_a_model_without_parameter_tokens_does_not_grow(experiment):
    model = matched_transformer(dataclasses.replace(experiment.task.model, tokens=uniform_counts(16, 16)))
    with pytest.raises(ValueError, match="cannot grow"):
        train(dataclasses.replace(experiment, task=LanguageModeling(model=model)), quiet=True)


def test_metrics_go_to_jsonl_and_tensorboard(short):
    short = dataclasses.replace(short, train=dataclasses.replace(short.train, tensorboard=True))
    result = train(short, quiet=True)
    rows = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if r["split"] == "validation"] == [5, 6]
    assert {"loss", "bits_per_byte", "gradient_norm", "learning_rate", "tokens_per_second"} <= set(rows[0])
    assert any((result.directory / "tensorboard").iterdir())
    assert rows[-1]["train_flops"] == 6 * result.task.flops({"tokens": np.zeros((4, 16))})


@pytest.mark.parametrize("name", ["loop", "checkpoints", "experiment"])
def test_training_knows_no_system_by_name(name):
    source = Path(loop.__file__).with_name(f"{name}.py").read_text()
    imported = re.findall(r"^\s*(?:from|import) jaxtok\.(\w+)", source, re.M)
    assert imported and not {"lm", "vision", "multimodal", "transfer", "decoding", "interop"} & set(imported)
