"""TokenBridge in small: what quantisation costs, the size of its input, and heads compared, on photos and digits.

    jaxtok study tokenbridge_study

Photo patches of 8 x 8 pixels on 16 principal components stand for latents; a KL-VAE turns scikit-learn's 1,797 digits
of 8 x 8 pixels into 4 x 4 positions of 4 channels, each with 16 levels.
"""

from jaxtok.data.codes import CodeData
from jaxtok.data.images import ImageData
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.elm import SampleQuality
from jaxtok.studies.tokenbridge import TokenBridgeStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.kl_vae import KLVAEConfig
from jaxtok.vision.tokenbridge import TokenBridgeConfig, TokenBridgeModeling
from jaxtok.vision.tokenbridge_tokenizer import BridgeTokenizer, DimensionwiseQuantizer

WORKDIR = "runs/tokenbridge_study"
GUIDANCE = 2.0
HEADS = ("autoregressive", "parallel", "diffusion")
digits = ImageData(images="digits", size=8, batch_size=64, flip=False)


def train(steps: int, rate: float, **options) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 20, warmup=0.05, **options)
    return TrainConfig(
        steps=steps,
        optimizer=optimizer,
        log_every=50,
        eval_every=steps // 4,
        checkpoint_every=steps,
        tensorboard=False,
    )


def of_patches(head: str) -> Experiment:
    """A head of two blocks on a backbone that sees nothing: without classes, and with one position that is masked."""
    model = TokenBridgeConfig(
        grid=1,
        channels=16,
        quantizer=DimensionwiseQuantizer(levels=16, low=-4.0, high=4.0),
        channel_order=(),
        num_classes=1,
        buffer=1,
        **{
            f"{part}_{n}": v for part in ("encoder", "decoder") for n, v in (("width", 16), ("layers", 1), ("heads", 2))
        },
        head=head,
        head_width=64,
        head_layers=2,
        head_heads=4,
        dropout=0.0,
    )
    data = CodeData(path=f"{WORKDIR}/codes/patches", shape=(1, 1), values=model.code_values, batch_size=128)
    return Experiment(
        name=f"patches_{head}",
        task=TokenBridgeModeling(model=model),
        data=data,
        train=train(500, 1e-3, weight_decay=0.01),
    )


def of_digits(head: str) -> Experiment:
    sizes = {"width": 96, "layers": 3, "heads": 4}
    model = TokenBridgeConfig(
        grid=4,
        channels=4,
        quantizer=DimensionwiseQuantizer(levels=16),
        channel_order=(),
        num_classes=10,
        buffer=4,
        **{f"{part}_{n}": v for part in ("encoder", "decoder") for n, v in sizes.items()},
        head=head,
        head_width=96,
        head_layers=2,
        head_heads=4,
        diffusion_layers=3,
    )
    data = CodeData(path=f"{WORKDIR}/codes/kl_vae_digits", shape=(4, 4), values=model.code_values, batch_size=64)
    return Experiment(
        name=f"digits_{head}",
        task=TokenBridgeModeling(model=model),
        data=data,
        train=train(1000, 1e-3, weight_decay=0.05),
    )


config = TokenBridgeStudy(
    heads=Comparison(
        arms=tuple(of_patches(head) for head in HEADS[:2]),
        columns=("loss",),
        curve="loss",
        title="Heads on photo patches, nats a channel",
        workdir=f"{WORKDIR}/heads",
    ),
    tokenizers=Comparison(
        arms=(
            Experiment(
                name="kl_vae_digits",
                task=BridgeTokenizer(
                    model=KLVAEConfig(
                        image_size=8,
                        widths=(32, 32),
                        res_blocks=1,
                        encoder_attention=(),
                        z_channels=4,
                        groups=8,
                        scaling=0.0,
                        kl_weight=1e-3,
                    ),
                    discriminator=None,
                    perceptual="mse",
                    quantizer=DimensionwiseQuantizer(levels=16),
                ),
                data=digits,
                train=train(1200, 2e-3, b2=0.999, weight_decay=0.0),
            ),
        ),
        columns=("l1", "psnr", "latent_std", "latent_mse", "share_used", "entropy"),
        curve="l1",
        title="A KL-VAE of digits through 16 levels a channel",
        workdir=f"{WORKDIR}/tokenizers",
    ),
    models=Comparison(
        arms=tuple(of_digits(head) for head in HEADS),
        measures=(SampleQuality(images=digits, proxy=f"{WORKDIR}/proxy", guidance=GUIDANCE),),
        columns=(
            "loss",
            "class_gain",
            "proxy_distance",
            "proxy_distance_of_reconstructions",
            "class_seen",
            "proxy_accuracy",
        ),
        curve="loss",
        title="Heads on the codes of digits (of the diffusion head, the loss is another one)",
        workdir=f"{WORKDIR}/models",
    ),
    speed=TokenBridgeConfig(decoder_width=256, head_width=256, head_layers=4, head_heads=8),
    workdir=WORKDIR,
    guidance=GUIDANCE,
)
