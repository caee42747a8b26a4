"""A tiny run with a growth that logs every step and saves every fourth, for `jaxtok recovery` to kill.

    jaxtok recovery recovery --kills 50
    jaxtok recovery recovery --kills 20 --processes 2 --workdir runs/recovery2

Each takes four minutes on two cores. Expect `lost 0`: the killed run ends with the same bits as the undisturbed one.
"""

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.growth import Growth

config = Experiment(
    name="recovery",
    task=LanguageModeling(
        model=TokenFormerConfig(
            num_layers=2, d_model=64, num_heads=4, rotary_fraction=0.5, tokens=uniform_counts(64, 256), max_length=64
        )
    ),
    data=TextData(length=64, batch_size=8, streams=2, shuffle_window=64, eval_limit=2),
    train=TrainConfig(
        steps=120,
        log_every=1,
        eval_every=20,
        checkpoint_every=4,
        optimizer=OptimizerConfig(learning_rate=3e-3, min_learning_rate=3e-4),
        tensorboard=False,
    ),
    stages=(Growth(to=uniform_counts(128, 512), steps=120, init="copy", optimizer="keep"),),
)
