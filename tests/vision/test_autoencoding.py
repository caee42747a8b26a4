"""Training of image tokenizers: exact properties, configs that cannot be, checkpoints, and resumption."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_tokenizers import SIZES, alone, random_params
from tiny import Case

from jaxtok.configuration import load_config
from jaxtok.data.images import ImageData
from jaxtok.interop.vqgan import from_official, to_official, unused_shapes, write_official
from jaxtok.nn.convolution import Encoder, GroupNorm
from jaxtok.protocols import ArraySpec, Task
from jaxtok.training.checkpoints import load
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig, unboxed
from jaxtok.training.optimizer import OptimizerConfig, PartOptimizer
from jaxtok.verbs import evaluate
from jaxtok.vision import binary_autoencoder, vqgan
from jaxtok.vision.augmentation import AugmentationDraws, augment, draw_augmentation, largest_shift, translate
from jaxtok.vision.autoencoding import Autoencoding, TokenizerConfig
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.discriminator import Discriminator, DiscriminatorConfig, hinge_loss, new_statistics
from jaxtok.vision.metrics import psnr, ssim
from jaxtok.vision.perceptual import LPIPS, STAGES, lpips_tensors, read_lpips
from jaxtok.vision.vqgan import VQGANConfig
from jaxtok.weights import read_weights, write_weights

TINY = {"image_size": 8, "width": 64, "multipliers": (1, 1), "res_blocks": 1, "attention_resolutions": ()}


def case(model, **options) -> Case:
    """Images, one of which only fills the batch."""
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
        "labels": np.zeros(8, np.int32),
        "mask": (np.arange(8) < 7).astype(np.float32),
    }
    # Some of the many kernels have gradients near zero, which Adam with a small epsilon would make large.
    optimizer = OptimizerConfig(eps=1e-5)
    if options["discriminator"]:
        part = PartOptimizer(eps=1e-5, part="discriminator", start=1)
        optimizer = dataclasses.replace(optimizer, parts=(part,))
    data = ImageData(images="digits", size=8, batch_size=8)
    return Case(
        Autoencoding(model=model, **options),
        data,
        batch,
        train=TrainConfig(optimizer=optimizer),
        drawn=model.draws_codes,
    )


TASKS = {
    "bae": lambda: case(
        BAEConfig(**TINY, embed_dim=64, bits=8, sub_codes=2, code_weight=0.1),
        discriminator=DiscriminatorConfig(width=8, layers=1, start_step=0, augment=True),
        perceptual="mse",
    ),
    "vqgan": lambda: case(
        VQGANConfig(**TINY | {"multipliers": (1,)}, embed_dim=32, codebook_size=64),
        discriminator=None,
        perceptual="none",
    ),
}

IMAGE_TOKENIZERS = {
    "vqgan": lambda: alone(VQGANConfig(**SIZES, codebook_size=20)),
    "vqgan_gumbel": lambda: alone(VQGANConfig(**SIZES, codebook_size=20, quantizer_kind="gumbel")),
    "bae": lambda: alone(BAEConfig(**SIZES, bits=6, sub_codes=2)),
    "bae_deterministic": lambda: alone(BAEConfig(**SIZES, bits=6, deterministic=True, tanh=True)),
}

WIDTHS = (2, 3, 4, 5, 6)


def pictures(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", binary_autoencoder.PUBLISHED)
def test_published_sizes(name):
    """The counts of the authors' classes, including what only these hold."""
    task = Autoencoding(model=binary_autoencoder.PUBLISHED[name], perceptual="weights")
    batch = {"images": jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32)}
    params = unboxed(jax.eval_shape(task.init, jax.random.key(0), batch))
    unused = {name: int(np.prod(shape)) for name, shape in unused_shapes(task.model).items()}
    of = {tower: sum(n for name, n in unused.items() if name.startswith(tower)) for tower in ("encoder", "generator")}
    ours = {tower: size(params["autoencoder"][tower]) for tower in ("encoder", "generator", "quantizer")}
    assert ours["encoder"] + of["encoder"] == 30_349_568
    assert ours["generator"] + of["generator"] == 35_168_774
    assert sum(n for name, n in unused.items() if "logsigma" in name) == 147_971
    assert sum(n for name, n in unused.items() if "conv_out" in name) == 2_348_928
    assert ours["quantizer"] == task.model.bits * (256 + 1 + 256)
    assert size(params["discriminator"]) == 2_765_633
    assert size(params["frozen"]) == 14_716_160
    assert task.code_shape == (16, 16) and math.prod(task.code_values) == 2**task.model.bits


def test_published_vqgan():
    model = vqgan.PUBLISHED["vqgan-1024"]
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32)
    task = Autoencoding(model=model, perceptual="none")
    params = jax.eval_shape(task.init, jax.random.key(0), {"images": image})
    assert size(params["autoencoder"]["quantizer"]) == 1024 * 256
    bae = jax.eval_shape(Autoencoding(model=BAEConfig(), perceptual="none").init, jax.random.key(0), {"images": image})
    first_norm = 2 * model.embed_dim  # which BAE's generator begins with
    assert size(params["autoencoder"]["generator"]) == size(bae["autoencoder"]["generator"]) - first_norm


def test_augmentation_that_changes_nothing_and_back():
    x = pictures(2, 16, 12, 3)
    half, none = jnp.full(2, 0.5), jnp.zeros(2, jnp.int32)
    np.testing.assert_allclose(augment(x, AugmentationDraws(half, half, half, none, none)), x, atol=1e-6)
    there = AugmentationDraws(half, half, half, jnp.array([2, -1]), jnp.array([-1, 1]))
    back = there.replace(rows=-there.rows, columns=-there.columns)
    np.testing.assert_array_equal(translate(translate(x, there), back)[:, 2:-2, 2:-2], x[:, 2:-2, 2:-2])
    assert (largest_shift(16), largest_shift(12), largest_shift(256)) == (2, 2, 32)
    draws = draw_augmentation(jax.random.key(0), 1000, 16, 40)
    assert (int(draws.rows.min()), int(draws.rows.max())) == (-2, 2)
    assert (int(draws.columns.min()), int(draws.columns.max())) == (-5, 5)


def test_discriminator():
    config = DiscriminatorConfig(width=4, layers=2)
    module, statistics, x = Discriminator(config), new_statistics(config), pictures(3, 12, 12, 3)
    params = unboxed(module.init(jax.random.key(0), x, statistics, train=True)["params"])

    def run(x, train):
        return module.apply({"params": params}, x, statistics, train=train)

    assert np.allclose(run(x, False)[0][:1], run(x[:1], False)[0], atol=1e-6)
    assert not np.allclose(run(x, True)[0][:1], run(x[:1], True)[0], atol=1e-3)  # its batch is in the norm
    assert run(x, True)[0].shape[1:] == config.sides(12)[-1:] * 2
    assert np.all(hinge_loss(jnp.full((2, 1, 1), 1.5), jnp.full((2, 1, 1), -1.0)) == 0)
    with pytest.raises(
        ValueError, match=r"discriminator\.layers is 3, .* have 23 pixels a side; they must have at least 24"
    ):
        DiscriminatorConfig().sides(23)


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """Weights of a narrow network in the names of LPIPS."""
    image = pictures(1, 16, 16, 3)
    params = jax.jit(LPIPS(WIDTHS).init)(jax.random.key(0), image, image)["params"]
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(params))  # until they are read
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.abs(rng.normal(size=x.shape)).astype(np.float32), params)
    return write_weights(tmp_path_factory.mktemp("lpips") / "lpips.safetensors", lpips_tensors(params)), params


def test_lpips(lpips_file, tmp_path):
    path, params = lpips_file
    read = read_lpips(path, WIDTHS)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, read, params)))
    module, x, y = LPIPS(WIDTHS), pictures(2, 16, 16, 3), pictures(2, 16, 16, 3, seed=1)

    @jax.jit
    def run(params, x, y):
        def total(x):
            distance = module.apply({"params": params}, x, y)
            return distance.sum(), distance

        slope, distance = jax.grad(total, has_aux=True)(x)
        return distance, slope

    distance = lambda x, y: run(read, x, y)[0]  # noqa: E731
    assert np.all(distance(x, x) < 1e-12) and np.all(distance(x, y) > 1e-6)
    np.testing.assert_allclose(distance(x, y), distance(y, x), rtol=1e-5)
    # a position without any feature has no NaN in its gradient
    dead = {name: -leaf if "bias" in name else 0 * leaf if "kernel" in name else leaf for name, leaf in read.items()}
    assert np.all(run(dead, x, y)[1] == 0)
    # torchvision's VGG16 and the heads in two files, as they are published
    tensors = read_weights(path)
    vgg = {
        f"features.{number}.{leaf}": tensors[f"net.slice{stage + 1}.{number}.{leaf}"]
        for stage, numbers in enumerate(STAGES)
        for number in numbers
        for leaf in ("weight", "bias")
    }
    write_weights(tmp_path / "vgg16.safetensors", vgg | {"classifier.0.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"no tensor lin0\.model\.1\.weight"):
        read_lpips(tmp_path, WIDTHS)
    write_weights(tmp_path / "lin.safetensors", {k: v for k, v in tensors.items() if k.startswith("lin")})
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, read_lpips(tmp_path, WIDTHS), params)))
    with pytest.raises(ValueError, match="perceptual_widths"):
        read_lpips(path)
    with pytest.raises(FileNotFoundError, match="does not exist; give"):
        read_lpips(tmp_path / "nothing.pth")
    with pytest.raises(FileExistsError):
        write_weights(path, {})


def test_files_of_weights(tmp_path):
    half = write_weights(tmp_path / "half.safetensors", {"a": np.ones(2, jnp.bfloat16), "n": np.asarray(3)})
    assert read_weights(half)["a"].dtype == np.float32 and read_weights(half)["n"].dtype == np.int64
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        read_weights(path)
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3)}, tmp_path / "a.th")
    read = read_weights(tmp_path / "a.th")
    assert read["a"].dtype == np.float32 and read["n"].dtype == np.int64
    torch.save({"state_dict": {"module.a": torch.ones(2)}, "args": argparse.Namespace()}, tmp_path / "b.pt")
    assert read_weights(tmp_path / "b.pt").keys() == {"a"}
    torch.save({"a": torch.ones(2), "args": argparse.Namespace()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no table of tensors"):
        read_weights(tmp_path / "c.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no"):
        read_weights(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["bae", "nearest", "gumbel"])
@pytest.mark.parametrize("suffix", [".safetensors", ".th"])
def test_official_checkpoints_both_ways(kind, suffix, lpips_file, tmp_path):
    """Every tensor comes back as it was, even those that nothing here uses."""
    if suffix == ".th":
        pytest.importorskip("torch")
    sizes = SIZES | {"image_size": 16, "multipliers": (1, 2), "attention_resolutions": (8,)}
    if kind == "bae":
        model = BAEConfig(**sizes, bits=5)
    else:
        model = VQGANConfig(**sizes, codebook_size=7, quantizer_kind=kind)
    config = DiscriminatorConfig(width=4, layers=1)
    task = Autoencoding(model=model, discriminator=config, perceptual=str(lpips_file[0]), perceptual_widths=WIDTHS)
    batch = {"images": jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)}
    rng = np.random.default_rng(0)
    shapes = unboxed(jax.eval_shape(task.init, jax.random.key(0), batch))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    theirs = to_official(task, params)
    assert all(not theirs[f"ae.{name}"].any() for name in unused_shapes(model))
    theirs = {
        k: rng.normal(size=v.shape).astype(np.float32) if v.dtype == np.float32 else v + 3 for k, v in theirs.items()
    }
    for name, value in to_official(task, params).items():
        if name.startswith("perceptual.scaling_layer"):
            theirs[name] = value
    path = write_weights(tmp_path / f"bae{suffix}", theirs)
    read, aside = from_official(task, read_weights(path))
    assert jax.tree.structure(read) == jax.tree.structure(params)
    again = read_weights(write_official(tmp_path / f"again{suffix}", task, read, aside))
    assert again.keys() == theirs.keys()
    assert all(np.array_equal(again[name], theirs[name]) and again[name].dtype == theirs[name].dtype for name in theirs)
    # an autoencoder alone, without prefix and without what nothing uses, is enough to encode
    own = {k.removeprefix("ae."): v for k, v in theirs.items() if k.startswith("ae.")}
    own = {k: v for k, v in own.items() if k not in unused_shapes(model)}
    alone, aside = from_official(task, own)
    assert set(alone) == {"autoencoder"} and not aside
    # and what the task does not have is kept
    bare = Autoencoding(model=model, discriminator=None, perceptual="none")
    less, aside = from_official(bare, theirs)
    assert set(less) == {"autoencoder"} and to_official(bare, less, aside).keys() == theirs.keys()
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0\.bias is missing"):
        from_official(task, {k: v for k, v in own.items() if k != "encoder.blocks.0.bias"})
    with pytest.raises(ValueError, match=r"strange is unknown"):
        from_official(task, own | {"strange": np.zeros(1)})
    other = dataclasses.replace(task, model=dataclasses.replace(model, width=64))
    with pytest.raises(ValueError, match="has shape"):
        from_official(other, own)


def test_configs_that_cannot_be():
    for field, value, message in (
        ("width", 48, "width is 48.*multiple of 32"),
        ("embed_dim", 8, "embed_dim is 8.*multiple of 32"),
        ("image_size", 9, "image_size is 9.*multiple of 2"),
        ("multipliers", (), "multipliers"),
        ("res_blocks", 0, "res_blocks is 0"),
        ("generator_multiplier", 0.5, "generator_multiplier is 0.5"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("bits", 0, "bits is 0"),
        ("bits", 32, "at most 31"),
        ("sub_codes", 3, "sub_codes 3"),
        ("code_weight", -1.0, "code_weight is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            BAEConfig(**SIZES | {field: value})
    for field, value in (("codebook_size", 0), ("quantizer_kind", "other"), ("beta", -1.0), ("kl_weight", -1.0)):
        with pytest.raises(ValueError, match=f"{field} is {value!r}"):
            VQGANConfig(**{field: value})
    for field, value in (("width", 0), ("layers", 0), ("start_step", -1), ("max_weight", -1.0)):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            DiscriminatorConfig(**{field: value})
    with pytest.raises(TypeError, match="abstract"):
        TokenizerConfig()
    with pytest.raises(ValueError, match=r"perceptual_weight is 1\.0, but perceptual is empty"):
        Autoencoding(model=BAEConfig())
    with pytest.raises(ValueError, match="perceptual_weight is -1"):
        Autoencoding(model=BAEConfig(), perceptual_weight=-1)
    with pytest.raises(ValueError, match="must have at least 24"):
        Autoencoding(model=BAEConfig(**SIZES), perceptual="none")
    with pytest.raises(ValueError, match="for LPIPS it must be at least 16"):
        Autoencoding(model=BAEConfig(**SIZES), discriminator=None, perceptual="file.pth")
    with pytest.raises(ValueError, match="five positive"):
        Autoencoding(model=BAEConfig(), perceptual="none", perceptual_widths=(1, 2))
    with pytest.raises(ValueError, match="there are 33 channels"):
        GroupNorm().init(jax.random.key(0), jnp.zeros((1, 2, 2, 33)))


def test_levels_computed_again_and_half_precision():
    """The same gradients; and in bfloat16 the same vectors but for rounding, in float32."""
    config = BAEConfig(**SIZES)
    params = random_params(Autoencoding(model=config, discriminator=None, perceptual="none"))["autoencoder"]["encoder"]
    x = pictures(2, 8, 8, 3)

    def run(**options):
        module = Encoder(dataclasses.replace(config, **options))
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(module.apply({"params": p}, x) ** 3)))(params)

    (value, grads), (again, same) = run(), run(remat_levels=True)
    assert float(value) == pytest.approx(float(again), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    encoders = (Encoder(dataclasses.replace(config, dtype=dtype)) for dtype in DTYPES)
    exact, rounded = (jax.jit(encoder.apply)({"params": params}, x) for encoder in encoders)
    assert rounded.dtype == jnp.float32 and not np.array_equal(exact, rounded)
    np.testing.assert_allclose(exact, rounded, atol=0.05 * np.abs(exact).max())


DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """Random images, whose position can be saved."""

    batch_size: int = 4
    size: int = 8
    images: str = "noise"
    eval_limit: int = 0
    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "images"

    @property
    def units(self):
        return self.batch_size

    def batch_spec(self):
        images = (self.batch_size, self.size, self.size, 3)
        return {
            "images": ArraySpec(images, np.uint8, ("batch", None, None, None)),
            "mask": ArraySpec((self.batch_size,), np.float32, ("batch",)),
        }

    def batch(self, seed):
        images = np.random.default_rng(seed).integers(0, 256, (self.batch_size, self.size, self.size, 3))
        return {"images": images.astype(np.uint8), "mask": np.ones(self.batch_size, np.float32)}

    def train_batches(self, rows):
        return Batches(self)

    def eval_batches(self, split, rows=None):
        return [self.batch(1000)]


class Batches:
    def __init__(self, data):
        self._data, self._next = data, 0

    def __next__(self):
        self._next += 1
        return self._data.batch(self._next)

    def get_state(self):
        return {"0": self._next}

    def set_state(self, state):
        self._next = state["0"]

    def close(self):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Task):
    """Looks like an `Autoencoding` to the loop, with three arrays."""

    def init(self, rng, batch):
        kernel = {"kernel": jax.random.normal(rng, (3,))}
        read = {"frozen": {"kernel": jnp.full(2, jnp.nan)}}  # until it is
        return {"autoencoder": kernel, "discriminator": kernel, "statistics": {"main_0": {"mean": jnp.zeros(3)}}} | read

    def load_weights(self, params):
        return params | {"frozen": {"kernel": np.arange(2, dtype=np.float32)}}

    def loss(self, params, batch, rng, step):
        x, still = batch["images"].mean((1, 2)) / 255, jax.lax.stop_gradient
        fake = (x + 0.1 * jax.random.normal(rng, x.shape)) * params["autoencoder"]["kernel"]
        kernel = params["discriminator"]["kernel"]
        real_or_not = jax.nn.relu(1 - x * kernel).mean() + jax.nn.relu(1 + still(fake) * kernel).mean()
        loss = jnp.abs(x - fake).mean() - (fake * still(kernel)).mean() + jnp.where(step > 1, real_or_not, 0.0)
        mean = 0.9 * params["statistics"]["main_0"]["mean"] + 0.1 * still(fake).mean(0)
        return loss, {"state": {"main_0": {"mean": mean}}}

    after_step, trainable = Autoencoding.after_step, Autoencoding.trainable
    discriminator, counted = "yes", "batches"

    def sums(self, params, batch, rng):
        return {"loss": self.loss(params, batch, jax.random.key(0), 0)[0], "batches": jnp.ones(())}

    def metrics(self, sums):
        return {"loss": sums["loss"]}

    def flops(self, batch):
        return 1.0


def real() -> Autoencoding:
    return Autoencoding(
        model=BAEConfig(**SIZES | {"multipliers": (1,)}, bits=4),
        discriminator=DiscriminatorConfig(width=4, layers=1, start_step=1),
        perceptual="mse",
    )


@pytest.fixture(scope="module", params=[Small, pytest.param(real, marks=pytest.mark.slow)])
def adversarial(request, tmp_path_factory):
    """Four steps with two optimizers and an average; the discriminator begins to learn in the third."""
    adam = {
        "learning_rate": 1e-3,
        "min_learning_rate": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "clip": 0.0,
    }
    part = PartOptimizer(**adam | {"learning_rate": 2e-3}, part="discriminator", start=2)
    return Experiment(
        name="adversarial",
        task=request.param(),
        data=Noise(),
        train=TrainConfig(
            steps=4,
            optimizer=OptimizerConfig(**adam, parts=(part,), ema_decay=0.5, ema_every=2),
            log_every=1,
            eval_every=0,
            checkpoint_every=1,
            keep_checkpoints=9,
            tensorboard=False,
        ),
        mesh=MeshConfig(data=1),
        workdir=str(tmp_path_factory.mktemp("run") / "whole"),
    )


def test_a_discriminator_and_its_optimizer_that_start_apart():
    optimizer = OptimizerConfig(parts=(PartOptimizer(part="discriminator", start=3),))
    with pytest.raises(ValueError, match=r"starts at 3, .*start_step = 1 .* make the part's start 2"):
        Experiment(task=real(), data=Noise(), train=TrainConfig(optimizer=optimizer)).fitted()


def test_what_an_evaluation_reports():
    model = VQGANConfig(**SIZES | {"image_size": 16, "multipliers": (1,)}, codebook_size=8)
    task = Autoencoding(model=model, discriminator=None, perceptual="none")
    images = np.random.default_rng(0).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    batch = {"images": images, "mask": np.array([1, 1, 0], np.float32)}
    params = unboxed(task.init(jax.random.key(0), batch))
    found = task.evaluate(params, [batch, batch])
    shown = np.clip(task.decode(params, task.encode(params, images)), 0, 1)
    real = images[:2], shown[:2]
    assert found["images"] == 4 and found["ssim"] == pytest.approx(float(np.mean(ssim(*real))), abs=1e-5)
    assert found["psnr"] == pytest.approx(float(np.mean(psnr(*real))), rel=1e-5)
    assert found["mse"] == pytest.approx(float(np.mean(np.square(real[0] - real[1]))), rel=1e-5)
    smaller = dataclasses.replace(task, model=dataclasses.replace(model, image_size=8))
    batch["images"] = images[:, :8, :8]
    assert "ssim" not in smaller.evaluate(params, [batch])


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))
    )


def test_a_run_with_two_optimizers_and_an_average(adversarial, tmp_path, monkeypatch):
    whole = train(adversarial, quiet=True)
    at = [load(f"{adversarial.workdir}/checkpoints/{step}") for step in (2, 3, 4)]
    # the discriminator stands still until its start, its statistics do not
    assert not same(at[0].params["discriminator"], at[1].params["discriminator"])
    assert all(np.any(x["mean"]) for x in at[0].params["statistics"].values())
    states = [run.opt_state() for run in at]
    first = states[0].state[1]["discriminator"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first))  # no moment, no count
    assert [int(state.state[1]["discriminator"][0].count) for state in states] == [0, 1, 2]
    assert [int(state.state[0][0].count) for state in states] == [2, 3, 4]
    # the average moves after every second update; what no gradient moves has no average
    assert same(states[0].average["autoencoder"], states[1].average["autoencoder"])
    mean = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, states[1].average["autoencoder"], at[2].params["autoencoder"])
    for x, y in zip(jax.tree.leaves(mean), jax.tree.leaves(states[2].average["autoencoder"])):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)
    averaged = at[2].averaged()
    assert same(averaged.params["autoencoder"], states[2].average["autoencoder"])
    assert same(averaged.params["statistics"], at[2].params["statistics"])
    raw, smooth = (evaluate(Path(adversarial.workdir), ema=ema) for ema in (False, True))
    assert raw["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    again = averaged.task.evaluate(averaged.params, Noise().eval_batches(""))
    assert smooth["loss"] == again["loss"] != pytest.approx(raw["loss"], rel=1e-5)
    if isinstance(adversarial.task, Small):  # what is read from a file is there, and stays the same
        assert all(np.array_equal(run.params["frozen"]["kernel"], [0, 1]) for run in at)
        assert "frozen" not in states[0].average
    # and a run that was interrupted continues bit for bit
    broken = dataclasses.replace(adversarial, workdir=str(tmp_path / "broken"))
    original = Batches.__next__

    def dying(self):
        if self._next == 3:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", dying)
        with pytest.raises(KeyboardInterrupt):
            train(broken, quiet=True)
    resumed = train(broken, quiet=True)
    assert same(whole.params, resumed.params) and whole.metrics == resumed.metrics
    assert same(states[2], load(broken.workdir).opt_state())


def test_lpips_of_a_task(lpips_file, tmp_path):
    model = BAEConfig(**SIZES | {"image_size": 16, "multipliers": (1,)}, bits=4)
    task = Autoencoding(model=model, discriminator=None, perceptual=str(lpips_file[0]), perceptual_widths=WIDTHS)
    params = random_params(task)
    loaded = task.load_weights(params)
    assert same(loaded["frozen"]["lpips"], lpips_file[1]) and loaded["autoencoder"] is params["autoencoder"]
    x, y = pictures(2, 16, 16, 3), pictures(2, 16, 16, 3, seed=1)
    expected = jax.jit(LPIPS(WIDTHS).apply)({"params": lpips_file[1]}, x, y)
    np.testing.assert_allclose(jax.jit(task.distance(loaded))(x, y), expected, rtol=1e-5)
    with pytest.raises(FileNotFoundError, match="does not exist; give"):
        dataclasses.replace(task, perceptual=str(tmp_path / "nothing.pth")).load_weights(params)


@pytest.mark.slow
def test_bae_uses_its_codes_and_vq_does_not(tmp_path):
    """ELM's claim, on emoji: the study of tokenizers_study."""
    study = load_config("tokenizers_study")
    assert dataclasses.replace(study, workdir=str(tmp_path)).run()
    found = {row["arm"]: row["test"] for row in json.loads((tmp_path / "results.json").read_text()).values()}
    drawn, compared, vq = (found[arm.name] for arm in study.arms)
    assert drawn["share_used"] > 0.5 and compared["share_used"] > 0.5 and vq["share_used"] < 0.3
    assert drawn["l1"] < 0.9 * vq["l1"]
