"""The growth study: a TokenFormer that is trained, grown and trained on, against models of the final size from scratch.

TokenFormer's claim (arXiv 2410.23168, section 4.1) is that growing reaches a comparable loss with much less compute in
all. Other arms show what this comparison would hide: the small model trained for as long, and the Transformer.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import rich.console

from jaxtok.configuration import differences, from_json, to_json
from jaxtok.door import open_model
from jaxtok.lm.transformer import matched_transformer
from jaxtok.nn.parameter_attention import TokenCounts
from jaxtok.studies.comparison import key, markdown, print_table, spread, train_once
from jaxtok.training.checkpoints import fork, load
from jaxtok.training.experiment import Experiment
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import count
from jaxtok.transfer.growth import Growth


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the comparison; there are N steps before the growth and M after it."""

    label: str
    steps: str = "N"
    """How long it is trained: N, M or N+M."""
    final_size: bool = False
    transformer: bool = False
    fork: bool = False
    """Whether it starts from the trained base, with or without a growth."""
    growth: dict[str, str] | None = None


ARMS = {
    "base": Arm("base, before growth"),
    "continued": Arm("base, trained on (schedule restarted)", "M", fork=True),
    "longer": Arm("base, one longer schedule", "N+M"),
    "zero_keys": Arm("grown, zero keys, fixed tau", "M", fork=True, growth={}),
    "zero_keys_keep": Arm("grown, zero keys, old moments kept", "M", fork=True, growth={"optimizer": "keep"}),
    "zero_keys_new": Arm("grown, zero keys, only new tokens trained", "M", fork=True, growth={"train": "new"}),
    "zero_keys_current": Arm("grown, zero keys, current tau", "M", fork=True, growth={"scale": "current"}),
    "copy": Arm("grown, copied keys", "M", fork=True, growth={"init": "copy"}),
    "random": Arm("grown, random keys (released recipe)", "M", fork=True, growth={"init": "random"}),
    "random_new": Arm(
        "grown, random keys, only new tokens trained", "M", fork=True, growth={"init": "random", "train": "new"}
    ),
    "scratch_short": Arm("final size from scratch", "M", final_size=True),
    "scratch": Arm("final size from scratch", "N+M", final_size=True),
    "transformer": Arm("Transformer of the base's size", transformer=True),
    "transformer_scratch": Arm("Transformer of the final size", "N+M", final_size=True, transformer=True),
}
"""The arms by name, in the order in which they run and are listed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthStudy:
    """Trains the arms one after the other; if it is run again, it resumes, or shows its results."""

    base: Experiment
    """The small model; its train.steps are N."""
    to: TokenCounts
    """The parameter tokens of the final size."""
    steps: int
    """M, the number of steps after the growth."""
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0,)
    test_batches: int = 0
    """The number of held-out batches in the final evaluation; 0: the whole test split."""
    prompt: str = "def "
    """The prompt that the first grown model continues."""
    workdir: str = "runs/growth"

    def __post_init__(self):
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"arms has {', '.join(unknown)}; they must be among {', '.join(ARMS)}.")
        if "base" not in self.arms or not self.seeds:
            raise ValueError(
                f"arms are {', '.join(self.arms)} and seeds {self.seeds}; arms must have base, from which the grown "
                "ones start, and there must be a seed."
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1.")

    def run(self) -> bool:
        """Trains, evaluates, and writes results.json, results.md and loss_vs_compute.png; False if interrupted."""
        folder = Path(self.workdir)
        results = self._load(folder)
        console = rich.console.Console()
        todo = [
            (seed, arm) for seed in self.seeds for arm in ARMS if arm in self.arms and key(arm, seed) not in results
        ]
        if not todo:
            console.print(f"{folder} is complete; remove the folder to run the study again.", soft_wrap=True)
        for number, (seed, arm) in enumerate(todo, 1):
            console.rule(f"{number} of {len(todo)}: {ARMS[arm].label}, {ARMS[arm].steps} steps, seed {seed}")
            result = self._run_arm(arm, seed)
            if result is None:
                return False
            results[key(arm, seed)] = result
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self._show(results, folder, console)
        return True

    def folder(self, arm: str, seed: int) -> Path:
        """Returns the folder of an arm's run."""
        return Path(self.workdir) / f"seed{seed}" / arm

    def _load(self, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "study.json"
        if stored.exists():
            may_change = ("arms", "seeds", "workdir", "prompt", "base.train.log_every")
            changed = [
                d for d in differences(self, from_json(json.loads(stored.read_text()))) if not d.startswith(may_change)
            ]
            if changed:
                raise ValueError(f"{folder} holds another study: {'; '.join(changed)}. Choose another --workdir.")
        stored.write_text(json.dumps(to_json(self), indent=1) + "\n")
        results = folder / "results.json"
        return json.loads(results.read_text()) if results.exists() else {}

    def experiment(self, arm: str, seed: int) -> Experiment:
        """Returns the run of an arm that does not start from the base."""
        spec, base = ARMS[arm], self.base
        model = base.task.model
        if spec.final_size:
            model = dataclasses.replace(model, tokens=self.to | model.tokens)
        if spec.transformer:
            model = matched_transformer(model)
        steps = {"N": base.train.steps, "M": self.steps, "N+M": base.train.steps + self.steps}[spec.steps]
        return dataclasses.replace(
            base,
            task=dataclasses.replace(base.task, model=model),
            data=dataclasses.replace(base.data, seed=seed),
            train=dataclasses.replace(base.train, seed=seed, steps=steps),
            name=arm,
            workdir=str(self.folder(arm, seed)),
        )

    def _run_arm(self, arm: str, seed: int) -> dict[str, Any] | None:
        spec, folder = ARMS[arm], self.folder(arm, seed)
        if spec.fork and not (folder / "config.json").exists():
            growth = None if spec.growth is None else Growth(to=self.to, steps=self.steps, **spec.growth)
            fork(self.folder("base", seed), folder, steps=self.steps, surgery=growth, seed=seed)
        experiment = load(folder).experiment if spec.fork else self.experiment(arm, seed)
        first = self._first(folder, experiment) if spec.fork else None
        result = train_once(experiment)
        if result.interrupted:
            return None
        test = self._evaluate(result.task, result.params, experiment, "test")
        rows = read_metrics(folder, "train")
        return {
            "arm": arm,
            "seed": seed,
            "parameters": count(result.params),
            "steps": result.step,
            "train_flops": result.flops,
            "seconds_per_step": statistics.median(row["seconds_per_step"] for row in rows),
            "first_bits_per_byte": first,
            "validation_bits_per_byte": result.metrics["bits_per_byte"],
            "test_bits_per_byte": test["bits_per_byte"],
            "test_loss": test["loss"],
        }

    def _first(self, folder: Path, experiment: Experiment) -> float:
        """Returns the validation bits per byte of a forked run before its first step; a file keeps them."""
        note = folder / "first.json"
        if not note.exists():
            start = load(folder / "checkpoints" / "0")
            metrics = self._evaluate(start.task, start.params, experiment, "validation")
            note.write_text(json.dumps(metrics) + "\n")
        return json.loads(note.read_text())["bits_per_byte"]

    def _evaluate(self, task: Any, params: Any, experiment: Experiment, split: str) -> dict[str, float]:
        limit = self.test_batches if split == "test" else experiment.data.eval_limit
        return task.evaluate(params, dataclasses.replace(experiment.data, eval_limit=limit).eval_batches(split))

    def _show(self, results: dict[str, Any], folder: Path, console: rich.console.Console) -> None:
        rows = summarize(results, self.arms, self.seeds)
        (folder / "results.md").write_text(markdown(rows))
        plot = plot_curves(self, results, folder / "loss_vs_compute.png")
        grown = next((a for a in self.arms if ARMS[a].growth is not None), "base")
        console.rule(f"a sample of: {ARMS[grown].label}")
        console.print(self._sample(grown), highlight=False, markup=False)
        seeds = f", mean of {len(self.seeds)} seeds ± half their range" if len(self.seeds) > 1 else ""
        console.rule(f"bits per byte: at the first step, on validation and on test files{seeds}")
        print_table(console, rows)
        console.print(f"table: {folder / 'results.md'}\nplot:  {plot}", highlight=False, soft_wrap=True)

    def _sample(self, arm: str) -> str:
        """Returns the prompt as continued by an arm's model."""
        return self.prompt + open_model(self.folder(arm, self.seeds[0])).generate(self.prompt, temperature=0.7)


def summarize(results: dict[str, Any], arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[dict[str, str]]:
    """Returns a row for each arm; bits per byte are means over the seeds that have been run, +- half of the range."""

    rows = []
    for arm in (a for a in ARMS if a in arms):
        found = [results[key(arm, s)] for s in seeds if key(arm, s) in results]
        if not found:
            continue
        firsts = [r["first_bits_per_byte"] for r in found if r["first_bits_per_byte"] is not None]
        rows.append(
            {
                "model": ARMS[arm].label,
                **({"seeds": f"{len(found)}"} if len(seeds) > 1 else {}),
                "steps": ARMS[arm].steps,
                "params": f"{found[0]['parameters'] / 1e6:.2f}M",
                "TFLOP": f"{found[0]['train_flops'] / 1e12:.2f}",
                "start": spread(firsts) if firsts else "",
                "validation": spread([r["validation_bits_per_byte"] for r in found]),
                "test": spread([r["test_bits_per_byte"] for r in found]),
            }
        )
    return rows


def plot_curves(study: GrowthStudy, results: dict[str, Any], path: Path) -> Path:
    """Plots validation bits per byte against training compute: a line for each arm, with the range of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    arms = [a for a in ARMS if a in study.arms]
    colors = plt.get_cmap("tab10" if len(arms) <= 10 else "tab20").colors
    for arm, color in zip(arms, colors):
        spec, lines = ARMS[arm], []
        for seed in (s for s in study.seeds if key(arm, s) in results):
            rows = read_metrics(study.folder(arm, seed), "validation")
            points = [(row["train_flops"], row["bits_per_byte"]) for row in rows]
            if spec.fork:  # the line begins where the base ended, with the loss right after the growth
                first = results[key(arm, seed)]["first_bits_per_byte"]
                points.insert(0, (results[key("base", seed)]["train_flops"], first))
            lines.append(points)
        if not lines:
            continue
        curves = np.array(lines)  # [seeds, evaluations, 2]
        flops, bits = curves[0, :, 0] / 1e12, curves[..., 1]
        style = {"color": color, "linestyle": "--" if spec.fork else "-", "marker": "o", "markersize": 3}
        axes.plot(flops, bits.mean(0), label=f"{spec.label}, {spec.steps} steps", **style)
        axes.fill_between(flops, bits.min(0), bits.max(0), color=color, alpha=0.08)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training compute, including that of the base (TFLOP)")
    axes.set_ylabel("validation bits per byte")
    axes.set_title("TokenFormer: grown (dashed) against trained from scratch")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
