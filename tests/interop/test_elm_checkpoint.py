"""ELM's checkpoints: what is written is read again, and what is refused (numbers: vision/test_elm_parity.py)."""

from __future__ import annotations

import argparse
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxtok.interop.elm import ELM, config_from, expected_shapes, params_from, params_to, write_checkpoint
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling
from jaxtok.weights import read_weights

SMALL = {"num_layers": 2, "d_model": 16, "num_heads": 4, "mlp_dim": 24, "code_bits": 3, "num_classes": 5}
CONFIGS = {
    "two sub-codes": ElmConfig(**SMALL),
    "one code, modulated, shared keys": ElmConfig(**SMALL, sub_codes=1, modulation=True, num_kv_heads=2),
    "masked": MaskedElmConfig(**SMALL, sub_codes=2),
}
CONFIG = CONFIGS["two sub-codes"]


def task_of(config):
    return (MaskedElmModeling if isinstance(config, MaskedElmConfig) else ElmModeling)(model=config)


def params_of(config):
    rng, tree = np.random.default_rng(0), {}
    for path, shape in expected_shapes(config).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rng.normal(size=shape).astype(np.float32)
    return tree


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", CONFIGS)
def test_written_then_read_is_the_same(name, suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    config, params = CONFIGS[name], params_of(CONFIGS[name])
    path = write_checkpoint(tmp_path / f"elm{suffix}", config, params)
    options = {"sub_codes": 2} if isinstance(config, MaskedElmConfig) else {}
    assert config_from(read_weights(path), head_size=4, **options) == config
    assert_same(ELM.read(path, task_of(config)).params, params)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileExistsError, match="exists"):
        write_checkpoint(path, config, params)


def test_a_checkpoint_of_a_training(tmp_path):
    torch = pytest.importorskip("torch")
    params = {"model": params_of(CONFIG), "ema": jax.tree.map(lambda x: 2 * x, params_of(CONFIG))}
    stored = {
        which: {f"module.{name}": torch.from_numpy(x) for name, x in params_to(CONFIG, tree).items()}
        for which, tree in params.items()
    }
    path = tmp_path / "0000010.pt"
    torch.save({**stored, "opt": {"state": {0: torch.zeros(3)}}, "args": argparse.Namespace(lr=1e-4)}, path)
    for which, tree in params.items():
        assert_same(ELM.read(path, task_of(CONFIG), which=which).params, tree)
    with pytest.raises(ValueError, match="holds model and ema; choose one, such as which = 'ema'"):
        ELM.read(path, task_of(CONFIG))
    torch.save({"ema": stored["ema"], "args": argparse.Namespace()}, path)
    with pytest.raises(ValueError, match=r"which is 'model', but .* holds ema"):
        ELM.read(path, task_of(CONFIG), which="model")


class Harmful:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("harm"),))


def test_files_that_could_run_code(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.zeros(2)}, "args": Harmful()}, "bad.pt")
    with pytest.raises(ValueError, match="could run code"):
        ELM.read("bad.pt", task_of(CONFIG), which="model")
    assert not (tmp_path / "harm").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError, match="does not exist; give"):
        ELM.read(tmp_path / "nothing.pth", task_of(CONFIG))
    none = "no table of tensors by name"
    for content, error in (([1], f"a list, {none}"), ({"x": 1}, rf"{none} \('x' is no tensor"), ({"model": {}}, none)):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=error):
            ELM.read(tmp_path / "odd.pth", task_of(CONFIG))
    path = write_checkpoint(tmp_path / "whole.pth", CONFIG, params_of(CONFIG))
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:3000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("cut.pth", "cut.safetensors"):
        with pytest.raises(ValueError, match="damaged or not a"):
            ELM.read(tmp_path / name, task_of(CONFIG))
    with pytest.raises(ValueError, match="must end in"):
        write_checkpoint(tmp_path / "elm.txt", CONFIG, params_of(CONFIG))


def test_what_the_published_masked_class_has_and_does_not_use(tmp_path):
    config = CONFIGS["masked"]
    tensors = params_to(config, params_of(config))
    more = {"output.0.weight": (8, 16), "output.weight": (8, 16), "proj.weight": (16, 32), "pos_embed.weight": (4, 16)}
    more |= {name: np.ones(shape, np.float32) for name, shape in more.items()}
    safetensors.numpy.save_file(tensors | more, tmp_path / "elm.safetensors")
    assert_same(ELM.read(tmp_path / "elm.safetensors", task_of(config)).params, params_of(config))


def test_tensors_that_do_not_fit():
    tensors = params_to(CONFIG, params_of(CONFIG))
    without = {name: x for name, x in tensors.items() if name != "layers.1.feed_forward.w2.weight"}
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w2\.weight is missing"):
        params_from(CONFIG, without)
    with pytest.raises(ValueError, match="surprise is unknown"):
        params_from(CONFIG, tensors | {"surprise": np.zeros(2)})
    with pytest.raises(ValueError, match=r"proj\.weight has shape \(16, 16\) instead of \(16, 32\)"):
        params_from(CONFIG, tensors | {"proj.weight": np.zeros((16, 16))})
    with pytest.raises(ValueError, match=r"no cls_embedding\.embedding_table\.weight, so it is not an ELM"):
        config_from({})
    with pytest.raises(ValueError, match="head_size is 5"):
        config_from(tensors, head_size=5)
    with pytest.raises(ValueError, match="sub_codes is 3, but the checkpoint has tables for 2"):
        config_from(tensors, head_size=4, sub_codes=3)
    odd = tensors | {"tok_embedder.0.weight": np.zeros((7, 16))}
    with pytest.raises(ValueError, match="7 values; it must be a power of 2"):
        config_from(odd, head_size=4)
    cosine = config_from(tensors, head_size=4, cosine_scores=True, grid=8)
    assert (cosine.cosine_scores, cosine.scale_scores, cosine.positions) == (True, False, 64)
