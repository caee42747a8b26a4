"""Statistics of tokens and the reach of attention (their numbers: test_elm_parity.py)."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jaxtok.data.codes import CodeData, Header, write_codes
from jaxtok.vision import elm, elm_masked
from jaxtok.vision.elm import ElmConfig
from jaxtok.vision.elm_masked import MaskedElmConfig
from jaxtok.vision.token_statistics import (
    attention_locality,
    attention_maps,
    cells_of,
    compare_tokens,
    locality,
    plot_locality,
    plot_statistics,
    stored_tokens,
    token_statistics,
)

SMALL = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24, "grid": 3, "code_bits": 3}
CONFIGS = [ElmConfig(**SMALL, num_classes=4), MaskedElmConfig(**SMALL, num_classes=4, sub_codes=2)]


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
    codes = np.random.default_rng(0).integers(0, 64, (5, 2, 4, 1))
    header = Header(grid=(2, 2), sub_codes=1, vocab_size=64, classes=("a",))
    write_codes(tmp_path / "train", header, [(codes, np.zeros(5, int))])
    data = CodeData(path=str(tmp_path), grid=2, sub_codes=2, code_bits=3)
    np.testing.assert_array_equal(stored_tokens(data), codes[:, 0, :, 0])
    assert stored_tokens(data, images=3).shape == (3, 4)


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


@pytest.mark.parametrize("config", CONFIGS, ids=["autoregressive", "masked"])
def test_reach_of_a_model(config, tmp_path):
    init = elm.init_params if config.causal else elm_masked.init_params
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 20 * x, params)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (3, 9, config.sub_codes)).astype(np.int32)
    batch = {"codes": codes, "labels": np.arange(3, dtype=np.int32), "mask": np.array([1, 1, 0], np.float32)}
    masked = None if config.causal else np.zeros((3, 9), bool)
    maps = np.asarray(attention_maps(config, params, codes, batch["labels"], masked))
    places = len(cells_of(config))
    assert maps.shape == (2, 3, 4, places, places) and places == (8 if config.causal else 18)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert (maps[..., np.triu_indices(places, 1)[0], np.triu_indices(places, 1)[1]] == 0).all() == config.causal
    found = locality(config, params, [batch])
    assert found["distance"].shape == found["local_mass"].shape == (2, 4)
    if config.causal:  # the image that only fills the batch does not count
        distance, _ = attention_locality(maps[:, :2], cells_of(config))
        np.testing.assert_allclose(found["distance"], np.asarray(distance).mean(1), rtol=1e-5)
    assert plot_locality({"model": found}, tmp_path / "reach.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no image"):
        locality(config, params, [])
