"""A TokenFormer of 6.6B parameters on the Pile, with the recipe of the published sizes: what a pod would make of it.

    jaxtok plan configs/lm/tokenformer_pile_7b.py --topology v5p-512

Not a published model: no loss is known. Needs GPT-NeoX-20B's tokenizer.json (--data.tokenizer FILE) for training.
"""

import dataclasses

from jaxtok.lm.tokenformer import PUBLISHED, uniform_counts
from jaxtok.training.recipes import gpt_neox

model = dataclasses.replace(
    PUBLISHED["1.5b"], num_layers=32, d_model=4096, num_heads=32, tokens=uniform_counts(attention=3072, ffn=12288)
)
config = gpt_neox(
    model,
    corpus="arrayrecord:data/pile",
    name="tokenformer_pile_7b",
    steps=143_000,
    batch_size=1024,
    remat="full",
    fsdp=64,
)
