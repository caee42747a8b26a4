"""BAE, the binary autoencoder of ELM (arXiv 2410.16257): an image as a grid of independent bits (arXiv 2304.04820).

Each position has k bits, all of which are trained at every step. No codebook is stored or searched, and the bits can be
cut into sub-codes, each with a small vocabulary. `jaxtok.vision.autoencoding.Autoencoding` trains it.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxtok.nn.bits import check_bits
from jaxtok.nn.quantizers import BinaryQuantizer
from jaxtok.vision.autoencoding import TokenizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BAEConfig(TokenizerConfig):
    """Defaults: ELM's with 16 bits."""

    bits: int = 16
    """The number of bits at each position."""
    sub_codes: int = 1
    """The number of sub-codes into which the bits are cut, in order; the first bit of each is the most significant."""
    deterministic: bool = False
    """Whether a bit is 1 if its probability is above 1/2, instead of being drawn, in training and in use."""
    tanh: bool = False
    """Whether activations are tanh, and a bit stands for -1 or 1 in the generator."""
    corrected_code_loss: bool = False
    """Whether the loss is p (1 - p), instead of the authors', which has a sigmoid too many."""
    code_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_bits(self.bits, self.sub_codes)

    @property
    def code_values(self) -> tuple[int, ...]:
        return (2 ** (self.bits // self.sub_codes),) * self.sub_codes

    def quantizer(self, name: str | None = None) -> nn.Module:
        return BinaryQuantizer(
            self.bits,
            self.embed_dim,
            self.sub_codes,
            tanh=self.tanh,
            corrected=self.corrected_code_loss,
            param_dtype=self.param_dtype,
            name=name,
        )

    def draw(self, rng: jax.Array, batch: int) -> Float[Array, "batch rows columns bits"] | None:
        """Uniform numbers; a bit is 1 if its number is below its probability."""
        return None if self.deterministic else jax.random.uniform(rng, (batch, *self.grid, self.bits))

    @property
    def draws_codes(self) -> bool:
        return not self.deterministic


PUBLISHED = {
    "bae-16": BAEConfig(),
    "bae-16-deterministic": BAEConfig(deterministic=True),
    "bae-20": BAEConfig(bits=20, sub_codes=2),
    "bae-24": BAEConfig(bits=24, sub_codes=2),
}
"""The released tokenizers for images of 256 x 256, with the sub-codes of ELM's models 1-16, 2-10 and 2-12."""
