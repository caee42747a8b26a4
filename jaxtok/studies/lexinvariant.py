"""What a lexinvariant model can do: predict, decipher, and find out in context what symbols are for (arXiv 2305.16349).

Three sets of numbers, each with its baselines, for any task of `jaxtok.lm.lexinvariant.LexinvariantModeling`:

* the loss against the position in the context, on plain text and on text with renamed symbols, next to adaptive unigram
  and bigram models, which are lexinvariant too;
* deciphering: a probe on the frozen hidden states names the true symbols of the random vectors;
* LookUp and Permutation, whose symbols and even separators are drawn anew for each example.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float, Int, Key

from jaxtok.data.text import TextData
from jaxtok.lm.lexinvariant import Bin, LexinvariantModeling, position_edges, sequence_keys
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.protocols import Batch, Params
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.comparison import key as result_key

# --- Adaptive n-grams: what repetition alone predicts. ---


@functools.partial(jax.jit, static_argnames="vocab")
def adaptive_unigram(
    tokens: Int[Array, "batch length"],
    targets: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    vocab: int,
    a: float = 0.2,
) -> Float[Array, "batch length"]:
    """-log p(target), with p(v) = (c(v) + a) / (t + a vocab) and c(v) the number of v among the t tokens of the
    document so far. A document begins where the position is 0."""
    return _adaptive(tokens, targets, positions, vocab, a, None)


@functools.partial(jax.jit, static_argnames="vocab")
def adaptive_bigram(
    tokens: Int[Array, "batch length"],
    targets: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    vocab: int,
    a: float = 0.2,
    b: float = 5.0,
) -> Float[Array, "batch length"]:
    """-log p(target), with p(v) = (c(x, v) + b p_unigram(v)) / (c(x) + b): x is the last token, c(x, v) how often v
    followed it in the document so far, and c(x) the sum of that over v."""
    return _adaptive(tokens, targets, positions, vocab, a, b)


def _adaptive(tokens, targets, positions, vocab, a, b):
    rows = jnp.arange(tokens.shape[0])

    def step(carry, now):
        single, pairs, last = carry
        token, target, position = now
        fresh = position == 0
        single = jnp.where(fresh[:, None], 0.0, single).at[rows, token].add(1)
        p = (single[rows, target] + a) / (single.sum(1) + a * vocab)
        if b is not None:
            pairs = jnp.where(fresh[:, None, None], 0.0, pairs).at[rows, last, token].add(jnp.where(fresh, 0.0, 1.0))
            p = (pairs[rows, token, target] + b * p) / (pairs[rows, token].sum(-1) + b)
        return (single, pairs, token), -jnp.log(p)

    batch = tokens.shape[0]
    start = (jnp.zeros((batch, vocab)), jnp.zeros((batch, vocab, vocab if b is not None else 0)), tokens[:, 0])
    _, nats = jax.lax.scan(step, start, (tokens.T, targets.T, positions.T))
    return nats.T


def ngrams_by_position(
    batches: Iterable[Batch], vocab: int, *, edges: tuple[int, ...] = (), a: float = 0.2, b: float = 5.0
) -> dict[str, list[Bin]]:
    """Returns the loss of both n-grams by position, as `LexinvariantModeling.nats_by_position` does for a model."""
    models = {
        "unigram": functools.partial(adaptive_unigram, vocab=vocab, a=a),
        "bigram": functools.partial(adaptive_bigram, vocab=vocab, a=a, b=b),
    }
    sums: dict[str, Any] = {name: 0.0 for name in models}
    tokens: Any = 0.0
    for batch in batches:
        edges = edges or position_edges(batch["tokens"].shape[1])
        bins = np.searchsorted(edges, batch["positions"], side="right") - 1
        inside = (bins[..., None] == np.arange(len(edges) - 1)) * np.asarray(batch["mask"])[..., None]
        tokens = tokens + inside.sum((0, 1))
        for name, model in models.items():
            nats = np.asarray(model(batch["tokens"], batch["targets"], batch["positions"]), np.float64)
            sums[name] = sums[name] + np.einsum("bl,blk->k", nats, inside)
    return {
        name: [
            Bin(first, stop - 1, float(sums[name][k] / max(tokens[k], 1)), 0.0, float(tokens[k]))
            for k, (first, stop) in enumerate(itertools.pairwise(edges))
        ]
        for name in models
    }


def tuned_unigram(batches: Sequence[Batch], vocab: int, choices: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)) -> float:
    """Returns the choice of a with the smallest loss on the batches, which should be of the training text."""

    def loss(a):
        args = [(batch["tokens"], batch["targets"], batch["positions"]) for batch in batches]
        return sum(
            float((adaptive_unigram(*x, vocab, a) * batch["mask"]).sum())
            for x, batch in zip(args, batches, strict=True)
        )

    return min(choices, key=loss)


# --- Deciphering: which true symbol each random vector stands for. ---


class Probe(nn.Module):
    """An MLP of two layers on a hidden state: d_model -> 4 d_model -> vocab, float32."""

    vocab: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        hidden = hidden.astype(jnp.float32)
        return nn.Dense(self.vocab)(nn.gelu(nn.Dense(4 * hidden.shape[-1])(hidden)))


def train_probe(
    task: LexinvariantModeling,
    params: Params,
    batches: Iterator[Batch],
    *,
    steps: int = 300,
    target: Literal["tokens", "targets"] = "tokens",
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Params:
    """Trains a probe that tells the true symbol from the frozen model's hidden state, with new vectors in each step.

    Args:
      batches: batches of the training text.
      target: "tokens": the symbol at the position itself; "targets": the one after it.

    Raises:
      ValueError: a number is too small, or the target is unknown.
    """
    if steps < 1 or learning_rate <= 0:
        raise ValueError(f"steps is {steps} and learning_rate {learning_rate}; both must be positive.")
    if target not in ("tokens", "targets"):
        raise ValueError(f"target is {target!r}; it must be tokens or targets.")
    rng = jax.random.key(seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    probe = Probe(task.model.vocab_size).init(rng, jnp.zeros((1, task.model.d_model)))["params"]
    state = optimizer.init(probe)

    @jax.jit
    def update(probe, state, batch, key):
        hidden = _hidden(task, params, batch, sequence_keys(key, batch["tokens"].shape[0]))

        def loss(probe):
            return masked_mean(
                cross_entropy(Probe(task.model.vocab_size).apply({"params": probe}, hidden), batch[target]),
                batch["mask"],
            )

        updates, state = optimizer.update(jax.grad(loss)(probe), state)
        return optax.apply_updates(probe, updates), state

    for step in range(steps):
        probe, state = update(probe, state, dict(next(batches)), jax.random.fold_in(rng, step + 1))
    return probe


def decipher(
    log_probabilities: Float[np.ndarray, "length vocab"], cipher: Int[np.ndarray, " length"], prefixes: Sequence[int]
) -> Int[np.ndarray, "prefixes vocab"]:
    """Returns the true symbol of each cipher symbol, as far as each prefix of a text tells: the one-to-one map with the
    largest sum of log-probabilities over the positions of the prefix.

    Args:
      log_probabilities: those of a probe, of the true symbol at each position.
      cipher: the symbols of the text.
      prefixes: the lengths of the prefixes.
    """
    vocab = log_probabilities.shape[1]
    scores = [_scores(log_probabilities[:stop], cipher[:stop], vocab) for stop in prefixes]
    return np.stack([scipy.optimize.linear_sum_assignment(score, maximize=True)[1] for score in scores])


def _scores(log_probabilities, cipher, vocab):
    scores = np.zeros((vocab, vocab))
    np.add.at(scores, cipher, log_probabilities)
    return scores


class Deciphered(NamedTuple):
    """The shares of tokens whose true symbol is found, at the positions `first` to `last` of a row, both included."""

    first: int
    last: int
    probe: float
    """The share that the probe finds at the position alone."""
    mapped: float
    """The share that the map from all positions up to `last` finds, among the tokens of these positions."""
    tokens: float


def cipher_accuracy(
    task: LexinvariantModeling, params: Params, probe: Params, batches: Iterable[Batch], *, edges: tuple[int, ...] = ()
) -> list[Deciphered]:
    """Returns how much of a text with new symbols is read, by position in the row; a row's documents share a cipher.

    As the vectors are random, the model sees any text in cipher: each token is its own true symbol.
    """
    right: Any = 0.0
    for number, batch in enumerate(batches):
        edges = edges or position_edges(batch["tokens"].shape[1])
        key = jax.random.fold_in(jax.random.key(task.seed), number)
        log_p = np.asarray(_probed(task, params, probe, dict(batch), key))
        tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"]) > 0
        hits = (log_p.argmax(-1) == tokens) & mask
        sums = np.zeros((len(edges) - 1, 4))
        for k, (first, stop) in enumerate(itertools.pairwise(edges)):
            sums[k, :2] = hits[:, first:stop].sum(), mask[:, first:stop].sum()
        for row, real, scores in zip(tokens, mask, log_p, strict=True):
            stops = [int(real[:stop].sum()) for stop in edges[1:]]
            maps = decipher(scores[real], row[real], stops)
            for k, stop in enumerate(stops):
                sums[k, 2:] += (maps[k][row[real][:stop]] == row[real][:stop]).sum(), stop
        right = right + sums
    return [
        Deciphered(first, stop - 1, *(float(s / max(n, 1)) for s, n in (sums[:2], sums[2:])), float(sums[1]))
        for (first, stop), sums in zip(itertools.pairwise(edges), right, strict=True)
    ]


def _hidden(task, params, batch, keys):
    model = task.module()
    embedded = model.apply({"params": params}, batch["tokens"], keys=keys, method="embed")
    options = {"positions": batch["positions"], "segments": batch["segments"]}
    hidden, _ = model.apply({"params": params}, embedded, **options, method="hidden")
    return jax.lax.stop_gradient(hidden)


@functools.partial(jax.jit, static_argnums=0)
def _probed(task, params, probe, batch, key):
    hidden = _hidden(task, params, batch, sequence_keys(key, batch["tokens"].shape[0]))
    return jax.nn.log_softmax(Probe(task.model.vocab_size).apply({"params": probe}, hidden))


# --- Symbolic tasks in context. ---


class Examples(NamedTuple):
    """Prompts, followed by their answers."""

    tokens: Int[Array, "examples length"]
    answers: int
    """How many tokens at the end are the answer."""
    chance: tuple[float, ...]
    """The chance of guessing each answer among the symbols that it can be; then that of all answers, if several."""


def lookup(key: Key[Array, ""], count: int, pairs: int, vocab: int) -> Examples:
    """Makes `k1 : v1 , k2 : v2 , ... , q : v_q`, with q among the keys. Keys, values, `:` and `,` all differ.

    Raises:
      ValueError: the vocabulary has too few symbols, or there are no pairs.
    """
    _enough(2 * pairs + 2, vocab, pairs, "pairs")

    def one(key):
        names, query = jax.random.split(key)
        symbols = jax.random.permutation(names, vocab)
        keys, values, (colon, comma) = symbols[:pairs], symbols[pairs : 2 * pairs], symbols[2 * pairs : 2 * pairs + 2]
        asked = jax.random.randint(query, (), 0, pairs)
        context = jnp.stack([keys, jnp.full_like(keys, colon), values, jnp.full_like(keys, comma)], 1)
        return jnp.concatenate([context.ravel(), jnp.stack([keys[asked], colon, values[asked]])])

    return Examples(jax.vmap(one)(jax.random.split(key, count)), 1, (1 / pairs,))


def permutation(key: Key[Array, ""], count: int, examples: int, k: int, vocab: int) -> Examples:
    """Makes, for k = 3, `a b c > b c a , d e f > e f d , ... g h i > h i g`, with one permutation in each prompt.

    Raises:
      ValueError: the vocabulary has too few symbols, or there are no examples.
    """
    _enough(k * (examples + 1) + 2, vocab, min(examples, k), "the smaller of examples and k")

    def one(key):
        names, order = jax.random.split(key)
        symbols = jax.random.permutation(names, vocab)
        arrow, comma = symbols[-2], symbols[-1]
        groups = symbols[: k * (examples + 1)].reshape(-1, k)
        moved = groups[:, jax.random.permutation(order, k)]
        column = lambda symbol: jnp.full((examples + 1, 1), symbol)  # noqa: E731
        return jnp.concatenate([groups, column(arrow), moved, column(comma)], 1).ravel()[:-1]

    tokens = jax.vmap(one)(jax.random.split(key, count))
    return Examples(tokens, k, (*(1 / (k - i) for i in range(k)), 1 / math.factorial(k)))


def _enough(symbols, vocab, least, what):
    if least < 1:
        raise ValueError(f"{what} is {least}; it must be at least 1.")
    if symbols > vocab:
        raise ValueError(f"an example has {symbols} different symbols, but the vocabulary has {vocab}; ask for fewer.")


def solve(task: LexinvariantModeling, params: Params, examples: Examples, *, seed: int = 0) -> tuple[float, ...]:
    """Returns the share of examples in which the likeliest symbol is the answer, for each answer (after the right ones
    before it), and for all of them if there are several.

    Raises:
      ValueError: the examples are longer than the model's context.
    """
    keys = sequence_keys(jax.random.key(seed), examples.tokens.shape[0])
    return _shares(_answers(task, examples.answers, params, examples.tokens, keys))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(task, answers, params, tokens, keys):
    logits, _ = task.module().apply({"params": params}, tokens[:, :-1], keys=keys)
    return logits[:, -answers:].argmax(-1) == tokens[:, -answers:]


def copy_last(examples: Examples) -> tuple[float, ...]:
    """Returns what `solve` does, for the rule: what followed the last symbol when it came before (else that symbol)."""

    def rule(prompt):
        earlier = np.flatnonzero(prompt[:-1] == prompt[-1])
        return prompt[earlier[-1] + 1] if len(earlier) else prompt[-1]

    return _ruled(examples, rule)


def most_frequent(examples: Examples) -> tuple[float, ...]:
    """Returns what `solve` does, for the rule: the most frequent symbol of the prompt, the first of several."""

    def rule(prompt):
        symbols, first, counts = np.unique(prompt, return_index=True, return_counts=True)
        return symbols[np.lexsort((first, -counts))[0]]

    return _ruled(examples, rule)


def _ruled(examples, rule):
    tokens = np.asarray(examples.tokens)
    answers = range(tokens.shape[1] - examples.answers, tokens.shape[1])
    return _shares(np.array([[rule(row[:k]) == row[k] for k in answers] for row in tokens]))


def _shares(right) -> tuple[float, ...]:
    right = np.asarray(right)
    each = tuple(float(share) for share in right.mean(0))
    return each if len(each) == 1 else (*each, float(right.all(1).mean()))


# --- Measures of a comparison, and its picture. ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPosition:
    """Measures the loss by position on plain text and on text with renamed symbols, and that of n-grams on it."""

    batches: int = 8
    split: Literal["validation", "test"] = "test"

    def __call__(self, task: LexinvariantModeling, params: Params, data: TextData) -> dict[str, float]:
        def text():
            return dataclasses.replace(data, eval_limit=self.batches).eval_batches(self.split)

        train = list(itertools.islice(data.train_batches(), 4))
        vocab = task.model.vocab_size
        curves = {
            "plain": task.nats_by_position(params, text()),
            "permuted": task.nats_by_position(params, text(), permuted=True),
            **ngrams_by_position(text(), vocab, a=tuned_unigram(train, vocab)),
        }
        return {
            f"{curve}_{part.first}_{part.last}{suffix}": value
            for curve, bins in curves.items()
            for part in bins
            for suffix, value in (("", part.nats), ("_stderr", part.stderr))
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cipher:
    """Measures how much of a text is read: by a probe in the last bin of positions, by the map of whole rows, and by
    always naming the commonest symbol."""

    steps: int = 300
    batches: int = 8
    split: Literal["validation", "test"] = "test"

    def __call__(self, task: LexinvariantModeling, params: Params, data: TextData) -> dict[str, float]:
        probe = train_probe(task, params, data.train_batches(), steps=self.steps)
        text = list(dataclasses.replace(data, eval_limit=self.batches).eval_batches(self.split))
        *_, last = cipher_accuracy(task, params, probe, text)
        real = np.concatenate([batch["tokens"][batch["mask"] > 0] for batch in text])
        commonest = float(np.bincount(real).max() / real.size)
        return {"cipher_probe": last.probe, "cipher_map": last.mapped, "cipher_chance": commonest}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContext:
    """Measures LookUp and Permutation: the shares of right answers, and those of chance and of the rules."""

    pairs: tuple[int, ...] = (2, 4, 8)
    examples: tuple[int, ...] = (1, 2, 4)
    k: int = 3
    count: int = 512
    seed: int = 0

    def __call__(self, task: LexinvariantModeling, params: Params, data: TextData) -> dict[str, float]:
        key, vocab = jax.random.key(self.seed), task.model.vocab_size
        prompts = {f"lookup_{n}": lookup(jax.random.fold_in(key, n), self.count, n, vocab) for n in self.pairs}
        prompts |= {
            f"permutation_{n}": permutation(jax.random.fold_in(key, 100 + n), self.count, n, self.k, vocab)
            for n in self.examples
        }
        found = {}
        for name, prompt in prompts.items():
            rows = {
                "": solve(task, params, prompt, seed=self.seed),
                "_chance": prompt.chance,
                "_copy_last": copy_last(prompt),
                "_most_frequent": most_frequent(prompt),
            }
            for suffix, shares in rows.items():
                found[f"{name}{suffix}"] = shares[-1]
                if len(shares) > 1:
                    found[f"{name}_first{suffix}"] = shares[0]
        return found


def plot_by_position(curves: dict[str, Sequence[Bin]], path: Path, *, uniform: float = 0.0) -> Path:
    """Plots loss against position: a line for each label, with its standard error, dashed if the label says permuted.

    Args:
      uniform: draw a line at this loss too, if it is positive.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    models = list(dict.fromkeys(label.split(",")[0] for label in curves))
    colors = dict(zip(models, itertools.cycle(plt.get_cmap("tab10").colors)))
    for label, bins in curves.items():
        centers = [math.sqrt((part.first + 1) * (part.last + 1)) for part in bins]
        style = {"color": colors[label.split(",")[0]], "linestyle": "--" if "permuted" in label else "-"}
        bars = [part.stderr for part in bins]
        axes.errorbar(centers, [part.nats for part in bins], bars, label=label, marker="o", markersize=3, **style)
    if uniform:
        axes.axhline(uniform, color="gray", linewidth=0.8, label="uniform")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("nats a token")
    axes.set_title("Loss by position, on plain and on permuted text (dashed)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LexinvariantStudy(Comparison):
    """A comparison that also plots its arms' losses by position, if `ByPosition` is among its measures."""

    def run(self) -> bool:
        """Runs the comparison; also writes by_position.png, of the first seed."""
        if not super().run():
            return False
        folder = Path(self.workdir)
        results = json.loads((folder / "results.json").read_text())
        curves = {}
        for arm in self.arms:
            numbers = results[result_key(arm.name, self.seeds[0])]["test"]
            curves |= {f"{arm.name}, {kind}": curve_of(numbers, kind) for kind in ("plain", "permuted")}
        curves |= {f"adaptive {kind}": curve_of(numbers, kind) for kind in ("unigram", "bigram")}
        if found := {label: bins for label, bins in curves.items() if bins}:
            plot_by_position(found, folder / "by_position.png", uniform=math.log(self.arms[0].task.model.vocab_size))
        return True


def curve_of(numbers: dict[str, float], kind: str) -> list[Bin]:
    """Returns one of the curves that `ByPosition` measured."""
    bins = []
    for name, nats in numbers.items():
        if match := re.fullmatch(rf"{kind}_(\d+)_(\d+)", name):
            bins.append(Bin(int(match[1]), int(match[2]), nats, numbers[f"{name}_stderr"], 0.0))
    return bins
