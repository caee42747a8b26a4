"""MrT5 (arXiv 2410.20771) around ByT5: 5,000 steps of 1,024 x 1,024 bytes of mC4, deleting half of them.

    jaxtok train mrt5_small --start byt5-small

`--start` takes ByT5's weights from the Hugging Face folder of google/byt5-small or from a run of byt5_small; without
it, training starts from scratch. Without --data.corpus, mC4 is read from TensorFlow Datasets; the paper takes 15 of its
languages. The paper trained only small and large.

mrt5_small  300M parameters; in the paper, half of the bytes are deleted and a batch takes 29.99 ms, not 44.29
mrt5_base  582M parameters
mrt5_large  1.23B parameters; in the paper, 49.5 % of the bytes are deleted and a batch takes 98.21 ms, not 177.27
    The loss is 0.74 bits a byte (loss / ln 2) instead of ByT5's 0.70.
mrt5_xl  3.74B parameters
mrt5_xxl  12.9B parameters
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.lm.mrt5 import PUBLISHED, MrT5Training
from jaxtok.training.experiment import Experiment
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.mrt5 import T5ToMrT5


def mrt5(size: str) -> Experiment:
    """Continued pre-training (section 5) on ByT5's data: AdamW, 1e-4 linearly to 0, without warm-up; dropout 0.1."""
    byt5 = load_config(f"byt5_{size}")
    optimizer = OptimizerConfig(
        learning_rate=1e-4,
        min_learning_rate=0.0,
        schedule="linear",
        warmup=0.0,
        b2=0.999,
        weight_decay=0.0,
    )
    model = dataclasses.replace(
        PUBLISHED[f"mrt5-{size}"],
        dropout=0.1,
        attention_dropout=0.1,
        mlp_dropout=0.1,
        dtype="bfloat16",
        remat="full",
    )
    return dataclasses.replace(
        byt5,
        name=f"mrt5_{size}",
        task=MrT5Training(model=model, target_rate=0.5),
        start=T5ToMrT5(),
        train=dataclasses.replace(byt5.train, steps=5_000, optimizer=optimizer),
    )


configs = {
    "mrt5_small": lambda: mrt5("small"),
    "mrt5_base": lambda: mrt5("base"),
    "mrt5_large": lambda: mrt5("large"),
    "mrt5_xl": lambda: mrt5("xl"),
    "mrt5_xxl": lambda: mrt5("xxl"),
}
