"""eByte of Learn Your Tokens on WikiText-2: the bytes of a word become four vectors; 8 layers of width 512 over words.

    jaxtok train configs/lm/word_pooled_ebyte.py --data.corpus data/wikitext-2

50 passes over the 2M words, as in the paper (arXiv 2310.11628), whose code has AdamW at a constant 1e-4 and rows of 192
words. Its batch is 2 rows; this one is for a TPU slice, and --data.batch-size 2 --train.steps 272000 --mesh.fsdp 1 is
the authors'. The paper has no table that we could check; expect a higher next-word accuracy than that of a plain model
of the same body, above all for rare words. Characters: word_pooled_echar.py; GPT-2's tokens: word_pooled_esub.py.
"""

import dataclasses

from jaxtok.data.word_units import WordUnitText
from jaxtok.lm.word_pooled import PUBLISHED, WordPooling
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

model = dataclasses.replace(PUBLISHED["ebyte"], dtype="bfloat16", remat="projections")
config = Experiment(
    name="word_pooled_ebyte",
    task=WordPooling(model=model, tokenizer="bytes", rule="paper"),
    data=WordUnitText(
        corpus="data/wikitext-2",
        tokenizer="bytes",
        rule="paper",
        length=model.max_words,
        max_units=model.max_units,
        batch_size=256,
        streams=8,
        eval_limit=16,
    ),
    train=TrainConfig(
        steps=2_125,
        optimizer=OptimizerConfig(learning_rate=1e-4, min_learning_rate=0.0, schedule="constant", warmup=0.0),
    ),
    mesh=MeshConfig(fsdp=16),
)
