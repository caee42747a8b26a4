"""The released HAT models ("A Family of LLMs Liberated from Static Vocabularies", arXiv 2603.15953).

Unlike the paper's variant (`jaxtok.lm.hat`), the byte encoder is causal and runs over the whole text with a window, a
word's vector is pooled from the states of its bytes, and the decoder goes on from these states, guided by the word
before:

    h = encoder(bytes)          latent_i = O attention(q_i, k_t, v_t over the bytes t of word i)
    b = backbone(latents)       logits_t = head(norm(decoder(h; guide b_{i-1} of byte t in word i)))_t for byte t + 1

with a learned guide for the first word, and no norm behind encoder and backbone. Followed are the authors' modules
(Aleph-Alpha/vllm, `hat.py`); no code for training was published, the loss is next-byte cross entropy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.decoding.sampling import Sampling, sample, sampling_key
from jaxtok.nn.cache import KVCache, entered, places_of
from jaxtok.nn.linear import Linear, LlamaStack
from jaxtok.nn.losses import bits_per_byte, cross_entropy, masked_mean, totals
from jaxtok.nn.rotary import RopeScaling, apply_rotary
from jaxtok.nn.transformer import REMAT_POLICIES, Block, Call, Stack
from jaxtok.protocols import Batch, Params
from jaxtok.tokenizers.words import NEVER_IN_UTF8, WordSplitter, split_specials

_BUCKET = 64  # texts are padded to a multiple of so many bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedConfig:
    """The modules and what joins them; defaults: a small model for a laptop."""

    encoder: LlamaStack = LlamaStack(num_layers=1, d_model=64, num_heads=2, mlp_dim=176, window=64, rotary_base=1e5)
    backbone: LlamaStack = LlamaStack(num_layers=4, d_model=128, num_heads=4, mlp_dim=344)
    decoder: LlamaStack = LlamaStack(num_layers=1, d_model=64, num_heads=2, mlp_dim=176, window=64, rotary_base=1e5)
    alphabet: int = 256
    connector_heads: int = 4
    """Of the encoder's head size and rotation."""
    connector_kv_heads: int = 0
    """0: as many."""
    guide_heads: int = 2
    """Only seen in checkpoints and by QK norms: of one key, the weight is 1 whatever query and key are."""
    guide_kv_heads: int = 0
    max_word_size: int = 100
    special_tokens: tuple[tuple[str, int], ...] = (("<|eot_id|>", 192),)
    """Strings and the bytes they are; <|eot_id|>, or else the first one, ends a document."""

    def __post_init__(self):
        if not (self.encoder.causal and self.backbone.causal and self.decoder.causal):
            raise ValueError("encoder.causal, backbone.causal and decoder.causal have to be True.")
        if self.encoder.d_model != self.decoder.d_model:
            raise ValueError(
                f"decoder.d_model is {self.decoder.d_model}, but encoder.d_model = {self.encoder.d_model}; the decoder "
                "goes on from the encoder's states, so make them equal."
            )
        for heads in ("connector", "guide"):
            count, shared = getattr(self, f"{heads}_heads"), getattr(self, f"{heads}_kv_heads")
            if count < 1 or shared < 0 or count % (shared or count):
                raise ValueError(
                    f"{heads}_heads is {count} and {heads}_kv_heads {shared}; the second divides the first."
                )
        if self.max_word_size < 1:
            raise ValueError(f"max_word_size is {self.max_word_size}; it must be at least 1.")
        if not self.special_tokens:
            raise ValueError("special_tokens is empty; it needs the token that ends a document.")
        for name, byte in self.special_tokens:
            if byte not in NEVER_IN_UTF8:
                raise ValueError(
                    f"special_tokens puts {name!r} on the byte {byte}, which text can hold; use 192 or 193."
                )

    @property
    def eot_id(self) -> int:
        return dict(self.special_tokens).get("<|eot_id|>", self.special_tokens[0][1])

    def flops(self, letters: int, words: int) -> tuple[float, float]:
        """Forward FLOPs of one byte and of one word in a row of so many bytes and words."""
        d, width = self.backbone.d_model, self.encoder.d_model
        pooled = self.connector_heads * self.encoder.head_dim
        window = min(letters, self.encoder.window or letters), min(letters, self.decoder.window or letters)
        byte = self.encoder.stack_flops(window[0]) + self.decoder.stack_flops(window[1])
        byte += 4 * width * pooled + 2 * self.alphabet * width
        word = 2 * pooled * d + self.decoder.num_layers * 2 * (d * width + width * width)
        return byte, word + self.backbone.stack_flops(words)


def _released(qk_norm: bool, scaling: RopeScaling | None) -> ReleasedConfig:
    def char(layers: int) -> LlamaStack:
        return LlamaStack(
            num_layers=layers, d_model=1024, num_heads=8, mlp_dim=2816, window=768, rotary_base=1e5, qk_norm=qk_norm
        )

    return ReleasedConfig(
        encoder=char(6),
        backbone=LlamaStack(
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            mlp_dim=14336,
            rotary_base=5e5,
            rotary_scaling=scaling,
            qk_norm=qk_norm,
        ),
        decoder=char(4),
        connector_heads=32,
        guide_heads=8,
    )


PUBLISHED = {
    "llama-3.1-8b-tfree-hat": _released(False, RopeScaling(kind="llama3", factor=8.0, original_length=8192)),
    "tfree-hat-pretrained-7b": _released(True, None),
}
"""The released sizes: one from Llama 3.1 8B, one from scratch (whose backbone's rotation is our reading)."""


class Connector(nn.Module):
    """Pools the states of each word's bytes into a vector: attention of one learned query, within the word."""

    config: ReleasedConfig

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "batch length char_dim"],
        word: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        word_positions: Int[Array, "batch words"],
    ) -> Float[Array, "batch words d_model"]:
        """The query is rotated by the number of the word, the keys by those of the bytes; 0 for a word of no byte."""
        cfg, char = self.config, self.config.encoder
        dim, heads = char.head_dim, cfg.connector_heads
        shared = cfg.connector_kv_heads or heads
        d_model, words = cfg.backbone.d_model, word_positions.shape[1]

        def project(x, count, name):
            return _linear(char, count * dim, ("d_model", "heads"), name)(x).reshape(*x.shape[:-1], count, dim)

        def normed(x, name):
            return char.norm_module(name, "rms")(x) if char.qk_norm else x

        rotate = functools.partial(apply_rotary, base=char.rotary_base, scaling=char.rotary_scaling)
        init = nn.with_logical_partitioning(nn.initializers.normal(char.init_std), ("d_model",))
        latent = self.param("latent_query", init, (d_model,), char.param_dtype)
        query = normed(project(gather(latent.astype(char.dtype), "d_model"), heads, "query"), "query_norm")
        query = rotate(jnp.broadcast_to(query, (*word_positions.shape, heads, dim)), word_positions)
        key = rotate(normed(project(states, shared, "key"), "key_norm"), positions)
        value = project(states, shared, "value")

        def pool(query, key, value, word):  # one row
            key, value = (jnp.repeat(x, heads // shared, axis=1) for x in (key, value))
            of_byte = jnp.take(query, word, axis=0, mode="clip")
            scores = jnp.einsum("thd,thd->th", of_byte, key, preferred_element_type=jnp.float32) / math.sqrt(dim)
            highest = jax.ops.segment_max(scores, word, words, indices_are_sorted=True)
            highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
            weights = jnp.exp(scores - jnp.take(highest, word, axis=0, mode="clip"))
            total = jax.ops.segment_sum(weights, word, words, indices_are_sorted=True)
            pooled = jax.ops.segment_sum(
                weights[..., None] * value.astype(jnp.float32), word, words, indices_are_sorted=True
            )
            return pooled / jnp.where(total > 0, total, 1)[..., None]

        pool = jax.checkpoint(jax.vmap(pool), prevent_cse=False)  # what is between is wide, and cheap to compute again
        pooled = pool(query, key, value, jnp.where(word < 0, words, word))
        pooled = constrain(pooled.reshape(*word_positions.shape, heads * dim), "heads")
        return constrain(_linear(char, d_model, ("heads", "d_model"), "output")(pooled), "d_model")


class GuidedBlock(nn.Module):
    """s + O V norm(guide of the byte's word), then an ordinary block."""

    config: ReleasedConfig

    @nn.compact
    def __call__(self, carry, layer, positions, segments, guides, word, deterministic):
        cfg, stack = self.config, self.config.decoder
        x, cache = carry
        dim, width = stack.head_dim, stack.d_model
        source = stack.norm_module("kv_norm")(guides)
        value = _linear(stack, width, ("d_model", "heads"), "value")(source)
        guide = _linear(stack, width, ("heads", "d_model"), "output")(value)  # of words, which are fewer than bytes
        x = x + constrain(jnp.take_along_axis(guide, word[..., None], axis=1), "d_model")
        # Of one key, softmax is 1: query and key change nothing, but checkpoints have them.
        _linear(stack, cfg.guide_heads * dim, ("d_model", "heads"), "query")(stack.norm_module("query_norm")(x[:, :1]))
        _linear(stack, width, ("d_model", "heads"), "key")(source[:, :1])
        for name in ("query_head_norm", "key_head_norm") if stack.qk_norm else ():
            stack.norm_module(name, "rms")(jnp.zeros((1, dim)))
        return Block(stack, name="block")((x, cache), layer, Call(positions, segments, deterministic=deterministic))


class GuidedStack(nn.Module):
    """The decoder's blocks, scanned over."""

    config: ReleasedConfig

    @nn.compact
    def __call__(self, x, positions, segments, guides, word, cache=None, deterministic=True):
        stack = self.config.decoder
        block: Any = GuidedBlock
        if stack.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[stack.remat], prevent_cse=False, static_argnums=(7,))
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=stack.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = jnp.arange(stack.num_layers)
        positions, cache = entered(x, positions, cache)
        (x, cache), _ = scan(self.config, name="blocks")(
            (x, cache), layers, positions, segments, guides, word, deterministic
        )
        return x, cache


def _linear(of: LlamaStack, features: int, axes: tuple[str, str], name: str) -> Linear:
    return of.linear(features, axes, of.init_std, False, name)


class ReleasedHAT(nn.Module):
    """Bytes in words to logits of the next bytes. The parts are methods."""

    config: ReleasedConfig

    def setup(self):
        cfg = self.config
        char = cfg.encoder

        def table(name):
            init = nn.with_logical_partitioning(nn.initializers.normal(char.init_std), ("vocab", "d_model"))
            return self.param(name, init, (cfg.alphabet, char.d_model), char.param_dtype)

        self.embedding, self.head_matrix = table("embedding"), table("head_matrix")
        self.encoder, self.connector = Stack(char), Connector(cfg)
        self.backbone_stack, self.decoder = Stack(cfg.backbone), GuidedStack(cfg)
        self.final_norm = cfg.decoder.norm_module()
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.backbone.init_std), ("d_model",))
        width = (cfg.backbone.d_model,)
        self.first_word = self.param("first_word", init, width, cfg.backbone.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        word: Int[Array, "batch length"],
        word_positions: Int[Array, "batch words"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        word_segments: Int[Array, "batch words"] | None = None,
        unknown: Bool[Array, "batch words"] | None = None,
    ) -> Float[Array, "batch length alphabet"]:
        """Logits of the byte behind each one, in float32.

        Args:
          tokens: bytes; behind the end of a row anything.
          word: which word of the row a byte is in, from 0, ascending; `words` for those in a last word that no other
            follows, and for what is behind the row's end.
          word_positions: the number of each word in its document.
          positions, segments: of the bytes: their numbers in the document, and the document's in the row.
          word_segments: the same of the words.
          unknown: words that are none; what follows them has the first word's guide.
        """
        states = self.encode(tokens, positions=positions, segments=segments)[0]
        latents = self.connect(states, word, word_positions, positions=positions)
        outputs, _ = self.backbone(latents, positions=word_positions, segments=word_segments)
        if unknown is not None:
            outputs = jnp.where(unknown[..., None], self._first(outputs), outputs)
        guides = jnp.concatenate([jnp.broadcast_to(self._first(outputs), outputs[:, :1].shape), outputs], 1)
        return self.decode(states, guides, word, positions=positions, segments=segments)[0]

    def encode(self, tokens, *, positions=None, segments=None, cache: KVCache | None = None):
        """States of the bytes [batch, length, char_dim], without a norm; and the cache with them appended."""
        table = gather(self.embedding.astype(self.config.encoder.dtype), "vocab", "d_model")
        x = constrain(jnp.take(table, tokens, axis=0), "d_model")
        return self.encoder(x, _places(tokens, positions, cache), segments, cache)

    def connect(self, states, word, word_positions, *, positions=None) -> Float[Array, "batch words d_model"]:
        """The vector of each word, from the states of its bytes."""
        return self.connector(states, word, _places(word, positions, None), word_positions)

    def backbone(self, latents, *, positions=None, segments=None, cache: KVCache | None = None):
        """The guides of the words behind these, without a norm; and the cache."""
        latents = latents.astype(self.config.backbone.dtype)
        return self.backbone_stack(latents, _places(latents, positions, cache), segments, cache)

    def first_guide(self) -> Float[Array, " d_model"]:
        """The guide of a document's first word."""
        return self._first(self.first_word)

    def decode(self, states, guides, word, *, positions=None, segments=None, cache: KVCache | None = None):
        """Logits [batch, length, alphabet] from the encoder's states and, of each byte, the guide number `word`."""
        guides = guides.astype(self.config.decoder.dtype)
        x, cache = self.decoder(states, _places(states, positions, cache), segments, guides, word, cache)
        matrix = gather(self.head_matrix.astype(x.dtype), "vocab", "d_model")
        logits = jnp.einsum("bld,vd->blv", self.final_norm(x), matrix, preferred_element_type=jnp.float32)
        return constrain(logits, "vocab"), cache

    def _first(self, like):
        return gather(self.first_word.astype(like.dtype), "d_model")


def _places(x, positions, cache):
    return places_of(x, cache) if positions is None else positions


def byte_stream(batch: Batch, length: int, eot: int) -> dict[str, jax.Array]:
    """Rows of words (`jaxtok.data.words.WordText`) as rows of `length` bytes: what `ReleasedHAT` takes, and

    targets       the byte behind each, eot behind the last of a document
    mask          1 where it counts: the second to last byte of the target words, their first one if a byte is in front
    target_word   the place in `batch` of the word that the target is in; `words` for eot and where none counts

    What does not fit in is lost. The bytes of a row's first input word, if it has one, are context.
    """
    lengths, following, segments = batch["lengths"], batch["target_lengths"], batch["segments"]
    words, places = lengths.shape[1], jnp.arange(length)
    units = jnp.concatenate([batch["words"][:, :1], batch["targets"]], 1)
    of_segment = jnp.concatenate([segments[:, :1], segments], 1)
    sizes = jnp.concatenate([lengths[:, :1], following], 1) * (of_segment > 0)
    ends = jnp.cumsum(sizes, 1)
    starts = ends - sizes
    real = places < ends[:, -1:]
    word = jax.vmap(lambda row: jnp.searchsorted(row, places, side="right"))(ends)  # the first one that ends behind it
    word = jnp.minimum(word, words).astype(jnp.int32)

    def of_word(values):
        return jnp.take_along_axis(values, word, 1)

    unit = word * units.shape[-1] + jnp.clip(places - of_word(starts), 0, units.shape[-1] - 1)
    tokens = jnp.where(real, jnp.take_along_axis(units.reshape(len(units), -1), unit, 1), 0)
    opens = lengths == 0  # documents that begin in the row
    first = jax.lax.cummax(jnp.pad(jnp.where(opens, starts[:, 1:], 0), ((0, 0), (1, 0))), axis=1)
    begun = (segments > 1) | opens[:, :1]
    last = places == of_word(ends) - 1
    ended = jnp.pad((following == 0) & (segments > 0), ((0, 0), (0, 1)))
    goes_on = jnp.pad((following > 0) & (segments > 0), ((0, 0), (0, 1)))
    ends_here = real & last & of_word(ended)
    mask = real & jnp.where(last, ends_here | of_word(goes_on), word > 0)
    mask &= ends_here | (places < jnp.minimum(ends[:, -1:], length) - 1)
    shifted = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": tokens,
        "word": word,
        "word_positions": jnp.maximum(batch["positions"] - begun, 0),
        "positions": jnp.maximum(places - of_word(first), 0),
        "segments": jnp.where(real, of_word(of_segment), 0),
        "word_segments": jnp.where(opens, 0, segments),
        "unknown": opens,
        "targets": jnp.where(ends_here, eot, shifted),
        "mask": mask.astype(jnp.float32),
        "target_word": jnp.where(mask & ~ends_here, jnp.where(last, word, word - 1), words),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedModeling:
    """Trains a released HAT on rows of words by its next byte."""

    model: ReleasedConfig = ReleasedConfig()
    row_bytes: int = 0
    """Bytes that a row of words can hold, a multiple of 128 for the attention kernel; words beyond are lost. 0: all."""

    def module(self) -> ReleasedHAT:
        return ReleasedHAT(self.model)

    @property
    def splitter(self) -> WordSplitter:
        return WordSplitter("unicode", self.model.max_word_size)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        inputs, options = self._inputs(self._stream(batch))
        return self.module().init(rng, *inputs, **options)["params"]

    def loss(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross entropy in nats a byte; also logs bits per byte of text. First bytes of documents do not count."""
        stream, nats, _ = self._nats(params, batch)
        bits = jnp.sum(nats * stream["mask"]) / math.log(2)
        return masked_mean(nats, stream["mask"]), {"bits_per_byte": bits / jnp.maximum(self._bytes(batch, stream), 1)}

    def evaluate(self, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
        """As `jaxtok.lm.hat.HATModeling.evaluate`, without the first byte of a document, nor its first word's accuracy.

        Raises:
          ValueError: there was not a single target to predict.
        """
        parts = (_evaluation_sums(self, params, batch) for batch in batches)
        sums = totals(parts, "nats targets bytes words right", counted="targets")
        return {
            "loss": sums["nats"] / sums["targets"],
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "word_accuracy": sums["right"] / max(sums["words"], 1.0),
            "words": sums["words"],
            "bytes": sums["bytes"],
        }

    def trainable(self, params: Params) -> None:
        return None

    def flops(self, batch: Batch) -> float:
        """Of one training step: three times the forward pass, with padding counted."""
        rows, words, units = batch["words"].shape
        letters = self.row_bytes or (words + 1) * units
        byte, word = self.model.flops(letters, words)
        return 3 * rows * (letters * byte + words * word)

    def continue_text(
        self,
        params: Params,
        prompts: Sequence[bytes],
        *,
        max_bytes: int,
        sampling: Sampling = Sampling(),
        rng: jax.Array | None = None,
        specials: bool = False,
    ) -> list[bytes]:
        """Up to max_bytes bytes behind each prompt, fewer where the document ends. A row does not depend on the others.

        With `specials`, the strings of special tokens in a prompt stand for them (the authors' code does that always);
        never do so with a user's text.

        Raises:
          ValueError: no prompt, an empty one, or one with a special byte; no rng.
        """
        for prompt in prompts:
            if taken := {byte for _, byte in self.model.special_tokens} & set(prompt):
                raise ValueError(
                    f"the prompt holds the byte {min(taken)}, which stands for a special token; take it out."
                )
        strings = dict(self.model.special_tokens) if specials else {}
        words = [split_specials(self.splitter, prompt, strings) for prompt in prompts]
        return [new for new, _ in generate_bytes(self.model, params, words, max_bytes, sampling, rng)]

    def _stream(self, batch):
        _, words, units = batch["words"].shape
        return byte_stream(batch, self.row_bytes or (words + 1) * units, self.model.eot_id)

    @staticmethod
    def _inputs(stream):
        names = ("positions", "segments", "word_segments", "unknown")
        return (stream["tokens"], stream["word"], stream["word_positions"]), {name: stream[name] for name in names}

    def _nats(self, params, batch):
        stream = self._stream(batch)
        inputs, options = self._inputs(stream)
        logits = self.module().apply({"params": params}, *inputs, **options)
        return stream, cross_entropy(logits, stream["targets"]), logits.argmax(-1) == stream["targets"]

    @staticmethod
    def _bytes(batch, stream):
        return jnp.sum(stream["mask"] * (stream["target_word"] < batch["lengths"].shape[1]))


@functools.partial(jax.jit, static_argnums=0)
def _evaluation_sums(task: ReleasedModeling, params, batch):
    stream, nats, right = task._nats(params, batch)
    mask, words = stream["mask"], batch["lengths"].shape[1]
    count = jax.vmap(lambda values, word: jax.ops.segment_sum(values, word, words))
    good, bad = (count(x.astype(jnp.float32) * mask, stream["target_word"]) for x in (right, ~right))
    whole = (good + bad == batch["target_lengths"]) & (batch["target_lengths"] > 0) & (batch["mask"] > 0)
    bytes_ = task._bytes(batch, stream)
    return jnp.sum(nats * mask), jnp.sum(mask), bytes_, whole.sum(), (whole & (bad == 0)).sum()


@flax.struct.dataclass
class _State:
    """Between two bytes: the caches (the open word is not in `backbone`), and the encoder's states of the text."""

    encoder: KVCache
    backbone: KVCache
    decoder: KVCache
    states: Float[Array, "batch slots char_dim"]
    guide: Float[Array, "batch d_model"]
    logits: Float[Array, "batch alphabet"]


def generate_bytes(
    config: ReleasedConfig,
    params: Params,
    prompts: Sequence[Sequence[bytes]],
    max_bytes: int,
    sampling: Sampling = Sampling(),
    rng: jax.Array | None = None,
) -> list[tuple[bytes, list[bytes]]]:
    """The bytes behind each prompt, which is words of which the last is open; and all words, the prompt's included.

    A byte at a time, with caches: `WordSplitter.opens` says where words end. The authors' code leaves the first bytes
    of a new word's first character under the old guide and shifts the closed word's positions by them; here they are
    computed again and the positions are true, so that all is as if computed anew from the words.

    Raises:
      ValueError: see `ReleasedModeling.continue_text`.
    """
    if not prompts or max_bytes < 1:
        raise ValueError(f"there are {len(prompts)} prompts and max_bytes is {max_bytes}; both must be at least 1.")
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least a byte, as the first one is not predicted.")
    rng = sampling_key(rng, sampling)
    splitter = WordSplitter("unicode", config.max_word_size)
    model, count = ReleasedHAT(config), len(prompts)
    rows = [[bytearray(word) for word in words] for words in prompts]
    size = -(-max(sum(map(len, words)) for words in rows) // _BUCKET) * _BUCKET
    tokens, word = np.zeros((count, size), np.int32), np.full((count, size), size, np.int32)
    for row, words in enumerate(rows):
        text = b"".join(words)
        tokens[row, : len(text)] = list(text)
        word[row, : len(text)] = np.repeat(np.arange(len(words)), [len(w) for w in words])
    total = np.array([sum(map(len, words)) for words in rows], np.int32)
    closed = np.array([len(words) - 1 for words in rows], np.int32)
    numbers = np.tile(np.arange(-(-max(closed.max(), 1) // _BUCKET) * _BUCKET, dtype=np.int32), (count, 1))
    state = _prefill(model, max_bytes, params, tokens, word, numbers, total, closed)
    new: list[bytearray] = [bytearray() for _ in rows]
    live = np.ones(count, bool)
    for step in range(max_bytes):
        byte = np.asarray(sample(state.logits, jax.random.fold_in(rng, step), sampling), np.int32)
        live &= byte != config.eot_id
        if not live.any() or step + 1 == max_bytes:
            for row in np.flatnonzero(live):
                _append(rows[row], new[row], int(byte[row]), splitter)
            break
        opened = np.zeros(count, np.int32)
        ended = np.zeros((count, 2), np.int32)
        for row in np.flatnonzero(live):
            opened[row] = _append(rows[row], new[row], int(byte[row]), splitter)
            if opened[row]:
                end = total[row] + 1 - opened[row]
                ended[row] = end - len(rows[row][-2]), end
        state = _encode(model, params, state, byte, live)
        total = total + live
        if opened.any():
            state = _close(model, params, state, ended)
        again = np.maximum(opened, live)  # what the decoder has not seen under this guide
        for late in range(again.max()):
            state = _decode(model, params, state, total - again + late, late < again)
    return [(bytes(text), [bytes(word) for word in words]) for text, words in zip(new, rows)]


def _append(words: list[bytearray], new: bytearray, byte: int, splitter: WordSplitter) -> int:
    """Writes a byte behind a text; with how many bytes it opens a word."""
    opened = splitter.opens(bytes(words[-1]), byte)
    words[-1].append(byte)
    new.append(byte)
    if opened:
        words.append(words[-1][-opened:])
        del words[-2][-opened:]
    return opened


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(model: ReleasedHAT, max_bytes, params, tokens, word, numbers, total, closed) -> _State:
    cfg, (batch, length), most = model.config, tokens.shape, numbers.shape[1]

    def run(method, *args, **kwargs):
        return model.apply({"params": params}, *args, method=method, **kwargs)

    slots = length + max_bytes
    states, encoder = run("encode", tokens, cache=cfg.encoder.init_cache(batch, slots))
    latents = run("connect", states, jnp.where(word < closed[:, None], word, most), numbers)
    outputs, backbone = run("backbone", latents, cache=cfg.backbone.init_cache(batch, most + max_bytes))
    first = jnp.broadcast_to(run("first_guide").astype(outputs.dtype), outputs[:, :1].shape)
    guides = jnp.concatenate([first, outputs], 1)
    logits, decoder = run("decode", states, guides, jnp.minimum(word, most), cache=cfg.decoder.init_cache(batch, slots))
    return _State(
        encoder=encoder.truncate(total),
        backbone=backbone.truncate(closed),
        decoder=decoder.truncate(total),
        states=jnp.pad(states, ((0, 0), (0, max_bytes), (0, 0))),
        guide=jnp.take_along_axis(guides, closed[:, None, None], 1)[:, 0],
        logits=jnp.take_along_axis(logits, (total - 1)[:, None, None], 1)[:, 0],
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode(model: ReleasedHAT, params, state: _State, byte, live) -> _State:
    """Appends a byte to the live rows."""
    states, cache = model.apply({"params": params}, byte[:, None], cache=state.encoder, method="encode")
    place = state.encoder.length
    kept = jnp.where(live[:, None], states[:, 0], state.states[jnp.arange(len(byte)), place])
    return state.replace(
        encoder=cache.truncate(place + live), states=state.states.at[jnp.arange(len(byte)), place].set(kept)
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _close(model: ReleasedHAT, params, state: _State, ended: Int[Array, "batch 2"]) -> _State:
    """The words at ended[:, 0] ... ended[:, 1] - 1 go through connector and backbone; an empty one is none."""
    start, end = ended[:, :1], ended[:, 1:]
    places = start + jnp.arange(model.config.max_word_size)
    states = jnp.take_along_axis(state.states, places[..., None], 1, mode="clip")
    word = jnp.where(places < end, 0, 1)
    number = state.backbone.length[:, None]
    latents = model.apply({"params": params}, states, word, number, positions=places, method="connect")
    outputs, cache = model.apply({"params": params}, latents, cache=state.backbone, method="backbone")
    some = (end > start)[:, 0]
    return state.replace(
        backbone=cache.truncate(state.backbone.length + some),
        guide=jnp.where(some[:, None], outputs[:, 0], state.guide),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    model: ReleasedHAT, params, state: _State, place: Int[Array, " batch"], some: Bool[Array, " batch"]
) -> _State:
    """The decoder on the byte at `place` of some rows; what it has cached from there on is forgotten."""
    states = jnp.take_along_axis(state.states, place[:, None, None], 1)
    cache = state.decoder.truncate(jnp.where(some, place, state.decoder.length))
    word = jnp.zeros((len(place), 1), jnp.int32)
    logits, cache = model.apply({"params": params}, states, state.guide[:, None], word, cache=cache, method="decode")
    length = jnp.where(some, place + 1, state.decoder.length)
    return state.replace(decoder=cache.truncate(length), logits=jnp.where(some[:, None], logits[:, 0], state.logits))
