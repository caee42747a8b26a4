"""The incremental-scaling study: 124M on OpenWebText, grown to 354M, 757M and 1.4B with 60B tokens a stage.

    jaxtok train configs/lm/tokenformer_openwebtext_124m_1_4b.py --data.corpus arrayrecord:/path/to/records

Needs GPT-NeoX-20B's tokenizer.json (--data.tokenizer FILE). Read off the authors' figure, perplexity should be about
16.4 at 124M, 13.6 at 354M, 12.3 at 757M and 11.6 at 1.4B. The slots of the last two sizes are not public; these have
the published numbers of parameters to within a per cent.
"""

from jaxtok.lm.tokenformer import PUBLISHED
from jaxtok.training.recipes import gpt_neox
from jaxtok.transfer.growth import Growth

config = gpt_neox(
    PUBLISHED["124m"],
    corpus="arrayrecord:data/openwebtext",
    name="tokenformer_openwebtext_124m_1_4b",
    steps=600_000,
    batch_size=512,
    stages=tuple(Growth(to=PUBLISHED[size].tokens, steps=120_000) for size in ("354m", "757m", "1.4b")),
)
