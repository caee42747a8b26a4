"""ELM: published sizes, exact statements about the models, sampling, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Case, typed

from jaxtok import decoding
from jaxtok.data.codes import CodeData, regroup
from jaxtok.nn.bits import pack_bits, unpack_bits
from jaxtok.nn.losses import by_parts
from jaxtok.nn.rotary import rotary_table_2d
from jaxtok.nn.transformer import Stack
from jaxtok.training.mesh import MeshConfig, make_layout
from jaxtok.vision import elm, elm_masked, elm_sampling
from jaxtok.vision.elm import SIZES, Elm, ElmConfig, ElmModeling, ElmText, ElmTextConfig, mlp_width, published
from jaxtok.vision.elm_masked import (
    MaskedElm,
    MaskedElmConfig,
    MaskedElmModeling,
    MaskedSampling,
    hamming_weights,
    mask_lowest,
    published_masked,
)
from jaxtok.vision.elm_sampling import SCHEDULES, ElmSampling, blend, expand, extend, generate

TINY = {"num_layers": 2, "d_model": 32, "num_heads": 8, "mlp_dim": 32, "grid": 4, "code_bits": 5, "num_classes": 3}


def case(task, drawn: bool = False) -> Case:
    """Images of random codes, one of which only fills the batch."""
    model = task.model
    data = CodeData(grid=model.grid, sub_codes=model.sub_codes, code_bits=model.code_bits, batch_size=8)
    rng = np.random.default_rng(0)
    batch = {
        "codes": rng.integers(0, model.codebook, data.batch_spec()["codes"].shape),
        "labels": rng.integers(0, model.num_classes, 8),
        "mask": np.arange(8) < 7,
    }
    return Case(task, data, typed(data, batch), drawn=drawn)


TASKS = {
    "elm": lambda: case(ElmModeling(model=ElmConfig(**TINY, num_kv_heads=2, modulation=True, loss_chunk=8))),
    "elm_masked": lambda: case(MaskedElmModeling(model=MaskedElmConfig(**TINY, sub_codes=2), rounds=4), drawn=True),
}

EVIDENCE = {
    "elm": {"generate, cached": "vision/test_elm.py::test_cached_is_recomputed"},
    "elm_masked": {"formats": ("elm, masked",)},
}

IMAGE_GENERATORS = {
    "elm": lambda: ElmModeling(model=CONFIG),
    "elm_masked": lambda: MaskedElmModeling(model=MASKED),
}

CAUSAL_LMS = {
    "elm": lambda: ElmText(
        ElmTextConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, grid=9, code_bits=4, num_classes=15)
    )
}

SMALL = {"num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 24, "grid": 3, "code_bits": 3, "num_classes": 4}
CONFIG = ElmConfig(**SMALL)
MODULATED = ElmConfig(**SMALL | {"num_heads": 4, "num_kv_heads": 2, "modulation": True, "sub_codes": 1})
COSINE = ElmConfig(**SMALL, cosine_scores=True, scale_scores=False)
MASKED = MaskedElmConfig(**SMALL, sub_codes=2)
LABELS = np.array([1, 3])


@functools.cache
def noisy_params(config):
    """Parameters, none of them zero."""
    init = elm_masked.init_params if isinstance(config, MaskedElmConfig) else elm.init_params
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), shapes)


def some_codes(config, images=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.codebook, (images, config.positions, config.sub_codes)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, codes, labels):
    return Elm(config).apply({"params": params}, codes, labels)


# ---------------------------------------------------------------------------------------------------------------- sizes


def count(config):
    init = elm_masked.init_params if isinstance(config, MaskedElmConfig) else elm.init_params
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0)))))


@pytest.mark.parametrize(
    ("size", "ffn", "millions"),
    [
        ("b", 2048, (186, 88, 90, 100)),
        ("l", 2816, (444, 312, 316, 328)),
        ("xl", 3584, (900, 737, 741, 757)),
        ("xxl", 4096, (1562, 1367, 1372, 1391)),
        ("2b", 4864, (2109, 1882, 1887, 1910)),
        ("xxxl", 6912, (4145, None, 3833, 3864)),
    ],
)
def test_published_sizes(size, ffn, millions):
    """Counts are those that are known, in millions, and equal counts by hand exactly."""
    layers, d = SIZES[size]["num_layers"], SIZES[size]["d_model"]
    assert mlp_width(d) == SIZES[size]["mlp_dim"] == ffn
    for decomposition, known in zip(("1-16", "2-8", "2-10", "2-12"), millions):
        config = published(size, decomposition)
        assert config.head_dim == 64
        t, vocab = config.sub_codes, config.codebook
        by_hand = layers * (4 * d * d + 3 * d * ffn + 2 * d) + d + 1001 * d + 2 * t * vocab * d + (t > 1) * t * d * d
        assert count(config) == by_hand
        assert known is None or abs(by_hand / 1e6 - known) < 0.6


def test_published_masked_sizes():
    """They have a single table. Ours has one number less, as it has no bias of the mask as a target."""
    for size, millions in {"l": 377.6, "xl": 818, "xxl": 1465}.items():
        config = published_masked(size)
        layers, d, ffn = config.num_layers, config.d_model, config.mlp_dim
        head = d * d + 3 * d + config.codebook
        by_hand = layers * (4 * d * d + 3 * d * ffn + 2 * d) + d + 1001 * d + (config.codebook + 1) * d + head
        assert count(config) == by_hand == pytest.approx(millions * 1e6, rel=1e-3)


def test_work():
    """They are near twice the parameters that products use for each position, plus attention."""
    config = published("l", "2-10")
    used = count(config) - 1001 * 1024 - 2 * 1024 * 1024  # without the tables that are looked up
    attention = config.num_layers * 4 * 1024 * 256
    assert config.flops() == pytest.approx(256 * (2 * used + attention), rel=1e-3)
    batch = {"codes": np.zeros((4, 256, 2))}
    assert ElmModeling(model=config).flops(batch) == 12 * config.flops()
    assert published_masked("l").flops() > 256 * 2 * 2**16 * 1024


# ----------------------------------------------------------------------------------------------------------------- bits


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_bits_and_codes_are_one(t, k, grid, seed):
    bits = np.random.default_rng(seed).integers(0, 2, (2, grid * grid, t * k))
    codes = pack_bits(bits, t)
    assert codes.min() >= 0 and codes.max() < 2**k
    np.testing.assert_array_equal(unpack_bits(codes, t * k), bits)
    if t * k <= 24:
        joined = regroup(codes, (2**k,) * t, (2 ** (t * k),))
        np.testing.assert_array_equal(joined[..., 0], sum(codes[..., i] << k * (t - 1 - i) for i in range(t)))
        np.testing.assert_array_equal(regroup(joined, (2 ** (t * k),), (2**k,) * t), codes)


def test_bits_of_jax_are_those_of_numpy():
    bits = np.random.default_rng(0).integers(0, 2, (2, 9, 12))
    codes = pack_bits(jnp.asarray(bits), 3)
    np.testing.assert_array_equal(codes, pack_bits(bits, 3))
    np.testing.assert_array_equal(jax.jit(unpack_bits, static_argnums=1)(codes, 12), bits)


def test_bits_that_cannot_be_cut():
    with pytest.raises(ValueError, match="bits is 10 and sub_codes 3"):
        pack_bits(np.zeros((1, 10), int), 3)
    with pytest.raises(ValueError, match="bits is 64 in 2 sub-codes"):
        pack_bits(np.zeros((1, 64), int), 2)


def test_hamming_weights():
    codes = np.arange(8)
    for distance in (0, 1, 3, 7):
        weights = np.asarray(hamming_weights(codes, 3, distance))
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        assert (weights.argmax(-1) == codes).all()
        assert ((weights > 0).sum(-1) == sum(math.comb(3, h) for h in range(min(distance, 3) + 1))).all()


# ---------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("config", [CONFIG, MODULATED], ids=["two sub-codes", "modulated"])
def test_the_first_loss_is_that_of_guessing(config):
    task = ElmModeling(model=config)
    params = jax.jit(elm.init_params, static_argnums=0)(config, jax.random.key(0))
    batch = {"codes": some_codes(config), "labels": LABELS, "mask": np.ones(2, np.float32)}
    loss, metrics = jax.jit(task.loss)(params, batch, jax.random.key(1), 0)
    assert loss == pytest.approx(3 * math.log(2), abs=1e-6)
    assert metrics["nats_per_position"] == pytest.approx(3 * math.log(2) * config.sub_codes, abs=2e-6)


@pytest.mark.parametrize("config", [CONFIG, MODULATED, COSINE], ids=["two sub-codes", "modulated", "cosine"])
def test_nothing_is_seen_ahead(config):
    """A position's codes change no bit of the logits up to its own, and some of all those after it."""
    params, codes = noisy_params(config), some_codes(config)
    before = logits_of(config, params, codes, LABELS)
    for position in (0, 4, config.positions - 1):
        other = codes.copy()
        other[:, position] = (other[:, position] + 1) % config.codebook
        after = logits_of(config, params, other, LABELS)
        np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
        assert (jnp.abs(after - before)[:, position + 1 :].max((0, 2, 3)) > 1e-5).all()
    assert jnp.abs(logits_of(config, params, codes, LABELS[::-1]) - before).min((2, 3)).max() > 1e-5


@functools.partial(jax.jit, static_argnums=0)
def attention_of(config, params, codes, labels):
    _, state = Elm(config).apply({"params": params}, codes, labels, mutable="intermediates")
    return state["intermediates"]["stack"]["blocks"]["attention"]


def test_the_class_is_looked_at_evenly():
    """Its query and its key are zero, so all scores with it are 0."""
    codes, params = some_codes(CONFIG), noisy_params(CONFIG)
    for name in ("queries", "keys"):
        (sown,) = attention_of(CONFIG, params, codes, LABELS)[name]
        np.testing.assert_array_equal(sown[:, :, 0], 0)
        assert (jnp.abs(sown[:, :, 1:]).max((0, 1, 3, 4)) > 0).all()


def test_cosine_scores_are_cosines():
    codes, params = some_codes(COSINE), noisy_params(COSINE)
    kept = attention_of(COSINE, params, codes, LABELS)
    np.testing.assert_allclose(jnp.linalg.norm(kept["keys"][0][:, :, 1:], axis=-1), 1, rtol=1e-5)
    # they are divided by the root of the head's size afterwards
    np.testing.assert_allclose(jnp.linalg.norm(kept["queries"][0][:, :, 1:], axis=-1), 8**0.5, rtol=1e-5)


def test_places_are_turned_by_row_and_column():
    """Scores depend on the differences of rows and of columns only."""
    table = rotary_table_2d(3, 4, 8, leading=1)
    assert table.shape == (13, 4, 2) and not table[0].any()
    turned = (table[1:, :, 0] + 1j * table[1:, :, 1]).reshape(3, 4, 4)
    np.testing.assert_allclose(turned[2, 3] / turned[1, 1], turned[1, 2], rtol=1e-5)
    np.testing.assert_allclose(turned[2, 1][:2], turned[2, 3][:2])  # first the row's half
    np.testing.assert_allclose(turned[0, 3][2:], turned[2, 3][2:])
    with pytest.raises(ValueError, match="head size is 6"):
        rotary_table_2d(3, 3, 6)


def test_sub_codes_have_no_order():
    """Swapping them in codes, tables, projection and heads swaps them in the logits."""
    codes, params = some_codes(CONFIG), noisy_params(CONFIG)
    kernel = params["projection"]["kernel"]
    swapped = {
        **params,
        "embedding": params["embedding"][::-1],
        "head_matrix": params["head_matrix"][::-1],
        "projection": {"kernel": kernel.reshape(2, -1, kernel.shape[1])[::-1].reshape(kernel.shape)},
    }
    ours = logits_of(CONFIG, swapped, codes[..., ::-1], LABELS)
    np.testing.assert_allclose(ours[:, :, ::-1], logits_of(CONFIG, params, codes, LABELS), rtol=1e-4, atol=1e-5)


def test_the_loss_by_parts_is_the_loss():
    codes, params = some_codes(CONFIG), noisy_params(CONFIG)
    batch = {"codes": codes, "labels": LABELS, "mask": np.array([1, 0], np.float32)}
    results = []
    for chunk in (0, 3):
        task = ElmModeling(model=dataclasses.replace(CONFIG, loss_chunk=chunk))

        def loss(params, task=task):
            return (task.image_nats(params, batch) * batch["mask"]).sum()

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for whole, parts in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    x = jnp.arange(24.0).reshape(2, 12)
    np.testing.assert_array_equal(by_parts(lambda a, b: a - 2 * b, 4, x, x), -x)
    with pytest.raises(ValueError, match="part is 5; it must divide"):
        by_parts(lambda a: a, 5, x)


def test_images_that_only_fill_the_batch_do_not_count():
    codes, params = some_codes(CONFIG), noisy_params(CONFIG)
    whole = {"codes": codes, "labels": LABELS, "mask": np.array([1, 0], np.float32)}
    task = ElmModeling(model=dataclasses.replace(CONFIG, dropout=0.0, token_dropout=0.0, class_dropout=0.0))
    one = {name: x[:1] for name, x in whole.items()}
    loss = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(0), 0)[0])
    assert loss(whole) == pytest.approx(float(loss(one)), rel=1e-5)
    found, alone = task.evaluate(params, [whole]), task.evaluate(params, [one])
    assert found["examples"] == 1 and found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["nats_per_position"] == pytest.approx(2 * found["loss"])
    with pytest.raises(ValueError, match="no image"):
        task.evaluate(params, [])


def test_classes_are_withheld_in_training():
    labels = np.zeros(400, np.int32)
    model, params = Elm(dataclasses.replace(CONFIG, class_dropout=0.25)), noisy_params(CONFIG)
    vectors = model.apply(
        {"params": params}, labels, deterministic=False, method="embed_class", rngs={"dropout": jax.random.key(0)}
    )
    table = params["class_embedding"]
    withheld = (np.asarray(vectors[:, 0]) == table[CONFIG.num_classes]).all(-1)
    np.testing.assert_array_equal(vectors[~withheld, 0], np.broadcast_to(table[0], ((~withheld).sum(), 16)))
    assert 70 < withheld.sum() < 130


def test_paths_are_dropped_by_depth():
    """Nothing is dropped in the first of two layers; in the second, either part, both or none, for a whole row."""
    config = StackOf(num_layers=2, d_model=8, num_heads=1, mlp_dim=8, drop_path=0.5)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 3, 8)), (200, 3, 8))

    @jax.jit
    def run(rng):
        params = jax.tree.map(lambda leaf: leaf + 0.3, nn.meta.unbox(Stack(config).init(rng, x, None)["params"]))
        kept, state = Stack(config).apply({"params": params}, x, None, mutable="intermediates")
        dropped = Stack(config).apply({"params": params}, x, None, deterministic=False, rngs={"dropout": rng})
        return kept[0], dropped[0], state["intermediates"]["blocks"]["hidden"][0][0]

    kept, dropped, first = (np.asarray(rows).reshape(200, -1).round(4) for rows in run(jax.random.key(1)))
    assert len(np.unique(kept, axis=0)) == 1
    kinds, counts = np.unique(dropped, axis=0, return_counts=True)
    assert len(kinds) == 4 and (counts > 25).all()
    assert np.abs(kinds - first[0]).max(-1).min() < 2e-4  # both dropped: what the first layer gives, whole


class StackOf(ElmConfig):
    output_init_std = 0.3


# ------------------------------------------------------------------------------------------------------------- sampling


def recomputed(config, params, labels, prefix, sampling, uniforms):
    """Computes every position by a whole pass, with and without the class, in NumPy."""
    images, given = prefix.shape[:2]
    codes = np.zeros((images, config.positions, config.sub_codes), np.int32)
    codes[:, :given] = prefix
    nothing = np.full(images, config.num_classes, np.int32)
    weights = sampling.weights(len(uniforms))
    for step, position in enumerate(range(given, given + len(uniforms))):
        with_class, without = (np.asarray(logits_of(config, params, codes, y))[:, position] for y in (labels, nothing))
        logits = (without + weights[step] * (with_class - without)) / np.float32(sampling.temperature)
        if sampling.top_k:
            logits = np.where(logits >= np.sort(logits, -1)[..., -sampling.top_k, None], logits, -np.inf)
        p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        codes[:, position] = (np.cumsum(p, -1) <= uniforms[step].T[..., None]).sum(-1)
    return codes[:, : given + len(uniforms)], logits


CASES = {"two sub-codes": (CONFIG, 0), "modulated, shared keys, prefix": (MODULATED, 4)}


@pytest.mark.parametrize(
    ("config", "given", "schedule"),
    [
        *(
            pytest.param(*case, schedule, id=f"{name}, {schedule}")
            for name, case in CASES.items()
            for schedule in SCHEDULES
        ),
        pytest.param(COSINE, 3, "log", id="cosine, prefix, log"),
    ],
)
def test_cached_is_recomputed(config, given, schedule):
    params, prefix = noisy_params(config), some_codes(config)[:, :given]
    uniforms = np.random.default_rng(3).random((config.positions - given, config.sub_codes, 2)).astype(np.float32)
    sampling = ElmSampling(guidance=3.0, schedule=schedule, temperature=0.8, top_k=5)
    expected, last = recomputed(config, params, LABELS, prefix, sampling, uniforms)
    weights = sampling.weights(len(uniforms))
    codes, logits = elm_sampling.draw(config, params, LABELS, prefix, sampling, weights, uniforms=uniforms)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(np.isfinite(logits), np.isfinite(last))
    np.testing.assert_allclose(*(np.where(np.isfinite(x), x, 0) for x in (logits, last)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        generate(config, params, LABELS, sampling=sampling, prefix=prefix, uniforms=uniforms), expected
    )


def test_schedules():
    for schedule in SCHEDULES:
        weights = ElmSampling(guidance=5.0, schedule=schedule).weights(100)
        assert weights.dtype == np.float32
        assert (np.diff(weights) >= 0).all()
        assert weights[-1] == pytest.approx(5 if schedule != "square_root" else 1 + 4 * math.sqrt(0.99))
        assert (ElmSampling(guidance=1.0, schedule=schedule).weights(100) == 1).all()
    assert ElmSampling(guidance=5.0, schedule="square_root").weights(7)[0] == 1
    assert ElmSampling(guidance=5.0, schedule="linear").weights(4).tolist() == [2, 3, 4, 5]


def test_guidance():
    """At 1, it is the model with the class; without a class it has no effect, whatever the scale."""
    params, key = noisy_params(CONFIG), jax.random.key(5)
    draw = functools.partial(generate, CONFIG, params, rng=key)
    one = draw(LABELS, sampling=ElmSampling(guidance=1.0, top_k=0))
    weights = np.ones(CONFIG.positions, np.float32)
    weights[-1] = np.nextafter(np.float32(1), np.float32(2))  # so the pass without a class is made
    prefix = np.zeros((2, 0, 2), np.int32)
    with_both, _ = elm_sampling.draw(CONFIG, params, LABELS, prefix, ElmSampling(top_k=0), weights, key)
    np.testing.assert_array_equal(one, with_both)
    unguided = draw([None, None], sampling=ElmSampling(guidance=1.0, top_k=0))
    np.testing.assert_array_equal(draw([None, None], sampling=ElmSampling(guidance=7.0, top_k=0)), unguided)
    assert (np.asarray(draw(LABELS, sampling=ElmSampling(guidance=7.0, top_k=0))) != np.asarray(one)).any()


def test_top_k_of_one_is_greedy_and_of_all_is_nothing():
    params = noisy_params(CONFIG)
    greedy = [
        np.asarray(generate(CONFIG, params, LABELS, sampling=ElmSampling(top_k=1), rng=jax.random.key(k)))
        for k in (0, 1)
    ]
    np.testing.assert_array_equal(*greedy)
    weights = ElmSampling().weights(CONFIG.positions)
    nothing = np.full(2, CONFIG.num_classes)
    with_class, without = (logits_of(CONFIG, params, greedy[0], y) for y in (LABELS, nothing))
    np.testing.assert_array_equal((without + weights[:, None, None] * (with_class - without)).argmax(-1), greedy[0])
    everything = [
        generate(CONFIG, params, LABELS, sampling=ElmSampling(top_k=k), rng=jax.random.key(0)) for k in (8, 0, 1000)
    ]
    np.testing.assert_array_equal(everything[0], everything[1])
    np.testing.assert_array_equal(everything[0], everything[2])


def test_rows_do_not_depend_on_each_other():
    params, key = noisy_params(CONFIG), jax.random.key(9)
    both = generate(CONFIG, params, [1, 3], rng=key)
    other = generate(CONFIG, params, [1, 0], rng=key)
    np.testing.assert_array_equal(both[0], other[0])
    assert (np.asarray(generate(CONFIG, params, [1, 1], rng=key))[0] != np.asarray(both)[1]).any()


def test_bfloat16():
    """Activations and the cache are bfloat16; logits and the distribution that is drawn from are not."""
    for config in (MODULATED, COSINE):
        half, params = dataclasses.replace(config, dtype="bfloat16", drop_path=0.1), noisy_params(config)
        codes = generate(half, params, LABELS, rng=jax.random.key(0))
        assert codes.dtype == jnp.int32 and codes.max() < 8
        logits, exact = (logits_of(c, params, codes, LABELS) for c in (half, config))
        assert logits.dtype == jnp.float32
        assert 1e-5 < jnp.abs(logits - exact).max() / jnp.abs(exact).max() < 0.1


def test_draws_have_the_models_probabilities():
    """Codes of the first position, drawn many times."""
    config = ElmConfig(**SMALL | {"grid": 1, "sub_codes": 1, "num_layers": 1})
    params = noisy_params(config)
    codes = generate(config, params, [2] * 4000, sampling=ElmSampling(guidance=1.0, top_k=0), rng=jax.random.key(0))
    expected = jax.nn.softmax(logits_of(config, params, np.zeros((1, 1, 1), np.int32), np.array([2]))[0, 0, 0])
    found = np.bincount(np.asarray(codes).ravel(), minlength=8) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / math.sqrt(4000))
    edge = elm_sampling.choose(
        jnp.array([[0.0, 0.0, -jnp.inf]]), None, jnp.array([np.nextafter(1, 0, dtype=np.float32)])
    )
    assert edge.tolist() == [1]  # never one that is left out


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (tests/conftest.py simulates them)")
def test_a_mesh_draws_the_same():
    config = ElmConfig(**SMALL | {"num_heads": 4})
    params, labels = noisy_params(config), np.arange(8) % 4
    alone = generate(config, params, labels, rng=jax.random.key(4))
    with make_layout(MeshConfig(data=4, tensor=2)).active():
        on_mesh = generate(config, params, labels, rng=jax.random.key(4))
        assert len(on_mesh.sharding.device_set) == 8
    np.testing.assert_array_equal(on_mesh, alone)


def test_beyond_the_square():
    """Downwards, the image is a prefix; to the right, each row continues all rows above it and its kept columns."""
    params, first = noisy_params(CONFIG), some_codes(CONFIG)
    sampling = ElmSampling(top_k=0)
    uniforms = np.random.default_rng(3).random((9, 2, 2)).astype(np.float32)
    below = extend(CONFIG, params, first, LABELS, direction="down", keep=2, sampling=sampling, uniforms=uniforms[:3])
    np.testing.assert_array_equal(below[:, :6], first[:, 3:])
    expected, _ = recomputed(CONFIG, params, LABELS, first[:, 3:], sampling, uniforms[:3])
    np.testing.assert_array_equal(below, expected)

    right = extend(CONFIG, params, first, LABELS, direction="right", keep=1, sampling=sampling, uniforms=uniforms)
    made = np.zeros((2, 0, 2), np.int32)
    for row in range(3):
        made = np.concatenate([made, first[:, 3 * row + 2 : 3 * row + 3]], axis=1)
        new = uniforms[3 * row + 1 : 3 * row + 3]
        made, _ = recomputed(CONFIG, params, LABELS, made, sampling, new)
    np.testing.assert_array_equal(right, made)


def test_pictures_beyond_the_square():
    params, first = noisy_params(CONFIG), some_codes(CONFIG)

    def decode(codes):  # a position is four pixels, whose value is its first code
        cells = jnp.asarray(codes)[..., 0].reshape(len(codes), 3, 3)
        return jnp.repeat(jnp.repeat(cells, 2, 1), 2, 2)[..., None].astype(jnp.float32)

    for direction, shape in {"down": (2, 14, 6, 1), "right": (2, 6, 14, 1)}.items():
        picture = expand(
            CONFIG, params, decode, first, LABELS, direction=direction, times=2, keep=1, rng=jax.random.key(0)
        )
        assert picture.shape == shape
        np.testing.assert_allclose(picture[:, :6, :6], decode(first))  # what was kept is blended with itself
    left, right = jnp.zeros((1, 1, 4, 1)), jnp.ones((1, 1, 3, 1))
    joined = blend(left, right, 2, "right")
    np.testing.assert_allclose(joined[0, 0, :, 0], [0, 0, 0.25, 0.75, 1])
    with pytest.raises(ValueError, match="overlap is 5"):
        blend(left, right, 5, "right")


def test_one_code_is_a_language():
    """The decoding engine draws what ELM's own loop does; options that were made for text need only ids."""
    config = ElmTextConfig(**SMALL)
    params = noisy_params(config)
    images = generate(config, params, LABELS, sampling=ElmSampling(guidance=1.0, top_k=1), rng=jax.random.key(0))
    texts = decoding.generate(
        ElmText(config),
        params,
        [[config.codebook + int(label)] for label in LABELS],
        max_new_tokens=config.positions,
        chooser=decoding.Sampling(temperature=0.0),
    ).tokens
    np.testing.assert_array_equal(texts, images[..., 0])
    tokens = np.array([[config.codebook + 1, *images[0, :-1, 0]]])
    logits, _ = jax.jit(ElmText(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(
        logits[..., : config.codebook], logits_of(config, params, images[:1], LABELS[:1])[:, :, 0], rtol=1e-4, atol=1e-5
    )
    assert logits.shape == (1, 9, config.vocab_size)
    assert jax.nn.softmax(logits)[..., config.codebook :].max() < 1e-8
    with pytest.raises(ValueError, match="modulation True"):
        ElmTextConfig(**SMALL, modulation=True)
    with pytest.raises(ValueError, match="max_length is 10"):
        ElmText(config).apply({"params": params}, np.zeros((1, 11), np.int32))


# --------------------------------------------------------------------------------------------------------------- masked


@functools.partial(jax.jit, static_argnums=0)
def masked_logits(config, params, codes, labels, masked):
    return MaskedElm(config).apply({"params": params}, codes, labels, masked)


def test_masks_have_exactly_their_number():
    task = MaskedElmModeling(model=MASKED, rounds=6)
    assert task.counts().tolist() == [9, 8, 7, 6, 4, 2]  # floor(9 cos(pi j / 12))
    draw = jax.jit(MaskedElmModeling.draw_mask, static_argnums=(0, 2))
    for k in range(8):
        masked = np.asarray(draw(task, jax.random.key(k), 5)).sum(1)
        assert (masked == masked[0]).all() and masked[0] in task.counts()
    each = dataclasses.replace(task, mask_per_image=True)
    assert len({int(n) for n in np.asarray(each.draw_mask(jax.random.key(0), 60)).sum(1)}) == 6
    ties = mask_lowest(jnp.zeros((2, 5)), jnp.array([2, 5]))
    np.testing.assert_array_equal(ties, [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def test_masked_codes_are_not_seen():
    """They change nothing; what is not masked changes all logits; and the sub-codes of a position go together."""
    codes, params, masked = some_codes(MASKED), noisy_params(MASKED), np.arange(9) % 2 == np.array([[0], [1]])
    before = masked_logits(MASKED, params, codes, LABELS, masked)
    hidden = np.where(masked[..., None], (codes + 1) % 8, codes)
    np.testing.assert_array_equal(masked_logits(MASKED, params, hidden, LABELS, masked), before)
    shown = codes.copy()
    shown[:, :, 1] = np.where(masked, codes[:, :, 1], (codes[:, :, 1] + 1) % 8)
    assert (jnp.abs(masked_logits(MASKED, params, shown, LABELS, masked) - before).max(-1) > 1e-6).all()


def test_the_masked_loss_is_a_mean_over_what_is_masked():
    """The mean is over the whole batch; soft targets count everywhere; the head does not train the table."""
    codes, params, masked = some_codes(MASKED) % 4, noisy_params(MASKED), np.arange(9) < np.array([[2], [7]])
    task = MaskedElmModeling(model=dataclasses.replace(MASKED, loss_chunk=3), label_smoothing=0.1)
    batch = {"codes": codes, "labels": LABELS, "mask": np.ones(2, np.float32)}
    logp = jax.nn.log_softmax(masked_logits(MASKED, params, codes, LABELS, masked))
    chosen = -jnp.take_along_axis(logp, codes[..., None], -1)[..., 0]
    smooth = 0.9 * chosen - 0.1 * logp.mean(-1)
    sums = jax.jit(MaskedElmModeling.masked_nats, static_argnums=0, static_argnames="plain")
    total, count = sums(task, params, batch, masked)
    assert (count, float(total / count)) == (18, pytest.approx(float(smooth[masked].mean()), rel=1e-5))
    plain, _ = sums(task, params, batch, masked, plain=True)
    assert float(plain / count) == pytest.approx(float(chosen[masked].mean()), rel=1e-5)
    soft = dataclasses.replace(task, hamming=1)
    total, count = sums(soft, params, batch, masked)
    by_hand = -(hamming_weights(codes, 3, 1) * logp).sum(-1).mean()
    assert (count, float(total / count)) == (36, pytest.approx(float(by_hand), rel=1e-5))
    gradient = jax.jit(jax.grad(lambda p: task.masked_nats(p, batch, masked)[0]))(params)
    np.testing.assert_array_equal(gradient["embedding"][4:], 0)  # codes that are no inputs occur only in the head
    assert jnp.abs(gradient["embedding"][:4]).max() > 0


def test_rounds():
    for positions in (1, 9, 256):
        for schedule in ("cos", "linear"):
            for rounds in (1, 2, 12, 300):
                counts = MaskedSampling(rounds=rounds, mask_schedule=schedule).counts(positions)
                assert counts[-1] == 1 or rounds == 1
                falls = np.diff(np.concatenate([[positions], counts]))
                assert ((falls < 0) | (counts == 1)).all()
    # by float64, where float32 would have floor(255.99999)
    assert MaskedSampling(rounds=4, mask_schedule="linear").counts(256).tolist() == [192, 128, 64, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 4},
        {"rounds": 1, "noise": 0.0, "guidance": 1.0},
        {"rounds": 5, "remask": True, "schedule": "powercos", "mask_schedule": "linear"},
    ],
)
def test_masked_generation(options):
    """All codes are in range, and the same key gives the same codes."""
    params, sampling = noisy_params(MASKED), MaskedSampling(**options)
    first, again, other = (
        np.asarray(elm_masked.generate(MASKED, params, [1, None], sampling=sampling, rng=jax.random.key(k)))
        for k in (0, 0, 1)
    )
    assert first.shape == (2, 9, 2) and first.min() >= 0 and first.max() < 8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_one_round_draws_every_code_once():
    params = noisy_params(MASKED)
    uniforms = np.random.default_rng(0).random((1, 2, 18)).astype(np.float32)
    sampling = MaskedSampling(rounds=1, noise=0.0, guidance=1.0)
    codes = elm_masked.generate(MASKED, params, LABELS, sampling=sampling, draws=(uniforms, np.zeros((1, 2, 9, 2))))
    logits = masked_logits(MASKED, params, np.zeros((2, 9, 2), np.int32), LABELS, np.ones((2, 9), bool))
    chances = np.cumsum(jax.nn.softmax(logits), -1)
    np.testing.assert_array_equal(codes, (chances <= uniforms.reshape(2, 9, 2, 1)).sum(-1))


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code_bits": 0}, "code_bits is 0"),
        ({"code_bits": 25}, "code_bits is 25"),
        ({"sub_codes": 0}, "sub_codes is 0"),
        ({"grid": 0}, "grid is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_heads": 3}, "num_heads is 3"),
        ({"num_heads": 8}, "multiple of 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"loss_chunk": 2}, "loss_chunk is 2"),
        ({"class_dropout": 1.0}, "class_dropout is 1.0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"modulation": True, "post_norm": True}, "modulation is True"),
    ],
)
def test_impossible_models(options, message):
    with pytest.raises(ValueError, match=message):
        ElmConfig(**SMALL | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedElmConfig(**SMALL, causal=True), "causal is True"),
        (lambda: MaskedElmConfig(**SMALL, modulation=True), "modulation is True"),
        (lambda: MaskedElmModeling(model=MASKED, rounds=0), "rounds is 0"),
        (lambda: MaskedElmModeling(model=MASKED, label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: MaskedElmModeling(model=MASKED, hamming=-1), "hamming is -1"),
        (lambda: MaskedElmModeling(model=MASKED, mask_schedule="square"), "mask_schedule is 'square'"),
        (lambda: MaskedSampling(rounds=0), "rounds is 0"),
        (lambda: MaskedSampling(noise=-1.0), "noise is -1.0"),
        (lambda: MaskedSampling(schedule="cos"), "schedule is 'cos'"),
        (lambda: MaskedSampling(mask_schedule="cosine"), "mask_schedule is 'cosine'"),
        (lambda: ElmSampling(schedule="cubic"), "schedule is 'cubic'"),
        (lambda: ElmSampling(temperature=-1.0), "temperature is -1.0"),
        (lambda: ElmSampling(top_k=-1), "top_k is -1"),
        (lambda: ElmSampling(top_p=0.0), "top_p is 0.0"),
        (lambda: ElmSampling(top_p=1.5), "top_p is 1.5"),
        (lambda: ElmSampling(guidance=math.nan), "guidance is nan"),
        (lambda: published("huge", "2-10"), "size is 'huge'"),
        (lambda: published("l", "3-8"), "decomposition is '3-8'"),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_falls_is_warned_of():
    with pytest.warns(UserWarning, match="guidance is 0.5, below 1"):
        ElmSampling(guidance=0.5, schedule="linear")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([4, 0], {}, "a label is 4; classes are 0 to 3"),
        ([-1, 0], {}, "a label is -1"),
        ([0.5, 0], {}, "a label is 0.5"),
        ([1.0, 0.0], {}, "a label is 1.0; classes are 0 to 3, as integers"),
        ([], {}, "no label"),
        ([0, 1], {"rng": None}, "rng is None"),
        ([0, 1], {"prefix": np.zeros((2, 10, 2), int)}, "shape"),
        ([0, 1], {"prefix": np.zeros((2, 4, 1), int)}, "2 sub-codes"),
        ([0, 1], {"prefix": np.full((2, 4, 2), 8)}, "the code 8"),
        ([0, 1], {"prefix": np.full((2, 4, 2), -1)}, "the code -1"),
        ([0, 1], {"prefix": np.zeros((3, 4, 2), int)}, "3 images"),
        ([0, 1], {"prefix": np.zeros((2, 9, 2), int)}, "new is 0 after"),
        ([0, 1], {"uniforms": np.zeros((9, 1, 2))}, "9 positions, 2 sub-codes, 2 images"),
        ([0, 1], {"prefix": np.zeros((2, 4, 2), int), "new": 6}, "new is 6 after a prefix of 4 positions"),
    ],
)
def test_impossible_generation(labels, options, message):
    with pytest.raises(ValueError, match=message):
        generate(CONFIG, noisy_params(CONFIG), labels, **{"rng": jax.random.key(0)} | options)


def test_impossible_images():
    params, codes = noisy_params(CONFIG), some_codes(CONFIG)
    with pytest.raises(ValueError, match="8 x 2 codes"):
        Elm(CONFIG).apply({"params": params}, codes[:, :8], LABELS)
    with pytest.raises(ValueError, match="9 x 1 codes"):
        MaskedElm(MASKED).apply({"params": noisy_params(MASKED)}, codes[:, :, :1], LABELS, np.ones((2, 9), bool))
    go = functools.partial(extend, CONFIG, params, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="keep is 3"):
        go(codes, LABELS, direction="down", keep=3)
    with pytest.raises(ValueError, match="direction is 'up'"):
        go(codes, LABELS, direction="up", keep=1)
    with pytest.raises(ValueError, match="8 positions"):
        go(codes[:, :8], LABELS, direction="down", keep=1)
    with pytest.raises(ValueError, match="3 labels"):
        go(codes, [0, 1, 2], direction="right", keep=1)
