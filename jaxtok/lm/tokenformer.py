"""TokenFormer (arXiv 2410.23168): a transformer whose parameters are tokens too.

Every projection is attention from the input's tokens to learned pairs of keys and values, the *parameter tokens*
(`jaxtok.nn.parameter_attention`). The feed-forward is one such projection. Width, depth and heads never change; the
model grows by appending parameter tokens (`jaxtok.transfer.growth`).

Where the authors' PyTorch and TPU code differ, this follows the PyTorch code; `tpu_variant` makes the other's choices.
"""

from __future__ import annotations

import dataclasses

from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.parameter_attention import ParameterAttentionStack, TokenCounts, uniform_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFormerConfig(ParameterAttentionStack, DecoderConfig):
    """A TokenFormer language model. Defaults: the 124M model of the growth study, as the PyTorch code would have it."""

    final_norm: str = "layernorm"


def tpu_variant(config: TokenFormerConfig) -> TokenFormerConfig:
    """The config with the choices of the authors' TPU code: tanh GELU, epsilon added to the norm, no positions.

    `norm_tokens` is `zoom_dim` there, which is four times as large in the feed-forward.
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
    # the growth study on OpenWebText (TPU code): 124M, grown to 354M, 757M and 1.4B. The parameter tokens of the last
    # two are not public; these numbers give the published parameter counts to within a per cent.
    "124m": _size(12, 768, 12, 576, 2304, 1024),
    "354m": _size(12, 768, 12, 2140, 8560, 1024),
    "757m": _size(12, 768, 12, 4850, 19400, 1024),
    "1.4b": _size(12, 768, 12, 8620, 34480, 1024),
}
"""The published sizes by name."""

__all__ = ["PUBLISHED", "TokenCounts", "TokenFormerConfig", "tpu_variant", "uniform_counts"]
