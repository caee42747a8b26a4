"""Numbers of a text, and losses that are computed part by part."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.losses import by_parts, cross_entropy, masked_mean, text_metrics, text_sums


def test_text_is_compared_by_its_bytes():
    found = text_metrics({"nats": 6.0, "tokens": 3.0, "bytes": 8.0})
    assert found["loss"] == 2 and found["bits_per_byte"] == pytest.approx(6 / 0.6931471805599453 / 8)


class Losses(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_what_is_masked_does_not_count(self):
        nats, mask = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1.0, 0.0, 1.0]])
        found = self.variant(text_sums)(nats, mask, jnp.array([[3, 5, 7]]))
        chex.assert_trees_all_close(found, {"nats": 5.0, "tokens": 2.0, "bytes": 10.0})
        assert self.variant(masked_mean)(nats, mask) == 2.5
        assert self.variant(masked_mean)(nats, 0 * mask) == 0

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_row_in_parts_has_the_same_loss(self):
        rng = np.random.default_rng(0)
        logits, targets = rng.normal(size=(2, 6, 5)), rng.integers(0, 5, (2, 6))
        whole = self.variant(cross_entropy)(logits, targets)
        parts = self.variant(lambda *arrays: by_parts(cross_entropy, 2, *arrays))(logits, targets)
        chex.assert_trees_all_close(parts, whole, rtol=1e-6)
