"""BAE against VQ at 10 bits a position, on 1,911 emoji of 16 x 16 pixels: ELM's claim that BAE uses its codes.

    jaxtok study tokenizers_study

Each image is 4 x 4 positions. The loss is L1 and the squared error, with neither LPIPS nor a discriminator. Codes are
counted over all images; L1 is that of the test split. It takes about three minutes on two cores. Expect 906 of 1,024
codes to be used by BAE (L1 0.123), 717 where its bits are compared with 1/2 (0.118), and 85 by VQ (0.161). Emoji are
downloaded once by npm.
"""

import dataclasses

from jaxtok.data.images import ImageData
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.image_codes import CodeUsage
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.vqgan import VQGANConfig

BODY = {
    "image_size": 16,
    "width": 32,
    "multipliers": (1, 1, 1),
    "res_blocks": 1,
    "attention_resolutions": (),
    "embed_dim": 32,
}


def task(model):
    return Autoencoding(model=model, discriminator=None, perceptual="mse")


base = Experiment(
    name="BAE, 10 bits, drawn",
    task=task(BAEConfig(**BODY, bits=10)),
    data=ImageData(images="emoji", size=16, batch_size=32, flip=False),
    train=TrainConfig(
        steps=400,
        log_every=50,
        eval_every=100,
        checkpoint_every=2000,
        tensorboard=False,
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            min_learning_rate=2e-3,
            schedule="constant",
            warmup=0.0,
            b2=0.999,
            weight_decay=0.0,
            clip=0.0,
        ),
    ),
)
deterministic = dataclasses.replace(
    base, name="BAE, 10 bits, compared with 1/2", task=task(BAEConfig(**BODY, bits=10, deterministic=True))
)
vq = dataclasses.replace(base, name="VQ, 1,024 codes", task=task(VQGANConfig(**BODY, codebook_size=1024)))

config = Comparison(
    arms=(base, deterministic, vq),
    measures=(CodeUsage(),),
    columns=("l1", "psnr", "codes_used_of_all", "share_used", "perplexity_of_all", "nats_below_uniform"),
    curve="l1",
    title="Codes of 16 x 16 emoji",
    workdir="runs/tokenizers_study",
)
