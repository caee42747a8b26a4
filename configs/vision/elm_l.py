"""ELM-L (316M parameters) on 2 sub-codes of 10 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_l.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 20 bits (`jaxtok.data.codes.write_codes`). Expect FID 15.95 on
ImageNet 256 without guidance (pytorch_fid, 50,000 samples). For T sub-codes of K bits, give --task.model.sub-codes T
--task.model.code-bits K --data.sub-codes T --data.code-bits K, and codes of T x K bits.
"""

from jaxtok.training.recipes import elm

config = elm("l", "2-10")
