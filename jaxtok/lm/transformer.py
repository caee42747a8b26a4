"""The Transformer that TokenFormer is compared with: the same decoder with linear projections."""

from __future__ import annotations

import dataclasses

from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.tokenformer import TokenFormerConfig
from jaxtok.nn.linear import LinearStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(LinearStack, DecoderConfig):
    """A GPT-NeoX-style language model; defaults: its 125M size."""


def matched_transformer(config: TokenFormerConfig) -> TransformerConfig:
    """The Transformer of the same depth, width and number of projection parameters; like TokenFormer, without biases.

    Raises:
      ValueError: there are too few parameter tokens for the four d x d projections of attention.
    """
    mlp_dim = config.tokens.total() - 2 * config.d_model
    if mlp_dim < 1:
        raise ValueError(
            f"a block has {config.tokens.total()} parameter tokens; for a Transformer of the same size it "
            f"must have more than 2 d_model = {2 * config.d_model}."
        )
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(DecoderConfig)}
    return TransformerConfig(**shared | {"norm": "layernorm", "mlp_dim": mlp_dim, "use_bias": False})
