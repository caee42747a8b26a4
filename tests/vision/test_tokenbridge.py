"""TokenBridge: exact properties of quantiser, backbone, heads and drawing; what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from image_generators import random_params
from tiny import Case, typed

from jaxtok.data.codes import CodeData
from jaxtok.interop.tokenbridge import check_levels, official_config
from jaxtok.training.mesh import unboxed
from jaxtok.vision.kl_vae import KLVAEConfig
from jaxtok.vision.tokenbridge import (
    PUBLISHED,
    TokenBridge,
    TokenBridgeConfig,
    TokenBridgeModeling,
    TokenBridgeSampling,
    generate,
    guided_features,
    init_params,
)
from jaxtok.vision.tokenbridge_heads import denoise, draw_channels, kept_signal
from jaxtok.vision.tokenbridge_tokenizer import BridgeTokenizer, DimensionwiseQuantizer, frequency_order

SIZES = {
    f"{part}_{name}": n
    for part in ("encoder", "decoder", "head")
    for name, n in {"width": 16, "layers": 2, "heads": 2}.items()
}
TINY = TokenBridgeConfig(
    **SIZES,
    grid=4,
    channels=3,
    quantizer=DimensionwiseQuantizer(levels=5),
    channel_order=(2, 0, 1),
    num_classes=4,
    buffer=2,
    diffusion_layers=1,
)
VAE = KLVAEConfig(image_size=4, widths=(4,), groups=2, res_blocks=1, encoder_attention=(), z_channels=3)


def case(model) -> Case:
    """Images of random codes, one of which only fills the batch."""
    data = CodeData(shape=model.code_shape, values=model.code_values, batch_size=8)
    rng = np.random.default_rng(0)
    batch = {
        "codes": rng.integers(0, model.quantizer.levels, data.batch_spec()["codes"].shape),
        "labels": rng.integers(0, model.num_classes, 8),
        "mask": np.arange(8) < 7,
    }
    return Case(TokenBridgeModeling(model=model), data, typed(data, batch), drawn=True)


WIDE = {name: 8 if name.endswith("heads") else n for name, n in SIZES.items()}
TASKS = {
    "tokenbridge": lambda: case(
        dataclasses.replace(
            TINY, **WIDE, channels=8, quantizer=DimensionwiseQuantizer(levels=8), channel_order=(), num_classes=8
        )
    )
}

EVIDENCE = {
    "tokenbridge": {"generate, cached": "vision/test_tokenbridge.py::test_drawing_is_teacher_forcing"},
}

IMAGE_TOKENIZERS = {
    "tokenbridge": lambda: BridgeTokenizer(model=VAE, discriminator=None, perceptual="none"),
}

IMAGE_GENERATORS = {
    "tokenbridge": lambda: TokenBridgeModeling(model=TINY),
    "tokenbridge_parallel": lambda: TokenBridgeModeling(model=dataclasses.replace(TINY, head="parallel")),
    "tokenbridge_diffusion": lambda: TokenBridgeModeling(model=dataclasses.replace(TINY, head="diffusion")),
}


# -- the quantiser


@pytest.mark.parametrize("kind", ["gaussian", "linear"])
@pytest.mark.parametrize("levels", [2, 7, 64, 1024])
def test_levels_stay_and_the_order_is_kept(levels, kind):
    quantizer = DimensionwiseQuantizer(levels=levels, kind=kind, low=-2.0, high=7.0)
    codes = quantizer.quantize(quantizer.points)
    np.testing.assert_array_equal(quantizer.dequantize(codes), quantizer.points)
    if levels < 740:  # above, the formula gives some levels twice
        np.testing.assert_array_equal(codes, np.arange(levels))
    x = np.sort(np.random.default_rng(0).normal(2, 4, 5000)).astype(np.float32)
    made = np.asarray(quantizer.dequantize(quantizer.quantize(x)))
    assert (np.diff(made) >= 0).all()
    nearest = np.min(np.abs(x[:, None] - quantizer.points), 1)
    np.testing.assert_allclose(np.abs(made - np.clip(x, None, None)), nearest, atol=2e-6)


def test_of_two_equally_near_levels_the_lower_one_is_taken():
    quantizer = DimensionwiseQuantizer(levels=4, kind="linear", low=-4.0, high=4.0, reach=4.0)
    assert quantizer.values.tolist() == [-3, -1, 1, 3]
    assert quantizer.quantize(jnp.array([-9.0, -2.0, 0.0, 2.0, 2.001, 9.0])).tolist() == [0, 0, 1, 2, 3, 3]


def test_levels_of_normal_data():
    """All are about equally often used where the data's std is high / r; and the largest is far below the range."""
    quantizer = DimensionwiseQuantizer()
    assert abs(quantizer.points[-1] - 4.06) < 0.005
    edges = np.concatenate([[-np.inf], (quantizer.points[1:] + quantizer.points[:-1]) / 2, [np.inf]])
    shares = 64 * np.diff(scipy.stats.norm(scale=5 / 3).cdf(edges))
    assert abs(shares[0] - 0.85) < 0.01 and abs(shares[-1] - 0.85) < 0.01 and (shares[1:-1] < 1.08).all()
    assert (np.abs(shares - 1) < 0.151).all()


def test_the_error_is_least_for_data_of_std_one():
    """Of a normal distribution, at the std that Panter and Dite's law gives (section 'What std should x have?')."""
    quantizer = DimensionwiseQuantizer()
    points = quantizer.points.astype(np.float64)
    x = np.linspace(-8, 8, 20001)

    def relative_error(std):
        nearest = np.min(np.abs(std * x[:, None] - points), 1) / std
        return np.sum(np.square(nearest) * scipy.stats.norm.pdf(x)) / np.sum(scipy.stats.norm.pdf(x))

    stds = np.array([0.5, 0.7, 0.96, 1.3, 5 / 3])
    errors = [relative_error(std) for std in stds]
    assert np.argmin(errors) == 2 and errors[-1] > 2 * errors[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "levels is 1"),
        ({"low": 5.0}, "low is 5.0 and high 5.0"),
        ({"high": math.inf}, "both finite"),
        ({"reach": 0.0}, "reach is 0.0"),
        ({"kind": "log"}, "kind is 'log'"),
    ],
)
def test_quantisers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DimensionwiseQuantizer(**options)


def test_numbers_that_are_not_finite_have_no_level():
    with pytest.raises(ValueError, match="not finite"):
        DimensionwiseQuantizer().quantize(jnp.array([0.0, math.nan]))


def test_channels_of_low_frequencies_come_first():
    rows = np.arange(16)
    waves = [np.cos(2 * np.pi * rows * k / 16)[None, :, None] * np.ones((2, 1, 16)) for k in (5, 1, 8, 0)]
    latents = np.stack(waves, -1)
    assert frequency_order(latents) == (1, 3, 0, 2)


# -- the model


@pytest.fixture(scope="module")
def tiny():
    """The model's parameters, none of them zero, with codes, classes and masks of three images."""
    rng = np.random.default_rng(1)
    params = random_params(TokenBridgeModeling(model=TINY))
    codes = jnp.asarray(rng.integers(0, 5, (3, 16, 3)), jnp.int32)
    masked = jnp.asarray(rng.permuted(np.arange(16) < 12, axis=0)[None].repeat(3, 0))
    masked = jnp.stack([jnp.roll(row, n) for n, row in enumerate(masked)])
    return params, codes, jnp.array([0, 4, 2]), masked


def test_masked_codes_do_not_matter_and_leaving_them_out_is_hiding_them(tiny):
    params, codes, labels, masked = tiny
    features = jax.jit(
        lambda codes, kept: TokenBridge(TINY).apply({"params": params}, codes, labels, masked, kept, method="features"),
        static_argnums=1,
    )
    z = features(codes, 16)
    chex.assert_trees_all_close(features(codes, 4), z, atol=1e-5)
    others = jnp.where(masked[..., None], 4 - codes, codes)
    assert not np.array_equal(others, codes)
    chex.assert_trees_all_close(features(others, 16), z, atol=1e-6)
    assert not np.allclose(features(4 - codes, 16), z, atol=1e-2)


def test_a_channel_sees_only_those_before_it(tiny):
    params, *_ = tiny
    rng = np.random.default_rng(2)
    z, codes = rng.normal(size=(1, 16)).astype(np.float32), np.array([[1, 2, 3]])

    @jax.jit
    def logits(codes):
        return TokenBridge(TINY).apply({"params": params}, z, codes, method="logits")

    base = logits(codes)
    for channel in range(3):
        changed = codes.copy()
        changed[0, channel] = 0
        other = logits(changed)
        np.testing.assert_allclose(other[:, : channel + 1], base[:, : channel + 1], atol=1e-6)
        assert channel == 2 or not np.allclose(other[:, channel + 1 :], base[:, channel + 1 :], atol=1e-3)


def test_drawing_is_teacher_forcing(tiny):
    """With the cache, the logits met are those of training on the same codes; not so with the authors' first input."""
    params, *_ = tiny
    z = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    module = TokenBridge(TINY)
    for official in (False, True):
        config = dataclasses.replace(TINY, official_first_token=official)
        codes, logits = jax.jit(lambda p, config=config: draw_channels(config, p, z, keys, 1.0))(params["head"])
        forced = jax.jit(lambda p, codes: module.apply({"params": p}, z, codes, method="logits"))(params, codes)
        assert np.allclose(logits, forced, atol=2e-5) is not official


def test_rows_have_their_own_draws(tiny):
    """A draw's distribution is that of the logits, and rows with equal features and other keys differ."""
    params, *_ = tiny
    keys = jax.random.split(jax.random.key(0), 2000)
    z = np.broadcast_to(np.random.default_rng(4).normal(size=16).astype(np.float32), (2000, 16))
    codes, logits = jax.jit(lambda keys: draw_channels(TINY, params["head"], z, keys, 0.8))(keys)
    shares = np.bincount(np.asarray(codes)[:, 0], minlength=5) / 2000
    np.testing.assert_allclose(shares, jax.nn.softmax(logits[0, 0] / 0.8), atol=0.04)


def test_without_guidance_only_the_class_counts(tiny):
    params, codes, labels, masked = tiny

    @jax.jit
    def features(labels):
        return TokenBridge(TINY).apply({"params": params}, codes, labels, masked, method="features")

    guided = jax.jit(lambda weight: guided_features(TINY, params, codes, labels, masked, weight, True))
    alone = jax.jit(lambda: guided_features(TINY, params, codes, labels, masked, 9.0, False))
    plain, without = features(labels), features(jnp.full_like(labels, TINY.num_classes))
    assert not np.allclose(plain, without, atol=1e-2)
    for found, expected in ((alone(), plain), (guided(1.0), plain), (guided(0.0), without)):
        chex.assert_trees_all_close(found, expected, atol=1e-5)
    chex.assert_trees_all_close(guided(3.0), without + 3 * (plain - without), atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 5, 16])
def test_every_position_is_drawn_once(tiny, rounds):
    """Each round draws the last of the order that are left, and does not touch what is there."""
    params, *_ = tiny
    sampling = TokenBridgeSampling(rounds=rounds, guidance=1.0, temperature=0.0)
    counts = sampling.counts(16)
    assert counts[0] == 16 and counts[-1] == 0 and (np.diff(counts) < 0).all() and len(counts) == rounds + 1
    orders = np.random.default_rng(0).permuted(np.arange(16)[None].repeat(2, 0), axis=1)
    shares = []
    codes = generate(TINY, params, [0, None], sampling=sampling, orders=orders, on_progress=shares.append)
    assert len(shares) == rounds
    known = jnp.zeros_like(codes)

    @jax.jit
    def drawn_from(known, masked):
        z = guided_features(TINY, params, known, jnp.array([0, 4]), masked, 1.0, False)
        ordered, _ = draw_channels(TINY, params["head"], z.reshape(32, -1), None, 0.0)
        return ordered[:, np.argsort(TINY.order)].reshape(2, 16, 3)

    for before, after in itertools.pairwise(counts):
        masked = jnp.asarray(np.argsort(orders, axis=1) < before)
        now = masked & (np.argsort(orders, axis=1) >= after)
        known = jnp.where(now[..., None], drawn_from(known, masked), known)
    assert np.array_equal(known, codes)


def test_published_counts_of_rounds():
    """Section 2.5 of the specification."""
    for rounds, most, last in ((256, 1, 1), (64, 7, 6), (32, 13, None)):
        drawn = -np.diff(TokenBridgeSampling(rounds=rounds).counts(256))
        assert drawn.max() == most and drawn.sum() == 256 and last in (None, drawn[-1])
    weights = TokenBridgeSampling(rounds=256, guidance=3.1).weights(256)
    np.testing.assert_allclose(weights[[0, 127, 255]], 1 + 2.1 * np.array([1, 128, 255]) / 256, rtol=1e-6)


def test_the_share_of_masked_positions():
    task = TokenBridgeModeling(model=TINY)
    masks = np.stack([task.draw_mask(jax.random.key(n), 4) for n in range(60)])
    counts = masks.sum(-1)
    assert (counts == counts[:, :1]).all() and counts.min() >= 12 and counts.max() == 16
    partly = masks[np.argmin(counts[:, 0])]
    assert not np.array_equal(partly[0], partly[1])
    assert 0.2 < masks[:, :, 3].mean() < 1 and len(np.unique(counts)) > 2


def test_the_loss_counts_masked_codes_of_images_that_count():
    made = TASKS["tokenbridge"]()
    task, batch = made.task, made.batch
    params = random_params(task)
    masked = jnp.asarray(np.random.default_rng(0).permuted(np.arange(16)[None].repeat(8, 0), axis=1) < 13)
    total, count = jax.jit(task.masked_losses)(params, batch, masked, jax.random.key(0))
    losses = jax.jit(task.module().apply)({"params": params}, batch["codes"], batch["labels"], masked)
    assert count == 7 * 13 * 8
    np.testing.assert_allclose(total, np.sum(np.asarray(losses)[:7] * np.asarray(masked)[:7, :, None]), rtol=1e-5)


def test_a_new_model_predicts_as_its_last_layer_says():
    """Modulations are zero at first, so blocks of the head change nothing; all linear layers have Xavier's bounds."""
    params = jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))
    for group in ("query", "output"):
        kernel = np.asarray(params["encoder"]["blocks"]["attention"][group]["kernel"])
        bound = math.sqrt(6 / (16 + (48 if group == "query" else 16)))
        assert 0.9 * bound < np.abs(kernel).max() <= bound
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    first = TokenBridge(TINY).apply({"params": params}, z, jnp.array([[0, 1, 2], [0, 3, 2]]), method="logits")
    x = z @ params["head"]["condition"]["kernel"] + params["head"]["channel_embedding"][0]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    chex.assert_trees_all_close(first[:, 0], x @ params["head"]["kernels"][0], atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Section 3 of the specification: the parameters of all and of the head, in millions."""
    whole, head = {"base": (218.0, 45.8), "large": (486.9, 80.8), "huge": (910.0, 118.8)}[name.split("-")[1]]
    shapes = jax.eval_shape(lambda: init_params(PUBLISHED[name], jax.random.key(0)))

    def millions(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

    assert abs(millions(shapes) - whole) < 0.06 and abs(millions(shapes["head"]) - head) < 0.06


# -- the diffusion head


def test_the_noise_schedule():
    kept = kept_signal()
    assert len(kept) == 1000 and (np.diff(kept) < 0).all() and kept[0] > 0.9999 and kept[-1] < 1e-7


def test_a_perfect_head_finds_the_vector():
    """Denoising with the true noise of a vector gives this vector; here the head's last layer is replaced."""
    config = dataclasses.replace(TINY, head="diffusion")
    target = np.array([0.5, -1.0, 2.0], np.float32)

    class Oracle:
        def __init__(self, config):
            pass

        def apply(self, params, x, time, z):
            kept = jnp.asarray(kept_signal(), jnp.float32)[time.astype(jnp.int32)][:, None]
            return (x - jnp.sqrt(kept) * target) / jnp.sqrt(1 - kept)

    from jaxtok.vision import tokenbridge_heads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenbridge_heads, "DiffusionHead", Oracle)
        keys = jax.random.split(jax.random.key(0), 5)
        drawn = denoise(config, {}, jnp.zeros((5, 16)), keys, 1.0, 50)
    np.testing.assert_allclose(drawn, np.broadcast_to(target, (5, 3)), atol=0.05)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_order": (0, 1, 1)}, r"channel_order is \(0, 1, 1\)"),
        ({"channel_order": (0, 1)}, "each of 0 to 2 once"),
        ({"head": "serial"}, "head is 'serial'"),
        ({"channels": 1, "channel_order": ()}, "channels is 1, but head is autoregressive"),
        ({"encoder_width": 15}, "encoder_width is 15, encoder_heads 2"),
        ({"mask_ratio_min": 0.0}, "mask_ratio_min is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"buffer": 0}, "buffer is 0"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"rounds": -1}, "rounds is -1"),
        ({"schedule": "cos"}, "schedule is 'cos'"),
        ({"diffusion_steps": 0}, "diffusion_steps is 0"),
    ],
)
def test_sampling_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TokenBridgeSampling(**options)


def test_what_is_refused_when_drawing_and_fitting():
    task = TokenBridgeModeling(model=TINY)
    with pytest.raises(ValueError, match="rounds is 17; it must be at most 16"):
        task.draw({}, [0], jax.random.key(0), sampling=TokenBridgeSampling(rounds=17))
    with pytest.raises(ValueError, match="rng is None"):
        generate(TINY, {}, [0])
    with pytest.raises(ValueError, match=r"the data's code_values is \(4, 4, 4\), but the model's is \(5, 5, 5\)"):
        task.fit(CodeData(shape=(4, 4), values=(4, 4, 4)))
    with pytest.raises(ValueError, match="the data's code_shape"):
        task.fit(CodeData(shape=(4, 5), values=(5, 5, 5)))
    with pytest.raises(ValueError, match="patch_size is 2; it must be 1"):
        official_config(patch_size=2)
    with pytest.raises(ValueError, match="the file's 6 levels are not those of the task's quantizer"):
        check_levels(TINY.quantizer, {"reconstruction_values": np.zeros(6)})


def test_a_tokenizer_through_its_quantiser():
    """An evaluation is of what the codes give; more levels are nearer to what the VAE gives alone."""
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (4, 4, 4, 3)).astype(np.uint8),
        "labels": np.zeros(4, np.int32),
        "mask": np.ones(4, np.float32),
    }
    few = BridgeTokenizer(
        model=dataclasses.replace(VAE, scaling=1.0),
        discriminator=None,
        perceptual="none",
        quantizer=DimensionwiseQuantizer(levels=2),
        sample_posterior=False,
    )
    params = unboxed(few.init(jax.random.key(0), batch))
    rows = {}
    for levels in (2, 256):
        task = dataclasses.replace(few, quantizer=DimensionwiseQuantizer(levels=levels))
        rows[levels] = task.evaluate(params, [batch])
        assert 0 < rows[levels]["share_used"] <= 1 and rows[levels]["entropy"] <= math.log2(levels)
        codes = task.encode(params, batch["images"].astype(np.float32) / 255)
        decoded = np.clip(task.decode(params, codes), 0, 1)
        error = np.square(decoded - batch["images"] / 255).mean()
        np.testing.assert_allclose(error, rows[levels]["mse"], rtol=1e-4)
    assert rows[256]["latent_mse"] < 0.01 * rows[2]["latent_mse"]
