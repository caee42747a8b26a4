"""The main job in small: train a TokenFormer on the Python standard library, grow it, go on, compare with scratch.

    jaxtok study configs/lm/quickstart.py

About four minutes on two cores. Expect roughly 2.4 bits per byte before the growth, less after it, and less total
compute than the final size needs from scratch for the same loss; runs/quickstart/loss_vs_compute.png shows it.
"""

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.studies.growth import GrowthStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig

base = Experiment(
    name="base",
    task=LanguageModeling(
        model=TokenFormerConfig(
            num_layers=4,
            d_model=128,
            num_heads=4,
            rotary_fraction=0.5,
            max_length=512,
            tokens=uniform_counts(attention=48, ffn=144),
        )
    ),
    data=TextData(length=128, batch_size=16, eval_limit=20),
    train=TrainConfig(
        steps=800,
        log_every=20,
        eval_every=100,
        checkpoint_every=200,
        optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup=0.05),
    ),
)

config = GrowthStudy(
    base=base,
    to=uniform_counts(attention=192, ffn=576),
    steps=400,
    arms=("base", "zero_keys", "random", "scratch"),
    test_batches=60,
    workdir="runs/quickstart",
)
