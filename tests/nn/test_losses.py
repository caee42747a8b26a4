"""Numbers of a text."""

import jax.numpy as jnp
import pytest

from jaxtok.nn.losses import text_metrics, text_sums


def test_text_is_compared_by_its_bytes():
    found = text_metrics({"nats": 6.0, "tokens": 3.0, "bytes": 8.0})
    assert found["loss"] == 2 and found["bits_per_byte"] == pytest.approx(6 / 0.6931471805599453 / 8)


def test_what_is_masked_does_not_count():
    nats, mask = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1.0, 0.0, 1.0]])
    assert text_sums(nats, mask, jnp.array([[3, 5, 7]])) == {"nats": 5, "tokens": 2, "bytes": 10}
