"""What the tiny image tokenizers share; they are in their systems' test files, as `IMAGE_TOKENIZERS`.

Two exist for the tests only, and show that the waist is wide enough: `FrequencyTokenizer` has ordered codes of several
numbers of values and a decoder that draws, and `BlockTokenizer` is one of volumes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.protocols import ArraySpec, Task
from jaxtok.training.mesh import unboxed
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.images import as_float, check_codes, check_images

SIZES = {
    "image_size": 8,
    "width": 32,
    "multipliers": (1, 1),
    "res_blocks": 1,
    "attention_resolutions": (),
    "embed_dim": 32,
}


def random_params(task, seed=0):
    """Parameters of the task's shapes, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    batch = {"images": jax.ShapeDtypeStruct((1, *task.image_shape), np.float32)}
    shapes = unboxed(jax.eval_shape(task.init, jax.random.key(0), batch))
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)


def alone(model) -> Autoencoding:
    """A task of the tokenizer alone, without what only training needs."""
    return Autoencoding(model=model, discriminator=None, perceptual="none")


class MeasuredByError(Task):
    """What the two tokenizers of this file share as tasks: the squared error of reconstructions."""

    counted = "images"
    model = None
    draws_codes: ClassVar[bool] = False

    def errors(self, params, batch, rng):
        images = as_float(batch["images"])
        error = jnp.square(self.decode(params, self.encode(params, images), rng) - images)
        return error.mean(tuple(range(1, error.ndim))) * batch["mask"]

    def loss(self, params, batch, rng, step):
        return jnp.mean(self.errors(params, batch, rng)), {}

    def sums(self, params, batch, rng):
        return {"mse": jnp.sum(self.errors(params, batch, rng)), "images": jnp.sum(batch["mask"])}

    def metrics(self, sums):
        return {"mse": sums["mse"] / sums["images"]}

    def flops(self, batch):
        return float(batch["images"].size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyTokenizer(MeasuredByError):
    """An image as its 15 lowest frequencies, the lowest first. Each has the coefficients of grey and of two differences
    of colours, in 33, 9 and 5 steps. What a prefix leaves open is drawn."""

    image_shape: ClassVar[tuple[int, ...]] = (8, 8, 3)
    code_shape: ClassVar[tuple[int, ...]] = (15,)
    code_values: ClassVar[tuple[int, ...]] = (33, 9, 5)
    prefixes: ClassVar[tuple[int, ...]] = (1, 3, 6, 15)
    draws_images: ClassVar[bool] = True
    spread: float = 0.05
    """The standard deviation of a coefficient that is drawn."""

    def init(self, rng, batch):
        n = np.arange(8)
        waves = np.cos(np.pi * (n[None] + 0.5) * n[:, None] / 8) * np.where(n == 0, 1, math.sqrt(2))[:, None]
        order = [(u, s - u) for s in range(5) for u in range(s + 1)]
        colours = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
        basis = [[np.einsum("y,x,c->yxc", waves[u], waves[v], c) / 8 for c in colours] for u, v in order]
        return {"basis": jnp.asarray(basis, jnp.float32)}

    def encode(self, params, images, rng=None):
        check_images(images, self.image_shape)
        coefficients = jnp.einsum("byxc,ntyxc->bnt", images, params["basis"])
        steps = np.array(self.code_values) - 1
        shares = jnp.clip(coefficients / self.reach() + 0.5, 0, 1)
        return jnp.round(shares * steps).astype(jnp.int32)

    def decode(self, params, codes, rng=None):
        check_codes(codes, self.prefixes, self.code_values)
        if rng is None:
            raise ValueError("this tokenizer draws its images: give decode a key, rng.")
        known = (codes / (np.array(self.code_values) - 1) - 0.5) * self.reach()[: codes.shape[1]]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(codes)))
        drawn = self.spread * jax.vmap(lambda key: jax.random.normal(key, (15, 3)))(keys)
        coefficients = jnp.concatenate([known, drawn[:, codes.shape[1] :]], 1)
        return jnp.einsum("bnt,ntyxc->byxc", coefficients, params["basis"]).astype(jnp.float32)

    @staticmethod
    def reach():
        """The range of each coefficient's steps, half of it on either side of 0."""
        return np.where(np.arange(15)[:, None] == 0, [32.0, 8.0, 4.0], [12.0, 4.0, 2.0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTokenizer(MeasuredByError):
    """A volume as the mean of each block of 2 x 2 x 2, in eight steps."""

    image_shape: ClassVar[tuple[int, ...]] = (4, 8, 6, 1)
    code_shape: ClassVar[tuple[int, ...]] = (2, 4, 3)
    code_values: ClassVar[tuple[int, ...]] = (8,)
    prefixes: ClassVar[tuple[int, ...]] = ()
    draws_images: ClassVar[bool] = False

    def init(self, rng, batch):
        return {"levels": jnp.linspace(0, 1, 8)}

    def encode(self, params, images, rng=None):
        check_images(images, self.image_shape)
        means = images.reshape(-1, 2, 2, 4, 2, 3, 2).mean((2, 4, 6)).reshape(-1, 24, 1)
        return jnp.argmin(jnp.abs(means[..., None] - params["levels"]), -1).astype(jnp.int32)

    def decode(self, params, codes, rng=None):
        check_codes(codes, (24,), self.code_values)
        blocks = params["levels"][codes].reshape(-1, 2, 1, 4, 1, 3, 1)
        return jnp.broadcast_to(blocks, (len(codes), 2, 2, 4, 2, 3, 2)).reshape(-1, *self.image_shape)


@dataclasses.dataclass(frozen=True)
class Ramps:
    """Volumes that get brighter along one of the three axes, which is their class."""

    batch_size: int = 4
    seed: int = 0
    eval_limit: int = 0
    flip: bool = True
    classes: ClassVar[tuple[str, ...]] = ("deep", "high", "wide")
    unit: ClassVar[str] = "images"
    source: ClassVar[str] = ""

    @property
    def units(self) -> int:
        return self.batch_size

    def count(self, split: str) -> int:
        return {"train": 10, "validation": 6, "test": 5, "all": 21}[split]

    def batch_spec(self):
        return {
            "images": ArraySpec((self.batch_size, *BlockTokenizer.image_shape), np.uint8, ("batch", *[None] * 4)),
            "labels": ArraySpec((self.batch_size,), np.int32, ("batch",)),
            "mask": ArraySpec((self.batch_size,), np.float32, ("batch",)),
        }

    def train_batches(self, rows=None):
        raise ValueError("these volumes are not trained on.")

    def eval_batches(self, split="validation", rows=None):
        count = self.count(split)
        batches = -(-count // self.batch_size)
        for number in range(min(batches, self.eval_limit or batches)):
            numbers = number * self.batch_size + np.arange(self.batch_size)
            ramps = [np.indices((4, 8, 6))[n % 3] / (3, 7, 5)[n % 3] for n in numbers]
            scales = np.random.default_rng(0).uniform(0.3, 1, 100)[numbers, None, None, None]
            images = np.round(255 * scales * np.array(ramps)).astype(np.uint8)[..., None]
            mask = (numbers < count).astype(np.float32)
            yield {"images": images, "labels": (numbers % 3).astype(np.int32), "mask": mask}


TEST_ONLY = {"frequencies": FrequencyTokenizer, "blocks": BlockTokenizer}

TAKE_A_KEY = ("vqgan_gumbel",)
"""The tokenizers whose codes are drawn with a key, and not without."""
EXACT = ("vqgan", "vqgan_gumbel", "bae", "bae_deterministic")
"""The tokenizers whose decoded codes are, bit for bit, the reconstruction that training sees."""


def params_of(name, task):
    return task.init(jax.random.key(0), {}) if name in TEST_ONLY else random_params(task)
