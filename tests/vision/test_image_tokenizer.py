"""What every image tokenizer promises (`jaxtok.protocols.ImageTokenizer`)."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import collect
from image_tokenizers import EXACT, TAKE_A_KEY, TEST_ONLY, FrequencyTokenizer, params_of

from jaxtok.data.codes import CodeData, Header, open_codes, write_codes
from jaxtok.protocols import ImageTokenizer

IMAGE_TOKENIZERS = collect("IMAGE_TOKENIZERS") | TEST_ONLY


@pytest.fixture(scope="module", params=IMAGE_TOKENIZERS)
def case(request):
    """Its name, the tokenizer, its parameters, two images, and their codes."""
    task = IMAGE_TOKENIZERS[request.param]()
    images = np.random.default_rng(0).random((2, *task.image_shape), np.float32)
    params = params_of(request.param, task)
    rng = jax.random.key(1) if task.draws_codes or request.param in TAKE_A_KEY else None
    return request.param, task, params, images, task.encode(params, images, rng)


def decode(task, params, codes, key=5):
    """Encodes, with a key where the tokenizer needs one."""
    return task.decode(params, codes, jax.random.key(key) if task.draws_images else None)


def test_codes(case):
    name, task, params, images, codes = case
    assert isinstance(task, ImageTokenizer)
    chex.assert_shape(codes, (2, math.prod(task.code_shape), len(task.code_values)))
    chex.assert_type(codes, jnp.int32)
    assert (codes >= 0).all() and (codes < np.array(task.code_values)).all()
    drawn = task.draws_codes or name in TAKE_A_KEY
    again = task.encode(params, jnp.asarray(images), jax.random.key(1) if drawn else None)
    chex.assert_trees_all_equal(codes, again)  # of the same key
    if drawn:
        assert not np.array_equal(codes, task.encode(params, images, jax.random.key(2)))
    if task.draws_codes:
        with pytest.raises(ValueError, match="draws its codes"):
            task.encode(params, images)
    else:
        chex.assert_trees_all_equal(task.encode(params, images), task.encode(params, images))


def test_images(case):
    name, task, params, images, codes = case
    decoded = decode(task, params, codes)
    chex.assert_shape(decoded, images.shape)
    chex.assert_type(decoded, jnp.float32)
    chex.assert_tree_all_finite(decoded)
    # an image depends only on its own codes, its index in the batch and the key
    chex.assert_trees_all_close(decode(task, params, codes[:1]), decoded[:1], atol=1e-5)
    chex.assert_trees_all_close(decode(task, params, codes.at[1].set(0))[:1], decoded[:1], atol=1e-5)
    if task.draws_images:
        with pytest.raises(ValueError, match="draws its images"):
            task.decode(params, codes)
    if name in EXACT:
        draws = task.model.draw(jax.random.key(1), 2) if task.draws_codes or name in TAKE_A_KEY else None
        again, quantized = jax.jit(task.autoencoder().apply)({"params": params["autoencoder"]}, images, draws)
        chex.assert_trees_all_equal(quantized.codes.reshape(codes.shape), codes)
        chex.assert_trees_all_close(decoded, again, atol=1e-6)


def test_prefixes(case):
    """Each prefix that is named is decoded, with a key to other images where they are drawn; others are refused."""
    _, task, params, images, codes = case
    positions = math.prod(task.code_shape)
    assert tuple(sorted(set(task.prefixes))) == task.prefixes
    assert not task.prefixes or task.prefixes[-1] == positions
    for length in task.prefixes[:-1]:
        decoded = decode(task, params, codes[:, :length])
        chex.assert_shape(decoded, images.shape)
        chex.assert_tree_all_finite(decoded)
        if task.draws_images:
            chex.assert_trees_all_equal(decoded, decode(task, params, codes[:, :length]))
            assert not np.array_equal(decoded, decode(task, params, codes[:, :length], key=6))
    for length in set(range(1, positions)) - set(task.prefixes):
        with pytest.raises(ValueError, match="positions, sub-codes"):
            decode(task, params, codes[:, :length])


def test_more_codes_are_nearer_to_the_image():
    """This holds for codes that are ordered."""
    task = FrequencyTokenizer()
    params = task.init(jax.random.key(0), {})
    ramp = np.linspace(0, 1, 8)
    image = np.stack([np.outer(ramp, ramp), np.outer(ramp, 1 - ramp**2), np.outer(1 - ramp, ramp)], -1)[None]
    codes = task.encode(params, image.astype(np.float32))
    errors = [float(np.square(decode(task, params, codes[:, :n]) - image).mean()) for n in task.prefixes]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_codes_are_stored(case, tmp_path):
    """A file of them, and batches from it, are the codes."""
    _, task, params, _, codes = case
    header = Header(
        shape=task.code_shape,
        values=task.code_values,
        classes=("a",),
        image_shape=task.image_shape,
        prefixes=task.prefixes,
    )
    write_codes(tmp_path / "train", header, [(np.asarray(codes)[:, None], np.zeros(2, int))])
    assert open_codes(tmp_path / "train").header == header
    data = CodeData(path=str(tmp_path), shape=task.code_shape, values=task.code_values, batch_size=2)
    (batch,) = data.eval_batches("train")
    chex.assert_trees_all_equal(batch["codes"], np.asarray(codes))
    chex.assert_trees_all_equal(decode(task, params, batch["codes"]), decode(task, params, codes))


def test_only_the_autoencoder_is_needed(case):
    name, task, params, _, codes = case
    if name not in EXACT:
        pytest.skip("it has no parameters of training only")
    alone = {"autoencoder": params["autoencoder"]}
    chex.assert_trees_all_equal(task.decode(alone, codes), task.decode(params, codes))


def test_what_is_refused(case):
    _, task, params, images, codes = case
    key, (first, *others), values = jax.random.key(1), task.image_shape, task.code_values
    sizes = ", ".join(map(str, task.image_shape))
    for wrong, message in (
        (images[:, 1:], rf"shape \(2, {first - 1}, {', '.join(map(str, others))}\)"),
        (np.concatenate([images] * 2, -1), rf"\[batch, {sizes}\]"),
        (images[0], "batch"),
        ((255 * images).astype(np.uint8), "uint8; they must be floats"),
        (np.where(images > 0.5, np.nan, images), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            task.encode(params, wrong, key)
    for wrong, message in (
        (codes[0], "positions, sub-codes"),
        (np.concatenate([codes] * 2, -1), "positions, sub-codes"),
        (codes.astype(np.float32), "whole numbers"),
        (codes.at[0, 0, -1].set(values[-1]), rf"must be in \[0, {values[-1]}\)"),
        (codes.at[0, 0, 0].set(-1), "go from -1"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(task, params, wrong)


def test_inside_a_compiled_function(case):
    """A language model of codes calls the tokenizer in this way."""
    _, task, params, images, _ = case
    rng = jax.random.key(1)
    found = jax.jit(lambda p, x: task.decode(p, task.encode(p, x, rng), rng))(params, images)
    chex.assert_shape(found, images.shape)
