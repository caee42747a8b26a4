"""Image data: sources, odd files, crops, flips, order, resumption and shares of processes."""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pickle
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tiny import check_spec

from jaxtok import verbs
from jaxtok.configuration import from_json, load_config, override, to_json
from jaxtok.data import pictures as pictures_module
from jaxtok.data.images import ImageData, centre_crop, random_crop
from jaxtok.data.pictures import Picture, decode, open_pictures, write_array_record
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.verbs.convert import convert
from jaxtok.vision.classification import ImageClassification
from jaxtok.vision.vit import LinearViTConfig

DATASETS = {"images": lambda texts, folder: ImageData(images="digits", size=8, batch_size=64, workers=0)}

CLASSES = ("ant", "bee", "cat")
COUNT = 60


def pixels_of(number, height=9, width=12):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Sixty noisy pictures of three classes, which can be told apart by their first pixel."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        path = root / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(pixels_of(number)))
    (root / "readme.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture
def data(folder):
    return lambda **options: ImageData(
        **{"images": f"folder:{folder}", "size": 8, "batch_size": 4, "workers": 0} | options
    )


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(batches, name="images"):
    return np.concatenate([batch[name] for batch in batches])


def as_set(images):
    return {image.tobytes() for image in images}


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_as_the_spec_says(data):
    images = data()
    (batch,) = take(images.train_batches(), 1)
    for made in (batch, *images.eval_batches("all")):
        check_spec(made, images)
    assert images.classes == CLASSES


def test_an_evaluation_has_every_picture_once(data):
    batches = list(data(batch_size=7).eval_batches("all"))
    mask = joined(batches, "mask") > 0
    assert mask.sum() == COUNT and len(mask) == 63 and not mask[COUNT:].any()
    numbers = [c + 3 * i for c in range(3) for i in range(COUNT // 3)]  # by class, then by name
    expected = np.stack([centre_crop(Image.fromarray(pixels_of(number)), 8) for number in numbers])
    np.testing.assert_array_equal(joined(batches)[mask], expected)
    np.testing.assert_array_equal(joined(batches, "labels")[mask], np.array(numbers) % 3)


def test_splits_are_disjoint_complete_and_of_the_name(data, folder, tmp_path):
    splits = {split: joined(data(holdout=0.2).eval_batches(split)) for split in ("train", "validation", "test")}
    masks = {split: joined(data(holdout=0.2).eval_batches(split), "mask") > 0 for split in splits}
    sets = [as_set(splits[split][masks[split]]) for split in splits]
    assert sum(map(len, sets)) == len(set.union(*sets)) == COUNT
    assert 5 <= len(sets[1]) <= 20 and 5 <= len(sets[2]) <= 20
    copy = tmp_path / "copy"  # other pictures beside them move none
    shutil.copytree(folder, copy)
    for number in range(COUNT, COUNT + 20):
        (copy / "ant" / f"{number}.png").write_bytes(encoded(pixels_of(number)))
    more = data(holdout=0.2, images=f"folder:{copy}")
    assert sets[1] <= as_set(joined(more.eval_batches("validation")))


def test_a_limited_evaluation_is_a_sample(data):
    images = data(eval_limit=3)
    batches = list(images.eval_batches("all"))
    assert_equal(batches, list(images.eval_batches("all")))
    assert_equal(batches, list(data(eval_limit=3, seed=1).eval_batches("all")))
    assert len(batches) == 3 and len(set(joined(batches, "labels"))) == 3
    assert len(list(data(eval_limit=1000).eval_batches("all"))) == COUNT // 4


@pytest.mark.parametrize("options", [{}, {"workers": 2, "prefetch": 3, "crop": "random"}])
def test_training_resumes_at_every_place(data, options):
    images = data(**options)
    total = 2 * len(images.pictures("train")) // 4 + 3
    reference = take(images.train_batches(), total)
    running = images.train_batches()
    for place in range(total - 1):
        state = json.loads(json.dumps(running.get_state()))
        resumed = images.train_batches()
        resumed.set_state(state)
        assert_equal(take(resumed, 1), reference[place : place + 1])
        next(running)
    running.set_state({"next_index": 2})  # back, in an iterator that was in use
    assert_equal(take(running, 2), reference[2:4])


def test_every_epoch_is_a_new_order_of_all_pictures(data):
    images = data(flip=False, batch_size=1)
    size = len(images.pictures("train"))
    seen = [image.tobytes() for image in joined(take(images.train_batches(), 2 * size))]
    assert set(seen[:size]) == set(seen[size:]) and len(set(seen[:size])) == size
    assert seen[:size] != seen[size:]
    plain = joined(take(data(flip=False, batch_size=1, shuffle=False).train_batches(), size + 1))
    np.testing.assert_array_equal(plain[:size], joined(data(batch_size=1).eval_batches("train")))
    np.testing.assert_array_equal(plain[size], plain[0])


@pytest.mark.parametrize("parts", [[range(0, 2), range(2, 4)], [range(i, i + 1) for i in range(4)], [range(1, 3)]])
def test_rows_are_the_same_however_they_are_divided(data, parts):
    images = data(crop="random")
    whole, held_out = take(images.train_batches(), 15), list(images.eval_batches("all"))
    for rows in parts:
        wanted = [{name: array[rows.start : rows.stop] for name, array in batch.items()} for batch in whole]
        assert_equal(take(images.train_batches(rows), 15), wanted)
        wanted = [{name: array[rows.start : rows.stop] for name, array in batch.items()} for batch in held_out]
        assert_equal(list(images.eval_batches("all", rows)), wanted)


def test_threads_do_not_change_the_batches_and_the_seed_does(data):
    one = take(data(crop="random").train_batches(), 20)
    assert_equal(take(data(crop="random", workers=3, prefetch=2).train_batches(), 20), one)
    other = take(data(crop="random", seed=1).train_batches(), 20)
    assert any((a["images"] != b["images"]).any() for a, b in zip(one, other))


def test_half_the_images_of_training_are_mirrored(data):
    mirrored, plain = (joined(take(data(flip=flip).train_batches(), 200)) for flip in (True, False))
    same = (mirrored == plain).all((1, 2, 3))
    np.testing.assert_array_equal(mirrored[~same], plain[~same][:, :, ::-1])
    assert abs(same.mean() - 0.5) < 3 * 0.5 / np.sqrt(800)  # three standard deviations
    assert not (joined(data(flip=True).eval_batches("train")) != joined(data(flip=False).eval_batches("train"))).any()


# ---------------------------------------------------------------------------------------------------------------- crops


def resample(x, size, kernel, support):
    """Along axis 0, in float64: each new pixel is a weighted mean of those within the stretched kernel."""
    scale = len(x) / size
    stretch = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    distance = (np.arange(len(x)) + 0.5 - centres[:, None]) / stretch
    weights = np.where(np.abs(distance) < support, kernel(np.abs(distance)), 0)
    return np.einsum("oi,i...->o...", weights / weights.sum(1, keepdims=True), x)


def cubic(d, a=-0.5):
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    return np.where(d < 1, near, (((d - 5) * d + 8) * d - 4) * a)


def resize(x, shape, kernel, support):
    """The width, then the height; Pillow rounds to 8 bits after each."""
    for axis in (1, 0):
        x = np.moveaxis(resample(np.moveaxis(x, axis, 0), shape[axis], kernel, support), 0, axis)
        x = np.clip(np.floor(x + 0.5), 0, 255)
    return x


def reference_crop(pixels, size):
    x = pixels.astype(np.float64)
    while min(x.shape[:2]) >= 2 * size:
        x = resize(x, (x.shape[0] // 2, x.shape[1] // 2), np.ones_like, 0.5 + 1e-9)
    scale = size / min(x.shape[:2])
    shape = [round(n * scale) for n in x.shape[:2]]
    x = resize(x, shape, cubic, 2.0)
    top, left = ((n - size) // 2 for n in shape)
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"), [(64, 64, 32), (50, 75, 16), (40, 33, 24), (7, 5, 16), (128, 90, 8), (16, 16, 16)]
)
def test_the_centre_crop_is_adms(height, width, size):
    smooth = np.asarray(Image.fromarray(pixels_of(3, 6, 6)).resize((width, height), Image.Resampling.BICUBIC))
    got = centre_crop(Image.fromarray(smooth), size)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    difference = np.abs(got - reference_crop(smooth, size))
    assert difference.max() <= 1 and difference.mean() < 0.1  # Pillow's weights have 22 bits


def test_random_crops_cover_what_they_should():
    """A ramp tells where a crop was taken: its corners give place and extent."""
    width, height = 240, 160
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
    image, rng = Image.fromarray(ramp), np.random.default_rng(0)
    crops = np.stack([random_crop(image, 16, rng, (0.2, 0.5)) for _ in range(300)]).astype(np.float64)
    w = (crops[:, 8, 15, 0] - crops[:, 8, 0, 0]) * 16 / 15
    h = (crops[:, 15, 8, 1] - crops[:, 0, 8, 1]) * 16 / 15
    area, aspect = w * h / (width * height), w / h
    assert 0.17 < area.min() < 0.24 and 0.45 < area.max() < 0.55
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.45
    assert crops[:, 8, 0, 0].min() < 10 and crops[:, 8, 15, 0].max() > 225  # every place
    whole = random_crop(image.resize((4, 4)), 16, np.random.default_rng(0), (1.0, 1.0))
    assert whole.shape == (16, 16, 3)
    assert random_crop(Image.fromarray(pixels_of(0, 1, 50)), 8, rng).shape == (8, 8, 3)  # no try fits


# ------------------------------------------------------------------------------------------------------------ odd files

RED = np.zeros((10, 14, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
RAMP16 = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


def palette_with_transparency():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 30, 30, 0, 0, 255] + [0] * 762)
    image.putpixel((0, 0), 1)
    return encoded(image, transparency=1)


def animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 30, 30), (0, 0, 255))]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def rotated():
    image = Image.new("RGB", (8, 16), (0, 0, 255))
    image.paste((200, 30, 30), (0, 0, 8, 8))  # the upper half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    return encoded(image, "PNG", exif=exif.tobytes())


def half_transparent():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:, 3] = 255
    return encoded(pixels)


ODD = {
    "cmyk": (encoded(Image.fromarray(RED).convert("CMYK"), "JPEG", quality=95), (10, 14), [200, 30, 30]),
    "palette": (encoded(Image.fromarray(RED).quantize(4)), (10, 14), [200, 30, 30]),
    "palette and transparency": (palette_with_transparency(), (8, 8), [200, 30, 30]),
    "grey": (encoded(RED[..., 0]), (10, 14), [200, 200, 200]),
    "grey and alpha": (encoded(Image.new("LA", (8, 8), (0, 51))), (8, 8), [204, 204, 204]),
    "one bit": (encoded(Image.new("1", (8, 8), 1)), (8, 8), [255, 255, 255]),
    "one pixel": (encoded(RED[:1, :1]), (1, 1), [200, 30, 30]),
    "animated": (animation(), (8, 8), [200, 30, 30]),
    "16 bits": (encoded(np.full((8, 8), 51400, np.uint16)), (8, 8), [200, 200, 200]),
    "pixels": (RED, (10, 14), [200, 30, 30]),
    "grey pixels": (RED[..., :1], (10, 14), [200, 200, 200]),
    "16-bit pixels": (np.full((8, 8, 3), 51400, np.uint16), (8, 8), [200, 200, 200]),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_converted(kind):
    content, shape, colour = ODD[kind]
    got = np.asarray(decode(content))
    assert got.dtype == np.uint8 and got.shape == (*shape, 3)
    middle = got[shape[0] // 2, shape[1] // 2].astype(int)
    assert np.abs(middle - colour).max() <= 6, middle  # JPEG and palettes are not exact


def test_transparency_rotation_and_16_bits():
    half = np.asarray(decode(half_transparent()))
    assert (half[:, :4] == 255).all() and (half[:, 4:] == 0).all()  # on white
    assert np.asarray(decode(palette_with_transparency()))[0, 0].tolist() == [255, 255, 255]
    turned = np.asarray(decode(rotated()))
    assert turned.shape == (8, 16, 3)  # what was above is now at the right
    assert (turned[:, 8:] == [200, 30, 30]).all() and (turned[:, :8] == [0, 0, 255]).all()
    np.testing.assert_array_equal(np.asarray(decode(encoded(RAMP16)))[..., 1], np.round(RAMP16 / 257))


def png(pixels, bits, transparent):
    """A PNG of grey or coloured pixels of 1 to 16 bits, in which one value is transparent."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = ("".join(f"{value:0{bits}b}" for value in row.ravel().tolist()) for row in pixels)
    rows = (row + "0" * (-len(row) % 8) for row in rows)
    data = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    value = struct.pack(f">{np.size(transparent)}H", *np.ravel(transparent).tolist())
    chunks = [(b"IHDR", header), (b"tRNS", value), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


@pytest.mark.parametrize("which", ["first", "highest", "another"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, "colours 8", "colours 16"])
def test_the_transparent_value_of_a_png_is_white_and_the_rest_is_as_it_was(bits, which):
    coloured, bits = isinstance(bits, str), int(str(bits).split()[-1])
    top = 2**bits - 1
    pixels = np.random.default_rng(0).integers(0, top + 1, (16, 16, 3) if coloured else (16, 16))
    transparent = {"first": 0, "highest": top, "another": top // 3}[which]
    pixels[:4, :4] = transparent
    clear = (pixels == transparent).all(-1, keepdims=True) if coloured else pixels == transparent
    expected = np.where(clear, 255, np.round(pixels * (255 / top)))
    got = np.asarray(decode(png(pixels, bits, [transparent] * 3 if coloured else transparent))).astype(int)
    # Of colours of 16 bits, Pillow takes the upper 8.
    assert np.abs(got - (expected if coloured else expected[..., None])).max() <= (coloured and bits == 16)


def huge():
    """A black PNG of 20,000 x 20,000 one-bit pixels in 50 kB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encoded(Image.new("1", (20_000, 20_000)), optimize=False)


BAD = {
    "truncated.png": (encoded(pixels_of(0, 64, 64))[:2000], "truncated"),
    "truncated.jpg": (encoded(pixels_of(0, 64, 64), "JPEG")[:700], "truncated"),
    "empty.png": (b"", "no picture"),
    "text.png": (b"this is a text", "no picture"),
    "header.gif": (b"GIF89a", ""),
    "huge.png": (huge(), "exceeds limit|are more than"),
    "thin.png": (encoded(np.zeros((1, 200_000), np.uint8)), "too long and thin"),
    "floats.tiff": (encoded(np.ones((4, 4), np.float32), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_once_and_their_place_is_filled(folder, data, tmp_path, name):
    """In training by the next good picture; in an evaluation it does not count."""
    root = tmp_path / "pictures"
    (root / "only").mkdir(parents=True)
    for number in range(6):
        shutil.copy(folder / CLASSES[number % 3] / f"{number:02}.png", root / "only" / f"{number}.png")
    (root / "only" / "2.png").unlink()
    (root / "only" / f"2-{name}").write_bytes(BAD[name][0])
    images = data(images=f"folder:{root}", size=32, shuffle=False, flip=False, batch_size=2)
    images._opened["train"] = images.pictures("all")  # so few pictures have no splits
    with pytest.warns(UserWarning, match=rf"the picture only/2-{name} of .* is left out: .*({BAD[name][1]})") as told:
        batches = take(images.train_batches(), 6)  # two epochs
    assert len([w for w in told if "left out" in str(w.message)]) == 1
    seen = joined(batches)
    np.testing.assert_array_equal(seen[2], seen[3])  # the next one
    assert len(as_set(seen)) == 5 and (joined(batches, "mask") == 1).all()
    held_out = list(images.eval_batches("all"))
    assert joined(held_out, "mask").tolist() == [1, 1, 0, 1, 1, 1] and not joined(held_out)[2].any()


def test_a_source_without_a_readable_picture(data, tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(30):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"")
    images = data(images=f"folder:{tmp_path}")
    for batches in (images.train_batches, images.eval_batches):
        with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=r"not one of the \d+ pict"):
            batches()


def test_a_source_that_fails_in_the_middle_of_a_run(data, monkeypatch):
    """A record that cannot be read is left out; when there is nothing left, the run ends with a reason."""
    images = data(batch_size=2)
    batches = images.train_batches()
    whole, pictures = next(batches), images.pictures("train")
    get, fails = type(pictures).__getitem__, {5, 6}

    def broken(self, index):
        if index in fails:
            raise RuntimeError("the disk is gone")
        return get(self, index)

    monkeypatch.setattr(type(pictures), "__getitem__", broken)
    with pytest.warns(UserWarning, match="the picture number [56] of .* is left out: the disk is gone") as told:
        later = take(images.train_batches(), len(pictures))
    assert len(told) == 2 and (later[0]["images"] == whole["images"]).all() and joined(later, "mask").all()
    fails.update(range(len(pictures)))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=rf"not one of the {len(pictures)} pictures"):
        list(itertools.islice(batches, len(pictures)))


# -------------------------------------------------------------------------------------------------------------- sources


def contents(pictures):
    return [(picture.label, np.asarray(decode(picture.content)).tobytes()) for picture in pictures]


def test_folders_may_be_splits(folder, tmp_path):
    for part, split in (("train", "train"), ("val", "validation")):
        for number in range(3 * (split == "validation"), COUNT):
            target = tmp_path / part / CLASSES[number % 3] / f"{number:02}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encoded(pixels_of(number)))
    spec = f"folder:{tmp_path}"
    assert open_pictures(spec).classes == CLASSES
    assert len(open_pictures(spec, "validation")) == COUNT - 3
    rest, test = len(open_pictures(spec)), len(open_pictures(spec, "test"))
    assert rest + test == COUNT and test > 0  # of the training folder, as there is none of its own
    assert len(open_pictures(spec, "all")) == 2 * COUNT - 3
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "a.png").write_bytes(encoded(RED))
    with pytest.raises(ValueError, match="two folders of one split"):
        open_pictures(spec)


def test_folders_behind_links_are_read_once(tmp_path):
    (tmp_path / "store" / "cats").mkdir(parents=True)
    (tmp_path / "store" / "cats" / "a.png").write_bytes(encoded(RED))
    (tmp_path / "root" / "dogs").mkdir(parents=True)
    (tmp_path / "root" / "dogs" / "b.png").write_bytes(encoded(RED))
    for name, target in {"bees": "store/cats", "loop": "root", "up": "."}.items():
        (tmp_path / "root" / name).symlink_to(tmp_path / target)
    found = open_pictures(f"folder:{tmp_path / 'root'}", "all")
    assert found.classes == ("bees", "dogs") and [p.name for p in found] == ["bees/a.png", "dogs/b.png"]


def test_pictures_beside_folders_and_in_deeper_ones(tmp_path):
    (tmp_path / "bee" / "deep").mkdir(parents=True)
    (tmp_path / "b.PNG").write_bytes(encoded(RED))
    (tmp_path / "bee" / "deep" / "a.jpg").write_bytes(encoded(RED, "JPEG"))
    found = open_pictures(f"folder:{tmp_path}", "all")
    assert found.classes == (".", "bee")
    assert [(p.name, p.label) for p in found] == [("b.PNG", 0), ("bee/deep/a.jpg", 1)]


def test_array_records_keep_pictures_names_and_classes(folder, tmp_path):
    source = open_pictures(f"folder:{folder}", "all")
    extra = [Picture("pixels", 1, RED), *source]
    write_array_record(tmp_path / "a.arrayrecord", extra[:20], source.classes)
    write_array_record(tmp_path / "b.arrayrecord", extra[20:], source.classes)
    back = open_pictures(f"arrayrecord:{tmp_path}", "all")
    assert back.classes == CLASSES
    assert contents(back) == contents(extra)
    assert back[1].name == "a.arrayrecord:1 (ant/00.png)"
    assert contents(pickle.loads(pickle.dumps(back))) == contents(extra)
    train, held_out = open_pictures(f"arrayrecord:{tmp_path}"), open_pictures(f"arrayrecord:{tmp_path}", "validation")
    assert 0 < len(held_out) < len(train) < COUNT
    write_array_record(tmp_path / "c.arrayrecord", extra[:1], ("other",))
    with pytest.raises(ValueError, match=r"c\.arrayrecord has other classes"):
        open_pictures(f"arrayrecord:{tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.arrayrecord", "b.arrayrecord", "c.arrayrecord"]


def test_array_records_of_others_are_refused(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x"), "group_size:1")
    writer.write(b"a document")
    writer.close()
    with pytest.raises(ValueError, match="write_array_record"):
        open_pictures(f"arrayrecord:{tmp_path}/x")


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Has a split for training and one for test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=CLASSES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(40)), "test": self._generate_examples(range(40, COUNT))}

    def _generate_examples(self, numbers):
        for number in numbers:
            yield number, {"image": io.BytesIO(encoded(pixels_of(number))), "label": number % 3}


def test_tfds(tmp_path):
    tfds.core.add_data_dir(tmp_path)
    TinyImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    spec = "tfds:tiny_images"
    everything = open_pictures(spec, "all")
    assert everything.classes == CLASSES
    assert isinstance(everything[0].content, bytes)  # not decoded by TFDS
    expected = {(number % 3, pixels_of(number).tobytes()) for number in range(COUNT)}
    assert set(contents(everything)) == expected
    parts = [set(contents(open_pictures(spec, split, holdout=0.3))) for split in ("train", "validation", "test")]
    assert set.union(*parts) == expected and sum(map(len, parts)) == COUNT and len(parts[2]) == 20
    unlabelled = ImageData(images=spec, label_field="", size=8)
    assert unlabelled.classes == () and not joined(unlabelled.eval_batches("test"), "labels").any()
    with pytest.raises(ValueError, match=r"no field 'picture' \(it has image, label\)"):
        open_pictures(spec, image_field="picture")
    with pytest.raises(ValueError, match="has no 'no_such_images'"):
        open_pictures("tfds:no_such_images")


def test_digits():
    digits = open_pictures("digits", "all")
    assert len(digits) == 1797 and digits.classes == tuple("0123456789")
    assert digits[0].content.max() == 239 and digits[0].label == 0  # 15 of 16
    assert decode(digits[7].content).size == (8, 8)
    sizes = [len(open_pictures("digits", split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 1797 and min(sizes) > 150


# ------------------------------------------------------------------------------------------------------------- packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands for the emoji's package: the same layout, with other pictures; its command copies the archive."""
    rows = [
        {"short_name": f"e{i}", "category": CLASSES[i % 3], "image": f"{i}.png", "has_img_twitter": i != 5}
        for i in range(40)
    ]
    files = {f"package/img/twitter/64/{i}.png": encoded(pixels_of(i)) for i in range(40)}
    files |= {"package/emoji.json": json.dumps(rows).encode(), "../../outside.png": b"", "package/other.txt": b""}
    archive = tmp_path / "store" / "emoji-datasource-twitter-16.0.0.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("package/img/twitter/64/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def use(**changes):
        copy = ("python", "-c", f"import shutil; shutil.copy({str(archive)!r}, '.')")
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        real = pictures_module._PACKAGES["emoji"]
        changed = dataclasses.replace(real, **{"sha256": sha256, "command": copy} | changes)
        monkeypatch.setitem(pictures_module._PACKAGES, "emoji", changed)
        return archive

    return use


def test_a_package_is_got_once(package, tmp_path, monkeypatch, capsys):
    package()
    first = open_pictures("emoji", "all")
    assert len(first) == 39 and first.classes == CLASSES and first[5].name == "e6"
    assert contents(first) == [(i % 3, pixels_of(i).tobytes()) for i in range(40) if i != 5]
    assert "fetching emoji-datasource-twitter-16.0.0.tgz once" in capsys.readouterr().err
    package(command=("no-such-program",))  # from now on, there is no network
    (cache,) = (tmp_path / "cache").rglob("*.npz")
    assert contents(open_pictures("emoji", "all")) == contents(first)
    assert sorted(p.name for p in cache.parent.iterdir()) == [cache.name]
    whole = cache.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:3000] + bytes(100) + whole[3100:]):
        cache.write_bytes(damaged)
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            open_pictures("emoji")
        package()
        assert contents(open_pictures("emoji", "all")) == contents(first)
        assert cache.read_bytes()[:2] == b"PK" and len(cache.read_bytes()) == len(whole)
        package(command=("no-such-program",))


def test_without_a_network(package, tmp_path):
    archive = package(command=("no-such-program", "pack", "emoji@1"))
    with pytest.raises(FileNotFoundError, match=r"run `no-such-program pack emoji@1` where there is a network .*npm"):
        open_pictures("emoji")
    assert len(open_pictures(f"emoji:{archive}", "all")) == 39
    assert not list((tmp_path / "cache").rglob("*.npz"))
    with pytest.raises(FileNotFoundError, match=r"missing\.tgz does not exist"):
        open_pictures("emoji:missing.tgz")
    package(command=("python", "-c", "import sys; sys.exit('the registry is away')"))
    with pytest.raises(FileNotFoundError, match="the registry is away"):
        open_pictures("emoji")


def test_another_archive_is_refused(package, monkeypatch):
    archive = package(sha256="0" * 64)
    with pytest.raises(ValueError, match=r"not emoji-datasource-twitter-16\.0\.0\.tgz as it was published"):
        open_pictures(f"emoji:{archive}")
    package()
    monkeypatch.setattr(pictures_module, "_MAX_MEMBER", 100)
    with pytest.raises(ValueError, match="more than its pictures"):
        open_pictures(f"emoji:{archive}")


def test_a_wheel_of_sprites(tmp_path, monkeypatch):
    wheel = tmp_path / "arcade-3.3.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("tiles/a.png", "cards/b/c.png", "backgrounds/d.png", "e.png"):
            file.writestr(f"arcade/resources/assets/images/{name}", encoded(RED))
    real = pictures_module._PACKAGES["sprites"]
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(pictures_module._PACKAGES, "sprites", dataclasses.replace(real, sha256=sha256))
    found = open_pictures(f"sprites:{wheel}", "all")
    assert found.classes == ("cards", "tiles")
    assert [(p.name, p.label) for p in found] == [("cards/b/c.png", 0), ("tiles/a.png", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "count", "classes"), [("emoji", 1911, 10), ("sprites", 472, 8)])
def test_the_published_packages(spec, count, classes, tmp_path, monkeypatch):
    """Needs a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = open_pictures(spec, "all")
    assert (len(found), len(found.classes)) == (count, classes)
    assert contents(found) == contents(open_pictures(spec, "all"))  # from the cache
    assert len({picture.name for picture in found}) == count


# ------------------------------------------------------------------------------------------------------------ one loop


def experiment(folder, workdir):
    model = LinearViTConfig(image_size=8, patch_size=4, num_classes=3, num_layers=1, d_model=8, num_heads=2, mlp_dim=8)
    return Experiment(
        name="images",
        task=ImageClassification(model=model),
        data=ImageData(images=f"folder:{folder}", size=8, batch_size=4, crop="random"),
        train=TrainConfig(steps=4, log_every=1, checkpoint_every=2, keep_checkpoints=9, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(workdir),
    )


def test_a_run_on_images_resumes_exactly_and_is_evaluated(folder, tmp_path):
    run = experiment(folder, tmp_path / "run")
    whole = train(run, quiet=True)
    assert whole.metrics["examples"] == len(run.data.pictures("validation"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = train(run, quiet=True)
    assert resumed.step == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    row = verbs.evaluate(tmp_path / "run", split="test")
    assert row["images"] == f"folder:{folder}" and row["examples"] == len(run.data.pictures("test"))
    for verb in (verbs.generate, verbs.adapt, functools.partial(convert, target=tmp_path / "converted")):
        with pytest.raises(ValueError, match="ImageClassification"):
            verb(tmp_path / "run")


def test_experiments_take_image_data(folder, tmp_path):
    run = experiment(folder, tmp_path)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    options = ["--data.images", "digits", "--data.crop-area", "0.5", "1.0", "--data.no-flip", "--data.crop", "centre"]
    changed = override(run, options, "jaxtok train")
    assert changed.data == dataclasses.replace(
        run.data, images="digits", crop_area=(0.5, 1.0), flip=False, crop="centre"
    )
    with pytest.raises(ValueError, match="num_classes is 3; it must be at least 10"):
        changed.fitted()


def test_a_resolved_experiment_on_text_is_as_before():
    from jaxtok.lm.language_modeling import LanguageModeling
    from jaxtok.lm.tokenformer import TokenFormerConfig

    task = LanguageModeling(model=TokenFormerConfig(vocab_size=0))
    assert Experiment(task=task).fitted().task.model.vocab_size == 384


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"eval_limit": -1}, "eval_limit is -1"),
        ({"crop": "middle"}, "crop is 'middle'; it must be centre or random"),
        ({"crop_area": (0.5, 0.1)}, r"crop_area is \(0.5, 0.1\)"),
        ({"crop_area": (0.0, 0.1)}, "crop_area"),
        ({"holdout": 0.5}, "holdout is 0.5"),
    ],
)
def test_bad_fields(data, options, message):
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_bad_sources(tmp_path):
    for spec in ("cats", "folder:", "digits:8", ""):
        with pytest.raises(ValueError, match="it must be emoji"):
            open_pictures(spec)
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        open_pictures(f"folder:{tmp_path}/missing")
    with pytest.raises(ValueError, match=r"no file in .* has the name of a picture"):
        open_pictures(f"folder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no ArrayRecord file"):
        open_pictures(f"arrayrecord:{tmp_path}/missing")
    (tmp_path / "a.png").write_bytes(encoded(RED))
    with pytest.raises(ValueError, match=r"the (train|validation) split of .* is empty, as there are only 1 pictures"):
        [open_pictures(f"folder:{tmp_path}", split) for split in ("train", "validation")]
    with pytest.raises(ValueError, match="split is 'dev'"):
        open_pictures("digits", "dev")
    with pytest.raises(ValueError, match=r"holdout is 0\.7"):
        open_pictures("digits", holdout=0.7)


@pytest.mark.slow
def test_vit_learns_digits(tmp_path):
    config = load_config("vit_digits")
    run = dataclasses.replace(config, workdir=str(tmp_path), mesh=MeshConfig(data=1))
    result = train(run, quiet=True)
    numbers = result.task.evaluate(result.params, run.data.eval_batches("test"))
    assert numbers["accuracy"] > 0.93
    assert sys.modules.get("tensorflow") is None
