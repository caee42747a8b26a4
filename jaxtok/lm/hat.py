"""HAT (arXiv 2501.10322): hierarchical autoregressive transformers over the bytes of words and the words of a text.

A small bidirectional transformer makes one vector of each word's bytes, a causal transformer runs over these vectors,
and a small causal transformer spells the next word from its output:

    e_i = W_E encoder(C[W], C[c_1], ..., C[c_n])_0     p_i = W_D backbone(e_1, ..., e_i)_i
    decoder(p_i, C[c_1], ..., C[c_n]) predicts c_1, ..., c_n, [W] of word i + 1

The paper does not say whether its encoder and decoder end in a norm, nor which base its rotary positions have; here all
three modules end in a norm, and the base is 10,000. No training code was published. The released models differ from the
paper: see `jaxtok.lm.hat_released`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain, gather, rows_only
from jaxtok.data.words import WordText
from jaxtok.decoding.engine import Engine
from jaxtok.decoding.protocols import Chooser
from jaxtok.decoding.sampling import Sampling, sampling_key
from jaxtok.decoding.text import Continued, OnText, continue_texts, texts_and_logprobs
from jaxtok.nn.cache import KVCache, places_of
from jaxtok.nn.linear import LlamaStack
from jaxtok.nn.losses import bits_per_byte, cross_entropy, text_loss
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import Batch, Data, Params, Sums, Task
from jaxtok.tokenizers.words import WordSplitter

_BUCKET = 16  # prompts are padded to a multiple of this many words


@dataclasses.dataclass(frozen=True, kw_only=True)
class HATConfig:
    """The three modules; defaults: a small model for a laptop."""

    encoder: LlamaStack = LlamaStack(num_layers=1, d_model=64, num_heads=2, mlp_dim=176, causal=False)
    backbone: LlamaStack = LlamaStack(num_layers=4, d_model=128, num_heads=4, mlp_dim=344)
    decoder: LlamaStack = LlamaStack(num_layers=1, d_model=64, num_heads=2, mlp_dim=176)
    max_units: int = 16
    """The most bytes of a word."""
    alphabet: int = 256
    """Rows of the byte table. With 256, [W] and [S] are bytes that UTF-8 does not use; with 258, they can be 256 and
    257, so that text can have all bytes."""
    w_id: int = 255
    """The id of [W], which is the first input of the encoder and ends a word."""
    s_id: int = 254
    """The id of [S], which ends a document."""
    start: bool = True
    """Whether a learned vector stands for the word before a document, so that the first word is predicted too; in the
    paper it is not."""

    def __post_init__(self):
        if self.encoder.causal or not self.decoder.causal or not self.backbone.causal:
            raise ValueError("encoder.causal must be False, and backbone.causal and decoder.causal must be True.")
        if self.encoder.d_model != self.decoder.d_model:
            raise ValueError(
                f"decoder.d_model is {self.decoder.d_model}, but encoder.d_model = {self.encoder.d_model}; they "
                "must be equal, as both modules share a table of bytes."
            )
        if self.max_units < 1:
            raise ValueError(f"max_units is {self.max_units}; it must be at least 1.")
        for field in ("w_id", "s_id"):
            if not 0 <= getattr(self, field) < self.alphabet:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be below alphabet = {self.alphabet}.")
        if self.w_id == self.s_id or self.alphabet < 256:
            raise ValueError(
                f"w_id is {self.w_id}, s_id {self.s_id} and alphabet {self.alphabet}; the ids must differ, and "
                "alphabet must be at least 256."
            )

    def flops(self, words: int) -> float:
        """Forward FLOPs of one word in a row of `words`; all its `max_units` + 1 places count, used or not."""
        places, width = self.max_units + 1, self.encoder.d_model
        place = self.encoder.stack_flops(places) + self.decoder.stack_flops(places) + 2 * self.alphabet * width
        return places * place + self.backbone.stack_flops(words) + 4 * width * self.backbone.d_model


def _size(heads: int, char_heads: int, **options: Any) -> HATConfig:
    """The paper's shapes: heads of 128 channels; as many layers as heads in the backbone, half as many elsewhere."""

    def stack(heads: int, layers: int, **more: Any) -> LlamaStack:
        width = 128 * heads
        mlp = round(8 * width / 3 / 8) * 8
        return LlamaStack(num_layers=layers, d_model=width, num_heads=heads, mlp_dim=mlp, **more | options)

    return HATConfig(
        encoder=stack(char_heads, char_heads // 2, causal=False),
        backbone=stack(heads, heads),
        decoder=stack(char_heads, char_heads // 2),
        max_units=32,
    )


PUBLISHED = {"1b": _size(18, 6), "3b": _size(28, 6), "7b": _size(36, 8)}
"""The paper's sizes, which it compares with Llama-style models of 1B, 3B and 7B with 64k subwords."""


def everywhere(config: HATConfig, **options: Any) -> HATConfig:
    """The config with these options (dtype, remat, ...) in all three modules."""
    parts = {part: dataclasses.replace(getattr(config, part), **options) for part in ("encoder", "backbone", "decoder")}
    return dataclasses.replace(config, **parts)


class HAT(nn.Module):
    """Words, and the words that follow them, to logits of the latter's bytes. Each part is a method."""

    config: HATConfig

    def setup(self):
        cfg = self.config
        char = cfg.encoder

        def table(name):
            init = nn.with_logical_partitioning(nn.initializers.normal(char.init_std), ("vocab", "d_model"))
            return self.param(name, init, (cfg.alphabet, char.d_model), char.param_dtype)

        def linear(features, of):
            return of.linear(features, ("d_model", None), of.init_std, False, None)

        self.embedding, self.head_matrix = table("embedding"), table("head_matrix")
        self.encoder, self.encoder_norm = Stack(cfg.encoder), cfg.encoder.norm_module()
        self.backbone_stack, self.backbone_norm = Stack(cfg.backbone), cfg.backbone.norm_module()
        self.decoder, self.decoder_norm = Stack(cfg.decoder), cfg.decoder.norm_module()
        self.word_in, self.word_out = linear(cfg.backbone.d_model, char), linear(char.d_model, cfg.backbone)
        if cfg.start:
            init = nn.with_logical_partitioning(nn.initializers.normal(char.init_std), ("d_model",))
            self.start = self.param("start", init, (cfg.backbone.d_model,), cfg.backbone.param_dtype)

    def __call__(
        self,
        words: Int[Array, "batch words units"],
        lengths: Int[Array, "batch words"],
        targets: Int[Array, "batch words units"],
        positions: Int[Array, "batch words"] | None = None,
        segments: Int[Array, "batch words"] | None = None,
    ) -> Float[Array, "batch words places alphabet"]:
        """Logits of each target word's bytes and of what ends it, at units + 1 places; float32.

        Args:
          words, lengths: the words that are read; a word of length 0 is the start of a document.
          targets: the word that follows each; anything may stand after its end.
          positions, segments: those of the words, for the backbone.
        """
        vectors = self.encode(words, lengths)
        outputs, _ = self.backbone(vectors, positions=positions, segments=segments)
        return self.spell(self.predictive(outputs), targets)

    def encode(self, words, lengths) -> Float[Array, "batch words d_model"]:
        """The vector e_i of each word, from its bytes alone."""
        cfg = self.config
        with rows_only():
            ids = words.reshape(-1, words.shape[-1])
            first = jnp.full((len(ids), 1), cfg.w_id, ids.dtype)
            x = self.letters(jnp.concatenate([first, ids], 1))
            places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
            real = (places <= lengths.reshape(-1, 1)).astype(jnp.int32)  # places after the end see only each other
            x, _ = self.encoder(x, places, real)
            vectors = self.word_in(self.encoder_norm(x[:, 0]))
        vectors = constrain(vectors.reshape(*lengths.shape, -1), "d_model")
        if cfg.start:
            start = gather(self.start.astype(vectors.dtype), "d_model")
            vectors = jnp.where((lengths == 0)[..., None], start, vectors)
        return vectors

    def backbone(self, vectors, *, positions=None, segments=None, cache: KVCache | None = None):
        """b_i [batch, words, d_model], and the cache with these words appended."""
        if positions is None:
            positions = places_of(vectors, cache)
        x, cache = self.backbone_stack(vectors, positions, segments, cache)
        return self.backbone_norm(x), cache

    def predictive(self, outputs) -> Float[Array, "batch words char_dim"]:
        """p_i, which is all that the decoder knows of the text before word i + 1."""
        return self.word_out(outputs)

    def spell(self, predictive, targets) -> Float[Array, "batch words places alphabet"]:
        """Logits of each word's bytes and end, from its p and its own earlier bytes."""
        with rows_only():
            letters = self.letters(targets.reshape(-1, targets.shape[-1]))
            first = predictive.reshape(-1, 1, predictive.shape[-1]).astype(letters.dtype)
            logits, _ = self.spell_on(jnp.concatenate([first, letters], 1))
        return logits.reshape(*targets.shape[:2], *logits.shape[1:])  # divided as the rows are, by `tensor` too

    def spell_on(self, x: Float[Array, "rows new char_dim"], cache: KVCache | None = None):
        """Logits [rows, new, alphabet] after these inputs of the decoder, and the cache with them appended."""
        x, cache = self.decoder(x, places_of(x, cache), None, cache)
        matrix = gather(self.head_matrix.astype(x.dtype), "vocab", "d_model")
        logits = jnp.einsum("nld,vd->nlv", self.decoder_norm(x), matrix, preferred_element_type=jnp.float32)
        return logits, cache

    def letters(self, ids: Int[Array, "rows new"]) -> Float[Array, "rows new char_dim"]:
        """Embeddings of bytes, which the encoder and the decoder share."""
        table = gather(self.embedding.astype(self.config.encoder.dtype), "vocab", "d_model")
        return constrain(jnp.take(table, ids, axis=0), "d_model")


def spelled(config: HATConfig, targets, lengths) -> tuple[Int[Array, "*words places"], Bool[Array, "*words places"]]:
    """What each place predicts: a word's bytes, then [W] (for a word of length 0, [S]); and which places predict."""
    places = jnp.arange(targets.shape[-1] + 1)
    end = jnp.where(lengths == 0, config.s_id, config.w_id)[..., None]
    ids = jnp.pad(targets, [(0, 0)] * (targets.ndim - 1) + [(0, 1)])
    return jnp.where(places == lengths[..., None], end, ids), places <= lengths[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HATModeling(Task):
    """Trains a HAT on rows of words (`jaxtok.data.words.WordText`)."""

    counted = "targets"

    model: HATConfig = HATConfig()
    splitter: WordSplitter = WordSplitter()
    """What cuts the prompts of `continue_text` into words; it should be the data's."""

    def module(self) -> HAT:
        return HAT(self.model)

    def fit(self, data: Data, train: Any = None) -> HATModeling:
        """Returns the task itself. Raises a ValueError if the data's max_units is not the model's."""
        if isinstance(data, WordText) and data.max_units != self.model.max_units:
            raise ValueError(
                f"data.max_units is {data.max_units}, but task.model.max_units is {self.model.max_units}; make them "
                "equal."
            )
        return self

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, batch["words"], batch["lengths"], batch["targets"])["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        nats, mask, _ = self._spell(params, batch)
        return {"nats": jnp.sum(nats * mask), "tokens": jnp.sum(mask), "bytes": jnp.sum(self._bytes(batch))}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats a byte or end of a word (section 2.3); also logs bits per byte."""
        return text_loss(sums)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        nats, mask, right = self._spell(params, batch)
        n = batch["target_lengths"][..., None]
        words = (mask[..., 0] > 0) & (n[..., 0] > 0)
        places = jnp.arange(mask.shape[-1])
        letters, whole = (jnp.all(right | (places >= end), -1) & words for end in (n, n + 1))
        sums = {"nats": nats * mask, "targets": mask, "bytes": self._bytes(batch)}
        sums |= {"words": words, "right": letters, "right_with_end": whole}
        return {name: jnp.sum(x) for name, x in sums.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats a target), bits_per_byte (with the bits of the words' ends), words, bytes, and

        word_accuracy           the share of the words of which each byte is the likeliest one after the true ones
        word_accuracy_with_end  the share of the words of which the end is the likeliest too
        """
        words = max(sums["words"], 1.0)
        return {
            "loss": sums["nats"] / sums["targets"],
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "word_accuracy": sums["right"] / words,
            "word_accuracy_with_end": sums["right_with_end"] / words,
            "words": sums["words"],
            "bytes": sums["bytes"],
        }

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with padding counted."""
        rows, words = batch["lengths"].shape
        return 3 * rows * words * self.model.flops(words)

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
        open_last: bool = True,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Up to max_bytes bytes after each prompt, fewer if the document ends. See `jaxtok.protocols.TextGenerator`.

        The last word of a prompt may go on: its [W] is predicted like its bytes. With `open_last=False` it is whole. A
        row does not depend on the others.

        Raises:
          ValueError: there is no prompt, a prompt has the byte of [W] or [S], a prompt is empty but the model has no
            start vector, or rng is missing.
        """
        words = [self._prompt(prompt, open_last) for prompt in prompts]
        return texts_and_logprobs(
            spell_on_prompts(self.model, params, words, max_bytes, sampling, rng, on_text), logprobs
        )

    def _prompt(self, prompt: bytes, open_last: bool) -> tuple[list[bytes], bytes]:
        if taken := {self.model.w_id, self.model.s_id} & set(prompt):
            raise ValueError(f"a prompt holds the byte {min(taken)}, which is [W] or [S] and not text; take it out.")
        splitter = self.splitter
        if splitter.max_word_size > self.model.max_units:
            splitter = dataclasses.replace(splitter, max_word_size=self.model.max_units)
        words = splitter.split(prompt)
        if words and open_last and (self.model.start or len(words) > 1):
            return words[:-1], words[-1]
        return words, b""

    def _bytes(self, batch):
        counted = batch["mask"] if self.model.start else batch["mask"] * (batch["lengths"] > 0)
        return batch["bytes"] * counted

    def _spell(self, params, batch):
        inputs = (batch[name] for name in ("words", "lengths", "targets", "positions", "segments"))
        logits = self.module().apply({"params": params}, *inputs)
        ids, real = spelled(self.model, batch["targets"], batch["target_lengths"])
        mask = batch["mask"] if self.model.start else batch["mask"] * (batch["lengths"] > 0)
        return cross_entropy(logits, ids), real * mask[..., None], logits.argmax(-1) == ids


def split_words(config: HATConfig, tokens: Sequence[int]) -> list[bytes]:
    """The words of new tokens, [W] after each; the first may be empty, and the last may be open."""
    words = [bytearray()]
    for token in tokens:
        if token == config.w_id:
            words.append(bytearray())
        elif token != config.s_id:
            words[-1].append(token)
    return [bytes(word) for word in words]


def spell_on_prompts(
    config: HATConfig,
    params: Params,
    prompts: Sequence[tuple[Sequence[bytes], bytes]],
    max_bytes: int,
    sampling: Chooser = Sampling(),
    rng: jax.Array | None = None,
    on_text: OnText | None = None,
) -> list[Continued]:
    """Spells the words after each prompt, which is whole words and the beginning of the next.

    That beginning is not repeated. Tokens are bytes, [W] and [S]; their log probabilities are of the model's
    distribution over what can follow: at the beginning of a word [S] but not [W], later [W] but not [S], and after
    `max_units` bytes only [W].

    Raises:
      ValueError: see `HATModeling.continue_text`.
    """
    if not prompts or max_bytes < 1:
        raise ValueError(f"there are {len(prompts)} prompts and max_bytes is {max_bytes}; both must be at least 1.")
    rng = sampling_key(rng, sampling)
    starts = [[b"", *words] if config.start else list(words) for words, _ in prompts]
    if not all(starts):
        raise ValueError("a prompt is empty; it must have at least a word, as the model has no start vector.")
    longest = -(-max(map(len, starts)) // _BUCKET) * _BUCKET
    widest = max((len(word) for start in starts for word in start), default=0)
    words = np.zeros((len(prompts), longest, max(widest, config.max_units)), np.int32)
    lengths = np.zeros(words.shape[:2], np.int32)
    for row, start in enumerate(starts):
        for number, word in enumerate(start):
            lengths[row, number] = len(word)
            words[row, number, : len(word)] = list(word)
    begun = np.zeros((len(prompts), config.max_units), np.int32)
    for row, (_, word) in zip(begun, prompts):
        row[: len(word)] = list(word)
    counts, sizes = (np.array(list(map(len, of)), np.int32) for of in (starts, [word for _, word in prompts]))
    model = Spelling(HAT(config))
    engine = Engine(model=model, chooser=sampling)
    # The newest token is the last byte of the open word, or else the [W] that ended the word before.
    newest = [word[-1] if word else config.w_id for _, word in prompts]
    state = engine.begin(
        model.start(params, words, lengths, counts, begun, sizes, max_bytes=max_bytes),
        np.array(newest)[:, None],
        new=2 * max_bytes + 1,
        rng=rng,
        stop=[config.s_id],
    )

    def read(row: int, tokens: list[int]) -> bytes:
        return b"".join(split_words(config, tokens))

    return continue_texts(engine, params, state, read, max_bytes, on_text)


@flax.struct.dataclass
class _State:
    """The state between two bytes: no module has read the newest one."""

    backbone: KVCache
    """The cache of all words that have ended and been read."""
    decoder: KVCache
    """The cache of the open word: p, then its bytes."""
    word: Int[Array, "batch units"]
    """The word that the backbone has not read yet."""
    length: Int[Array, " batch"]
    waits: Bool[Array, " batch"]
    """Rows whose word has ended. They wait until all rows' words have, as the backbone costs the same for one row as
    for all."""


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A HAT as a `jaxtok.decoding.TokenModel` of bytes, with [W] at the end of a word and [S] at the end of a text."""

    model: HAT

    @functools.partial(jax.jit, static_argnames=("self", "max_bytes"))
    def start(self, params, words, lengths, counts, begun, sizes, *, max_bytes) -> _State:
        """The state after prompts of `counts` whole words and `sizes` bytes of the next word. If there are no such
        bytes, the last whole word is left for the first step to read."""
        cfg, run, (batch, longest) = self.model.config, self._run(params), lengths.shape
        outputs, cache = run(
            "backbone",
            run("encode", words, lengths),
            cache=cfg.backbone.init_cache(batch, longest + max_bytes + 1),
        )
        rows, last = jnp.arange(batch), counts - 1
        letters = run("letters", begun)
        first = run("predictive", outputs[rows, last][:, None]).astype(letters.dtype)
        decoder = cfg.decoder.init_cache(batch, cfg.max_units + 1)
        _, decoder = run("spell_on", jnp.concatenate([first, letters], 1), decoder)
        whole = sizes == 0
        begun = jnp.pad(begun, ((0, 0), (0, words.shape[2] - begun.shape[1])))
        return _State(
            backbone=cache.truncate(counts - whole),
            decoder=decoder.truncate(sizes),
            word=jnp.where(whole[:, None], words[rows, last], begun),
            length=jnp.where(whole, lengths[rows, last], sizes - 1),
            waits=jnp.zeros(batch, bool),
        )

    def step(self, params: Params, tokens, state: _State, live):
        cfg, run, rows = self.model.config, self._run(params), jnp.arange(len(tokens))
        letter = live & ~state.waits & (tokens != cfg.w_id)
        waits = live & ~letter
        index = jnp.where(letter, state.length, state.word.shape[1])
        word, length = state.word.at[rows, index].set(tokens, mode="drop"), state.length + letter

        def spell():
            logits, decoder = run("spell_on", run("letters", tokens[:, None]), state.decoder)
            decoder = decoder.truncate(jnp.where(letter, decoder.length, state.decoder.length))
            return logits, _State(state.backbone, decoder, word, length, waits)

        def close():
            outputs, cache = run("backbone", run("encode", word[:, None], length[:, None]), cache=state.backbone)
            cache = cache.truncate(jnp.where(live, cache.length, state.backbone.length))
            logits, decoder = run("spell_on", run("predictive", outputs), state.decoder.truncate(0 * length))
            return logits, _State(cache, decoder, word * 0, length * 0, waits & False)

        logits, state = jax.lax.cond((waits | ~live).all(), close, spell)
        ids, n = jnp.arange(cfg.alphabet), state.length[:, None]
        never = ids == jnp.where(n == 0, cfg.w_id, cfg.s_id)  # a word has at least a byte, and [S] is a word of its own
        never |= (n == cfg.max_units) & (ids != cfg.w_id)
        return jnp.where(never, -jnp.inf, logits[:, 0]), state, ~state.waits

    def _run(self, params):
        return lambda method, *args, **options: self.model.apply({"params": params}, *args, method=method, **options)
