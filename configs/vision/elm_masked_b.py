"""ELM's masked model of size B on one code of 16 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_masked_b.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 16 bits (`jaxtok.data.codes.write_codes`). No weights of this size
were released.
"""

from jaxtok.training.recipes import elm_masked

config = elm_masked("b")
