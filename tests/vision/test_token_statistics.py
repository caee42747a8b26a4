"""Statistics of tokens and the reach of attention (numbers: test_elm_parity.py)."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxtok.data.codes import Header, open_codes, write_codes
from jaxtok.training.mesh import unboxed
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling
from jaxtok.vision.token_statistics import (
    MapsAttention,
    attention_locality,
    compare_tokens,
    locality,
    plot_locality,
    plot_statistics,
    stored_tokens,
    token_statistics,
)

SMALL = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24, "grid": 3, "code_bits": 3}
TASKS = [
    ElmModeling(model=ElmConfig(**SMALL, num_classes=4)),
    MaskedElmModeling(model=MaskedElmConfig(**SMALL, num_classes=4, sub_codes=2)),
]


def test_uniform_tokens():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(16) for _ in range(50)])
    found = token_statistics(rows, 16)
    assert found.kl_unigram == pytest.approx(0, abs=1e-12)
    assert (found.usage, found.samples) == (1.0, 800)
    assert found.perplexity == pytest.approx(16)
    assert found.bias == 15 / 1600


def test_constant_and_alternating_tokens():
    constant = token_statistics(np.zeros((3, 8), int), 4)
    assert (constant.kl_unigram, constant.kl_bigram) == pytest.approx((math.log(4), 2 * math.log(4)))
    assert (constant.usage, constant.perplexity, constant.bigram_mutual_information) == (0.25, 1.0, 0.0)
    alternating = token_statistics(np.tile([0, 1], (4, 5))[:, :9], 2)
    assert alternating.bigram_mutual_information == pytest.approx(math.log(2))  # the next is known
    assert token_statistics(np.array([[2**16 - 1, 0]]), 2**16).kl_bigram == pytest.approx(2 * 16 * math.log(2))


def test_comparisons_have_equal_samples(tmp_path):
    rng = np.random.default_rng(0)
    found = compare_tokens({"images": rng.integers(0, 8, (20, 9)), "text": rng.integers(0, 3, (7, 30))}, 8)
    assert {x.samples for x in found.values()} == {63}
    assert found["images"].kl_unigram < found["text"].kl_unigram
    assert plot_statistics(found, tmp_path / "tokens.png").stat().st_size > 5000


def test_stored_codes_are_tokens(tmp_path):
    codes = np.random.default_rng(0).integers(0, 8, (5, 2, 4, 2))
    header = Header(shape=(2, 2), values=(8, 8), classes=("a",))
    write_codes(tmp_path / "train", header, [(codes, np.zeros(5, int))])
    file = open_codes(tmp_path / "train")
    np.testing.assert_array_equal(stored_tokens(file), 8 * codes[:, 0, :, 0] + codes[:, 0, :, 1])
    assert stored_tokens(file, images=3).shape == (3, 4)
    wide = dataclasses.replace(file, header=dataclasses.replace(header, values=(2**13, 2**13)))
    with pytest.raises(ValueError, match=r"8192 x 8192 values.*at most 2\^24"):
        stored_tokens(wide)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(np.zeros((3, 1), int), "at least 2"), (np.full((2, 3), 4), "the token 4"), (np.full((2, 3), -1), "the token -1")],
)
def test_impossible_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        token_statistics(tokens, 4)


def test_no_tokens():
    with pytest.raises(ValueError, match="no source"):
        compare_tokens({}, 4)


def test_reach_of_known_attention():
    cells = np.stack(np.divmod(np.arange(9), 3), -1)
    distance, mass = attention_locality(np.stack([np.eye(9), 5 * np.roll(np.eye(9), 1, 1), np.ones((9, 9))]), cells)
    to_next = [
        1,
        1,
        math.sqrt(5),
        1,
        1,
        math.sqrt(5),
        1,
        1,
        math.sqrt(8),
    ]  # at the end of a row to the next one's start
    np.testing.assert_allclose(distance[:2], [0, np.mean(to_next)], rtol=1e-6)
    np.testing.assert_allclose(mass, [1, 6 / 9, (9 + 4 * 4 + 4 * 6) / 81], rtol=1e-6)


@pytest.mark.parametrize("task", TASKS, ids=["autoregressive", "masked"])
def test_reach_of_a_model(task, tmp_path):
    causal, sub_codes = task.model.causal, task.model.sub_codes
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (3, 9, sub_codes)).astype(np.int32)
    batch = {"codes": codes, "labels": np.arange(3, dtype=np.int32), "mask": np.array([1, 1, 0], np.float32)}
    params = unboxed(jax.jit(task.init)(jax.random.key(0), batch))
    params = jax.tree.map(lambda x: 20 * x, params)
    assert isinstance(task, MapsAttention)
    maps = np.asarray(task.attention_maps(params, batch, jax.random.fold_in(jax.random.key(0), 0)))
    cells = task.attention_cells()
    cell_count = len(cells)
    assert maps.shape == (2, 3, 4, cell_count, cell_count) and cell_count == (8 if causal else 18)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert (maps[..., np.triu_indices(cell_count, 1)[0], np.triu_indices(cell_count, 1)[1]] == 0).all() == causal
    found = locality(task, params, [batch])
    assert found["distance"].shape == found["local_mass"].shape == (2, 4)
    # the image that only fills the batch does not count
    distance, _ = attention_locality(maps[:, :2], cells)
    np.testing.assert_allclose(found["distance"], np.asarray(distance).mean(1), rtol=1e-5)
    assert plot_locality({"model": found}, tmp_path / "reach.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no image"):
        locality(task, params, [])


def test_reach_in_a_volume():
    """Cells have as many axes as the codes' shape."""
    cells = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), -1)
    distance, mass = attention_locality(np.ones((8, 8)), cells)
    np.testing.assert_allclose([distance, mass], [(3 + 3 * math.sqrt(2) + math.sqrt(3)) / 8, 1], rtol=1e-6)
