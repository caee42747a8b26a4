"""VQGAN (arXiv 2012.09841): an image as a grid of indices into a learned codebook, as in ELM's code.

The index is that of the nearest vector, or of a Gumbel softmax. `jaxtok.vision.autoencoding.Autoencoding` trains it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxtok.nn.quantizers import GumbelQuantizer, NearestQuantizer, gumbel_temperature
from jaxtok.vision.autoencoding import TokenizerConfig

QUANTIZERS = ("nearest", "gumbel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQGANConfig(TokenizerConfig):
    """Defaults: ELM's. One code a position, of `codebook_size` values."""

    codebook_size: int = 1024
    quantizer_kind: Literal["nearest", "gumbel"] = "nearest"
    beta: float = 0.25
    """The weight of the codebook's term of the nearest quantiser (the commitment has 1)."""
    hard: bool = False
    """Whether the Gumbel quantiser chooses a single vector in training too; outside of training it always does."""
    kl_weight: float = 5e-4
    """The weight of the Gumbel quantiser's divergence from uniform."""
    norm_first: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_size < 1:
            raise ValueError(f"codebook_size is {self.codebook_size}; it must be at least 1.")
        if self.quantizer_kind not in QUANTIZERS:
            raise ValueError(f"quantizer_kind is {self.quantizer_kind!r}; it must be one of {', '.join(QUANTIZERS)}.")
        for field in ("beta", "kl_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")

    @property
    def code_values(self) -> tuple[int, ...]:
        return (self.codebook_size,)

    def quantizer(self, name: str | None = None) -> nn.Module:
        if self.quantizer_kind == "nearest":
            return NearestQuantizer(self.codebook_size, self.embed_dim, self.beta, self.param_dtype, name=name)
        return GumbelQuantizer(
            self.codebook_size, self.embed_dim, self.hard, self.kl_weight, self.param_dtype, name=name
        )

    def options(self, step: Any) -> dict[str, Any]:
        return {"temperature": gumbel_temperature(step)}

    def draw(self, rng: jax.Array, batch: int) -> Float[Array, "batch rows columns codes"] | None:
        """Gumbel noise. (The authors draw it at test time too; without a key, ours leaves it out.)"""
        return jax.random.gumbel(rng, (batch, *self.grid, self.codebook_size)) if self._is_gumbel else None

    @property
    def _is_gumbel(self) -> bool:
        return self.quantizer_kind == "gumbel"


PUBLISHED = {"vqgan-1024": VQGANConfig()}
"""ELM's, for images of 256 x 256."""
