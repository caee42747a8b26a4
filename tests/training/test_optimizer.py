import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.training.optimizer import (
    OPTIMIZERS,
    OptimizerConfig,
    PartOptimizer,
    averaged_params,
    decayed,
    descend,
    learning_rate,
    learning_rates,
    make_optimizer,
    move_average,
)


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
        chex.assert_trees_all_close(jax.tree.map(lambda x: -0.1 * x, u), v, rtol=1e-6, atol=1e-8)


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


ADAM = {"learning_rate": 0.1, "min_learning_rate": 0.0, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}


def test_parts_have_optimizers_of_their_own():
    """Each part's rate, clipping and state are what they would be alone, from its own first step on."""
    config = OptimizerConfig(**ADAM, parts=(PartOptimizer(**ADAM | {"learning_rate": 0.3}, part="b", start=2),))
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(3)}, "frozen": {"kernel": jnp.ones(1)}}
    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params) for _ in range(4)]
    optimizer = make_optimizer(config)

    def alone(name, grads, config):
        optimizer, found = make_optimizer(config), []
        state = optimizer.init({name: params[name]})
        for grad in grads:
            update, state = optimizer.update({name: grad[name]}, state, {name: params[name]})
            found.append(descend(update, learning_rates(config, 0, 10))[name]["kernel"])
        return found

    state, found = optimizer.init(params), []
    for step, grad in enumerate(grads):
        update, state = optimizer.update(grad, state, params, step=step)
        found.append(descend(update, learning_rates(config, step, 10)))
    a = alone("a", grads, OptimizerConfig(**ADAM))
    b = alone("b", grads[2:], OptimizerConfig(**ADAM | {"learning_rate": 0.3}))
    for step in range(4):
        np.testing.assert_allclose(found[step]["a"]["kernel"], a[step], rtol=1e-6)
        expected = b[step - 2] if step >= 2 else np.zeros(3)
        np.testing.assert_allclose(found[step]["b"]["kernel"], expected, rtol=1e-6)
        assert not np.any(found[step]["frozen"]["kernel"])
    with pytest.raises(ValueError, match=r"names 'c', but the parameters at the top are a, b"):
        make_optimizer(OptimizerConfig(parts=(PartOptimizer(part="c"),))).init({"a": params["a"], "b": params["b"]})


def test_without_parts_and_average_all_is_as_it_was():
    """The state's tree is that of a chain, so that older checkpoints are read."""
    params = {"a": {"kernel": jnp.ones(2)}}
    config = OptimizerConfig()
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1, decayed))
    assert jax.tree.structure(make_optimizer(config).init(params)) == jax.tree.structure(plain.init(params))
    averaged = make_optimizer(OptimizerConfig(ema_decay=0.9)).init(params)
    assert jax.tree.structure(averaged.state) == jax.tree.structure(plain.init(params))


def test_moving_average():
    config = OptimizerConfig(ema_decay=0.75, ema_every=2)
    params = {"a": jnp.zeros(2), "held": jnp.zeros(2), "frozen": jnp.zeros(2)}
    state = make_optimizer(config).init(params)
    trainable = {"a": 1.0, "held": jnp.zeros(2), "frozen": 1.0}
    expected = 0.0
    for number in range(1, 5):
        params = {"a": jnp.full(2, float(number)), "held": jnp.full(2, float(number)), "frozen": jnp.zeros(2)}
        state = move_average(config, state, params, number, trainable)
        if number % 2 == 0:
            expected = 0.75 * expected + 0.25 * number
        np.testing.assert_allclose(state.average["a"], expected)
        np.testing.assert_array_equal(state.average["held"], number)
    found = averaged_params(state, params)
    assert set(found) == set(params) and float(found["a"][0]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="kept no moving average"):
        averaged_params(make_optimizer(OptimizerConfig()).init(params), params)


def test_optimizers_that_cannot_be():
    for options, message in (
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_every": 0}, "ema_every is 0"),
        ({"parts": (PartOptimizer(part="a"), PartOptimizer(part="a"))}, "each part can have one"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimizerConfig(**options)
    with pytest.raises(ValueError, match="part is empty"):
        PartOptimizer()
    with pytest.raises(ValueError, match="start is -1"):
        PartOptimizer(part="a", start=-1)


def test_an_average_does_not_grow(experiment):
    optimizer = dataclasses.replace(experiment.train.optimizer, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ema_decay is 0\.9, but stages\.0 keeps"):
        dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, optimizer=optimizer))
