"""FlexTok (arXiv 2502.13967) on scikit-learn's digits: an image of 8 x 8 pixels as 1 to 16 ordered tokens.

jaxtok train flextok_digits
jaxtok vision reconstruct runs/flextok_digits --prefixes 1 2 4 8
"""

from jaxtok.data.images import ImageData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.flextok import FlexTokConfig, FlexTokenizer

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
        # Unless times are nearer to noise, codes of this size collapse within 200 steps.
        task=FlexTokenizer(model=TINY, latents="grey", time_shift=1.5, eval_prefixes=(1, 2, 4, 8)),
        data=ImageData(images="digits", size=8, batch_size=32, flip=False),
        train=TrainConfig(steps=2000, optimizer=optimizer, log_every=50, eval_every=1000, checkpoint_every=1000),
    )


configs = {"flextok_digits": digits}
