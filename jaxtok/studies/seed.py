"""SEED in small: both stages on digits and emoji, causal against bidirectional queries, embeddings against codes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from jaxtok.data.captions import CaptionedImages
from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.image_grammar import ImageGrammar
from jaxtok.door import open_model
from jaxtok.multimodal.image_text import write_documents
from jaxtok.tokenizers.sentencepiece import train_sentencepiece
from jaxtok.training.experiment import Experiment
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import train
from jaxtok.vision.grids import image_grid
from jaxtok.vision.retrieval import class_accuracy, pair_recall, pair_vectors
from jaxtok.vision.seed import Seed
from jaxtok.vision.seed_alignment import LearnCodes


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

    It writes results.json, results.md and losses.png; if it is run again, runs that are there are opened and not
    trained.
    """

    arms: tuple[TwoStages, ...]
    workdir: str
    split: str = "test"
    """The split of the measurements."""
    subwords: int = 0
    """The size of a vocabulary of subwords that is made first from the training texts; its file is the data's
    `text_tokenizer`. 0: there is one already."""
    by_class: bool = False
    """Whether texts are classes, so that an image is compared with the texts of all classes, and not with those of
    other images."""

    def run(self) -> bool:
        """Runs everything; returns False if interrupted (the same command resumes it)."""
        rows: dict[str, dict[str, float]] = {}
        make_subwords(self.arms[0].alignment.data, self.subwords)
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
        plot_losses(folder / "losses.png", {arm.name: self.runs(arm) for arm in self.arms})
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
        rows = read_metrics(second.directory, "train")
        spreads = {"code_std_first": rows[0]["code_std"], "code_std": rows[-1]["code_std"]}
        return self.measure(one.task, one.params, two.task, two.params, first) | spreads

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


def plot_losses(path: Path, arms: Mapping[str, tuple[Experiment, Experiment]]) -> None:
    """Plots the losses of both stages, step by step: the contrastive one, and the three terms of the second stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    terms = ("contrastive", "code_loss", "semantic", "generation")
    figure, axes = plt.subplots(1, len(terms), figsize=(4 * len(terms), 3.4))
    for name, (first, second) in arms.items():
        for term, axis in zip(terms, axes):
            rows = read_metrics((first if term == "contrastive" else second).directory, "train")
            axis.plot([row["step"] for row in rows], [row[term] for row in rows], label=name, linewidth=1)
            axis.set_title(term.replace("_", " "))
            axis.set_xlabel("step")
            axis.set_yscale("linear" if term == "contrastive" else "log")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def make_subwords(data: CaptionedImages, size: int) -> None:
    """Makes the data's tokenizer from its training texts, if it is not there."""
    if size and not (file := Path(data.text_tokenizer)).exists():
        texts = dataclasses.replace(data, text_tokenizer="bytes").texts("train")
        train_sentencepiece(texts, file, vocab_size=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextStudy:
    """A small language model on texts and codes, which describes and draws images that it has not seen.

    Its documents are pairs of a text and the codes of an image, by the second stage of one arm of another study.
    """

    codes: SeedStudy
    arm: int = 0
    model: Experiment
    """The run of the language model; its `data.path` is where the documents are written."""
    workdir: str
    words: int = 8
    """The most words of a text."""
    draws: int = 64
    """How many held-out images are described, and how many texts are drawn."""
    temperature: float = 0.7
    seed: int = 0

    def run(self) -> bool:
        """Runs everything; returns False if interrupted (the same command resumes it)."""
        if not self.codes.run():
            return False
        first, second = (open_model(run.directory) for run in self.codes.runs(self.codes.arms[self.arm]))
        data = dataclasses.replace(first.data, eval_limit=0)
        codes = self._documents(data, second)
        experiment = dataclasses.replace(self.model, workdir=str(Path(self.workdir) / "model"))
        result = train(experiment)
        if result.interrupted:
            return False
        numbers = dict(result.task.evaluate(result.params, experiment.data.eval_batches("test")))
        numbers |= self._swapped(result, experiment)
        numbers |= self._drawn(result, experiment, data, first, second, codes["test"])
        Path(self.workdir, "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
        for name, value in numbers.items():
            print(f"{name} {value:.4g}")
        return True

    def _documents(self, data: CaptionedImages, second: Any) -> dict[str, np.ndarray]:
        """Writes the documents of all splits, and returns the codes of each."""
        found = {}
        for split in ("train", "validation", "test"):
            parts = []
            for batch in data.eval_batches(split):
                images = np.asarray(batch["images"], np.float32) / 255
                parts.append(np.asarray(second.task.encode(second.params, images))[batch["mask"] > 0])
            found[split] = np.concatenate(parts)[..., 0]
            pairs = zip(self._texts(data, split), found[split].tolist(), strict=True)
            rows = ({"parts": [text, {"image": row}]} for text, row in pairs)
            write_documents(Path(self.model.data.path) / f"{split}.jsonl", rows)
        return found

    def _texts(self, data: CaptionedImages, split: str) -> list[str]:
        return [" ".join(text.split()[: self.words]) for text in data.texts(split)]

    @staticmethod
    def _swapped(result: Any, experiment: Experiment) -> dict[str, float]:
        """The nats of an image's tokens after its own text and after that of the next image; the gap is what the model
        knows of the text."""
        data = experiment.data
        documents = data.documents("test")
        losses = []
        for shift in (0, 1):
            rows = [
                data.row({"parts": [documents[(n + shift) % len(documents)]["parts"][0], document["parts"][1]]})
                for n, document in enumerate(documents)
            ]
            size = data.batch_size
            rows += [None] * (-len(rows) % size)
            batches = [data.batch_of(rows[at : at + size]) for at in range(0, len(rows), size)]
            losses.append(result.task.evaluate(result.params, batches)["image_loss"])
        return {"image_loss_own_text": losses[0], "image_loss_other_text": losses[1], "gap": losses[1] - losses[0]}

    def _drawn(self, result, experiment, data, first, second, codes) -> dict[str, float]:
        """Describes held-out images and draws held-out texts; how well both fit, by stage I's own vectors."""
        tokenizer = experiment.data.loaded_tokenizer
        texts = self._texts(data, "test")[: self.draws]
        count = len(texts)
        grammar = ImageGrammar(
            begin=tokenizer.begin,
            end=tokenizer.end,
            first=tokenizer.first,
            codes=tokenizer.codes,
            length=tokenizer.length,
            chooser=Sampling(temperature=self.temperature),
        )
        module, opening = result.task.module(), experiment.data.opening_id

        def go(prompts, new, **fields):
            chooser = dataclasses.replace(grammar, **fields)
            options = {"num_ids": tokenizer.vocab_size, "stop_tokens": (tokenizer.eod_id,)}
            found = generate(
                module,
                result.params,
                prompts,
                max_new_tokens=new,
                chooser=chooser,
                rng=jax.random.key(self.seed),
                **options,
            )
            return [[t for t in row if t != tokenizer.eod_id] for row in found.tokens]

        prompts = [[opening, *tokenizer.image_ids(row)] for row in codes[:count]]
        said = [tokenizer.decode(row).decode(errors="replace") for row in go(prompts, 24, images=False)]
        drawn = [
            tokenizer.parse(row[: tokenizer.length + 2])[0]
            for row in go([[opening, *tokenizer.encode(text)] for text in texts], tokenizer.length + 2, at="begin")
        ]
        words, right = [set(text.split()) for text in texts], [set(text.split()) for text in said]
        share = [len(a & b) / max(len(b), 1) for a, b in zip(words, right)]
        chance = [len(a & b) / max(len(b), 1) for n, a in enumerate(words) for m, b in enumerate(right) if m != n]
        found = {"words_right": float(np.mean(share)), "words_right_of_another": float(np.mean(chance))}

        ids = np.array(drawn)[..., None]
        states = second.task.decode_to_states(second.params, ids)
        v = np.asarray(first.task.aligner().apply({"params": first.params["aligner"]}, states, method="of_states"))
        _, t = pair_vectors(first.task, first.params, data.eval_batches("test"))
        recalls = pair_recall(v, t[:count], texts)
        found |= {f"drawn_{name}": value for name, value in recalls.items() if name.startswith("image_to_text")}
        own = second.task.decode(second.params, codes[:count][..., None])
        pictures = np.concatenate([np.asarray(own)[:16], np.asarray(second.task.decode(second.params, ids))[:16]])
        pixels = np.round(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
        image_grid(pixels, 16).save(Path(self.workdir) / "drawn.png")
        lines = [f"{text}  ->  {other}" for text, other in zip(texts, said)]
        Path(self.workdir, "said.txt").write_text("\n".join(lines) + "\n")
        return found
