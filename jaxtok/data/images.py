"""Images as batches of square 8-bit pixels with their classes."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import grain
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxtok.data.pictures import MAX_PIXELS, Pictures, decode, open_pictures
from jaxtok.protocols import ArraySpec, Batch

_ENDLESS = 2**62  # batches
_ASPECT = 4 / 3  # of a random crop, at most


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Square images with classes. A batch has

        images  uint8    [batch, size, size, 3]
        labels  int32    [batch], the class
        mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch

    The content of a training batch depends only on its number and the seed, so it is the same with any number of
    processes and threads, and a run can be resumed anywhere. A picture that cannot be read is named in one warning. In
    training the next readable one replaces it; in an evaluation its place has a mask of 0.

    Raises:
        ValueError: a field is out of range.
    """

    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "images"

    images: str = "emoji"
    """The source of the pictures; see `jaxtok.data.pictures.open_pictures`."""
    size: int = 64
    """The height and width in pixels."""
    batch_size: int = 32
    """The images in a batch, over all devices and processes."""
    seed: int = 0
    """The seed of the order, the crops and the flips in training."""
    crop: Literal["centre", "random"] = "centre"
    """What is cut out in training: the largest square in the middle, or a random part, resized (`crop_area`). An
    evaluation always takes the centre."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """The least and greatest share of the picture that a random crop covers; its aspect is within 3:4 and 4:3."""
    squash: bool = False
    """Whether the whole picture is resized (bicubic) to a square, in place of the centre that is cut out (SEED)."""
    flip: bool = True
    """Whether each training image is mirrored with probability 1/2."""
    shuffle: bool = True
    """Whether each epoch of training has a new order of all pictures; if not, it has that of the source."""
    holdout: float = 0.1
    """The share of the pictures in the validation split, and also in the test split, if the source has no splits."""
    image_field: str = "image"
    """The field of a TFDS row that holds the picture."""
    label_field: str = "label"
    """The field of a TFDS row that holds the class; empty: there is none."""
    workers: int = 2
    """The number of threads that decode; 0: the training thread decodes. The batches do not depend on it."""
    prefetch: int = 4
    """The number of batches that are made ahead, if there are workers."""
    eval_limit: int = 0
    """The number of batches in an evaluation, of pictures from all over the split; 0: the whole split."""

    def __post_init__(self):
        least = dict(size=1, batch_size=1, seed=0, workers=0, prefetch=1, eval_limit=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be below 2**32.")
        if self.crop not in ("centre", "random"):
            raise ValueError(f"crop is {self.crop!r}; it must be centre or random.")
        if len(self.crop_area) != 2 or not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area is {self.crop_area}; it must be two shares in (0, 1], the smaller one first.")
        if not 0 < self.holdout < 0.5:
            raise ValueError(f"holdout is {self.holdout}; it must be between 0 and 0.5.")

    def train_batches(self, rows: range | None = None) -> grain.DatasetIterator[Batch]:
        """Endless batches, or only the given rows of each, for a process that needs no others.

        Raises:
            FileNotFoundError, ValueError: there are no pictures, or none can be read.
        """
        rows = range(self.batch_size) if rows is None else rows
        make = functools.partial(self._train_batch, self._readable("train"), rows)
        return iter(self._in_threads(_ENDLESS, make))

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over a split in the order of the source (with `eval_limit`: over a sample of it, the same for all
        seeds), again for each `iter`. With `rows`, each batch has only these rows. The last batch is filled up with
        images that do not count.

        Raises:
            FileNotFoundError, ValueError: as `train_batches`.
        """
        rows = range(self.batch_size) if rows is None else rows
        pictures = self._readable(split)
        batches = -(-len(pictures) // self.batch_size)
        order = np.random.default_rng(0).permutation(len(pictures)) if self.eval_limit else np.arange(len(pictures))
        make = functools.partial(self._eval_batch, pictures, rows, order)
        return self._in_threads(min(batches, self.eval_limit or batches), make)

    def batch_spec(self) -> dict[str, ArraySpec]:
        """See `jaxtok.protocols.Data`."""
        n = self.batch_size
        return {
            "images": ArraySpec((n, self.size, self.size, 3), np.uint8, ("batch", None, None, None)),
            "labels": ArraySpec((n,), np.int32, ("batch",)),
            "mask": ArraySpec((n,), np.float32, ("batch",)),
        }

    @property
    def units(self) -> int:
        return self.batch_size

    def count(self, split: str) -> int:
        """The number of pictures in the split."""
        return len(self.pictures(split))

    def pictures(self, split: str = "all") -> Pictures:
        """The pictures of a split, opened once."""
        if split not in self._opened:
            fields = {"image_field": self.image_field, "label_field": self.label_field}
            self._opened[split] = open_pictures(self.images, split, holdout=self.holdout, **fields)
        return self._opened[split]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label; empty if the source gives none."""
        return self.pictures("train").classes

    @functools.cached_property
    def _opened(self) -> dict[str, Pictures]:
        return {}

    def _readable(self, split: str) -> Pictures:
        """The pictures of a split. Raises ValueError if none can be read."""
        pictures = self.pictures(split)
        next(index for index in range(len(pictures)) if self._image(pictures, index) is not None)
        return pictures

    def _in_threads(self, batches: int, make: Any) -> grain.IterDataset[Batch]:
        buffer = max(self.prefetch, self.workers) if self.workers else 0
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=buffer)
        return grain.MapDataset.range(batches).map(make).to_iter_dataset(options)

    def _train_batch(self, pictures: Pictures, rows: range, number: int) -> Batch:
        return self._batch([self._train_example(pictures, number * self.batch_size + row) for row in rows])

    def _train_example(self, pictures: Pictures, number: int) -> tuple[np.ndarray, int, float]:
        """The image with this number, counted through all epochs."""
        epoch, index = divmod(number, len(pictures))
        if self.shuffle:
            index = int(_order(len(pictures), self.seed, epoch)[index])
        rng = np.random.default_rng((self.seed, 1, number))
        while (labelled := self._image(pictures, index, rng)) is None:
            index = (index + 1) % len(pictures)
        image, label = labelled
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return image, label, 1.0

    def _eval_batch(self, pictures: Pictures, rows: range, order: np.ndarray, number: int) -> Batch:
        examples = []
        for index in range(number * self.batch_size + rows.start, number * self.batch_size + rows.stop):
            labelled = self._image(pictures, int(order[index])) if index < len(pictures) else None
            nothing = np.zeros((self.size, self.size, 3), np.uint8), 0
            examples.append((*(labelled or nothing), 0.0 if labelled is None else 1.0))
        return self._batch(examples)

    def _batch(self, examples: Sequence[tuple[np.ndarray, int, float]]) -> Batch:
        images, labels, mask = zip(*examples)
        return {
            "images": np.stack(images),
            "labels": np.array(labels, np.int32),
            "mask": np.array(mask, np.float32),
        }

    def _image(
        self, pictures: Pictures, index: int, rng: np.random.Generator | None = None
    ) -> tuple[UInt8[np.ndarray, "size size 3"], int] | None:
        """Pixels and class, with a random crop if `rng` is given; None, with a warning, if it cannot be read."""
        if index in pictures.unreadable:
            return None
        name = f"number {index}"
        try:
            picture = pictures[index]
            name = picture.name
            image = decode(picture.content)
            if rng is not None and self.crop == "random":
                return random_crop(image, self.size, rng, self.crop_area), picture.label
            if self.squash:
                square = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
                return np.asarray(square), picture.label
            return centre_crop(image, self.size), picture.label
        except Exception as error:  # no file or record may end a run
            pictures.unreadable.add(index)
            warnings.warn(f"the picture {name} of {self.images} is left out: {error}", stacklevel=2)
        if len(pictures.unreadable) == len(pictures):
            raise ValueError(f"not one of the {len(pictures)} pictures of {self.images} can be read; see the warnings.")
        return None


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def centre_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The square in the middle, size x size, cut as by ADM's code (arXiv 2105.05233) and most later work on ImageNet.

    The picture is halved with a box filter while its shorter side is at least twice the size, and resized (bicubic) so
    that its shorter side is the size; then the middle is cut out.

    Raises:
        ValueError: the picture is so long and thin that the resized one would have too many pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too long and thin to be cut to a square.")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(
    image: Image.Image, size: int, rng: np.random.Generator, area: tuple[float, float] = (0.08, 1.0)
) -> UInt8[np.ndarray, "size size 3"]:
    """A part of the picture, resized (bicubic) to size x size: Inception's augmentation (arXiv 1409.4842, section 6).

    Its share of the picture's area is uniform in `area`, the logarithm of its aspect uniform between 3:4 and 4:3, and
    its position uniform. If ten tries do not fit, it is the largest part in the middle with such an aspect.
    """
    width, height = image.size
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, max(1, round(height * _ASPECT))), min(height, max(1, round(width * _ASPECT)))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
