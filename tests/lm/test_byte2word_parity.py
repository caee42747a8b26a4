"""Byte2Word against numbers of an independent NumPy version, for whatever sizes a file has."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.byte2word import params_from, params_to, read_config
from jaxtok.lm.byte2word import Byte2Word
from jaxtok.nn.losses import cross_entropy

FILES = "byte2word/*.npz"


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, arrays):
    """The loss and its gradient, word vectors, hidden states and the logits of the slots."""
    model = Byte2Word(config)
    one = {name: arrays[name][None] for name in ("byte_ids", "byte_mask", "word_mask", "segment_ids")}
    slots = arrays["slots"]

    def loss(params):
        apply = functools.partial(model.apply, {"params": params})
        words = apply(one["byte_ids"], one["byte_mask"], method="vectors")
        hidden = apply(words, one["word_mask"], types=one["segment_ids"], method="encode")
        logits = apply(hidden[:, slots[:, 0]], slots[None, :, 1], method="pieces")[0]
        return cross_entropy(logits, arrays["targets"]).mean(), (words[0], hidden[0], logits)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("pooling", ["plain", "factored"])
@pytest.mark.parity(FILES)
def test_model(golden, parity, pooling):
    config = dataclasses.replace(read_config(golden.config), pooling=pooling)
    params = params_from(config, golden.under("params"))
    (loss, (words, hidden, logits)), gradient = run(config, params, golden.under("in"))
    parity("word vectors", words, golden["mid/word_vectors"], rtol=1e-5)
    parity("hidden states", hidden, golden["out/hidden"])
    parity("logits", logits, golden["out/logits"])
    parity("loss", loss, golden["out/loss_f64"], rtol=1e-5)
    ours, names = params_to(config, gradient), golden.config["fd_param_names"]
    for (name, entry), expected in zip(golden["grad/fd_index"], golden["grad/fd_value_f64"]):
        mine = ours[names[name]].reshape(-1)[entry]
        assert abs(mine - expected) <= 1e-4 * abs(expected) + 1e-6, (names[name], mine, expected)
    mine = np.array([ours[names[name]].reshape(-1)[entry] for name, entry in golden["grad/fd_index"]])
    parity("gradient", mine, golden["grad/fd_value_f64"])


@pytest.mark.parity(FILES)
def test_names_and_paths_are_inverse(golden):
    config, tensors = read_config(golden.config), golden.under("params")
    written = params_to(config, params_from(config, tensors))
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.parity(FILES)
def test_arrays_that_do_not_fit(golden):
    config, tensors = read_config(golden.config), golden.under("params")
    with pytest.raises(ValueError, match=r"pool\.wk is missing.*layer\.0\.odd is unknown"):
        params_from(config, {n: a for n, a in tensors.items() if n != "pool.wk"} | {"layer.0.odd": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"byte_pos has shape"):
        params_from(dataclasses.replace(config, max_bytes=config.max_bytes + 1), tensors)
    with pytest.raises(ValueError, match="mask_id is 4; it must be 259"):
        read_config(golden.config | {"mask_id": 4})
