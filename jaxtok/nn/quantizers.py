"""Quantisers: vectors to codes of a finite vocabulary, with gradients that pass straight through. All in float32.

Nearest neighbour (VQ-VAE, arXiv 1711.00937, as in VQGAN), Gumbel softmax (arXiv 1611.01144), and independent bits
(binary latents, arXiv 2304.04820, which ELM, arXiv 2410.16257, calls BAE). Finite scalars (FSQ, arXiv 2309.15505) are
the one without parameters: a plain dataclass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import gather
from jaxtok.nn.bits import pack_bits, unpack_bits
from jaxtok.nn.convolution import Conv
from jaxtok.nn.norms import unit_length


@flax.struct.dataclass
class Quantized:
    """The result of quantising vectors."""

    vectors: Float[Array, "batch *positions embed_dim"]
    """The input of the generator."""
    codes: Int[Array, "batch *positions sub_codes"]
    loss: Float[Array, " batch"]
    """The quantiser's own loss for each image."""
    metrics: dict[str, Any]


def straight_through(value: Array, gradient: Array) -> Array:
    """`value`, exactly, with the gradient of `gradient`."""
    return jax.lax.stop_gradient(value) + (gradient - jax.lax.stop_gradient(gradient))


def perplexity(counts: Float[Array, " codes"]) -> Float[Array, ""]:
    """exp of the entropy of the shares: the number of equally frequent codes that would have the same entropy."""
    shares = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(-jnp.sum(shares * jnp.log(shares + 1e-10)))


def code_counts(codes: Int[Array, "*shape"], size: int) -> Float[Array, " codes"]:
    """How often each of `size` codes occurs."""
    return jnp.zeros(size, jnp.float32).at[codes.reshape(-1)].add(1.0)


class Codebook(nn.Module):
    """What quantisers with one learned vector for each code share; `setup` of a subclass makes its `embedding`."""

    codebook_size: int
    features: int

    def table(self) -> Float[Array, "codes features"]:
        return gather(self.embedding.astype(jnp.float32), "vocab", "d_model")

    def embed(self, codes: Int[Array, "batch *positions 1"]) -> Float[Array, "batch *positions features"]:
        return jnp.take(self.table(), codes[..., 0], axis=0)


class NearestQuantizer(Codebook):
    """Replaces a vector by the nearest of K learned ones (of several equally near, the first).

    L = mean((sg(z_q) - z)^2) + beta mean((z_q - sg(z))^2): as in the authors' code of VQGAN, ELM and SEED, beta weighs
    the codebook's term and not the commitment. If not `legacy`, beta weighs the commitment, as in VQ-VAE's paper; the
    value is the same, and only the gradients differ.
    """

    beta: float = 0.25
    param_dtype: Any = jnp.float32
    legacy: bool = True
    moving: bool = False
    """Whether the vectors are moving averages (`CodebookAverages`), so that the loss has the commitment only."""
    cosine: bool = False
    """Whether vectors and table are scaled to length 1 first, so that the nearest has the greatest cosine."""

    def setup(self):
        bound = 1 / self.codebook_size

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        init = nn.with_logical_partitioning(uniform, ("vocab", "d_model"))
        self.embedding = self.param("embedding", init, (self.codebook_size, self.features), self.param_dtype)

    def table(self) -> Float[Array, "codes features"]:
        return unit_length(super().table()) if self.cosine else super().table()

    def __call__(self, x: Float[Array, "batch *positions features"], draws: None = None, **options: Any) -> Quantized:
        """Quantises x. Nothing is drawn, and options, which other quantisers have, are ignored."""
        x, table = x.astype(jnp.float32), self.table()
        x = unit_length(x) if self.cosine else x
        distances = jnp.sum(jnp.square(x), -1, keepdims=True) + jnp.sum(jnp.square(table), -1)
        distances -= 2 * jnp.einsum("...d,kd->...k", x, table, precision="highest")
        codes = jnp.argmin(distances, -1)
        nearest = jnp.take(table, codes, axis=0)
        axes, still = tuple(range(1, x.ndim)), jax.lax.stop_gradient
        commitment = jnp.mean(jnp.square(still(nearest) - x), axes)
        if self.moving:
            loss = self.beta * commitment
        else:
            codebook = jnp.mean(jnp.square(nearest - still(x)), axes)
            loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        counts = code_counts(codes, self.codebook_size)
        metrics = {"perplexity": perplexity(counts), "mean_distance": still(distances.mean())}
        return Quantized(straight_through(nearest, x), codes[..., None].astype(jnp.int32), loss, metrics)


@flax.struct.dataclass
class CodebookAverages:
    """Moving averages of how often each code is used, and of the sum of what it stands for (VQ-VAE, appendix A.1)."""

    counts: Float[Array, " codes"]
    sums: Float[Array, "codes features"]

    @classmethod
    def init(cls, table: Float[Array, "codes features"], count: float = 1.0) -> CodebookAverages:
        """Averages of a table as if each code had been used `count` times. (With SEED's 0, the vector of a code that is
        never used grows to about 1 / eps times its length.)"""
        return cls(jnp.full(len(table), count, jnp.float32), (count or 1.0) * table.astype(jnp.float32))

    def update(
        self, counts: Float[Array, " codes"], sums: Float[Array, "codes features"], decay: float = 0.99
    ) -> CodebookAverages:
        """The averages after a batch, whose counts and sums are those of `assigned_sums`."""
        return CodebookAverages(decay * self.counts + (1 - decay) * counts, decay * self.sums + (1 - decay) * sums)

    def table(self, eps: float = 1e-5) -> Float[Array, "codes features"]:
        """sums / N, where N is the smoothed count (N_i + eps) / (n + codes eps) n with n the sum of all N_i."""
        total = self.counts.sum()
        smoothed = (self.counts + eps) / (total + len(self.counts) * eps) * total
        return self.sums / smoothed[:, None]


def assigned_sums(
    x: Float[Array, "*batch features"],
    codes: Int[Array, "*batch 1"],
    size: int,
    mask: Float[Array, "*batch"] | None = None,
) -> tuple[Float[Array, " codes"], Float[Array, "codes features"]]:
    """How often each of `size` codes occurs, and the sum of the vectors that it stands for."""
    x, flat = x.astype(jnp.float32).reshape(-1, x.shape[-1]), codes.reshape(-1)
    weights = jnp.ones(len(x)) if mask is None else mask.reshape(-1)
    counts = jnp.zeros(size, jnp.float32).at[flat].add(weights)
    return counts, jnp.zeros((size, x.shape[-1]), jnp.float32).at[flat].add(x * weights[:, None])


def gumbel_temperature(step: Any) -> Float[Array, ""]:
    """tau(step) = max(1/16, 1 - step / 160,000)."""
    return jnp.maximum(1 / 16, 1 - jnp.asarray(step, jnp.float32) / 160_000)


class GumbelQuantizer(Codebook):
    """Replaces a vector by a softmax over K learned ones, with Gumbel noise, or by a single one of them if it is hard.

    L = kl_weight times the mean over positions of sum_n q_n log(K q_n), with q without noise.
    """

    hard: bool = False
    """Whether it is hard in training too; outside of training it always is."""
    kl_weight: float = 5e-4
    param_dtype: Any = jnp.float32

    def setup(self):
        self.proj = Conv(self.codebook_size, 1, padding=(0, 0), axis="channels", param_dtype=self.param_dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "d_model"))
        self.embedding = self.param("embedding", init, (self.codebook_size, self.features), self.param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch rows columns channels"],
        draws: Float[Array, "batch rows columns codes"] | None = None,
        *,
        temperature: Any = 1.0,
        train: bool = False,
    ) -> Quantized:
        """Quantises x. `draws` is standard Gumbel noise; None: no noise."""
        with jax.default_matmul_precision("highest"):
            logits = self.proj(x.astype(jnp.float32))
        y = jax.nn.softmax((logits if draws is None else logits + draws) / temperature, -1)
        codes = jnp.argmax(y, -1)
        if self.hard or not train:
            y = straight_through(jax.nn.one_hot(codes, self.codebook_size), y)
        q = jax.nn.softmax(logits, -1)
        divergence = jnp.sum(q * jnp.log(q * self.codebook_size + 1e-10), -1)
        vectors = jnp.einsum("...k,kd->...d", y, self.table(), precision="highest")
        metrics = {"perplexity": perplexity(code_counts(codes, self.codebook_size))}
        loss = self.kl_weight * divergence.mean((1, 2))
        return Quantized(vectors, codes[..., None].astype(jnp.int32), loss, metrics)


class BinaryQuantizer(nn.Module):
    """Independent bits, each with a learned vector; the result is the sum of the vectors of the bits that are 1.

    z = sigmoid(a) or tanh(a) of a linear map a, p = z or z/2 + 1/2. A bit is 1 where p > 1/2, or with probability p;
    its code is the bit, or 2 bit - 1 with tanh, and has the gradient of z.

    The loss is mean(s (1 - s)) with s = sigmoid(z), as in the authors' code, although z is an activation already: if z
    is a sigmoid, this loss pushes every bit towards 1. With `corrected` it is mean(p (1 - p)).
    """

    bits: int
    features: int
    sub_codes: int = 1
    tanh: bool = False
    corrected: bool = False
    param_dtype: Any = jnp.float32

    def setup(self):
        self.proj = Conv(self.bits, 1, padding=(0, 0), axis="channels", param_dtype=self.param_dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "d_model"))
        self.embedding = self.param("embedding", init, (self.bits, self.features), self.param_dtype)

    def activations(self, x: Float[Array, "batch rows columns channels"]) -> tuple[Array, Array]:
        """z and p, each [batch, rows, columns, bits]."""
        with jax.default_matmul_precision("highest"):
            a = self.proj(x.astype(jnp.float32))
        z = jnp.tanh(a) if self.tanh else jax.nn.sigmoid(a)
        return z, z / 2 + 0.5 if self.tanh else z

    def __call__(
        self,
        x: Float[Array, "batch rows columns channels"],
        draws: Float[Array, "batch rows columns bits"] | None = None,
        **options: Any,
    ) -> Quantized:
        """Quantises x. `draws` are uniform numbers: a bit is 1 if its number is below p; None: if p is above 1/2.
        Options, which other quantisers have, are ignored."""
        z, p = self.activations(x)
        bits = p > 0.5 if draws is None else draws < p
        code = straight_through(self._code(bits), z)
        s = p if self.corrected else jax.nn.sigmoid(z)
        loss = jnp.mean(s * (1 - s), (1, 2, 3))
        metrics = {"bits_set": jnp.mean(bits, dtype=jnp.float32)}
        return Quantized(self._vectors(code), pack_bits(bits, self.sub_codes), loss, metrics)

    def embed(self, codes: Int[Array, "batch rows columns sub_codes"]) -> Float[Array, "batch rows columns features"]:
        return self._vectors(self._code(unpack_bits(codes, self.bits)))

    def _code(self, bits: Array) -> Float[Array, "*shape bits"]:
        bits = bits.astype(jnp.float32)
        return 2 * bits - 1 if self.tanh else bits

    def _vectors(self, code: Float[Array, "*shape bits"]) -> Float[Array, "*shape features"]:
        table = gather(self.embedding.astype(jnp.float32), None, "d_model")
        return jnp.einsum("...k,kd->...d", code, table, precision="highest")


@dataclasses.dataclass(frozen=True)
class FiniteScalars:
    """FSQ (arXiv 2309.15505): each number of a vector is bounded and rounded to one of a few levels; no codebook.

    With L levels, h = (L - 1)(1 + 1e-3) / 2, o = 1/2 if L is even, else 0, and w = floor(L / 2),

        bound(z) = tanh(z + atanh(o / h)) h - o,   code = round(bound(z)) / w,   id = sum_i (round_i + w_i) basis_i,

    with basis = (1, L_1, L_1 L_2, ...), so that the first number changes fastest. Rounding is half to even, and the
    gradient passes through it. Quantising a code again does not give it back in general, as `bound` shrinks.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels is {self.levels}; it must have at least one number, and each must be 2 or more.")
        if self.size > 2**31 - 1:
            raise ValueError(f"levels is {self.levels}, whose product is {self.size}; it must be below 2^31.")

    @property
    def size(self) -> int:
        """The number of codes."""
        return math.prod(self.levels)

    @property
    def basis(self) -> Int[np.ndarray, " scalars"]:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    @property
    def _halves(self) -> Int[np.ndarray, " scalars"]:
        return np.array(self.levels, np.int32) // 2

    def bound(self, z: Float[Array, "*shape scalars"]) -> Float[Array, "*shape scalars"]:
        """z in the range of the levels, in float32, before rounding."""
        levels = np.array(self.levels, np.float32)
        half = (levels - 1) * np.float32(1 + 1e-3) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0).astype(np.float32)
        return jnp.tanh(z.astype(jnp.float32) + np.arctanh(offset / half)) * half - offset

    def quantize(
        self, z: Float[Array, "*shape scalars"], rounds: Bool[Array, ...] | bool = True
    ) -> Float[Array, "*shape scalars"]:
        """Codes in [-1, 1], with the gradient of the bounded vectors.

        Args:
          rounds: where to round; elsewhere codes stay bounded vectors (the authors' `drop_quant_p`). It broadcasts.
        """
        bounded = self.bound(z)
        return straight_through(jnp.where(rounds, jnp.round(bounded), bounded), bounded) / self._halves

    def ids(self, codes: Float[Array, "*shape scalars"]) -> Int[Array, "*shape"]:
        """The numbers of codes, which are rounded to whole levels first."""
        digits = jnp.round(codes.astype(jnp.float32) * self._halves).astype(jnp.int32) + self._halves
        return jnp.sum(digits * self.basis, -1)

    def codes(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape scalars"]:
        """The codes of these numbers; it inverts `ids`."""
        digits = ids[..., None] // self.basis % np.array(self.levels, np.int32)
        return (digits - self._halves).astype(jnp.float32) / self._halves


def corrupted(
    codes: Float[Array, "batch positions scalars"],
    scalars: FiniteScalars,
    rng: jax.Array,
    *,
    share: tuple[float, float],
    probability: float = 0.2,
) -> Float[Array, "batch positions scalars"]:
    """Codes in which a share of the positions have a random code instead, without gradient (the authors'
    `corrupt_tokens_p`).

    Args:
      share: the least and the greatest share of an image's positions; each image draws its own.
      probability: that of an image to be corrupted at all. (In the authors' code, this and the share are drawn once for
        a whole batch, although it says of both that they are drawn for each sample.)
    """
    chosen, of_image, where, what = jax.random.split(rng, 4)
    batch, positions = codes.shape[:2]
    shares = jax.random.uniform(of_image, (batch, 1), minval=share[0], maxval=share[1])
    shares = jnp.where(jax.random.bernoulli(chosen, probability, (batch, 1)), shares, 0.0)
    random = scalars.codes(jax.random.randint(what, (batch, positions), 0, scalars.size))
    return jnp.where((jax.random.uniform(where, (batch, positions)) < shares)[..., None], random, codes)
