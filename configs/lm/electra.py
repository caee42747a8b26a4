"""ELECTRA (arXiv 2003.10555) in the paper's three sizes: a discriminator of tokens that a generator has replaced.

    jaxtok train electra_small --data.corpus arrayrecord:/path/to/records

All need the tokenizer.json of bert-base-uncased (--data.tokenizer FILE). The numbers are the paper's, on the
development sets of GLUE.

electra_small  14M: 1,000,000 steps of 128 x 128 tokens of Wikipedia and BooksCorpus; GLUE 79.9 (1.4e18 FLOPs)
electra_base  110M: 766,000 steps of 256 x 512 tokens of Wikipedia and BooksCorpus; GLUE 85.1 (6.4e19 FLOPs)
electra_large  335M: 400,000 steps of 2,048 x 512 tokens of XLNet's data (33B tokens); GLUE 89.0
    With 1,750,000 steps, it is 89.5.
"""

import dataclasses

from jaxtok.data.encoders import EncoderData
from jaxtok.lm.electra import PUBLISHED
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


def electra(
    size: str, *, corpus: str, steps: int, batch_size: int, length: int, learning_rate: float, fsdp: int
) -> Experiment:
    """The authors' recipe (appendix A): Adam 0.9/0.999 without bias correction, decay 0.01, clip 1, 10,000 steps of
    warm-up times a linear decay to 0, and dropout of 0.1, also of attention weights."""
    task = PUBLISHED[size]
    model = dataclasses.replace(task.model, dtype="bfloat16", remat="dots", dropout=0.1, attention_dropout=0.1)
    return Experiment(
        name=f"electra_{size}",
        task=dataclasses.replace(task, model=model),
        data=EncoderData(
            corpus=f"arrayrecord:data/{corpus}",
            tokenizer="data/bert-base-uncased/tokenizer.json",
            length=length,
            batch_size=batch_size,
            eval_limit=64,
            workers=8,
            streams=min(batch_size, 256),
        ),
        train=TrainConfig(
            steps=steps,
            optimizer=OptimizerConfig(
                learning_rate=learning_rate,
                min_learning_rate=0.0,
                schedule="linear",
                warmup=10_000 / steps,
                warmup_times_decay=True,
                b2=0.999,
                eps=1e-6,
                bias_correction=False,
                weight_decay=0.01,
            ),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


configs = {
    "electra_small": lambda: electra(
        "small",
        corpus="wikipedia_books",
        steps=1_000_000,
        batch_size=128,
        length=128,
        learning_rate=5e-4,
        fsdp=1,
    ),
    "electra_base": lambda: electra(
        "base", corpus="wikipedia_books", steps=766_000, batch_size=256, length=512, learning_rate=2e-4, fsdp=8
    ),
    "electra_large": lambda: electra(
        "large", corpus="xlnet", steps=400_000, batch_size=2048, length=512, learning_rate=2e-4, fsdp=16
    ),
}
