"""MrT5 around ByT5-xxl (12.9B parameters): 5,000 steps of 1,024 x 1,024 bytes of mC4, deleting half of them.

    jaxtok train configs/lm/mrt5_xxl.py --start byt5-xxl

`--start` takes ByT5's weights, from Hugging Face's folder of google/byt5-xxl or from a run of
byt5_xxl.py; without it, training starts from scratch. The paper trained small and large only.
"""

from jaxtok.training.recipes import mrt5

config = mrt5("xxl", fsdp=64)
