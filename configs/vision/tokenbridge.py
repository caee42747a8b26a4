"""TokenBridge (arXiv 2503.16430): masked autoregressive models of the quantised latents of KL-16, on ImageNet 256.

    jaxtok vision tokenize KL16 CODES --draws 4
    jaxtok train tokenbridge_large_imagenet256 --data.path CODES
    jaxtok vision generate RUN samples.npz --guidance 3.1 --temperature 0.96

KL16 is a run of kl_16_imagenet256, or of MAR's weights (`jaxtok convert kl16.ckpt KL16 --config kl_16_imagenet256`).
Weights that the authors released are read in the same way. FIDs are with 50,000 samples, as published:

tokenbridge_base_imagenet256  218M parameters; no number of this size was published
tokenbridge_large_imagenet256  487M parameters: FID 1.76, IS 294.8 (guidance 3.1, temperature 0.96)
tokenbridge_huge_imagenet256  910M parameters: FID 1.55, IS 313.3 (guidance 3.45, temperature 0.91)
"""

import dataclasses

from jaxtok.data.codes import CodeData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.tokenbridge import PUBLISHED, TokenBridgeModeling

EPOCH = 626
"""Steps of 2,048 images."""


def tokenbridge(size: str, epochs: int, warmup: int, clip: float, fsdp: int = 8) -> Experiment:
    """AdamW 0.9/0.95 at 4e-4 after a linear warm-up, cosine to 0, decay 0.02 of all but biases and norms, 2,048 images
    a step, and an average of the parameters (0.9999).

    L is trained by the authors' script (400 epochs, 100 of them warm-up, clip 3), H by the paper's table (800, 200, 1).
    """
    model = dataclasses.replace(PUBLISHED[f"tokenbridge-{size}"], dtype="bfloat16", remat="full")
    return Experiment(
        name=f"tokenbridge_{size}_imagenet256",
        task=TokenBridgeModeling(model=model),
        data=CodeData(
            path="data/imagenet256_kl16_64",
            shape=model.code_shape,
            values=model.code_values,
            batch_size=2048,
            eval_limit=5,
        ),
        train=TrainConfig(
            steps=epochs * EPOCH,
            optimizer=OptimizerConfig(
                learning_rate=4e-4,
                min_learning_rate=0.0,
                warmup=warmup / epochs,
                weight_decay=0.02,
                clip=clip,
                ema_decay=0.9999,
            ),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


configs = {
    "tokenbridge_base_imagenet256": lambda: tokenbridge("base", 400, 100, 3.0),
    "tokenbridge_large_imagenet256": lambda: tokenbridge("large", 400, 100, 3.0),
    "tokenbridge_huge_imagenet256": lambda: tokenbridge("huge", 800, 200, 1.0),
}
