"""The KL-VAE: exact properties, training, configs that cannot be, and files."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Case

from jaxtok.data.images import ImageData
from jaxtok.interop.kl_vae import DIFFUSERS, KL_VAE, config_from, vae_params, vae_tensors
from jaxtok.model import Model
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.mesh import unboxed
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.discriminator import DiscriminatorConfig
from jaxtok.vision.kl_vae import KLAutoencoding, KLVAEConfig, Posterior
from jaxtok.weights import write_weights

SIZES = {"image_size": 8, "widths": (8, 8), "groups": 4, "res_blocks": 1, "encoder_attention": (), "z_channels": 3}


def plain(**options) -> KLAutoencoding:
    return KLAutoencoding(model=KLVAEConfig(**SIZES | options), discriminator=None, perceptual="none")


def images(count: int = 8) -> dict[str, np.ndarray]:
    """One of them only fills the batch."""
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8),
        "labels": np.zeros(count, np.int32),
        "mask": (np.arange(count) < count - 1).astype(np.float32),
    }


TASKS = {
    "kl_vae": lambda: Case(
        KLAutoencoding(
            model=KLVAEConfig(**SIZES | {"widths": (8,)}, scaling=0.0, kl_weight=1e-3),
            discriminator=None,
            perceptual="mse",
        ),
        ImageData(images="digits", size=8, batch_size=8),
        images(),
        train=TrainConfig(optimizer=OptimizerConfig(eps=1e-5)),
    ),
}

EVIDENCE = {"kl_vae": {"formats": ("kl_vae", "kl_vae, diffusers")}}


def test_a_posterior():
    """A standard normal one has no divergence; without noise, a sample is the mean; variances are limited."""
    standard = Posterior.of(jnp.zeros((2, 2, 2, 6)))
    assert np.array_equal(standard.kl(), np.zeros(2)) and np.array_equal(standard.std, np.ones((2, 2, 2, 3)))
    np.testing.assert_allclose(standard.nll(standard.mean), 12 * 0.5 * np.log(2 * np.pi), rtol=1e-6)
    far = Posterior.of(jnp.concatenate([jnp.ones((1, 1, 1, 2)), jnp.array([-99.0, 99.0]).reshape(1, 1, 1, 2)], -1))
    assert far.logvar.tolist() == [[[[-30, 20]]]]
    assert np.array_equal(far.sample(None), far.mean) and not np.array_equal(
        far.sample(jnp.ones((1, 1, 1, 2))), far.mean
    )


@pytest.fixture(scope="module")
def trained():
    """A task that measures the size of its latents, its parameters, and those after a hundred steps of one batch."""
    task, batch = plain(scaling=0.0, kl_weight=0.0), images()
    params = unboxed(task.init(jax.random.key(0), batch))
    first, trains = params, task.trainable(params)

    @jax.jit
    def step(params, number):
        def loss(params):
            return task.loss(params, batch, jax.random.key(0), number)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g, t: p - 0.05 * g * t, params, grads, trains)
        return task.after_step(params, metrics, number), value

    losses = []
    for number in range(40):
        params, value = step(params, number)
        losses.append(float(value))
    return task, first, params, losses


def test_training(trained):
    _, first, params, losses = trained
    assert losses[-1] < 0.7 * losses[0]
    moved = jax.tree_util.tree_map_with_path(
        # a bias of keys changes nothing
        lambda path, a, b: "key" in str(path) or not np.array_equal(a, b),
        first,
        params,
    )
    assert all(jax.tree.leaves(moved))


def test_latents_have_std_one_where_it_is_measured(trained):
    task, _, params, _ = trained
    pixels = jnp.asarray(images()["images"], jnp.float32) / 255
    latents = task.latents(params, pixels, jax.random.key(1))
    assert 0.5 < float(jnp.sqrt(jnp.mean(jnp.square(latents)))) < 2
    fixed = dataclasses.replace(task, model=dataclasses.replace(task.model, scaling=0.25))
    posterior = task.autoencoder().apply({"params": params["autoencoder"]}, 2 * pixels - 1, method="posterior")
    np.testing.assert_allclose(fixed.latents(params, pixels), 0.25 * posterior.mean, rtol=1e-6)
    assert "latents" not in fixed.init(jax.random.key(0), images())
    again, quantized = task.autoencoder().apply({"params": params["autoencoder"]}, pixels)
    np.testing.assert_allclose(task.images(params, task.latents(params, pixels)), again, atol=1e-5)
    np.testing.assert_allclose(quantized.loss, posterior.kl() / (8 * 8 * 3), rtol=1e-6)


@pytest.mark.slow
def test_its_discriminator_has_its_terms():
    task = dataclasses.replace(
        plain(), discriminator=DiscriminatorConfig(width=4, layers=1, start_step=0), perceptual="mse"
    )
    batch = images(4)
    params = unboxed(task.init(jax.random.key(0), batch))
    loss, metrics = jax.jit(task.loss)(params, batch, jax.random.key(0), 1)
    assert np.isfinite(loss) and {"kl", "latent_spread", "d_weight", "g_loss", "d_loss"} <= set(metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "widths is"),
        ({"widths": (16, 10)}, "widths has 10; it must be a multiple of 4"),
        ({"first_width": 2}, "first_width has 2"),
        ({"image_size": 9}, "image_size is 9; with 2 levels"),
        ({"z_channels": 0}, "z_channels is 0"),
        ({"scaling": -1.0}, "scaling is -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight is nan"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KLVAEConfig(**SIZES | options)


def test_images_that_it_refuses():
    task = plain()
    with pytest.raises(ValueError, match=r"\[batch, 8, 8, 3\]"):
        task.latents({}, jnp.zeros((1, 8, 9, 3)))
    with pytest.raises(ValueError, match=r"image_size is 8, but data\.size is 16"):
        task.fit(ImageData(images="digits", size=16))


def test_files_that_it_refuses(tmp_path):
    task = plain()
    shapes = jax.eval_shape(task.init, jax.random.key(0), images())
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), unboxed(shapes))
    tensors = vae_tensors(task.model, params["autoencoder"])
    less = {name: x for name, x in tensors.items() if name != "decoder.up.1.block.0.conv1.weight"}
    with pytest.raises(ValueError, match=r"decoder.up.1.block.0.conv1.weight is missing; odd is unknown"):
        vae_params(task.model, less | {"odd": np.zeros(1, np.float32)})
    file = write_weights(tmp_path / "vae.safetensors", tensors | {"loss.logvar": np.zeros(1, np.float32)})
    assert KL_VAE.recognises(file) and KL_VAE.read(file, task).task == task
    with pytest.raises(ValueError, match="scaling is 0, but the file does not say how large latents are"):
        KL_VAE.read(file, plain(scaling=0.0))
    with pytest.raises(ValueError, match="give the config of the model"):
        KL_VAE.read(file)
    with pytest.raises(ValueError, match="for diffusers they must be"):
        DIFFUSERS.write(tmp_path / "x", Model(task=plain(encoder_attention=(4,)), params=params, data=None))
    assert not (tmp_path / "x").exists()


def test_the_measured_size_is_written(tmp_path, trained):
    """Files of diffusers say what latents are multiplied by."""
    task, _, params, _ = trained
    DIFFUSERS.write(tmp_path / "vae", Model(task=task, params=params, data=None))
    again = DIFFUSERS.read(tmp_path / "vae")
    pixels = jnp.asarray(images()["images"], jnp.float32) / 255
    np.testing.assert_allclose(again.task.latents(again.params, pixels), task.latents(params, pixels), rtol=1e-4)
    for name, value, message in (
        ("down_block_types", ["AttnDownEncoderBlock2D"], "down_block_types has AttnDownEncoderBlock2D"),
        ("shift_factor", 0.1, "shift_factor is 0.1"),
        ("out_channels", 4, "out_channels is 4"),
        ("use_quant_conv", False, "use_quant_conv is False, but use_post_quant_conv is True"),
    ):
        options = json.loads((tmp_path / "vae" / "config.json").read_text()) | {name: value}
        with pytest.raises(ValueError, match=message):
            config_from(options)
