import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.training.optimizer import OPTIMIZERS, OptimizerConfig, decayed, learning_rate, make_optimizer


@pytest.mark.parity("tokenformer/schedule*.npz")
def test_learning_rates_equal_the_authors(golden, parity):
    for name, c in golden.config.items():
        config = OptimizerConfig(
            learning_rate=c["lr"], min_learning_rate=c["min_lr"], warmup=c["warmup"], schedule=c["style"]
        )
        ours = learning_rate(config, golden[f"out/{name}/iteration"], c["iters"])
        parity("learning rate", ours, golden[f"out/{name}/lr"])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential", "constant"])
def test_schedule_shapes(schedule):
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, schedule=schedule, warmup=0.105)
    steps = 100
    rates = np.asarray(learning_rate(config, np.arange(steps + 1), steps))
    assert rates[0] == 0
    np.testing.assert_allclose(rates[:11], np.arange(11) / 10.5, rtol=1e-6)  # the warm-up of 10.5 steps is not rounded
    assert rates[11:].min() >= np.float32(0.1) and rates.max() <= 1
    last = {"cosine": 0.1, "linear": 0.1, "exponential": np.exp(-0.693), "constant": 1.0}[schedule]
    np.testing.assert_allclose(rates[-1], last, rtol=1e-5)
    flat = learning_rate(dataclasses.replace(config, warmup=0.0), 0, steps)
    assert float(flat) == 1.0


def test_adamw_is_optax_adamw():
    """The direction times the rate is what optax's own adamw does, clipping included."""
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "scale": jnp.ones(3)}
    grads = jax.tree.map(lambda p: 0.3 * p + 1, params)
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0)
    ours = make_optimizer(config)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decayed)
    )
    a, b = ours.init(params), theirs.init(params)
    for _ in range(3):
        u, a = ours.update(grads, a, params)
        v, b = theirs.update(grads, b, params)
        for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v)):
            np.testing.assert_allclose(-0.1 * x, y, rtol=1e-6, atol=1e-8)


def test_norms_and_biases_do_not_decay():
    params = {"blocks": {"query": {"keys": 1, "values": 1}}, "embedding": 1, "final_norm": {"scale": 1, "bias": 1}}
    assert decayed(params) == {
        "blocks": {"query": {"keys": True, "values": True}},
        "embedding": True,
        "final_norm": {"scale": False, "bias": False},
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.0, clip=0.0))
    params = {"w": jnp.full((4, 4), 2.0)}
    state = optimizer.init(params)
    for _ in range(20):
        updates, state = optimizer.update(params, state, params)  # the gradient of |w|^2 / 2 is w
        params = jax.tree.map(lambda p, u: p - 0.05 * u, params, updates)
    assert float(jnp.abs(params["w"]).max()) < 1.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "adam8"),
        ("schedule", "step"),
        ("warmup", 1.0),
        ("clip", -1),
        ("learning_rate", 0),
        ("min_learning_rate", 1),
    ],
)
def test_impossible_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})
