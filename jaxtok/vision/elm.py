"""ELM: images as language (Elucidating the Design Space of Language Models for Image Generation, ICML 2025).

A Llama on the codes of an image tokenizer, after a class. A position of the grid has t sub-codes of k bits, into which
a binary autoencoder's t k bits are cut ("2-10": two of ten bits), so that a large vocabulary needs no large table. This
file is the autoregressive model and its Task; `elm_sampling.py` draws images from it, and `elm_masked.py` is the masked
model.

    cond = E_class[y],  tok = W concat_i E_i[c_i]  (one sub-code: E[c]),  h0 = [cond ; tok_0 .. tok_{N-2}]
    jaxtok's blocks, causal, with rotation by row and column;  logits_i = O_i norm(h), those of token n from state n

All sub-codes of a position are predicted in parallel from the same state. Where paper and code differ, the authors'
code is followed: the class token's row of the rotation is zero, so it looks at everything evenly.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.data.codes import CodeData
from jaxtok.nn.cache import KVCache, check_row
from jaxtok.nn.linear import Linear, LlamaStack
from jaxtok.nn.losses import by_parts, cross_entropy, mean
from jaxtok.nn.norms import unit_length
from jaxtok.nn.rotary import apply_rotary_table, rotary_table_2d
from jaxtok.nn.transformer import Block, Call, ModulatedBlock, Stack, layer_range
from jaxtok.protocols import Batch, Data, OnProgress, Params, Sums, Task
from jaxtok.vision.classes import check_classes

if TYPE_CHECKING:
    from jaxtok.vision.elm_sampling import ElmSampling


def mlp_width(d_model: int, multiple_of: int = 256) -> int:
    """The width of Llama's MLP: two thirds of 4 d, rounded up to a multiple."""
    return -(-int(2 * 4 * d_model / 3) // multiple_of) * multiple_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElmConfig(LlamaStack):
    """The autoregressive model; defaults: ELM-L on 2 sub-codes of 10 bits, for images of 256 pixels, as trained."""

    num_layers: int = 24
    d_model: int = 1024
    num_heads: int = 16
    mlp_dim: int = 2816
    grid: int = 16
    """The number of positions in a row and in a column; an image has grid x grid."""
    sub_codes: int = 2
    """The number of sub-codes at each position (t)."""
    code_bits: int = 10
    """The bits of a sub-code (k), which has 2^k values."""
    num_classes: int = 1000
    """The number of classes; the id after the last one stands for no class."""
    modulation: bool = False
    """Whether the class shifts and scales the outputs of a block's norms and gates what its parts add (DiT's adaLN)."""
    cosine_scores: bool = False
    """Whether queries and keys have length 1 after the rotation; without `scale_scores`, scores are their cosines."""
    dropout: float = 0.1
    """The dropout of what each part of a block adds."""
    drop_path: float = 0.0
    """The probability with which a row skips a part of the last layer; it rises linearly from 0 in the first layer
    (stochastic depth, arXiv 1603.09382). If it is positive, it replaces `dropout` in the blocks."""
    token_dropout: float = 0.1
    """The dropout of the input embeddings."""
    class_dropout: float = 0.1
    """The probability with which a class is withheld in training, for the guidance."""
    loss_chunk: int = 0
    """The number of positions whose logits exist at a time in training, a divisor of grid x grid; 0: all."""

    RETIRED: ClassVar[dict[str, Any]] = {"rotary_table": True}

    def __post_init__(self):
        super().__post_init__()
        for field in ("grid", "sub_codes", "num_classes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if not 1 <= self.code_bits <= 24:
            raise ValueError(
                f"code_bits is {self.code_bits}; it must be in 1..24, as a table has 2^code_bits rows: cut the bits "
                "into more sub-codes."
            )
        for field in ("token_dropout", "class_dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1).")
        if self.head_dim % 4:
            raise ValueError(
                f"d_model is {self.d_model} and num_heads is {self.num_heads}, which gives heads of {self.head_dim} "
                "channels; for the rotation by row and column it must be a multiple of 4."
            )
        if self.modulation and self.post_norm:
            raise ValueError("modulation is True and post_norm is True; one of them must be False.")
        if self.loss_chunk < 0 or (self.loss_chunk and self.positions % self.loss_chunk):
            raise ValueError(
                f"loss_chunk is {self.loss_chunk}; it must divide grid x grid = {self.positions}, or be 0."
            )

    @property
    def positions(self) -> int:
        """The number of positions of an image (N)."""
        return self.grid**2

    @property
    def codebook(self) -> int:
        """The number of values of a sub-code (V)."""
        return 2**self.code_bits

    @property
    def code_shape(self) -> tuple[int, int]:
        """The rows and columns of the positions."""
        return (self.grid, self.grid)

    @property
    def code_values(self) -> tuple[int, ...]:
        """How many values each sub-code has."""
        return (self.codebook,) * self.sub_codes

    def module(self) -> Elm:
        """The module of the model."""
        return Elm(self)

    def cells(self) -> Int[np.ndarray, "positions 2"]:
        """The row and column of each position."""
        return np.stack(np.divmod(np.arange(self.positions), self.grid), -1)

    def rotation(self) -> Float[np.ndarray, "places pairs 2"]:
        """(cos, sin) for the class token (zeros) and each position."""
        return rotary_table_2d(self.grid, self.grid, self.head_dim, self.rotary_base, leading=1)

    def rotate(self, q, k, positions):
        table = jnp.take(jnp.asarray(self.rotation()), positions, axis=0, mode="clip")
        return apply_rotary_table(q, table), apply_rotary_table(k, table)

    def scored(self, q, k, layer):
        if self.cosine_scores:
            q, k = unit_length(q), unit_length(k)
        return super().scored(q, k, layer)

    def block(self) -> type[Block]:
        return ElmBlock

    def flops(self) -> float:
        """Forward FLOPs of one image: projection of the sub-codes, blocks, modulations and heads."""
        n, t, d = self.positions, self.sub_codes, self.d_model
        once = 2 * d * d * (6 * self.num_layers + 2) if self.modulation else 0
        return n * (self.stack_flops(n) + (2 * t * d * d if t > 1 else 0) + 2 * t * self.codebook * d) + once


class ElmBlock(ModulatedBlock):
    """A block with modulation by the class's embedding, which is the condition, and with stochastic depth."""

    def modulated(self) -> bool:
        return self.config.modulation

    def dropped(self, y, layer, call: Call):
        cfg = self.config
        if not cfg.drop_path:
            return super().dropped(y, layer, call)
        y = constrain(y, "d_model")
        if call.deterministic:
            return y
        kept = 1 - cfg.drop_path * layer / max(cfg.num_layers - 1, 1)
        rows = jax.random.bernoulli(self.make_rng("dropout"), kept, (y.shape[0], 1, 1))
        return jnp.where(rows, y / kept, 0).astype(y.dtype)


class ElmBase(nn.Module):
    """The parts that the autoregressive and the masked model share: the class, the blocks, the final norm."""

    config: ElmConfig

    def setup(self):
        cfg = self.config
        self.class_embedding = self.table("class_embedding", (cfg.num_classes + 1, cfg.d_model), (None, "d_model"))
        self.stack = Stack(cfg)
        self.final_norm = cfg.norm_module()
        self.embedding_dropout = nn.Dropout(cfg.token_dropout)

    def table(self, name, shape, axes, std=None):
        init = nn.initializers.normal(self.config.init_std if std is None else std)
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.config.param_dtype)
        return gather(value.astype(self.config.dtype), *axes)

    def linear(self, features, axes, std, bias) -> Linear:
        return self.config.linear(features, axes, std, bias, None)

    def embed_class(self, labels: Int[Array, " batch"], deterministic: bool = True) -> Float[Array, "batch 1 d_model"]:
        """The embeddings of the classes. In training, some labels become that of no class."""
        cfg = self.config
        if cfg.class_dropout and not deterministic:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), cfg.class_dropout, labels.shape)
            labels = jnp.where(dropped, cfg.num_classes, labels)
        return constrain(jnp.take(self.class_embedding, labels, axis=0)[:, None], None, "d_model")


class NextCodes(ElmBase):
    """A model that predicts each position's codes from those before it: by its `states`, and `logits_of` these and the
    matrix of its head."""

    def nats(
        self, codes: Int[Array, "batch positions sub_codes"], labels: Int[Array, " batch"], deterministic: bool = True
    ) -> Float[Array, "batch positions sub_codes"]:
        """-log p of each sub-code, with the logits of `loss_chunk` positions at a time."""
        matrix = self.head_matrix  # outside of the scan over parts

        def part(hidden, codes):
            return cross_entropy(self.logits_of(hidden, matrix), codes)

        return by_parts(part, self.config.loss_chunk, self.states(codes, labels, deterministic), codes)


class Elm(NextCodes):
    """Maps codes and a class to the logits of each position's codes, given the positions before it."""

    def setup(self):
        super().setup()
        cfg = self.config
        tables = (cfg.sub_codes, cfg.codebook, cfg.d_model)
        self.embedding = self.table("embedding", tables, (None, "vocab", "d_model"))
        self.head_matrix = self.table("head_matrix", tables, (None, "vocab", "d_model"), std=0.0)
        if cfg.sub_codes > 1:
            self.projection = self.linear(cfg.d_model, ("channels", "d_model"), cfg.init_std, False)
        if cfg.modulation:
            self.final_modulation = self.linear(2 * cfg.d_model, ("d_model", "modulation"), 0.0, True)

    def __call__(
        self, codes: Int[Array, "batch positions sub_codes"], labels: Int[Array, " batch"], deterministic: bool = True
    ) -> Float[Array, "batch positions sub_codes vocab"]:
        """Logits in float32. Those at position n are of its own sub-codes, given the class and the positions before n.

        Args:
          codes: the codes of whole images, below 2^code_bits, in row-major order.
          labels: classes; num_classes stands for none.
          deterministic: no dropout; else there must be a `dropout` key.
        """
        return self.head(self.states(codes, labels, deterministic))

    @staticmethod
    def logits_of(hidden, matrix):
        logits = jnp.einsum("bld,tvd->bltv", hidden, matrix, preferred_element_type=jnp.float32)
        return constrain(logits, None, "vocab")

    def states(self, codes, labels, deterministic: bool = True) -> Float[Array, "batch positions d_model"]:
        """Hidden states after the final norm, from which each position is predicted."""
        cfg = self.config
        if codes.shape[1:] != (cfg.positions, cfg.sub_codes):
            raise ValueError(
                f"an image has {codes.shape[1]} x {codes.shape[2]} codes, but the model's grid of {cfg.grid} x "
                f"{cfg.grid} positions with {cfg.sub_codes} sub-codes has {cfg.positions} x {cfg.sub_codes}."
            )
        condition = self.embed_class(labels, deterministic)
        # All positions are embedded, so that a mesh can divide them.
        x = jnp.concatenate([condition, self.embed(codes)[:, :-1]], axis=1)
        x = self.embedding_dropout(constrain(x, "d_model"), deterministic)
        return self.hidden(x, condition, deterministic=deterministic)[0]

    def embed(self, codes: Int[Array, "batch length sub_codes"]) -> Float[Array, "batch length d_model"]:
        """The embeddings of tokens, from a table for each sub-code and a projection of all of them."""
        cfg = self.config
        x = jax.vmap(lambda table, ids: jnp.take(table, ids, axis=0), (0, -1), -2)(self.embedding, codes)
        x = x.reshape(*codes.shape[:-1], cfg.sub_codes * cfg.d_model)
        return constrain(self.projection(x) if cfg.sub_codes > 1 else x, "d_model")

    def hidden(
        self,
        x: Float[Array, "batch length d_model"],
        condition: Float[Array, "batch 1 d_model"],
        *,
        first: int | Int[Array, ""] = 0,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """States after the final norm, and the cache with these inputs appended.

        Args:
          x: embeddings of the inputs from number `first` on; input 0 is the class.
          condition: the class's embedding, for the modulation.
        """
        cfg = self.config
        positions = first + jnp.arange(x.shape[1])[None]
        x, cache = self.stack(x, positions, cache=cache, deterministic=deterministic, condition=condition)
        x = self.final_norm(x)
        if cfg.modulation:
            shift, scale = jnp.split(self.final_modulation(nn.silu(condition)), 2, axis=-1)
            x = x * (1 + scale) + shift
        return x, cache

    def head(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch length sub_codes vocab"]:
        """Logits in float32."""
        return self.logits_of(hidden, self.head_matrix)

    def init_cache(self, batch: int, length: int) -> KVCache:
        return self.config.init_cache(batch, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElmTextConfig(ElmConfig):
    """A model of one code a position, seen as a language model: its text is a class and then an image's codes.

    Ids below 2^code_bits are codes. The ids after them are classes, and the last id is no class.
    """

    sub_codes: int = 1
    code_bits: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.sub_codes != 1 or self.modulation:
            raise ValueError(
                f"sub_codes is {self.sub_codes} and modulation {self.modulation}; for a text they must be 1 and False."
            )

    @property
    def vocab_size(self) -> int:
        return self.codebook + self.num_classes + 1

    @property
    def max_length(self) -> int:
        return 1 + self.positions


class ElmText(Elm):
    """The same model, with the same parameters, as a `jaxtok.protocols.CausalLM`."""

    config: ElmTextConfig

    def __call__(self, tokens, **options: Any):
        """As `jaxtok.lm.decoder.Decoder`. Classes are no targets: their logits are 20 below the lowest of a code."""
        x, cache = self.hidden(self.embed(tokens), **options)
        return self.head(x), cache

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length d_model"]:
        codes = self.config.codebook
        of_code = jnp.take(self.embedding[0], jnp.minimum(tokens, codes - 1), axis=0)
        of_class = jnp.take(self.class_embedding, jnp.maximum(tokens - codes, 0), axis=0)
        return constrain(jnp.where((tokens < codes)[..., None], of_code, of_class), "d_model")

    def hidden(
        self, x, *, positions=None, segments=None, mask=None, layers=None, cache=None, deterministic: bool = True
    ):
        cfg = self.config
        check_row(x.shape[1], cfg.max_length, segments, cache)
        first, end = layer_range(layers, cfg.num_layers)
        if first == 0:
            x = self.embedding_dropout(x, deterministic)
        x, cache = self.stack(x, positions, segments, cache, deterministic, mask=mask, layers=(first, end))
        return self.final_norm(x) if end == cfg.num_layers else x, cache

    def head(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch length vocab"]:
        logits = self.logits_of(hidden, self.head_matrix)[:, :, 0]
        least = jnp.min(logits, -1, keepdims=True) - 20
        return jnp.concatenate([logits, jnp.repeat(least, self.config.num_classes + 1, axis=-1)], -1)


def init_params(config: ElmConfig, rng: jax.Array) -> Params:
    """All parameters as plain arrays."""
    codes = jnp.zeros((1, config.positions, config.sub_codes), jnp.int32)
    return nn.meta.unbox(Elm(config).init(rng, codes, jnp.zeros(1, jnp.int32))["params"])


class ModelOfCodes:
    """The properties of a `jaxtok.protocols.ImageGenerator` that the tasks of models of codes share."""

    model: Any

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.model.code_shape

    @property
    def code_values(self) -> tuple[int, ...]:
        return self.model.code_values

    @property
    def num_classes(self) -> int:
        return self.model.num_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeModeling(ModelOfCodes, Task):
    """Trains an autoregressive model on batches of codes (`jaxtok.data.codes.CodeData`):

    codes   int32    [batch, positions, sub_codes]
    labels  int32    [batch], the class; num_classes stands for none
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch

    The model's config makes its `module`, whose method `nats` gives -log p of each sub-code.
    """

    counted = "images"

    model: Any

    def module(self) -> nn.Module:
        return self.model.module()

    @abc.abstractmethod
    def draw(self, params: Params, conditions: Sequence[int | None], rng: jax.Array, **options: Any) -> Array:
        """See `jaxtok.protocols.ImageGenerator`."""

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, batch["codes"], batch["labels"])["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        return {"nats": jnp.sum(self.image_nats(params, batch, rng) * batch["mask"]), "images": jnp.sum(batch["mask"])}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross entropy in nats per sub-code; k ln 2 at first, as the heads begin at 0."""
        loss = mean(sums["nats"], sums["images"])
        return loss, {"nats_per_position": self.model.sub_codes * loss}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        nats, images = jnp.sum(self.image_nats(params, batch) * batch["mask"]), jnp.sum(batch["mask"])
        return {"nats": nats, "count": images, "images": images}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """loss (nats per sub-code), nats_per_position, and examples, the number of images."""
        return code_metrics(sums, self.model.sub_codes)

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three times the forward pass."""
        return 3 * len(batch["codes"]) * self.model.flops()

    def image_nats(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> Float[Array, " batch"]:
        """The mean nats of each image's sub-codes; with a key, under dropout."""
        nats = self.module().apply(
            {"params": params},
            batch["codes"],
            batch["labels"],
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
            method="nats",
        )
        return nats.mean((1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElmModeling(CodeModeling):
    """Trains ELM's autoregressive model, and draws images from it."""

    model: ElmConfig

    def fit(self, data: Data, train: Any = None) -> ElmModeling:
        """The task itself. Raises ValueError if the data do not fit the model (`check_data`)."""
        check_data(self.model, data)
        return self

    @property
    def sampling(self) -> type[ElmSampling]:
        from jaxtok.vision.elm_sampling import ElmSampling  # which imports this module

        return ElmSampling

    def draw(
        self,
        params: Params,
        conditions: Sequence[int | None],
        rng: jax.Array,
        *,
        sampling: ElmSampling | None = None,
        on_progress: OnProgress | None = None,
    ) -> Int[Array, "batch positions sub_codes"]:
        """The codes of an image of each class (None: no class), by `generate`; progress is after each row of a grid."""
        from jaxtok.vision import elm_sampling

        sampling = elm_sampling.ElmSampling() if sampling is None else sampling
        options = {"sampling": sampling, "rng": rng, "on_progress": on_progress}
        return elm_sampling.generate(self.model, params, conditions, **options)

    def attention_maps(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> Float[Array, "layers batch heads places places"]:
        """The attention of each place of an image to the others, without the class (rows sum to 1).

        Place n is the input that holds position n; it sees positions up to n. The last position is no input.
        """
        return _attention_maps(self, params, batch["codes"], batch["labels"])

    def attention_cells(self) -> Int[np.ndarray, "places 2"]:
        """The row and column of each place of `attention_maps`."""
        return self.model.cells()[:-1]


@functools.partial(jax.jit, static_argnums=0)
def _attention_maps(task: ElmModeling, params, codes, labels):
    _, state = task.module().apply({"params": params}, codes, labels, method="states", mutable="intermediates")
    return attention_weights(task.model, state["intermediates"], skipped=1)


def attention_weights(
    config: ElmConfig, intermediates: Any, skipped: int
) -> Float[Array, "layers batch heads places places"]:
    """The softmax of the scores in every layer and head, without the first `skipped` places, which are the class's.

    The softmax is over the other places only, so it does not matter how much of the attention went to the class.
    """
    sown = intermediates["stack"]["blocks"]["attention"]
    queries, keys = sown["queries"][0], sown["keys"][0]
    keys = jnp.repeat(keys, config.num_heads // config.kv_heads, axis=-2)
    scores = jnp.einsum("zbqhd,zbkhd->zbhqk", queries, keys, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(config.head_dim)
    if config.causal:
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    return jax.nn.softmax(scores[..., skipped:, skipped:])


def check_data(model: ElmConfig, data: Data) -> None:
    """Checks that data fit the model.

    Raises:
      ValueError: grid, sub-codes or their bits differ from the model's, or there are more classes.
    """
    if isinstance(data, CodeData):
        for field in ("grid", "sub_codes", "code_bits"):
            ours, theirs = getattr(model, field), getattr(data, field)
            overridden = data.shape if field == "grid" else data.values
            if theirs != ours and not overridden:
                raise ValueError(f"task.model.{field} is {ours}, but data.{field} is {theirs}; make them equal.")
        for field, ours in {"shape": model.code_shape, "values": model.code_values}.items():
            if getattr(data, field) not in ((), ours):
                raise ValueError(f"data.{field} is {getattr(data, field)}, but the model has {ours}; make them equal.")
    check_classes(model.num_classes, data)


def code_metrics(sums: Sums, sub_codes: int) -> dict[str, float]:
    """The metrics of an evaluation, from the sum of nats, the number of sub-codes or images they are of (`count`), and
    the number of images."""
    loss = sums["nats"] / sums["count"]
    return {"loss": loss, "nats_per_position": sub_codes * loss, "examples": sums["images"]}


def _size(layers: int, heads: int, width: int) -> dict[str, int]:
    return {"num_layers": layers, "num_heads": heads, "d_model": width, "mlp_dim": mlp_width(width)}


SIZES = {
    "b": _size(12, 12, 768),
    "l": _size(24, 16, 1024),
    "xl": _size(36, 20, 1280),
    "xxl": _size(48, 24, 1536),
    "2b": _size(48, 28, 1792),
    "xxxl": _size(48, 40, 2560),
}
"""The published sizes; all have heads of 64 channels."""

DECOMPOSITIONS = {"1-16": (1, 16), "2-8": (2, 8), "2-10": (2, 10), "2-12": (2, 12)}
"""The published numbers of sub-codes and of their bits."""


def published(size: str, decomposition: str, **options: Any) -> ElmConfig:
    """The autoregressive model of a published size, on codes that are cut in a published way.

    Raises:
      ValueError: a name is unknown.
    """
    for what, name, known in (("size", size, SIZES), ("decomposition", decomposition, DECOMPOSITIONS)):
        if name not in known:
            raise ValueError(f"the {what} is {name!r}; it must be one of {', '.join(known)}.")
    sub_codes, bits = DECOMPOSITIONS[decomposition]
    return ElmConfig(**SIZES[size] | {"sub_codes": sub_codes, "code_bits": bits} | options)


PUBLISHED = {
    f"elm-{size}": published(size, decomposition)
    for size, decomposition in {
        "b": "2-10",
        "l": "2-10",
        "xl": "2-10",
        "xxl": "2-12",
        "2b": "2-12",
        "xxxl": "2-12",
    }.items()
}
"""The published sizes, each with the sub-codes of its published results."""
