"""ELM's masked model of size XL (818M parameters) on one code of 16 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_masked_xl.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 16 bits (`jaxtok.data.codes.write_codes`). The authors released
weights of this size.
"""

from jaxtok.training.recipes import elm_masked

config = elm_masked("xl")
