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


def test_adam_without_bias_correction():
    """m / (sqrt(v) + eps) of the plain moments, as in BERT's and ELECTRA's code."""
    config = OptimizerConfig(bias_correction=False, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip=0.0)
    optimizer, params = make_optimizer(config), {"kernel": jnp.arange(1.0, 4.0)}
    state, m, v = optimizer.init(params), 0.0, 0.0
    for k in range(3):
        grads = {"kernel": jnp.array([0.1, -1.0, 3.0]) * (k + 1)}
        update, state = optimizer.update(grads, state, params)
        m, v = 0.9 * m + 0.1 * grads["kernel"], 0.999 * v + 0.001 * grads["kernel"] ** 2
        np.testing.assert_allclose(update["kernel"], m / (np.sqrt(v) + 1e-6) + 0.01 * params["kernel"], rtol=1e-5)


def test_a_warmup_that_is_a_factor_of_the_decay():
    config = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.0, schedule="linear", warmup=0.1, warmup_times_decay=True
    )
    rates = [float(learning_rate(config, step, 100)) for step in (0, 5, 10, 50, 100)]
    np.testing.assert_allclose(rates, [0.0, 0.5 * 0.95, 0.9, 0.5, 0.0], atol=1e-6)


def test_layers_further_down_learn_less():
    """decay^(layers + 2 - depth), with the embeddings at depth 0, layer i at i + 1, and the head at the top."""
    ones = lambda *shape: jnp.ones(shape)  # noqa: E731
    params = {
        "embedding": ones(4, 2),
        "embedding_norm": {"scale": ones(2)},
        "embedding_project": {"kernel": ones(2, 2)},
        "stack": {"blocks": {"ffn": {"up": {"kernel": ones(3, 2, 2)}}}},
        "head_dense": {"kernel": ones(2, 2)},
    }
    config = OptimizerConfig(name="sgd", weight_decay=0.0, clip=0.0, layer_decay=0.8)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for name in ("embedding", "embedding_norm", "embedding_project"):
        np.testing.assert_allclose(jax.tree.leaves(updates[name])[0], 0.8**5, rtol=1e-6)
    layers = updates["stack"]["blocks"]["ffn"]["up"]["kernel"]
    np.testing.assert_allclose(layers[:, 0, 0], [0.8**4, 0.8**3, 0.8**2], rtol=1e-6)
    np.testing.assert_array_equal(updates["head_dense"]["kernel"], 1)
    with pytest.raises(ValueError, match="one stack of layers; this one has 0"):
        optimizer.update({"embedding": ones(2)}, optimizer.init({"embedding": ones(2)}))


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
        ("layer_decay", 0.0),
    ],
)
def test_impossible_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})
