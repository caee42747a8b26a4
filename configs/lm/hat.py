"""HAT (arXiv 2501.10322) in the paper's sizes: 72,000 steps of 1,024 rows of 2,816 words (about 1.2T bytes).

    jaxtok train hat_1b --data.corpus arrayrecord:/path/to/records

The paper trains on DCLM-Baseline, in documents of at most 16,384 bytes. The word accuracies are the paper's.

hat_1b  1.19B parameters, to compare with a 1B model of subwords: word accuracy 35.5 %
hat_3b  4.37B parameters, to compare with a 3B model of subwords: word accuracy 37.8 %
hat_7b  9.28B parameters, to compare with a 7B model of subwords: word accuracy 39.0 %
"""

import dataclasses

from jaxtok.data.words import WordText
from jaxtok.lm.hat import PUBLISHED, HATModeling, everywhere
from jaxtok.tokenizers.words import WordSplitter
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

STEPS = 72_000


def hat(size: str, fsdp: int) -> Experiment:
    """AdamW 0.9/0.95, decay 0.1, 500 steps of warm-up, 3e-4 times 32 over the heads of the backbone, to a tenth.

    Words have at most 16 bytes. That is our choice: the encoder and the decoder compute all positions of a word,
    whether they are used or not, so longer words would make them slower.
    """
    model = dataclasses.replace(everywhere(PUBLISHED[size], dtype="bfloat16", remat="full"), max_units=16)
    words = WordSplitter("whitespace", model.max_units)
    rate = 3e-4 * 32 / model.backbone.num_heads
    return Experiment(
        name=f"hat_{size}",
        task=HATModeling(model=model, splitter=words),
        data=WordText(
            corpus="arrayrecord:data/dclm-baseline",
            length=2816,
            batch_size=1024,
            splitter=words,
            max_units=model.max_units,
            eval_limit=16,
            workers=8,
            streams=256,
        ),
        train=TrainConfig(
            steps=STEPS,
            optimizer=OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 10, warmup=500 / STEPS),
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


configs = {
    "hat_1b": lambda: hat("1b", fsdp=16),
    "hat_3b": lambda: hat("3b", fsdp=64),
    "hat_7b": lambda: hat("7b", fsdp=128),
}
