"""ELM-B (90M parameters) on 2 sub-codes of 10 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_b.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 20 bits (`jaxtok.data.codes.write_codes`). The authors compare it
with larger ones in its loss only; no number is known. For another decomposition (2-12): --task.model.sub-codes 2
--task.model.code-bits 12 and --data.sub-codes 2 --data.code-bits 12.
"""

from jaxtok.training.recipes import elm

config = elm("b", "2-10")
