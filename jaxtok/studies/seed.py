"""SEED in small: both stages on digits and emoji, causal against bidirectional queries, embeddings against codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from jaxtok.door import open_model
from jaxtok.training.experiment import Experiment
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import train
from jaxtok.vision.retrieval import class_accuracy, pair_recall, pair_vectors
from jaxtok.vision.seed import LearnCodes, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStages:
    """A stage I and the stage II on top of it."""

    name: str
    alignment: Experiment
    codes: Experiment
    """A run of stage II, whose parameters start from those of `alignment`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedStudy:
    """Trains both stages of each arm, and measures retrieval and reconstruction on held-out images.

    It writes results.json and results.md; if it is run again, runs that are there are opened and not trained.
    """

    arms: tuple[TwoStages, ...]
    workdir: str
    split: str = "test"
    """The split of the measurements."""
    by_class: bool = False
    """Whether texts are classes, so that an image is compared with the texts of all classes, and not with those of
    other images."""

    def run(self) -> bool:
        """Runs everything; returns False if interrupted (the same command resumes it)."""
        rows: dict[str, dict[str, float]] = {}
        for arm in self.arms:
            numbers = self._arm(arm)
            if numbers is None:
                return False
            rows[arm.name] = numbers
        folder = Path(self.workdir)
        (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        table = rich.table.Table("", *rows)
        lines = [f"| | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
        for name in next(iter(rows.values())):
            cells = [f"{row[name]:.4g}" for row in rows.values()]
            table.add_row(name, *cells)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        (folder / "results.md").write_text("\n".join(lines) + "\n")
        rich.console.Console().print(table)
        return True

    def runs(self, arm: TwoStages) -> tuple[Experiment, Experiment]:
        """The two runs of an arm in their folders."""
        folder = Path(self.workdir) / arm.name
        first = dataclasses.replace(arm.alignment, name=f"{arm.name}_1", workdir=str(folder / "alignment"))
        second = dataclasses.replace(arm.codes, name=f"{arm.name}_2", workdir=str(folder / "codes"), start=LearnCodes())
        return first, second

    def _arm(self, arm: TwoStages) -> dict[str, float] | None:
        first, second = self.runs(arm)
        one = train(first)
        if one.interrupted:
            return None
        two = train(second, start=lambda: open_model(first.directory))
        if two.interrupted:
            return None
        return self.measure(one.task, one.params, two.task, two.params, first) | {
            "code_std_first": read_metrics(second.directory, "train")[0]["code_std"],
            "code_std": read_metrics(second.directory, "train")[-1]["code_std"],
        }

    def measure(self, task: Any, params: Any, codes: Seed, codes_params: Any, run: Experiment) -> dict[str, float]:
        """Numbers of held-out pairs."""
        data = dataclasses.replace(run.data, eval_limit=0)
        names = data.texts(self.split)
        found = {}
        for kind, second in (("embedding", None), ("codes", (codes, codes_params))):
            v, t = pair_vectors(task, params, data.eval_batches(self.split), second)
            numbers = {"accuracy": class_accuracy(v, t, names)} if self.by_class else pair_recall(v, t, names)
            found |= {f"{kind}_{name}": value for name, value in numbers.items()}
        numbers = codes.evaluate(codes_params, data.eval_batches(self.split))
        kept = ("semantic", "codes_used", "perplexity", "psnr")
        return found | {name: float(np.asarray(numbers[name])) for name in kept if name in numbers}
