"""Files of codes, and batches of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import chex
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import check_spec

from jaxtok.data.codes import CodeData, Header, open_codes, regroup, write_codes
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling

HEADER = Header(shape=(2, 2), values=(64,), classes=("a", "b", "c"), tokenizer="test", image_shape=(8, 8, 3))
DATA = CodeData(grid=2, sub_codes=2, code_bits=3, batch_size=4)


def some(images, draws=2, header=HEADER, seed=0):
    """Codes whose first position is the number of the image."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, header.values, (images, draws, header.positions, header.sub_codes))
    codes[:, :, 0, 0] = np.arange(images)[:, None] % header.values[0]
    return codes, rng.integers(0, 3, images)


def written(folder):
    """Eleven images to train on, in two parts, and six to validate."""
    codes, labels = some(11)
    write_codes(folder / "train", HEADER, [(codes[:7], labels[:7]), (codes[7:], labels[7:])])
    write_codes(folder / "validation", HEADER, [some(6, seed=1)])
    return dataclasses.replace(DATA, path=str(folder))


DATASETS = {"codes": lambda texts, folder: written(folder)}


@pytest.fixture
def stored(tmp_path):
    return written(tmp_path)


def images_of(batch):
    """The numbers of a batch's images, from the joined bits of their first position."""
    return regroup(batch["codes"], (8, 8), (64,))[:, 0, 0]


def test_written_then_read_is_the_same(stored, tmp_path):
    file, (codes, labels) = open_codes(tmp_path / "train"), some(11)
    assert file.header == HEADER
    assert isinstance(file.codes, np.memmap) and file.codes.dtype == np.uint8
    np.testing.assert_array_equal(file.codes, codes)
    np.testing.assert_array_equal(file.labels, labels)
    np.testing.assert_array_equal(np.load(tmp_path / "train" / "codes.npy"), codes)  # a plain NumPy file


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(256, np.uint8), (257, np.uint16), (2**16, np.uint16), (2**17, np.uint32)]
)
def test_codes_take_little_room(tmp_path, vocab, dtype):
    header = dataclasses.replace(HEADER, values=(vocab,))
    codes = np.full((1, 1, 4, 1), vocab - 1)
    file = open_codes(write_codes(tmp_path / "codes", header, [(codes, np.zeros(1, int))]))
    assert file.codes.dtype == dtype
    np.testing.assert_array_equal(file.codes, codes)


def test_an_epoch_has_every_image_once_and_all_draws(stored):
    batches = list(itertools.islice(stored.train_batches(), 66))
    codes, labels = some(11)
    seen = []
    for batch in batches:
        check_spec(batch, stored)
        images = images_of(batch)
        np.testing.assert_array_equal(batch["labels"], labels[images])
        for image, row in zip(images, regroup(batch["codes"], (8, 8), (64,))):
            draws = (row == codes[image]).all((1, 2))
            assert draws.any()
            seen.append((int(image), int(draws.argmax())))
    epochs = [sorted(image for image, _ in seen[k : k + 11]) for k in range(0, 264, 11)]
    assert epochs == [list(range(11))] * 24
    orders = {tuple(image for image, _ in seen[k : k + 11]) for k in range(0, 264, 11)}
    assert len(orders) == 24  # each has a new order
    assert len(set(seen)) == 22  # both draws of every image


def test_batches_are_resumed_and_shared_exactly(stored):
    whole = list(itertools.islice(stored.train_batches(), 8))
    run = stored.train_batches()
    for _ in range(3):
        next(run)
    state = json.loads(json.dumps(run.get_state()))
    again = stored.train_batches(range(1, 4))
    again.set_state(state)
    for expected, batch in zip(whole[3:], again):
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name][1:])
    parts = [list(itertools.islice(stored.train_batches(range(k, k + 2)), 8)) for k in (0, 2)]
    for expected, *halves in zip(whole, *parts):
        np.testing.assert_array_equal(np.concatenate([half["codes"] for half in halves]), expected["codes"])
    other = next(dataclasses.replace(stored, seed=1).train_batches())
    assert (other["codes"] != whole[0]["codes"]).any()


def test_evaluation_is_one_pass(stored):
    codes, labels = some(6, seed=1)
    batches = list(stored.eval_batches())
    assert [batch["mask"].tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    real = np.concatenate([regroup(batch["codes"], (8, 8), (64,))[batch["mask"] > 0] for batch in batches])
    np.testing.assert_array_equal(real, codes[:, 0])  # the first draw
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches])[:6], labels)
    np.testing.assert_array_equal(list(stored.eval_batches(rows=range(1, 3)))[1]["codes"], batches[1]["codes"][1:3])
    limited = list(dataclasses.replace(stored, eval_limit=1, batch_size=3).eval_batches("train"))
    assert len(limited) == 1 and len(set(images_of(limited[0]))) == 3


def test_bits_are_cut_anew(stored):
    """The same file as one code of six bits, two of three, and six of one."""
    first = {}
    for t, k in ((1, 6), (2, 3), (6, 1)):
        data = dataclasses.replace(stored, sub_codes=t, code_bits=k)
        batch = next(iter(data.eval_batches()))
        assert batch["codes"].shape == (4, 4, t) and batch["codes"].max() < 2**k
        first[t] = regroup(batch["codes"], (2**k,) * t, (64,))
    np.testing.assert_array_equal(first[1], first[2])
    np.testing.assert_array_equal(first[1], first[6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 3}, "codes of the shape 2 x 2, but data has 3 x 3"),
        ({"shape": (4,)}, "codes of the shape 2 x 2, but data has 4 "),
        ({"code_bits": 4}, "64 values a position, but data has 16 x 16"),
        ({"values": (8, 4)}, "64 values a position, but data has 8 x 4"),
        ({"path": "nowhere"}, "nowhere/train/codes.json does not exist"),
    ],
)
def test_codes_that_do_not_fit(stored, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataclasses.replace(stored, **options).train_batches()


def test_vocabularies_that_are_no_power_of_two(tmp_path):
    header = dataclasses.replace(HEADER, values=(60,))
    write_codes(tmp_path / "train", header, [(np.full((4, 1, 4, 1), 59), np.zeros(4, int))])
    data = dataclasses.replace(DATA, path=str(tmp_path))
    with pytest.raises(ValueError, match="60 values a position, but data has 8 x 8"):
        data.train_batches()
    assert next(dataclasses.replace(data, sub_codes=1, code_bits=6).train_batches())["codes"].max() == 59


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no image"),
        ([(np.zeros((2, 1, 3, 1), int), np.zeros(2, int))], "4 positions"),
        ([(np.zeros((2, 1, 4, 1), int), np.zeros(3, int))], "3 labels"),
        ([(np.zeros((2, 1, 4, 1), int), np.zeros(2, int)), (np.zeros((2, 2, 4, 1), int), np.zeros(2, int))], "1 draws"),
        ([(np.full((2, 1, 4, 1), 64), np.zeros(2, int))], "the code 64"),
        ([(np.zeros((2, 1, 4, 1), int), np.array([0, 3]))], "the label 3"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, batches, message):
    with pytest.raises(ValueError, match=message):
        write_codes(tmp_path / "train", HEADER, batches)
    assert not list(tmp_path.iterdir())


def test_files_are_not_written_over(stored, tmp_path):
    before = (tmp_path / "train" / "codes.npy").read_bytes()
    with pytest.raises(FileExistsError, match="train exists"):
        write_codes(tmp_path / "train", HEADER, [some(3)])
    assert (tmp_path / "train" / "codes.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("codes.json", b"{", "are damaged"),
        ("codes.json", b'{"format": 3}', "its format is 3"),
        ("codes.npy", b"\x93NUMPY", "are damaged"),
        ("labels.npy", None, r"labels\.npy does not exist"),
    ],
)
def test_damaged_files(stored, tmp_path, name, content, message):
    (tmp_path / "train" / name).unlink()
    if content is not None:
        (tmp_path / "train" / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stored.train_batches()


def test_a_file_that_was_cut(stored, tmp_path):
    path = tmp_path / "train" / "codes.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="are damaged"):
        stored.train_batches()


def test_files_of_the_first_format_are_read():
    """Three images in two draws, written before codes had any shape."""
    folder = Path(__file__).with_name("codes_format_1")
    file = open_codes(folder / "train")
    chex.assert_shape(file.codes, (3, 2, 4, 2))
    assert file.header == Header(
        shape=(2, 2), values=(64, 64), classes=("a", "b"), tokenizer="runs/bae", image_shape=(8, 8, 3)
    )
    (batch,) = CodeData(path=str(folder), grid=2, sub_codes=2, code_bits=6, batch_size=3).eval_batches("train")
    np.testing.assert_array_equal(batch["codes"][:, 0], [[1, 40], [2, 34], [3, 55]])
    np.testing.assert_array_equal(batch["labels"], [0, 1, 0])
    (cut,) = CodeData(path=str(folder), grid=2, sub_codes=4, code_bits=3, batch_size=3).eval_batches("train")
    np.testing.assert_array_equal(cut["codes"][:, 0], [[0, 1, 5, 0], [0, 2, 4, 2], [0, 3, 6, 7]])


@pytest.mark.parametrize(
    ("shape", "values"), [((6,), (8, 5, 64000)), ((2, 3, 4), (512,)), ((256,), (2,)), ((3, 5), (16,) * 24)]
)
def test_codes_of_any_shape_and_any_values(tmp_path, shape, values):
    header = Header(shape=shape, values=values, classes=("a", "b", "c"))
    codes, labels = some(5, header=header)
    file = open_codes(write_codes(tmp_path / "train", header, [(codes, labels)]))
    assert file.header == header and isinstance(file.codes, np.memmap)
    data = CodeData(path=str(tmp_path), shape=shape, values=values, batch_size=5)
    (batch,) = data.eval_batches("train")
    np.testing.assert_array_equal(batch["codes"], codes[:, 0])
    assert data.code_shape == shape and data.code_values == values
    chex.assert_shape(next(data.train_batches())["codes"], (5, math.prod(shape), len(values)))


def test_the_first_codes_of_ordered_ones(tmp_path):
    header = Header(shape=(8,), values=(16,), classes=("a", "b", "c"), prefixes=(1, 4, 8))
    codes, labels = some(5, header=header)
    write_codes(tmp_path / "train", header, [(codes, labels)])
    data = CodeData(path=str(tmp_path), shape=(4,), values=(4, 4), batch_size=5)
    (batch,) = data.eval_batches("train")
    np.testing.assert_array_equal(regroup(batch["codes"], (4, 4), (16,)), codes[:, 0, :4])
    with pytest.raises(ValueError, match=r"the shape 8, but data has 3 .*make it 8 or a prefix of 1, 4, 8"):
        dataclasses.replace(data, shape=(3,)).train_batches()


@given(st.permutations([2, 3, 5, 8, 1, 16]), st.integers(0, 2**32 - 1))
def test_regrouped_codes_come_back(values, seed):
    """They do for any bases of the digits, and joined codes are numbers in that order."""
    values = tuple(values)
    codes = np.random.default_rng(seed).integers(0, values, (4, 6))
    joined = regroup(codes, values, (math.prod(values),))
    np.testing.assert_array_equal(regroup(joined, (math.prod(values),), values), codes)
    assert (np.argsort(joined[:, 0]) == np.lexsort(codes.T[::-1])).all()


def test_codes_that_cannot_be_regrouped():
    for values, into, message in [
        ((6, 8), (6, 9), "products must be equal"),
        ((2**31,) * 3, (2**31, 2**62), "at most 2"),
        ((4, 4, 4), (8, 8), "one for each"),
    ]:
        with pytest.raises(ValueError, match=message):
            regroup(np.zeros((1, 4 if message == "one for each" else len(values)), int), values, into)
    swapped = regroup(np.array([[5, 7]]), (6, 8), (8, 6))
    np.testing.assert_array_equal(swapped, [divmod(5 * 8 + 7, 6)])


@pytest.mark.parametrize(
    "options",
    [
        {"grid": 0},
        {"shape": (4, 0)},
        {"values": (0,)},
        {"batch_size": 0},
        {"code_bits": 25},
        {"seed": 2**32},
        {"prefetch": -1},
    ],
)
def test_impossible_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}")):
        CodeData(**options)
    with pytest.raises(ValueError, match="shape is"):
        Header(shape=(0, 2), values=(2,), classes=("a",))
    with pytest.raises(ValueError, match="prefixes is"):
        Header(shape=(4,), values=(2,), classes=("a",), prefixes=(2, 5))


def test_the_loop_trains_on_codes(stored, tmp_path):
    model = ElmConfig(num_layers=1, d_model=8, num_heads=1, mlp_dim=8, grid=2, sub_codes=2, code_bits=3, num_classes=3)
    experiment = Experiment(
        task=ElmModeling(model=model),
        data=stored,
        train=TrainConfig(steps=4, log_every=1, eval_every=0, checkpoint_every=2, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(tmp_path / "run"),
    )
    assert stored.classes == HEADER.classes
    train(experiment, quiet=True)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[0] == pytest.approx(3 * np.log(2), abs=1e-5)
    assert len(losses) >= 5 and np.isfinite(losses).all()


@pytest.mark.parametrize(("field", "value"), [("grid", 3), ("sub_codes", 1), ("code_bits", 6)])
def test_codes_are_cut_as_the_models(field, value):
    model = ElmConfig(num_layers=1, d_model=8, num_heads=1, grid=2, sub_codes=2, code_bits=3)
    with pytest.raises(
        ValueError, match=rf"task\.model\.{field} is {getattr(model, field)}, but data\.{field} is {value}"
    ):
        Experiment(task=ElmModeling(model=model), data=dataclasses.replace(DATA, **{field: value})).fitted()
