"""What every image tokenizer promises (`jaxtok.protocols.ImageTokenizer`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import collect
from image_tokenizers import DRAWN, EXACT, TAKE_A_KEY, random_params

from jaxtok.protocols import ImageTokenizer

IMAGE_TOKENIZERS = collect("IMAGE_TOKENIZERS")


@pytest.fixture(scope="module", params=IMAGE_TOKENIZERS)
def case(request):
    """Its name, the tokenizer, its parameters, two images, and their codes."""
    task = IMAGE_TOKENIZERS[request.param]()
    size = task.image_size
    images = np.random.default_rng(0).random((2, size, size, 3), np.float32)
    params = random_params(task)
    rng = jax.random.key(1) if request.param in (*DRAWN, *TAKE_A_KEY) else None
    return request.param, task, params, images, task.encode(params, images, rng)


def test_codes(case):
    name, task, params, images, codes = case
    assert isinstance(task, ImageTokenizer)
    rows, columns = task.grid
    assert codes.shape == (2, rows * columns, task.sub_codes) and codes.dtype == jnp.int32
    assert int(codes.min()) >= 0 and int(codes.max()) < task.vocab_size
    drawn = name in (*DRAWN, *TAKE_A_KEY)
    again = task.encode(params, jnp.asarray(images), jax.random.key(1) if drawn else None)
    assert np.array_equal(codes, again)  # of the same key
    if drawn:
        assert not np.array_equal(codes, task.encode(params, images, jax.random.key(2)))
    if name in DRAWN:
        with pytest.raises(ValueError, match="draws its codes"):
            task.encode(params, images)
    else:
        without = task.encode(params, images)
        assert np.array_equal(without, task.encode(params, images))


def test_images(case):
    name, task, params, images, codes = case
    decoded = task.decode(params, codes)
    assert decoded.shape == images.shape and decoded.dtype == jnp.float32
    assert np.isfinite(decoded).all()
    # a picture depends on its own codes only
    assert np.allclose(task.decode(params, codes[1:]), decoded[1:], atol=1e-5)
    if name in EXACT:
        rng = jax.random.key(1) if name in (*DRAWN, *TAKE_A_KEY) else None
        draws = None if rng is None else task.model.draw(rng, 2)
        again, quantized = jax.jit(task.module().apply)({"params": params["autoencoder"]}, images, draws)
        assert np.array_equal(quantized.codes.reshape(codes.shape), codes)
        np.testing.assert_allclose(decoded, again, atol=1e-6)


def test_only_the_autoencoder_is_needed(case):
    _, task, params, _, codes = case
    alone = {"autoencoder": params["autoencoder"]}
    assert np.array_equal(task.decode(alone, codes), task.decode(params, codes))


def test_what_is_refused(case):
    _, task, params, images, codes = case
    key, size = jax.random.key(1), task.image_size
    for wrong, said in (
        (images[:, 1:], rf"shape \(2, {size - 1}, {size}, 3\)"),
        (images[..., :1], r"\[batch, 8, 8, 3\]"),
        (images[0], "batch"),
        ((255 * images).astype(np.uint8), "uint8; divide them by 255"),
        (np.where(images > 0.5, np.nan, images), "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            task.encode(params, wrong, key)
    for wrong, said in (
        (codes[:, 1:], "positions, sub-codes"),
        (codes[0], "positions, sub-codes"),
        (codes.astype(np.float32), "whole numbers"),
        (codes.at[0, 0, 0].set(task.vocab_size), rf"must be in \[0, {task.vocab_size}\)"),
        (codes.at[0, 0, 0].set(-1), "go from -1"),
    ):
        with pytest.raises(ValueError, match=said):
            task.decode(params, wrong)


def test_inside_a_compiled_function(case):
    """As a language model of codes calls it."""
    _, task, params, images, _ = case
    rng = jax.random.key(1)
    found = jax.jit(lambda p, x: task.decode(p, task.encode(p, x, rng)))(params, images)
    assert found.shape == images.shape
