"""Every image tokenizer in a tiny size. Registered here, it is tested against the waist."""

from __future__ import annotations

import jax
import numpy as np

from jaxtok.training.mesh import unboxed
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


def random_params(task, seed=0):
    """Parameters of the task's shapes, without compiling its initialisation."""
    size, rng = task.image_size, np.random.default_rng(seed)
    batch = {"images": jax.ShapeDtypeStruct((1, size, size, 3), np.float32)}
    shapes = unboxed(jax.eval_shape(task.init, jax.random.key(0), batch))
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)


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
