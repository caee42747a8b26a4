"""A Mamba beside a Transformer of as many parameters, on Python's standard library, after the same steps.

    jaxtok study mamba_study

Both are byte models of mamba_small's size: 0.08M parameters, and 2M bytes of text. It takes about ten minutes on a busy
core. Expect 2.23 bits a byte of the Mamba and 2.36 of the Transformer.
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.studies.comparison import Comparison

mamba = dataclasses.replace(load_config("mamba_small"), name="mamba")
size = LlamaConfig(
    num_layers=2, d_model=64, num_heads=4, mlp_dim=68, vocab_size=384, max_length=1024, tie_embeddings=True
)

config = Comparison(
    arms=(mamba, dataclasses.replace(mamba, name="transformer", task=LanguageModeling(model=size))),
    title="Bits a byte of a Mamba and of a Transformer of as many parameters",
    workdir="runs/mamba_study",
)
