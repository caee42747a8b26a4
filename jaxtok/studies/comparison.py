"""Models compared: each is trained by the one loop, for each seed, evaluated on the test split, and measured."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from jaxtok.configuration import to_json
from jaxtok.door import open_model
from jaxtok.training.checkpoints import read_config
from jaxtok.training.experiment import Experiment
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import Result, count, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trains the arms one after the other; if it is run again, it resumes, or shows its results."""

    arms: tuple[Experiment, ...]
    """The experiments in the order of the table, each with its own name."""
    seeds: tuple[int, ...] = (0,)
    """The seeds with which each arm is trained."""
    base: Experiment | str | None = None
    """The model with whose parameters all arms start: a run that is trained first (with each seed), or what
    `jaxtok.open` takes; None: there is none."""
    measures: tuple[Any, ...] = ()
    """Frozen dataclasses that are called with an arm's task, parameters and data, and return numbers by name; none if
    they do not apply to the arm."""
    columns: tuple[str, ...] = ("bits_per_byte",)
    """The metrics of the test split and the measured numbers that the table shows."""
    curve: str = "bits_per_byte"
    """The validation metric that is plotted against training compute."""
    test_batches: int = 0
    """The number of held-out batches in the final evaluation; 0: the whole test split."""
    title: str = ""
    """The title of the table and of the plot."""
    workdir: str = "runs/comparison"
    """The folder for runs and results."""

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms are named {', '.join(names) or 'nothing'}; give at least one, each another name.")
        if not self.seeds:
            raise ValueError("seeds is empty; give at least one.")

    def run(self) -> bool:
        """Trains, evaluates, and writes results.json, results.md and curves.png; returns False if interrupted."""
        folder = Path(self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        console = rich.console.Console()
        todo = [
            (seed, arm)
            for seed in self.seeds
            for arm in self.arms
            if results.get(key(arm.name, seed), {}).get("signature") != self._signature(arm, seed)
        ]
        if not todo:
            console.print(f"{folder} is complete; remove the folder to run it again.", soft_wrap=True)
        for number, (seed, arm) in enumerate(todo, 1):
            console.rule(f"{number} of {len(todo)}: {arm.name}, {arm.total_steps} steps, seed {seed}")
            result = self._run_arm(arm, seed)
            if result is None:
                return False
            results[key(arm.name, seed)] = result
            file.write_text(json.dumps(results, indent=1) + "\n")
        self._show(results, folder, console)
        return True

    def experiment(self, arm: Experiment, seed: int) -> Experiment:
        """Returns an arm with a seed for parameters, batches and steps, in its own folder."""
        data = dataclasses.replace(arm.data, seed=seed)
        folder = Path(self.workdir) / f"seed{seed}" / arm.name
        return dataclasses.replace(arm, data=data, train=dataclasses.replace(arm.train, seed=seed), workdir=str(folder))

    def _signature(self, arm: Experiment, seed: int) -> str:
        """Returns a text that changes with whatever changes an arm's result."""
        experiment = dataclasses.replace(self.experiment(arm, seed), workdir="")
        what = json.dumps([to_json(experiment), to_json(self.measures), self.test_batches, *self._base_as_json(seed)])
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def _base_as_json(self, seed: int) -> list[Any]:
        if not isinstance(self.base, Experiment):
            return [] if self.base is None else [self.base]
        return [to_json(dataclasses.replace(self.experiment(self.base, seed), workdir=""))]

    def _run_arm(self, arm: Experiment, seed: int) -> dict[str, Any] | None:
        experiment = self.experiment(arm, seed)
        result = self._train(arm, seed)
        if result.interrupted:
            return None
        data = dataclasses.replace(experiment.data, eval_limit=self.test_batches)
        numbers = dict(result.task.evaluate(result.params, data.eval_batches("test")))
        for measure in self.measures:
            numbers |= measure(result.task, result.params, experiment.data)
        rows = read_metrics(experiment.directory, "train")
        return {
            "signature": self._signature(arm, seed),
            "arm": arm.name,
            "seed": seed,
            "parameters": count(result.params),
            "steps": result.step,
            "train_flops": result.flops,
            "seconds_per_step": statistics.median(row["seconds_per_step"] for row in rows),
            "validation": result.metrics,
            "test": {name: float(value) for name, value in numbers.items()},
        }

    def _train(self, arm: Experiment, seed: int) -> Result:
        start = None
        if isinstance(self.base, Experiment):
            result = train_once(base := self.experiment(self.base, seed))
            if result.interrupted:
                return result
            start = functools.partial(open_model, base.directory)
        elif self.base is not None:
            start = functools.partial(open_model, self.base)
        return train_once(self.experiment(arm, seed), start)

    def _show(self, results: dict[str, Any], folder: Path, console: rich.console.Console) -> None:
        rows = self.summarize(results)
        (folder / "results.md").write_text(markdown(rows))
        plot = self._plot(results, folder / "curves.png")
        seeds = f": mean of {len(self.seeds)} seeds ± half their range" if len(self.seeds) > 1 else ""
        console.rule(f"{self.title or folder.name}, on the test split{seeds}")
        print_table(console, rows)
        console.print(f"table: {folder / 'results.md'}\nplot:  {plot}", highlight=False, soft_wrap=True)

    def summarize(self, results: dict[str, Any]) -> list[dict[str, str]]:
        """Returns a row for each arm; a number that an arm does not have is empty."""
        rows = []
        for arm in self.arms:
            runs = [results[key(arm.name, s)] for s in self.seeds if key(arm.name, s) in results]
            row = {
                "model": arm.name,
                "params": f"{runs[0]['parameters'] / 1e6:.2f}M",
                "steps": f"{runs[0]['steps']}",
                "TFLOP": f"{runs[0]['train_flops'] / 1e12:.2f}",
                "s/step": spread([r["seconds_per_step"] for r in runs]),
            }
            for column in self.columns:
                values = [r["test"][column] for r in runs if column in r["test"]]
                row[column.replace("_", " ")] = spread(values) if values else ""
            rows.append(row)
        return rows

    def _plot(self, results: dict[str, Any], path: Path) -> Path:
        """Plots the validation metric against training compute: a line for each arm, with the range of its seeds."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 5))
        for arm in self.arms:
            lines = []
            for seed in (s for s in self.seeds if key(arm.name, s) in results):
                rows = read_metrics(self.experiment(arm, seed).directory, "validation")
                lines.append([(row["train_flops"], row[self.curve]) for row in rows if self.curve in row])
            curves = np.array([line[: min(map(len, lines))] for line in lines])  # [seeds, evaluations, 2]
            if not curves.size:
                continue
            flops, values = curves[0, :, 0] / 1e12, curves[..., 1]
            (line,) = axes.plot(flops, values.mean(0), label=arm.name, marker="o", markersize=3)
            axes.fill_between(flops, values.min(0), values.max(0), color=line.get_color(), alpha=0.1)
        axes.set_xlabel("training compute (TFLOP)")
        axes.set_ylabel(f"validation {self.curve.replace('_', ' ')}")
        axes.set_title(self.title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
        return path


def train_once(experiment: Experiment, start: Callable[[], Any] | None = None) -> Result:
    """Trains a run, or resumes it, under the schedule of its config.

    Args:
      start: as in `jaxtok.training.loop.train`.

    Raises:
      ValueError: its folder holds a run of another number of steps, which `train` would go on with, under a schedule
        of its own for the added steps.
    """
    if (experiment.directory / "checkpoints").is_dir():
        there = read_config(experiment.directory).total_steps
        if there != experiment.total_steps:
            raise ValueError(
                f"{experiment.directory} holds a run of {there:,} steps, not of {experiment.total_steps:,}; choose "
                "another --workdir."
            )
    return train(experiment, start=start)


def key(arm: str, seed: int) -> str:
    """Returns the key of an arm's result."""
    return f"{arm}/{seed}"


def spread(values: Sequence[float]) -> str:
    """Returns the mean, +- half of the range."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ±{(max(values) - min(values)) / 2:.3f}"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(console: rich.console.Console, rows: Sequence[dict[str, str]]) -> None:
    table = rich.table.Table(*rows[0], box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
