"""MrT5 around ByT5-xl (3.74B parameters): 5,000 steps of 1,024 x 1,024 bytes of mC4, deleting half of them.

    jaxtok train configs/lm/mrt5_xl.py --start byt5-xl

`--start` takes ByT5's weights, from Hugging Face's folder of google/byt5-xl or from a run of
byt5_xl.py; without it, training starts from scratch. The paper trained small and large only.
"""

from jaxtok.training.recipes import mrt5

config = mrt5("xl")
