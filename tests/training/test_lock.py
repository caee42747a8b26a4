"""One training at a time in a folder: the other process is named, and the locks of dead ones do not stay."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from jaxtok.cli import main
from jaxtok.training import lock, loop
from jaxtok.training.checkpoints import load, write_config
from jaxtok.training.lock import RunLock
from jaxtok.training.loop import train


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every twentieth of a second, which are missed after half a second."""
    for name, seconds in (("PULSE", 0.05), ("EXPIRES", 0.5), ("SETTLE", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def folder(finished, tmp_path):
    """A finished run, with the file that a training process leaves in it."""
    shutil.copytree(finished, tmp_path / "run")
    with RunLock(tmp_path / "run"):
        text = (tmp_path / "run" / "training.lock").read_text()
    (tmp_path / "run" / "training.lock").write_text(text)
    return tmp_path / "run"


def change(run, /, **fields):
    path = run / "training.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_verb_names_the_process_that_trains(short, capsys):
    write_config(short.directory, short.fitted())
    with RunLock(short.directory):
        assert main(["train", str(short.directory)]) == 1
    printed = " ".join(capsys.readouterr().err.split())
    held = f"{short.directory} is being trained by process {os.getpid()} on {os.uname().nodename} since 20"
    assert held in printed and "or choose another --workdir" in printed
    assert not (short.directory / "checkpoints").exists(), "nothing was touched"
    assert main(["train", str(short.directory)]) == 0
    assert not (short.directory / "training.lock").exists()


def test_a_run_that_ends_badly_gives_the_lock_back(short, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(short, quiet=True)
    assert not (short.directory / "training.lock").exists()


@pytest.mark.parametrize(
    "fields",
    [{"pid": 2**22 + 1}, {"began": "1"}, {"folder": 1}],
    ids=["no such process", "another process of the number", "a copied folder"],
)
def test_the_lock_of_a_dead_process_of_this_machine_is_taken(folder, quick, fields):
    change(folder, **fields)
    with RunLock(folder):
        assert json.loads((folder / "training.lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_another_machine_expires(folder, quick, capsys):
    change(folder, machine="other", host="far", pid=7, key="a")
    begin = time.monotonic()
    with RunLock(folder):
        assert time.monotonic() - begin > 0.4
    assert "waiting to see whether process 7 on far since" in capsys.readouterr().err
    change_time = time.time() - 3600
    (folder / "training.lock").write_text(json.dumps({"machine": "other", "key": "a"}))
    os.utime(folder / "training.lock", (change_time, change_time))
    begin = time.monotonic()
    with RunLock(folder):
        assert time.monotonic() - begin < 0.4, "it is long since it was written"


def test_a_living_process_of_another_machine_keeps_its_lock(folder, quick):
    change(folder, machine="other", host="far", pid=7, key="a")
    text, over = (folder / "training.lock").read_text(), threading.Event()

    def live():
        while not over.wait(0.05):
            half = folder / "other.part"
            half.write_text(text)
            os.replace(half, folder / "training.lock")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"is being trained by process 7 on far since .* expires 0\.5 s after"):
            RunLock(folder).__enter__()
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_lock_that_is_not_written_yet_or_broken_expires_too(folder, quick, content):
    (folder / "training.lock").write_text(content)
    with RunLock(folder):
        pass


def test_a_process_whose_lock_was_taken_over_stops_and_saves_nothing(short, quick, monkeypatch):
    original = loop.make_train_step

    def taken_over(*args):
        inner = original(*args)

        def train_step(state, batch):
            if int(state.step) == 3:
                change(Path(short.workdir), key="another", host="far", pid=7)
                time.sleep(0.3)
            return inner(state, batch)

        return train_step

    monkeypatch.setattr(loop, "make_train_step", taken_over)
    with pytest.raises(ValueError, match="was taken over by process 7 on far"):
        train(short, quiet=True)
    assert load(short.workdir).meta.step == 2
    assert json.loads((Path(short.workdir) / "training.lock").read_text())["key"] == "another"


def test_signs_of_life_go_on(folder, quick):
    (folder / "training.lock").unlink()
    with RunLock(folder):
        first = (folder / "training.lock").stat().st_mtime_ns
        time.sleep(0.3)
        assert (folder / "training.lock").stat().st_mtime_ns > first
    assert [path.name for path in folder.iterdir() if "lock" in path.name] == []
