"""The main job in small: train a TokenFormer on Python's standard library, grow it, train on, compare with scratch.

    jaxtok study configs/lm/quickstart.py

About five minutes on two cores. Expect about 3.0 bits per byte before the growth, exactly the same right after it, and
less than from-scratch training of the final size reaches with the compute spent so far;
runs/quickstart/loss_vs_compute.png shows it. configs/lm/growth_study.py has more arms and seeds.
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
        steps=400,
        log_every=20,
        eval_every=50,
        checkpoint_every=200,
        optimizer=OptimizerConfig(learning_rate=1.5e-3, min_learning_rate=1.5e-4, warmup=0.05),
    ),
)

config = GrowthStudy(
    base=base,
    to=uniform_counts(attention=192, ffn=576),
    steps=200,
    arms=("base", "zero_keys", "random", "scratch"),
    test_batches=128,
    workdir="runs/quickstart",
)
