"""ELM-XL (741M parameters) on 2 sub-codes of 10 bits: 2M steps of 256 images of ImageNet.

    jaxtok train configs/vision/elm_xl.py --data.path CODES

CODES is a folder of codes of a binary autoencoder of 20 bits (`jaxtok.data.codes.write_codes`). Expect FID 12.70 on
ImageNet 256 without guidance (pytorch_fid, 50,000 samples). For another decomposition (2-12): --task.model.sub-codes 2
--task.model.code-bits 12 and --data.sub-codes 2 --data.code-bits 12.
"""

from jaxtok.training.recipes import elm

config = elm("xl", "2-10")
