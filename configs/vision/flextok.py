"""FlexTok (arXiv 2502.13967): an image as 1 to 256 ordered tokens, and in small as 1 to 16.

    jaxtok train flextok_digits
    jaxtok vision reconstruct runs/flextok_digits --prefixes 1 2 4 8

flextok_digits  scikit-learn's digits of 8 x 8 pixels, 16 tokens; eight minutes on two cores. Expect a squared error of
    about 0.15 from 1 token and 0.11 from 16, of grey values in [-1, 1] whose variance is 0.57
flextok_d12_d12_imagenet256  encoder and decoder of 12 layers; published FID 4.20
flextok_d18_d18_imagenet256  of 18 layers; 1.61
flextok_d18_d28_imagenet256  an encoder of 18 layers, a decoder of 28; 1.45

The published sizes run on latents of a KL-VAE with 16 channels and stride 8 (--task.vae-run RUN, a run of kl_vae or its
files). The reconstruction FIDs are of 32 tokens and a model of 1.33 B, as later papers quote them. The paper's batch,
steps and learning rate are not known; those here are ours.
"""

import dataclasses

from jaxtok.data.images import ImageData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.flextok import PUBLISHED, FlexTokConfig, FlexTokenizer, FlowSampling
from jaxtok.vision.kl_vae import diffusers_vae

TINY = FlexTokConfig(
    latent_size=(8, 8),
    channels=1,
    registers=16,
    encoder_width=64,
    encoder_depth=2,
    decoder_width=64,
    decoder_depth=3,
    head_dim=16,
    time_channels=64,
)
"""A grid of 4 x 4 patches and 16 registers."""


def digits() -> Experiment:
    optimizer = OptimizerConfig(
        learning_rate=1e-3, min_learning_rate=0.0, warmup=0.05, b2=0.99, weight_decay=0.0, clip=1.0
    )
    return Experiment(
        name="flextok_digits",
        # Nearer to noise, the decoder needs the codes more, and they come alive earlier.
        task=FlexTokenizer(model=TINY, latents="grey", time_shift=1.5, eval_prefixes=(1, 2, 4, 8)),
        data=ImageData(images="digits", size=8, batch_size=32, flip=False),
        train=TrainConfig(steps=2000, optimizer=optimizer, log_every=50, eval_every=1000, checkpoint_every=1000),
    )


VAE = diffusers_vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, scaling_factor=0.0)
"""The sizes of the authors' VAE. Latents are scaled by their root mean square, as the authors' factor is not known."""


def imagenet(name: str, fsdp: int = 1) -> Experiment:
    model = dataclasses.replace(PUBLISHED[name], dtype="bfloat16", remat="projections")
    name = f"{name.replace('-', '_')}_imagenet256"
    optimizer = OptimizerConfig(
        learning_rate=2e-4,
        min_learning_rate=2e-6,
        warmup=0.02,
        b2=0.99,
        weight_decay=0.02,
        clip=1.0,
        ema_decay=0.999,
        ema_every=10,
    )
    return Experiment(
        name=name,
        task=FlexTokenizer(
            model=model, latents="vae", vae=VAE, sampling=FlowSampling(steps=25, guidance=7.5), probe_every=100
        ),
        data=ImageData(images="tfds:imagenet2012", size=256, batch_size=1024, workers=16, eval_limit=10),
        train=TrainConfig(
            steps=250_000,
            optimizer=optimizer,
            log_every=100,
            eval_every=10_000,
            checkpoint_every=5000,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


configs = {
    "flextok_digits": digits,
    "flextok_d12_d12_imagenet256": lambda: imagenet("flextok-d12-d12"),
    "flextok_d18_d18_imagenet256": lambda: imagenet("flextok-d18-d18", fsdp=8),
    "flextok_d18_d28_imagenet256": lambda: imagenet("flextok-d18-d28", fsdp=16),
}
