"""TokenFormer: a transformer whose parameters are tokens too (arXiv 2410.23168).

Every projection attends from the input's tokens to learned key-value *parameter tokens* (`nn.parameter_attention`),
also the feed-forward, which is a single one. Width, depth and heads never change; the model grows by appending
parameter tokens (`jaxtok.transfer.growth`).

Where the authors' PyTorch and TPU code differ, the PyTorch code is followed; `tpu_variant` has the other's choices.
"""

from __future__ import annotations

import dataclasses

from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.parameter_attention import ParameterAttentionStack, TokenCounts, uniform_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFormerConfig(ParameterAttentionStack, DecoderConfig):
    """A TokenFormer language model; defaults: the 124M model of the growth study, with PyTorch's conventions."""

    final_norm: str = "layernorm"

    def num_params(self) -> int:
        """V d + 2 d + 2 L d (3 n_qkv + n_output + n_ffn), for a tied model with its default norms."""
        return (
            self.vocab_size * self.d_model + 2 * self.d_model + self.num_layers * 2 * self.d_model * self.tokens.total()
        )


def tpu_variant(config: TokenFormerConfig) -> TokenFormerConfig:
    """The authors' TPU code's choices: tanh GELU, epsilon added to the norm, no position embedding.

    `norm_tokens` is that code's `zoom_dim` (with four times the number in the feed-forward).
    """
    eps = 1e-5 if config.normalization == "l2_norm_gelu" else 1e-8
    return dataclasses.replace(config, tanh_gelu=True, normalization_eps=eps, rotary_fraction=0.0)


def _size(num_layers, d_model, num_heads, attention, ffn, max_length) -> TokenFormerConfig:
    return TokenFormerConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        tokens=uniform_counts(attention, ffn),
        max_length=max_length,
        vocab_size=50304,  # GPT-NeoX-20B's 50,277 ids, rounded up to 128
    )


PUBLISHED = {
    # trained on the Pile; weights released
    "150m": _size(12, 768, 12, 768, 3072, 2048),
    "450m": _size(24, 1024, 16, 1024, 4096, 2048),
    "900m": _size(32, 1280, 16, 1280, 5120, 2048),
    "1.5b": _size(40, 1536, 16, 1536, 6144, 2048),
    # PyTorch growth runs on OpenWebText2: 354M, grown to 757M
    "owt-354m": _size(24, 1024, 16, 768, 3072, 1024),
    "owt-757m": _size(24, 1024, 16, 1792, 7168, 1024),
    # the incremental-scaling study on OpenWebText (TPU code): 124M, grown to 354M, 757M, 1.4B. The slots of the last
    # two are not public; these give the published parameter counts to within a per cent.
    "124m": _size(12, 768, 12, 576, 2304, 1024),
    "354m": _size(12, 768, 12, 2140, 8560, 1024),
    "757m": _size(12, 768, 12, 4850, 19400, 1024),
    "1.4b": _size(12, 768, 12, 8620, 34480, 1024),
}
"""The published sizes by name."""

__all__ = ["PUBLISHED", "TokenCounts", "TokenFormerConfig", "tpu_variant", "uniform_counts"]
