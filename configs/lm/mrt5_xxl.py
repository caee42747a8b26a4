"""MrT5 around ByT5-xxl (12.9B parameters): 5,000 steps of 1,024 x 1,024 bytes of mC4, deleting half of them.

    python -c "from jaxtok.training import recipes; recipes.start_from_byt5('configs/lm/mrt5_xxl.py', 'byt5-xxl')"
    jaxtok train configs/lm/mrt5_xxl.py

The first line takes ByT5's weights, from Hugging Face's folder of google/byt5-xxl or from a run of byt5_xxl.py;
without it, training starts from scratch. The paper trained small and large only.
"""

from jaxtok.training.recipes import mrt5

config = mrt5("xxl", fsdp=64)
