"""ELM-XXL (1391M parameters) on 2 sub-codes of 12 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_xxl.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 24 bits (`jaxtok.data.codes.write_codes`). Expect, as the authors
report, 6.40 nats a sub-code behind 2M steps, and FID 10.11 without guidance (pytorch_fid). For another decomposition
(2-10): --task.model.sub-codes 2 --task.model.code-bits 10 and --data.sub-codes 2 --data.code-bits 10.
"""

from jaxtok.training.recipes import elm

config = elm("xxl", "2-12", fsdp=16)
