"""A TokenFormer on Python's standard library that grows during the run: the smallest complete example.

    jaxtok train tokenformer_small
    jaxtok generate runs/tokenformer_small --prompt "def "

It trains 393,000 parameters for 400 steps, grows to 1.4 million without changing the function, and trains 200 steps
more. Expect about 3.0 bits per byte on validation files before the growth.
"""

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.growth import Growth

config = Experiment(
    name="tokenformer_small",
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
        eval_every=100,
        checkpoint_every=100,
        optimizer=OptimizerConfig(learning_rate=1.5e-3, min_learning_rate=1.5e-4, warmup=0.05),
    ),
    stages=(Growth(to=uniform_counts(attention=192, ffn=576), steps=200),),
)
