"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

GUARDED = 1000
"""The number of rows that a task's guard is given."""


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard; when a run is resumed, it drops the lines after the checkpoint."""

    def __init__(self, directory: Path, step: int, tensorboard: bool = True):
        self.path = directory / "metrics.jsonl"
        self.evaluated = -1
        """The step of the last evaluation that was logged before the run was resumed."""
        self.trained: list[dict[str, Any]] = []
        """The newest rows of training, at most `GUARDED`, that were logged before the run was resumed."""
        if self.path.exists():
            kept = [row for row in read_metrics(directory) if row["step"] <= step]
            self.evaluated = max((row["step"] for row in kept if row["split"] == "validation"), default=-1)
            self.trained = [row for row in kept if row["split"] == "train"][-GUARDED:]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("ab", buffering=0)
        self._pending = b""
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self._pending += (json.dumps({"step": step, "split": split} | values) + "\n").encode()
        with contextlib.suppress(OSError):  # if the disk is full, it is written with a later line
            self._pending = self._pending[self._file.write(self._pending) :]
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def write_whole(path: Path, text: str) -> None:
    """Writes all of a file or nothing, even if the process dies in between."""
    half = path.with_name(path.name + ".part")
    half.write_text(text)
    os.replace(half, path)


class NoLog:
    """The log of processes that write none."""

    evaluated = -1
    trained: tuple[()] = ()

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(directory: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl, of one split or of all; a half-written last line is left out."""
    rows = []
    for line in (Path(directory) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if split in (None, row["split"])]


class Display:
    """A progress bar with the remaining time on a terminal; elsewhere, a line from time to time."""

    def __init__(self, title: str, total: int, start: int, enabled: bool = True):
        self.total, self.enabled = total, enabled
        self.console = rich.console.Console(file=sys.stderr)
        self.live = enabled and self.console.is_terminal
        columns = rich.progress
        self._progress = columns.Progress(
            columns.TextColumn("[bold]{task.description}"),
            columns.BarColumn(bar_width=24),
            columns.MofNCompleteColumn(),
            columns.TextColumn("{task.fields[numbers]}"),
            columns.TextColumn("left"),
            columns.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            disable=not self.live,
        )
        self._bar = self._progress.add_task(title, total=total, completed=start, numbers="compiling")
        self.title = title

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        self._progress.update(self._bar, completed=step)

    def numbers(self, step: int, split: str, values: dict[str, float]) -> None:
        text = format_numbers(values)
        if split == "train":
            self._progress.update(self._bar, numbers=text)
            if self.enabled and not self.live:
                self.say(f"{self.title} {step}/{self.total} {text}")
        else:
            self.say(f"{self.title} {step}/{self.total} {split}: {text}")

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)


_SHOWN = {  # name of a metric -> how it is shown
    "loss": "loss {:.3f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "perplexity": "perplexity {:.2f}",
    "accuracy": "accuracy {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "words_per_second": "{:,.0f} words/s",
    "images_per_second": "{:,.0f} images/s",
    "fraction_of_peak": "{:.2f} of peak",
}


def format_numbers(values: dict[str, float]) -> str:
    shown = [(text, values[name]) for name, text in _SHOWN.items() if name in values]
    return "  ".join(text.format(value) for text, value in shown if not math.isnan(value))
