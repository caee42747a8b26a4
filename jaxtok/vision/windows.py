"""Prediction on volumes that are larger than a model's crop: windows that overlap, blended, and streamed.

The rules are those of MONAI's sliding windows, which TokenUnify's code calls; its own weights are here, too. Windows go
through the volume along z; as soon as no window can reach a slice any more, it is divided by its weights and handed
over, so that only one crop's depth of slices is ever in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

Size = tuple[int, int, int]
KINDS = ("gaussian", "constant", "official")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """How a volume is cut into windows, and how these are blended."""

    crop: Size
    overlap: float = 0.5
    """The share of a window that the next one covers, too; the step is at least one voxel."""
    weight: Literal["gaussian", "constant", "official"] = "gaussian"
    """How much each voxel of a window counts; see `importance`."""
    steps: Size | None = None
    """The voxels from one window to the next along each axis; None: by `overlap`. (10, 80, 80) in the authors' own
    validation, with `weight` official and a `margin` of (4, 15, 15) or (4, 48, 48)."""
    margin: Size = (0, 0, 0)
    """The voxels by which the mirror image of the volume continues it on each side."""
    batch_size: int = 4
    """How many windows are predicted at a time."""

    def __post_init__(self):
        if len(self.crop) != 3 or min(self.crop) < 1:
            raise ValueError(f"crop is {self.crop}; it must be three sides of at least 1.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}; it must be in [0, 1).")
        if self.weight not in KINDS:
            raise ValueError(f"weight is {self.weight!r}; it must be one of {', '.join(KINDS)}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.steps is not None and not (
            len(self.steps) == 3 and all(1 <= step <= side for step, side in zip(self.steps, self.crop))
        ):
            raise ValueError(
                f"steps is {self.steps}; it must be three numbers from 1 to those of crop = {self.crop}, as larger "
                "ones leave voxels out."
            )
        if len(self.margin) != 3 or min(self.margin) < 0:
            raise ValueError(f"margin is {self.margin}; it must be three numbers of at least 0.")

    def starts(self, size: int, axis: int) -> list[int]:
        """Where windows begin along an axis; the last one is shifted inside."""
        side = self.crop[axis]
        step = self.steps[axis] if self.steps else max(int(side * (1 - self.overlap)), 1)
        return [*range(0, size - side, step), size - side]


def importance(
    crop: Size, kind: Literal["gaussian", "constant", "official"]
) -> Float[np.ndarray, "depth height width"]:
    """The weight of each voxel of a window.

    gaussian  the product over axes of exp(-k^2 / (2 (crop / 8)^2)), k from the middle; at least 1e-3 (MONAI)
    constant  1
    official  1e-6 + exp(-r^2 / (2 0.2^2)), r the distance from the middle, where each axis goes from -1 to 1
    """
    if kind == "constant":
        return np.ones(crop, np.float32)
    if kind == "official":
        axes = np.meshgrid(*[np.linspace(-1, 1, side) for side in crop], indexing="ij")
        return (1e-6 + np.exp(-sum(np.square(a) for a in axes) / (2 * 0.2**2))).astype(np.float32)
    weight = np.ones((1, 1, 1), np.float32)
    for axis, side in enumerate(crop):
        k = np.arange(side, dtype=np.float32) - (side - 1) / 2
        along = np.exp(-np.square(k) / (2 * (0.125 * side) ** 2)).astype(np.float32)
        weight = weight * along.reshape([-1 if n == axis else 1 for n in range(3)])
    return np.maximum(weight, max(float(weight.min()), 1e-3))


def slide(
    predict: Callable[[Float[np.ndarray, "batch depth height width 1"]], Any],
    volume: Any,
    windows: Windows,
    on_progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[int, Float[np.ndarray, "channels slices height width"]]]:
    """Yields the blended prediction, some slices at a time: the number of the first of them, and the slices.

    A volume that is smaller than a window is continued by its mirror image.

    Args:
      predict: from windows to their prediction [batch, depth, height, width, channels].
      volume: [depth, height, width], or anything that has a shape and is cut by slices, such as a file's data set.
      on_progress: called with the share of the windows that are done.

    Raises:
      ValueError: the volume is so small that its mirror image does not fill a window.
    """
    shape, crop, size = tuple(volume.shape), windows.crop, windows.batch_size
    if len(shape) != 3:
        raise ValueError(f"the volume has the shape {shape}; it must be [depth, height, width].")
    whole = tuple(max(side + 2 * more, wanted) for side, more, wanted in zip(shape, windows.margin, crop))
    for name, side, more, wanted in zip(("depth", "height", "width"), shape, windows.margin, whole):
        if max(more, wanted - more - side) > side - 1:
            raise ValueError(
                f"the {name} of the volume is {side}, and its mirror image cannot continue it by "
                f"{max(more, wanted - more - side)}; give a larger volume, or another crop or margin."
            )
    places = [_mirrored(wanted, more, side) for wanted, more, side in zip(whole, windows.margin, shape)]
    starts = [windows.starts(side, axis) for axis, side in enumerate(whole)]
    columns = list(itertools.product(starts[1], starts[2]))
    weight = importance(crop, windows.weight)
    total, below = None, np.zeros((crop[0], *whole[1:]), np.float32)
    done, ahead = 0, len(starts[0]) * len(columns)
    for number, z in enumerate(starts[0]):
        rows = places[0][z : z + crop[0]]
        slab = np.asarray(volume[int(rows.min()) : int(rows.max()) + 1], np.float32)
        if whole != shape:
            slab = slab[np.ix_(rows - rows.min(), places[1], places[2])]
        for first in range(0, len(columns), size):
            some = columns[first : first + size]
            filled = some + some[-1:] * (size - len(some))  # all batches have one shape, so one compilation
            batch = np.stack([slab[:, y : y + crop[1], x : x + crop[2], None] for y, x in filled])
            found = np.asarray(predict(batch), np.float32)
            if total is None:
                total = np.zeros((found.shape[-1], *below.shape), np.float32)
            for one, (y, x) in zip(found, some):
                here = (slice(None), slice(y, y + crop[1]), slice(x, x + crop[2]))
                below[here] += weight
                for channel in range(len(total)):
                    total[channel][here] += one[..., channel] * weight
            done += len(some)
            if on_progress:
                on_progress(done / ahead)
        last = number + 1 == len(starts[0])
        finished = crop[0] if last else starts[0][number + 1] - z
        low, high = max(windows.margin[0], z), min(windows.margin[0] + shape[0], z + finished)
        if low < high:  # what is beyond the volume is left out
            inside = slice(low - z, high - z)
            part = total[:, inside] / below[inside]
            cut = [slice(more, more + side) for more, side in zip(windows.margin[1:], shape[1:])]
            yield low - windows.margin[0], part[:, :, cut[0], cut[1]]
        if not last:
            for buffer in (*total, below):  # the slices that later windows reach move up
                buffer[:-finished] = buffer[finished:].copy()
                buffer[-finished:] = 0


def _mirrored(count: int, before: int, side: int) -> Int[np.ndarray, " count"]:
    """Which voxel of a side each of `count` voxels shows, if its mirror image begins `before` voxels earlier."""
    period = max(2 * (side - 1), 1)
    place = np.abs(np.arange(count) - before) % period
    return np.minimum(place, period - place) if side > 1 else np.zeros(count, np.int64)
