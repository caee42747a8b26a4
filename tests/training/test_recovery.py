"""Runs survive, or end with a clear error: damaged checkpoints, a full disk, signals at bad moments, kills."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.cli import main
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.studies.recovery import compare, numbers, recovery
from jaxtok.training.checkpoints import Checkpoints, Damaged, checksums, load
from jaxtok.training.loop import INTERRUPTED, train
from jaxtok.training.mesh import MeshConfig, make_layout


@pytest.fixture
def run(finished, short):
    """A copy of it, and its experiment."""
    shutil.copytree(finished, short.workdir)
    return short


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step):
    path = largest(step / "params")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(step):
    """Flips one bit in the middle of the optimizer's moments."""
    path = largest(step / "opt_state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_params(step):
    shutil.rmtree(step / "params")


def empty_metadata(step):
    for path in (step / "meta").rglob("*"):
        path.write_bytes(b"")


def change_metadata(step):
    path = step / "meta" / "metadata"
    text = path.read_text()
    assert '"step": 6' in text or '"step":6' in text
    path.write_text(text.replace('"step": 6', '"step": 5').replace('"step":6', '"step":5'))


@pytest.mark.parametrize("damage", [truncate, flip, remove_params, empty_metadata, change_metadata])
def test_the_newest_whole_checkpoint_is_used_and_the_other_is_named(run, finished, damage, capfd):
    directory = Path(run.workdir)
    damage(directory / "checkpoints" / "6")
    result = train(run)
    printed = capfd.readouterr().err
    assert "checkpoint 6 is damaged: " in printed and "resuming" in printed and "at step 4 of 6" in printed
    assert (directory / "damaged" / "6").is_dir(), "nothing is lost"
    assert result.step == 6 and compare(directory, finished) == []


def test_half_written_checkpoints_are_not_seen(run, finished):
    directory = Path(run.workdir) / "checkpoints"
    (directory / "8.orbax-checkpoint-tmp-1" / "params").mkdir(parents=True)
    assert load(run.workdir).meta.step == 6
    train(run, quiet=True)
    assert compare(directory.parent, finished) == []


def test_none_whole_is_an_error_that_names_each(run):
    directory = Path(run.workdir) / "checkpoints"
    for step in (2, 4, 6):
        truncate(directory / str(step))
    with pytest.raises(Damaged, match=r"none of the checkpoints in .* is whole \(6: .*; 4: .*; 2: .*another --workdir"):
        train(run, quiet=True)
    assert sorted(p.name for p in directory.iterdir()) == ["2", "4", "6"]
    with pytest.raises(Damaged, match="none of the checkpoints"):
        load(run.workdir)


def test_reading_a_run_that_is_being_trained(run, monkeypatch, capfd):
    """While the newest step is read, the training process saves another one and removes those before it."""
    directory, original = Path(run.workdir) / "checkpoints", Checkpoints.params

    def params(self, step, *args):
        if step == 6:
            (directory / "6").rename(directory / "8")
            for old in ("2", "4"):
                shutil.rmtree(directory / old)
        return original(self, step, *args)

    monkeypatch.setattr(Checkpoints, "params", params)
    assert main(["eval", str(run.workdir)]) == 0
    printed = capfd.readouterr().err
    assert not re.search("damaged|remove|WARNING", printed)
    assert [path.name for path in directory.iterdir()] == ["8"]


def test_a_step_that_is_gone_while_it_is_read_is_not_called_damaged(run, monkeypatch):
    directory, original = Path(run.workdir) / "checkpoints", Checkpoints.params

    def params(self, step, *args):
        shutil.rmtree(directory / str(step))
        return original(self, step, *args)

    monkeypatch.setattr(Checkpoints, "params", params)
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint of step 4"):
        load(directory / "4")


def test_load_passes_over_a_damaged_one_but_not_if_it_was_asked_for(run, capfd):
    truncate(Path(run.workdir) / "checkpoints" / "6")
    assert load(run.workdir).meta.step == 4
    assert "checkpoints/6 is damaged" in capfd.readouterr().err
    with pytest.raises(Damaged, match=r"checkpoints/6 is damaged.*Other steps here: 4, 2"):
        load(f"{run.workdir}/checkpoints/6")


def test_checksums_are_of_values_in_their_places_on_any_mesh():
    x = jnp.arange(64.0).reshape(8, 8)
    whole = checksums({"x": x})
    assert whole != checksums({"x": x.at[3, 3].add(1e-5)}) and whole != checksums({"x": x.T})
    assert whole != checksums({"x": x[::-1]})
    assert checksums({"x": jnp.array([True, False])}) != checksums({"x": jnp.array([False, True])})
    assert checksums({"x": x.astype(jnp.bfloat16)}) != whole
    if jax.device_count() >= 8:
        layout = make_layout(MeshConfig(data=2, fsdp=4))
        divided = jax.device_put(x, layout.sharding(("d_model", "batch"), x.shape))
        assert checksums({"x": divided}) == whole


def full_at(step, patch):
    """Makes the disk full when this step is saved; its half-written folder takes the space."""
    original = Checkpoints.save

    def save(self, meta, *args):
        if meta.step == step:
            with patch.context() as inner:

                def fail(*args, **kwargs):
                    raise OSError(errno.ENOSPC, "No space left on device")

                inner.setattr(self._manager, "save", fail)
                return original(self, meta, *args)
        return original(self, meta, *args)

    patch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize("keep", [1, 20])
def test_a_full_disk_is_reported_and_the_last_whole_checkpoint_stays(short, finished, monkeypatch, keep):
    short = dataclasses.replace(short, train=dataclasses.replace(short.train, keep_checkpoints=keep))
    with monkeypatch.context() as patch:
        full_at(4, patch)
        with pytest.raises(OSError, match=r"could not be saved at step 4: .*the disk is full; the last whole.* step 2"):
            train(short, quiet=True)
    assert load(short.workdir).meta.step == 2
    train(short, quiet=True)
    assert compare(Path(short.workdir), finished) == []


def test_training_goes_on_with_a_full_disk_if_it_is_told_to(short, finished, monkeypatch, capfd):
    short = dataclasses.replace(short, train=dataclasses.replace(short.train, on_full_disk="continue"))
    full_at(4, monkeypatch)
    train(short)
    assert "step 4: a checkpoint could not be saved: " in capfd.readouterr().err
    assert compare(Path(short.workdir), finished) == []
    assert sorted(p.name for p in Path(short.workdir, "checkpoints").iterdir()) == ["2", "6"]


def test_the_checkpoint_at_the_end_has_to_be_saved(short, monkeypatch):
    short = dataclasses.replace(short, train=dataclasses.replace(short.train, on_full_disk="continue"))
    full_at(6, monkeypatch)
    with pytest.raises(OSError, match="could not be saved at step 6"):
        train(short, quiet=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred kilobytes, where we may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(short, small_disk):
    wide = dataclasses.replace(short.task.model, d_model=64)
    short = dataclasses.replace(short, task=LanguageModeling(model=wide), workdir=str(small_disk / "run"))
    with pytest.raises(OSError, match="the disk is full; the last whole one is of step 2"):
        train(short, quiet=True)
    assert load(short.workdir).meta.step == 2


def test_a_signal_inside_an_evaluation_leaves_it_to_the_resumed_run(short, finished, monkeypatch):
    original = LanguageModeling.evaluate

    def evaluate(self, params, batches):
        def signalled():
            os.kill(os.getpid(), signal.SIGTERM)
            yield from batches

        return original(self, params, signalled())

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModeling, "evaluate", evaluate)
        first = train(short, quiet=True)
    assert first.interrupted and first.step == 5
    assert not [row for row in numbers(Path(short.workdir)) if row["split"] == "validation"]
    train(short, quiet=True)
    assert compare(Path(short.workdir), finished) == []


def test_after_the_deadline_a_process_leaves_without_saving(run, tmp_path):
    """If a save never ends, the process ends two seconds after the signal, with the exit code for a restart."""
    shutil.rmtree(Path(run.workdir) / "checkpoints" / "6")
    script = tmp_path / "stuck.py"
    script.write_text(
        f"""
import os, signal, sys, time
from jaxtok.training import loop
from jaxtok.training.checkpoints import Checkpoints, read_config
import dataclasses, pathlib
experiment = read_config(pathlib.Path({run.workdir!r}))
experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, save_deadline=2.0),
    workdir={run.workdir!r})
Checkpoints.save = lambda *args: time.sleep(100)
put = loop.Layout.put
loop.Layout.put = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), put(*args))[1]
loop.train(experiment)
"""
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == INTERRUPTED, done.stderr
    assert "not saved within train.save_deadline = 2 s" in done.stderr
    assert load(run.workdir).meta.step == 4


def test_logs_and_config_are_whole_or_as_before(run, monkeypatch):
    directory = Path(run.workdir)
    before = (directory / "metrics.jsonl").read_bytes(), (directory / "config.json").read_bytes()
    monkeypatch.setattr("jaxtok.training.logs.os.replace", lambda *args: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        train(run, quiet=True)
    assert ((directory / "metrics.jsonl").read_bytes(), (directory / "config.json").read_bytes()) == before
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        train(run, quiet=True)


def test_comparing_runs_finds_what_differs(run, finished):
    directory = Path(run.workdir)
    assert compare(directory, finished) == []
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    rows[0] = json.dumps(row | {"loss": row["loss"] + 1e-6})
    (directory / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    shutil.rmtree(directory / "checkpoints" / "6")
    different = compare(directory, finished)
    assert different == ["steps (4 and 6)", "parameters", "optimizer state", "position in the data", "logged numbers"]
    assert np.isfinite(row["loss"])


CONFIG = Path(__file__).parents[2] / "configs" / "lm" / "recovery.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "processes"), [(50, 1), (20, 2)])
def test_kills_at_random_moments_change_no_bit(tmp_path, monkeypatch, kills, processes):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    result = recovery(CONFIG, kills=kills, processes=processes, workdir=tmp_path / "runs", quiet=True)
    assert result["lost"] == 0 and sum(n for name, n in result.items() if name.startswith("in a ")) == kills


def test_recovery_notices_a_run_that_ends_early_or_a_place_that_is_taken(tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="exists already"):
        recovery(CONFIG, workdir=tmp_path / "runs", quiet=True)
