"""How random the tokens of images are, and how far a model of them looks (ELM's section 3).

The authors claim that the tokens of images are close to uniform and to independent, so that a language model of them
keeps a high loss although its pictures are good; and that models of all sizes attend to neighbours, and only large ones
also further away. No code of these analyses was released, so the definitions are ours. Everything is in nats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Int

from jaxtok.data.codes import CodeFile, regroup
from jaxtok.protocols import Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Plug-in estimates, in nats. At n samples of V values, the divergence is too high by about (V - 1) / 2n."""

    kl_unigram: float
    """The divergence of tokens from uniform: ln V - H."""
    kl_bigram: float
    """The divergence of pairs of neighbours in a row of tokens from uniform: 2 ln V - H."""
    entropy: float
    bigram_mutual_information: float
    """H(first) + H(second) - H(pair)."""
    usage: float
    """The fraction of the vocabulary that occurs."""
    perplexity: float
    samples: int
    """The number of tokens."""
    bias: float
    """The bias of `kl_unigram`, (V - 1) / 2n."""


def token_statistics(tokens: Int[np.ndarray, "rows length"], vocab_size: int) -> TokenStatistics:
    """The statistics of rows of tokens; each is an image in raster order, or a piece of text.

    Raises:
      ValueError: the rows have fewer than two tokens, or a token is out of range.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(f"tokens have the shape {tokens.shape}; they must be [rows, at least 2 tokens].")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(
            f"there is the token {wrong}; with vocab_size = {vocab_size}, tokens are 0 to {vocab_size - 1}."
        )
    first, second = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    entropy, pair = entropy_of(tokens), entropy_of(first * vocab_size + second)
    return TokenStatistics(
        kl_unigram=math.log(vocab_size) - entropy,
        kl_bigram=2 * math.log(vocab_size) - pair,
        entropy=entropy,
        bigram_mutual_information=entropy_of(first) + entropy_of(second) - pair,
        usage=len(np.unique(tokens)) / vocab_size,
        perplexity=math.exp(entropy),
        samples=tokens.size,
        bias=(vocab_size - 1) / (2 * tokens.size),
    )


def entropy_of(values: Int[np.ndarray, ...]) -> float:
    """Of how often each value occurs."""
    return float(scipy.stats.entropy(np.unique(values, return_counts=True)[1]))


def stored_tokens(file: CodeFile, images: int = 0) -> Int[np.ndarray, "images positions"]:
    """The first draws of stored images as rows of tokens: all sub-codes of a position as one number.

    Args:
      images: the number of images, the first ones; 0: all.

    Raises:
      ValueError: a position has more than 2^24 values.
    """
    values = file.header.values
    if math.prod(values) > 2**24:
        raise ValueError(
            f"a position has {' x '.join(map(str, values))} values; for statistics it must have at most 2^24."
        )
    return regroup(np.asarray(file.codes[: images or None, 0]), values, (math.prod(values),))[..., 0].astype(np.int32)


def compare_tokens(
    sources: Mapping[str, Int[np.ndarray, "rows length"]], vocab_size: int
) -> dict[str, TokenStatistics]:
    """Statistics of several kinds of tokens with one vocabulary size, such as images' and text's, from equal samples.

    All are cut to the length of the shortest rows and to the smallest number of rows, as the estimates depend on the
    size of the sample.

    Raises:
      ValueError: as `token_statistics`; or there is no source.
    """
    if not sources:
        raise ValueError("there is no source of tokens to compare; give at least one.")
    rows, length = (min(np.shape(tokens)[axis] for tokens in sources.values()) for axis in (0, 1))
    return {name: token_statistics(np.asarray(x)[:rows, :length], vocab_size) for name, x in sources.items()}


def plot_statistics(found: Mapping[str, TokenStatistics], path: Path) -> Path:
    """Bars of the divergences from uniform and of the mutual information, by the names of the sources."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    fields = {
        "kl_unigram": "unigrams from uniform",
        "kl_bigram": "bigrams from uniform",
        "bigram_mutual_information": "mutual information\nof neighbours",
    }
    width = 0.8 / len(found)
    for number, (name, statistics) in enumerate(found.items()):
        heights = [getattr(statistics, field) for field in fields]
        label = f"{name} ({statistics.samples:,} tokens)"
        axes.bar(np.arange(len(fields)) + number * width, heights, width, label=label)
    axes.set_xticks(np.arange(len(fields)) + 0.4 - width / 2, list(fields.values()))
    axes.set_ylabel("nats")
    axes.set_title("How far tokens are from uniform and independent")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def attention_locality(
    attention: Float[Array, "... rows places"], cells: Int[Array, "places axes"]
) -> tuple[Float[Array, " ..."], Float[Array, " ..."]]:
    """How far attention reaches: the mean distance in cells, and the fraction of it in the query's cell and the cells
    that touch it.

    Args:
      attention: the weights of each query (a row) on the places; they are divided by their sum.
      cells: the cell of each place (row and column, or depth, row and column); the queries are at the same places.
    """
    attention = attention / jnp.maximum(attention.sum(-1, keepdims=True), 1e-30)
    offsets = cells[:, None].astype(jnp.float32) - cells[None].astype(jnp.float32)
    distance, near = jnp.sqrt((offsets**2).sum(-1)), jnp.abs(offsets).max(-1) <= 1
    return (attention * distance).sum(-1).mean(-1), (attention * near).sum(-1).mean(-1)


@runtime_checkable
class MapsAttention(Protocol):
    """A task whose model of codes shows the attention between the places of an image."""

    def attention_maps(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> Float[Array, "layers batch heads places places"]:
        """The weights of each query (a row) on the places; the key is for a model that hides some of them."""
        ...

    def attention_cells(self) -> Int[np.ndarray, "places axes"]:
        """The cell of each place in the codes' shape: its row and column, or its depth, row and column."""
        ...


def locality(
    task: MapsAttention, params: Params, batches: Iterable[Batch]
) -> dict[str, Float[np.ndarray, "layers heads"]]:
    """The distance and local mass of attention (`attention_locality`) for each layer and head, as means over images.

    A model that hides some of the positions hides the same ones in every call.

    Raises:
      ValueError: there is no image.
    """
    sums: Any = 0.0
    count = 0.0
    for number, batch in enumerate(batches):
        maps = task.attention_maps(params, batch, jax.random.fold_in(jax.random.key(0), number))
        sums = sums + np.asarray(_locality_sums(maps, task.attention_cells(), batch["mask"]), np.float64)
        count += float(np.sum(batch["mask"]))
    if not count:
        raise ValueError("there is no image; choose a larger data set or split.")
    distance, mass = sums / count
    return {"distance": distance, "local_mass": mass}


@jax.jit
def _locality_sums(maps, cells, mask):
    return jnp.stack([jnp.einsum("zbh,b->zh", x, mask) for x in attention_locality(maps, cells)])


def plot_locality(found: Mapping[str, Mapping[str, Float[np.ndarray, "layers heads"]]], path: Path) -> Path:
    """Distance and local mass by layer: a line for each model, and a point for each head."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    for axes, field, label in zip(panels, ("distance", "local_mass"), ("mean distance, cells", "mass within radius 1")):
        for number, (name, measures) in enumerate(found.items()):
            values, color = np.asarray(measures[field]), f"C{number}"
            layers = np.arange(1, len(values) + 1)
            axes.plot(layers, values.mean(1), color=color, marker="o", markersize=4, label=name)
            axes.scatter(np.repeat(layers, values.shape[1]), values.ravel(), color=color, s=6, alpha=0.4)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("How far attention reaches (points: heads)")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
