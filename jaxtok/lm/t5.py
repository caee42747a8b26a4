"""T5 (arXiv 1910.10683), its version 1.1, mT5 (2010.11934) and ByT5 (2105.13626): encoder and decoder.

Both are pre-norm stacks with a relative position bias that all layers of a stack share. Attention scores are not
divided by sqrt(d_kv): that factor is in the initialisation. `Conditioned` is the decoder for one input, as a CausalLM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.decoding.engine import Generation
from jaxtok.decoding.engine import generate as generate_tokens
from jaxtok.decoding.protocols import Chooser
from jaxtok.decoding.sampling import Sampling
from jaxtok.decoding.text import Continued, OnText, texts_and_logprobs
from jaxtok.lm.fitting import fit_text
from jaxtok.nn.cache import KVCache, entered
from jaxtok.nn.linear import MLP, LinearStack
from jaxtok.nn.losses import cross_entropy, text_loss, text_metrics, text_sums
from jaxtok.nn.relative import RelativeBias
from jaxtok.nn.transformer import Block, Call, MultiHead, Stack, layer_range
from jaxtok.protocols import Batch, Data, Params, Sums, Task
from jaxtok.tokenizers import load_tokenizer

_BUCKET = 64  # inputs are padded to a multiple of this many ids, so that similar lengths share a compiled function
HIDDEN = float(np.finfo(np.float32).min)
"""The bias of a hidden key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(LinearStack):
    """Defaults: T5-small of the first version. `num_heads` times `head_size` (d_kv) need not be d_model."""

    num_layers: int = 6
    """The number of the encoder's blocks."""
    decoder_layers: int = 0
    """The number of the decoder's blocks; 0: as many as the encoder has."""
    d_model: int = 512
    num_heads: int = 8
    head_size: int = 64
    mlp_dim: int = 2048
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "relu"
    vocab_size: int = 32128
    max_length: int = 2048
    """The longest input and the longest output, in tokens; the model itself has no limit."""
    tie_embeddings: bool = True
    scale_outputs: bool = True
    """Whether the decoder's states are multiplied by d_model^-0.5 before the head (T5's first version)."""
    relative_buckets: int = 32
    relative_distance: int = 128
    depth_scaled_init: bool = False
    """Whether parameters are initialised as MrT5's authors do, and not as T5's; see `initial`."""
    pad_id: int = 0
    """The id of padding, which is also the first input of the decoder."""
    eos_id: int = 1
    norm: str = "rms"
    norm_eps: float = 1e-6
    rotary_fraction: float = 0.0
    scale_scores: bool = False
    use_bias: bool = False
    softmax1: bool = False
    """Whether attention weights are exp(s_i) / (1 + sum_j exp(s_j)), so that a query can attend to nothing (MrT5)."""
    cross: bool = False
    """Whether the blocks of this stack also attend to the encoder's states, as the decoder's do."""
    dropout: float = 0.0
    """Dropout of embeddings, block outputs and final states. T5 was trained with 0.1 here, in `attention_dropout` and
    in `mlp_dropout`; version 1.1 was pre-trained without."""

    def __post_init__(self):
        super().__post_init__()
        for field, low in (("decoder_layers", 0), ("vocab_size", 0), ("max_length", 1), ("pad_id", 0), ("eos_id", 0)):
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {low}.")
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            raise ValueError(f"relative_buckets is {self.relative_buckets}; it must be even and at least 4.")
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance is {self.relative_distance}; it must be above half of "
                f"relative_buckets = {self.relative_buckets}."
            )

    @property
    def encoder_stack(self) -> T5Config:
        return dataclasses.replace(self, causal=False, mask_keys=True, cross=False)

    @property
    def decoder_stack(self) -> T5Config:
        layers = self.decoder_layers or self.num_layers
        return dataclasses.replace(self, num_layers=layers, causal=True, mask_keys=False, cross=True)

    @property
    def output_init_std(self) -> float:
        return self.mlp_dim**-0.5  # that of the MLP; `projection` has the one of attention

    def projection(self, group: str, features: int, name: str | None = None) -> nn.Module:
        width = self.d_model
        if group == "ffn":
            return MLP(dataclasses.replace(self, init_std=width**-0.5), features, name=name)
        if group == "output":
            return self.linear(features, ("heads", "d_model"), (self.num_heads * self.head_dim) ** -0.5, None, name)
        std = (width * self.head_dim) ** -0.5 if group == "query" else width**-0.5
        return self.linear(features, ("d_model", "heads"), std, None, name)

    def block(self) -> type[Block]:
        return T5Block

    def softmax(self):
        return softmax1 if self.softmax1 else None

    def module(self) -> T5:
        return T5(self)

    def encoder_flops(self, inputs: int) -> float:
        """Forward FLOPs of the encoder, and of the decoder's keys and values, for one row of `inputs` ids."""
        width = self.d_model * self.num_heads * self.head_dim
        return inputs * (self.encoder_stack.stack_flops(inputs) + self.decoder_stack.num_layers * 4 * width)

    def decoder_flops(self, inputs: int, targets: int) -> float:
        """Forward FLOPs of the decoder for one row, head included."""
        stack, inner = self.decoder_stack, self.num_heads * self.head_dim
        cross = stack.num_layers * (4 * self.d_model * inner + 4 * inner * inputs)
        return targets * (stack.stack_flops(targets) + cross + 2 * self.vocab_size * self.d_model)


def softmax1(scores: Float[Array, "*batch slots"]) -> Float[Array, "*batch slots"]:
    """exp(s_i) / (1 + sum_j exp(s_j)), which is 0 where all keys are hidden."""
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(-top))  # all hidden: exp(-top) is inf


@flax.struct.dataclass
class Encoded:
    """What the decoder gets of the input."""

    states: Float[Array, "batch slots d_model"]
    bias: tuple[Array, ...]
    """Biases on the scores of cross-attention, each of a shape that broadcasts to [batch, heads, length, slots]."""


def hide(mask: Bool[Array, "batch slots"], value: float = HIDDEN) -> Float[Array, "batch 1 1 slots"]:
    """A bias that hides the keys outside the mask."""
    return jnp.where(mask, 0.0, value)[:, None, None, :].astype(jnp.float32)


class CrossAttention(MultiHead):
    """Multi-head attention from tokens to a context, of which a cache keeps keys and values after the first call."""

    @nn.compact
    def __call__(self, x, cache: KVCache | None, layer, call: Call):
        cfg, context = self.config, call.condition.states
        q = self.heads(x, "query", cfg.num_heads, call.deterministic)
        if context is None:
            k, v = (stored[layer].astype(q.dtype) for stored in cache.context)
        else:
            k, v = (self.heads(context, group, cfg.kv_heads, call.deterministic) for group in ("key", "value"))
            if cache is not None:
                keys, values = cache.context
                new = keys.at[layer].set(k.astype(keys.dtype)), values.at[layer].set(v.astype(values.dtype))
                cache = cache.replace(context=new)
        q, k = cfg.scored(q, k, layer)
        y = self.attend(q, k, v, call.deterministic, causal=False, bias=call.condition.bias)
        return self.output(y, call.deterministic), cache


class T5Block(Block):
    """A block with cross-attention to the encoder's states before its MLP, if the config has `cross`."""

    def parts(self):
        own = super().parts()
        if not self.config.cross:
            return own
        return {"attention": own["attention"], "cross": CrossAttention(self.config, name="cross"), "ffn": own["ffn"]}


class BiasedStack(nn.Module):
    """What encoder and decoder have in common: dropout, blocks with a shared position bias, and a final norm."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.stack = Stack(cfg)
        self.relative_bias = position_bias(cfg)
        self.final_norm = cfg.norm_module()
        self.drop = nn.Dropout(cfg.dropout)


def position_bias(cfg: T5Config) -> RelativeBias:
    return RelativeBias(
        cfg.num_heads,
        cfg.relative_buckets,
        cfg.relative_distance,
        cfg.causal,
        init_std=cfg.d_model**-0.5,
        param_dtype=cfg.param_dtype,
    )


class Encoder(BiasedStack):
    def __call__(self, x: Float[Array, "batch length d_model"], mask, deterministic: bool = True) -> Encoded:
        places = jnp.arange(x.shape[1])[None]
        x, _ = self.stack(
            self.drop(x, deterministic),
            places,
            mask.astype(jnp.int32),
            deterministic=deterministic,
            bias=(self.relative_bias(places, places),),
        )
        return Encoded(self.drop(self.final_norm(x), deterministic), (hide(mask),))


class Decoder(BiasedStack):
    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        encoded: Encoded,
        *,
        positions: Int[Array, "#batch length"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        layers: tuple[int, int] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """The decoder's `hidden`, given what is encoded; see `jaxtok.protocols.CausalLM`."""
        first, end = layer_range(layers, self.config.num_layers)
        positions, known = entered(x, positions, cache, first)
        x, cache = self.stack(
            self.drop(x, deterministic or first > 0),
            positions,
            None,
            cache,
            deterministic,
            bias=(self.relative_bias(positions, positions if cache is None else known.positions),),
            condition=encoded,
            mask=mask,
            layers=(first, end),
        )
        return self.drop(self.final_norm(x), deterministic) if end == self.config.num_layers else x, cache


class T5(nn.Module):
    """An input, and the beginning of its output, to logits of what follows."""

    config: T5Config

    def setup(self):
        cfg = self.config
        if not cfg.vocab_size:
            raise ValueError("vocab_size is 0; it must be the number of rows of the embedding.")

        def matrix(name, std):
            init = nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "d_model"))
            value = self.param(name, init, (cfg.vocab_size, cfg.d_model), cfg.param_dtype)
            return gather(value.astype(cfg.dtype), "vocab", "d_model")

        self.embedding = matrix("embedding", 1.0)
        self.encoder = self.make_encoder()
        self.decoder = Decoder(cfg.decoder_stack)
        self.head_matrix = self.embedding if cfg.tie_embeddings else matrix("head_matrix", cfg.d_model**-0.5)

    def make_encoder(self) -> nn.Module:
        return Encoder(self.config.encoder_stack)

    def __call__(
        self,
        inputs: Int[Array, "batch length"],
        outputs: Int[Array, "batch outputs"],
        mask: Bool[Array, "batch length"] | Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch outputs vocab"]:
        """Logits (float32) of each token of the output, from the input and the true tokens before (teacher forcing).

        Args:
          inputs: ids; outside the mask they mean nothing.
          outputs: the decoder's inputs, which `shift_right` makes of the targets.
          mask: the real inputs; default: all but pad_id.
        """
        return self.decode(
            outputs, self.encode(inputs, mask, deterministic=deterministic), deterministic=deterministic
        )[0]

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length d_model"]:
        return constrain(jnp.take(self.embedding, tokens, axis=0), "d_model")

    def encode(
        self,
        inputs: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Encoded:
        mask = (inputs != self.config.pad_id) if mask is None else mask.astype(bool)
        return self.encoder(self.embed(inputs), mask, deterministic)

    def decode(
        self,
        outputs: Int[Array, "batch length"],
        encoded: Encoded,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length vocab"], KVCache | None]:
        """Logits, and the cache with these tokens appended.

        Args:
          encoded: without `states` if the cache has the keys and values of the input already.
        """
        x, cache = self.decoder(self.embed(outputs), encoded, cache=cache, deterministic=deterministic)
        return self.head(x), cache

    def hidden(self, x: Float[Array, "batch length d_model"], encoded: Encoded, **options: Any):
        """The decoder's states, from the embeddings of outputs, and the cache; see `Decoder`."""
        return self.decoder(x, encoded, **options)

    def head(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length vocab"]:
        if self.config.scale_outputs:
            x = x * self.config.d_model**-0.5
        logits = jnp.einsum("bld,vd->blv", x, self.head_matrix, preferred_element_type=jnp.float32)
        return constrain(logits, "vocab")

    def init_cache(self, batch: int, length: int, inputs: int = 0) -> KVCache:
        """Room for `length` tokens, and for the keys and values of `inputs` slots."""
        return self.config.decoder_stack.init_cache(batch, length, inputs)


def shift_right(targets: Int[Array, "batch length"], start: int = 0) -> Int[Array, "batch length"]:
    """The decoder's inputs: the start id, then all targets but the last."""
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start)


def init_params(config: T5Config, rng: jax.Array) -> Params:
    """All parameters, as plain arrays."""
    return nn.meta.unbox(initial(config, rng, jnp.ones((1, max(2, getattr(config, "stride", 1))), jnp.int32)))


def initial(config: T5Config, rng: jax.Array, inputs: Int[Array, "batch length"]) -> Params:
    """All parameters in Linen's boxes, drawn as T5's are: N(0, s), with s = 1 for the embedding, (d d_kv)^-0.5 for
    queries, (heads d_kv)^-0.5 for attention's output, d_ff^-0.5 for the MLP's output, and d^-0.5 else; norms are 1.

    With `depth_scaled_init` they are drawn as MrT5's authors do: s = f fan_in^-0.5, f = (layers of the stack)^-0.5, for
    all projections (queries too) and the position bias; norms are f, and embedding and head d^-0.5.
    """
    params = config.module().init(rng, inputs, inputs)["params"]
    if not config.depth_scaled_init:
        return params

    def one(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[0] == "embedding":
            return leaf * config.d_model**-0.5
        if names[0] not in ("encoder", "decoder") or not (
            {"stack", "rest", "final_norm", "relative_bias"} & set(names)
        ):
            return leaf
        layers = getattr(config, f"{names[0]}_stack").num_layers
        queries = math.sqrt(config.head_dim) if "query" in names else 1.0
        return leaf * (queries * layers**-0.5)

    return jax.tree_util.tree_map_with_path(one, params)


@dataclasses.dataclass(frozen=True)
class Conditioned:
    """The decoder as a CausalLM, whose parameters also hold the input: `condition` makes them.

    So everything written against CausalLM (`jaxtok.decoding`) can generate outputs. Prompts begin with the start id,
    and rows are those of the input.
    """

    module: T5

    @property
    def config(self) -> T5Config:
        return self.module.config

    def apply(self, variables, x, *, method: str = "", cache: KVCache | None = None, **options: Any):
        params = variables["params"]
        model = {"params": params["model"]}
        if method in ("embed", "head"):
            return self.module.apply(model, x, method=method)
        known = cache
        if cache is None:  # make one that holds nothing but the input
            known = self.init_cache(*x.shape[:2])
            if (options.get("layers") or (0,))[0]:
                known = entered(x, options.get("positions"), known)[1]
        if not method:
            x = self.module.apply(model, x, method="embed")
        x, after = self.module.apply(
            model,
            x,
            Encoded(None, params["bias"]),
            cache=known.replace(context=params["context"]),
            method="hidden",
            **options,
        )
        if not method:
            x = self.module.apply(model, x, method="head")
        return x, None if cache is None else after.replace(context=None)

    def init_cache(self, batch: int, length: int) -> KVCache:
        return self.module.init_cache(batch, length)


@functools.partial(jax.jit, static_argnames="module")
def condition(module: T5, params: Params, encoded: Encoded) -> Params:
    """The parameters of `Conditioned`: the model's, and an input's keys and values, computed once."""
    batch, slots = encoded.states.shape[:2]
    start = jnp.full((batch, 1), module.config.pad_id, jnp.int32)
    cache = module.init_cache(batch, 1, slots)
    _, cache = module.apply({"params": params}, start, encoded, cache, method="decode")
    return {"model": params, "bias": encoded.bias, "context": cache.context}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceToSequence(Task):
    """Trains an encoder-decoder on pairs of texts.

    A batch has

    tokens   int32    [batch, inputs], padded with pad_id
    targets  int32    [batch, outputs]
    mask     float32  [batch, outputs], 1 where the target counts
    bytes    int32    [batch, outputs], how many bytes of text the target stands for
    """

    counted = "tokens"

    model: T5Config
    tokenizer: str = "byt5"
    """The tokenizer by which texts are continued; `fit` takes that of span corruption."""
    first_sentinel: int = 258
    """The sentinel in whose place a text is continued; `fit` takes that of span corruption."""

    def module(self) -> T5:
        return self.model.module()

    def fit(self, data: Data, train: Any = None) -> SequenceToSequence:
        """Fits the task to its data; see `jaxtok.lm.fitting.fit_text`.

        Raises:
          ValueError: as there; or the model does not have the first sentinel.
        """
        task = fit_text(self, data)
        if not isinstance(data, SpanCorruption):
            return task
        if data.first_sentinel >= task.model.vocab_size:
            raise ValueError(
                f"task.model.vocab_size is {task.model.vocab_size}, but the first sentinel of {data.tokenizer} is "
                f"{data.first_sentinel}; use the tokenizer of the model."
            )
        return dataclasses.replace(task, tokenizer=data.tokenizer, first_sentinel=data.first_sentinel)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return initial(self.model, rng, batch["tokens"])

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        logits = self.module().apply(
            {"params": params},
            batch["tokens"],
            shift_right(batch["targets"], self.model.pad_id),
            deterministic=False,
            rngs={"dropout": rng},
        )
        return text_sums(cross_entropy(logits, batch["targets"]), batch["mask"], batch["bytes"])

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats a target; also logs bits per byte of the targets' text."""
        return text_loss(sums)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        outputs = shift_right(batch["targets"], self.model.pad_id)
        logits = self.module().apply({"params": params}, batch["tokens"], outputs)
        return text_sums(cross_entropy(logits, batch["targets"]), batch["mask"], batch["bytes"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats a target), perplexity, bits_per_byte of the targets' text, and their tokens and bytes.

        Sentinels and ends count in the bits but not in the bytes; the bits per byte of the ByT5 and MrT5 papers are
        loss / ln 2.
        """
        return text_metrics(sums)

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass."""
        rows, inputs = batch["tokens"].shape
        targets = batch["targets"].shape[1]
        return 3 * rows * (self.model.encoder_flops(inputs) + self.model.decoder_flops(inputs, targets))

    def encoded(self, params: Params, tokens: Int[np.ndarray, "batch length"]) -> Encoded:
        """What the decoder gets of the input in evaluation and generation."""
        return encode(self.module(), params, tokens)

    def generate(
        self,
        params: Params,
        inputs: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        chooser: Chooser = Sampling(temperature=0),
        begin: Sequence[int] = (),
        stop_tokens: Collection[int] | None = None,
        encoding: Mapping[str, Any] = {},
        **options: Any,
    ) -> Generation:
        """Generates an output for each input; the encoder runs once. For more options see `jaxtok.decoding.generate`.

        Args:
          inputs: ids, of any lengths, each with its end.
          begin: ids that each output begins with; they are not returned.
          stop_tokens: default: eos_id.
          encoding: options of `encoded`.

        Raises:
          ValueError: there is no input, or one is empty, has an unknown id or is longer than max_length.
        """
        cfg = self.model
        tokens = pad_inputs(cfg, inputs)
        return generate_tokens(
            Conditioned(self.module()),
            condition(self.module(), params, self.encoded(params, tokens, **encoding)),
            [[cfg.pad_id, *begin]] * len(inputs),
            max_new_tokens=max_new_tokens,
            chooser=chooser,
            stop_tokens=(cfg.eos_id,) if stop_tokens is None else stop_tokens,
            **options,
        )

    def continue_text(
        self,
        params: Params,
        prompts: Sequence[bytes],
        *,
        max_bytes: int,
        sampling: Chooser = Sampling(),
        rng: jax.Array | None = None,
        on_text: OnText | None = None,
        logprobs: bool = False,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Continues each prompt by what a model trained on span corruption puts in the place of a sentinel after it.

        See `jaxtok.protocols.TextGenerator`; `max_bytes` counts tokens.

        Raises:
          ValueError: the model does not have the tokenizer's ids; or see `generate`.
        """
        tokenizer, sentinel, size = _tokenizer(self.tokenizer), self.first_sentinel, self.model.vocab_size
        if sentinel >= size or (self.tokenizer == "byt5" and size != tokenizer.vocab_size):
            raise ValueError(
                f"vocab_size is {size}, which does not fit the tokenizer {self.tokenizer} and its sentinel {sentinel}, "
                "by which texts are continued; convert the model again from the folder that has its tokenizer."
            )

        def text_of(tokens: Sequence[int]) -> bytes:
            return b"".join(tokenizer.token_bytes(token) for token in tokens if token != sentinel - 1)

        generated = self.generate(
            params,
            [[*tokenizer.encode(prompt), sentinel, self.model.eos_id] for prompt in prompts],
            max_new_tokens=max_bytes,
            chooser=sampling,
            rng=rng,
            begin=[sentinel],
            stop_tokens=(self.model.eos_id, sentinel - 1),
            num_ids=sentinel + 1,
            on_tokens=on_text and (lambda piece: on_text([text_of(new) for new in piece.tokens])),
        )
        rows = [Continued(text_of(row), row, likely) for row, likely in zip(generated.tokens, generated.logprobs)]
        return texts_and_logprobs(rows, logprobs)


_tokenizer = functools.lru_cache(maxsize=4)(load_tokenizer)


@functools.partial(jax.jit, static_argnames="module")
def encode(module: T5, params: Params, tokens) -> Encoded:
    return module.apply({"params": params}, tokens, method="encode")


def pad_inputs(config: T5Config, inputs: Sequence[Sequence[int]]) -> Int[np.ndarray, "batch length"]:
    """Inputs of any lengths as one array.

    Raises:
      ValueError: there is no input, or one is empty, has an unknown id or is longer than max_length.
    """
    if not len(inputs):
        raise ValueError("there is no input; give at least one.")
    for number, row in enumerate(inputs):
        if not 1 <= len(row) <= config.max_length:
            raise ValueError(
                f"input {number} has {len(row)} ids; it must have from 1 to max_length = {config.max_length}."
            )
        if min(row) < 0 or max(row) >= config.vocab_size:
            raise ValueError(
                f"input {number} has an id outside of 0 to {config.vocab_size - 1}, the model's vocabulary; it must be "
                "encoded with the model's own tokenizer."
            )
    length = -(-max(map(len, inputs)) // _BUCKET) * _BUCKET
    tokens = np.full((len(inputs), min(length, config.max_length)), config.pad_id, np.int32)
    for row, text in zip(tokens, inputs):
        row[: len(text)] = text
    return tokens


_GATED = {"activation": "gelu_tanh", "gated": True, "tie_embeddings": False, "scale_outputs": False}


def _t5(d_model: int, mlp_dim: int, layers: int, heads: int, **options: Any) -> T5Config:
    return T5Config(d_model=d_model, mlp_dim=mlp_dim, num_layers=layers, num_heads=heads, **options)


def _version_1_1(vocab: int) -> dict[str, T5Config]:
    sizes = {
        "small": (512, 1024, 8, 6),
        "base": (768, 2048, 12, 12),
        "large": (1024, 2816, 24, 16),
        "xl": (2048, 5120, 24, 32),
        "xxl": (4096, 10240, 24, 64),
    }
    return {size: _t5(*numbers, vocab_size=vocab, **_GATED) for size, numbers in sizes.items()}


def byt5(d_model: int, mlp_dim: int, layers: int, decoder_layers: int, heads: int) -> T5Config:
    return _t5(d_model, mlp_dim, layers, heads, decoder_layers=decoder_layers, vocab_size=384, **_GATED)


PUBLISHED = {
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, head_size=128),
    "t5-11b": _t5(1024, 65536, 24, 128, head_size=128),
    **{f"t5-v1_1-{size}": config for size, config in _version_1_1(32128).items()},
    **{f"mt5-{size}": config for size, config in _version_1_1(250112).items()},
    "byt5-small": byt5(1472, 3584, 12, 4, 6),
    "byt5-base": byt5(1536, 3968, 18, 6, 12),
    "byt5-large": byt5(1536, 3840, 36, 12, 16),
    "byt5-xl": byt5(2560, 6720, 36, 12, 32),
    "byt5-xxl": byt5(4672, 12352, 36, 12, 64),
}
"""The published sizes by name."""
