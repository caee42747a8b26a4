"""Llama-style decoders: Llama 2 and 3 (arXiv 2302.13971, 2407.21783), Mistral (2310.06825), Qwen2 (2407.10671), Gemma.

All are one pre-norm decoder with rotary positions, RMS norms, a gated MLP and grouped-query attention. The families
differ in biases, windows and the scaling of the rotary frequencies; Gemma also in the norm and the embedding.
"""

from __future__ import annotations

import dataclasses

from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.linear import LlamaStack
from jaxtok.nn.rotary import RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(LlamaStack, DecoderConfig):
    """Defaults: Llama-2 7B."""

    num_layers: int = 32
    d_model: int = 4096
    num_heads: int = 32
    mlp_dim: int = 11008
    vocab_size: int = 32000
    max_length: int = 4096
    tie_embeddings: bool = False


def _llama3(factor: float) -> RopeScaling:
    return RopeScaling(kind="llama3", factor=factor, original_length=8192)


_LLAMA3 = LlamaConfig(mlp_dim=14336, num_kv_heads=8, vocab_size=128256, max_length=8192, rotary_base=5e5)
_LLAMA32 = dataclasses.replace(_LLAMA3, max_length=131072, tie_embeddings=True, rotary_scaling=_llama3(32.0))
_QWEN25 = LlamaConfig(norm_eps=1e-6, rotary_base=1e6, max_length=32768, qkv_bias=True, vocab_size=151936)


def _sized(config: LlamaConfig, layers: int, width: int, heads: int, kv_heads: int, mlp: int, **more) -> LlamaConfig:
    return dataclasses.replace(
        config, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=kv_heads, mlp_dim=mlp, **more
    )


PUBLISHED = {
    "llama-2-7b": LlamaConfig(),
    "llama-2-13b": _sized(LlamaConfig(), 40, 5120, 40, 40, 13824),
    "llama-2-70b": _sized(LlamaConfig(), 80, 8192, 64, 8, 28672),
    "llama-3-8b": _LLAMA3,
    "llama-3-70b": _sized(_LLAMA3, 80, 8192, 64, 8, 28672),
    "llama-3.1-8b": dataclasses.replace(_LLAMA3, max_length=131072, rotary_scaling=_llama3(8.0)),
    "llama-3.2-1b": _sized(_LLAMA32, 16, 2048, 32, 8, 8192),
    "llama-3.2-3b": _sized(_LLAMA32, 28, 3072, 24, 8, 8192),
    "mistral-7b-v0.1": LlamaConfig(num_kv_heads=8, mlp_dim=14336, max_length=32768, window=4096),
    "qwen2.5-0.5b": _sized(_QWEN25, 24, 896, 14, 2, 4864, tie_embeddings=True),
    "qwen2.5-1.5b": _sized(_QWEN25, 28, 1536, 12, 2, 8960, tie_embeddings=True),
    "qwen2.5-7b": _sized(_QWEN25, 28, 3584, 28, 4, 18944, vocab_size=152064),
    "smollm2-135m": dataclasses.replace(
        _sized(LlamaConfig(), 30, 576, 9, 3, 1536),
        vocab_size=49152,
        max_length=8192,
        rotary_base=1e5,
        tie_embeddings=True,
    ),
    "gemma-2b": LlamaConfig(
        num_layers=18,
        d_model=2048,
        num_heads=8,
        num_kv_heads=1,
        head_size=256,
        mlp_dim=16384,
        vocab_size=256000,
        max_length=8192,
        norm="rms_plus_one",
        norm_eps=1e-6,
        activation="gelu_tanh",
        tie_embeddings=True,
        scale_embeddings=True,
    ),
}
"""The published sizes by name."""
