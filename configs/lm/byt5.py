"""ByT5 (arXiv 2105.13626): span corruption of mC4's bytes, a million steps of 1,024 inputs of 1,024 bytes.

    jaxtok train byt5_small --data.corpus arrayrecord:/path/to/records

Without --data.corpus, mC4 is read from TensorFlow Datasets. The authors' trained models are google/byt5-small to
byt5-xxl on Hugging Face; `jaxtok convert FOLDER RUN` reads them. No loss of these runs is published.

byt5_small  300M parameters
byt5_base  582M parameters
byt5_large  1.23B parameters
byt5_xl  3.74B parameters
byt5_xxl  12.9B parameters
"""

import dataclasses

from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.lm.t5 import PUBLISHED, SequenceToSequence
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


def byt5(size: str, fsdp: int = 16) -> Experiment:
    """Spans of 20 bytes, 15 % noise; Adafactor at a constant rate.

    The authors' rate falls with the inverse square root of the step, which no schedule here does; this one is their
    last."""
    return Experiment(
        name=f"byt5_{size}",
        task=SequenceToSequence(
            model=dataclasses.replace(PUBLISHED[f"byt5-{size}"], dtype="bfloat16", remat="full"),
        ),
        data=SpanCorruption(
            corpus="tfds:c4/multilingual", length=1024, batch_size=1024, eval_limit=16, workers=8, streams=256
        ),
        train=TrainConfig(
            steps=1_000_000,
            optimizer=OptimizerConfig(
                name="adafactor", learning_rate=1e-3, min_learning_rate=1e-3, schedule="constant", weight_decay=0.0
            ),
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


configs = {
    "byt5_small": lambda: byt5("small"),
    "byt5_base": lambda: byt5("base"),
    "byt5_large": lambda: byt5("large"),
    "byt5_xl": lambda: byt5("xl"),
    "byt5_xxl": lambda: byt5("xxl", fsdp=64),
}
