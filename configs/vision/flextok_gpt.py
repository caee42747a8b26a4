"""FlexTok's autoregressive models (arXiv 2502.13967) on the tokens of ImageNet's images.

    jaxtok train flextok_gpt_1b3 --data.path CODES
    jaxtok vision generate runs/flextok_gpt_1b3 samples.png --labels 207 --tokens 32

CODES is a folder that `jaxtok vision tokenize` has written with a FlexTok of 256 tokens. Published, with 32 tokens:
generation FID 1.86 for the model of 1.33 B with the tokenizer d18-d28, and 2.02 with d18-d18, as later papers quote
them. The recipe is that of re-implementations: AdamW 0.9/0.95, decay 0.05, 300 epochs, cosine to 1 %, clip 1.

The sizes are the paper's class-conditional ones, by the parameters of their blocks:

flextok_gpt_49m  10 layers of width 640
flextok_gpt_85m  12 layers of width 768
flextok_gpt_201m  16 layers of width 1024
flextok_gpt_393m  20 layers of width 1280
flextok_gpt_679m  24 layers of width 1536
flextok_gpt_1b3  30 layers of width 1920
"""

import dataclasses
import functools

from jaxtok.data.codes import CodeData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.flextok_generation import PUBLISHED, FlexTokModeling

NAMES = {"1.33b": "1b3"}


def gpt(size: str) -> Experiment:
    model = dataclasses.replace(PUBLISHED[f"flextok-gpt-{size}"], dtype="bfloat16", remat="projections", loss_chunk=32)
    return Experiment(
        name=f"flextok_gpt_{NAMES.get(size, size)}",
        task=FlexTokModeling(model=model),
        data=CodeData(
            path="data/imagenet256_flextok",
            shape=model.code_shape,
            values=model.code_values,
            batch_size=1024,
            eval_limit=40,
        ),
        train=TrainConfig(
            steps=375_000,
            optimizer=OptimizerConfig(
                learning_rate=3e-4, min_learning_rate=3e-6, warmup=0.02, b2=0.95, weight_decay=0.05, clip=1.0
            ),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=5000,
        ),
        mesh=MeshConfig(fsdp=8 if model.d_model >= 1280 else 1),
    )


configs = {
    "flextok_gpt_49m": functools.partial(gpt, "49m"),
    "flextok_gpt_85m": functools.partial(gpt, "85m"),
    "flextok_gpt_201m": functools.partial(gpt, "201m"),
    "flextok_gpt_393m": functools.partial(gpt, "393m"),
    "flextok_gpt_679m": functools.partial(gpt, "679m"),
    "flextok_gpt_1b3": functools.partial(gpt, "1.33b"),
}
