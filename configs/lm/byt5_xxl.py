"""ByT5-xxl (12.9B parameters): span corruption of mC4's bytes, 1,000,000 steps of 1,024 x 1,024.

    jaxtok train configs/lm/byt5_xxl.py --data.corpus arrayrecord:/path/to/records

Without --data.corpus, mC4 is taken from TensorFlow Datasets. The trained model is Hugging Face's google/byt5-xxl:
`jaxtok convert FOLDER RUN` reads it.
"""

from jaxtok.training.recipes import byt5

config = byt5("xxl", fsdp=64)
