"""BAE with 16 bits, drawn, on ImageNet at 256 x 256: a million steps of 256 images.

    jaxtok train configs/vision/bae_16_imagenet256.py --task.perceptual FILE

FILE holds the weights of LPIPS with VGG16, as published (or is a folder with torchvision's VGG16 and LPIPS' heads);
`--task.perceptual none` trains without. No number of this run is published but what ELM generates with it; expect
nearly all codes used.
"""

from jaxtok.training.recipes import image_tokenizer
from jaxtok.vision.binary_autoencoder import PUBLISHED

config = image_tokenizer(PUBLISHED["bae-16"], name="bae_16_imagenet256")
