"""ELM in small: tokenizers compared, then models of their codes, and the images that both make."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console

from jaxtok.data.codes import CodeData, open_codes
from jaxtok.data.corpora import open_corpus
from jaxtok.data.images import ImageData
from jaxtok.protocols import ImageGenerator, Params
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.proxy_features import train_proxy
from jaxtok.tokenizers.sentencepiece import train_sentencepiece
from jaxtok.verbs.vision import (
    attention,
    draw_images,
    generate,
    make_sampling,
    open_tokenizer,
    reconstruct,
    statistics,
    tokenize,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """Measures drawn images, one for each image of the test split and of its class.

    The numbers are the proxy Fréchet distance to the training images (`jaxtok.studies.proxy_features`; it is not FID),
    and how often the proxy sees the class that was asked for. The distance is also that of the tokenizer's own
    reconstructions of the test split, which no model of its codes can be expected to beat.
    """

    images: ImageData
    proxy: str
    """The folder of the proxy, which is trained only once."""
    guidance: float = 2.0
    """The guidance of the draws; the other options of a generator's sampling have their defaults."""

    def __call__(self, task: ImageGenerator, params: Params, data: CodeData) -> dict[str, float]:
        proxy = train_proxy(self.images, self.proxy)
        tokenizer = open_tokenizer(Path(open_codes(Path(data.path) / "train").header.tokenizer))
        real = list(dataclasses.replace(self.images, eval_limit=0).eval_batches("test"))
        labels = np.concatenate([batch["labels"][batch["mask"] > 0] for batch in real])
        sampling = make_sampling(task, {"guidance": self.guidance})
        drawn = draw_images(task, params, tokenizer, labels.tolist(), sampling, jax.random.key(data.seed))
        keys = map(jax.random.key, range(len(real)))
        reconstructed = [
            tokenizer.decode(tokenizer.encode(batch["images"], key), key)[batch["mask"] > 0]
            for batch, key in zip(real, keys)
        ]
        reference = list(self.images.eval_batches("train"))
        classes = np.asarray(proxy.probabilities(drawn)).argmax(-1)
        return {
            "proxy_distance": proxy.frechet_distance([drawn], reference),
            "proxy_distance_of_reconstructions": proxy.frechet_distance(reconstructed, reference),
            "class_seen": float(np.mean(classes == labels)),
            "proxy_accuracy": proxy.accuracy,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElmStudy:
    """Trains tokenizers, encodes their images, trains models of the codes, and draws the pictures.

    A model's `data.path` is WORKDIR/codes/NAME, where NAME is the tokenizer's arm.
    """

    tokenizers: Comparison
    models: Comparison
    workdir: str
    per_class: int = 8
    """The number of images of each class in the pictures of samples."""
    guidance: float = 2.0
    corpus: str = "python"
    """The corpus of text whose subwords are compared with codes of as many values (512 or more)."""

    def run(self) -> bool:
        """Runs everything; returns False if interrupted (the same command resumes it)."""
        folder, console = Path(self.workdir), rich.console.Console()
        if not self.tokenizers.run():
            return False
        seed = self.tokenizers.seeds[0]
        for arm in self.tokenizers.arms:
            run = self.tokenizers.experiment(arm, seed).directory
            tokenize(run, folder / "codes" / arm.name, draws=2 if arm.task.draws_codes else 1)
            self._once(
                folder / f"reconstructions_{arm.name}.png", lambda path, run=run: reconstruct(run, path, count=24)
            )
        if not self.models.run():
            return False
        for arm in self.models.arms:
            run = self.models.experiment(arm, self.models.seeds[0]).directory
            options: dict[str, Any] = {"per_class": self.per_class, "sampling": {"guidance": self.guidance}}
            self._once(
                folder / f"samples_{arm.name}.png",
                lambda path, run=run, options=options: generate(run, path, **options),
            )
        codes_of: dict[int, list[Path]] = {}
        for arm in self.tokenizers.arms:
            codes_of.setdefault(math.prod(arm.task.code_values), []).append(folder / "codes" / arm.name)
        for size, codes in codes_of.items():
            self._once(
                folder / f"statistics_{size}.png",
                lambda path, size=size, codes=codes: self._statistics(size, codes, path),
            )
        runs = tuple(self.models.experiment(arm, self.models.seeds[0]).directory for arm in self.models.arms)
        self._once(folder / "attention_locality.png", lambda path: attention(runs, path))
        console.print(f"pictures: {folder}/*.png", highlight=False, soft_wrap=True)
        return True

    def _statistics(self, vocabulary: int, codes: list[Path], path: Path) -> dict[str, Any]:
        """Plots the statistics of codes with so many values at a position, and of as many subwords."""
        subwords = path.parent / f"subwords_{vocabulary}.model"
        text = self.corpus if vocabulary >= 512 else ""
        if text and not subwords.exists():
            train_sentencepiece(open_corpus(text, "train"), subwords, vocab_size=vocabulary, model_type="bpe")
        return statistics(tuple(codes), path, corpus=text, tokenizer=str(subwords))

    @staticmethod
    def _once(path: Path, make: Any) -> None:
        """Makes a picture that is not there yet, and prints its numbers."""
        if not path.exists():
            numbers = make(path)
            for name, value in numbers.items():
                print(
                    f"{path.stem}: {name} {value:.4g}" if isinstance(value, float) else f"{path.stem}: {name} {value}"
                )
