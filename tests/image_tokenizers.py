"""Every image tokenizer in a tiny size. Registered here, it is tested against the waist."""

from __future__ import annotations

from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.vqgan import VQGANConfig

SIZES = {
    "image_size": 8,
    "width": 32,
    "multipliers": (1, 1),
    "res_blocks": 1,
    "attention_resolutions": (),
    "embed_dim": 32,
}


def alone(model) -> Autoencoding:
    """Without what only training needs."""
    return Autoencoding(model=model, discriminator=None, perceptual="none")


IMAGE_TOKENIZERS = {
    "vqgan": lambda: alone(VQGANConfig(**SIZES, codebook_size=20)),
    "vqgan_gumbel": lambda: alone(VQGANConfig(**SIZES, codebook_size=20, quantizer_kind="gumbel")),
    "bae": lambda: alone(BAEConfig(**SIZES, bits=6, sub_codes=2)),
    "bae_deterministic": lambda: alone(BAEConfig(**SIZES, bits=6, deterministic=True, tanh=True)),
}

DRAWN = ("bae",)
"""Those whose codes are drawn by their definition."""
TAKE_A_KEY = ("vqgan_gumbel",)
"""Those whose codes are drawn with a key, and not without."""
EXACT = tuple(IMAGE_TOKENIZERS)
"""Those of which decoding the codes is the reconstruction that training sees, bit by bit."""
