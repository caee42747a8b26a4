"""Volumes, such as electron microscopy of brain tissue: crops of them in batches, with the segment of each voxel.

A source is `toy`, a generator of volumes that look like neurites, or

    volume:FILE         .h5, .hdf5 or .hdf (h5py), .tif or .tiff (tifffile), .nii or .nii.gz (nibabel), .zarr (zarr)
    volume:FILE::NAME   the data set of this name in an HDF5 file or a zarr group

The packages that read them are the extra `volumes`. Files are read where crops are cut, except for TIFF and NIfTI,
which are read whole. Axes are depth (z), height (y), width (x); NIfTI's x, y, z are turned round.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grain
import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int

from jaxtok.protocols import ArraySpec, Batch

Size = tuple[int, int, int]
PERTURBATIONS = ("intensity", "noise", "blur", "missing")
IMAGES = ("main", "stack", "raw", "volumes/raw", "image", "data")
"""The names under which files hold the images, the likeliest first; `volumes/...` is CREMI's layout."""
LABELS = ("main", "stack", "labels", "volumes/labels/neuron_ids", "label", "data")


# --------------------------------------------------------------------------------------------------------------- files


def _package(name: str, path: Path, what: str = "reading") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{what} {path.name} needs {name}; pip install 'jaxtok[volumes]'.") from None


def open_volume(source: str, names: tuple[str, ...] = IMAGES) -> Any:
    """A volume [depth, height, width]: an array, or a data set that reads what is cut out of it.

    Args:
      source: `volume:FILE` or `volume:FILE::NAME`; `volume:` may be left out.
      names: the data sets that are looked for in a file of several.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of another kind or damaged, its package is missing, or it is no volume.
    """
    file, _, wanted = source.removeprefix("volume:").partition("::")
    path, kind = Path(file), "".join(Path(file).suffixes[-2:]).lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the file of a volume.")
    end = next(
        (e for e in (".h5", ".hdf5", ".hdf", ".tif", ".tiff", ".nii", ".nii.gz", ".zarr") if kind.endswith(e)), ""
    )
    if wanted and end not in (".h5", ".hdf5", ".hdf", ".zarr"):
        raise ValueError(f"{path} has no data sets with names; leave out ::{wanted}.")
    try:
        if end in (".h5", ".hdf5", ".hdf"):
            volume = _chosen(_package("h5py", path).File(path, "r"), path, wanted, names)
        elif end in (".tif", ".tiff"):
            volume = _package("tifffile", path).imread(path)
        elif end in (".nii", ".nii.gz"):
            image = _package("nibabel", path).load(path)
            volume = np.asarray(image.dataobj).transpose()  # x is first there
        elif end == ".zarr":
            volume = _chosen(_package("zarr", path).open(str(path), mode="r"), path, wanted, names)
        else:
            raise ValueError(
                f"{path} is no volume by its name; it must end in .h5, .hdf5, .tif, .nii, .nii.gz or .zarr."
            )
    except (OSError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no {end} file ({str(error).splitlines()[0][:120]}).") from error
    shape = tuple(volume.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{source} has the shape {shape}; a volume must be [depth, height, width].")
    if np.dtype(volume.dtype).kind not in "uif":
        raise ValueError(f"{source} holds {volume.dtype}; a volume must hold numbers.")
    return volume


def _chosen(file: Any, path: Path, wanted: str, names: tuple[str, ...]) -> Any:
    """The data set of an open file: the one that is asked for, the only one, or one of a known name."""
    if hasattr(file, "dtype"):  # a zarr array that is no group
        if wanted:
            raise ValueError(f"{path} is one array; leave out ::{wanted}.")
        return file
    if wanted:
        if wanted not in file or not hasattr(file[wanted], "dtype"):
            raise ValueError(f"{path} has no data set {wanted!r}; it has {', '.join(_data_sets(file)) or 'none'}.")
        return file[wanted]
    found = _data_sets(file)
    if len(found) == 1:
        return file[found[0]]
    for name in names:
        if name in found:
            return file[name]
    raise ValueError(f"{path} has the data sets {', '.join(found) or '(none)'}; name one: volume:{path}::NAME.")


def _data_sets(group: Any, prefix: str = "") -> list[str]:
    found = []
    for name in group:
        member = group[name]
        if hasattr(member, "dtype"):
            found += [prefix + name] if len(member.shape) == 3 else []
        else:
            found += _data_sets(member, f"{prefix}{name}/")
    return sorted(found)


class VolumeFile:
    """A new file of volumes by name, which are written part by part: .zarr, or .h5. Used in a `with` statement.

    Raises:
      FileExistsError: there is such a file already.
      ValueError: the name has another ending, or the package is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix not in (".zarr", ".h5", ".hdf5"):
            raise ValueError(f"output is {path}; it must end in .zarr or .h5.")
        if self.path.exists():
            raise FileExistsError(f"{path} exists already; choose another name (nothing was written).")
        self._is_zarr = self.path.suffix == ".zarr"
        self._package = _package("zarr" if self._is_zarr else "h5py", self.path, "writing")
        self._file: Any = None

    def __enter__(self) -> VolumeFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (
            self._package.open_group(str(self.path), mode="w-")
            if self._is_zarr
            else self._package.File(self.path, "w-")
        )
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._is_zarr:
            self._file.close()

    def create(self, name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...]) -> Any:
        """An array of the file, to which slices are assigned."""
        chunks = tuple(map(min, chunks, shape))
        make = self._file.create_array if self._is_zarr else self._file.create_dataset
        return make(name, shape=shape, dtype=dtype, chunks=chunks)


class Volume(NamedTuple):
    """Images with the range of their intensities, and the segments if there are labels."""

    images: Any
    low: float
    high: float
    segments: Any | None = None

    @property
    def shape(self) -> Size:
        return tuple(self.images.shape)

    def scaled(self, *cut: slice) -> Float[np.ndarray, "depth height width"]:
        """A part of the images in [0, 1]: (x - min) / (max - min + 1e-8), with the range of the whole file."""
        part = np.asarray(self.images[cut], np.float32)
        return ((part - self.low) / (self.high - self.low + 1e-8)).astype(np.float32)

    def __getitem__(self, cut: slice) -> Float[np.ndarray, "depth height width"]:
        """Some slices, scaled: what `jaxtok.vision.windows.slide` reads."""
        return self.scaled(cut)


def load_volume(source: str, labels: str = "") -> Volume:
    """A file of images, and that of its labels.

    Raises:
      FileNotFoundError, ValueError: as `open_volume`; the images are not finite; or the labels have another shape, are
        not whole numbers, or are negative.
    """
    images = open_volume(source)
    low, high = np.inf, -np.inf
    for z in range(0, images.shape[0], 16):
        part = np.asarray(images[z : z + 16])
        low, high = np.minimum(low, part.min()), np.maximum(high, part.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"{source} holds intensities that are not finite.")
    if not labels:
        return Volume(images, float(low), float(high))
    return Volume(images, float(low), float(high), load_labels(labels, images.shape, source))


def load_labels(
    source: str, shape: Size | None = None, of: str = "the images"
) -> Int[np.ndarray, "depth height width"]:
    """The segments of a file, in memory, numbered anew from 1 on if they do not fit 32 bits; 0 stays 0.

    Raises:
      FileNotFoundError, ValueError: as `load_volume`.
    """
    labels = open_volume(source, LABELS)
    if shape is not None and tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{source} has the shape {tuple(labels.shape)}, but {of} {tuple(shape)}; they must be equal.")
    if np.dtype(labels.dtype).kind not in "ui":
        raise ValueError(f"{source} holds {labels.dtype}; labels must be whole numbers, one for each segment.")
    segments = np.asarray(labels[:])
    if segments.min() < 0:
        raise ValueError(f"{source} has the label {segments.min()}; labels must be 0 (none) or more.")
    if segments.max() >= 2**31:
        known, dense = np.unique(segments, return_inverse=True)
        segments = dense.reshape(segments.shape) + (known[0] != 0)
    return segments.astype(np.int32)


# ------------------------------------------------------------------------------------------------------ a toy generator


def toy_volume(seed: int, shape: Size = (24, 96, 96), cells: int = 50, organelles: int = 40) -> Volume:
    """A volume that looks a little like electron microscopy: cells whose outlines drift from section to section.

    Cell centres start anywhere in the plane and move with a velocity that changes at random (v <- 0.8 v + N(0, 0.6)); a
    voxel belongs to the nearest. Cells have their own brightness, membranes are dark, organelles darker, and there is
    blur and noise.
    """
    rng = np.random.default_rng((seed, 20))
    depth, height, width = shape
    centres = rng.uniform((0, 0), (height, width), (cells, 2))
    speed = np.zeros((cells, 2))
    y, x = np.mgrid[:height, :width]
    plane = np.stack([y, x], -1).reshape(-1, 1, 2)
    labels, gap = np.empty(shape, np.int32), np.empty(shape)
    for z in range(depth):
        speed = 0.8 * speed + rng.normal(0, 0.6, (cells, 2))
        centres = centres + speed
        distance = np.linalg.norm(plane - centres, axis=-1)
        nearest = np.partition(distance, 1, axis=1)[:, :2]
        labels[z] = (distance.argmin(1) + 1).reshape(height, width)
        gap[z] = (nearest[:, 1] - nearest[:, 0]).reshape(height, width)
    brightness = 0.7 + rng.normal(0, 0.04, cells + 1)
    image = brightness[labels] - 0.45 * np.exp(-np.square(gap / 2))
    grid = np.indices(shape)
    for _ in range(organelles):
        middle = rng.uniform((0, 0, 0), shape)
        half = rng.uniform((1, 2, 2), (2.5, 5, 5))
        inside = sum(np.square((grid[n] - middle[n]) / half[n]) for n in range(3)) < 1
        image[inside] *= 0.75
    image = scipy.ndimage.gaussian_filter(image, (0, 0.8, 0.8))
    image += rng.normal(0, 0.12, shape) + rng.normal(0, 0.03, (depth, 1, 1))
    return Volume(image.astype(np.float32), float(image.min()), float(image.max()), labels)


def perturb(crop: Float[np.ndarray, "depth height width"], kind: str, rng: np.random.Generator) -> np.ndarray:
    """One of `PERTURBATIONS` of a crop, within [0, 1].

    intensity  contrast within 0.7 to 1.3 and brightness within -0.15 to 0.15
    noise      N(0, s) with s up to 0.1
    blur       in the plane, with a width up to 1.5
    missing    a section is lost (0)

    TokenUnify's code names such a list, but its file is not public; kinds and sizes are ours.
    """
    match kind:
        case "intensity":
            found = (crop - 0.5) * rng.uniform(0.7, 1.3) + 0.5 + rng.uniform(-0.15, 0.15)
        case "noise":
            found = crop + rng.normal(0, rng.uniform(0, 0.1), crop.shape)
        case "blur":
            width = rng.uniform(0.3, 1.5)
            found = scipy.ndimage.gaussian_filter(crop, (0, width, width))
        case "missing":
            found = crop.copy()
            found[rng.integers(len(crop))] = 0
        case _:
            raise ValueError(f"there is no perturbation {kind!r}; it must be one of {', '.join(PERTURBATIONS)}.")
    return np.clip(found, 0, 1).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- batches


@dataclasses.dataclass(frozen=True)
class VolumeData:
    """Crops of volumes. A batch has

        images    float32  [batch, depth, height, width, 1] in [0, 1], in training perhaps perturbed
        clean     float32  the same crops without perturbation
        segments  int32    [batch, depth, height, width]; 0: none, also where a volume has no labels
        mask      float32  [batch], 1 where the crop counts, 0 where it only fills the batch

    Training crops are anywhere. Those of an evaluation are fixed, drawn once for all. The content of a batch depends
    only on its number and the seed.

    Raises:
        ValueError: a field is out of range.
    """

    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "volumes"

    volumes: tuple[str, ...] = ("toy",)
    """The training volumes (see the module), or `toy`."""
    labels: tuple[str, ...] = ()
    """The files of their labels, one for each; empty: there are none."""
    test_volumes: tuple[str, ...] = ()
    """The volumes of the evaluations (validation and test); empty: the training volumes. For `toy`, others of its
    volumes."""
    test_labels: tuple[str, ...] = ()
    depth_range: tuple[float, float] = (0.0, 1.0)
    """The part of the training volumes' depth from which training crops are cut, as shares; for few labels."""
    crop: Size = (16, 160, 160)
    """Depth, height and width of a crop."""
    batch_size: int = 8
    """The crops in a batch, over all devices and processes."""
    seed: int = 0
    perturbations: tuple[str, ...] = ()
    """With probability 1/2, one of these is done to a training crop; see `perturb`."""
    flip: bool = False
    """Whether training crops are mirrored along each axis with probability 1/2, and turned (height and width
    exchanged, if they are equal). The authors' code has this commented out."""
    toy_volumes: int = 12
    toy_test_volumes: int = 4
    toy_shape: Size = (24, 96, 96)
    eval_crops: int = 16
    """The number of crops in an evaluation."""
    eval_limit: int = 0
    """The number of batches in an evaluation; 0: as many as `eval_crops` need."""
    workers: int = 1
    """The number of threads that cut; 0: the training thread does."""

    def __post_init__(self):
        least = dict(batch_size=1, seed=0, toy_volumes=1, toy_test_volumes=1, eval_crops=1, eval_limit=0, workers=0)
        for field, low in least.items():
            if (value := getattr(self, field)) < low:
                raise ValueError(f"{field} is {value}; it must be at least {low}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be below 2**32.")
        if not self.volumes:
            raise ValueError("volumes is empty; give at least one, such as volume:FILE, or toy.")
        for volumes, labels in (("volumes", "labels"), ("test_volumes", "test_labels")):
            count, given = len(getattr(self, volumes)), len(getattr(self, labels))
            if given not in (0, count):
                raise ValueError(f"{labels} has {given} files for {count} of {volumes}; give one for each, or none.")
        for field in ("crop", "toy_shape"):
            if len(sides := getattr(self, field)) != 3 or min(sides) < 1:
                raise ValueError(f"{field} is {sides}; it must be three sides of at least 1.")
        low, high = self.depth_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"depth_range is {self.depth_range}; it must be two shares in [0, 1], in rising order.")
        for kind in self.perturbations:
            if kind not in PERTURBATIONS:
                raise ValueError(f"perturbations has {kind!r}; it must be of {', '.join(PERTURBATIONS)}.")

    @property
    def is_toy(self) -> bool:
        return self.volumes == ("toy",)

    @property
    def labelled(self) -> bool:
        """Whether there are segments to learn from."""
        return self.is_toy or bool(self.labels)

    def batch_spec(self) -> dict[str, ArraySpec]:
        """See `jaxtok.protocols.Data`."""
        n, crop = self.batch_size, self.crop
        inside = (None,) * 3
        return {
            "images": ArraySpec((n, *crop, 1), np.float32, ("batch", *inside, None)),
            "clean": ArraySpec((n, *crop, 1), np.float32, ("batch", *inside, None)),
            "segments": ArraySpec((n, *crop), np.int32, ("batch", *inside)),
            "mask": ArraySpec((n,), np.float32, ("batch",)),
        }

    @property
    def units(self) -> int:
        return self.batch_size

    def open(self, split: str) -> tuple[Volume, ...]:
        """The volumes of a split, opened once.

        Raises:
            FileNotFoundError, ValueError: as `load_volume`, or a volume is smaller than a crop.
        """
        name = "train" if split == "train" or not (self.test_volumes or self.is_toy) else "test"
        if name not in self._opened:
            if self.is_toy:
                first, count = (0, self.toy_volumes) if name == "train" else (1000, self.toy_test_volumes)
                found = tuple(_toy(first + n, self.toy_shape) for n in range(count))
            else:
                sources, labels = (
                    (self.volumes, self.labels) if name == "train" else (self.test_volumes, self.test_labels)
                )
                found = tuple(map(load_volume, sources, labels or [""] * len(sources)))
            for volume in found:
                self._must_hold(volume, name)
            self._opened[name] = found
        return self._opened[name]

    def _must_hold(self, volume: Volume, name: str) -> None:
        low, high = self._depths(volume, name)
        shape = (high - low, *volume.shape[1:])
        if any(side < wanted for side, wanted in zip(shape, self.crop)):
            what = f"the part {self.depth_range} of a volume" if name == "train" else "a volume"
            raise ValueError(f"crop is {self.crop}, but {what} is {shape}; no side of a crop may be larger.")

    def _depths(self, volume: Volume, name: str) -> tuple[int, int]:
        if name != "train":
            return 0, volume.shape[0]
        return tuple(round(share * volume.shape[0]) for share in self.depth_range)

    @functools.cached_property
    def _opened(self) -> dict[str, tuple[Volume, ...]]:
        return {}

    def train_batches(self, rows: range | None = None) -> grain.DatasetIterator[Batch]:
        """Endless batches, or only the given rows of each, for a process that needs no others.

        Raises:
            FileNotFoundError, ValueError: as `open`.
        """
        make = functools.partial(self._batch, "train", range(self.batch_size) if rows is None else rows)
        self.open("train")
        return iter(self._in_threads(2**40, make))

    def eval_batches(self, split: str = "validation", rows: range | None = None) -> Iterable[Batch]:
        """One pass over the crops of a split; those that fill up the last batch do not count.

        Raises:
            FileNotFoundError, ValueError: as `open`.
        """
        make = functools.partial(self._batch, split, range(self.batch_size) if rows is None else rows)
        self.open(split)
        batches = -(-self.eval_crops // self.batch_size)
        return self._in_threads(min(batches, self.eval_limit or batches), make)

    def _in_threads(self, batches: int, make: Any) -> grain.IterDataset[Batch]:
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=2 * self.workers)
        return grain.MapDataset.range(batches).map(make).to_iter_dataset(options)

    def _batch(self, split: str, rows: range, number: int) -> Batch:
        training = split == "train"  # an evaluation on training volumes has fixed crops, too, by its own key
        examples = [self._example(split, number * self.batch_size + row, training) for row in rows]
        images, clean, segments, mask = map(np.stack, zip(*examples))
        return {
            "images": images[..., None],
            "clean": clean[..., None],
            "segments": segments,
            "mask": mask.astype(np.float32),
        }

    def _example(self, split: str, number: int, training: bool):
        rng = np.random.default_rng((self.seed, 2, number) if training else (0, 3, number))
        volumes = self.open(split)
        sizes = np.array([np.prod([float(s - c + 1) for s, c in zip(v.shape, self.crop)]) for v in volumes])
        volume = volumes[rng.choice(len(volumes), p=sizes / sizes.sum())]
        name = "train" if split == "train" else "test"
        low, high = self._depths(volume, name)
        first = [int(rng.integers(low, high - self.crop[0] + 1))]
        first += [int(rng.integers(0, s - c + 1)) for s, c in zip(volume.shape[1:], self.crop[1:])]
        cut = tuple(slice(start, start + side) for start, side in zip(first, self.crop))
        clean = volume.scaled(*cut)
        segments = np.zeros(self.crop, np.int32) if volume.segments is None else volume.segments[cut]
        if training and self.flip:
            for axis in range(3):
                if rng.random() < 0.5:
                    clean, segments = np.flip(clean, axis), np.flip(segments, axis)
            if self.crop[1] == self.crop[2] and rng.random() < 0.5:
                clean, segments = clean.swapaxes(1, 2), segments.swapaxes(1, 2)
        images = clean
        if training and self.perturbations and rng.random() < 0.5:
            images = perturb(clean, self.perturbations[rng.integers(len(self.perturbations))], rng)
        return images, clean, segments, np.float32(training or number < self.eval_crops)


@functools.lru_cache(maxsize=64)
def _toy(seed: int, shape: Size) -> Volume:
    return toy_volume(seed, shape)
