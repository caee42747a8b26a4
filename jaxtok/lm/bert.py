"""BERT-style encoders: BERT (arXiv 1810.04805), RoBERTa (1907.11692) and XLM-R (1911.02116).

Each is a post-norm stack without a causal mask over sums of word, position and type embeddings. The heads of the
published models are here too: masked words, the next sentence (BERT), and a class of the whole text (RoBERTa, XLM-R).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.nn.activations import gelu
from jaxtok.nn.linear import ACTIVATIONS, Linear, LinearStack
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(LinearStack):
    """Defaults: BERT-base, uncased."""

    vocab_size: int = 30522
    max_positions: int = 512
    """Rows of the position table. With `positions_from_ids`, the first pad_id + 1 of them stand for no real token."""
    type_vocab_size: int = 2
    pad_id: int = 0
    positions_from_ids: bool = False
    """Whether real tokens have the positions pad_id + 1, pad_id + 2, ... and padding has pad_id (RoBERTa); otherwise
    all tokens have 0, 1, ... (BERT)."""
    post_norm: bool = True
    causal: bool = False
    mask_keys: bool = True
    rotary_fraction: float = 0.0
    norm_eps: float = 1e-12
    embedding_size: int = 0
    """Width of the embeddings, which a projection takes to d_model if it differs; 0: d_model."""
    mask_head: bool = True
    """Whether there is a head for masked words."""
    tie_embeddings: bool = True
    """Whether the matrix of that head is the embedding."""
    pooler: bool = True
    next_sentence: bool = True
    num_classes: int = 0
    """Classes of a classifier on the first token (dense, tanh, dense); 0: no classifier."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("embedding_size", "num_classes", "vocab_size"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.max_length < 1:
            raise ValueError(f"max_positions is {self.max_positions}, which leaves no position for a token; raise it.")

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.d_model

    def module(self) -> Bert:
        return Bert(self)

    def flops(self, length: int) -> float:
        """Forward FLOPs of one token in a row of `length`, without heads."""
        project = 2 * self.embedding_width * self.d_model if self.embedding_width != self.d_model else 0
        return self.stack_flops(length) + project

    def mask_head_flops(self) -> float:
        """Forward FLOPs of the logits of one masked word."""
        return 2 * self.embedding_width * (self.d_model + self.vocab_size)

    @property
    def output_init_std(self) -> float:
        return self.init_std

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        return self.max_positions - (self.pad_id + 1 if self.positions_from_ids else 0)


class Bert(nn.Module):
    """Tokens to hidden states. The methods `masked_words`, `pooled`, `next_sentence` and `classes` are its heads."""

    config: BertConfig

    def setup(self):
        cfg = self.config
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0; it must be the number of rows of the embedding.")

        def table(name, rows, axis):
            init = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), (axis, "d_model"))
            value = self.param(name, init, (rows, cfg.embedding_width), cfg.param_dtype)
            return gather(value.astype(cfg.dtype), axis, "d_model")

        def norm():
            return Norm("layernorm", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype)

        linear = self.linear

        self.embedding = table("embedding", cfg.vocab_size, "vocab")
        self.position_embedding = table("position_embedding", cfg.max_positions, None)
        self.type_embedding = table("type_embedding", cfg.type_vocab_size, None)
        self.embedding_norm = norm()
        self.embedding_dropout = nn.Dropout(cfg.dropout)
        if cfg.embedding_width != cfg.d_model:
            glorot = nn.initializers.glorot_uniform()
            self.embedding_project = linear(cfg.d_model, ("d_model", "channels"), glorot)
        self.stack = Stack(cfg)
        if cfg.mask_head:
            self.head_dense, self.head_norm = linear(cfg.embedding_width, ("d_model", "channels")), norm()
            self.head_matrix = self.embedding if cfg.tie_embeddings else table("head_matrix", cfg.vocab_size, "vocab")
            bias = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param("head_bias", bias, (cfg.vocab_size,), cfg.param_dtype)
        if cfg.pooler:
            self.pooler = linear(cfg.d_model, ("d_model", "channels"))
        if cfg.next_sentence:
            self.next_sentence_head = linear(2, ("d_model", "classes"))
        if cfg.num_classes:
            self.classifier_dense = linear(cfg.d_model, ("d_model", "channels"))
            self.classifier = linear(cfg.num_classes, ("d_model", "classes"))

    def linear(self, features, axes, init=None) -> Linear:
        cfg = self.config
        init = init or nn.initializers.normal(cfg.init_std)
        return Linear(features, axes, kernel_init=init, dtype=cfg.dtype, param_dtype=cfg.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | Int[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
        positions: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length d_model"]:
        """Hidden states after the last block.

        Args:
          tokens: ids.
          mask: true for real tokens; the states of the others are meaningless. Default: all but pad_id.
          types: ids of the token types (BERT's first and second sentence); default: 0.
          positions: rows of the position table; default: as the config says.

        Raises:
          ValueError: more tokens than the model has positions for.
        """
        cfg = self.config
        if tokens.shape[1] > cfg.max_length:
            raise ValueError(
                f"there are {tokens.shape[1]} tokens in a row, but the model's max_length is {cfg.max_length}."
            )
        mask = (tokens != cfg.pad_id) if mask is None else mask.astype(bool)
        x = jnp.take(self.embedding, tokens, axis=0)
        if positions is None and cfg.positions_from_ids:  # by the ids, whatever the mask says
            real = tokens != cfg.pad_id
            positions = cfg.pad_id + jnp.cumsum(real, axis=1) * real
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = x + jnp.take(self.position_embedding, positions, axis=0)
        x = x + jnp.take(self.type_embedding, jnp.zeros_like(tokens) if types is None else types, axis=0)
        x = self.embedding_dropout(constrain(self.embedding_norm(x), "d_model"), deterministic)
        if cfg.embedding_width != cfg.d_model:
            x = constrain(self.embedding_project(x), "d_model")
        x, _ = self.stack(x, positions, mask.astype(jnp.int32), deterministic=deterministic)
        return x

    def head_activation(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The activation of the head for masked words."""
        return (gelu if self.config.positions_from_ids else ACTIVATIONS[self.config.activation])(x)

    def masked_words(
        self, hidden: Float[Array, "batch length d_model"], places: Int[Array, "batch slots"] | None = None
    ) -> Float[Array, "batch slots vocab"] | Float[Array, "batch length vocab"]:
        """Logits of the word at each place of a row, or only at the given `places`; float32."""
        if places is not None:
            hidden = constrain(jnp.take_along_axis(hidden, places[..., None], 1), "batch", None, "d_model")
        y = self.head_norm(self.head_activation(self.head_dense(hidden)))
        logits = jnp.einsum("bld,vd->blv", y, self.head_matrix, preferred_element_type=jnp.float32)
        return constrain(logits + self.head_bias, "batch", "length" if places is None else None, "vocab")

    def pooled(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch d_model"]:
        """tanh of a projection of the first token's state."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def next_sentence(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch 2"]:
        """Logits that the second sentence follows the first (0), and that it is from elsewhere (1); float32."""
        return self.next_sentence_head(self.pooled(hidden)).astype(jnp.float32)

    def classes(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch classes"]:
        """Logits of the text's class; float32."""
        return self.classifier(jnp.tanh(self.classifier_dense(hidden[:, 0]))).astype(jnp.float32)

    def everything(self, tokens, mask=None, types=None):
        """The outputs of all heads that the config asks for; `init` calls this to make all parameters."""
        cfg, hidden = self.config, self(tokens, mask, types)
        heads = {"hidden": hidden}
        if cfg.mask_head:
            heads["masked_words"] = self.masked_words(hidden)
        if cfg.pooler:
            heads["pooled"] = self.pooled(hidden)
        if cfg.next_sentence:
            heads["next_sentence"] = self.next_sentence(hidden)
        if cfg.num_classes:
            heads["classes"] = self.classes(hidden)
        return heads


def init_params(config: BertConfig, rng: jax.Array, length: int = 4):
    """All parameters, those of the heads too, as plain arrays."""
    variables = config.module().init(rng, jnp.ones((1, length), jnp.int32), method="everything")
    return nn.meta.unbox(variables["params"])


_LARGE = {"num_layers": 24, "d_model": 1024, "num_heads": 16, "mlp_dim": 4096}
_ROBERTA = BertConfig(
    vocab_size=50265,
    max_positions=514,
    type_vocab_size=1,
    pad_id=1,
    positions_from_ids=True,
    norm_eps=1e-5,
    pooler=False,
    next_sentence=False,
)
_XLMR = dataclasses.replace(_ROBERTA, vocab_size=250002)

PUBLISHED = {
    "bert-base-uncased": BertConfig(),
    "bert-base-cased": BertConfig(vocab_size=28996),
    "bert-base-multilingual-cased": BertConfig(vocab_size=119547),
    "bert-large-uncased": BertConfig(**_LARGE),
    "roberta-base": _ROBERTA,
    "roberta-large": dataclasses.replace(_ROBERTA, **_LARGE),
    "xlm-roberta-base": _XLMR,
    "xlm-roberta-large": dataclasses.replace(_XLMR, **_LARGE),
}
"""The published sizes by name."""
