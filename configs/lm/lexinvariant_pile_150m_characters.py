"""The paper's lexinvariant model of characters: 150M parameters, none of them a symbol's, on the Pile.

    jaxtok train configs/lm/lexinvariant_pile_150m_characters.py --data.corpus arrayrecord:/path/to/records

250,000 steps of 512 rows of 512 ASCII characters; other characters are left out of the text. The standard model beside
it is the same with --task.random_symbols 0; 0.2 is semi-lexinvariant. The paper reports that the gap in perplexity to
the standard model shrinks from ninefold at the first characters to less than one times its perplexity at the 512th.
(The learning rate falls from 1e-2 to 1e-3 there; that it does so along a cosine, with a warm-up, is our choice.)
"""

import dataclasses

from jaxtok.data.reduced import ReducedText
from jaxtok.lm.lexinvariant import PUBLISHED, LexinvariantModeling
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

config = Experiment(
    name="lexinvariant_pile_150m_characters",
    task=LexinvariantModeling(
        model=dataclasses.replace(PUBLISHED["150m-characters"], dtype="bfloat16", remat="projections")
    ),
    data=ReducedText(
        corpus="arrayrecord:data/pile",
        tokenizer="ascii",
        length=512,
        batch_size=512,
        isolate_documents=False,
        eval_limit=16,
        workers=8,
        streams=64,
    ),
    train=TrainConfig(
        steps=250_000,
        optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-2, min_learning_rate=1e-3, weight_decay=0.0),
        log_every=20,
        eval_every=1000,
        checkpoint_every=1000,
        keep_checkpoints=3,
    ),
    mesh=MeshConfig(fsdp=16),
)
