"""`jaxtok vision`: from a tokenizer to pictures of classes, on tiny models of scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from image_generators import Histograms
from image_tokenizers import BlockTokenizer, FrequencyTokenizer, Ramps
from PIL import Image

from jaxtok.cli import main
from jaxtok.data.codes import CodeData, open_codes
from jaxtok.data.images import ImageData
from jaxtok.training.checkpoints import begin
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.verbs.vision import (
    attention,
    generate,
    open_tokenizer,
    reconstruct,
    statistics,
    tokenize,
)
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling

IMAGES = ImageData(images="digits", size=8, batch_size=64, eval_limit=1)
BODY = {"width": 32, "multipliers": (1, 1), "res_blocks": 1, "attention_resolutions": (), "embed_dim": 32}
TRAIN = TrainConfig(steps=1, eval_every=0, checkpoint_every=1, tensorboard=False)
ELM = {"num_layers": 1, "d_model": 16, "num_heads": 2, "mlp_dim": 16, "grid": 4, "num_classes": 10}


def run(folder, task, data):
    experiment = Experiment(task=task, data=data, train=TRAIN, mesh=MeshConfig(data=1), workdir=str(folder))
    return train(experiment, quiet=True).directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of 6 bits, its codes, an autoregressive model of them as 2 of 3 bits, and a masked one as 1 of 6."""
    root = tmp_path_factory.mktemp("vision")
    tokenizer = Autoencoding(model=BAEConfig(image_size=8, **BODY, bits=6), discriminator=None, perceptual="none")
    run(root / "tokenizer", tokenizer, IMAGES)
    assert main(["vision", "tokenize", str(root / "tokenizer"), str(root / "codes"), "--draws", "2"]) == 0
    data = CodeData(path=str(root / "codes"), grid=4, sub_codes=2, code_bits=3, batch_size=8, eval_limit=1)
    run(root / "ar", ElmModeling(model=ElmConfig(**ELM, sub_codes=2, code_bits=3)), data)
    masked = MaskedElmModeling(model=MaskedElmConfig(**ELM, sub_codes=1, code_bits=6))
    run(root / "masked", masked, dataclasses.replace(data, sub_codes=1, code_bits=6))
    return root


def test_codes_are_of_every_image(folder):
    data = ImageData(images="digits", size=8)
    for split, draws in {"train": 4, "validation": 1, "test": 1}.items():  # two draws, of the mirror image too
        file = open_codes(folder / "codes" / split)
        pictures = data.pictures(split)
        assert file.codes.shape == (len(pictures), draws, 16, 1)
        assert file.labels.tolist() == [pictures[n].label for n in range(len(pictures))]
        assert file.header.classes == tuple("0123456789") and file.header.values == (64,)
    mirrored = np.asarray(open_codes(folder / "codes" / "train").codes[:, [0, 2]])
    assert 0 < (mirrored[:, 0] == mirrored[:, 1]).mean() < 1, "drawn anew"


def test_mirror_images_only_where_they_are_asked_for(folder, tmp_path):
    for flip, views in {None: 2, False: 1}.items():
        tokenize(folder / "tokenizer", tmp_path / str(flip), splits=("train",), flip=flip)
        assert open_codes(tmp_path / str(flip) / "train").codes.shape[1] == views


def test_a_split_that_is_there_is_kept(folder, tmp_path):
    before = (folder / "codes" / "test" / "codes.npy").stat().st_mtime_ns
    tokenize(folder / "tokenizer", folder / "codes", draws=2)
    assert (folder / "codes" / "test" / "codes.npy").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other draws or mirror images"):
        tokenize(folder / "tokenizer", folder / "codes", draws=2, flip=False)
    with pytest.raises(ValueError, match="draws is 0"):
        tokenize(folder / "tokenizer", tmp_path, draws=0)
    with pytest.raises(ValueError, match="give a run of an image tokenizer"):
        tokenize(folder / "ar", tmp_path)


def test_a_split_has_the_same_codes_whichever_others_are_encoded_with_it(folder, tmp_path):
    tokenize(folder / "tokenizer", tmp_path, splits=("test",))
    alone, together = (open_codes(path / "test").codes for path in (tmp_path, folder / "codes"))
    np.testing.assert_array_equal(alone, together)


def test_reconstructions_stand_below_their_images(folder, tmp_path):
    numbers = reconstruct(folder / "tokenizer", tmp_path / "grid.png", count=6, columns=4, batches=1)
    assert numbers["images"] == 64 and 0 < numbers["l1"] < 1
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (4 * 102 + 6, 4 * 102 + 6, 3)
    chosen = np.random.default_rng(0).permutation(64)[:6]
    (batch,) = IMAGES.eval_batches("validation")
    images = batch["images"][np.sort(chosen)]
    tile = images[0].repeat(12, 0).repeat(12, 1)
    assert (sheet[6:102, 6:102] == tile).all(), "an input"
    assert not (sheet[108:204, 6:102] == tile).all(), "what was made of it"
    assert (sheet[210:306, 210:306] == 255).all(), "nothing comes after the sixth"


def test_pictures_of_classes(folder, tmp_path, capsys):
    generate(folder / "ar", tmp_path / "grid.png", per_class=2, labels=("3", "none"), batch_size=3)
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * 102 + 6
    generate(folder / "ar", tmp_path / "all.npz", per_class=1, sampling={"guidance": 1.0, "top_k": 2})
    generate(folder / "masked", tmp_path / "masked.npz", per_class=1, sampling={"rounds": 2})
    for name in ("all", "masked"):
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file["arr_0"].shape == (10, 8, 8, 3) and file["arr_0"].dtype == np.uint8
            assert file["arr_1"].tolist() == list(range(10))
    generate(folder / "ar", tmp_path / "files", per_class=1, labels=("7",))
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["000000_7.png"]
    with pytest.raises(FileExistsError, match="exists already"):
        generate(folder / "nothing", tmp_path / "files")
    for verb in ("generate", "reconstruct"):  # before anything is opened or drawn
        assert main(["vision", verb, str(folder / "nothing"), str(tmp_path / "x.picture")]) == 1
        assert "x.picture; its suffix must be that of a picture, such as .png" in _line(capsys)


def test_codes_come_back(folder):
    """The stored codes decode to the tokenizer's reconstruction of the image."""
    tokenizer = open_tokenizer(folder / "tokenizer")
    codes = np.asarray(open_codes(folder / "codes" / "test").codes[:3, 0]).astype(np.int32)
    again = tokenizer.task.decode(tokenizer.params, codes)
    np.testing.assert_allclose(tokenizer.decode(codes), again, atol=1e-5)


def test_options_of_a_runs_own_sampling(folder, tmp_path, capsys):
    """The command line has the options of the run that is named, and no others."""
    command = ["vision", "generate", str(folder / "masked"), str(tmp_path / "x.npz"), "--per-class", "1"]
    assert main([*command, "--rounds", "2", "--labels", "3"]) == 0
    options = ["--tokenizer", str(folder / "tokenizer"), "--rounds", "2"]
    assert main([*command[:2], *options, *command[2:]]) == 0, "options can come before the run"
    for arguments, message in {
        ("--top-k", "3"): "top-k",
        ("--schedule", "square"): "powercos",
        ("--guidance", "nan"): "guidance is nan",
    }.items():
        capsys.readouterr()
        try:
            code = main([*command, *arguments])
        except SystemExit as stop:
            code = stop.code
        assert code and message in capsys.readouterr().err, arguments
    with pytest.raises(SystemExit) as stop:
        main(["vision", "generate", str(folder / "ar"), "--help"])
    shown = capsys.readouterr().out
    assert not stop.value.code and "--top-k" in shown and "--rounds" not in shown


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Ordered codes with a decoder that draws, and volumes; each with its codes and a model of them."""
    root = tmp_path_factory.mktemp("wide")
    sources = {
        "ordered": (FrequencyTokenizer(), dataclasses.replace(IMAGES, eval_limit=0)),
        "volumes": (BlockTokenizer(), Ramps()),
    }
    for name, (task, data) in sources.items():
        case = root / name
        tokenizer = Experiment(task=task, data=data, mesh=MeshConfig(data=1), workdir=str(case / "tokenizer"))
        begin(tokenizer, task.init(jax.random.key(0), {}))
        assert main(["vision", "tokenize", str(case / "tokenizer"), str(case / "codes")]) == 0
        shape = (6,) if name == "ordered" else task.code_shape  # the first six of the ordered codes
        codes = CodeData(path=str(case / "codes"), shape=shape, values=task.code_values, batch_size=5)
        model = Histograms(code_shape=shape, code_values=task.code_values, num_classes=len(codes.classes))
        params = model.learn(model.init(jax.random.key(0), {}), codes.eval_batches("train"))
        begin(Experiment(task=model, data=codes, mesh=MeshConfig(data=1), workdir=str(case / "model")), params)
    return root


def test_ordered_codes_with_a_decoder_that_draws(wide, tmp_path, capsys):
    case = wide / "ordered"
    header = open_codes(case / "codes" / "train").header
    assert (header.shape, header.values, header.prefixes) == ((15,), (33, 9, 5), (1, 3, 6, 15))
    grid = tmp_path / "grid.png"
    command = ["vision", "reconstruct", str(case / "tokenizer"), str(grid), "--count", "3", "--columns", "3"]
    assert main([*command, "--prefixes", "1", "6"]) == 0
    sheet = np.asarray(Image.open(grid)).astype(float)
    assert sheet.shape == (4 * 102 + 6, 3 * 102 + 6, 3), "the images, two prefixes, and all codes"
    rows = [sheet[6 + 102 * n : 102 + 102 * n] for n in range(4)]
    errors = [np.square(row - rows[0]).mean() for row in rows[1:]]
    assert errors[0] > errors[1] > errors[2] > 0, "more codes are nearer"
    assert main([*command, "--prefixes", "2"]) == 1
    assert "prefixes has 2; this tokenizer decodes the first 1, 3, 6, 15 codes" in _line(capsys)
    assert main(["vision", "generate", str(case / "model"), str(tmp_path / "a.npz"), "--temperature", "0.5"]) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (40, 8, 8, 3) and file["arr_1"].tolist() == [n for n in range(10) for _ in "1234"]


def test_volumes(wide, tmp_path):
    case = wide / "volumes"
    file = open_codes(case / "codes" / "train")
    assert file.header.shape == (2, 4, 3) and file.header.image_shape == (4, 8, 6, 1)
    assert file.codes.shape == (10, 2, 24, 1), "with mirror images"
    mirrored = np.asarray(file.codes[:, 1]).reshape(10, 2, 4, 3)[..., ::-1].reshape(10, 24, 1)
    np.testing.assert_array_equal(mirrored, file.codes[:, 0])
    numbers = reconstruct(case / "tokenizer", tmp_path / "grid.png", count=4, columns=4)
    assert numbers["mse"] < 0.02
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    volumes = np.concatenate([batch["images"] for batch in Ramps().eval_batches("validation")])
    middle = volumes[np.random.default_rng(0).permutation(6)[:4].min(), 2, :, :, 0]
    assert (picture[6 : 6 + 8 * 16, 6:102, 0] == middle.repeat(16, 0).repeat(16, 1)).all()
    generate(case / "model", tmp_path / "files", labels=("wide",), per_class=2)
    paths = sorted((tmp_path / "files").iterdir())
    assert [path.name for path in paths] == ["000000_wide.tif", "000001_wide.tif"]
    with Image.open(paths[0]) as image:
        assert image.n_frames == 4 and image.size == (6, 8)
    generate(case / "model", tmp_path / "all.npz", labels=("wide", "none"), per_class=20)
    with np.load(tmp_path / "all.npz") as volumes:
        assert volumes["arr_0"].shape == (40, 4, 8, 6, 1)
        wide_ones = volumes["arr_0"][:20].mean((0, 1, 2, 4))
        assert (np.diff(wide_ones)[1::2] > 0).all(), "they get brighter along the width, as the class says"


def test_a_tokenizer_of_other_codes(wide, folder, tmp_path):
    for model, tokenizer, message in [
        (wide / "volumes" / "model", wide / "ordered" / "tokenizer", "shape 2 x 4 x 3, but the tokenizer's have 15"),
        (folder / "ar", wide / "volumes" / "tokenizer", "shape 4 x 4, but the tokenizer's have 2 x 4 x 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, tmp_path / "x.png", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Ramps takes no other images"):
        reconstruct(wide / "volumes" / "tokenizer", tmp_path / "x.png", images="emoji")
    with pytest.raises(ValueError, match="Histograms, which shows no attention"):
        attention((wide / "volumes" / "model",), tmp_path / "x.png")


def _line(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_analyses(folder, tmp_path, capsys):
    plots = tmp_path / "statistics.png", tmp_path / "attention.png"
    command = ["vision", "statistics", str(folder / "codes"), "--output", str(plots[0])]
    (tmp_path / "text.txt").write_text("words " * 5000)
    assert main([*command, "--corpus", str(tmp_path / "text.txt")]) == 1, "bytes are more than 64 values"
    assert "has 257 ids, but the images have 64 values" in " ".join(capsys.readouterr().err.split())
    assert main(command) == 0
    assert "codes: kl unigram" in capsys.readouterr().out
    assert main(["vision", "attention", str(folder / "ar"), str(folder / "masked"), "--output", str(plots[1])]) == 0
    assert "ar: layer 1" in capsys.readouterr().out
    shutil.copytree(folder / "codes", tmp_path / "codes")
    found = statistics((folder / "codes", tmp_path / "codes"), plots[0])
    assert found[f"{folder / 'codes'}: kl_unigram"] == found[f"{tmp_path / 'codes'}: kl_unigram"], "both are there"
    for plot in plots:
        assert np.asarray(Image.open(plot).convert("L")).std() > 5


def test_mistakes_are_named(folder, tmp_path, capsys):
    assert main(["vision"]) == 0 and "reconstruct" in capsys.readouterr().out
    assert main(["vision", "paint"]) == 1
    assert main(["vision", "statistics"]) == main(["vision", "attention"]) == 1
    assert capsys.readouterr().err.count("give at least one") == 2
    for label, options in {
        "there is no class 'cat'": {"labels": ("cat",)},
        "per_class is 0": {"per_class": 0},
        "give a run of a model of image codes": {"checkpoint": folder / "tokenizer"},
        "give a run of an image tokenizer": {"tokenizer": folder / "ar"},
    }.items():
        arguments = {"checkpoint": folder / "ar", "output": tmp_path / "x.png"} | options
        with pytest.raises(ValueError, match=label):
            generate(**arguments)
