"""ELECTRA-Base (110M) on Wikipedia and BooksCorpus: 766,000 steps of 256 x 512 tokens.

    jaxtok train configs/lm/electra_base.py --data.corpus arrayrecord:/path/to/records

Needs the tokenizer.json of bert-base-uncased (--data.tokenizer FILE). The paper reports
85.1 on GLUE (development sets, 6.4e19 FLOPs).
"""

from jaxtok.lm.electra import PUBLISHED
from jaxtok.training.recipes import electra

config = electra(
    PUBLISHED["base"],
    corpus="arrayrecord:data/wikipedia_books",
    name="electra_base",
    steps=766_000,
    batch_size=256,
    length=512,
    learning_rate=2e-4,
    fsdp=8,
)
