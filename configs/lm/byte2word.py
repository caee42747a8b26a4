"""Byte2Word (arXiv 2211.12677) on Wikipedia; no code was released, so the recipe is this package's choice.

    jaxtok tokenizer wordpieces.model --corpus tfds:wikipedia/20230601.en --vocab-size 30522
    jaxtok train byte2word_base

Expect what the paper's abstract says: the quality of a BERT of this size with a tenth of its input embedding, 2.58M
numbers instead of 23.4M. The pieces can be those of any tokenizer whose ids are below 30,522 (--data.tokenizer FILE).

byte2word_base  the body of BERT-base; 112M parameters
"""

import dataclasses

from jaxtok.data.word_pieces import WordPieceText
from jaxtok.lm.byte2word import PUBLISHED, ByteWords
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

base = Experiment(
    name="byte2word_base",
    task=ByteWords(model=dataclasses.replace(PUBLISHED["base"], dtype="bfloat16", remat="projections")),
    data=WordPieceText(
        corpus="tfds:wikipedia/20230601.en",
        tokenizer="wordpieces.model",
        length=128,
        batch_size=4096,
        streams=64,
        workers=8,
        eval_limit=20,
    ),
    train=TrainConfig(
        steps=23_000,
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            min_learning_rate=0.0,
            schedule="linear",
            warmup=0.06,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.01,
        ),
        eval_every=1000,
        checkpoint_every=1000,
    ),
    mesh=MeshConfig(data=-1, fsdp=16),
)

configs = {"byte2word_base": base}
