"""Every system that fills the CausalLM waist, in a tiny size. Registered here, it runs through the contract tests."""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.lexinvariant import Lexinvariant, LexinvariantConfig
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.lm.transformer import TransformerConfig
from jaxtok.lm.word_pooled import PlainConfig
from jaxtok.vision.elm import ElmText, ElmTextConfig

# untied: a tied model of random weights repeats its last token for ever
SIZES = {
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "rotary_fraction": 0.5,
    "vocab_size": 32,
    "max_length": 80,
    "tie_embeddings": False,
}

LLAMA = SIZES | {"rotary_fraction": 1.0, "num_heads": 4}
TIED = {"tie_embeddings": True, "mlp_dim": 24}

CAUSAL_LMS = {
    "tokenformer": lambda: Decoder(TokenFormerConfig(**SIZES, tokens=uniform_counts(attention=12, ffn=20, output=9))),
    "gpt2": lambda: Decoder(GPT2Config(**SIZES | {"rotary_fraction": 0.0}, mlp_dim=24)),
    "llama": lambda: Decoder(LlamaConfig(**LLAMA, num_kv_heads=2, mlp_dim=24)),
    "lexinvariant": lambda: Lexinvariant(LexinvariantConfig(**SIZES | TIED | {"rotary_fraction": 0.0})),
    "semi_lexinvariant": lambda: Lexinvariant(LlamaConfig(**LLAMA | TIED), random_symbols=0.5, block=12),
    "mistral": lambda: Decoder(LlamaConfig(**LLAMA, mlp_dim=24, window=16)),
    "word_pooled_plain": lambda: Decoder(PlainConfig(**SIZES | {"rotary_fraction": 0.0}, mlp_dim=64)),
    "elm": lambda: ElmText(
        ElmTextConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, grid=9, code_bits=4, num_classes=15)
    ),
    "transformer": lambda: Decoder(TransformerConfig(**SIZES, mlp_dim=24)),
}


def noisy_params(model) -> Any:
    """Parameters of a model, none of them zero."""

    @jax.jit
    def noisy_init():
        params = init_params(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        flat, unflatten = jax.flatten_util.ravel_pytree(params)
        return unflatten(flat + 0.4 * jax.random.normal(jax.random.key(1), flat.shape))

    return noisy_init()
