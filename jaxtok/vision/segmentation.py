"""From affinities to segments (watershed, then agglomeration), and how far segments are from the true ones.

This is work of the host, in NumPy. Where `mahotas` and `waterz` are installed (the extra `volumes`) they do it faster;
what is written here gives the same fragments voxel for voxel, and the same partition.

Axes: affinities are [3, depth, height, width], the channels in the order z, y, x; each says how likely a voxel and its
neighbour one step before it along that axis are in one segment.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import sys
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int, Integer

Backend = Literal["auto", "numpy", "libraries"]
BACKENDS = ("auto", "numpy", "libraries")
BINS = 256
"""The bins of an edge's histogram and of the queue of edges."""
WATERZ_SCORE = f"OneMinus<HistogramQuantileAffinity<RegionGraphType, 50, ScoreValue, {BINS}>>"
CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)


def segment(
    affinities: Float[np.ndarray, "3 depth height width"], threshold: float = 0.5, backend: Backend = "auto"
) -> Int[np.ndarray, "depth height width"]:
    """The segments 1, 2, ... of a volume.

    Raises:
      ValueError: as `watershed` and `agglomerate`.
    """
    return agglomerate(affinities, watershed(affinities, backend), threshold, backend)


def check_affinities(affinities: np.ndarray) -> np.ndarray:
    """Affinities in float32.

    Raises:
      ValueError: they have another shape, or are not all in [0, 1].
    """
    affinities = np.asarray(affinities)
    if affinities.ndim != 4 or affinities.shape[0] != 3 or 0 in affinities.shape:
        raise ValueError(f"the affinities have the shape {affinities.shape}; it must be [3, depth, height, width].")
    if not np.issubdtype(affinities.dtype, np.floating):
        raise ValueError(f"the affinities are {affinities.dtype}; they must be floats in [0, 1].")
    low, high = affinities.min(), affinities.max()
    if not (low >= 0 and high <= 1):  # NaN, too
        raise ValueError(f"the affinities go from {low} to {high}; they must be in [0, 1], and not NaN.")
    return affinities.astype(np.float32)


def _uses(package: str, backend: Backend) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    there = find_spec(package) is not None
    if backend == "libraries" and not there:
        raise ValueError(f"backend is libraries, but {package} is not installed; pip install 'jaxtok[volumes]'.")
    return there and backend != "numpy"


# ------------------------------------------------------------------------------------------------------------ watershed


def watershed(
    affinities: Float[np.ndarray, "3 depth height width"], backend: Backend = "auto"
) -> Int[np.ndarray, "depth height width"]:
    """The fragments of each slice, numbered through all slices from 2 on, as the authors' seeding leaves them.

    With b = 1 - (a_y + a_x) / 2, seeds are the regional maxima of the distance to where b >= 1/2. They are flooded in
    the order of b (Meyer's algorithm with a queue), each voxel with its four neighbours.

    Raises:
      ValueError: the affinities are no affinities (`check_affinities`), or the backend's library is missing.
    """
    affinities = check_affinities(affinities)
    fast = _uses("mahotas", backend)
    boundary = 1.0 - 0.5 * (affinities[1] + affinities[2])
    fragments = np.zeros(boundary.shape, np.int32)
    first = 1
    for z, plane in enumerate(boundary):
        seeds, count = seeds_of(plane)
        if fast:
            import mahotas

            flooded = mahotas.cwatershed(plane, seeds)
        else:
            flooded = flood(plane, seeds)
        fragments[z] = flooded + first
        first += count
    return fragments


def seeds_of(boundary: Float[np.ndarray, "height width"]) -> tuple[Int[np.ndarray, "height width"], int]:
    """The regional maxima of the distance to the boundary, each with a number from 1 on, and how many there are."""
    inside = boundary < 0.5
    if inside.all():  # there is no boundary, so no distance to it: the plane is one fragment
        return np.ones(boundary.shape, np.int32), 1
    distance = np.rint(scipy.ndimage.distance_transform_edt(inside) ** 2).astype(np.int64)
    seeds, count = scipy.ndimage.label(regional_maxima(distance), CROSS)
    return seeds.astype(np.int32), int(count)


def regional_maxima(x: Integer[np.ndarray, "height width"]) -> np.ndarray:
    """Where connected plateaus are that no neighbour exceeds (four neighbours)."""
    pairs = [((slice(1, None), slice(None)), (slice(None, -1), slice(None)))]
    pairs.append(((slice(None), slice(1, None)), (slice(None), slice(None, -1))))
    pairs += [(other, one) for one, other in pairs]
    exceeded = np.zeros(x.shape, bool)
    for one, other in pairs:
        exceeded[one] |= x[one] < x[other]
    before = -1
    while (count := int(exceeded.sum())) != before:  # a plateau is exceeded if one of its voxels is
        before = count
        for one, other in pairs:
            exceeded[one] |= exceeded[other] & (x[one] == x[other])
    return ~exceeded


def flood(
    heights: Float[np.ndarray, "height width"], seeds: Int[np.ndarray, "height width"]
) -> Int[np.ndarray, "height width"]:
    """Gives each voxel the number of the seed that reaches it first, the lowest voxels first, then the earliest."""
    rows, columns = heights.shape
    wide = columns + 2  # with a frame that is labelled, so that no neighbour has to be checked
    framed = np.full((rows + 2, wide), -1, np.int64)
    framed[1:-1, 1:-1] = seeds
    labels = framed.ravel().tolist()
    level = np.zeros((rows + 2, wide))
    level[1:-1, 1:-1] = heights
    level = level.ravel().tolist()
    places = np.flatnonzero(framed.ravel() > 0).tolist()
    queue = [(level[place], number, place) for number, place in enumerate(places)]
    heapq.heapify(queue)
    number, push, pop = len(queue), heapq.heappush, heapq.heappop
    while queue:
        _, _, place = pop(queue)
        label = labels[place]
        for near in (place - wide, place - 1, place + 1, place + wide):
            if not labels[near]:
                labels[near] = label
                push(queue, (level[near], number, near))
                number += 1
    return np.array(labels, np.int32).reshape(rows + 2, wide)[1:-1, 1:-1]


# -------------------------------------------------------------------------------------------------------- agglomeration


class RegionGraph(NamedTuple):
    """The pairs of fragments that touch, in ascending order, and the largest affinity between each pair."""

    pairs: Int[np.ndarray, "edges 2"]
    affinity: Float[np.ndarray, " edges"]


def region_graph(
    affinities: Float[np.ndarray, "3 depth height width"], fragments: Int[np.ndarray, "depth height width"]
) -> RegionGraph:
    """The graph of fragments that touch along any axis; 0 is no fragment."""
    firsts, seconds, values = [], [], []
    for axis in range(3):
        here = tuple(slice(1, None) if n == axis else slice(None) for n in range(3))
        before = tuple(slice(None, -1) if n == axis else slice(None) for n in range(3))
        one, other = fragments[here].ravel(), fragments[before].ravel()
        touch = (one != other) & (one > 0) & (other > 0)
        firsts.append(np.minimum(one[touch], other[touch]))
        seconds.append(np.maximum(one[touch], other[touch]))
        values.append(affinities[axis][here].ravel()[touch])
    pairs = np.stack([np.concatenate(firsts), np.concatenate(seconds)], 1).astype(np.int64)
    if not len(pairs):
        return RegionGraph(pairs, np.zeros(0, np.float32))
    span = int(pairs[:, 1].max()) + 1
    edges, which = np.unique(pairs[:, 0] * span + pairs[:, 1], return_inverse=True)
    largest = np.zeros(len(edges), np.float32)
    np.maximum.at(largest, which, np.concatenate(values))
    return RegionGraph(np.stack([edges // span, edges % span], 1), largest)


def agglomerate(
    affinities: Float[np.ndarray, "3 depth height width"],
    fragments: Int[np.ndarray, "depth height width"],
    threshold: float = 0.5,
    backend: Backend = "auto",
) -> Int[np.ndarray, "depth height width"]:
    """Merges fragments, the most alike first, until the score of the next pair is at least the threshold.

    A pair's score is 1 - the median of its histogram of affinities. A histogram begins with one entry, the largest
    affinity between two fragments (`waterz` does so by default); when fragments merge, the histograms of their edges to
    a common neighbour are added. 0 stays 0; segments are numbered from 1 on, in the order of the fragments' numbers.

    Raises:
      ValueError: the affinities are no affinities (`check_affinities`); fragments have another shape or type or are
        negative; the threshold is not in [0, 1]; or the backend's library is missing.
    """
    affinities, fragments = check_affinities(affinities), np.asarray(fragments)
    if fragments.shape != affinities.shape[1:]:
        raise ValueError(f"the fragments have the shape {fragments.shape}; the affinities are {affinities.shape[1:]}.")
    if not np.issubdtype(fragments.dtype, np.integer) or fragments.min() < 0:
        raise ValueError(
            f"the fragments are {fragments.dtype}, from {fragments.min()}; they must be whole numbers >= 0."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be in [0, 1].")
    known, dense = np.unique(fragments, return_inverse=True)
    dense = dense.reshape(fragments.shape) + (known[0] != 0)  # 0 stays 0
    if threshold > 0:  # waterz reports nothing at a threshold of 0; nothing is merged there
        merge = _agglomerate_waterz if _uses("waterz", backend) else _agglomerate
        dense = merge(affinities, dense, threshold)
    known, segments = np.unique(dense, return_inverse=True)
    return (segments.reshape(fragments.shape) + (known[0] != 0)).astype(np.int32)


def _agglomerate_waterz(affinities, fragments, threshold):
    import waterz

    with _silent():
        run = waterz.agglomerate(
            np.ascontiguousarray(affinities),
            [threshold],
            fragments=fragments.astype(np.uint64),
            scoring_function=WATERZ_SCORE,
            discretize_queue=BINS,
        )
        return next(iter(run)).astype(np.int64)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """A context in which the process's standard output goes nowhere: waterz reports its steps there, from C++."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _agglomerate(affinities, fragments, threshold):
    graph = region_graph(affinities, fragments)
    edges = [tuple(pair) for pair in graph.pairs.tolist()]
    first_bins = np.minimum((graph.affinity * np.float32(BINS)).astype(np.int64), BINS - 1).tolist()
    histograms = [{b: 1} for b in first_bins]
    neighbours: list[dict[int, int]] = [{} for _ in range(int(fragments.max()) + 1)]  # of each: neighbour to edge
    for number, (u, v) in enumerate(edges):
        neighbours[u][v] = neighbours[v][u] = number

    def score_of(histogram):
        least, total = sum(histogram.values()) // 2 + 1, 0
        for b in sorted(histogram):
            total += histogram[b]
            if total >= least:
                break
        return 1 - (b + 0.5) / BINS

    scores = [score_of(histogram) for histogram in histograms]
    queue: list[deque[int]] = [deque() for _ in range(BINS)]
    for number, score in enumerate(scores):
        queue[min(int(score * BINS), BINS - 1)].append(number)
    stale, deleted = [False] * len(edges), [False] * len(edges)
    parent = list(range(len(neighbours)))
    lowest = 0
    while lowest < BINS:
        if not queue[lowest]:
            lowest += 1
            continue
        edge = queue[lowest][0]
        if scores[edge] >= threshold:
            break
        queue[lowest].popleft()
        if deleted[edge]:
            continue
        if stale[edge]:
            stale[edge], scores[edge] = False, score_of(histograms[edge])
            at = min(int(scores[edge] * BINS), BINS - 1)
            queue[at].append(edge)
            lowest = min(lowest, at)
            continue
        u, v = edges[edge]
        parent[v] = u
        deleted[edge] = True
        del neighbours[u][v]
        for near, other in neighbours[v].items():
            if other == edge:
                continue
            del neighbours[near][v]
            kept = other
            if (own := neighbours[u].get(near)) is not None:
                kept, gone = (own, other) if scores[other] > scores[own] else (other, own)
                for b, count in histograms[gone].items():
                    histograms[kept][b] = histograms[kept].get(b, 0) + count
                histograms[gone] = {}
                stale[kept], deleted[gone] = True, True
            neighbours[u][near] = neighbours[near][u] = kept
            edges[kept] = (u, near) if u < near else (near, u)
        neighbours[v] = {}
    for number in range(len(parent)):  # of a pair, the smaller number is the parent
        parent[number] = parent[parent[number]]
    return np.array(parent, np.int64)[fragments]


# -------------------------------------------------------------------------------------------------------------- metrics


class Scores(NamedTuple):
    """How far a segmentation is from the truth; lower is better, except for precision and recall."""

    voi_split: float
    """H(segment | truth) in bits: true segments that are cut."""
    voi_merge: float
    """H(truth | segment) in bits: true segments that are joined."""
    voi: float
    """Their sum, the variation of information."""
    arand: float
    """The adapted Rand error."""
    precision: float
    recall: float


def score(
    truth: Int[np.ndarray, "*shape"], segments: Int[np.ndarray, "*shape"], form: Literal["skimage", "cremi"] = "skimage"
) -> Scores:
    """Compares segments with the true ones, over the voxels where the truth is not 0.

    The two forms differ in ARAND: scikit-image's leaves out pairs of a voxel with itself, and reports S / A as
    precision and S / B as recall; CREMI's keeps them, takes voxels of segment 0 as single ones, and has precision and
    recall the other way round. The published tables have scikit-image's.

    Raises:
      ValueError: shapes or types differ from whole numbers of one shape, the truth is 0 everywhere, or there is no
        such form.
    """
    truth, segments = np.asarray(truth), np.asarray(segments)
    if truth.shape != segments.shape:
        raise ValueError(
            f"the truth has the shape {truth.shape} and the segments {segments.shape}; they must be equal."
        )
    for name, ids in (("truth", truth), ("segments", segments)):
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{name} is {ids.dtype}; it must be whole numbers, one for each segment.")
    if form not in ("skimage", "cremi"):
        raise ValueError(f"form is {form!r}; it must be skimage or cremi.")
    known = truth != 0
    if not known.any():
        raise ValueError("the truth is 0 (not labelled) everywhere; there is nothing to compare with.")
    _, i = np.unique(truth[known], return_inverse=True)
    labels, j = np.unique(segments[known], return_inverse=True)
    pairs, c = np.unique(i.astype(np.int64) * len(labels) + j, return_counts=True)
    a, b = np.bincount(i).astype(np.float64), np.bincount(j).astype(np.float64)
    c, of_pair = c.astype(np.float64), pairs % len(labels)
    n = c.sum()

    def entropy(counts):
        p = counts / n
        return float(-np.sum(p * np.log2(p)))

    split, merge = entropy(c) - entropy(a), entropy(c) - entropy(b)
    if form == "skimage":
        s, sa, sb = (float(np.sum(x * x) - n) for x in (c, a, b))
        precision, recall = s / sa if sa else 0.0, s / sb if sb else 0.0
        if not (sa or sb):  # all single voxels, on both sides
            precision = recall = 1.0
    else:
        alone = labels == 0
        c0 = float(np.sum(c[alone[of_pair]]))
        s = float(np.sum(np.square(c[~alone[of_pair]]))) + c0
        sa, sb = float(np.sum(a * a)), float(np.sum(np.square(b[~alone]))) + c0
        precision, recall = s / sb, s / sa
    arand = 1 - 2 * s / (sa + sb) if sa + sb else 0.0
    return Scores(max(split, 0.0), max(merge, 0.0), max(split, 0.0) + max(merge, 0.0), arand, precision, recall)
