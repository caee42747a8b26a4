"""FlexTok in small: error against the number of tokens, use of codes, pictures from few tokens, and drawn ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console

from jaxtok.data.images import ImageData
from jaxtok.nn.quantizers import perplexity
from jaxtok.protocols import Params
from jaxtok.studies.comparison import Comparison, key, train_once
from jaxtok.training.experiment import Experiment
from jaxtok.verbs.vision import draw_images, open_tokenizer, tokenize
from jaxtok.vision.grids import image_grid


@dataclasses.dataclass(frozen=True)
class OrderedCodeUse:
    """Measures the codes of all images: how many values occur at all, at the first position and at a position on
    average; the perplexity of these; and the standard deviation of the codes' scalars over images."""

    split: str = "all"

    def __call__(self, task: Any, params: Params, data: ImageData) -> dict[str, float]:
        data = dataclasses.replace(data, eval_limit=0)
        found = []
        for batch in data.eval_batches(self.split):
            images = batch["images"].astype(np.float32) / 255
            found.append(np.asarray(task.encode(params, images, jax.random.key(0)))[batch["mask"] > 0, :, 0])
        codes = np.concatenate(found)
        counts = [np.unique(codes[:, position], return_counts=True)[1] for position in range(codes.shape[1])]
        perplexities = [float(perplexity(np.asarray(count, np.float32))) for count in counts]
        return {
            "values_used": float(len(np.unique(codes))),
            "values_used_first": float(len(counts[0])),
            "values_used_each": float(np.mean([len(count) for count in counts])),
            "perplexity_first": perplexities[0],
            "perplexity_each": float(np.mean(perplexities)),
            "spread": float(np.asarray(task.model.scalars.codes(codes)).std(0).mean()),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokStudy:
    """Trains a teacher, tokenizers and a model of the tokens of one of them, and draws the pictures."""

    teacher: Experiment
    """The classifier whose features REPA takes."""
    prefixes: Comparison
    """Tokenizers whose errors are plotted against the number of tokens."""
    options: Comparison
    """Tokenizers whose codes are compared."""
    generator: Experiment
    """The model of the tokens in WORKDIR/codes, which are those of the tokenizer `source`."""
    source: str
    """An arm of `prefixes`."""
    workdir: str
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of tokens in the pictures."""
    images: int = 8
    """The number of images in a picture of reconstructions, and of drawn ones of each number of tokens."""

    def run(self) -> bool:
        """Runs everything; returns False if interrupted (the same command resumes it)."""
        folder, console = Path(self.workdir), rich.console.Console()
        if train_once(self.teacher).interrupted or not self.prefixes.run():
            return False
        seed = self.prefixes.seeds[0]
        runs = {arm.name: self.prefixes.experiment(arm, seed).directory for arm in self.prefixes.arms}
        for name, run in runs.items():
            path = folder / f"prefixes_{name.replace(' ', '_')}.png"
            if not path.exists():
                self._decode(run, path)
        self._plot(folder / "error_against_tokens.png")
        tokenize(runs[self.source], folder / "codes", flip=False)
        result = train_once(self.generator)
        if result.interrupted:
            return False
        self._draw(result, runs[self.source], folder / "drawn.png")
        if not self.options.run():
            return False
        console.print(f"pictures: {folder}/*.png", highlight=False, soft_wrap=True)
        return True

    def _decode(self, run: Path, path: Path) -> None:
        """A picture of held-out images: a row for each number of tokens from which they are decoded, then the images.
        All rows begin with the same noise."""
        tokenizer = open_tokenizer(run)
        images = next(iter(tokenizer.data.eval_batches("validation")))["images"][: self.images]
        codes, rng = tokenizer.encode(images, jax.random.key(0)), jax.random.key(0)
        rows = [np.clip(tokenizer.decode(codes[:, :count], rng), 0, 1) for count in self.tokens]
        titles = [_tokens(count) for count in self.tokens for _ in images] + ["image"] * len(images)
        image_grid(np.concatenate([*rows, images / 255]), self.images, titles).save(path)

    def _draw(self, result: Any, tokenizer: Path, path: Path) -> None:
        """A picture of drawn images: a row for each number of tokens at which the same drawing stops."""
        labels, rows = [n % result.task.num_classes for n in range(self.images)], []
        decoder = open_tokenizer(tokenizer)
        for count in self.tokens:
            sampling = result.task.sampling(tokens=count)
            rows.append(draw_images(result.task, result.params, decoder, labels, sampling, jax.random.key(0)))
        titles = [f"{label}, {_tokens(count)}" for count in self.tokens for label in labels]
        image_grid(np.concatenate(rows), self.images, titles).save(path)

    def _plot(self, path: Path) -> None:
        """Plots the error of the latents of the test split against the number of tokens."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        results = json.loads((Path(self.prefixes.workdir) / "results.json").read_text())
        figure, axes = plt.subplots(figsize=(6, 4))
        for arm in self.prefixes.arms:
            numbers = results[key(arm.name, self.prefixes.seeds[0])]["test"]
            points = [(k, numbers[f"latent_mse_{k}"]) for k in self.tokens if f"latent_mse_{k}" in numbers]
            axes.plot(*zip(*points), marker="o", label=arm.name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_ylabel("squared error")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count > 1)}"
