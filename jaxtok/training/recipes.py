"""The published training recipes, for models of any size."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxtok.data.codes import CodeData
from jaxtok.data.encoders import EncoderData
from jaxtok.data.images import ImageData
from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.data.text import TextData
from jaxtok.data.words import WordText
from jaxtok.lm import hat as hats
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.electra import ReplacedTokens
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.mrt5 import PUBLISHED as MRT5_PUBLISHED
from jaxtok.lm.mrt5 import MrT5Training
from jaxtok.lm.t5 import PUBLISHED as T5_PUBLISHED
from jaxtok.lm.t5 import SequenceToSequence
from jaxtok.tokenizers.words import WordSplitter
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig, PartOptimizer
from jaxtok.transfer.growth import Growth
from jaxtok.transfer.mrt5 import T5ToMrT5
from jaxtok.vision.autoencoding import Autoencoding, TokenizerConfig
from jaxtok.vision.discriminator import DiscriminatorConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling, published
from jaxtok.vision.elm_masked import MaskedElmModeling, published_masked


def gpt_neox(
    model: DecoderConfig,
    *,
    corpus: str,
    name: str,
    steps: int,
    batch_size: int,
    stages: tuple[Growth, ...] = (),
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
        stages=stages,
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


def electra(
    task: ReplacedTokens,
    *,
    corpus: str,
    name: str,
    steps: int,
    batch_size: int,
    length: int,
    learning_rate: float,
    fsdp: int,
    tokenizer: str = "data/bert-base-uncased/tokenizer.json",
    remat: Literal["none", "full", "projections", "dots"] = "dots",
) -> Experiment:
    """The authors' recipe for ELECTRA (arXiv 2003.10555, appendix A).

    Adam 0.9/0.999 without bias correction, decay 0.01, clip 1, 10,000 steps of warm-up times a linear decay to 0,
    dropout 0.1, of attention weights too.
    """
    model = dataclasses.replace(task.model, dtype="bfloat16", remat=remat, dropout=0.1, attention_dropout=0.1)
    return Experiment(
        name=name,
        task=dataclasses.replace(task, model=model),
        data=EncoderData(
            corpus=corpus,
            tokenizer=tokenizer,
            length=length,
            batch_size=batch_size,
            eval_limit=64,
            workers=8,
            streams=min(batch_size, 256),
        ),
        train=TrainConfig(
            steps=steps,
            optimizer=OptimizerConfig(
                learning_rate=learning_rate,
                min_learning_rate=0.0,
                schedule="linear",
                warmup=10_000 / steps,
                warmup_times_decay=True,
                b2=0.999,
                eps=1e-6,
                bias_correction=False,
                weight_decay=0.01,
            ),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


def byt5(size: str, *, fsdp: int = 16) -> Experiment:
    """ByT5's pre-training: a million steps of 1,024 inputs of 1,024 bytes of mC4, spans of 20 bytes, 15 % noise.

    Adafactor at the rate with which the authors' inverse square root ends, as schedules here have no such.
    """
    optimizer = OptimizerConfig(
        name="adafactor", learning_rate=1e-3, min_learning_rate=1e-3, schedule="constant", weight_decay=0.0
    )
    model = dataclasses.replace(T5_PUBLISHED[f"byt5-{size}"], dtype="bfloat16", remat="full")
    return _span_corruption(f"byt5_{size}", SequenceToSequence(model=model), 1_000_000, optimizer, fsdp)


def mrt5(size: str, *, target_rate: float = 0.5, fsdp: int = 16) -> Experiment:
    """MrT5's continued pre-training of a ByT5 (section 5): 5,000 steps of 1,024 inputs of 1,024 bytes of mC4.

    AdamW at 1e-4, linearly to 0, without warm-up; dropout 0.1. The paper takes 15 of mC4's languages. It starts from a
    ByT5: `jaxtok train CONFIG --start BYT5`.
    """
    optimizer = OptimizerConfig(
        learning_rate=1e-4,
        min_learning_rate=0.0,
        schedule="linear",
        warmup=0.0,
        b2=0.999,
        weight_decay=0.0,
    )
    model = dataclasses.replace(
        MRT5_PUBLISHED[f"mrt5-{size}"],
        dropout=0.1,
        attention_dropout=0.1,
        mlp_dropout=0.1,
        dtype="bfloat16",
        remat="full",
    )
    task = MrT5Training(model=model, target_rate=target_rate)
    experiment = _span_corruption(f"mrt5_{size}", task, 5_000, optimizer, fsdp)
    return dataclasses.replace(experiment, start=T5ToMrT5())


def image_tokenizer(
    model: TokenizerConfig,
    *,
    name: str,
    images: str = "tfds:imagenet2012",
    perceptual: str = "data/lpips",
    steps: int = 1_000_000,
    batch_size: int = 256,
    learning_rate: float = 1.8e-5,
    start_step: int = 400_001,
    fsdp: int = 1,
) -> Experiment:
    """The recipe of ELM's tokenizers (arXiv 2410.16257): a million steps of 256 images.

    Two Adams 0.9/0.999 without decay or clipping at one constant rate, LPIPS (weight 1), a discriminator of three
    layers with an adaptive weight of 1 at most, and an average of the parameters, 0.995 every 10 steps. ELM's own
    training script is not public; the rate (4.5e-6 times 4 images a device) and the start of the discriminator are
    those of binary latent diffusion's command. Its images are flipped a batch at a time, ours one by one.
    """
    adam: dict[str, Any] = {
        "learning_rate": learning_rate,
        "min_learning_rate": learning_rate,
        "schedule": "constant",
        "warmup": 0.0,
        "b2": 0.999,
        "weight_decay": 0.0,
        "clip": 0.0,
    }
    discriminator = PartOptimizer(**adam, part="discriminator", start=start_step + 1)
    return Experiment(
        name=name,
        task=Autoencoding(
            model=dataclasses.replace(model, dtype="bfloat16", remat_levels=True),
            discriminator=DiscriminatorConfig(start_step=start_step),
            perceptual=perceptual,
        ),
        data=ImageData(images=images, size=model.image_size, batch_size=batch_size, workers=16, eval_limit=40),
        train=TrainConfig(
            steps=steps,
            optimizer=OptimizerConfig(**adam, parts=(discriminator,), ema_decay=0.995, ema_every=10),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


def _span_corruption(
    name: str, task: SequenceToSequence, steps: int, optimizer: OptimizerConfig, fsdp: int
) -> Experiment:
    return Experiment(
        name=name,
        task=task,
        data=SpanCorruption(
            corpus="tfds:c4/multilingual", length=1024, batch_size=1024, eval_limit=16, workers=8, streams=256
        ),
        train=TrainConfig(
            steps=steps, optimizer=optimizer, log_every=20, eval_every=1000, checkpoint_every=1000, keep_checkpoints=3
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


def elm(size: str, decomposition: str, *, fsdp: int = 8) -> Experiment:
    """ELM's recipe for one of its sizes on codes cut in one of its ways: AdamW 0.9/0.95 at a constant 1e-4, decay 0.05
    of everything but norms, clip 1, 256 images a step, 400 epochs of ImageNet; dropout 0.1, of classes too.

    The codes are those of a binary autoencoder of as many bits, encoded before. The authors' decay takes hold of tables
    too, as here. Their samples are made with a moving average of the parameters (0.9999).
    """
    model = published(size, decomposition, dtype="bfloat16", remat="projections", loss_chunk=32)
    return _elm(f"elm_{size}", ElmModeling(model=model), model, fsdp)


def elm_masked(size: str, *, fsdp: int = 8) -> Experiment:
    """The same for the masked model of a size, on one code of 16 bits."""
    model = published_masked(size, dtype="bfloat16", remat="projections", loss_chunk=32)
    return _elm(f"elm_masked_{size}", MaskedElmModeling(model=model), model, fsdp)


def _elm(name: str, task: ElmModeling | MaskedElmModeling, model: ElmConfig, fsdp: int) -> Experiment:
    return Experiment(
        name=name,
        task=task,
        data=CodeData(
            path=f"data/imagenet256_{model.sub_codes * model.code_bits}_bits",
            grid=model.grid,
            sub_codes=model.sub_codes,
            code_bits=model.code_bits,
            batch_size=256,
            eval_limit=40,
        ),
        train=TrainConfig(
            steps=2_000_000,
            optimizer=OptimizerConfig(
                learning_rate=1e-4,
                min_learning_rate=1e-4,
                schedule="constant",
                warmup=0.0,
                weight_decay=0.05,
                ema_decay=0.9999,
            ),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )
