"""Token models that are tables, and toy tokenizers, for the tests of exact bytes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtok.decoding.byte_exact import ExactBytes
from jaxtok.decoding.byte_vocabulary import vocabulary_of
from jaxtok.nn.cache import KVCache
from jaxtok.protocols import Special


class Toy:
    """A tokenizer of a list of strings, whose last id, without bytes, ends and begins a text. Without merges, it takes
    the longest match."""

    name = "toy"

    def __init__(self, vocab: Sequence[str], merges: Sequence[Sequence[str]] | None = None):
        self._pieces = [*(text.encode() for text in vocab), b""]
        self.vocab_size, self.eod_id = len(self._pieces), len(vocab)
        self.special = Special(eos=(self.eod_id,))
        self._ids = {text: i for i, text in enumerate(self._pieces) if text}
        self._merges = None if merges is None else [tuple(part.encode() for part in pair) for pair in merges]
        self.byte_pairs = merges is not None

    def merges(self):
        return self._merges

    def token_bytes(self, token_id):
        return self._pieces[token_id]

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids))

    def encode(self, text):
        text = text.encode() if isinstance(text, str) else text
        parts = [text[i : i + 1] for i in range(len(text))]
        if any(part not in self._ids for part in parts):
            raise ValueError("a character is missing")
        return self._longest(text) if self._merges is None else self._merged(parts)

    def _longest(self, text):
        found = []
        while text:
            match = max((piece for piece in self._ids if text.startswith(piece)), key=len)
            found.append(self._ids[match])
            text = text[len(match) :]
        return found

    def _merged(self, parts):
        ranks = {pair: rank for rank, pair in reversed([*enumerate(self._merges)])}
        while True:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, math.inf), default=None)
            if best not in ranks:
                return [self._ids[part] for part in parts]
            at = next(i for i, pair in enumerate(itertools.pairwise(parts)) if pair == best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    max_length: int = 256
    num_layers: int = 1


@dataclasses.dataclass(frozen=True)
class FirstOrder:
    """A CausalLM whose parameters are the log probabilities after each token."""

    config: Config

    def init_cache(self, batch, length):
        return KVCache.init(1, batch, length, 1, 1)

    def apply(self, variables, tokens, *, cache, positions, **options):
        return variables["params"][tokens], cache.advance(positions)


@dataclasses.dataclass(frozen=True)
class Histories:
    """A CausalLM whose parameters are histories as sorted numbers, and the log probabilities after each.

    It finds the history in the slots that it sees, at the positions from 1 on, as a real model does.
    """

    config: Config
    length: int

    def init_cache(self, batch, length):
        return KVCache.init(1, batch, length, 1, 1)

    def apply(self, variables, tokens, *, cache, positions=None, **options):
        numbers, table = variables["params"]
        positions = cache.next_position[:, None] if positions is None else positions
        cache = cache.advance(positions).append(0, tokens[..., None, None] + 1, tokens[..., None, None])
        at = cache.positions[0, :, :, 0]
        seen = (at[:, None] > 0) & (at[:, None] <= positions[..., None])
        base = float(self.config.vocab_size + 1)
        digits = jnp.where(seen, cache.keys[0, :, None, :, 0, 0] * base ** (at[:, None] - 1.0), 0)
        number = digits.astype(numbers.dtype).sum(-1)
        row = jnp.minimum(jnp.searchsorted(numbers, number), len(numbers) - 1)
        return jnp.where((numbers[row] == number)[..., None], table[row], 0.0), cache


def induced(config: dict[str, Any], arrays: Mapping[str, np.ndarray], tokenizer: Any) -> tuple[Histories, Any]:
    """The token model of a Markov chain over strings of n symbols, in float64, and its parameters."""
    letters, n, eos = config["alphabet"].encode(), config["n"], config["eos"]
    initial, transition = arrays["in/initial"], arrays["in/transition"]
    order = round(math.log(len(transition), len(letters)))
    mass: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(eos + 1))
    for symbols in itertools.product(range(len(letters)), repeat=n):
        p = math.prod(initial[symbol] for symbol in symbols[:order])
        for end in range(order, n):
            row = functools.reduce(lambda row, symbol: row * len(letters) + symbol, symbols[end - order : end], 0)
            p *= transition[row, symbols[end]]
        tokens = [*tokenizer.encode(bytes(letters[symbol] for symbol in symbols)), eos]
        for end, token in enumerate(tokens):
            mass[tuple(tokens[:end])][token] += p
    base = eos + 2
    numbers = np.array([sum((token + 1) * base**i for i, token in enumerate(tokens)) for tokens in mass])
    table = np.stack([row / row.sum() for row in mass.values()])
    order = np.argsort(numbers)
    with np.errstate(divide="ignore"):
        return Histories(Config(eos + 1), n), (jnp.asarray(numbers[order]), jnp.log(jnp.asarray(table[order])))


def exact(model, tokenizer, policy="truncate", slots=0, **options) -> ExactBytes:
    return ExactBytes(model=model, vocabulary=vocabulary_of(tokenizer, **options), policy=policy, slots=slots)
