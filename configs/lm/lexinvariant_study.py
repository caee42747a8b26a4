"""A lexinvariant, a semi-lexinvariant and a standard language model with the same body, on the letters of a text.

    jaxtok study lexinvariant_study

The text is Python's standard library, reduced to a-z and space; the models have 2 layers of width 32 and rows of 128
letters. Expect the lexinvariant model's loss to fall along the context (3.61 nats for the first letter, 3.11 for the
last ones) and to be the same on text with renamed letters. The standard model's is far lower on plain text (1.53), and
on renamed text far above that of guessing (6.09; ln 28 = 3.33). runs/lexinvariant_study/by_position.png shows it.
"""

import dataclasses

from jaxtok.data.reduced import ReducedText
from jaxtok.lm.lexinvariant import LexinvariantConfig, LexinvariantModeling
from jaxtok.studies.lexinvariant import ByPosition, Cipher, InContext, LexinvariantStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

LENGTH = 128
STEPS = 1200

lexinvariant = Experiment(
    name="lexinvariant",
    task=LexinvariantModeling(
        model=LexinvariantConfig(
            num_layers=2, d_model=32, num_heads=2, head_size=32, mlp_dim=128, vocab_size=28, max_length=LENGTH, unroll=2
        )
    ),
    data=ReducedText(length=LENGTH, batch_size=32, isolate_documents=False, eval_limit=4),
    train=TrainConfig(
        steps=STEPS,
        log_every=50,
        eval_every=300,
        checkpoint_every=300,
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            min_learning_rate=0.0,
            schedule="linear",
            warmup=100 / STEPS,
            b2=0.98,
            weight_decay=0.0,
        ),
    ),
    mesh=MeshConfig(data=1),
)


def arm(name: str, random_symbols: float) -> Experiment:
    task = dataclasses.replace(lexinvariant.task, random_symbols=random_symbols)
    return dataclasses.replace(lexinvariant, name=name, task=task)


config = LexinvariantStudy(
    arms=(lexinvariant, arm("standard", 0.0), arm("semi-lexinvariant", 0.2)),
    measures=(ByPosition(), Cipher(steps=200), InContext(pairs=(2, 8), examples=(2,))),
    columns=("plain_0_0", "plain_64_127", "permuted_64_127", "cipher_map", "lookup_2"),
    curve="loss",
    test_batches=16,
    title="Lexinvariant models",
    workdir="runs/lexinvariant_study",
)
