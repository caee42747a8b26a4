"""What `jaxtok vision` does, as functions: encoding, decoding and drawing images, analysing codes, segmenting volumes.

Everything here is written against `ImageTokenizer` and `ImageGenerator` in `jaxtok/protocols.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import rich.console
import rich.progress
import tyro
from jaxtyping import Int, UInt8
from PIL import Image
from tyro.conf import Positional, arg

from jaxtok.configuration import command_line
from jaxtok.data.codes import CodeData, Header, alike, open_codes, regroup, times, write_codes
from jaxtok.data.corpora import SPLITS, open_corpus
from jaxtok.data.volumes import VolumeFile, load_labels, load_volume
from jaxtok.door import open_model
from jaxtok.model import Model
from jaxtok.protocols import ImageGenerator, ImageSource, ImageTokenizer, Params
from jaxtok.runs import is_run
from jaxtok.tokenizers import load_tokenizer
from jaxtok.training.checkpoints import find_run, must_be_free, read_config
from jaxtok.training.mesh import make_layout
from jaxtok.vision.grids import image_grid
from jaxtok.vision.segmentation import score
from jaxtok.vision.segmentation import segment as segment_affinities
from jaxtok.vision.token_statistics import (
    MapsAttention,
    compare_tokens,
    locality,
    plot_locality,
    plot_statistics,
    stored_tokens,
)
from jaxtok.vision.tokenunify import AffinityPrediction, affinities_of
from jaxtok.vision.windows import Windows, slide


def tokenize(
    checkpoint: Positional[Annotated[Path, arg(metavar="RUN")]],
    output: Positional[Annotated[Path, arg(metavar="OUTPUT")]],
    images: str = "",
    splits: tuple[Literal["train", "validation", "test"], ...] = SPLITS,
    draws: int = 1,
    flip: bool | None = None,
    batch_size: int = 0,
    seed: int = 0,
    ema: bool = False,
) -> Path:
    """Encodes the images of every split with a tokenizer, for `CodeData` (--data.path OUTPUT).

    Splits that the same tokenizer has encoded are kept; a second call goes on with the others.

    Args:
      checkpoint: A run of an image tokenizer, or RUN/checkpoints/STEP.
      output: The folder to write; it gets a folder for each split.
      images: The images to encode: emoji, sprites, digits, folder:PATH, tfds:NAME or arrayrecord:PATTERN. By default
        they are those of the run.
      splits: The splits of the images to encode.
      draws: How often each training image is encoded, if codes are drawn; training takes one of the draws each time.
      flip: Whether the mirror image of each training image is encoded too. By default it is if the run's training
        showed mirror images.
      batch_size: How many images are encoded at a time; 0 means as many as in the run.
      seed: The seed of the draws.
      ema: Whether the moving average of the tokenizer's parameters is used.
    """
    tokenizer = open_tokenizer(checkpoint, ema)
    if draws < 1 or (draws > 1 and not tokenizer.task.draws_codes):
        raise ValueError(
            f"draws is {draws}; it must be "
            + ("at least 1." if draws < 1 else "1, as this tokenizer's codes of an image are always the same.")
        )
    data = _images(tokenizer.data, images, batch_size)
    header = code_header(tokenizer, data.classes or ("0",))
    for split in splits:
        mirrored = (data.flip if flip is None else flip) and split == "train"
        repeats = draws if split == "train" else 1
        if (output / split).is_dir():
            file = open_codes(output / split)
            if file.header != header or file.codes.shape[1] != repeats * (1 + mirrored):
                raise FileExistsError(
                    f"{output / split} holds codes of another tokenizer or other images, or other draws or mirror "
                    "images of them; choose another folder."
                )
            continue
        rng = jax.random.fold_in(jax.random.key(seed), SPLITS.index(split))  # whichever splits are encoded with it
        write_codes(output / split, header, _encoded(tokenizer, data, split, repeats, mirrored, rng))
    return output


def reconstruct(
    checkpoint: Positional[Annotated[Path, arg(metavar="RUN")]],
    output: Positional[Annotated[Path, arg(metavar="[OUTPUT]")]] = Path("reconstructions.png"),
    images: str = "",
    split: Literal["train", "validation", "test", "all"] = "validation",
    prefixes: tuple[int, ...] = (),
    count: int = 16,
    columns: int = 8,
    batches: int = 0,
    seed: int = 0,
    ema: bool = False,
) -> dict[str, Any]:
    """Encodes and decodes held-out images; measures and shows how close they come.

    For a volume, the picture shows the middle slice.

    Args:
      checkpoint: A run of an image tokenizer, or RUN/checkpoints/STEP.
      output: The picture to write.
      images: The images to reconstruct: emoji, sprites, digits, folder:PATH, tfds:NAME or arrayrecord:PATTERN. By
        default they are those of the run.
      split: The split of the images.
      prefixes: Numbers of first codes from which images are decoded too, a row for each number, if codes are ordered.
      count: How many images the picture shows; they are chosen from those that are measured.
      columns: How many columns the picture has.
      batches: How many batches are measured, with images from all over the split; 0 means all.
      seed: The seed of the choice of images that are shown, and of what is drawn.
      ema: Whether the moving average of the tokenizer's parameters is used.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"count is {count} and columns {columns}; both must be at least 1.")
    _must_be_picture(output)
    tokenizer = open_tokenizer(checkpoint, ema)
    known = tokenizer.task.prefixes
    if unknown := sorted(set(prefixes) - set(known)):
        possible = f"the first {', '.join(map(str, known))} codes" if known else "whole images only"
        raise ValueError(f"prefixes has {unknown[0]}; this tokenizer decodes {possible}.")
    data = dataclasses.replace(_images(tokenizer.data, images), eval_limit=batches)
    total = data.count(split)
    total = min(total, batches * data.batch_size or total)
    shown = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    kept: list[np.ndarray] = []

    def measured() -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(_with_progress(data, split, "decoding")):
            numbered = enumerate(batch["images"], step * data.batch_size)
            kept.extend(image for (n, image), real in zip(numbered, batch["mask"]) if real and n in shown)
            yield batch

    numbers = tokenizer.task.evaluate(tokenizer.params, measured())
    if not kept:
        raise ValueError("none of the images that were to be shown could be read; choose another seed.")
    rng = jax.random.key(seed)
    codes = tokenizer.encode(np.stack(kept), rng)
    rows = [np.stack(kept), *(tokenizer.decode(codes[:, :n], rng) for n in [*prefixes, codes.shape[1]])]
    tiles = [
        tile
        for start in range(0, len(kept), columns)
        for row in rows
        for tile in _filled(_pixels(row[start : start + columns]), columns)
    ]
    _save(image_grid(_slices(np.stack(tiles)), columns), output)
    return {"picture": str(output), "split": split} | numbers


def generate(
    checkpoint: Positional[Annotated[Path, arg(metavar="RUN")]],
    output: Positional[Annotated[Path, arg(metavar="[OUTPUT]")]] = Path("samples.png"),
    tokenizer: Annotated[Path | None, arg(metavar="RUN")] = None,
    labels: tuple[str, ...] = (),
    per_class: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    ema: bool = False,
    sampling: Any = None,
) -> dict[str, Any]:
    """Draws images of classes with a model of codes and the tokenizer of these codes.

    `jaxtok vision generate RUN --help` also lists the options of the run's own sampling.

    Args:
      checkpoint: A run of a model of codes, or RUN/checkpoints/STEP.
      output: FILE.png for one picture with a row for each class (for a volume, it shows the middle slice); or FILE.npz
        for all images as `arr_0` and labels as `arr_1`, which ADM's evaluator reads; or a folder, which gets a file
        for each image (for a volume, a TIFF of its slices).
      tokenizer: The run of the tokenizer that made the codes. By default it is the one that the files of codes name.
      labels: Classes, by their names or numbers, or `none` for no class. By default they are all classes.
      per_class: How many images of each class are drawn.
      batch_size: How many images are drawn at a time.
      seed: The seed; another one gives other images.
      ema: Whether the moving average of the model's parameters is used.
      sampling: Options of the model's own sampling: in Python, a mapping of some of them or an instance of the
        generator's `sampling`; on the command line, each is an option.
    """
    if per_class < 1 or batch_size < 1:
        raise ValueError(f"per_class is {per_class} and batch_size {batch_size}; both must be at least 1.")
    if not output.suffix:
        must_be_free(output)
    elif output.suffix != ".npz":
        _must_be_picture(output)
    model = open_model(checkpoint, ema=ema)
    task = _generator(model.task, checkpoint)
    options = make_sampling(task, sampling)
    header = _stored_header(model.data)
    if tokenizer is None and not (header and header.tokenizer):
        raise ValueError(f"nothing says which tokenizer made the codes of {checkpoint}; give its run as --tokenizer.")
    decoder = open_tokenizer(tokenizer or Path(header.tokenizer))
    must_fit(task, decoder.task)
    ids, names = _classes(labels, header.classes if header else (), task.num_classes)
    wanted = [label for label in ids for _ in range(per_class)]
    pixels = draw_images(task, model.params, decoder, wanted, options, jax.random.key(seed), batch_size)
    _write_images(pixels, [names[n // per_class] for n in range(len(wanted))], wanted, per_class, output)
    return {"images": len(pixels), "written": str(output)}


def generate_from_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Calls `generate` with a command line, on which the options of the run's own sampling are options as well."""
    signature = inspect.signature(generate)
    fixed = [parameter for parameter in signature.parameters.values() if parameter.name != "sampling"]
    hints = {name: hint for name, hint in generate.__annotations__.items() if name != "sampling"}
    runs = [path for before, path in zip(["", *arguments], arguments) if before != "--tokenizer" and is_run(Path(path))]
    if runs:
        kind = _generator(read_config(find_run(runs[0])[0]).task, runs[0]).sampling
        hints["sampling"] = kind
        fixed.append(inspect.Parameter("sampling", inspect.Parameter.KEYWORD_ONLY, default=kind()))

    @functools.wraps(generate)
    def command(**values: Any) -> dict[str, Any]:
        return generate(**values)

    command.__signature__ = signature.replace(parameters=fixed)  # what tyro reads
    command.__annotations__ = hints
    config = (tyro.conf.OmitArgPrefixes,)
    return command_line(command, arguments, prog="jaxtok vision generate", config=config)


def make_sampling(generator: ImageGenerator, options: Any = None) -> Any:
    """Returns an instance of the generator's `sampling`, from a mapping of some of its options or from an instance.

    Raises:
      ValueError: the generator has no such option, or a value is impossible.
    """
    kind = generator.sampling
    if isinstance(options, kind):
        return options
    if options is not None and not isinstance(options, Mapping):
        given, owner = type(options).__name__, type(generator).__name__
        raise ValueError(f"sampling is of type {given}; for {owner} it must be a {kind.__name__}.")
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in options or {} if name not in known]:
        raise ValueError(f"{unknown[0]} is not an option of {kind.__name__}; it must be one of {', '.join(known)}.")
    return kind(**(options or {}))


def must_fit(generator: ImageGenerator, tokenizer: ImageTokenizer) -> None:
    """Raises a ValueError if the tokenizer cannot decode what the generator draws."""
    shape, whole = generator.code_shape, tokenizer.code_shape
    if shape != whole and not (len(shape) == 1 and shape[0] in tokenizer.prefixes):
        raise ValueError(
            f"the model's codes have the shape {times(shape)}, but the tokenizer's have {times(whole)}; give the "
            "tokenizer that made the model's codes."
        )
    values, others = generator.code_values, tokenizer.code_values
    if math.prod(values) != math.prod(others) and not alike(values, others):
        raise ValueError(
            f"the model's codes have {times(values)} values, but the tokenizer's have {times(others)}; give the "
            "tokenizer that made the model's codes."
        )


def statistics(
    codes: Positional[Annotated[tuple[Path, ...], arg(metavar="CODES ...")]],
    output: Path = Path("token_statistics.png"),
    split: Literal["train", "validation", "test"] = "train",
    corpus: str = "",
    tokenizer: str = "bytes",
) -> dict[str, Any]:
    """Measures how random image tokens are, next to those of text.

    The numbers say how far single tokens and pairs of neighbours are from uniform.

    All sub-codes of a position are one token. Text is cut into rows as long as those of images.

    Args:
      codes: Folders that `jaxtok vision tokenize` wrote, all with the same number of values at a position.
      output: The plot to write.
      split: The split of the images.
      corpus: A corpus of text to compare with: python, a file or folder, tfds:NAME or arrayrecord:PATTERN.
      tokenizer: The tokenizer of the text: bytes, or a file. It may have no more ids than a position has values.
    """
    sources, sizes = {}, {}
    for name, folder in zip(_names(codes), codes):
        file = open_codes(folder / split)
        sources[name], sizes[name] = stored_tokens(file), math.prod(file.header.values)
    if len(set(sizes.values())) > 1:
        values = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"positions have different numbers of values ({values}); give folders with the same number.")
    vocabulary = max(sizes.values())
    if corpus:
        sources["text"] = _text_rows(corpus, tokenizer, *next(iter(sources.values())).shape, vocabulary)
    measured = compare_tokens(sources, vocabulary)
    plot_statistics(measured, output)
    rows = {
        f"{name}: {field}": value for name, row in measured.items() for field, value in dataclasses.asdict(row).items()
    }
    return {"plot": str(output), "vocabulary": vocabulary} | rows


def attention(
    checkpoints: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN ...")]],
    output: Path = Path("attention_locality.png"),
    split: Literal["train", "validation", "test"] = "validation",
    batches: int = 4,
    ema: bool = False,
) -> dict[str, Any]:
    """Measures how far the attention of models of codes reaches, layer by layer, and plots it.

    Args:
      checkpoints: Runs of models of codes.
      output: The plot to write.
      split: The split of each run's own codes.
      batches: How many batches are measured; 0 means all.
      ema: Whether the moving average of the parameters is used.
    """
    measures_of = {}
    for name, path in zip(_names(checkpoints), checkpoints):
        model = open_model(path, ema=ema)
        if not isinstance(model.task, MapsAttention):
            raise ValueError(
                f"{path} is a model of {type(model.task).__name__}, which shows no attention; give a run of a model of "
                "image codes that does."
            )
        measures_of[name] = locality(model.task, model.params, model.on(batches=batches).eval_batches(split))
    plot_locality(measures_of, output)
    rows = {}
    for name, measures in measures_of.items():
        for layer, (distance, mass) in enumerate(zip(measures["distance"], measures["local_mass"])):
            rows[f"{name}: layer {layer + 1}"] = f"{distance.mean():.2f} cells, {mass.mean():.0%} within 1"
    return {"plot": str(output)} | rows


def segment(
    checkpoint: Positional[Annotated[Path, arg(metavar="RUN")]],
    volume: Positional[Annotated[str, arg(metavar="VOLUME")]],
    output: Positional[Annotated[Path, arg(metavar="OUTPUT")]],
    overlap: float = 0.5,
    weight: Literal["gaussian", "constant", "official"] = "gaussian",
    threshold: float = 0.5,
    batch_size: int = 4,
    backend: Literal["auto", "numpy", "libraries"] = "auto",
    truth: str = "",
    ema: bool = False,
) -> dict[str, Any]:
    """Cuts a volume into segments: affinities by a network, then watershed and agglomeration.

    Affinities are written as they come; the segments are then made from them in memory.

    Args:
      checkpoint: A run that predicts affinities, or RUN/checkpoints/STEP.
      volume: The volume: FILE or FILE::NAME, of HDF5, TIFF, NIfTI or zarr.
      output: The file to write, .zarr or .h5; it gets `affinities` [3, depth, height, width] (in the order z, y, x) and
        `segments`.
      overlap: The share of a window that the next one covers, too.
      weight: How the voxels of a window are weighted where windows overlap.
      threshold: The score (1 - median affinity) from which on fragments are not merged.
      batch_size: How many windows are predicted at a time.
      backend: Whether mahotas and waterz make the segments (libraries), or our own code (numpy), which is slower and
        makes the same ones. By default, the libraries do if they are installed.
      truth: A volume of the true segments, to compare with; 0 is not labelled.
      ema: Whether the moving average of the parameters is used.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be in [0, 1].")
    model = open_model(checkpoint, ema=ema)
    if not isinstance(model.task, AffinityPrediction):
        raise ValueError(
            f"{checkpoint} is a model of {type(model.task).__name__}; give a run that predicts affinities."
        )
    windows = Windows(crop=model.task.model.crop, overlap=overlap, weight=weight, batch_size=batch_size)
    images = load_volume(volume)
    true = load_labels(truth, images.shape, volume) if truth else None
    predict = functools.partial(affinities_of, model.task, jax.device_put(model.params))
    with VolumeFile(output) as file, _progress() as progress:
        chunks = (3, windows.crop[0], 256, 256)
        found = file.create("affinities", (3, *images.shape), "float32", chunks)
        bar = progress.add_task("predicting affinities", total=1.0)
        for first, part in slide(predict, images, windows, lambda share: progress.update(bar, completed=share)):
            found[:, first : first + part.shape[1]] = np.clip(part, 0, 1)
        segments = segment_affinities(np.asarray(found[:]), threshold, backend)
        file.create("segments", images.shape, "int32", chunks[1:])[:] = segments
    numbers: dict[str, Any] = {"written": str(output), "segments": int(segments.max())}
    return numbers if true is None else numbers | score(true, segments)._asdict()


def draw_images(
    generator: ImageGenerator,
    params: Params,
    tokenizer: Model,
    conditions: Sequence[int | None],
    sampling: Any,
    rng: jax.Array,
    batch_size: int = 32,
) -> UInt8[np.ndarray, "images ..."]:
    """Draws an image of each of these classes (None: no class) with a model of codes and the tokenizer of its codes."""
    made = []
    with _progress() as progress:
        bar = progress.add_task("drawing images", total=len(conditions))
        for start in range(0, len(conditions), batch_size):
            batch = list(conditions[start : start + batch_size])
            count = len(batch)
            batch += [None] * (batch_size - count if start else 0)  # all batches have one shape, so one compilation
            key = jax.random.fold_in(rng, start)

            def advance(share: float, start: int = start, count: int = count) -> None:
                progress.update(bar, completed=start + share * count)

            codes = np.asarray(generator.draw(params, batch, key, sampling=sampling, on_progress=advance))
            codes = regroup(codes, generator.code_values, tokenizer.task.code_values)
            made.append(tokenizer.decode(codes, jax.random.fold_in(key, 1)))
    # The authors truncate pixels to whole numbers.
    return (np.clip(np.concatenate(made)[: len(conditions)], 0, 1) * 255).astype(np.uint8)


def open_tokenizer(path: str | Path, ema: bool = False) -> Model:
    """Opens an image tokenizer, with its parameters on all devices of this process.

    Raises:
      ValueError: the model is not an image tokenizer.
    """
    model = open_model(path, ema=ema)
    if not isinstance(model.task, ImageTokenizer):
        raise ValueError(f"{path} is a model of {type(model.task).__name__}; give a run of an image tokenizer.")
    return dataclasses.replace(model, params=jax.device_put(model.params, make_layout().replicated))


def code_header(tokenizer: Model, classes: tuple[str, ...]) -> Header:
    """Returns what the files of the tokenizer's codes say of them."""
    task = tokenizer.task
    return Header(
        shape=task.code_shape,
        values=task.code_values,
        classes=classes,
        tokenizer=str(tokenizer.path.absolute()) if tokenizer.path else "",
        image_shape=task.image_shape,
        prefixes=task.prefixes,
    )


def _generator(task: Any, path: str | Path) -> ImageGenerator:
    if not isinstance(task, ImageGenerator):
        raise ValueError(f"{path} is a model of {type(task).__name__}; give a run of a model of image codes.")
    return task


def _encoded(
    tokenizer: Model, data: ImageSource, split: str, repeats: int, mirrored: bool, rng: jax.Array
) -> Iterator[tuple[Int[np.ndarray, "images views positions sub_codes"], Int[np.ndarray, " images"]]]:
    """Yields the codes of the images, and of their mirror images if `mirrored`, and their classes, batch by batch."""
    for step, batch in enumerate(_with_progress(data, split, f"encoding {split}")):
        key, real = jax.random.fold_in(rng, step), batch["mask"] > 0
        views = [batch["images"], batch["images"][..., ::-1, :]][: 1 + mirrored] * repeats
        codes = [tokenizer.encode(view, jax.random.fold_in(key, n)) for n, view in enumerate(views)]
        yield np.stack(codes, 1)[real], batch["labels"][real]


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the folders' own names, or their paths if names are not unique.

    Raises:
      ValueError: there is none.
    """
    if not paths:
        raise ValueError("no folder is named; give at least one.")
    names = [path.absolute().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _images(data: Any, images: str, batch_size: int = 0) -> ImageSource:
    """Returns the run's data of images, or other images that are cut like them."""
    if not isinstance(data, ImageSource):
        raise ValueError(f"the run's data are {type(data).__name__}, which do not hold images; give a run on images.")
    if images and data.source != "images":
        raise ValueError(
            f"images is {images!r}, but the run's {type(data).__name__} takes no other images; leave it out."
        )
    changes = {"images": images, "batch_size": batch_size}
    return dataclasses.replace(data, eval_limit=0, **{name: value for name, value in changes.items() if value})


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True)


def _with_progress(data: ImageSource, split: str, what: str) -> Iterator[dict[str, np.ndarray]]:
    total = -(-data.count(split) // data.batch_size)
    total = min(total, data.eval_limit or total)
    with _progress() as progress:
        yield from progress.track(data.eval_batches(split), total=total, description=what)


def _pixels(images: np.ndarray) -> UInt8[np.ndarray, "images ..."]:
    """Returns images as bytes; floats are limited to [0, 1]."""
    return images if images.dtype == np.uint8 else np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _slices(pixels: UInt8[np.ndarray, "images ..."]) -> UInt8[np.ndarray, "images height width 3"]:
    """Returns what a picture can show: the middle slice of a volume, and grey for a single channel.

    Raises:
      ValueError: the number of channels is neither 1 nor 3.
    """
    if pixels.ndim == 5:
        pixels = pixels[:, pixels.shape[1] // 2]
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(f"images have {pixels.shape[-1]} channels, but a picture has 1 or 3; write FILE.npz.")
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def _filled(pixels: UInt8[np.ndarray, "images ..."], columns: int) -> list[np.ndarray]:
    """Returns a row of the picture, filled up with white images."""
    return [*pixels, *[np.full_like(pixels[0], 255)] * (columns - len(pixels))]


def _must_be_picture(path: Path) -> None:
    """Raises a ValueError, before any work is done, if the path's suffix is not that of a picture."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"output is {path}; its suffix must be that of a picture, such as .png.")


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _stored_header(data: Any) -> Header | None:
    """Returns what the run's files of codes say of them, if they are here."""
    if not isinstance(data, CodeData):
        return None
    try:
        return open_codes(Path(data.path) / "train").header
    except FileNotFoundError:
        return None


def _classes(labels: tuple[str, ...], classes: tuple[str, ...], count: int) -> tuple[list[int | None], list[str]]:
    """Returns the numbers and names of the wanted classes, for a model that knows `count` classes."""
    names = [*classes, *map(str, range(len(classes), count))] if count else []
    ids: list[int | None] = []
    for label in labels or names[: len(classes) or count] or ["none"]:
        if label == "none":
            ids.append(None)
        elif label in names:
            ids.append(names.index(label))
        elif label.isdigit() and int(label) < count:
            ids.append(int(label))
        else:
            raise ValueError(f"there is no class {label!r}; choose from {', '.join([*names[:20], 'none'])}.")
    return ids, ["none" if label is None else names[label] for label in ids]


def _write_images(
    pixels: UInt8[np.ndarray, "images ..."],
    names: list[str],
    labels: list[int | None],
    columns: int,
    output: Path,
) -> None:
    if output.suffix == ".npz":
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez(output, pixels, np.array([-1 if label is None else label for label in labels]))
    elif output.suffix:
        _save(image_grid(_slices(pixels), columns, names), output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        for number, (image, name) in enumerate(zip(pixels, names)):
            safe = "".join(c if c.isalnum() else "_" for c in name)
            path = output / f"{number:06d}_{safe}"
            if image.ndim == 3:
                Image.fromarray(_slices(image[None])[0]).save(path.with_suffix(".png"))
            else:
                first, *others = [Image.fromarray(_slices(part[None])[0]) for part in image]
                first.save(path.with_suffix(".tif"), save_all=True, append_images=others)


def _text_rows(corpus: str, name: str, rows: int, length: int, vocabulary: int) -> Int[np.ndarray, "rows length"]:
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"the tokenizer {name} has {tokenizer.vocab_size} ids, but the images have {vocabulary} values; give a "
            "tokenizer with no more ids (`jaxtok tokenizer FILE --vocab-size N` makes one)."
        )
    ids: list[int] = []
    documents = open_corpus(corpus, "train")
    for index in np.random.default_rng(0).permutation(len(documents)):
        document = documents[int(index)]
        ids += [] if document is None else tokenizer.encode(document)
        if len(ids) >= rows * length:
            break
    if len(ids) < length:
        raise ValueError(f"{corpus} has {len(ids)} tokens, fewer than the {length} of an image; give more text.")
    whole = len(ids) // length * length
    return np.array(ids[:whole]).reshape(-1, length)[:rows]
