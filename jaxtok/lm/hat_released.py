"""The released HAT models ("A Family of LLMs Liberated from Static Vocabularies", arXiv 2603.15953).

Unlike the paper's variant (`jaxtok.lm.hat`), the byte encoder is causal and runs over the whole text with a window, a
word's vector is pooled from the states of its bytes, and the decoder starts from these states, guided by the words
before:

    h = encoder(bytes)          latent_i = O attention(q_i, k_t, v_t over the bytes t of word i)
    b = backbone(latents)       logits_t = head(norm(decoder(h; guide b_{i-1} of byte t in word i)))_t for byte t + 1

with a learned guide for the first word, and no norm after encoder and backbone. This follows the authors' modules
(Aleph-Alpha/vllm, `hat.py`). They published no training code; the loss here is next-byte cross entropy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather
from jaxtok.decoding.engine import Engine
from jaxtok.decoding.protocols import Chooser
from jaxtok.decoding.sampling import Sampling, sampling_key
from jaxtok.decoding.text import Continued, OnText, continue_texts, texts_and_logprobs
from jaxtok.nn.cache import KVCache, entered, places_of
from jaxtok.nn.linear import Linear, LlamaStack
from jaxtok.nn.losses import bits_per_byte, cross_entropy, text_loss
from jaxtok.nn.rotary import RopeScaling, apply_rotary
from jaxtok.nn.transformer import REMAT_POLICIES, Block, Call, Stack
from jaxtok.protocols import Batch, Params, Sums, Task
from jaxtok.tokenizers.words import NEVER_IN_UTF8, WordSplitter, split_specials

_BUCKET = 64  # prompts are padded to a multiple of this many bytes, and of this many words


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedConfig:
    """The three modules, and what joins them. Defaults: a small model for a laptop."""

    encoder: LlamaStack = LlamaStack(num_layers=1, d_model=64, num_heads=2, mlp_dim=176, window=64, rotary_base=1e5)
    backbone: LlamaStack = LlamaStack(num_layers=4, d_model=128, num_heads=4, mlp_dim=344)
    decoder: LlamaStack = LlamaStack(num_layers=1, d_model=64, num_heads=2, mlp_dim=176, window=64, rotary_base=1e5)
    alphabet: int = 256
    connector_heads: int = 4
    """Heads of the connector, with the encoder's head size and rotary positions."""
    connector_kv_heads: int = 0
    """Heads of the connector's keys and values; 0: as many as of its queries."""
    guide_heads: int = 2
    """Heads of the attention to the guide. They matter only to the shapes in checkpoints: with a single key, the weight
    is 1 whatever query and key are."""
    guide_kv_heads: int = 0
    max_word_size: int = 100
    special_tokens: tuple[tuple[str, int], ...] = (("<|eot_id|>", 192),)
    """Strings of special tokens and the bytes that stand for them; <|eot_id|>, or else the first, ends a document."""

    def __post_init__(self):
        if not (self.encoder.causal and self.backbone.causal and self.decoder.causal):
            raise ValueError("encoder.causal, backbone.causal and decoder.causal must be True.")
        if self.encoder.d_model != self.decoder.d_model:
            raise ValueError(
                f"decoder.d_model is {self.decoder.d_model}, but encoder.d_model = {self.encoder.d_model}; they "
                "must be equal, as the decoder starts from the encoder's states."
            )
        for heads in ("connector", "guide"):
            count, shared = getattr(self, f"{heads}_heads"), getattr(self, f"{heads}_kv_heads")
            if count < 1 or shared < 0 or count % (shared or count):
                raise ValueError(
                    f"{heads}_heads is {count} and {heads}_kv_heads {shared}; the second must divide the first."
                )
        if self.max_word_size < 1:
            raise ValueError(f"max_word_size is {self.max_word_size}; it must be at least 1.")
        if not self.special_tokens:
            raise ValueError("special_tokens is empty; it must have the token that ends a document.")
        for name, byte in self.special_tokens:
            if byte not in NEVER_IN_UTF8:
                raise ValueError(
                    f"special_tokens puts {name!r} on the byte {byte}, which text can hold; it must be one that UTF-8 "
                    "never has, such as 192."
                )

    @property
    def eot_id(self) -> int:
        return dict(self.special_tokens).get("<|eot_id|>", self.special_tokens[0][1])

    def flops(self, letters: int, words: int) -> tuple[float, float]:
        """Forward FLOPs of one byte and of one word, in a row of `letters` bytes and `words` words."""
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
"""The released sizes: one from Llama 3.1 8B, and one from scratch (the rotation in its backbone is our reading)."""


class Connector(nn.Module):
    """Pools the states of each word's bytes into a vector, by attention of one learned query within the word."""

    config: ReleasedConfig

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "batch length char_dim"],
        word: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        word_positions: Int[Array, "batch words"],
    ) -> Float[Array, "batch words d_model"]:
        """The words' vectors, 0 for a word without bytes. Queries rotate by words' positions, keys by bytes'."""
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

        # What it makes on the way is wide, and cheap to compute again.
        pool = jax.checkpoint(jax.vmap(pool), prevent_cse=False)
        pooled = pool(query, key, value, jnp.where(word < 0, words, word))
        pooled = constrain(pooled.reshape(*word_positions.shape, heads * dim), "heads")
        return constrain(_linear(char, d_model, ("heads", "d_model"), "output")(pooled), "d_model")


class GuidedBlock(nn.Module):
    """Adds O V norm(g) to the states, with the guide g of each byte's word; then runs an ordinary block."""

    config: ReleasedConfig

    @nn.compact
    def __call__(self, carry, layer, positions, segments, guides, word, deterministic):
        cfg, stack = self.config, self.config.decoder
        x, cache = carry
        dim, width = stack.head_dim, stack.d_model
        source = stack.norm_module("kv_norm")(guides)
        value = _linear(stack, width, ("d_model", "heads"), "value")(source)
        guide = _linear(stack, width, ("heads", "d_model"), "output")(value)  # by word, as they are fewer than bytes
        x = x + constrain(jnp.take_along_axis(guide, word[..., None], axis=1), "d_model")
        # The softmax over a single key is 1: query and key change nothing, but checkpoints have them.
        _linear(stack, cfg.guide_heads * dim, ("d_model", "heads"), "query")(stack.norm_module("query_norm")(x[:, :1]))
        _linear(stack, width, ("d_model", "heads"), "key")(source[:, :1])
        for name in ("query_head_norm", "key_head_norm") if stack.qk_norm else ():
            stack.norm_module(name, "rms")(jnp.zeros((1, dim)))
        return Block(stack, name="block")((x, cache), layer, Call(positions, segments, deterministic=deterministic))


class GuidedStack(nn.Module):
    """The decoder's blocks, under a scan."""

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
    """Bytes in words to logits of the next bytes. Each part is a method."""

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
        """Logits of the byte after each one; float32.

        Args:
          tokens: bytes; anything after the end of a row.
          word: the index of the word that a byte is in, from 0, ascending. It is `words` for bytes of a last word that
            no other follows, and after the end of the row.
          word_positions: the position of each word in its document.
          positions, segments: of each byte, its position in the document and the document's number in the row.
          word_segments: of each word, the document's number in the row.
          unknown: true where there is no word; a word after it has the first word's guide.
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
        """The guides of the words after these, without a norm; and the cache with these appended."""
        latents = latents.astype(self.config.backbone.dtype)
        return self.backbone_stack(latents, _places(latents, positions, cache), segments, cache)

    def first_guide(self) -> Float[Array, " d_model"]:
        """The guide of a document's first word."""
        return self._first(self.first_word)

    def decode(self, states, guides, word, *, positions=None, segments=None, cache: KVCache | None = None):
        """Logits [batch, length, alphabet] from the encoder's states and each byte's guide, the one of index `word`."""
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

    targets       the byte after each one; eot after the last byte of a document
    mask          1 where the target counts: eot, and bytes of target words except the first of a row or document
    target_word   the index in `batch` of the word that the target is in; `words` for eot and where no target counts

    Bytes beyond `length` are lost. The bytes of a row's first input word, if it has one, are context.
    """
    lengths, following, segments = batch["lengths"], batch["target_lengths"], batch["segments"]
    words, places = lengths.shape[1], jnp.arange(length)
    units = jnp.concatenate([batch["words"][:, :1], batch["targets"]], 1)
    of_segment = jnp.concatenate([segments[:, :1], segments], 1)
    sizes = jnp.concatenate([lengths[:, :1], following], 1) * (of_segment > 0)
    ends = jnp.cumsum(sizes, 1)
    starts = ends - sizes
    real = places < ends[:, -1:]
    word = jax.vmap(lambda row: jnp.searchsorted(row, places, side="right"))(ends)  # the first that ends after the byte
    word = jnp.minimum(word, words).astype(jnp.int32)

    def of_word(values):
        return jnp.take_along_axis(values, word, 1)

    unit = word * units.shape[-1] + jnp.clip(places - of_word(starts), 0, units.shape[-1] - 1)
    tokens = jnp.where(real, jnp.take_along_axis(units.reshape(len(units), -1), unit, 1), 0)
    opens = lengths == 0  # where a document begins in the row
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
class ReleasedModeling(Task):
    """Trains a released HAT to predict the next byte, on rows of words (`jaxtok.data.words.WordText`)."""

    counted = "targets"

    model: ReleasedConfig = ReleasedConfig()
    row_bytes: int = 0
    """The most bytes that are read of a row of words, for the attention kernel a multiple of 128; 0: all."""

    def module(self) -> ReleasedHAT:
        return ReleasedHAT(self.model)

    @property
    def splitter(self) -> WordSplitter:
        return WordSplitter("unicode", self.model.max_word_size)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        inputs, options = self._inputs(self._stream(batch))
        return self.module().init(rng, *inputs, **options)["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        stream, nats, _ = self._nats(params, batch)
        mask = stream["mask"]
        return {"nats": jnp.sum(nats * mask), "tokens": jnp.sum(mask), "bytes": self._bytes(batch, stream)}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats a byte, without documents' first bytes; also logs bits per byte."""
        return text_loss(sums)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        stream, nats, right = self._nats(params, batch)
        mask, words = stream["mask"], batch["lengths"].shape[1]
        count = jax.vmap(lambda values, word: jax.ops.segment_sum(values, word, words))
        good, bad = (count(x.astype(jnp.float32) * mask, stream["target_word"]) for x in (right, ~right))
        whole = (good + bad == batch["target_lengths"]) & (batch["target_lengths"] > 0) & (batch["mask"] > 0)
        sums = {"nats": nats * mask, "targets": mask, "words": whole, "right": whole & (bad == 0)}
        return {name: jnp.sum(x) for name, x in sums.items()} | {"bytes": self._bytes(batch, stream)}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss, bits_per_byte, word_accuracy, words and bytes; see `jaxtok.lm.hat.HATModeling`.

        The first byte of a document does not count, so neither does its first word in the accuracy.
        """
        return {
            "loss": sums["nats"] / sums["targets"],
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "word_accuracy": sums["right"] / max(sums["words"], 1.0),
            "words": sums["words"],
            "bytes": sums["bytes"],
        }

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with padding counted."""
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
        sampling: Chooser = Sampling(),
        rng: jax.Array | None = None,
        on_text: OnText | None = None,
        logprobs: bool = False,
        specials: bool = False,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Up to max_bytes bytes after each prompt, fewer if the document ends. See `jaxtok.protocols.TextGenerator`.

        With `specials`, the strings of special tokens in a prompt become those tokens, as always in the authors' code;
        never use it with a user's text.

        Raises:
          ValueError: there is no prompt, a prompt is empty or has the byte of a special token, or rng is missing.
        """
        for prompt in prompts:
            if taken := {byte for _, byte in self.model.special_tokens} & set(prompt):
                raise ValueError(
                    f"a prompt holds the byte {min(taken)}, which stands for a special token; take it out."
                )
        strings = dict(self.model.special_tokens) if specials else {}
        words = [split_specials(self.splitter, prompt, strings) for prompt in prompts]
        rows = generate_bytes(self.model, params, words, max_bytes, sampling, rng, on_text)
        return texts_and_logprobs([new for new, _ in rows], logprobs)

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


def generate_bytes(
    config: ReleasedConfig,
    params: Params,
    prompts: Sequence[Sequence[bytes]],
    max_bytes: int,
    sampling: Chooser = Sampling(),
    rng: jax.Array | None = None,
    on_text: OnText | None = None,
) -> list[tuple[Continued, list[bytes]]]:
    """What follows each prompt, and all words, the prompt's included. A prompt is words, of which the last is open.

    Tokens are bytes, and eot at the end of the document.

    Raises:
      ValueError: see `ReleasedModeling.continue_text`.
    """
    if not prompts or max_bytes < 1:
        raise ValueError(f"there are {len(prompts)} prompts and max_bytes is {max_bytes}; both must be at least 1.")
    if not all(prompts):
        raise ValueError("a prompt is empty; it must have at least a byte, as the first one is not predicted.")
    rng = sampling_key(rng, sampling)
    model, count = ReleasedBytes(ReleasedHAT(config)), len(prompts)
    size = -(-max(sum(map(len, words)) for words in prompts) // _BUCKET) * _BUCKET
    tokens, word = np.zeros((count, size), np.int32), np.full((count, size), size, np.int32)
    for row, words in enumerate(prompts):
        text = b"".join(words)
        tokens[row, : len(text)] = list(text)
        word[row, : len(text)] = np.repeat(np.arange(len(words)), [len(w) for w in words])
    total = np.array([sum(map(len, words)) for words in prompts], np.int32)
    closed = np.array([len(words) - 1 for words in prompts], np.int32)
    numbers = np.tile(np.arange(-(-max(closed.max(), 1) // _BUCKET) * _BUCKET, dtype=np.int32), (count, 1))
    engine = Engine(model=model, chooser=sampling)
    first = model.start(params, tokens, word, numbers, total, closed, max_bytes=max_bytes)
    state = engine.begin(first, tokens, lengths=total, new=max_bytes, rng=rng, stop=[config.eot_id])

    def read(row: int, new: list[int]) -> bytes:
        return bytes(new[:-1] if new and new[-1] == config.eot_id else new)

    rows = continue_texts(engine, params, state, read, max_bytes, on_text)
    return [(new, _words(model.splitter, words, new.text)) for words, new in zip(prompts, rows)]


def _words(splitter: WordSplitter, words: Sequence[bytes], text: bytes) -> list[bytes]:
    """The words of a prompt and of the bytes that follow it."""
    words = list(words)
    for number in range(len(text)):
        opened, byte = splitter.opens(words[-1], text[number]), text[number : number + 1]
        words[-1] += byte
        if opened:
            words[-1:] = [words[-1][:-opened], words[-1][-opened:]]
    return words


_CHARACTER = 4  # the most bytes that a word can open with: those of a character


@flax.struct.dataclass
class _State:
    """The state between two bytes: no module has read the newest one."""

    encoder: KVCache
    backbone: KVCache
    """The cache of the closed words."""
    decoder: KVCache
    states: Float[Array, "batch slots char_dim"]
    """The encoder's states of the text."""
    guide: Float[Array, "batch d_model"]
    """The guide of the open word."""
    word: Int[Array, "batch max_word_size+1"]
    """The open word, with room for the byte that ends it."""
    length: Int[Array, " batch"]
    """How many bytes the open word has."""
    begun: Bool[Array, ""]
    """Whether a byte has been generated; before, the prompt says where words end."""


@dataclasses.dataclass(frozen=True)
class ReleasedBytes:
    """A released HAT as a `jaxtok.decoding.TokenModel` of bytes.

    `WordSplitter.opens` says where words end; it needs Unicode's tables, so each step asks the host. In the authors'
    code, the first bytes of a new word's first character stay under the old guide and shift the closed word's
    positions. Here they are decoded again and positions are true, so that all is as if computed anew from the words.
    """

    model: ReleasedHAT

    @property
    def splitter(self) -> WordSplitter:
        return WordSplitter("unicode", self.model.config.max_word_size)

    @functools.partial(jax.jit, static_argnames=("self", "max_bytes"))
    def start(self, params, tokens, word, numbers, total, closed, *, max_bytes: int) -> _State:
        """The state after texts [batch, length] of `total` bytes, in `closed` words and an open one. `word` [batch,
        length] is the index of each byte's word. The newest byte is left for the first step to read."""
        cfg, run, (batch, length), most = self.model.config, self._run(params), tokens.shape, numbers.shape[1]
        slots = length + max_bytes + _CHARACTER
        states, encoder = run("encode", tokens, cache=cfg.encoder.init_cache(batch, slots))
        latents = run("connect", states, jnp.where(word < closed[:, None], word, most), numbers)
        outputs, backbone = run("backbone", latents, cache=cfg.backbone.init_cache(batch, most + max_bytes))
        first = jnp.broadcast_to(run("first_guide").astype(outputs.dtype), outputs[:, :1].shape)
        guides = jnp.concatenate([first, outputs], 1)
        _, decoder = run("decode", states, guides, jnp.minimum(word, most), cache=cfg.decoder.init_cache(batch, slots))
        start = jnp.argmax(word == closed[:, None], 1)
        return _State(
            encoder=encoder.truncate(total - 1),
            backbone=backbone.truncate(closed),
            decoder=decoder.truncate(total - 1),
            states=jnp.pad(states, ((0, 0), (0, slots - length), (0, 0))),
            guide=jnp.take_along_axis(guides, closed[:, None, None], 1)[:, 0],
            word=_window(tokens, start, cfg.max_word_size + 1),
            length=total - 1 - start,
            begun=jnp.array(False),
        )

    def step(self, params: Params, byte, state: _State, live):
        run, rows, index = self._run(params), jnp.arange(len(byte)), state.encoder.length
        new, encoder = run("encode", byte[:, None], cache=state.encoder)
        states = state.states.at[rows, jnp.where(live, index, state.states.shape[1])].set(new[:, 0], mode="drop")
        total, length = index + live, state.length + live
        opened = jax.pure_callback(
            self._opens,
            jax.ShapeDtypeStruct(byte.shape, jnp.int32),
            state.word,
            jnp.where(live & state.begun, state.length, 0),
            byte,
        )
        state = state.replace(
            encoder=encoder.truncate(total),
            states=states,
            word=state.word.at[rows, jnp.where(live, state.length, state.word.shape[1])].set(byte, mode="drop"),
            length=length,
            begun=jnp.array(True),
        )

        def decode(state: _State, count, width):  # the last `count` bytes, under this guide
            start = total - count
            word = jnp.zeros((len(byte), width), jnp.int32)
            logits, cache = run(
                "decode",
                _window(state.states, start, width),
                state.guide[:, None],
                word,
                cache=state.decoder.truncate(start),
            )
            return logits[rows, jnp.maximum(count, 1) - 1], state.replace(decoder=cache.truncate(total))

        def close(state: _State):
            end = total - opened
            start = total - state.length
            places = start[:, None] + jnp.arange(self.model.config.max_word_size)
            inside = jnp.where(places < end[:, None], 0, 1)
            bytes_ = _window(state.states, start, places.shape[1])
            number = state.backbone.length[:, None]
            latents = run("connect", bytes_, inside, number, positions=places)
            outputs, cache = run("backbone", latents, cache=state.backbone)
            closes = opened > 0
            return state.replace(
                backbone=cache.truncate(state.backbone.length + closes),
                guide=jnp.where(closes[:, None], outputs[:, 0], state.guide),
                word=jnp.where(
                    closes[:, None], _window(state.word, state.length - opened, state.word.shape[1]), state.word
                ),
                length=jnp.where(closes, opened, state.length),
            )

        logits, state = jax.lax.cond(
            opened.any(),
            lambda state: decode(close(state), jnp.maximum(opened, live), _CHARACTER),
            lambda state: decode(state, live.astype(jnp.int32), 1),
            state,
        )
        return logits, state, live

    def _opens(self, words, lengths, bytes_) -> Int[np.ndarray, " batch"]:
        words, lengths, bytes_ = (np.asarray(x) for x in (words, lengths, bytes_))
        opens = self.splitter.opens
        rows = (opens(bytes(word[:n].tolist()), int(byte)) for word, n, byte in zip(words, lengths, bytes_))
        return np.fromiter(rows, np.int32, len(bytes_))

    def _run(self, params):
        return lambda method, *args, **options: self.model.apply({"params": params}, *args, method=method, **options)


def _window(x: Array, start: Int[Array, " batch"], width: int) -> Array:
    """x[b, start[b] : start[b] + width], where entries beyond the end repeat the last one."""
    places = start[:, None] + jnp.arange(width)
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), 1, mode="clip")
