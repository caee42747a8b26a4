"""ELM-XXXL (3864M parameters) on 2 sub-codes of 12 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_xxxl.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 24 bits (`jaxtok.data.codes.write_codes`). No number of this
size is known. For T sub-codes of K bits, give --task.model.sub-codes T --task.model.code-bits K --data.sub-codes T
--data.code-bits K, and codes of T x K bits.
"""

from jaxtok.training.recipes import elm

config = elm("xxxl", "2-12", fsdp=32)
