"""Several real processes under jax.distributed, started by tpu_scripts/local.sh as a user would start them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import pytest

from jaxtok.door import open_model
from jaxtok.lm.tokenformer import uniform_counts
from jaxtok.training import distributed
from jaxtok.training.checkpoints import load, write_config
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.transfer.growth import Growth

LOCAL = Path(__file__).parents[2] / "tpu_scripts" / "local.sh"
FAST_COMPILATION = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
"""Each process has one device."""


def start(processes, experiment, *options, more=()):
    """Starts `jaxtok train` in this number of processes, with the run's own config and `more` arguments."""
    write_config(Path(experiment.workdir), experiment.fitted())
    env = os.environ | {
        "JAXTOK": f"{sys.executable} -m jaxtok.cli",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILATION,
        "PYTHONPATH": os.pathsep.join([str(LOCAL.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [str(LOCAL), *options, str(processes), "train", experiment.workdir, *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(job, code=0):
    output, _ = job.communicate(timeout=400)
    assert job.returncode == code, output
    return output


def losses(directory):
    return {(row["step"], row["split"]): row["loss"] for row in read_metrics(directory)}


def assert_same(run, reference):
    """The losses of all steps, and the parameters at the end."""
    ours, theirs = losses(run), losses(reference)
    assert ours.keys() == theirs.keys()
    for key, loss in theirs.items():
        assert ours[key] == pytest.approx(loss, rel=1e-5), key
    chex.assert_trees_all_close(load(run).params, load(reference).params, rtol=1e-7, atol=5e-5)


@pytest.fixture
def alone(experiment, tmp_path):
    """A run with a growth, in one process: its experiment."""
    model = dataclasses.replace(experiment.task.model, num_heads=4)
    experiment = dataclasses.replace(
        experiment,
        task=dataclasses.replace(experiment.task, model=model),
        data=dataclasses.replace(experiment.data, batch_size=8, streams=4),
        mesh=MeshConfig(data=1),
        workdir=str(tmp_path / "one"),
    )
    train(experiment, quiet=True)
    return experiment


def on(run, name, **mesh):
    return dataclasses.replace(run, mesh=MeshConfig(**mesh), workdir=str(Path(run.workdir).parent / name))


def resumed(run, name, **mesh):
    """What the run saved up to step 4, before the growth."""
    copy = on(run, name, **mesh)
    shutil.copytree(run.workdir, copy.workdir)
    for step in Path(copy.workdir, "checkpoints").iterdir():
        if int(step.name) > 4:
            shutil.rmtree(step)
    return copy


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        pytest.param(2, {"data": 1, "fsdp": 2}, id="two"),
        pytest.param(4, {"data": 1, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow, id="four"),
    ],
)
def test_several_processes_and_then_one_do_what_one_does(alone, processes, mesh):
    several = on(alone, "several", **mesh)
    finish(start(processes, several))
    assert_same(several.workdir, alone.workdir)
    writers = list(Path(several.workdir, "checkpoints", "10", "params").glob("ocdbt.process_*"))
    assert len(writers) >= 2, "each process writes what it holds"
    one = resumed(several, "rest", data=1)
    train(one, quiet=True)
    assert_same(one.workdir, alone.workdir)


@pytest.mark.slow
def test_two_processes_survive_damage_and_a_preemption_of_one_of_them(alone):
    saved = on(alone, "saved", data=1, fsdp=2)
    finish(start(2, saved))
    two = resumed(saved, "two", data=2)
    parts = Path(two.workdir, "checkpoints", "4", "params", "ocdbt.process_1", "d")
    part = max(parts.iterdir(), key=lambda path: path.stat().st_size)  # one of several processes finds the damage
    part.write_bytes(part.read_bytes()[:100])
    job = start(2, two, "--restarts", "1")
    preempt_one(job, two.workdir)
    output = finish(job)
    assert "checkpoint 4 is damaged" in output and "at step 2 of 10" in output
    assert "interrupted: saved step" in output
    assert_same(two.workdir, alone.workdir)


@pytest.mark.slow
def test_a_surgery_start_of_two_processes_is_that_of_one(experiment, tmp_path):
    """Both begin with the same new tokens beside those of the trained model, on a mesh that divides them."""
    short = dataclasses.replace(experiment.train, steps=2)
    experiment = dataclasses.replace(experiment, train=short, stages=(), mesh=MeshConfig(data=1))
    small = train(dataclasses.replace(experiment, workdir=str(tmp_path / "small")), quiet=True).directory
    grown = dataclasses.replace(
        experiment, task=experiment.task.with_model(tokens=uniform_counts(12, 32)), start=Growth(init="random")
    )
    one = dataclasses.replace(grown, workdir=str(tmp_path / "one"))
    alone = train(one, quiet=True, start=lambda: open_model(small)).directory
    two = dataclasses.replace(grown, mesh=MeshConfig(data=1, fsdp=2), workdir=str(tmp_path / "two"))
    finish(start(2, two, more=("--start", str(small))))
    assert_same(two.workdir, alone)


def preempt_one(job, workdir):
    """The second process gets SIGTERM as soon as a step was made."""
    path = Path(workdir, "metrics.jsonl")
    before = path.read_text()
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_text() != before and '"step": 5,' in path.read_text()):
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    for child in map(int, children):
        environ = Path(f"/proc/{child}/environ").read_bytes()
        if b"JAX_PROCESS_ID=1\0" in environ:
            os.kill(child, signal.SIGTERM)
            return
    raise AssertionError(f"process 1 is not among {children}")


@pytest.fixture
def joined(monkeypatch):
    """The arguments with which JAX joined the other processes."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "TPU_WORKER", "MEGASCALE")):
            monkeypatch.delenv(name)
    return calls


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, {}, None),
        ({}, {"coordinator": "a:1", "num_processes": 2, "process_id": 1}, ("a:1", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}, {}, ("b:2", 4, 0)),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}, {}, ()),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, {"coordinator": "c:3"}, ("c:3", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "h0,h1"}, {}, ()),
        ({"TPU_WORKER_HOSTNAMES": "h0"}, {}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "d"}, {}, ()),
        ({}, {"detect": True}, ()),
    ],
)
def test_processes_find_each_other(joined, monkeypatch, environment, arguments, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize(**arguments) == (expected is not None)
    assert joined == ([] if expected is None else [expected])


def test_a_coordinator_alone_is_not_enough(joined):
    with pytest.raises(ValueError, match="num-processes and --process-id"):
        distributed.initialize("a:1")
    with pytest.raises(ValueError, match="process-id is 2"):
        distributed.initialize("a:1", 2, 2)
    assert not joined


def test_one_process_agrees_with_itself():
    distributed.barrier("here")
    assert distributed.is_main() and distributed.gather({"a": 1}) == [{"a": 1}]
    assert json.dumps(distributed.gather("")) == '[""]'
