"""Retrieval between images and texts by the cosine of their vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float

from jaxtok.protocols import Batch, Params
from jaxtok.vision.seed import Seed
from jaxtok.vision.seed_alignment import SeedAlignment


def pair_vectors(
    task: SeedAlignment, params: Params, batches: Iterable[Batch], codes: tuple[Seed, Params] | None = None
) -> tuple[Float[np.ndarray, "pairs features"], Float[np.ndarray, "pairs features"]]:
    """The vectors of the images and of the texts that count in these batches.

    Args:
      codes: a second stage and its parameters; images are then described by their codes alone (SEED-1, table 1: "causal
        codes"), from which it reconstructs the queries' outputs.
    """
    images, texts = [], []
    for batch in batches:
        real = batch["mask"] > 0
        v, t = _vectors(task, params, batch["images"], batch["tokens"], batch["text_mask"])
        if codes is not None:
            second, second_params = codes
            ids = second.encode(second_params, np.asarray(batch["images"], np.float32) / 255)
            v = _of_states(task, params, second.decode_to_states(second_params, ids))
        images.append(np.asarray(v)[real])
        texts.append(np.asarray(t)[real])
    return np.concatenate(images), np.concatenate(texts)


_vectors = jax.jit(lambda task, params, *arrays: task.vectors(params, *arrays), static_argnums=0)
_of_states = jax.jit(
    lambda task, params, states: task.aligner().apply({"params": params["aligner"]}, states, method="of_states"),
    static_argnums=0,
)


def recall(
    queries: Float[np.ndarray, "queries features"],
    candidates: Float[np.ndarray, "candidates features"],
    wanted: Sequence[set[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """The share of queries that have one of their wanted candidates among the k nearest, for each k.

    >>> recall(np.eye(2), np.eye(2), [{0}, {0}], ks=(1, 2))
    {1: 0.5, 2: 1.0}
    """
    order = np.argsort(-queries @ candidates.T, axis=1, kind="stable")
    ranks = [min(np.flatnonzero(np.isin(row, list(right)))) for row, right in zip(order, wanted)]
    return {k: float(np.mean(np.array(ranks) < k)) for k in ks}


def pair_recall(
    images: Float[np.ndarray, "pairs features"], texts: Float[np.ndarray, "pairs features"], names: Sequence[str]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 from images to texts and back; pairs with the same text are right for each other."""
    same = {name: {n for n, other in enumerate(names) if other == name} for name in names}
    wanted = [same[name] for name in names]
    found = {f"image_to_text_{k}": value for k, value in recall(images, texts, wanted).items()}
    return found | {f"text_to_image_{k}": value for k, value in recall(texts, images, wanted).items()}


def class_accuracy(
    images: Float[np.ndarray, "images features"], texts: Float[np.ndarray, "images features"], names: Sequence[str]
) -> float:
    """How often an image is nearest to the text of its class, where texts are classes."""
    first = {name: n for n, name in reversed(list(enumerate(names)))}
    known = list(first)
    nearest = np.argmax(images @ texts[[first[name] for name in known]].T, axis=1)
    return float(np.mean([known[n] == name for n, name in zip(nearest, names)]))
