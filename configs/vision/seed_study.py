"""SEED in small on digits: both stages, with causal and with bidirectional queries.

    jaxtok study seed_digits_study

PLACEHOLDER
"""

import dataclasses

from jaxtok.data.captions import CaptionedImages
from jaxtok.studies.seed import SeedStudy, TwoStages
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.qformer import QFormerConfig
from jaxtok.vision.seed import PatchesConfig, Seed, SeedAlignment, SeedConfig

WORKDIR = "runs/seed_study"


def schedule(steps: int, rate: float, warmup: int) -> TrainConfig:
    optimizer = OptimizerConfig(
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup=warmup / steps,
        b2=0.999,
        weight_decay=0.05,
    )
    return TrainConfig(
        steps=steps, optimizer=optimizer, log_every=10, eval_every=200, checkpoint_every=steps, tensorboard=False
    )


# --- Digits: the pixels of 2 x 2 patches and their places stand for the frozen ViT. ---

digits = CaptionedImages(
    images="digits", captions="classes", size=8, batch_size=10, length=4, flip=False, balanced=True, eval_limit=8
)
digit_model = SeedConfig(
    vision=PatchesConfig(image_size=8, patch_size=2),
    vision_norm=False,
    qformer=QFormerConfig(
        num_layers=4,
        d_model=48,
        num_heads=4,
        mlp_dim=96,
        context_width=20,
        vocab_size=258,
        max_positions=4,
        init_std=48**-0.5,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    projection_dim=32,
    codebook_size=128,
    code_dim=8,
    depth=2,
    block_heads=4,
    head="mlp",
    feature_dim=8 * 8 * 3,
)


def digit_arm(name: str, causal: bool, codes: int = 128, steps: int = 500) -> TwoStages:
    qformer = dataclasses.replace(digit_model.qformer, causal=causal)
    model = dataclasses.replace(digit_model, qformer=qformer, codebook_size=codes)
    return TwoStages(
        name=name,
        alignment=Experiment(task=SeedAlignment(model=model), data=digits, train=schedule(400, 1e-3, 60)),
        codes=Experiment(
            task=Seed(model=model, target="image"),
            data=dataclasses.replace(digits, batch_size=60),
            train=schedule(steps, 1e-3, 50),
        ),
    )


configs = {
    "seed_digits_study": lambda: SeedStudy(
        arms=(digit_arm("causal", True), digit_arm("bidirectional", False)),
        workdir=f"{WORKDIR}/digits",
        by_class=True,
    ),
}
