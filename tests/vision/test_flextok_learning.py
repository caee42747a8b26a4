"""FlexTok learns: few tokens are a picture only with nested dropout, and a run whose codes collapse is ended."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from jaxtok.configuration import load_config
from jaxtok.training.loop import DeadRun, train

pytestmark = pytest.mark.slow


def digits(folder, steps, **options):
    config = load_config("flextok_digits")
    training = dataclasses.replace(config.train, steps=steps, eval_every=0, tensorboard=False)
    task = dataclasses.replace(config.task, **options)
    return dataclasses.replace(config, task=task, train=training, workdir=str(folder))


def test_nested_dropout_orders_the_tokens(tmp_path):
    """The squared error from one token is at most half of that without dropout, and falls with more tokens."""
    nested, plain = (
        train(digits(tmp_path / dropout, 2000, dropout=dropout), quiet=True).metrics for dropout in ("pow2", "none")
    )
    errors = [nested[f"latent_mse_{k}"] for k in (1, 2, 4, 8, 16)]
    assert all(more <= 1.02 * fewer for fewer, more in itertools.pairwise(errors)), errors
    assert nested["latent_mse_1"] <= plain["latent_mse_1"] / 2, (nested, plain)
    assert plain["latent_mse_16"] < nested["latent_mse_16"], (nested, plain)  # the price


def test_a_collapsed_run_is_ended(tmp_path):
    """With times in the middle, codes of this size collapse."""
    with pytest.raises(DeadRun, match=r"^the tokenizer has collapsed: code_std has been below 0\.01 since step \d+"):
        train(digits(tmp_path, 2000, time_shift=0.0), quiet=True)
