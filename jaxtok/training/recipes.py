"""The published training recipes, for models of any size."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxtok.data.text import TextData
from jaxtok.data.words import WordText
from jaxtok.lm import hat as hats
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.growth import Growth
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.tokenizers.words import WordSplitter
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


def gpt_neox(
    model: DecoderConfig,
    *,
    corpus: str,
    name: str,
    steps: int,
    batch_size: int,
    growth: tuple[Growth, ...] = (),
    tokenizer: str = "data/gpt-neox-20b/tokenizer.json",
    remat: Literal["none", "full", "projections", "dots"] = "projections",
    fsdp: int = 16,
) -> Experiment:
    """The authors' GPT-NeoX recipe: AdamW 0.9/0.95, decay 0.1, clip 1, 6e-4 to 6e-5 for every size, 1 % warm-up.

    Rows are cut from documents laid end to end, with attention across them. bfloat16 compute stands in for the
    authors' float16 with loss scaling. Of each block, what attention takes and gives is kept, all else computed again.
    Parameters are divided 16 ways; on fewer devices, say --mesh.fsdp.
    """
    return Experiment(
        name=name,
        task=LanguageModeling(model=dataclasses.replace(model, dtype="bfloat16", remat=remat)),
        data=TextData(
            corpus=corpus,
            tokenizer=tokenizer,
            length=model.max_length,
            batch_size=batch_size,
            isolate_documents=False,
            eval_limit=16,
            workers=8,
            streams=256,
        ),
        train=TrainConfig(
            steps=steps,
            optimizer=OptimizerConfig(),
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
        growth=growth,
    )


def hat(
    size: str,
    *,
    corpus: str,
    steps: int = 72_000,
    remat: Literal["none", "full", "projections", "dots"] = "full",
    fsdp: int = 16,
) -> Experiment:
    """The recipe of HAT (arXiv 2501.10322) for one of its sizes: AdamW 0.9/0.95, decay 0.1, 500 steps of warm-up, 3e-4
    times 32 over the heads of the backbone, to a tenth.

    Words have 16 bytes at most (our choice: with each place in use or not, more make the letters' modules slower).
    """
    model = hats.everywhere(hats.PUBLISHED[size], dtype="bfloat16", remat=remat)
    model = dataclasses.replace(model, max_units=16)
    words = WordSplitter("whitespace", model.max_units)
    rate = 3e-4 * 32 / model.backbone.num_heads
    return Experiment(
        name=f"hat_{size}",
        task=hats.HATModeling(model=model, splitter=words),
        data=WordText(
            corpus=corpus,
            length=2816,
            batch_size=1024,
            splitter=words,
            max_units=model.max_units,
            eval_limit=16,
            workers=8,
            streams=256,
        ),
        train=TrainConfig(
            steps=steps,
            optimizer=OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 10, warmup=500 / steps),
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )
