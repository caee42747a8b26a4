"""TokenFormer's claim on Python's standard library: a grown model against models from scratch, 12 arms, 3 seeds.

    jaxtok study growth_study

It takes about an hour on two cores. configs/lm/README.md has the table and the plot that it makes. The models and the
training are those of quickstart, which compares a single growth with training from scratch.
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.studies.growth import ARMS

quickstart = load_config("quickstart")
left_out = ("zero_keys_keep", "scratch_short")  # of little interest; --arms can name them
config = dataclasses.replace(
    quickstart,
    arms=tuple(arm for arm in ARMS if arm not in left_out),
    seeds=(0, 1, 2),
    workdir="runs/growth_study",
)
