"""The PyTorch growth run on OpenWebText2: 354M for 600,000 steps of 524,288 tokens, grown to 757M for 120,000 more.

    jaxtok train configs/lm/tokenformer_openwebtext2_354m_757m.py --data.corpus arrayrecord:/path/to/records

Needs GPT-NeoX-20B's tokenizer.json (--data.tokenizer FILE). The authors report perplexity 11.9 before the growth and
10.7 after it. As in their run, new rows are random and tau follows the number of tokens: the loss jumps, then falls;
`--stages.0.init zero_keys` preserves the function instead.
"""

from jaxtok.lm.tokenformer import PUBLISHED
from jaxtok.training.recipes import gpt_neox
from jaxtok.transfer.growth import Growth

config = gpt_neox(
    PUBLISHED["owt-354m"],
    corpus="arrayrecord:data/openwebtext2",
    name="tokenformer_openwebtext2_354m_757m",
    steps=600_000,
    batch_size=512,
    stages=(Growth(to=PUBLISHED["owt-757m"].tokens, steps=120_000, init="random"),),
)
