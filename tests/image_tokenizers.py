"""What the tiny image tokenizers share. They stand in their systems' test files, as `IMAGE_TOKENIZERS`."""

from __future__ import annotations

import jax
import numpy as np

from jaxtok.training.mesh import unboxed
from jaxtok.vision.autoencoding import Autoencoding

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


DRAWN = ("bae",)
"""Those whose codes are drawn by their definition."""
TAKE_A_KEY = ("vqgan_gumbel",)
"""Those whose codes are drawn with a key, and not without."""
EXACT = ("vqgan", "vqgan_gumbel", "bae", "bae_deterministic")
"""Those of which decoding the codes is the reconstruction that training sees, bit by bit."""
