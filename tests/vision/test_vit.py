"""The image classifiers: published sizes, the model, its Task, growth, and learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Case

from jaxtok.data.images import ImageData
from jaxtok.lm.decoder import init_params
from jaxtok.nn.parameter_attention import GROUPS, TokenCounts, uniform_counts
from jaxtok.transfer.growth import Growth, grow
from jaxtok.vision.classification import ImageClassification
from jaxtok.vision.vit import PUBLISHED, LinearViTConfig, TokenFormerViTConfig, ViT, patchify


def case() -> Case:
    model = TokenFormerViTConfig(
        image_size=8, patch_size=4, num_classes=4, num_layers=2, d_model=16, num_heads=8, tokens=uniform_counts(16, 32)
    )
    data = ImageData(images="digits", size=8, batch_size=8)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "labels": rng.integers(0, 4, 8).astype(np.int32),
        "mask": np.ones(8, np.float32),
    }
    return Case(ImageClassification(model=model), data, batch, {"sequence": "an image is 4 patches and a token"})


TASKS = {"tokenformer_vit": case}

EVIDENCE = {"vit": {"task": "tokenformer_vit", "grow": "vision/test_vit.py::test_growth_of_the_task"}}

SMALL = {"num_layers": 2, "d_model": 32, "num_heads": 2, "image_size": 8, "patch_size": 4, "num_classes": 10}
TOKENFORMER = TokenFormerViTConfig(**SMALL, tokens=TokenCounts(query=20, key=24, value=28, output=36, ffn=48))
LINEAR = LinearViTConfig(**SMALL, mlp_dim=64)
TWICE = TokenCounts(**{g: 2 * getattr(TOKENFORMER.tokens, g) for g in GROUPS})
MODELS = pytest.mark.parametrize("config", [TOKENFORMER, LINEAR], ids=["tokenformer", "linear"])


def make_batch(size=6, seed=0, config=TOKENFORMER):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.normal(size=(size, config.image_size, config.image_size, config.channels)).astype(np.float32),
        "labels": rng.integers(config.num_classes, size=size).astype(np.int32),
        "mask": np.ones(size, np.float32),
    }


@functools.cache
def make_params(config):
    """Parameters, none of them zero, so that each has an effect."""
    shapes = jax.eval_shape(functools.partial(init_params, ViT(config)), jax.random.key(0), make_batch()["images"])
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, images):
    return ViT(config).apply({"params": params}, images)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(task, params, batch, rng):
    return task.loss(params, batch, rng, 0)


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "count", "nominal"),
    [
        ("vit-b16", 86_567_656, 86e6),  # timm's vit_base_patch16_224
        ("vit-l16", 304_326_632, 307e6),  # timm's vit_large_patch16_224
        ("tokenformer-vit-b16", 86_447_848, 86e6),
        ("tokenformer-vit-l16", 304_007_144, 307e6),
    ],
)
def test_published_parameter_counts(name, count, nominal):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(functools.partial(init_params, ViT(PUBLISHED[name])), jax.random.key(0), images)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert count == pytest.approx(nominal, rel=0.01)


@pytest.mark.parametrize("size", ["b16", "l16"])
def test_published_sizes_match(size):
    tokenformer, vit = PUBLISHED[f"tokenformer-vit-{size}"], PUBLISHED[f"vit-{size}"]
    assert tokenformer.projection_params() == vit.projection_params()
    assert tokenformer.flops() == vit.flops()
    for config in (tokenformer, vit):
        assert not config.causal
        assert config.rotary_fraction == 0
        assert (config.num_patches, config.head_dim, config.final_norm) == (196, 64, "layernorm")
    assert (tokenformer.norm, vit.norm) == ("layernorm_nonparam", "layernorm")


def test_flops_of_vit_b16():
    """17.6 G multiply-adds for one image, as is well known; a training step is three forward passes."""
    vit = PUBLISHED["vit-b16"]
    assert vit.flops() == pytest.approx(2 * 17.6e9, rel=0.01)
    assert ImageClassification(model=vit).flops({"images": np.zeros((4, 1))}) == 3 * 4 * vit.flops()


# ---------------------------------------------------------------------------------------------------------------- model


def test_patchify():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(jnp.asarray(images), 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4].reshape(2, 2, 3), images[1, 2:4, 2:4])  # second row, second column


@pytest.mark.parametrize(
    ("config", "options"),
    [(LINEAR, {}), (TOKENFORMER, {"pool": "mean", "dtype": "bfloat16"})],
    ids=["linear", "tokenformer-mean-bfloat16"],
)
def test_shapes_and_gradients(config, options):
    """Every gradient is finite, and not zero (but that of the keys' bias, to which softmax is invariant)."""
    task = ImageClassification(model=dataclasses.replace(config, **options))
    batch, params = make_batch(), make_params(config)
    logits = jax.eval_shape(ViT(task.model).apply, {"params": params}, batch["images"])
    assert (logits.shape, logits.dtype) == ((6, 10), jnp.float32)
    loss_and_gradients = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, metrics), gradients = loss_and_gradients(params, batch, jax.random.key(0), 0)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert np.isfinite(loss)
    assert 0 <= metrics["accuracy"] <= 1
    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.device_get(gradients)):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient) or jax.tree_util.keystr(path).endswith("['key']['bias']"), path


@pytest.mark.parametrize("pool", ["token", "mean"])
@MODELS
def test_every_patch_and_its_place_counts(config, pool):
    """Attention is not causal: each patch, the last one too, changes the class logits, and so does their order."""
    images = np.repeat(make_batch(1)["images"], 6, axis=0)
    for i, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        images[1 + i, row : row + 4, column : column + 4] += 1
    images[5] = np.roll(images[0], 4, axis=0)
    logits = np.asarray(logits_of(dataclasses.replace(config, pool=pool), make_params(config), images))
    assert (np.abs(logits[1:] - logits[0]).max(-1) > 1e-3).all()


@MODELS
def test_images_do_not_see_each_other(config):
    images, others = make_batch()["images"], make_batch(seed=1)["images"]
    others[2] = images[2]
    got, expected = (logits_of(config, make_params(config), x)[2] for x in (others, images))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_dropout_is_for_training():
    params, batch = make_params(TOKENFORMER), make_batch()
    task = ImageClassification(model=dataclasses.replace(TOKENFORMER, dropout=0.5))
    first, again, other = (loss_of(task, params, batch, jax.random.key(k))[0] for k in (0, 0, 1))
    assert first == again != other
    np.testing.assert_array_equal(
        logits_of(task.model, params, batch["images"]), logits_of(TOKENFORMER, params, batch["images"])
    )


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 12, 3), (2, 16, 16, 3)])
def test_images_of_another_size(shape):
    with pytest.raises(ValueError, match="must be 8 x 8 x 3"):
        ViT(LINEAR).init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"patch_size": 3}, "patch_size is 3, which does not divide image_size = 8"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"final_norm": "batchnorm"}, "final_norm is 'batchnorm'"),
        ({"causal": True}, "causal is True"),
        ({"num_heads": 3}, "num_heads is 3"),  # the stack's own checks stay
    ],
)
@MODELS
def test_bad_configs(config, options, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(config, **options)


# ----------------------------------------------------------------------------------------------------------------- task


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing(smoothing):
    """Cross entropy with the target (1 - s) onehot + s / classes, over the images that count."""
    task, params, batch = (
        ImageClassification(model=LINEAR, label_smoothing=smoothing),
        make_params(LINEAR),
        make_batch(),
    )
    logits, batch["mask"][4:] = np.asarray(logits_of(LINEAR, params, batch["images"])), 0
    targets = (1 - smoothing) * np.eye(10)[batch["labels"]] + smoothing / 10
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss, metrics = loss_of(task, params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, -(targets * log_probs).sum(-1)[:4].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], np.mean(logits.argmax(-1) == batch["labels"], where=batch["mask"] > 0)
    )
    nothing = batch | {"mask": np.zeros(6, np.float32)}
    assert loss_of(task, params, nothing, jax.random.key(0))[0] == 0


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_bad_label_smoothing(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        ImageClassification(model=LINEAR, label_smoothing=smoothing)


def test_evaluation():
    """A mean over images, however they are batched and padded, with labels that are not smoothed."""
    task, params = ImageClassification(model=LINEAR), make_params(LINEAR)
    batch, last = make_batch(), make_batch(seed=1)
    last["mask"][2:], last["images"][2:] = 0, 100
    logits = np.concatenate([logits_of(LINEAR, params, b["images"]) for b in (batch, last)])[:8]
    labels = np.concatenate([batch["labels"], last["labels"]])[:8]
    assert task.evaluate(params, iter([batch, last])) == pytest.approx(
        {
            "loss": float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()),
            "accuracy": np.mean(logits.argmax(-1) == labels),
            "examples": 8,
        }
    )
    with pytest.raises(ValueError, match="no image"):
        task.evaluate(params, [])


# --------------------------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize(("init", "exact"), [("zero_keys", True), ("copy", True), ("random", False)])
def test_growth_of_a_classifier(init, exact):
    params, images = make_params(TOKENFORMER), make_batch()["images"]
    config, grown, _ = grow(TOKENFORMER, params, to=TWICE, rng=jax.random.key(2), init=init, exact=exact)
    assert isinstance(config, TokenFormerViTConfig)
    before, after = logits_of(TOKENFORMER, params, images), logits_of(config, grown, images)
    difference = np.abs(after - before).max()
    assert difference < 1e-5 if exact else difference > 1e-2


@pytest.mark.parametrize("train", ["all", "new"])
def test_growth_of_the_task(train):
    task, params = ImageClassification(model=TOKENFORMER), make_params(TOKENFORMER)
    opt_state = optax.adam(1e-3).init(params)
    growth, data = Growth(to=TWICE, train=train), ImageData()
    bigger, _ = growth.task(task, data)
    grown, opt_state = growth.params(task, data, params, opt_state, jax.random.key(0))
    assert bigger.model.tokens == TWICE
    assert task.model.tokens == TOKENFORMER.tokens
    assert jax.tree.map(jnp.shape, opt_state) == jax.tree.map(jnp.shape, optax.adam(1e-3).init(grown))
    mask = bigger.trainable(grown)
    if train == "all":
        assert mask is None
    else:
        assert mask["head"]["kernel"] == 0
        assert mask["stack"]["blocks"]["ffn"]["keys"].sum() == 48


def test_an_ordinary_vit_does_not_grow():
    with pytest.raises(ValueError, match="LinearViTConfig has no parameter tokens"):
        Growth(to=uniform_counts(1, 1)).task(ImageClassification(model=LINEAR), ImageData())


# ------------------------------------------------------------------------------------------------------------- learning


def test_learns_random_labels():
    task, batch, optimizer = ImageClassification(model=TOKENFORMER), make_batch(32), optax.adam(3e-3)
    params = jax.jit(task.init)(jax.random.key(0), batch)

    def step(state, key):
        params, opt_state = state
        gradients, metrics = jax.grad(task.loss, has_aux=True)(params, batch, key, 0)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics["accuracy"]

    state, keys = (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 100)
    accuracy = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[1])(state, keys)
    assert accuracy[0] < 0.5
    assert accuracy[-1] > 0.9


# --------------------------------------------------------------------------------------------------------------- pixels


def test_bytes_are_normalised_and_floats_are_not():
    task, params = ImageClassification(model=LINEAR, pixel_mean=0.4, pixel_std=0.2), make_params(LINEAR)
    pixels = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    floats = ((pixels / 255 - 0.4) / 0.2).astype(np.float32)
    np.testing.assert_allclose(task.logits(params, pixels), logits_of(LINEAR, params, floats), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(task.logits(params, floats), ViT(LINEAR).apply({"params": params}, floats))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(task.init, jax.random.key(0), {"images": pixels}))
    assert jax.tree.leaves(shapes) == jax.tree.leaves(jax.tree.map(jnp.shape, params))
    with pytest.raises(ValueError, match="pixel_std is 0"):
        dataclasses.replace(task, pixel_std=0)


@MODELS
def test_the_head_is_linear_in_the_features(config):
    task, params, images = ImageClassification(model=config), make_params(config), make_batch()["images"]
    features = task.features(params, images)
    assert features.shape == (6, config.d_model) and features.dtype == jnp.float32
    head = params["head"]
    expected = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(expected, task.logits(params, images), rtol=1e-4, atol=1e-4)
