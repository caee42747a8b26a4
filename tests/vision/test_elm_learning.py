"""ELM learns: scikit-learn's digits in black and white, whose 2 x 2 patches stand in for an image tokenizer's codes."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from jaxtok.data.codes import CodeData, Header, regroup, write_codes
from jaxtok.nn.bits import pack_bits
from jaxtok.training.checkpoints import load
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision import elm_masked, elm_sampling
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling, MaskedSampling
from jaxtok.vision.elm_sampling import ElmSampling

BITS = 4
SIZE = {"num_layers": 3, "d_model": 64, "num_heads": 4, "mlp_dim": 176, "grid": 4, "num_classes": 10, "dropout": 0.1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of codes, and what turns codes into pictures again."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    images = (images >= 8).astype(np.int32)
    patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    codes = pack_bits(patches, 1)[:, None]
    folder = tmp_path_factory.mktemp("digits")
    header = Header(shape=(4, 4), values=(2**BITS,), classes=tuple("0123456789"), tokenizer="a bit a pixel")
    order = np.random.default_rng(0).permutation(len(images))
    for split, part in {"train": order[:1500], "validation": order[1500:]}.items():
        write_codes(folder / split, header, [(codes[part], labels[part])])

    def decode(codes):
        pixels = regroup(codes, (2 ** (BITS // codes.shape[-1]),) * codes.shape[-1], (2,) * 4)
        return pixels.reshape(-1, 4, 4, 2, 2).swapaxes(2, 3).reshape(-1, 64)

    return folder, decode, images[order[:1500]], labels[order[:1500]]


def run(digits, tmp_path, task, sub_codes):
    data = CodeData(path=str(digits[0]), grid=4, sub_codes=sub_codes, code_bits=BITS // sub_codes, batch_size=64)
    optimizer = OptimizerConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup=0.05, weight_decay=0.05)
    experiment = Experiment(
        task=task,
        data=data,
        train=TrainConfig(steps=600, optimizer=optimizer, eval_every=0, checkpoint_every=600, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(tmp_path / "run"),
    )
    train(experiment, quiet=True)
    loaded = load(tmp_path / "run")
    found = loaded.task.evaluate(loaded.params, data.eval_batches())
    train_codes = np.concatenate([b["codes"] for b in itertools.islice(data.train_batches(), 23)])
    counts = np.stack(
        [np.bincount(c.ravel(), minlength=2**data.code_bits) + 1 for c in np.moveaxis(train_codes, -1, 0)]
    )
    held_out = np.concatenate([b["codes"][b["mask"] > 0] for b in data.eval_batches()])
    chances = counts / counts.sum(-1, keepdims=True)
    unigram = -np.mean([np.log(chances[i, held_out[..., i]]).sum() / held_out[..., i].size for i in range(sub_codes)])
    return loaded.params, found["nats_per_position"], unigram * sub_codes


def recognised(digits, codes, labels):
    """The part of the pictures whose nearest neighbours among real digits are of their class."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    _, decode, images, real = digits
    return neighbors.KNeighborsClassifier(5).fit(images, real).score(decode(np.asarray(codes)), labels)


LABELS = np.repeat(np.arange(10), 20)


@pytest.mark.slow
@pytest.mark.parametrize("sub_codes", [1, 2])
def test_the_autoregressive_model_draws_digits(digits, tmp_path, sub_codes):
    model = ElmConfig(**SIZE, sub_codes=sub_codes, code_bits=BITS // sub_codes)
    params, nats, unigram = run(digits, tmp_path, ElmModeling(model=model), sub_codes)
    score = {
        scale: recognised(
            digits,
            elm_sampling.generate(
                model, params, LABELS, sampling=ElmSampling(guidance=scale, top_k=0), rng=jax.random.key(0)
            ),
            LABELS,
        )
        for scale in (1.0, 3.0)
    }
    print(f"\n1-{BITS} as {sub_codes}: {nats:.3f} nats a position, unigram {unigram:.3f}, recognised {score}")
    assert nats < unigram - 0.4
    assert score[1.0] > 0.4 and score[3.0] > 0.6


@pytest.mark.slow
def test_the_masked_model_draws_digits(digits, tmp_path):
    model = MaskedElmConfig(**SIZE, sub_codes=1, code_bits=BITS)
    params, nats, unigram = run(digits, tmp_path, MaskedElmModeling(model=model), 1)
    sampling = MaskedSampling(rounds=8, guidance=3.0, noise=2.0)
    codes = elm_masked.generate(model, params, LABELS, sampling=sampling, rng=jax.random.key(0))
    score = recognised(digits, codes, LABELS)
    print(f"\nmasked: {nats:.3f} nats a masked position, unigram {unigram:.3f}, recognised {score}")
    assert nats < unigram - 0.4
    assert score > 0.4
