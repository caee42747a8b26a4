"""`jaxtok vision`: from a tokenizer to pictures of classes, on tiny models of scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxtok.cli import main
from jaxtok.data.codes import CodeData, open_codes
from jaxtok.data.images import ImageData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling
from jaxtok.vision_verbs import (
    OpenTokenizer,
    generate,
    reconstruct,
    statistics,
    tokenize,
)

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
        assert file.header.classes == tuple("0123456789") and file.header.vocab_size == 64
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
    assert (sheet[210:306, 210:306] == 255).all(), "nothing stands behind the sixth"


def test_pictures_of_classes(folder, tmp_path):
    generate(folder / "ar", tmp_path / "grid.png", per_class=2, labels=("3", "none"), batch_size=3)
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * 102 + 6
    generate(folder / "ar", tmp_path / "all.npz", per_class=1, guidance=1.0, top_k=2)
    generate(folder / "masked", tmp_path / "masked.npz", per_class=1, rounds=2)
    for name in ("all", "masked"):
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file["arr_0"].shape == (10, 8, 8, 3) and file["arr_0"].dtype == np.uint8
            assert file["arr_1"].tolist() == list(range(10))
    generate(folder / "ar", tmp_path / "files", per_class=1, labels=("7",))
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["000000_7.png"]
    with pytest.raises(FileExistsError, match="exists already"):
        generate(folder / "ar", tmp_path / "files", per_class=1, labels=("7",))


def test_codes_come_back(folder):
    """What the stored codes decode to is what the tokenizer makes of the image."""
    tokenizer = OpenTokenizer.open(folder / "tokenizer")
    codes = np.asarray(open_codes(folder / "codes" / "test").codes[:3, 0]).astype(np.int32)
    again = tokenizer.task.decode(tokenizer.params, codes)
    np.testing.assert_allclose(tokenizer.decode(codes), again, atol=1e-5)


def test_analyses(folder, tmp_path, capsys):
    plots = tmp_path / "statistics.png", tmp_path / "attention.png"
    command = ["vision", "statistics", str(folder / "codes"), "--output", str(plots[0])]
    (tmp_path / "text.txt").write_text("words " * 5000)
    assert main([*command, "--corpus", str(tmp_path / "text.txt")]) == 1, "bytes are more than 64 values"
    assert "has 257 ids, but the images 64 values" in " ".join(capsys.readouterr().err.split())
    assert main(command) == 0
    assert "codes: kl unigram" in capsys.readouterr().out
    assert main(["vision", "attention", str(folder / "ar"), str(folder / "masked"), "--output", str(plots[1])]) == 0
    assert "ar: layer 1" in capsys.readouterr().out
    shutil.copytree(folder / "codes", tmp_path / "codes")
    found = statistics((folder / "codes", tmp_path / "codes"), plots[0])
    assert found[f"{folder / 'codes'}: kl_unigram"] == found[f"{tmp_path / 'codes'}: kl_unigram"], "both are there"
    for plot in plots:
        assert np.asarray(Image.open(plot).convert("L")).std() > 5


def test_what_is_wrong_is_said(folder, tmp_path, capsys):
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
