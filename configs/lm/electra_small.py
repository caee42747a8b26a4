"""ELECTRA-Small (14M) on Wikipedia and BooksCorpus: 1,000,000 steps of 128 x 128 tokens.

    jaxtok train configs/lm/electra_small.py --data.corpus arrayrecord:/path/to/records

Needs the tokenizer.json of bert-base-uncased (--data.tokenizer FILE). The paper reports
79.9 on GLUE (development sets, 1.4e18 FLOPs).
"""

from jaxtok.lm.electra import PUBLISHED
from jaxtok.training.recipes import electra

config = electra(
    PUBLISHED["small"],
    corpus="arrayrecord:data/wikipedia_books",
    name="electra_small",
    steps=1_000_000,
    batch_size=128,
    length=128,
    learning_rate=5e-4,
    fsdp=1,
)
