"""ELM-XXL (1391M parameters) on 2 sub-codes of 12 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_xxl.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 24 bits (`jaxtok.data.codes.write_codes`). Expect about 6.40
nats a sub-code (read off the authors' plot), and FID 10.11 without guidance (pytorch_fid). For T sub-codes of K bits,
give --task.model.sub-codes T --task.model.code-bits K --data.sub-codes T --data.code-bits K, and codes of T x K bits.
"""

from jaxtok.training.recipes import elm

config = elm("xxl", "2-12", fsdp=16)
