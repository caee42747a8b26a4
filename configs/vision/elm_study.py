"""ELM in small: BAE against VQ at equal bits on emoji and on digits, then models of the digits' codes.

    jaxtok study elm_study

The tokenizers turn 1,911 emoji of 16 x 16 pixels into 8 x 8 positions of 10 bits, and 1,797 digits of 8 x 8 pixels into
4 x 4 positions of 8 bits. The models of the digits' codes are autoregressive ones of 1 code of 8 bits, of 2 of 4 bits
and of VQ codes, and a masked one. (A model of the emoji's 64 positions would need longer training.)

It takes ten and a half minutes on two cores. Expect BAE to use 1,016 of 1,024 codes of emoji and 255 of 256 of digits,
and VQ 215 and 134; 3.60 nats a position for 1 code and 3.39 for 2; and digits of which a classifier recognises 55 % and
91 %, 47 % of the masked model's, and 84 % of VQ's. The pictures are in runs/elm_study. Emoji are downloaded once by
npm.
"""

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
GUIDANCE = 3.0
emoji = ImageData(images="emoji", size=16, batch_size=32)
digits = ImageData(images="digits", size=8, batch_size=32, flip=False)


def tokenizer(name, images, model, **options):
    """Two levels of one block: a position is 2 x 2 pixels."""
    body = {"width": 32, "multipliers": (1, 1), "res_blocks": 1, "attention_resolutions": (), "embed_dim": 32}
    optimizer = OptimizerConfig(
        learning_rate=2e-3, min_learning_rate=1e-4, warmup=0.02, b2=0.999, weight_decay=0.0, clip=1.0
    )
    return Experiment(
        name=name,
        task=Autoencoding(model=model(image_size=images.size, **body, **options), discriminator=None, perceptual="mse"),
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
    "grid": 4,
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
            steps=800, optimizer=optimizer, log_every=50, eval_every=200, checkpoint_every=800, tensorboard=False
        ),
    )


def autoregressive(sub_codes, bits):
    return ElmModeling(model=ElmConfig(**SIZES, sub_codes=sub_codes, code_bits=bits))


config = ElmStudy(
    tokenizers=Comparison(
        arms=(
            tokenizer("bae_emoji", emoji, BAEConfig, bits=10),
            tokenizer("bae_emoji_deterministic", emoji, BAEConfig, bits=10, deterministic=True),
            tokenizer("vq_emoji", emoji, VQGANConfig, codebook_size=1024),
            tokenizer("bae_digits", digits, BAEConfig, bits=8),
            tokenizer("vq_digits", digits, VQGANConfig, codebook_size=256),
        ),
        measures=(CodeUsage(),),
        columns=("l1", "psnr", "codes_used_of_all", "share_used", "perplexity_of_all", "nats_below_uniform"),
        curve="l1",
        title="Tokenizers of emoji (10 bits a position) and of digits (8 bits)",
        workdir=f"{WORKDIR}/tokenizers",
    ),
    models=Comparison(
        arms=(
            model("ar_1_8", autoregressive(1, 8), "bae_digits"),
            model("ar_2_4", autoregressive(2, 4), "bae_digits"),
            model(
                "masked_1_8", MaskedElmModeling(model=MaskedElmConfig(**SIZES, sub_codes=1, code_bits=8)), "bae_digits"
            ),
            model("ar_vq", autoregressive(1, 8), "vq_digits"),
        ),
        measures=(
            SampleQuality(
                images=digits,
                proxy=f"{WORKDIR}/proxy",
                guidance=GUIDANCE,
            ),
        ),
        columns=(
            "nats_per_position",
            "proxy_distance",
            "proxy_distance_of_reconstructions",
            "class_seen",
            "proxy_accuracy",
        ),
        curve="nats_per_position",
        title="Models of the codes of digits",
        workdir=f"{WORKDIR}/models",
    ),
    workdir=WORKDIR,
    guidance=GUIDANCE,
)
