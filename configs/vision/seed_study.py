"""SEED in small: both stages on digits and on emoji with their keywords, and a language model of text and codes.

    jaxtok study seed_digits_study
    jaxtok study seed_emoji_study
    jaxtok study seed_llama_study      # also runs seed_emoji_study

seed_digits_study  causal and bidirectional queries on ten classes; 7 minutes on one core
seed_emoji_study  the same on emoji, with a small ViT that trains in stage I
seed_llama_study  a small Llama describes and draws emoji that it has not seen

Expect 0.96 to 0.97 of digits by the embedding of the last query, causal or not, and 0.82 by the codes. Emoji and their
keywords are downloaded once by npm.
"""

import dataclasses

from jaxtok.data.captions import CaptionedImages
from jaxtok.lm.llama import LlamaConfig
from jaxtok.multimodal.image_text import ImageTextData, ImageTextModeling
from jaxtok.studies.seed import ImageTextStudy, SeedStudy, TwoStages
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.eva_vit import EvaViTConfig
from jaxtok.vision.qformer import QFormerConfig
from jaxtok.vision.seed import PatchesConfig, Seed, SeedConfig
from jaxtok.vision.seed_alignment import SeedAlignment

WORKDIR = "runs/seed_study"


def schedule(steps: int, rate: float, warmup: int) -> TrainConfig:
    optimizer = OptimizerConfig(
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup=warmup / steps,
        b2=0.999,
        weight_decay=0.05,
        clip=0.0,
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
    qformer=QFormerConfig(
        num_layers=4,
        d_model=48,
        num_heads=4,
        mlp_dim=96,
        context_width=20,
        vocab_size=258,
        max_positions=4,
        init_std=0.0,
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


# --- Emoji, by their names and keywords. There is no trained ViT here, so that stage I trains a small one, too. ---

emoji = CaptionedImages(
    images="emoji",
    captions="keywords",
    text_tokenizer=f"{WORKDIR}/emoji/words.model",
    size=16,
    batch_size=64,
    length=24,
    crop="random",
    crop_area=(0.6, 1.0),
    shuffle_words=True,
)
SUBWORDS = 1500
emoji_model = SeedConfig(
    vision=EvaViTConfig(
        image_size=16, patch_size=4, num_layers=3, d_model=64, num_heads=4, mlp_dim=128, init_std=64**-0.5
    ),
    qformer=QFormerConfig(
        num_layers=4,
        d_model=64,
        num_heads=4,
        mlp_dim=128,
        context_width=64,
        vocab_size=SUBWORDS + 1,
        max_positions=24,
        init_std=0.0,
    ),
    projection_dim=64,
    codebook_size=512,
    code_dim=16,
    depth=2,
    block_heads=4,
    head="mlp",
    feature_dim=16 * 16 * 3,
)


def emoji_arm(name: str, causal: bool) -> TwoStages:
    model = dataclasses.replace(emoji_model, qformer=dataclasses.replace(emoji_model.qformer, causal=causal))
    return TwoStages(
        name=name,
        alignment=Experiment(
            task=SeedAlignment(model=model, train_vision=True), data=emoji, train=schedule(400, 1e-3, 50)
        ),
        codes=Experiment(task=Seed(model=model, target="image"), data=emoji, train=schedule(400, 2e-3, 40)),
    )


def emoji_study() -> SeedStudy:
    return SeedStudy(
        arms=(emoji_arm("causal", True), emoji_arm("bidirectional", False)),
        workdir=f"{WORKDIR}/emoji",
        subwords=SUBWORDS,
    )


def language_model() -> ImageTextStudy:
    """Three layers of a Llama on the codes of emoji."""
    return ImageTextStudy(
        codes=emoji_study(),
        model=Experiment(
            name="emoji_llama",
            task=ImageTextModeling(
                model=LlamaConfig(
                    num_layers=3,
                    d_model=96,
                    num_heads=4,
                    mlp_dim=256,
                    vocab_size=SUBWORDS + 512 + 2,
                    max_length=64,
                    tie_embeddings=True,
                    dropout=0.1,
                )
            ),
            data=ImageTextData(
                path=f"{WORKDIR}/emoji_llama/documents",
                text_tokenizer=f"{WORKDIR}/emoji/words.model",
                codes=512,
                image_codes=32,
                length=56,
                batch_size=32,
            ),
            train=schedule(600, 2e-3, 50),
        ),
        workdir=f"{WORKDIR}/emoji_llama",
    )


configs = {
    "seed_digits_study": lambda: SeedStudy(
        arms=(digit_arm("causal", True), digit_arm("bidirectional", False)),
        workdir=f"{WORKDIR}/digits",
        by_class=True,
    ),
    "seed_emoji_study": lambda: emoji_study(),
    "seed_llama_study": lambda: language_model(),
}
