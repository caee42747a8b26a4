"""eChar of Learn Your Tokens on tiny Shakespeare: characters of words, otherwise as configs/lm/word_pooled_ebyte.py.

    jaxtok train configs/lm/word_pooled_echar.py

50 passes over the 0.3M words. Characters that are not in the alphabet are spelled in bytes.
"""

import dataclasses
import string
from pathlib import Path

from jaxtok.configuration import load_config
from jaxtok.lm.word_pooled import PUBLISHED

ebyte = load_config(Path(__file__).with_name("word_pooled_ebyte.py"))
alphabet = "characters:" + string.ascii_letters + string.digits + string.punctuation
model = dataclasses.replace(PUBLISHED["echar"], dtype="bfloat16", remat="projections")
config = dataclasses.replace(
    ebyte,
    name="word_pooled_echar",
    task=dataclasses.replace(ebyte.task, model=model, tokenizer=alphabet),
    data=dataclasses.replace(ebyte.data, corpus="tfds:tiny_shakespeare", tokenizer=alphabet, streams=1),
    train=dataclasses.replace(ebyte.train, steps=300, eval_every=50),
)
