"""A small TokenFormer on Python's standard library: train it, grow it, train on, and compare with scratch.

    jaxtok study quickstart

It takes about seven minutes on two cores. Expect about 3.0 bits per byte before the growth, exactly the same right
after it, and in the end less than training the final size from scratch reaches with the same compute.
runs/quickstart/loss_vs_compute.png shows it. growth_study has more arms and seeds.
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.studies.growth import GrowthStudy

small = load_config("tokenformer_small")
(growth,) = small.stages
base = dataclasses.replace(
    small,
    name="base",
    stages=(),
    train=dataclasses.replace(small.train, log_every=20, eval_every=50, checkpoint_every=200),
)

config = GrowthStudy(
    base=base,
    to=growth.to,
    steps=growth.steps,
    arms=("base", "copy", "scratch"),
    test_batches=128,
    workdir="runs/quickstart",
)
