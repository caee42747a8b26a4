"""VQGAN (arXiv 2012.09841) on ImageNet at 256 x 256, by the recipe of ELM's tokenizers: a million steps of 256 images.

    jaxtok train vqgan_1024_imagenet256 --task.perceptual FILE

FILE holds the weights of LPIPS, as for bae_16_imagenet256.

vqgan_1024_imagenet256  1,024 codes; no number of this run is published
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.training.experiment import Experiment
from jaxtok.vision.vqgan import PUBLISHED


def vqgan() -> Experiment:
    like = load_config("bae_16_imagenet256")
    model = dataclasses.replace(PUBLISHED["vqgan-1024"], dtype="bfloat16", remat_levels=True)
    return dataclasses.replace(like, name="vqgan_1024_imagenet256", task=dataclasses.replace(like.task, model=model))


configs = {"vqgan_1024_imagenet256": vqgan}
