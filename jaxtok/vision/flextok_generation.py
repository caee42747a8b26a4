"""FlexTok's autoregressive model (arXiv 2502.13967, section 4): a class, then the image's tokens, the first ones first.

    x_0 = E_class[y] + P_0,  x_n = E[c_{n-1}] + P_n;  pre-norm blocks with RMS norms and SwiGLU, causal;  logits = O x

It is trained on all tokens of an image, and may stop after any number of them, which the tokenizer's decoder takes. No
code of it was released. Sizes are the paper's: a width of 64 times the depth, and 12 width^2 parameters a layer. (The
paper's largest model, of 3.06 B, takes texts by cross-attention, and is not here.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.data.codes import CodeData
from jaxtok.decoding.engine import Engine
from jaxtok.decoding.sampling import Sampling, sampling_key
from jaxtok.nn.cache import KVCache
from jaxtok.nn.flex_blocks import gated_width
from jaxtok.nn.linear import LlamaStack
from jaxtok.protocols import Data, OnProgress, Params
from jaxtok.vision.classes import check_classes
from jaxtok.vision.elm import CodeModeling, NextCodes
from jaxtok.vision.elm_sampling import Drawing, ElmSampling, GuidedCodes, begin, class_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokGPTConfig(LlamaStack):
    """Defaults: the model of 1.33 B parameters for ImageNet's classes."""

    num_layers: int = 30
    d_model: int = 1920
    num_heads: int = 30
    mlp_dim: int = 5120
    rotary_fraction: float = 0.0
    length: int = 256
    """The number of tokens of an image."""
    codebook: int = 64000
    """The number of values of a token."""
    num_classes: int = 1000
    """The number of classes; the id after the last one stands for no class."""
    dropout: float = 0.1
    """The dropout of what each part of a block adds."""
    token_dropout: float = 0.1
    """The dropout of the input embeddings."""
    class_dropout: float = 0.1
    """The probability with which a class is withheld in training, for the guidance."""
    loss_chunk: int = 0
    """The number of positions whose logits exist at a time in training, a divisor of the length; 0: all."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("length", "codebook", "num_classes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("token_dropout", "class_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1).")
        if self.loss_chunk < 0 or (self.loss_chunk and self.length % self.loss_chunk):
            raise ValueError(f"loss_chunk is {self.loss_chunk}; it must divide the length {self.length}, or be 0.")
        if self.rotary_fraction:
            raise ValueError(f"rotary_fraction is {self.rotary_fraction}; it must be 0, as positions are learned.")

    sub_codes: ClassVar[int] = 1

    @property
    def positions(self) -> int:
        return self.length

    @property
    def code_shape(self) -> tuple[int]:
        return (self.length,)

    @property
    def code_values(self) -> tuple[int]:
        return (self.codebook,)

    def module(self) -> FlexTokGPT:
        """The module of the model."""
        return FlexTokGPT(self)

    def flops(self) -> float:
        """Forward FLOPs of one image: blocks and head."""
        return self.length * (self.stack_flops(self.length) + 2 * self.codebook * self.d_model)


class FlexTokGPT(NextCodes):
    """Maps tokens and a class to the logits of each token, given those before it. Its methods are those of
    `jaxtok.vision.elm.Elm`."""

    config: FlexTokGPTConfig

    def setup(self):
        super().setup()
        cfg = self.config
        self.embedding = self.table("embedding", (cfg.codebook, cfg.d_model), ("vocab", "d_model"))
        self.position_embedding = self.table("position_embedding", (cfg.length, cfg.d_model), (None, "d_model"))
        self.head_matrix = self.table("head_matrix", (cfg.codebook, cfg.d_model), ("vocab", "d_model"), std=0.0)

    def __call__(
        self, codes: Int[Array, "batch positions 1"], labels: Int[Array, " batch"], deterministic: bool = True
    ) -> Float[Array, "batch positions 1 vocab"]:
        """Logits in float32."""
        return self.head(self.states(codes, labels, deterministic))

    @staticmethod
    def logits_of(hidden, matrix):
        logits = jnp.einsum("bld,vd->blv", hidden, matrix, preferred_element_type=jnp.float32)
        return constrain(logits, "vocab")[:, :, None]

    def states(self, codes, labels, deterministic: bool = True) -> Float[Array, "batch positions d_model"]:
        """Hidden states after the final norm, from which each token is predicted."""
        if codes.shape[1:] != (self.config.length, 1):
            raise ValueError(
                f"an image has {codes.shape[1]} x {codes.shape[2]} codes; for this model it must be "
                f"{self.config.length} x 1."
            )
        condition = self.embed_class(labels, deterministic)
        x = jnp.concatenate([condition, self.embed(codes)[:, :-1]], axis=1)
        return self.hidden(x, condition, deterministic=deterministic)[0]

    def embed(self, codes: Int[Array, "batch length 1"]) -> Float[Array, "batch length d_model"]:
        return constrain(jnp.take(self.embedding, codes[..., 0], axis=0), "d_model")

    def hidden(
        self,
        x: Float[Array, "batch length d_model"],
        condition: Float[Array, "batch 1 d_model"],
        *,
        first: int | Int[Array, ""] = 0,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """States after the final norm, and the cache with these inputs, from number `first` on, appended."""
        positions = first + jnp.arange(x.shape[1])[None]
        x = x + jnp.take(self.position_embedding, positions, axis=0, mode="clip")
        x = self.embedding_dropout(constrain(x, "d_model"), deterministic)
        x, cache = self.stack(x, positions, cache=cache, deterministic=deterministic)
        return self.final_norm(x), cache

    def head(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch length 1 vocab"]:
        """Logits in float32."""
        return self.logits_of(hidden, self.head_matrix)

    def init_cache(self, batch: int, length: int) -> KVCache:
        return self.config.init_cache(batch, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokSampling(ElmSampling):
    """How tokens are drawn."""

    top_k: int = 0
    """Only the k most likely values of a token; 0: all."""
    guidance: float = 1.5
    """The scale of the guidance towards the class; 1: none."""
    schedule: str = "constant"
    """How the guidance rises over all tokens of an image, wherever it stops."""
    tokens: int = 0
    """The number of tokens to draw; 0: all. Any number is drawn by the same compiled function."""

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 0:
            raise ValueError(f"tokens is {self.tokens}; it must be positive, or 0 for all.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokModeling(CodeModeling):
    """Trains the model on FlexTok's tokens, and draws any number of first tokens of an image from it."""

    model: FlexTokGPTConfig
    sampling: ClassVar[type] = FlexTokSampling

    def fit(self, data: Data, train: Any = None) -> FlexTokModeling:
        """The task itself. Raises ValueError if the data have other codes than the model, or more classes."""
        if isinstance(data, CodeData):
            for field, theirs in {"shape": data.code_shape, "values": data.code_values}.items():
                if theirs != (ours := getattr(self.model, f"code_{field}")):
                    raise ValueError(f"data.{field} is {theirs}, but the model has {ours}; make them equal.")
        check_classes(self.model.num_classes, data)
        return self

    def draw(
        self,
        params: Params,
        conditions: Sequence[int | None],
        rng: jax.Array,
        *,
        sampling: FlexTokSampling | None = None,
        on_progress: OnProgress | None = None,
    ) -> Int[Array, "batch tokens 1"]:
        """The first tokens of an image of each class (None: no class), as many as `sampling` says; the first ones are
        the same however many these are.

        Raises:
          ValueError: a class is out of range, or there are fewer tokens in an image.
        """
        config, sampling = self.model, sampling or FlexTokSampling()
        wanted = sampling.tokens or config.length
        if wanted > config.length:
            raise ValueError(f"tokens is {wanted}; an image has {config.length}.")
        labels, weights = class_ids(config, conditions), sampling.weights(config.length)
        plain = Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        nothing = np.zeros((len(labels), 0, 1), np.int32)
        engine = Engine(model=GuidedCodes(config, bool((weights != 1).any())), chooser=Drawing(plain))
        state = begin(engine, params, (labels, nothing, weights, sampling_key(rng, plain), None, None))
        part = wanted if on_progress is None else max(1, math.isqrt(wanted))
        for made in [*range(part, wanted, part), wanted]:
            state = engine.run(params, state, made)
            if on_progress is not None:
                jax.block_until_ready(state.length)
                on_progress(made / wanted)
        return state.text[:, 1 : 1 + wanted]


def _size(depth: int, width: int) -> FlexTokGPTConfig:
    sizes = {"num_layers": depth, "d_model": width, "num_heads": width // 64}
    return FlexTokGPTConfig(**sizes, mlp_dim=gated_width(width, 4.0))


PUBLISHED = {
    "flextok-gpt-49m": _size(10, 640),
    "flextok-gpt-85m": _size(12, 768),
    "flextok-gpt-201m": _size(16, 1024),
    "flextok-gpt-393m": _size(20, 1280),
    "flextok-gpt-679m": _size(24, 1536),
    "flextok-gpt-1.33b": _size(30, 1920),
}
"""The paper's class-conditional sizes, by the parameters of their blocks."""
