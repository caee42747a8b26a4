"""ELM in small, on 1,911 emoji of 16 x 16 pixels: BAE against VQ at 10 bits a position, then models of their codes.

    jaxtok study configs/vision/elm_study.py

Of 8 x 8 positions: autoregressive models of 1 code of 10 bits and of 2 of 5 bits, a masked one, and one of VQ codes.
Expect BAE to use 1,016 of 1,024 codes (873 where bits are compared with 1/2) and VQ 215, at an L1 of 0.08 to 0.07.
"""

import dataclasses

from jaxtok.data.codes import CodeData
from jaxtok.data.images import ImageData
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.elm import ElmStudy, SampleQuality
from jaxtok.studies.image_codes import CodeUsage
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling
from jaxtok.vision.vqgan import VQGANConfig

WORKDIR = "runs/elm_study"
BODY = {
    "image_size": 16,
    "width": 32,
    "multipliers": (1, 1),
    "res_blocks": 1,
    "attention_resolutions": (),
    "embed_dim": 32,
}
images = ImageData(images="emoji", size=16, batch_size=32)


def tokenizer(name, model):
    optimizer = OptimizerConfig(
        learning_rate=2e-3, min_learning_rate=1e-4, warmup=0.02, b2=0.999, weight_decay=0.0, clip=1.0
    )
    return Experiment(
        name=name,
        task=Autoencoding(model=model, discriminator=None, perceptual="mse"),
        data=images,
        train=TrainConfig(
            steps=800, optimizer=optimizer, log_every=50, eval_every=200, checkpoint_every=800, tensorboard=False
        ),
    )


SIZES = {
    "num_layers": 4,
    "d_model": 96,
    "num_heads": 4,
    "mlp_dim": 256,
    "grid": 8,
    "num_classes": 10,
    "dropout": 0.1,
}


def model(name, task, codes):
    model = task.model
    optimizer = OptimizerConfig(learning_rate=2e-3, min_learning_rate=1e-4, warmup=0.05, weight_decay=0.05)
    return Experiment(
        name=name,
        task=task,
        data=CodeData(
            path=f"{WORKDIR}/codes/{codes}",
            grid=model.grid,
            sub_codes=model.sub_codes,
            code_bits=model.code_bits,
            batch_size=64,
        ),
        train=TrainConfig(
            steps=600, optimizer=optimizer, log_every=50, eval_every=150, checkpoint_every=600, tensorboard=False
        ),
    )


def autoregressive(sub_codes, bits):
    return ElmModeling(model=ElmConfig(**SIZES, sub_codes=sub_codes, code_bits=bits))


config = ElmStudy(
    tokenizers=Comparison(
        arms=(
            tokenizer("bae", BAEConfig(**BODY, bits=10)),
            tokenizer("bae_deterministic", BAEConfig(**BODY, bits=10, deterministic=True)),
            tokenizer("vq", VQGANConfig(**BODY, codebook_size=1024)),
        ),
        measures=(CodeUsage(),),
        columns=("l1", "psnr", "codes_used_of_all", "share_used", "perplexity_of_all", "nats_below_uniform"),
        curve="l1",
        title="Tokenizers of 16 x 16 emoji, 10 bits a position",
        workdir=f"{WORKDIR}/tokenizers",
    ),
    models=Comparison(
        arms=(
            model("ar_1_10", autoregressive(1, 10), "bae"),
            model("ar_2_5", autoregressive(2, 5), "bae"),
            model("masked_1_10", MaskedElmModeling(model=MaskedElmConfig(**SIZES, sub_codes=1, code_bits=10)), "bae"),
            model("ar_vq", autoregressive(1, 10), "vq"),
        ),
        measures=(SampleQuality(images=dataclasses.replace(images, flip=False), proxy=f"{WORKDIR}/proxy"),),
        columns=(
            "nats_per_position",
            "proxy_distance",
            "proxy_distance_of_reconstructions",
            "class_seen",
            "proxy_accuracy",
        ),
        curve="nats_per_position",
        title="Models of image codes",
        workdir=f"{WORKDIR}/models",
    ),
    workdir=WORKDIR,
)
