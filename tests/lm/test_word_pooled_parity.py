"""Learn Your Tokens against the authors' numbers, for whatever sizes a file has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.word_pooled import config_from, params_from, params_to
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.word_pooled import PlainConfig, WordPooled, guess_words, unit_weights, word_accuracies
from jaxtok.nn.losses import cross_entropy, masked_mean

FILES = ["word_pooled/e2e*.npz", "word_pooled/plain*.npz"]


def load(golden):
    config = config_from(golden.config)
    return config, params_from(config, golden.under("params"))


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, units, lengths):
    words, targets, lengths, target_lengths = units[:, :-1], units[:, 1:], lengths[:, :-1], lengths[:, 1:]

    def loss(params):
        logits = WordPooled(config).apply({"params": params}, words, lengths, targets)
        weights = unit_weights(target_lengths, units.shape[2], jnp.ones(lengths.shape), config.loss_on_pads)
        return masked_mean(cross_entropy(logits, targets), weights), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="config")
def run_plain(config, params, units, targets):
    def loss(params):
        logits, _ = Decoder(config).apply({"params": params}, units)
        return cross_entropy(logits, targets).mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parity(*FILES)
def test_model(golden, parity):
    config, params = load(golden)
    if isinstance(config, PlainConfig):
        (loss, logits), gradient = run_plain(config, params, golden["in/x"], golden["in/y"])
    else:
        (loss, logits), gradient = run(config, params, golden["in/x"], golden["in/x_len"])
    parity("logits", logits, golden["out/logits"], rtol=2e-4)
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    ours, theirs = params_to(config, gradient), golden.under("grad")
    assert theirs.keys() <= ours.keys()
    for name in [name for name, expected in theirs.items() if np.abs(expected).max() < 1e-6]:
        expected = theirs.pop(name)  # the bias of keys, on which softmax does not depend, so theirs is rounding
        assert np.abs(ours[name] - expected).max() < 1e-6, name
    if theirs:
        parity("gradient", {name: ours[name] for name in theirs}, theirs, rtol=1e-3)


@pytest.mark.parity("word_pooled/e2e*.npz")
def test_pooled_vectors_and_the_last_word(golden, parity):
    """Words are spelled to the end of the canvas, as in the authors' validation, but by arg-max instead of sampling."""
    config, params = load(golden)
    units, lengths = golden["in/x"], golden["in/x_len"]
    if "mid/pooled" in golden.arrays:
        parity(
            "pooled", WordPooled(config).apply({"params": params}, units, lengths, method="pool"), golden["mid/pooled"]
        )
    spelled = guess_words(WordPooled(config), params, units[:, :-1], lengths[:, :-1], stop=False)[
        :, -1, : units.shape[2]
    ]
    np.testing.assert_array_equal(spelled, golden["out/greedy_last_word"])
    right, whole = word_accuracies(spelled, units[:, -1])
    parity("unit accuracy", right.sum() / (units[:, -1] != 0).sum(), golden["out/acc_unit_last_word"], rtol=1e-6)
    parity("word accuracy", whole.mean(), golden["out/acc_word_last_word"], rtol=1e-6)


@pytest.mark.parity(*FILES)
def test_names_there_and_back(golden):
    config, params = load(golden)
    again = params_to(config, params)
    for name, array in golden.under("params").items():
        if not (isinstance(config, PlainConfig) and name == "in_pe"):
            np.testing.assert_array_equal(again[name], array, err_msg=name)
