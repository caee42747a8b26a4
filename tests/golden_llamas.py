"""The Llamas of Hugging Face whose numbers are in fixtures."""

from __future__ import annotations

from typing import Any

from jaxtok.lm.llama import LlamaConfig


def llama_config(golden: Any) -> LlamaConfig:
    """The config of a fixture's model, which is in its own config under `model`, in Hugging Face's names."""
    size = golden.config["model"]
    return LlamaConfig(
        num_layers=size["num_hidden_layers"],
        d_model=size["hidden_size"],
        num_heads=size["num_attention_heads"],
        num_kv_heads=size["num_key_value_heads"],
        mlp_dim=size["intermediate_size"],
        vocab_size=size["vocab_size"],
        max_length=size["max_position_embeddings"],
        norm_eps=size["rms_norm_eps"],
        rotary_base=size.get("rope_theta", LlamaConfig.rotary_base),
        tie_embeddings=size.get("tie_word_embeddings", "lm_head.weight" not in golden.under("params")),
    )
