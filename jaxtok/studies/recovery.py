"""Does a run survive being killed? `jaxtok recovery` kills one again and again and compares it with an undisturbed one.

SIGKILL comes at random moments: while the program starts, between and in steps, and while a checkpoint is written. In
the end, parameters, optimizer state, position in the data and logged numbers must be the same, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import rich.console
import rich.progress
from tyro.conf import Positional, arg

from jaxtok.door import experiment_of
from jaxtok.training.checkpoints import Checkpoints, load, must_be_free
from jaxtok.training.logs import read_metrics

CLOCK = (
    "seconds_per_step",
    "tokens_per_second",
    "words_per_second",
    "images_per_second",
    "fraction_of_peak",
    "train_seconds",
)
"""The logged numbers that depend on the time it took."""


def recovery(
    config: Positional[Annotated[str, arg(metavar="[CONFIG]")]] = "recovery",
    kills: int = 50,
    processes: int = 1,
    workdir: Path = Path("runs/recovery"),
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Kills a run many times, lets it finish, and compares it with an undisturbed one, bit for bit.

    Args:
      config: The name or file of the run's config; it should log every step and save often.
      kills: How often the run is killed; it is started again each time.
      processes: How many processes the run has. One of them is killed, and then the others, as a launcher does.
      workdir: The new folder for both runs.
      seed: The seed of the moments at which the run is killed.
      quiet: Whether the progress bar is left out.

    Raises:
      ValueError: the run could not be started again, or ended differently; the message tells in what.
    """
    must_be_free(workdir)
    total = experiment_of(config, "recovery").total_steps
    workdir.mkdir(parents=True, exist_ok=True)
    undisturbed, disturbed = workdir / "undisturbed", workdir / "killed"
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        bar = progress.add_task("undisturbed run", total=kills)
        _end(_Job(config, undisturbed, processes))
        moments = random.Random(seed)
        killed: Counter = Counter()
        for number in range(kills):
            phase = moments.choice(["start", "step", "step", "checkpoint", "checkpoint"])
            # The kills come later and later in the run, so that all of it is visited.
            target = int((number + moments.random()) / kills * (total - 4))
            job = _Job(config, disturbed, processes)
            progress.update(bar, description=f"kill {number + 1} of {kills}, in a {phase}, at step {target}")
            if job.kill_in(phase, target, moments):
                killed[phase] += 1
            else:
                raise ValueError(f"the run ended before kill {number + 1}; give it more steps. {job.last_lines()}")
            progress.advance(bar)
        progress.update(bar, description="the last start")
        _end(_Job(config, disturbed, processes))
    differences = compare(undisturbed, disturbed)
    if differences:
        raise ValueError(f"the killed run ended differently in: {', '.join(differences)}; both are in {workdir}.")
    return {
        "kills": kills,
        "processes": processes,
        **{f"in a {phase}": n for phase, n in sorted(killed.items())},
        "steps": total,
        "lost": 0,
        "same bits": "parameters, optimizer state, position in the data, logged numbers",
    }


def compare(one: Path, other: Path) -> list[str]:
    """Returns in what two finished runs differ."""
    different = []
    a, b = load(one), load(other)
    if a.meta.step != b.meta.step:
        different.append(f"steps ({a.meta.step} and {b.meta.step})")
    for name, x, y in (("parameters", a.params, b.params), ("optimizer state", a.opt_state(), b.opt_state())):
        same = jax.tree.structure(x) == jax.tree.structure(y) and jax.tree.all(jax.tree.map(_same_bits, x, y))
        if not same:
            different.append(name)
    positions = []
    for run in (a, b):
        with Checkpoints(run.directory) as checkpoints:
            positions.append(checkpoints.data(run.meta.step))
    if positions[0] != positions[1]:
        different.append("position in the data")
    if numbers(one) != numbers(other):
        different.append("logged numbers")
    return different


def numbers(run: Path) -> list[dict[str, Any]]:
    """Returns what a run has logged, without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(run)]


def _same_bits(x: Any, y: Any) -> bool:
    x, y = np.asarray(x), np.asarray(y)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


class _Job:
    """A run in its own processes."""

    def __init__(self, config: str, workdir: Path, processes: int):
        self.workdir = workdir
        self._log = (workdir.parent / f"{workdir.name}.log").open("ab")
        command = [sys.executable, "-m", "jaxtok.cli", "train", config, "--workdir", str(workdir)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self._processes = []
        for i in range(processes):
            env = dict(os.environ)
            if processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(i),
                }
            self._processes.append(subprocess.Popen(command, env=env, stdout=self._log, stderr=self._log))

    def kill_in(self, phase: str, target: int, moments: random.Random) -> bool:
        """Kills it in the phase; returns False if it ended before."""
        if phase == "start":
            end = time.monotonic() + moments.uniform(0.0, 8.0)
            return self._kill(lambda: time.monotonic() >= end, 0.0, moments)
        wait = moments.uniform(0.0, 0.1 if phase == "step" else 0.05)
        if phase == "step":
            return self._kill(lambda: self._step() >= target, wait, moments)
        return self._kill(lambda: self._step() >= target and self._is_saving(), wait, moments)

    def _kill(self, moment: Any, wait: float, moments: random.Random) -> bool:
        while not moment():
            if any(p.poll() is not None for p in self._processes):
                self.end(0)
                return False
            time.sleep(0.001)
        time.sleep(wait)
        moments.choice(self._processes).send_signal(signal.SIGKILL)
        time.sleep(moments.uniform(0.0, 0.2) if len(self._processes) > 1 else 0.0)
        self.end(0)
        return True

    def _step(self) -> int:
        """Returns the newest step that was logged; -1 if there is none."""
        try:
            with (self.workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 2000))
                return json.loads(file.read().split(b"\n")[-2])["step"]
        except (OSError, ValueError, IndexError):
            return -1

    def _is_saving(self) -> bool:
        try:
            return any("tmp" in name for name in os.listdir(self.workdir / "checkpoints"))
        except OSError:
            return False

    def end(self, seconds: float) -> int:
        """Waits so long, then kills what is left; returns the first exit code that is not 0."""
        codes = []
        for process in self._processes:
            try:
                codes.append(process.wait(seconds or None) if seconds else process.wait(0))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        self._log.close()
        return next((code for code in codes if code), 0)

    def last_lines(self) -> str:
        text = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return "Its last lines: " + " / ".join(text[-3:])


def _end(job: _Job) -> None:
    if code := job.end(3600):
        raise ValueError(f"the run ended with exit code {code}. {job.last_lines()}")
