"""TokenFormer-450M on the Pile: 143,000 steps of 1,024 x 2,048 tokens (300B).

    jaxtok train configs/lm/tokenformer_pile_450m.py --data.corpus arrayrecord:/path/to/records

Needs GPT-NeoX-20B's tokenizer.json (--data.tokenizer FILE). The paper reports 8.28 perplexity on the Pile.
"""

from jaxtok.lm.tokenformer import PUBLISHED
from jaxtok.training.recipes import gpt_neox

config = gpt_neox(
    PUBLISHED["450m"], corpus="arrayrecord:data/pile", name="tokenformer_pile_450m", steps=143_000, batch_size=1024
)
