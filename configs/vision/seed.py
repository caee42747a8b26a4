"""SEED (arXiv 2307.08041, 2310.01218): an image as 32 ordered codes, and a language model that reads and writes them.

    jaxtok convert EVA_AND_BLIP2_FILE RUN --config seed_alignment      # BLIP-2's first stage, to start from
    jaxtok train seed_alignment --start RUN                            # stage I: the causal Q-Former
    jaxtok train seed_codes --start runs/seed_alignment                # stage II: the codes
    jaxtok train seed_llama_7b --start LLAMA                           # a language model of text and images

seed_alignment  the causal Q-Former by contrast with captions; 4096 pairs a batch
seed_codes  codes of its outputs, on outputs and CLIP embeddings computed once (`write_states`)
seed_released  the same with the released tokenizer's head: `jaxtok convert FILE RUN --config seed_released` reads it
seed_llama_7b  a Llama of 7B with 8192 codes, by LoRA with tables and norms trained whole

The captions and images are CC3M's in the paper (5M pairs with Unsplash and COCO); here a folder of pictures with
NAME.txt beside each. Expect, in the paper, 91.7 (codes) and 93.7 (embeddings) mean recall on Flickr30K.
"""

import dataclasses

from jaxtok.data.arrays import ArrayData
from jaxtok.data.captions import CaptionedImages
from jaxtok.multimodal.image_text import PUBLISHED as LLAMAS
from jaxtok.multimodal.image_text import AddImageTokens, ImageTextData, ImageTextModeling, lora_config
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.lora import Lora
from jaxtok.vision.seed import PUBLISHED, Seed
from jaxtok.vision.seed_alignment import LearnCodes, SeedAlignment

SIZES = PUBLISHED["seed-tokenizer-2"]


def recipe(steps: int, rate: float, **options) -> TrainConfig:
    """AdamW 0.9/0.999, weight decay 0.05, 2000 steps of warm-up. (The authors' rate falls once an epoch.)"""
    adam = {"learning_rate": rate, "min_learning_rate": rate / 10, "b2": 0.999, "weight_decay": 0.05, "clip": 0.0}
    optimizer = OptimizerConfig(**adam, warmup=2000 / steps)
    every = {"log_every": 100, "eval_every": 5000, "checkpoint_every": 5000}
    return TrainConfig(steps=steps, optimizer=optimizer, **every, **options)


def alignment() -> Experiment:
    """64 pairs on each of 64 GPUs, 10 epochs of 5M pairs. Stage I trains the norm after the ViT, too."""
    model = dataclasses.replace(
        SIZES,
        vision=dataclasses.replace(SIZES.vision, dtype="bfloat16", remat="full"),
        qformer=dataclasses.replace(SIZES.qformer, dtype="bfloat16", remat="full"),
    )
    return Experiment(
        name="seed_alignment",
        task=SeedAlignment(model=model),
        data=CaptionedImages(
            images="folder:data/pairs",
            captions="beside",
            text_tokenizer="data/bert-base-uncased",
            size=224,
            batch_size=4096,
            length=32,
            squash=True,
            crop="random",
            crop_area=(0.5, 1.0),
            workers=16,
            eval_limit=4,
        ),
        train=recipe(12_200, 3e-5),
        mesh=MeshConfig(data=-1, fsdp=1),
    )


def codes(name: str, head: str) -> Experiment:
    """256 images on each of 64 GPUs; the head is the training script's, or the MLP of the released tokenizer."""
    qformer = dataclasses.replace(SIZES.qformer, dtype="bfloat16")
    return Experiment(
        name=name,
        task=Seed(model=dataclasses.replace(SIZES, qformer=qformer, head=head)),
        data=ArrayData(
            path="data/seed_states",
            arrays=(("states", (32, 768)), ("targets", (1024,))),
            batch_size=16_384,
            workers=16,
            eval_limit=4,
        ),
        train=recipe(100_000, 1e-4),
        start=LearnCodes(),
    )


def llama(name: str = "seed-llama-8b") -> Experiment:
    """Pre-training: LoRA of rank 16, tables and norms whole, AdamW 0.9/0.95, warm-up 3 %, cosine to 5 %, clip 1."""
    model = dataclasses.replace(LLAMAS[name], dtype="bfloat16", param_dtype="bfloat16", remat="full", max_length=1024)
    optimizer = OptimizerConfig(
        learning_rate=1.5e-4, min_learning_rate=7.5e-6, eps=1e-5, weight_decay=0.05, warmup=0.03, clip=1.0
    )
    return Experiment(
        name="seed_llama_7b",
        task=Lora(task=ImageTextModeling(model=model), lora=lora_config()),
        data=ImageTextData(path="data/image_text", text_tokenizer="data/llama", length=1024, batch_size=512),
        start=AddImageTokens(first=32_000),
        train=TrainConfig(steps=30_000, optimizer=optimizer, log_every=100, eval_every=2000, checkpoint_every=2000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


configs = {
    "seed_alignment": lambda: alignment(),
    "seed_codes": lambda: codes("seed_codes", "qformer"),
    "seed_released": lambda: codes("seed_released", "mlp"),
    "seed_llama_7b": lambda: llama(),
}
