"""The paper's lexinvariant models (arXiv 2305.16349): 150M parameters, and no embeddings, on the Pile.

    jaxtok train lexinvariant_pile_150m_characters --data.corpus arrayrecord:/path/to/records

They train for 250,000 steps of 512 rows of 512 symbols. --task.random-symbols 0 gives the standard model that the paper
compares with; 0.2 gives the semi-lexinvariant one. The paper reports that the gap in perplexity to the standard model
shrinks from nine times its perplexity at the first characters to less than one times at the 512th. (The paper's
learning rate falls from 1e-2 to 1e-3; that it does so along a cosine, after a warm-up, is our choice.)

lexinvariant_pile_150m_characters  ASCII characters; all others are left out of the text
lexinvariant_pile_150m_subwords  T5's 32,000 subwords
    It needs T5's spiece.model (--data.tokenizer FILE). The tables of a batch would take 34 GB in bfloat16, so 2,048 of
    a sequence's rows are drawn at a time, in the forward and in the backward pass.
"""

import dataclasses

from jaxtok.data.reduced import ReducedText
from jaxtok.data.text import TextData
from jaxtok.lm.lexinvariant import PUBLISHED, LexinvariantModeling
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig


def lexinvariant(symbols: str, data: type[TextData], tokenizer: str, block: int = 0) -> Experiment:
    model = dataclasses.replace(PUBLISHED[f"150m-{symbols}"], dtype="bfloat16", remat="projections")
    return Experiment(
        name=f"lexinvariant_pile_150m_{symbols}",
        task=LexinvariantModeling(model=model, block=block),
        data=data(
            corpus="arrayrecord:data/pile",
            tokenizer=tokenizer,
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


configs = {
    "lexinvariant_pile_150m_characters": lambda: lexinvariant("characters", ReducedText, "ascii"),
    "lexinvariant_pile_150m_subwords": lambda: lexinvariant("subwords", TextData, "data/t5/spiece.model", block=2048),
}
