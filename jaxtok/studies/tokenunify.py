"""TokenUnify in small: does pre-training on volumes without labels help to segment them with few labels?

Each arm is a pre-training (or none), then the same fine-tuning to affinities, windows over whole test volumes,
watershed and agglomeration, and the distance to the true segments.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
from jaxtyping import Float, Int, UInt8

from jaxtok.data.volumes import Volume
from jaxtok.door import open_model
from jaxtok.protocols import Params
from jaxtok.studies.comparison import key, markdown, print_table, spread, train_once
from jaxtok.training.experiment import Experiment
from jaxtok.vision.segmentation import Backend, score, segment
from jaxtok.vision.tokenunify import AffinityPrediction, affinities_of
from jaxtok.vision.windows import Windows, slide

COLUMNS = ("loss", "voi", "voi_split", "voi_merge", "arand")
NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeStudy:
    """Trains and measures the arms, one after the other; if it is run again, it resumes, or shows its results."""

    pretraining: tuple[Experiment, ...]
    """The arms with pre-training; the one without it is called none."""
    finetuning: Experiment
    """What all arms go through; its `start` is a `ToAffinities`."""
    volumes: tuple[str, ...] = ()
    """The training volumes; empty: those of the experiments. Pre-training also sees the test volumes, but no labels."""
    labels: tuple[str, ...] = ()
    test_volumes: tuple[str, ...] = ()
    test_labels: tuple[str, ...] = ()
    labelled_depth: float = 0.4
    """The share of the given volumes' depth whose labels are used, as labels are few."""
    seeds: tuple[int, ...] = (0, 1, 2)
    overlap: float = 0.5
    threshold: float = 0.5
    """The threshold of the agglomeration."""
    backend: Backend = "auto"
    workdir: str = "runs/tokenunify_study"

    def __post_init__(self):
        names = [NONE, *(arm.name for arm in self.pretraining)]
        if len(set(names)) < len(names):
            raise ValueError(f"the arms are named {', '.join(names)}; give each another name.")
        if not self.seeds:
            raise ValueError("seeds is empty; give at least one.")
        if not 0 < self.labelled_depth <= 1:
            raise ValueError(f"labelled_depth is {self.labelled_depth}; it must be a share in (0, 1].")
        if bool(self.volumes) != bool(self.test_volumes):
            raise ValueError("volumes and test_volumes must be given together, as must their labels.")

    @property
    def names(self) -> tuple[str, ...]:
        return (NONE, *(arm.name for arm in self.pretraining))

    def run(self) -> bool:
        """Trains, segments, and writes results.json, results.md and pictures; returns False if interrupted."""
        folder, console = Path(self.workdir), rich.console.Console()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        todo = [(seed, name) for seed in self.seeds for name in self.names if key(name, seed) not in results]
        for number, (seed, name) in enumerate(todo, 1):
            console.rule(f"{number} of {len(todo)}: {name}, seed {seed}")
            found = self._run_arm(name, seed)
            if found is None:
                return False
            results[key(name, seed)] = found
            file.write_text(json.dumps(results, indent=1) + "\n")
            console.print({column: round(found[column], 4) for column in COLUMNS})
        rows = self.summarize(results)
        (folder / "results.md").write_text(markdown(rows))
        print_table(console, rows)
        console.print(f"table: {folder / 'results.md'}\npictures: {folder}/*.png", highlight=False, soft_wrap=True)
        return True

    def experiment(self, like: Experiment, name: str, seed: int, pretraining: bool) -> Experiment:
        """Returns one run of an arm, with its volumes, its seed and its folder."""
        changes: dict[str, Any] = {"seed": seed}
        if self.volumes:
            changes |= {"volumes": self.volumes, "labels": self.labels}
            changes |= {"test_volumes": self.test_volumes, "test_labels": self.test_labels}
            changes["depth_range"] = (0.0, 1.0 if pretraining else self.labelled_depth)
            if pretraining:
                changes |= {"volumes": self.volumes + self.test_volumes, "labels": (), "test_labels": ()}
        folder = Path(self.workdir) / f"seed{seed}" / (f"{name}_pretraining" if pretraining else name)
        return dataclasses.replace(
            like,
            name=name,
            data=dataclasses.replace(like.data, **changes),
            train=dataclasses.replace(like.train, seed=seed),
            workdir=str(folder),
        )

    def _run_arm(self, name: str, seed: int) -> dict[str, Any] | None:
        began, start = time.monotonic(), None
        errors: dict[str, float] = {}
        for arm in self.pretraining:
            if arm.name == name:
                before = self.experiment(arm, name, seed, True)
                pretrained = train_once(before)
                if pretrained.interrupted:
                    return None
                errors = {f"pretraining_{k}": float(v) for k, v in pretrained.metrics.items() if k != "crops"}
                start = functools.partial(open_model, before.directory)
        experiment = self.experiment(self.finetuning, name, seed, False)
        result = train_once(experiment, start)
        if result.interrupted:
            return None
        numbers = dict(result.task.evaluate(result.params, experiment.data.eval_batches("test")))
        scores = []
        for place, volume in enumerate(experiment.data.open("test")):
            found = predict_affinities(result.task, result.params, volume, self.overlap)
            segments = segment(found, self.threshold, self.backend)
            scores.append(score(np.asarray(volume.segments), segments))
            if place == 0:
                self._picture(name, seed, volume, found, segments)
        mean = {field: float(np.mean([getattr(s, field) for s in scores])) for field in scores[0]._fields}
        return {"loss": numbers["loss"], **mean, **errors, "seconds": time.monotonic() - began}

    def summarize(self, results: dict[str, Any]) -> list[dict[str, str]]:
        """Returns a row for each arm: the mean of its seeds, half of their range, and VOI as a share of that without
        pre-training (the mean over seeds of the ratio, and how many seeds are better)."""
        rows = []
        for name in self.names:
            seeds = [s for s in self.seeds if key(name, s) in results]
            if not seeds:
                continue
            row = {"pre-training": name, "seeds": str(len(seeds))}
            for column in COLUMNS:
                row[column.replace("_", " ")] = spread([results[key(name, s)][column] for s in seeds])
            both = [s for s in seeds if key(NONE, s) in results]
            ratios = [results[key(name, s)]["voi"] / results[key(NONE, s)]["voi"] for s in both]
            row["VOI of none"] = f"{statistics.mean(ratios):.3f}" if ratios else ""
            row["better in"] = f"{sum(r < 1 for r in ratios)} of {len(ratios)}" if ratios and name != NONE else ""
            rows.append(row)
        return rows

    def _picture(self, name: str, seed: int, volume: Volume, found: np.ndarray, segments: np.ndarray) -> None:
        middle = volume.shape[0] // 2
        panels = [
            grey(volume[middle : middle + 1][0]),
            coloured(np.asarray(volume.segments[middle])),
            grey(found[1:, middle].mean(0)),
            coloured(segments[middle]),
        ]
        _save(panels, Path(self.workdir) / f"seed{seed}_{name}.png")


def predict_affinities(
    task: AffinityPrediction, params: Params, volume: Any, overlap: float = 0.5, batch_size: int = 8
) -> Float[np.ndarray, "3 depth height width"]:
    """The affinities of a whole volume, in memory."""
    windows = Windows(crop=task.model.crop, overlap=overlap, batch_size=batch_size)
    parts = slide(functools.partial(affinities_of, task, params), volume, windows)
    return np.clip(np.concatenate([part for _, part in parts], 1), 0, 1)


def grey(plane: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """A plane in [0, 1] as a picture."""
    pixels = np.round(255 * np.clip(plane, 0, 1)).astype(np.uint8)
    return np.broadcast_to(pixels[..., None], (*pixels.shape, 3))


def coloured(plane: Int[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """Segments in colours, which their numbers choose; 0 is black."""
    table = np.random.default_rng(7).integers(60, 256, (4096, 3)).astype(np.uint8)
    return np.where(plane[..., None] > 0, table[plane % 4096], np.uint8(0))


def _save(panels: list[np.ndarray], path: Path) -> None:
    from PIL import Image

    gap = np.full((panels[0].shape[0], 4, 3), 255, np.uint8)
    row = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], 1)
    Image.fromarray(row).resize((2 * row.shape[1], 2 * row.shape[0]), Image.Resampling.NEAREST).save(path)
