"""Images from ELM: guidance by a schedule, top-k and top-p, beginnings of images, and images beyond the square.

At step n of M new positions, with r = (n + 1) / M and the scale s, logits are l_null + w_n (l_class - l_null), where

    constant  s                          cos          1 + (s - 1) sin(pi r / 2)
    linear    1 + (s - 1) r              log          1 + (s - 1) ln(1 + r (e - 1))
    square    1 + (s - 1) r^2            square_root  1 + (s - 1) sqrt(n / M), which begins at 1

then they are divided by the temperature, the top k and the top p are kept, and each sub-code is drawn on its own. The
authors' code computes everything again for each position; here one scan runs over positions, with a key-value cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.protocols import Params
from jaxtok.vision.elm import Elm, ElmConfig

SCHEDULES = {
    "constant": lambda r, _: np.ones_like(r),
    "linear": lambda r, _: r,
    "cos": lambda r, _: np.sin(math.pi * r / 2),
    "log": lambda r, _: np.log(1 + r * (math.e - 1)),
    "square": lambda r, _: r**2,
    "square_root": lambda r, steps: np.sqrt(np.maximum(r - 1 / steps, 0)),
}
"""How far the guidance is on its way from 1 to its scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElmSampling:
    """How codes are drawn; defaults: the authors' for 2-10."""

    guidance: float = 4.0
    """The scale s; 1: none."""
    schedule: Literal["constant", "linear", "cos", "log", "square", "square_root"] = "linear"
    """Over the positions of the image."""
    temperature: float = 1.0
    top_k: int | None = 1000
    """Only the k most likely values of a sub-code, and those as likely as the last of them; None: all."""
    top_p: float = 1.0
    """Of these, only the most likely ones that together have at least this probability; 1: all."""

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it can be {', '.join(SCHEDULES)}.")
        check_guidance(self.guidance, self.schedule)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive (top_k = 1 is greedy).")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1 (or None, for all).")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")

    def weights(self, steps: int) -> Float[np.ndarray, " steps"]:
        """The guidance w_n at each of so many new positions."""
        part = SCHEDULES[self.schedule](np.arange(1, steps + 1) / steps, steps)
        return (1 + (self.guidance - 1) * part).astype(np.float32)


def check_guidance(scale: float, schedule: str) -> None:
    """Warns where a schedule that should rise falls.

    Raises:
      ValueError: the scale is no number.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance is {scale}; it must be a finite number (1 is none).")
    if scale < 1 and schedule != "constant":
        warnings.warn(
            f"guidance is {scale}, below 1, so the schedule {schedule!r} falls instead of rising.", stacklevel=3
        )


def class_ids(config: ElmConfig, labels: Sequence[int | None] | np.ndarray) -> Int[np.ndarray, " batch"]:
    """The classes as the model's embedding has them; None is no class.

    Raises:
      ValueError: there is none, or one that is out of range.
    """
    ids = np.array([config.num_classes if label is None else label for label in labels])
    known = np.array([label is not None for label in labels], bool)
    if not ids.size or ids.ndim != 1:
        raise ValueError("there is no label; give a class for each image.")
    if not np.issubdtype(ids.dtype, np.integer) or ((ids < 0) | (ids >= config.num_classes))[known].any():
        wrong = next(x for x in ids[known] if not (x == int(x) and 0 <= x < config.num_classes))
        raise ValueError(f"a label is {wrong}; classes are 0 to {config.num_classes - 1} (None is no class).")
    return ids.astype(np.int32)


def check_codes(config: ElmConfig, codes: np.ndarray, what: str) -> Int[np.ndarray, "batch length sub_codes"]:
    """As int32.

    Raises:
      ValueError: another shape than the model's, more positions than it has, or an index that is out of range.
    """
    codes = np.asarray(codes)
    if codes.ndim != 3 or codes.shape[2] != config.sub_codes or codes.shape[1] > config.positions:
        raise ValueError(
            f"{what} has the shape {codes.shape}; it must be [batch, at most {config.positions} positions, "
            f"{config.sub_codes} sub-codes]."
        )
    if codes.size and not (codes.min() >= 0 and codes.max() < config.codebook):
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise ValueError(f"{what} has the code {wrong}; codes are 0 to 2^{config.code_bits} - 1.")
    return codes.astype(np.int32)


def generate(
    config: ElmConfig,
    params: Params,
    labels: Sequence[int | None] | np.ndarray,
    *,
    sampling: ElmSampling = ElmSampling(),
    rng: jax.Array | None = None,
    prefix: Int[np.ndarray, "batch given sub_codes"] | None = None,
    new: int | None = None,
    uniforms: Float[np.ndarray, "new sub_codes batch"] | None = None,
) -> Int[Array, "batch positions sub_codes"]:
    """Codes of images of these classes. A row depends on its class, `rng` and its place in the batch, not on others.

    Args:
      labels: a class for each image; None is no class.
      rng: a key; needed unless there are uniforms.
      prefix: codes of the first positions of each image.
      new: positions to make; default: all that are left. The schedule of the guidance runs over these.
      uniforms: recorded draws from [0, 1): a sub-code is the number of its values, in the order of their indices, up to
        which the probabilities sum to this or less.

    Raises:
      ValueError: a class, a code or a length is out of range; no key.
    """
    ids = class_ids(config, labels)
    prefix = np.zeros((len(ids), 0, config.sub_codes), np.int32) if prefix is None else prefix
    prefix = check_codes(config, prefix, "the prefix")
    left = config.positions - prefix.shape[1]
    new = left if new is None else new
    if not 1 <= new <= left:
        raise ValueError(
            f"{new} new positions behind a prefix of {prefix.shape[1]}; an image has {config.positions} positions."
        )
    if len(prefix) != len(ids):
        raise ValueError(f"there are {len(ids)} labels, but the prefix has {len(prefix)} images.")
    if uniforms is not None and np.shape(uniforms) != (new, config.sub_codes, len(ids)):
        raise ValueError(
            f"uniforms have the shape {np.shape(uniforms)}; they must be "
            f"[{new} positions, {config.sub_codes} sub-codes, {len(ids)} images]."
        )
    codes, _ = draw(config, params, ids, prefix, sampling, sampling.weights(new), rng, uniforms)
    return codes


def draw(
    config: ElmConfig,
    params: Params,
    labels: Int[np.ndarray, " batch"],
    prefix: Int[np.ndarray, "batch given sub_codes"],
    sampling: ElmSampling,
    weights: Float[np.ndarray, " new"],
    rng: jax.Array | None = None,
    uniforms: Float[np.ndarray, "new sub_codes batch"] | None = None,
    fixed: tuple[Int[np.ndarray, "batch new sub_codes"], Bool[np.ndarray, " new"]] | None = None,
) -> tuple[Int[Array, "batch positions sub_codes"], Float[Array, "batch sub_codes vocab"]]:
    """As `generate`, from guidance weights; also returns the last position's logits as they were drawn from.

    Args:
      fixed: codes, and at which of the new positions they are taken instead of drawn ones.
    """
    if rng is None and uniforms is None:
        raise ValueError("rng is None; give a key such as jax.random.key(0).")
    top_k = None if sampling.top_k is None or sampling.top_k >= config.codebook else sampling.top_k
    return _draw(
        config,
        top_k,
        sampling.top_p < 1,
        bool((weights != 1).any()),
        params,
        labels,
        prefix,
        (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)),
        weights,
        rng,
        uniforms,
        fixed,
    )


@functools.partial(jax.jit, static_argnames=("config", "top_k", "use_top_p", "guided"))
def _draw(config, top_k, use_top_p, guided, params, labels, prefix, limits, weights, rng, uniforms, fixed):
    """With guidance, the rows of an image with and without its class are neighbours, lest a mesh part them."""
    model, images, given, new = Elm(config), len(labels), prefix.shape[1], len(weights)
    temperature, top_p = limits

    def apply(method, *args, **options):
        return model.apply({"params": params}, *args, method=method, **options)

    def both(x):
        return jnp.repeat(x, 2, axis=0) if guided else x

    if guided:
        labels = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], 1).reshape(-1)
    condition = apply("embed_class", labels)
    inputs = jnp.concatenate([condition, apply("embed", both(prefix))], axis=1)
    cache = model.init_cache(len(labels), given + new)
    if given:
        _, cache = apply("hidden", inputs[:, :given], condition, cache=cache)

    def step(carry, xs):
        cache, x, _ = carry
        number, weight, uniform, known = xs
        hidden, cache = apply("hidden", x, condition, place=given + number, cache=cache)
        logits = constrain(apply("head", hidden)[:, 0], None, "vocab")
        if guided:
            logits = logits.reshape(images, 2, *logits.shape[1:])
            logits = logits[:, 1] + weight * (logits[:, 0] - logits[:, 1])
        logits = restrict(logits / temperature, top_k, top_p if use_top_p else None)
        codes = choose(logits, rng if uniform is not None else jax.random.fold_in(rng, number), uniform)
        if known is not None:
            codes = jnp.where(known[1], known[0], codes)
        return (cache, apply("embed", both(codes[:, None])), logits), codes

    if uniforms is not None:
        uniforms = jnp.swapaxes(uniforms, 1, 2)
    if fixed is not None:
        fixed = (jnp.swapaxes(fixed[0], 0, 1), fixed[1])
    last = jnp.zeros((images, config.sub_codes, config.codebook), jnp.float32)
    carry = (cache, inputs[:, given:], last)
    (_, _, last), codes = jax.lax.scan(step, carry, (jnp.arange(new), weights, uniforms, fixed))
    return jnp.concatenate([prefix, jnp.swapaxes(codes, 0, 1)], axis=1), last


def restrict(
    logits: Float[Array, "*batch vocab"], top_k: int | None, top_p: Float[Array, ""] | None
) -> Float[Array, "*batch vocab"]:
    """Minus infinity where a value is not among the k largest (ties with the last of them are kept), nor, of those,
    among the fewest that have the probability p together (at least one)."""
    if top_k is not None:
        logits = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][..., -1:], logits, -jnp.inf)
    if top_p is not None:
        ordered = jnp.flip(jnp.sort(logits, -1), -1)
        probability = jax.nn.softmax(ordered)
        needed = jnp.cumsum(probability, -1) - probability < top_p  # what is more likely is not enough
        needed = needed.at[..., 0].set(True)
        last = jnp.min(jnp.where(needed, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return logits


def choose(
    logits: Float[Array, "batch ... vocab"],
    rng: jax.Array | None,
    uniform: Float[Array, "batch ..."] | None = None,
) -> Int[Array, "batch ..."]:
    """A draw from softmax(logits) for each item, with a key of its own for each row; or from recorded uniforms."""
    if uniform is None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(logits)))
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    probability = jax.nn.softmax(logits)
    index = jnp.sum(jnp.cumsum(probability, -1) <= uniform[..., None], -1)
    last = logits.shape[-1] - 1 - jnp.argmax(jnp.flip(probability > 0, -1), -1)  # the sum can be a little below 1
    return jnp.minimum(index, last).astype(jnp.int32)


Decode = Callable[[Int[Array, "batch positions sub_codes"]], Float[Array, "batch height width channels"]]
"""Codes of whole images to pixels, as an image tokenizer's `decode` with its parameters."""


def extend(
    config: ElmConfig,
    params: Params,
    codes: Int[np.ndarray, "batch positions sub_codes"],
    labels: Sequence[int | None] | np.ndarray,
    *,
    direction: Literal["down", "right"],
    keep: int,
    sampling: ElmSampling = ElmSampling(),
    rng: jax.Array | None = None,
    uniforms: Float[np.ndarray, "draws sub_codes batch"] | None = None,
) -> Int[Array, "batch positions sub_codes"]:
    """The codes of the next image, which has the last `keep` rows or columns of the one before as its first.

    Downwards, the kept rows are a prefix. To the right, each row continues what is made above it and its kept columns,
    and the guidance's schedule begins anew in each row.

    Args:
      uniforms: as in `generate`; to the right, for all positions, of which the kept ones are not used.

    Raises:
      ValueError: as `generate`; or `keep` is no part of the grid.
    """
    grid = config.grid
    if direction not in ("down", "right"):
        raise ValueError(f"direction is {direction!r}; it can be down, right.")
    if not 0 < keep < grid:
        raise ValueError(f"keep is {keep}; it must be at least 1 and below the grid's {grid} rows and columns.")
    codes = check_codes(config, codes, "the image")
    if codes.shape[1] != config.positions:
        raise ValueError(f"the image has {codes.shape[1]} positions; it must have all {config.positions}.")
    if direction == "down":
        options = {"sampling": sampling, "rng": rng, "uniforms": uniforms}
        return generate(config, params, labels, prefix=codes[:, -keep * grid :], **options)
    ids, cells = class_ids(config, labels), codes.reshape(len(codes), grid, grid, -1)
    if len(ids) != len(codes):
        raise ValueError(f"there are {len(ids)} labels, but {len(codes)} images.")
    kept = np.roll(cells, keep, axis=2).reshape(codes.shape)  # its last columns first
    is_kept = np.tile(np.arange(grid) < keep, grid)
    weights = np.ones((grid, grid), np.float32)
    weights[:, keep:] = sampling.weights(grid - keep)
    nothing = np.zeros((len(ids), 0, config.sub_codes), np.int32)
    made, _ = draw(config, params, ids, nothing, sampling, weights.reshape(-1), rng, uniforms, (kept, is_kept))
    return made


def blend(
    first: Float[Array, "batch first_height first_width channels"],
    second: Float[Array, "batch second_height second_width channels"],
    overlap: int,
    direction: Literal["down", "right"],
) -> Float[Array, "batch height width channels"]:
    """One picture of two, the second's first `overlap` pixels over the first's last ones, faded linearly.

    Raises:
      ValueError: the overlap is larger than one of them.
    """
    axis = {"down": 1, "right": 2}[direction]
    if not 0 < overlap <= min(first.shape[axis], second.shape[axis]):
        raise ValueError(f"overlap is {overlap}; it must be at least 1 and at most the pictures' side.")
    edge = first.shape[axis] - overlap
    before, left = jnp.split(first, [edge], axis)
    right, after = jnp.split(second, [overlap], axis)
    shape = [1] * 4
    shape[axis] = overlap
    part = ((jnp.arange(overlap) + 0.5) / overlap).reshape(shape)
    return jnp.concatenate([before, (1 - part) * left + part * right, after], axis)


def expand(
    config: ElmConfig,
    params: Params,
    decode: Decode,
    codes: Int[np.ndarray, "batch positions sub_codes"],
    labels: Sequence[int | None] | np.ndarray,
    *,
    direction: Literal["down", "right"],
    times: int = 1,
    keep: int,
    sampling: ElmSampling = ElmSampling(),
    rng: jax.Array,
) -> Float[Array, "batch height width channels"]:
    """Pictures that go on beyond the square, `times` times: each next image overlaps the one before by `keep` rows or
    columns of codes, in whose place the two are blended. Pixels are as `decode` makes them (not clipped).

    Raises:
      ValueError: as `extend`.
    """
    picture = decode(codes)
    overlap = keep * picture.shape[1] // config.grid
    for number in range(times):
        key = jax.random.fold_in(rng, number)
        codes = np.asarray(
            extend(config, params, codes, labels, direction=direction, keep=keep, sampling=sampling, rng=key)
        )
        picture = blend(picture, decode(codes), overlap, direction)
    return picture
