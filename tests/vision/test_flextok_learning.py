"""FlexTok learns: few tokens are a picture only with nested dropout, and a run whose codes collapse is ended."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from jaxtok.configuration import load_config
from jaxtok.training.logs import read_metrics
from jaxtok.training.loop import DeadRun, train
from jaxtok.vision.collapse import CollapseGuard

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


def test_a_dead_run_is_ended(tmp_path):
    """A decoder that never gets codes teaches the encoder nothing, so that the codes of all images stay alike."""
    guard = CollapseGuard(patience=50)
    config = digits(tmp_path, 200, null_probability=1.0, guard=guard)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=10))
    with pytest.raises(DeadRun, match=r"^the tokenizer has collapsed: code_std has been below 0\.01 since step 1 \("):
        train(config, quiet=True)
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [1, *range(10, 61, 10)]
