"""What every generator of codes of images promises (`jaxtok.protocols.ImageGenerator`)."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import collect
from image_generators import TEST_ONLY, random_params

from jaxtok.protocols import ImageGenerator
from jaxtok.verbs.vision import make_sampling
from jaxtok.vision.elm_masked import MaskedSampling

IMAGE_GENERATORS = collect("IMAGE_GENERATORS") | TEST_ONLY
"""Every generator knows four classes."""
KEY = jax.random.key(3)


@pytest.fixture(scope="module", params=IMAGE_GENERATORS)
def case(request):
    """The generator, its parameters, and codes of three images."""
    task = IMAGE_GENERATORS[request.param]()
    params = random_params(task)
    return task, params, task.draw(params, [1, None, 3], KEY)


def test_codes(case):
    task, params, codes = case
    assert isinstance(task, ImageGenerator)
    chex.assert_shape(codes, (3, math.prod(task.code_shape), len(task.code_values)))
    chex.assert_type(codes, jnp.int32)
    assert (codes >= 0).all() and (codes < np.array(task.code_values)).all()
    chex.assert_trees_all_equal(task.draw(params, [1, None, 3], KEY), codes)
    assert not np.array_equal(task.draw(params, [1, None, 3], jax.random.key(4)), codes)


def test_an_image_depends_on_its_condition_and_place(case):
    task, params, codes = case
    chex.assert_trees_all_equal(task.draw(params, [1, 0, 3], KEY)[::2], codes[::2])
    chex.assert_trees_all_equal(task.draw(params, [1], KEY), codes[:1])


def test_progress(case):
    """Progress rises to 1, and the images are the same as without it."""
    task, params, codes = case
    shares = []
    chex.assert_trees_all_equal(task.draw(params, [1, None, 3], KEY, on_progress=shares.append), codes)
    assert shares and shares[-1] == 1 and shares == sorted(shares) and shares[0] > 0


def test_options(case):
    task, params, _ = case
    kind = task.sampling
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert make_sampling(task) == make_sampling(task, {}) == make_sampling(task, kind()) == kind()
    option = "noise" if kind is MaskedSampling else "temperature"
    assert getattr(make_sampling(task, {option: 0.5}), option) == 0.5
    chex.assert_trees_all_equal(
        task.draw(params, [2], KEY, sampling=kind()), task.draw(params, [2], KEY, sampling=None)
    )
    assert not np.array_equal(
        task.draw(params, range(4), KEY), task.draw(params, range(4), KEY, sampling=kind(**{option: 50.0}))
    )
    with pytest.raises(ValueError, match=f"luck is not an option of {kind.__name__}; it must be one of .*{option}"):
        make_sampling(task, {"luck": 1.0})
    with pytest.raises(
        ValueError, match=f"sampling is of type int; for {type(task).__name__} it must be a {kind.__name__}"
    ):
        make_sampling(task, 3)


@pytest.mark.parametrize("condition", [-1, 4])
def test_what_is_refused(case, condition):
    task, params, _ = case
    assert task.num_classes == 4
    with pytest.raises(ValueError, match=f"label is {condition}; classes are 0 to 3"):
        task.draw(params, [0, condition], KEY)
