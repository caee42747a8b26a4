"""ByT5-base (582M parameters): span corruption of mC4's bytes, 1,000,000 steps of 1,024 x 1,024.

    jaxtok train configs/lm/byt5_base.py --data.corpus arrayrecord:/path/to/records

Without --data.corpus, mC4 is taken from TensorFlow Datasets. The trained model is Hugging Face's google/byt5-base:
`jaxtok convert FOLDER RUN` reads it.
"""

from jaxtok.training.recipes import byt5

config = byt5("base")
