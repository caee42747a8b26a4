"""VQGAN with 1,024 codes on ImageNet at 256 x 256: a million steps of 256 images.

    jaxtok train configs/vision/vqgan_1024_imagenet256.py --task.perceptual FILE

FILE holds the weights of LPIPS with VGG16, as published (or is a folder with torchvision's VGG16 and LPIPS' heads);
`--task.perceptual none` trains without. No number of this run is published.
"""

from jaxtok.training.recipes import image_tokenizer
from jaxtok.vision.vqgan import PUBLISHED

config = image_tokenizer(PUBLISHED["vqgan-1024"], name="vqgan_1024_imagenet256")
