"""ELECTRA-Large (335M) on XLNet's data (33B tokens): 400,000 steps of 2,048 x 512 tokens.

    jaxtok train configs/lm/electra_large.py --data.corpus arrayrecord:/path/to/records

Needs the tokenizer.json of bert-base-uncased (--data.tokenizer FILE). The paper reports
89.0 on GLUE (development sets) with 400,000 steps; 89.5 with 1,750,000.
"""

from jaxtok.lm.electra import PUBLISHED
from jaxtok.training.recipes import electra

config = electra(
    PUBLISHED["large"],
    corpus="arrayrecord:data/xlnet",
    name="electra_large",
    steps=400_000,
    batch_size=2048,
    length=512,
    learning_rate=2e-4,
    fsdp=16,
)
