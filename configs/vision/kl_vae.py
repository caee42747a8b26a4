"""KL-16 (arXiv 2112.10752), the VAE of MAR and TokenBridge, on ImageNet at 256 x 256, with TokenBridge's quantiser.

    jaxtok train kl_16_imagenet256 --task.perceptual FILE

FILE holds the weights of LPIPS with VGG16, as published (or is a folder with torchvision's VGG16 and LPIPS' heads);
`--task.perceptual none` trains without LPIPS. The recipe of MAR's VAE was not published; this is latent diffusion's.
Published for MAR's: rFID 1.11 (on the training images) with 64 levels of TokenBridge, and without quantisation.

kl_16_imagenet256  16 x 16 positions of 16 channels
"""

import dataclasses

from jaxtok.data.images import ImageData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig, PartOptimizer
from jaxtok.vision.discriminator import DiscriminatorConfig
from jaxtok.vision.kl_vae import PUBLISHED
from jaxtok.vision.tokenbridge_tokenizer import BridgeTokenizer

DISCRIMINATOR_FROM = 50_001
ADAM = {
    "learning_rate": 5.4e-5,
    "min_learning_rate": 5.4e-5,
    "schedule": "constant",
    "warmup": 0.0,
    "b1": 0.5,
    "b2": 0.9,
    "weight_decay": 0.0,
    "clip": 0.0,
}


def kl_16() -> Experiment:
    """Adam 0.5/0.9 at a constant 4.5e-6 times 12 images of each device, L1 and LPIPS, the divergence with a weight of
    1e-6, and a discriminator from step 50,001 on, as latent diffusion's configs have them."""
    model = dataclasses.replace(PUBLISHED["kl-16"], dtype="bfloat16", remat_levels=True)
    part = PartOptimizer(**ADAM, part="discriminator", start=DISCRIMINATOR_FROM + 1)
    return Experiment(
        name="kl_16_imagenet256",
        task=BridgeTokenizer(
            model=model, discriminator=DiscriminatorConfig(start_step=DISCRIMINATOR_FROM), perceptual="data/lpips"
        ),
        data=ImageData(images="tfds:imagenet2012", size=model.image_size, batch_size=96, workers=16, eval_limit=40),
        train=TrainConfig(
            steps=500_000,
            optimizer=OptimizerConfig(**ADAM, parts=(part,)),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
    )


configs = {"kl_16_imagenet256": kl_16}
