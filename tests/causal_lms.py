"""Every system that fills the CausalLM waist, in a tiny size. Registered here, it runs through the contract tests."""

from jaxtok.lm.decoder import Decoder
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.lm.transformer import TransformerConfig

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

CAUSAL_LMS = {
    "tokenformer": lambda: Decoder(TokenFormerConfig(**SIZES, tokens=uniform_counts(attention=12, ffn=20, output=9))),
    "transformer": lambda: Decoder(TransformerConfig(**SIZES, mlp_dim=24)),
}
