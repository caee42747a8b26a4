"""ELM's image tokenizers (arXiv 2410.16257): a million steps of 256 images of ImageNet, 256 x 256.

    jaxtok train bae_16_imagenet256 --task.perceptual FILE

FILE holds the weights of LPIPS with VGG16, as published (or is a folder with torchvision's VGG16 and LPIPS' heads);
`--task.perceptual none` trains without LPIPS. The images are ImageNet's, from TensorFlow Datasets. The only published
numbers are those of what ELM generates with these tokenizers; expect nearly all codes to be used.

bae_16_imagenet256  16 bits, drawn
bae_16_deterministic_imagenet256  16 bits, compared with 1/2
bae_20_imagenet256  20 bits, drawn, as 2 codes of 10
bae_24_imagenet256  24 bits, drawn, as 2 codes of 12
"""

import dataclasses

from jaxtok.data.images import ImageData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig, PartOptimizer
from jaxtok.vision.autoencoding import Autoencoding, TokenizerConfig
from jaxtok.vision.binary_autoencoder import PUBLISHED
from jaxtok.vision.discriminator import DiscriminatorConfig

DISCRIMINATOR_FROM = 400_001
ADAM = {
    "learning_rate": 1.8e-5,
    "min_learning_rate": 1.8e-5,
    "schedule": "constant",
    "warmup": 0.0,
    "b2": 0.999,
    "weight_decay": 0.0,
    "clip": 0.0,
}


def image_tokenizer(name: str, model: TokenizerConfig) -> Experiment:
    """The recipe of ELM's tokenizers: two Adams 0.9/0.999 without decay or clipping at one constant rate, LPIPS (weight
    1), a discriminator of three layers with an adaptive weight of 1 at most, and an average of the parameters, 0.995
    every 10 steps.

    ELM's own training script is not public; the rate (4.5e-6 times 4 images per device) and the start of the
    discriminator are those of binary latent diffusion's command. That code flips a whole batch of images at a time;
    ours flips each image by itself.
    """
    discriminator = PartOptimizer(**ADAM, part="discriminator", start=DISCRIMINATOR_FROM + 1)
    return Experiment(
        name=name,
        task=Autoencoding(
            model=dataclasses.replace(model, dtype="bfloat16", remat_levels=True),
            discriminator=DiscriminatorConfig(start_step=DISCRIMINATOR_FROM),
            perceptual="data/lpips",
        ),
        data=ImageData(images="tfds:imagenet2012", size=model.image_size, batch_size=256, workers=16, eval_limit=40),
        train=TrainConfig(
            steps=1_000_000,
            optimizer=OptimizerConfig(**ADAM, parts=(discriminator,), ema_decay=0.995, ema_every=10),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
    )


configs = {
    "bae_16_imagenet256": lambda: image_tokenizer("bae_16_imagenet256", PUBLISHED["bae-16"]),
    "bae_16_deterministic_imagenet256": lambda: image_tokenizer(
        "bae_16_deterministic_imagenet256", PUBLISHED["bae-16-deterministic"]
    ),
    "bae_20_imagenet256": lambda: image_tokenizer("bae_20_imagenet256", PUBLISHED["bae-20"]),
    "bae_24_imagenet256": lambda: image_tokenizer("bae_24_imagenet256", PUBLISHED["bae-24"]),
}
