"""Draws images from ELM: guidance by a schedule, top-k and top-p, given beginnings, and images beyond the square.

At step n of M new positions, with r = (n + 1) / M and the scale s, logits are l_null + w_n (l_class - l_null), where

    constant  s                          cos          1 + (s - 1) sin(pi r / 2)
    linear    1 + (s - 1) r              log          1 + (s - 1) ln(1 + r (e - 1))
    square    1 + (s - 1) r^2            square_root  1 + (s - 1) sqrt(n / M), which begins at 1

then `jaxtok.decoding.Sampling` restricts them, and each sub-code is drawn independently. The authors' code computes
everything again for each position; here the engine of `jaxtok.decoding` runs over positions, with a key-value cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.decoding.engine import Engine
from jaxtok.decoding.sampling import Sampling, sampling_key
from jaxtok.nn.cache import KVCache
from jaxtok.protocols import OnProgress, Params
from jaxtok.vision.elm import ElmConfig

SCHEDULES = {
    "constant": lambda r, _: np.ones_like(r),
    "linear": lambda r, _: r,
    "cos": lambda r, _: np.sin(math.pi * r / 2),
    "log": lambda r, _: np.log(1 + r * (math.e - 1)),
    "square": lambda r, _: r**2,
    "square_root": lambda r, steps: np.sqrt(np.maximum(r - 1 / steps, 0)),
}
"""How far the guidance is on its way from 1 to its scale, from 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElmSampling(Sampling):
    """How codes are drawn; defaults: the authors' for 2-10."""

    top_k: int = 1000
    """Only the k most likely values of a sub-code; 0: all."""
    guidance: float = 4.0
    """The scale s of the guidance; 1 means none."""
    schedule: Literal["constant", "linear", "cos", "log", "square", "square_root"] = "linear"
    """How the guidance rises over the positions of the image."""

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        check_guidance(self.guidance, self.schedule)

    def weights(self, steps: int) -> Float[np.ndarray, " steps"]:
        """The guidance w_n at each of `steps` new positions."""
        part = SCHEDULES[self.schedule](np.arange(1, steps + 1) / steps, steps)
        return (1 + (self.guidance - 1) * part).astype(np.float32)


def check_guidance(scale: float, schedule: str) -> None:
    """Warns if a schedule falls instead of rising.

    Raises:
      ValueError: the scale is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance is {scale}; it must be a finite number (1 is none).")
    if scale < 1 and schedule != "constant":
        warnings.warn(
            f"guidance is {scale}, below 1, so the schedule {schedule!r} falls instead of rising.", stacklevel=3
        )


def class_ids(config: Any, labels: Sequence[int | None] | np.ndarray) -> Int[np.ndarray, " batch"]:
    """The rows of the class embedding of a model with `num_classes` for these classes; None is no class.

    Raises:
      ValueError: there is no label, or one is out of range.
    """
    ids = np.array([config.num_classes if label is None else label for label in labels])
    known = np.array([label is not None for label in labels], bool)
    if not ids.size or ids.ndim != 1:
        raise ValueError("there is no label; give a class for each image.")
    if not np.issubdtype(ids.dtype, np.integer) or ((ids < 0) | (ids >= config.num_classes))[known].any():
        outside = (x for x in ids[known] if not (x == int(x) and 0 <= x < config.num_classes))
        wrong = next(outside, ids[known][0])  # numbers of another type
        raise ValueError(
            f"a label is {wrong}; classes are 0 to {config.num_classes - 1}, as integers (None is no class)."
        )
    return ids.astype(np.int32)


def check_codes(config: ElmConfig, codes: np.ndarray, what: str) -> Int[np.ndarray, "batch length sub_codes"]:
    """The codes as int32.

    Raises:
      ValueError: they have another shape than the model's or more positions, or one is out of range.
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
    on_progress: OnProgress | None = None,
) -> Int[Array, "batch positions sub_codes"]:
    """Codes of images of these classes. A row depends on its class, on `rng` and on its number in the batch only.

    Args:
      labels: a class for each image; None is no class.
      rng: a key; needed unless there are uniforms or the temperature is 0.
      prefix: codes of the first positions of each image.
      new: the number of positions to draw; default: all that are left. The schedule of the guidance runs over these.
      uniforms: recorded draws u from [0, 1): a sub-code is the number of cumulative probabilities that are u or less.
      on_progress: called after each row of the grid with the share of the new positions that are made.

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
            f"new is {new} after a prefix of {prefix.shape[1]} positions; it must be at least 1, and an image has "
            f"{config.positions} positions."
        )
    if len(prefix) != len(ids):
        raise ValueError(f"there are {len(ids)} labels, but the prefix has {len(prefix)} images.")
    if uniforms is not None and np.shape(uniforms) != (new, config.sub_codes, len(ids)):
        raise ValueError(
            f"uniforms have the shape {np.shape(uniforms)}; they must be "
            f"[{new} positions, {config.sub_codes} sub-codes, {len(ids)} images]."
        )
    codes, _ = draw(
        config, params, ids, prefix, sampling, sampling.weights(new), rng, uniforms, on_progress=on_progress
    )
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
    on_progress: OnProgress | None = None,
) -> tuple[Int[Array, "batch positions sub_codes"], Float[Array, "batch sub_codes vocab"]]:
    """As `generate`, from guidance weights; also returns the logits from which the last position was drawn.

    Args:
      fixed: codes, and which of the new positions take them instead of drawn ones.
      on_progress: as in `generate`. Without it, one compiled call draws the whole images.
    """
    plain = Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    if uniforms is None:
        rng = sampling_key(rng, plain)
    engine = Engine(model=GuidedCodes(config, bool((weights != 1).any())), chooser=Drawing(plain))
    given, new = (labels, prefix, weights, rng, uniforms, fixed), len(weights)
    if on_progress is None:
        state = _draw(engine, params, given)
    else:
        state = begin(engine, params, given)
        for made in [*range(config.grid, new, config.grid), new]:
            state = engine.run(params, state, made)
            jax.block_until_ready(state.length)
            on_progress(made / new)
    return jnp.concatenate([prefix, state.text[:, 1:]], axis=1), state.chooser.last


@functools.partial(jax.jit, static_argnames="engine")
def begin(engine, params, given):
    """The engine's state before the first new position."""
    labels, prefix, weights, rng, uniforms, fixed = given
    config = engine.model.config
    state = engine.model.start(params, labels, prefix, weights)
    newest = prefix[:, -1:] if prefix.shape[1] else jnp.zeros((len(labels), 1, config.sub_codes), jnp.int32)
    draws = Drawing.start(len(labels), config, uniforms, fixed)
    rng = jax.random.key(0) if rng is None else rng
    return engine.begin(state, newest, new=len(weights), rng=rng, chooser=draws)


@functools.partial(jax.jit, static_argnames="engine")
def _draw(engine, params, given):
    return engine.run(params, begin(engine, params, given))


@flax.struct.dataclass
class _State:
    """The state between two positions. With guidance, the rows of an image with and without its class are neighbours,
    lest a mesh separate them."""

    cache: KVCache
    condition: Float[Array, "rows 1 d_model"]
    weights: Float[Array, " new"]
    next_input: Int[Array, ""]
    """The number of the next input; the class is input 0."""
    made: Int[Array, ""]
    """The number of positions that have been drawn."""


@dataclasses.dataclass(frozen=True)
class GuidedCodes:
    """An ELM, or a model with its methods, as the `jaxtok.decoding.TokenModel` of images. A token is the sub-codes of a
    position."""

    config: Any
    guided: bool

    def start(
        self,
        params: Params,
        labels: Int[Array, " batch"],
        prefix: Int[Array, "batch given sub_codes"],
        weights: Float[Array, " new"],
    ) -> _State:
        """The state after all inputs (the class and the prefix) except the last, with each new position's guidance."""
        config, given, apply = self.config, prefix.shape[1], self._apply(params)
        if self.guided:
            labels = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], 1).reshape(-1)
        condition = apply("embed_class", labels)
        cache = config.module().init_cache(len(labels), given + len(weights))
        if given:
            inputs = jnp.concatenate([condition, apply("embed", self._both(prefix[:, :-1]))], axis=1)
            _, cache = apply("hidden", inputs, condition, cache=cache)
        return _State(cache, condition, jnp.asarray(weights), jnp.int32(given), jnp.int32(0))

    def step(self, params: Params, codes, state: _State, live):
        apply = self._apply(params)
        x = jnp.where(state.next_input == 0, state.condition, apply("embed", self._both(codes[:, None])))
        hidden, cache = apply("hidden", x, state.condition, first=state.next_input, cache=state.cache)
        logits = constrain(apply("head", hidden)[:, 0], None, "vocab")
        if self.guided:
            logits = logits.reshape(len(codes), 2, *logits.shape[1:])
            logits = logits[:, 1] + state.weights[state.made] * (logits[:, 0] - logits[:, 1])
        return logits, state.replace(cache=cache, next_input=state.next_input + 1, made=state.made + 1), live

    def _both(self, x):
        return jnp.repeat(x, 2, axis=0) if self.guided else x

    def _apply(self, params):
        model = self.config.module()
        return lambda method, *args, **options: model.apply({"params": params}, *args, method=method, **options)


@flax.struct.dataclass
class _Draws:
    """The draws that are given for each row; None: not given."""

    number: Int[Array, " batch"]
    uniforms: Float[Array, "batch new sub_codes"] | None
    known: Int[Array, "batch new sub_codes"] | None
    is_known: Bool[Array, "batch new"] | None
    last: Float[Array, "batch sub_codes vocab"]
    """The logits from which the last position was drawn."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A `jaxtok.decoding.Chooser` that can be given the uniforms of its draws, or the outcomes at some positions."""

    sampling: Sampling

    @property
    def draws(self) -> bool:
        return self.sampling.draws

    @staticmethod
    def start(batch: int, config: Any, uniforms, fixed) -> _Draws:
        known, where = (None, None) if fixed is None else fixed
        return _Draws(
            number=jnp.zeros(batch, jnp.int32),
            uniforms=None if uniforms is None else jnp.transpose(jnp.asarray(uniforms), (2, 0, 1)),
            known=None if known is None else jnp.asarray(known),
            is_known=None if where is None else jnp.broadcast_to(jnp.asarray(where), (batch, len(where))),
            last=jnp.zeros((batch, config.sub_codes, config.codebook), jnp.float32),
        )

    def choose(self, logits, keys, state: _Draws):
        rows, number = jnp.arange(len(logits)), state.number
        restricted = self.sampling.restrict(logits)
        if state.uniforms is None:
            codes, _ = self.sampling.choose(logits, keys)
        else:
            codes = choose(restricted, None, state.uniforms[rows, number])
        if state.known is not None:
            codes = jnp.where(state.is_known[rows, number][:, None], state.known[rows, number], codes)
        last = jnp.where(jnp.isfinite(restricted), logits / (self.sampling.temperature or 1.0), -jnp.inf)
        return codes, state.replace(number=number + 1, last=last)


def choose(
    logits: Float[Array, "batch ... vocab"],
    rng: jax.Array | None,
    uniform: Float[Array, "batch ..."] | None = None,
) -> Int[Array, "batch ..."]:
    """A draw from softmax(logits) for each item, by a key of its own for each row, or by recorded uniforms."""
    if uniform is None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(logits)))
        return Sampling().choose(logits, keys)[0]
    probability = jax.nn.softmax(logits)
    index = jnp.sum(jnp.cumsum(probability, -1) <= uniform[..., None], -1)
    last = logits.shape[-1] - 1 - jnp.argmax(jnp.flip(probability > 0, -1), -1)  # the sum can be a little below 1
    return jnp.minimum(index, last).astype(jnp.int32)


Decode = Callable[[Int[Array, "batch positions sub_codes"]], Float[Array, "batch height width channels"]]
"""Maps the codes of whole images to pixels, as an image tokenizer's `decode` with its parameters."""


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
    """The codes of the next image, whose first rows or columns are the last `keep` ones of the image before.

    Downwards, the kept rows are a prefix. To the right, each row continues the rows above it and its kept columns, and
    the guidance's schedule begins anew in each row.

    Args:
      uniforms: as in `generate`; to the right, there is one for each position, and those of kept ones are not used.

    Raises:
      ValueError: as `generate`; or `keep` is not between 1 and the grid's side minus 1.
    """
    grid = config.grid
    if direction not in ("down", "right"):
        raise ValueError(f"direction is {direction!r}; it must be one of down, right.")
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
    """One picture made of two; the first `overlap` pixels of the second fade linearly over the last ones of the first.

    Raises:
      ValueError: the overlap is larger than one of the pictures.
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
    """Pictures that continue beyond the square, `times` times, as in the paper's examples. Each image
    overlaps the one before by `keep` rows or columns of codes, where the two are blended. Pixels are as `decode` makes
    them (not clipped).

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
