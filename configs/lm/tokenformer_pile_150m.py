"""TokenFormer-150M on the Pile: 143,000 steps of 1,024 x 2,048 tokens (300B).

    jaxtok train configs/lm/tokenformer_pile_150m.py --data.corpus arrayrecord:/path/to/records

Needs GPT-NeoX-20B's tokenizer.json (--data.tokenizer FILE). The paper reports 10.45 perplexity on the Pile.
"""

from jaxtok.lm.tokenformer import PUBLISHED
from jaxtok.training.recipes import gpt_neox

config = gpt_neox(
    PUBLISHED["150m"], corpus="arrayrecord:data/pile", name="tokenformer_pile_150m", steps=143_000, batch_size=1024
)
