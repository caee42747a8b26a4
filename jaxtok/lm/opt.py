"""OPT: a pre-norm decoder with learned positions and ReLU (arXiv 2205.01068)."""

from __future__ import annotations

import dataclasses

from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.linear import LinearStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(LinearStack, DecoderConfig):
    """Defaults: the 125M model. Biases everywhere but in the head.

    The two rows before the table of positions, which Hugging Face's files have for padding, are not kept. The 350M
    model is of another kind (norms after the sums, a narrower embedding).
    """

    vocab_size: int = 50272
    max_length: int = 2048
    rotary_fraction: float = 0.0
    learned_positions: bool = True
    activation: str = "relu"
    norm_eps: float = 1e-5

    @property
    def output_init_std(self) -> float:
        return self.init_std


def _size(num_layers: int, d_model: int, num_heads: int) -> OPTConfig:
    return OPTConfig(num_layers=num_layers, d_model=d_model, num_heads=num_heads, mlp_dim=4 * d_model)


PUBLISHED = {
    "opt-125m": _size(12, 768, 12),
    "opt-1.3b": _size(24, 2048, 32),
    "opt-2.7b": _size(32, 2560, 32),
    "opt-6.7b": _size(32, 4096, 32),
    "opt-13b": _size(40, 5120, 40),
    "opt-30b": _size(48, 7168, 56),
    "opt-66b": _size(64, 9216, 72),
}
"""The published sizes by name."""
