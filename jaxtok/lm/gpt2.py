"""GPT-2: a pre-norm decoder with learned positions (Radford et al. 2019)."""

from __future__ import annotations

import dataclasses
import math

from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.linear import LinearStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(LinearStack, DecoderConfig):
    """Defaults: the 124M model. Biases everywhere but in the head, and GELU in its tanh form."""

    vocab_size: int = 50257
    max_length: int = 1024
    rotary_fraction: float = 0.0
    learned_positions: bool = True
    activation: str = "gelu_tanh"
    scale_by_layer: bool = False
    """Whether attention scores are also divided by the number of the layer, from 1 on."""

    @property
    def output_init_std(self) -> float:
        """init_std / sqrt(2 layers), for the projections that add to the residual stream."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    def scored(self, q, k, layer):
        q, k = super().scored(q, k, layer)
        return q / (layer + 1).astype(q.dtype) if self.scale_by_layer else q, k


def _size(num_layers: int, d_model: int, num_heads: int) -> GPT2Config:
    return GPT2Config(num_layers=num_layers, d_model=d_model, num_heads=num_heads, mlp_dim=4 * d_model)


PUBLISHED = {
    "gpt2": _size(12, 768, 12),
    "gpt2-medium": _size(24, 1024, 16),
    "gpt2-large": _size(36, 1280, 20),
    "gpt2-xl": _size(48, 1600, 25),
}
"""The published sizes by name."""
