"""MrT5 around ByT5-base (582M parameters): 5,000 steps of 1,024 x 1,024 bytes of mC4, deleting half of them.

    python -c "from jaxtok.training import recipes; recipes.start_from_byt5('configs/lm/mrt5_base.py', 'byt5-base')"
    jaxtok train configs/lm/mrt5_base.py

The first line takes ByT5's weights, from Hugging Face's folder of google/byt5-base or from a run of
byt5_base.py; without it, training starts from scratch. The paper trained small and large only.
"""

from jaxtok.training.recipes import mrt5

config = mrt5("base")
