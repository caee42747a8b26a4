"""Sums over an evaluation's batches."""

import jax.numpy as jnp
import pytest

from jaxtok.nn.losses import text_metrics, totals


def test_batches_are_added_up():
    parts = [jnp.array([1.0, 2.0]), (jnp.array(0.5), 1)]  # stacked, or one by one
    assert totals(parts, "nats words", counted="words") == {"nats": 1.5, "words": 3.0}
    many = totals((jnp.array([1e-4, 2.0**24]) for _ in range(3)), "nats words", counted="words")
    assert many["words"] == 3 * 2**24 and many["nats"] == pytest.approx(3e-4)


def test_text_is_compared_by_its_bytes():
    found = text_metrics([(2.0, 1, 4), (4.0, 2, 4)])
    assert found["loss"] == 2 and found["bits_per_byte"] == pytest.approx(6 / 0.6931471805599453 / 8)


@pytest.mark.parametrize("parts", [[], [(0.0, 0.0)]])
def test_an_evaluation_of_nothing_is_an_error(parts):
    with pytest.raises(ValueError, match="hold no words that count"):
        totals(parts, "nats words", counted="words")
