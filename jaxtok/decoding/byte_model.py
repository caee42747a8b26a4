"""Models of bytes as one works with them: probabilities, scores, generation, gaps; and their ensembles.

Models of other tokenizers have the same bytes, so their next-byte distributions can be averaged (arXiv 2410.09303,
section 5): the ensemble's is q(b) = sum over models m of w_m P_m(b | bytes so far), and each model then reads the byte
that was drawn. It is a mixture for each byte, not a Bayesian one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.decoding.byte_exact import NOTHING, ByteState, ExactBytes, value_errors
from jaxtok.decoding.byte_vocabulary import Policy, vocabulary_of
from jaxtok.decoding.engine import Engine, Generation, check_numbers, generate
from jaxtok.decoding.protocols import Drafter, Evictor, SelfDrafter
from jaxtok.decoding.sampling import Sampling, row_keys, sampling_key
from jaxtok.protocols import Params

_BUCKET = 64  # texts are padded to a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteMixture:
    """One or more models of bytes as a `jaxtok.decoding.TokenModel`, whose tokens are the bytes and then `roles`.

    Parameters and states are tuples, one for each member. The symbol -1 leaves a row as it is, so that it can begin one
    that has read its prompt. A special symbol does, too: it should end the row.

    Raises:
      ValueError: there is no model, they agree on no end of a text, or a weight is out of range.
    """

    members: tuple[ExactBytes, ...]
    weights: tuple[float, ...] = ()
    """(): all are equal. They are divided by their sum."""

    def __post_init__(self):
        if not self.members:
            raise ValueError("members is empty; give at least one model.")
        if self.weights and (len(self.weights) != len(self.members) or min(self.weights) <= 0):
            raise ValueError(f"weights is {self.weights}; it must be empty, or have a positive number for each model.")
        if len({member.vocabulary for member in self.members}) > 1 and "eos" not in self.roles:
            raise ValueError("the models have no common symbol for the end of a text; give tokenizers that have one.")

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """What the symbols from 256 on are: those of the only vocabulary, or the roles that all have."""
        first, *others = (member.vocabulary for member in self.members)
        if all(other is first for other in others):
            return first.roles
        named = (role for role in first.roles if role in ("unk", "bos", "eos"))
        return tuple(role for role in named if all(role in other.roles for other in others))

    @functools.cached_property
    def log_weights(self) -> Float[np.ndarray, " members"]:
        """The logarithms of the weights, which sum to 1."""
        weights = np.array(self.weights or (1.0,) * len(self.members))
        return np.log(weights / weights.sum())

    def parts(self, states: Sequence[ByteState]) -> Float[Array, "members batch symbols"]:
        """The log probabilities of the next symbol by each member, among the symbols that all have."""
        found = []
        for member, state in zip(self.members, states):
            index = [*range(256), *(256 + member.vocabulary.roles.index(role) for role in self.roles)]
            chosen = state.next[:, jnp.array(index)]
            total = jax.nn.logsumexp(chosen, -1, keepdims=True)
            found.append(chosen - jnp.where(jnp.isfinite(total), total, 0))
        return jnp.stack(found)

    def combined(self, states: Sequence[ByteState]) -> Float[Array, "batch symbols"]:
        """The log probabilities of the next symbol."""
        return jax.nn.logsumexp(self.parts(states) + self.log_weights[:, None, None], 0)

    def step(self, params: Sequence[Params], tokens: Int[Array, " batch"], state: Any, live: Bool[Array, " batch"]):
        """See `jaxtok.decoding.TokenModel`."""
        states = tuple(m.absorb(p, s, tokens, live) for m, p, s in zip(self.members, params, state, strict=True))
        return self.combined(states), states, live

    @functools.partial(jax.jit, static_argnames="self")
    def read(
        self, params: Sequence[Params], state: Any, text: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "members batch length"], Any]:
        """Each member's log probability of each byte of the texts that follow, and the state after them."""

        def body(n, carry):
            found, states = carry
            byte = text[:, n]
            found = found.at[..., n].set(jnp.take_along_axis(self.parts(states), byte[None, :, None], 2)[..., 0])
            return found, self.step(params, byte, states, n < lengths)[1]

        found = jnp.zeros((len(self.members), *text.shape), state[0].next.dtype)
        return jax.lax.fori_loop(0, lengths.max(), body, (found, tuple(state)))


@dataclasses.dataclass(frozen=True)
class Gap:
    """The special tokens of a model that fills gaps (fill in the middle).

    >>> Gap(prefix=3, suffix=1, middle=2).order
    'psm'
    """

    prefix: int
    suffix: int
    middle: int
    order: Literal["psm", "spm"] = "psm"
    """psm: PREFIX before SUFFIX after MIDDLE; spm: PREFIX SUFFIX after MIDDLE before, and the middle follows."""

    def __post_init__(self):
        if self.order not in ("psm", "spm"):
            raise ValueError(f"order is {self.order!r}; it must be psm or spm.")


@dataclasses.dataclass(frozen=True)
class ByteModel:
    """A mixture of models of bytes with its parameters; usually of one model. `ByteModel.of` makes it."""

    mixture: ByteMixture
    params: tuple[Params, ...]
    begins: tuple[tuple[int, ...], ...]
    """For each model, the tokens that begin every text."""

    @classmethod
    def of(
        cls,
        *models: Any,
        weights: Sequence[float] = (),
        policy: Policy = "truncate",
        slots: int = 0,
        domain: Literal["text", "piece"] = "text",
        validity: Literal["", "canonical", "prefix"] = "",
    ) -> ByteModel:
        """Models of bytes, from what `jaxtok.open` gives.

        Args:
          weights: of the models in the ensemble; default: all are equal.
          policy, slots: see `ExactBytes`.
          domain, validity: see `jaxtok.decoding.byte_vocabulary.vocabulary_of`.

        Raises:
          ValueError: a model is not a causal language model of text, or its tokenizer changes texts.
        """
        members, params, begins = [], [], []
        for model in models:
            if model.tokenizer is None or not hasattr(model.module, "init_cache"):
                raise ValueError(f"{model} is not a causal language model of text; exact bytes need one.")
            vocabulary = vocabulary_of(model.tokenizer, domain, validity)
            members.append(ExactBytes(model=model.module, vocabulary=vocabulary, policy=policy, slots=slots))
            params.append(jax.device_put(model.params))
            begins.append(model.begin or (model.ends or model.tokenizer.special.eos)[:1])
        return cls(ByteMixture(members=tuple(members), weights=tuple(weights)), tuple(params), tuple(begins))

    def prefill(
        self,
        prompts: Sequence[str | bytes],
        new: int = 0,
        contexts: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> tuple[ByteState, ...]:
        """The state after prompts, each of which may end inside a token, or be empty.

        Args:
          new: the most bytes that will follow.
          contexts: for each model, the tokens before each prompt, which goes on after them; default: what begins every
            text.

        Raises:
          ValueError: there is no prompt, or as `ExactBytes.prefill`.
        """
        texts = _bytes(prompts)
        given = [[begin] * len(texts) for begin in self.begins] if contexts is None else contexts
        parts = zip(self.mixture.members, self.params, given, strict=True)
        return tuple(m.prefill(p, texts, c, new=new, inside=contexts is not None) for m, p, c in parts)

    def next_bytes(self, prompts: Sequence[str | bytes]) -> Float[np.ndarray, "batch symbols"]:
        """The log probabilities, in nats, of the 256 bytes and the special tokens (`ByteMixture.roles`)."""
        return np.asarray(self.mixture.combined(self.prefill(prompts)))

    def score(
        self, texts: Sequence[str | bytes], prompts: Sequence[str | bytes] | None = None
    ) -> list[Float[np.ndarray, " bytes"]]:
        """The log probability of each byte of the texts, in nats, given those before it.

        Args:
          prompts: what comes before each text, not scored; default: nothing.

        Raises:
          ValueError: a byte has probability 0, a text is longer than a model's context, or as `prefill`.
        """
        weights, spell = self.mixture.log_weights[:, None], self.mixture.members[0].vocabulary.spell
        result = [np.logaddexp.reduce(values + weights) for values in self.member_scores(texts, prompts)]
        for number, (values, text) in enumerate(zip(result, _bytes(texts))):
            if len(bad := np.flatnonzero(~np.isfinite(values))):
                raise ValueError(
                    f"byte {bad[0]} of text {number}, {spell(text)[bad[0] : bad[0] + 1]!r}, has probability 0: no "
                    "valid token of a model's vocabulary spells it there."
                )
        return result

    def member_scores(
        self, texts: Sequence[str | bytes], prompts: Sequence[str | bytes] | None = None
    ) -> list[Float[np.ndarray, "members bytes"]]:
        """As `score`, by each model of an ensemble; the ensemble's scores for any weights follow from them."""
        scored, before = _bytes(texts), _bytes([b""] * len(texts) if prompts is None else prompts)
        if len(scored) != len(before):
            raise ValueError(f"there are {len(scored)} texts and {len(before)} prompts; give one for each.")
        for member, begin in zip(self.mixture.members, self.begins):
            for number, (start, text) in enumerate(zip(before, scored)):
                count = len(begin) + len(member.vocabulary.tokenizer.encode(start + text))
                if count > (most := member.model.config.max_length):
                    raise ValueError(f"text {number} has {count} tokens; the model's max_length is {most}.")
        rows = [self.mixture.members[0].vocabulary.spell(text) for text in scored]
        length = -(-max(map(len, rows)) // _BUCKET) * _BUCKET or _BUCKET
        array = np.stack([np.frombuffer(row.ljust(length, b"\0"), np.uint8) for row in rows]).astype(np.int32)
        lengths = np.array([*map(len, rows)], np.int32)
        state = self.prefill(before, new=length)
        with value_errors():
            found = np.asarray(self.mixture.read(self.params, state, array, lengths)[0])
        check_numbers(found)
        return [found[:, number, :count] for number, count in enumerate(lengths)]

    def bits_per_byte(self, texts: Sequence[str | bytes], prompts: Sequence[str | bytes] | None = None) -> float:
        """The mean bits of a byte of the texts; comparable across vocabularies."""
        found = np.concatenate(self.score(texts, prompts))
        return float(-found.mean() / math.log(2))

    def generate(
        self,
        prompts: Sequence[str | bytes],
        max_bytes: int,
        *,
        sampling: Sampling = Sampling(),
        rng: jax.Array | None = None,
        contexts: Sequence[Sequence[Sequence[int]]] | None = None,
        on_bytes: Callable[[int, bytes], None] | None = None,
        logprobs: bool = False,
    ) -> list[bytes] | tuple[list[bytes], list[list[float]]]:
        """Continues prompts byte by byte: for ensembles, and for choices that concern bytes. `complete` is faster.

        A row ends with the first special token.

        Args:
          sampling: how each byte is chosen.
          rng: a key; needed unless the temperature is 0.
          contexts: see `prefill`.
          on_bytes: called with the number of a prompt and its new bytes, every few bytes.
          logprobs: also return the log probabilities of the bytes, in nats, with that of the end if there was one.

        Raises:
          ValueError: max_bytes is not positive, there may be no room for so many, or as `prefill`.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; it must be at least 1.")
        state = self.prefill(prompts, max_bytes, contexts)
        for member, its in zip(self.mixture.members, state):
            used, most = int((its.start + 1 + its.length).max()), member.model.config.max_length
            if used + max_bytes > most:
                raise ValueError(
                    f"a prompt takes up to {used} tokens, and max_bytes = {max_bytes} up to as many; the model's "
                    f"max_length is {most}."
                )
        symbols = 256 + len(self.mixture.roles)
        engine = Engine(model=self.mixture, chooser=sampling)
        nothing = np.full((len(prompts), 1), NOTHING, np.int32)
        begun = engine.begin(state, nothing, new=max_bytes, rng=rng, stop=range(256, symbols))
        unspell = self.mixture.members[0].vocabulary.unspell
        texts, numbers = [b""] * len(prompts), [[] for _ in prompts]
        with value_errors():
            for piece, _ in engine.stream(self.params, begun, 16 if on_bytes else None):
                for row, (tokens, values) in enumerate(zip(piece.tokens, piece.logprobs)):
                    new = bytes(token for token in tokens if token < 256)
                    texts[row] += new
                    numbers[row] += values
                    if on_bytes and new:
                        on_bytes(row, new)
        texts = [unspell(text) for text in texts]
        return (texts, numbers) if logprobs else texts

    def complete(
        self,
        prompts: Sequence[str | bytes],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),
        rng: jax.Array | None = None,
        contexts: Sequence[Sequence[int]] | None = None,
        stop_at_end: bool = True,
        drafter: Drafter | SelfDrafter | None = None,
        drafter_state: Any = None,
        evictor: Evictor | None = None,
        on_bytes: Callable[[int, bytes], None] | None = None,
        on_end: Callable[[Generation], None] | None = None,
    ) -> list[bytes]:
        """Continues prompts token by token: draws a cover of each prompt with its probability, and goes on after it.

        The texts have the distribution of those drawn byte by byte, if the model gives no mass to invalid tokens or
        the policy is truncate_renormalize (then, here, only for the cover: later tokens are the model's own). Drafts
        and evictors are those of `jaxtok.decoding.generate`: the model is a target for drafts as it is without covers.

        Args:
          sampling: how each later token is chosen. At temperature 0 the likeliest cover is taken.
          contexts: the tokens before each prompt, which goes on after them; default: what begins every text.
          drafter, drafter_state, evictor: as of `jaxtok.decoding.generate`.
          on_bytes: called with the number of a prompt and its new bytes, every few tokens.
          on_end: called with the generation of the tokens after the covers, in whose state is the drafter's.

        Raises:
          ValueError: this is an ensemble, which has no tokens; or as `prefill` and `jaxtok.decoding.generate`.
        """
        if len(self.mixture.members) > 1:
            raise ValueError("an ensemble has no tokens of its own; generate its text byte by byte.")
        (member,), (params,) = self.mixture.members, self.params
        vocabulary, rng = member.vocabulary, sampling_key(rng, sampling)
        before = [self.begins[0]] * len(prompts) if contexts is None else contexts
        (state,) = self.prefill(prompts, contexts=None if contexts is None else [contexts])
        cover_key, token_key = jax.random.split(rng)
        slots, tokens = _drawn(member, state, row_keys(cover_key, len(prompts)), sampling.temperature == 0)
        ids, extra = [], []
        for row, text in enumerate(_bytes(prompts)):
            chain, rest = vocabulary.anchored(text, inside=contexts is not None)
            open_ = next(open_ for open_, _ in member.open(state, row) if open_.slot == slots[row])
            cover = [*open_.tokens, *([int(tokens[row])] if tokens[row] >= 0 else [])]
            ids.append([*before[row], *chain, *cover])
            extra.append(b"".join(vocabulary.strings[i] for i in cover)[len(rest) :])
            if on_bytes and extra[row]:
                on_bytes(row, vocabulary.unspell(extra[row]))

        def spelled(row: Sequence[int]) -> bytes:
            return vocabulary.unspell(b"".join(vocabulary.strings[i] for i in row))

        def report(piece) -> None:
            for row, new in enumerate(piece.tokens):
                if text := spelled(new):
                    on_bytes(row, text)

        made = generate(
            member.model,
            params,
            ids,
            max_new_tokens=max_new_tokens,
            chooser=sampling,
            drafter=drafter,
            drafter_state=drafter_state,
            evictor=evictor,
            rng=token_key,
            stop_tokens=vocabulary.specials if stop_at_end else (),
            num_ids=member.ids,
            on_tokens=report if on_bytes else None,
            chunk=4,
        )
        if on_end:
            on_end(made)
        return [vocabulary.unspell(text) + spelled(row) for text, row in zip(extra, made.tokens)]

    def gap_prompts(
        self, befores: Sequence[str | bytes], afters: Sequence[str | bytes], gap: Gap
    ) -> tuple[list[bytes], list[list[int]]]:
        """The prompts and contexts by which `complete` and `generate` fill gaps, whose ends may be inside tokens.

        In the order spm, the text before the gap is the prompt. In psm, a sentinel closes it, so the bytes after its
        last safe boundary are moved after the middle's sentinel, as the prompt: the middle then begins with them.
        """
        if len(self.mixture.members) > 1:
            raise ValueError("an ensemble has no common tokens for gaps; give one model.")
        (begin,), vocabulary = self.begins, self.mixture.members[0].vocabulary
        prompts, contexts = [], []
        for before, after in zip(_bytes(befores), _bytes(afters), strict=True):
            suffix = vocabulary.rule.encode(after)
            cut = 0 if gap.order == "spm" else vocabulary.rule.anchor(before)
            prefix = vocabulary.rule.encode(before[:cut])
            if gap.order == "spm":
                contexts.append([*begin, gap.prefix, gap.suffix, *suffix, gap.middle])
            else:
                contexts.append([*begin, gap.prefix, *prefix, gap.suffix, *suffix, gap.middle])
            prompts.append(before[cut:])
        return prompts, contexts

    def fill(
        self,
        befores: Sequence[str | bytes],
        afters: Sequence[str | bytes],
        gap: Gap,
        max_new_tokens: int,
        **options: Any,
    ) -> list[bytes]:
        """Fills the gap between each pair of texts; see `gap_prompts`, and `complete` for the options."""
        prompts, contexts = self.gap_prompts(befores, afters, gap)
        return self.complete(prompts, max_new_tokens, contexts=contexts, **options)


@functools.partial(jax.jit, static_argnames=("member", "likeliest"))
def _drawn(member: ExactBytes, state: ByteState, keys, likeliest: bool):
    return member.draw(state, keys, likeliest)


def _bytes(texts: Sequence[str | bytes]) -> list[bytes]:
    if not len(texts):
        raise ValueError("there is no text; give at least one.")
    return [text.encode() if isinstance(text, str) else bytes(text) for text in texts]


def generate_exact(
    model: Any,
    prompts: Sequence[str | bytes],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> list[bytes]:
    """Continues prompts that may end anywhere, also inside a token, with what `jaxtok.open` gives; returns new bytes.

    Args:
      temperature, top_k, top_p, seed: as of `jaxtok.model.Model.generate_bytes`.
      options: of `ByteModel.complete`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    byte_model = ByteModel.of(model)
    return byte_model.complete(prompts, max_new_tokens, sampling=sampling, rng=jax.random.key(seed), **options)
