"""ELM's masked models (arXiv 2410.16257) on one code of 16 bits: 2M steps of 256 images of ImageNet.

    jaxtok train elm_masked_l --data.path CODES

CODES is a folder of codes that `jaxtok vision tokenize` has written, by a binary autoencoder of 16 bits. The recipe is
that of elm_b. No loss of these runs is published.

elm_masked_b  no weights of this size were released
elm_masked_l  378M parameters; the authors released weights of this size
elm_masked_xl  818M parameters; the authors released weights of this size
elm_masked_xxl  1,464M parameters; the authors released weights of this size
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.training.experiment import Experiment
from jaxtok.training.mesh import MeshConfig
from jaxtok.vision.elm_masked import PUBLISHED, MaskedElmModeling


def elm_masked(size: str, fsdp: int = 8) -> Experiment:
    like = load_config("elm_b")
    model = dataclasses.replace(PUBLISHED[f"elm-masked-{size}"], dtype="bfloat16", remat="projections", loss_chunk=32)
    data = dataclasses.replace(
        like.data, path="data/imagenet256_16_bits", sub_codes=model.sub_codes, code_bits=model.code_bits
    )
    return dataclasses.replace(
        like, name=f"elm_masked_{size}", task=MaskedElmModeling(model=model), data=data, mesh=MeshConfig(fsdp=fsdp)
    )


configs = {
    "elm_masked_b": lambda: elm_masked("b"),
    "elm_masked_l": lambda: elm_masked("l"),
    "elm_masked_xl": lambda: elm_masked("xl"),
    "elm_masked_xxl": lambda: elm_masked("xxl", fsdp=16),
}
