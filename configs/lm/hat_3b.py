"""The paper's HAT of 3B: 72,000 steps of 1,024 rows of 2,816 words (about 1.2T bytes).

    jaxtok train configs/lm/hat_3b.py --data.corpus arrayrecord:/path/to/records

The paper trains on DCLM-Baseline, in documents of 16,384 bytes at most, and reports a word accuracy of 37.8 %.
"""

from jaxtok.training.recipes import hat

config = hat("3b", corpus="arrayrecord:data/dclm-baseline", fsdp=64)
