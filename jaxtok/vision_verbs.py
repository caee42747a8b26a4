"""What `jaxtok vision` does, as functions: images to codes and back, images from models of codes, and analyses."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jaxtyping import Int, UInt8
from PIL import Image
from tyro.conf import Positional

from jaxtok.data.codes import CodeData, Header, open_codes, regroup, write_codes
from jaxtok.data.corpora import SPLITS, open_corpus
from jaxtok.data.images import ImageData
from jaxtok.protocols import ImageTokenizer, Params
from jaxtok.tokenizers import load_tokenizer
from jaxtok.training.checkpoints import load, must_be_free
from jaxtok.training.mesh import make_layout
from jaxtok.vision import elm_masked, elm_sampling
from jaxtok.vision.elm import ElmModeling
from jaxtok.vision.elm_masked import MaskedElmModeling, MaskedSampling
from jaxtok.vision.elm_sampling import ElmSampling
from jaxtok.vision.grids import image_grid
from jaxtok.vision.token_statistics import (
    compare_tokens,
    locality,
    plot_locality,
    plot_statistics,
    stored_tokens,
)


def tokenize(
    checkpoint: Positional[Path],
    output: Positional[Path],
    images: str = "",
    splits: tuple[Literal["train", "validation", "test"], ...] = SPLITS,
    draws: int = 1,
    flip: bool | None = None,
    batch_size: int = 0,
    seed: int = 0,
    ema: bool = False,
) -> Path:
    """Encodes the images of every split with a tokenizer, for `CodeData` (--data.path OUTPUT).

    A split that is there already, of the same tokenizer, is kept: called again, it goes on with those that are missing.

    Args:
      checkpoint: a run of an image tokenizer, or RUN/checkpoints/STEP.
      output: the folder to write, with one for each split.
      images: emoji, sprites, digits, folder:PATH, tfds:NAME or arrayrecord:PATTERN; default: the run's own.
      splits: of the images.
      draws: how often each image is encoded, where codes are drawn: training takes one of them at each visit.
      flip: also encode the mirror image of each one for training; default: if the tokenizer was trained on them.
      batch_size: images at a time; 0: as in the run.
      seed: of the draws.
      ema: take the moving average of the tokenizer's parameters.
    """
    tokenizer = OpenTokenizer.open(checkpoint, ema)
    if draws < 1 or (draws > 1 and not tokenizer.draws):
        raise ValueError(
            f"draws is {draws}; "
            + ("it must be at least 1." if draws < 1 else "this tokenizer's codes of an image are always the same: 1.")
        )
    data = _images(tokenizer.data, images, batch_size)
    header = tokenizer.header(data.classes or ("0",))
    for number, split in enumerate(splits):
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
        rng = jax.random.fold_in(jax.random.key(seed), number)
        write_codes(output / split, header, _encoded(tokenizer, data, split, repeats, mirrored, rng))
    return output


def reconstruct(
    checkpoint: Positional[Path],
    output: Positional[Path] = Path("reconstructions.png"),
    images: str = "",
    split: Literal["train", "validation", "test", "all"] = "validation",
    count: int = 16,
    columns: int = 8,
    batches: int = 0,
    seed: int = 0,
    ema: bool = False,
) -> dict[str, Any]:
    """Encodes and decodes held-out images, shows some above their reconstructions, and measures how near they are.

    Args:
      checkpoint: a run of an image tokenizer, or RUN/checkpoints/STEP.
      output: the picture to write.
      images: emoji, sprites, digits, folder:PATH, tfds:NAME or arrayrecord:PATTERN; default: the run's own.
      split: of the images.
      count: images in the picture, of those that are measured.
      columns: of the picture.
      batches: measure on so many, of images from all over the split; 0: all.
      seed: of which are shown, and of codes that are drawn.
      ema: take the moving average of the tokenizer's parameters.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"count is {count} and columns {columns}; both must be at least 1.")
    tokenizer = OpenTokenizer.open(checkpoint, ema)
    data = dataclasses.replace(_images(tokenizer.data, images), eval_limit=batches)
    total = len(data.pictures(split))
    total = min(total, batches * data.batch_size or total)
    shown = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    kept: list[np.ndarray] = []

    def measured() -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(_with_progress(data, split, "decoding")):
            places = enumerate(batch["images"], step * data.batch_size)
            kept.extend(image for (n, image), real in zip(places, batch["mask"]) if real and n in shown)
            yield batch

    numbers = tokenizer.task.evaluate(tokenizer.params, measured())
    if not kept:
        raise ValueError("none of the images that were to be shown could be read; choose another seed.")
    decoded = tokenizer.decode(tokenizer.encode(np.stack(kept), jax.random.key(seed)))
    tiles = [
        image
        for start in range(0, len(kept), columns)
        for row in (kept, decoded)
        for image in _filled(row[start : start + columns], columns)
    ]
    _save(image_grid(np.stack(tiles), columns), output)
    return {"picture": str(output), "split": split} | numbers


def generate(
    checkpoint: Positional[Path],
    output: Positional[Path] = Path("samples.png"),
    tokenizer: Path | None = None,
    labels: tuple[str, ...] = (),
    per_class: int = 4,
    guidance: float = 4.0,
    schedule: Literal["constant", "linear", "cos", "log", "square", "square_root"] = "linear",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rounds: int = 12,
    noise: float = 4.0,
    batch_size: int = 32,
    seed: int = 0,
    ema: bool = False,
) -> dict[str, Any]:
    """Images of classes, from a model of codes.

    Args:
      checkpoint: a run of a model of codes, or RUN/checkpoints/STEP.
      output: FILE.png: one picture, a row of it for each class; FILE.npz: all images as `arr_0` (and labels as
        `arr_1`), as ADM's evaluator reads them; else a folder, of a PNG for each image.
      tokenizer: the run whose tokenizer made the codes; default: what the files of codes say.
      labels: classes, by their names or numbers, or `none`; default: all.
      per_class: images of each.
      guidance: the scale, 1 for none.
      schedule: of the guidance, over positions or rounds (of a masked model: constant or linear).
      temperature: of autoregressive models; below 1 is safer.
      top_k: only the k most likely values of a sub-code; 0: all.
      top_p: of these, only the most likely that together have this probability.
      rounds: of a masked model.
      noise: on the confidence of a masked model, in the first round.
      batch_size: images at a time.
      seed: another seed, other images.
      ema: take the moving average of the model's parameters.
    """
    if per_class < 1 or batch_size < 1:
        raise ValueError(f"per_class is {per_class} and batch_size {batch_size}; both must be at least 1.")
    loaded = load(checkpoint, ema)
    task = loaded.task
    if not isinstance(task, ElmModeling | MaskedElmModeling):
        raise ValueError(f"{checkpoint} is of {type(task).__name__}; give a run of a model of image codes.")
    header = _stored_header(loaded.experiment.data)
    if tokenizer is None and not (header and header.tokenizer):
        raise ValueError(f"nothing says which tokenizer made the codes of {checkpoint}; give its run as --tokenizer.")
    decoder = OpenTokenizer.open(tokenizer or Path(header.tokenizer))
    ids, names = _classes(labels, header.classes if header else (), task.model.num_classes)
    if task.model.grid**2 != math.prod(decoder.task.grid):
        raise ValueError(
            f"the model's grid has {task.model.grid**2} positions, but the tokenizer's {math.prod(decoder.task.grid)}; "
            "give the tokenizer of its codes."
        )
    sampling: Any
    if isinstance(task, ElmModeling):
        sampling = ElmSampling(
            guidance=guidance, schedule=schedule, temperature=temperature, top_k=top_k or None, top_p=top_p
        )
    else:
        sampling = MaskedSampling(rounds=rounds, guidance=guidance, schedule=schedule, temperature=noise)
    wanted = [label for label in ids for _ in range(per_class)]
    pixels = draw_images(task, loaded.params, decoder, wanted, sampling, jax.random.key(seed), batch_size)
    _write_images(pixels, [names[n // per_class] for n in range(len(wanted))], wanted, per_class, output)
    return {"images": len(pixels), "written": str(output)}


def statistics(
    codes: Positional[tuple[Path, ...]],
    output: Path = Path("token_statistics.png"),
    split: Literal["train", "validation", "test"] = "train",
    corpus: str = "",
    tokenizer: str = "bytes",
) -> dict[str, Any]:
    """How random image tokens are: the divergence of unigrams and neighbours from uniform, beside text's if asked for.

    Each is of the bits of a position as one token. Text is cut into rows of as many tokens, of a tokenizer with as many
    ids at most, so that the estimates are alike.

    Args:
      codes: folders that `jaxtok vision tokenize` wrote, of as many values a position.
      output: the plot.
      split: of the images.
      corpus: of text: python, a file or folder, tfds:NAME or arrayrecord:PATTERN.
      tokenizer: of the text: bytes, or a tokenizer's file.
    """
    sources, sizes = {}, {}
    for name, folder in zip(_names(codes), codes):
        header = open_codes(folder / split).header
        bits = (header.vocab_size - 1).bit_length()
        data = CodeData(path=str(folder), grid=header.grid[0], sub_codes=header.sub_codes, code_bits=bits)
        sources[name], sizes[name] = stored_tokens(data, split), header.vocab_size**header.sub_codes
    if len(set(sizes.values())) > 1:
        values = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"positions have other numbers of values ({values}); look at them one by one.")
    vocabulary = max(sizes.values())
    if corpus:
        sources["text"] = _text_rows(corpus, tokenizer, *next(iter(sources.values())).shape, vocabulary)
    found = compare_tokens(sources, vocabulary)
    plot_statistics(found, output)
    rows = {
        f"{name}: {field}": value for name, row in found.items() for field, value in dataclasses.asdict(row).items()
    }
    return {"plot": str(output), "vocabulary": vocabulary} | rows


def attention(
    checkpoints: Positional[tuple[Path, ...]],
    output: Path = Path("attention_locality.png"),
    split: Literal["train", "validation", "test"] = "validation",
    batches: int = 4,
    ema: bool = False,
) -> dict[str, Any]:
    """How far the attention of models of codes reaches, layer by layer: a plot of one or several models.

    Args:
      checkpoints: runs of models of codes.
      output: the plot.
      split: of each run's own codes.
      batches: so many of them; 0: all.
      ema: take the moving average of the parameters.
    """
    found = {}
    for name, path in zip(_names(checkpoints), checkpoints):
        loaded = load(path, ema)
        if not isinstance(loaded.task, ElmModeling | MaskedElmModeling):
            raise ValueError(f"{path} is of {type(loaded.task).__name__}; give runs of models of image codes.")
        data = dataclasses.replace(loaded.experiment.data, eval_limit=batches)
        found[name] = locality(loaded.task.model, loaded.params, data.eval_batches(split))
    plot_locality(found, output)
    rows = {}
    for name, measures in found.items():
        for layer, (distance, mass) in enumerate(zip(measures["distance"], measures["local_mass"])):
            rows[f"{name}: layer {layer + 1}"] = f"{distance.mean():.2f} cells, {mass.mean():.0%} within 1"
    return {"plot": str(output)} | rows


def draw_images(
    task: ElmModeling | MaskedElmModeling,
    params: Params,
    tokenizer: OpenTokenizer,
    labels: Sequence[int | None],
    sampling: ElmSampling | MaskedSampling,
    rng: jax.Array,
    batch_size: int = 32,
) -> UInt8[np.ndarray, "images height width 3"]:
    """An image of each of these classes (None: of no class), by a model of codes and the tokenizer of its codes."""
    draw = (elm_sampling if isinstance(task, ElmModeling) else elm_masked).generate
    made = []
    with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as progress:
        for start in progress.track(range(0, len(labels), batch_size), description="drawing images"):
            some = list(labels[start : start + batch_size])
            some += [None] * (batch_size - len(some) if start else 0)  # one shape, one compilation
            codes = draw(task.model, params, some, sampling=sampling, rng=jax.random.fold_in(rng, start))
            made.append(tokenizer.decode(regroup(np.asarray(codes), task.model.code_bits, tokenizer.task.sub_codes)))
    # The authors cut pixels off to whole numbers.
    return (np.clip(np.concatenate(made)[: len(labels)], 0, 1) * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class OpenTokenizer:
    """An image tokenizer on all devices of this process."""

    path: Path
    task: Any
    params: Params
    data: Any
    draws: bool
    """Whether its codes are drawn."""
    layout: Any

    @classmethod
    def open(cls, path: Path, ema: bool = False) -> OpenTokenizer:
        loaded = load(path, ema)
        task = loaded.task
        if not isinstance(task, ImageTokenizer):
            raise ValueError(f"{path} is of {type(task).__name__}; give a run of an image tokenizer.")
        layout = make_layout()
        params = jax.device_put(loaded.params, layout.replicated)
        draws = bool(getattr(task.model, "needs_draws", False))
        return cls(Path(path), task, params, loaded.experiment.data, draws, layout)

    def header(self, classes: tuple[str, ...]) -> Header:
        return Header(
            grid=self.task.grid,
            sub_codes=self.task.sub_codes,
            vocab_size=self.task.vocab_size,
            classes=classes,
            tokenizer=str(self.path.absolute()),
            image_size=self.task.image_size,
        )

    def encode(self, images: UInt8[np.ndarray, "batch height width 3"], rng: jax.Array) -> np.ndarray:
        """Codes [batch, positions, sub_codes]."""

        def encoded(images):
            return self.task.encode(self.params, images.astype(jnp.float32) / 255, rng if self.draws else None)

        return self._on_devices(encoded, images)

    def decode(self, codes: Int[np.ndarray, "batch positions sub_codes"]) -> np.ndarray:
        """Images [batch, height, width, 3], not limited to [0, 1]."""
        return self._on_devices(functools.partial(self.task.decode, self.params), codes)

    def _on_devices(self, function: Callable[[jax.Array], jax.Array], array: np.ndarray) -> np.ndarray:
        """Rows are added until the devices divide them."""
        count, more = len(array), -len(array) % self.layout.mesh.size
        whole = np.concatenate([array, np.repeat(array[-1:], more, axis=0)])
        with self.layout.active():
            axes = ("batch", *[None] * (whole.ndim - 1))
            put = jax.device_put(whole, self.layout.sharding(axes, whole.shape, "the batch"))
            return np.asarray(function(put))[:count]


def _encoded(
    tokenizer: OpenTokenizer, data: ImageData, split: str, repeats: int, mirrored: bool, rng: jax.Array
) -> Iterator[tuple[Int[np.ndarray, "images views positions sub_codes"], Int[np.ndarray, " images"]]]:
    """Codes of the images and their mirror images in turn, and their classes, batch by batch."""
    for step, batch in enumerate(_with_progress(data, split, f"encoding {split}")):
        key, real = jax.random.fold_in(rng, step), batch["mask"] > 0
        views = [batch["images"], batch["images"][:, :, ::-1]][: 1 + mirrored] * repeats
        codes = [tokenizer.encode(view, jax.random.fold_in(key, n)) for n, view in enumerate(views)]
        yield np.stack(codes, 1)[real], batch["labels"][real]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, where they tell them apart.

    Raises:
      ValueError: there is none.
    """
    if not paths:
        raise ValueError("no folder is named; give at least one.")
    names = [path.absolute().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _images(data: Any, images: str, batch_size: int = 0) -> ImageData:
    changes = {"images": images, "batch_size": batch_size}
    return dataclasses.replace(data, eval_limit=0, **{name: value for name, value in changes.items() if value})


def _with_progress(data: ImageData, split: str, what: str) -> Iterator[dict[str, np.ndarray]]:
    total = -(-len(data.pictures(split)) // data.batch_size)
    total = min(total, data.eval_limit or total)
    with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as progress:
        yield from progress.track(data.eval_batches(split), total=total, description=what)


def _filled(images: Sequence[np.ndarray], columns: int) -> list[np.ndarray]:
    """A row of the grid, with white for what is missing, where both are 8-bit."""
    pixels = [
        image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8) for image in images
    ]
    return pixels + [np.full_like(pixels[0], 255)] * (columns - len(pixels))


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _stored_header(data: Any) -> Header | None:
    try:
        return open_codes(Path(data.path) / "train").header
    except FileNotFoundError:
        return None


def _classes(labels: tuple[str, ...], classes: tuple[str, ...], count: int) -> tuple[list[int | None], list[str]]:
    """Numbers and names of the classes that are asked for."""
    names = [*classes, *map(str, range(len(classes), count))]
    ids: list[int | None] = []
    for label in labels or names[: len(classes) or count]:
        if label == "none":
            ids.append(None)
        elif label in names:
            ids.append(names.index(label))
        elif label.isdigit() and int(label) < count:
            ids.append(int(label))
        else:
            raise ValueError(f"there is no class {label!r}; choose of {', '.join(names[:20])}, or none.")
    return ids, ["none" if label is None else names[label] for label in ids]


def _write_images(
    pixels: UInt8[np.ndarray, "images height width 3"],
    names: list[str],
    labels: list[int | None],
    columns: int,
    output: Path,
) -> None:
    if output.suffix == ".npz":
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez(output, pixels, np.array([-1 if label is None else label for label in labels]))
    elif output.suffix:
        _save(image_grid(pixels, columns, names), output)
    else:
        must_be_free(output)
        output.mkdir(parents=True, exist_ok=True)
        for number, (image, name) in enumerate(zip(pixels, names)):
            safe = "".join(c if c.isalnum() else "_" for c in name)
            Image.fromarray(image).save(output / f"{number:06d}_{safe}.png")


def _text_rows(corpus: str, name: str, rows: int, length: int, vocabulary: int) -> Int[np.ndarray, "rows length"]:
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"the tokenizer {name} has {tokenizer.vocab_size} ids, but the images {vocabulary} values; give one that "
            "has no more (`jaxtok tokenizer FILE --vocab-size N` makes it)."
        )
    ids: list[int] = []
    documents = open_corpus(corpus, "train")
    for index in np.random.default_rng(0).permutation(len(documents)):
        ids += tokenizer.encode(documents[int(index)])
        if len(ids) >= rows * length:
            break
    if len(ids) < length:
        raise ValueError(f"{corpus} has {len(ids)} tokens, less than one image's {length}; give more text.")
    whole = len(ids) // length * length
    return np.array(ids[:whole]).reshape(-1, length)[:rows]
