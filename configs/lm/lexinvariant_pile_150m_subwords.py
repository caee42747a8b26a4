"""The paper's lexinvariant model of T5's 32,000 subwords on the Pile, as lexinvariant_pile_150m_characters.py.

    jaxtok train configs/lm/lexinvariant_pile_150m_subwords.py --data.corpus arrayrecord:/path/to/records

Needs T5's spiece.model (--data.tokenizer FILE). The tables of a batch would take 34 GB in bfloat16, so 2,048 of a
sequence's rows are drawn at a time, in the forward and in the backward pass.
"""

import dataclasses
from pathlib import Path

from jaxtok.configuration import load_config
from jaxtok.data.text import TextData
from jaxtok.lm.lexinvariant import PUBLISHED

characters = load_config(Path(__file__).with_name("lexinvariant_pile_150m_characters.py"))
model = dataclasses.replace(PUBLISHED["150m-subwords"], dtype="bfloat16", remat="projections")
data = {field.name: getattr(characters.data, field.name) for field in dataclasses.fields(TextData)}

config = dataclasses.replace(
    characters,
    name="lexinvariant_pile_150m_subwords",
    task=dataclasses.replace(characters.task, model=model, block=2048),
    data=TextData(**data | {"tokenizer": "data/t5/spiece.model"}),
)
