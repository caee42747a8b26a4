"""eSub of Learn Your Tokens on WikiText-2: GPT-2's tokens of words, otherwise as configs/lm/word_pooled_ebyte.py.

    jaxtok train configs/lm/word_pooled_esub.py --data.corpus data/wikitext-2

Needs GPT-2's tokenizer.json (--data.tokenizer FILE --task.tokenizer FILE). Its end-of-text token gives its place to the
end mark, which in the authors' code clashes with "!". A word has its space in front, as in GPT-2.
"""

import dataclasses
from pathlib import Path

from jaxtok.configuration import load_config
from jaxtok.lm.word_pooled import PUBLISHED

ebyte = load_config(Path(__file__).with_name("word_pooled_ebyte.py"))
tokenizer = "data/gpt2/tokenizer.json"
model = dataclasses.replace(PUBLISHED["esub"], dtype="bfloat16", remat="projections")
config = dataclasses.replace(
    ebyte,
    name="word_pooled_esub",
    task=dataclasses.replace(ebyte.task, model=model, tokenizer=tokenizer),
    data=dataclasses.replace(ebyte.data, tokenizer=tokenizer, max_units=model.max_units),
)
