"""ELM-XXXL (3864M parameters) on 2 sub-codes of 12 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_xxxl.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 24 bits (`jaxtok.data.codes.write_codes`). The authors list this
size; no number of it is known. For another decomposition (2-10): --task.model.sub-codes 2 --task.model.code-bits 10 and
--data.sub-codes 2 --data.code-bits 10.
"""

from jaxtok.training.recipes import elm

config = elm("xxxl", "2-12", fsdp=32)
