"""ELM's masked model: all codes of an image are predicted from those that are not masked, and drawn in a few rounds.

    [cond x t ; tokens by position and sub-code], blocks without a causal mask, one table of V codes and the mask
    u = LayerNorm(gelu(W norm(h) + b));  logits = u E^T + bias, with the table E held still in this product

The sub-codes of a position are masked together. In training, a step j of T is drawn for the batch, and floor(N rate)
positions of each image are masked, rate = cos(pi j / 2T). To draw images, the T rounds of MaskGIT (arXiv 2202.04200)
begin with everything masked; each round draws all masked codes from the guided logits, and masks the least certain ones
again. The authors' table also has a row and a bias for the mask as a target; nothing uses them, so they are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.nn.activations import gelu
from jaxtok.nn.losses import by_parts, cross_entropy, mean
from jaxtok.nn.norms import Norm
from jaxtok.protocols import Batch, Data, OnProgress, Params, Sums, Task
from jaxtok.vision.elm import (
    ElmBase,
    ElmConfig,
    ModelOfCodes,
    attention_weights,
    check_data,
    code_metrics,
    published,
)
from jaxtok.vision.elm_sampling import check_guidance, choose, class_ids

MASK_SCHEDULES = {"cos": lambda r: np.cos(math.pi / 2 * r), "linear": lambda r: 1 - r}
"""The fraction of an image that is masked at r, which goes from 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedElmConfig(ElmConfig):
    """The masked model; defaults: L on one code of 16 bits, as released."""

    sub_codes: int = 1
    code_bits: int = 16
    causal: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.causal:
            raise ValueError("causal is True; it must be False, as the masked model sees all positions.")
        if self.modulation:
            raise ValueError("modulation is True; it must be False, as the masked model has none.")

    def rotation(self) -> Float[np.ndarray, "places pairs 2"]:
        """The rotation of the autoregressive model, with each row repeated for every sub-code."""
        return np.repeat(super().rotation(), self.sub_codes, axis=0)

    def flops(self) -> float:
        """Forward FLOPs of one image: blocks and head."""
        length = self.sub_codes * (self.positions + 1)
        head = 2 * self.d_model * (self.d_model + self.codebook)
        return length * self.stack_flops(length) + self.sub_codes * self.positions * head


class MaskedElm(ElmBase):
    """Maps codes, a class and a mask to the logits of all codes."""

    config: MaskedElmConfig

    def setup(self):
        super().setup()
        cfg = self.config
        self.embedding = self.table("embedding", (cfg.codebook, cfg.d_model), ("vocab", "d_model"))
        self.mask_embedding = self.table("mask_embedding", (1, cfg.d_model), (None, "d_model"))
        self.head_dense = self.linear(cfg.d_model, ("d_model", "channels"), cfg.init_std, True)
        self.head_norm = Norm("layernorm", eps=1e-5, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        self.head_bias = self.param("head_bias", bias, (cfg.codebook,), cfg.param_dtype)

    def __call__(
        self,
        codes: Int[Array, "batch positions sub_codes"],
        labels: Int[Array, " batch"],
        masked: Bool[Array, "batch positions"],
        deterministic: bool = True,
    ) -> Float[Array, "batch positions sub_codes vocab"]:
        """Logits in float32 of every sub-code, from the class and the positions that are not masked."""
        return _logits(self.states(codes, labels, masked, deterministic), *self.target_table()).reshape(
            *codes.shape, -1
        )

    def nats(
        self,
        codes: Int[Array, "batch positions sub_codes"],
        labels: Int[Array, " batch"],
        masked: Bool[Array, "batch positions"],
        deterministic: bool = True,
        smoothing: float = 0.0,
        hamming: int = 0,
    ) -> Float[Array, "batch positions sub_codes"]:
        """-log p of each sub-code, masked or not, with smoothed labels; or, without smoothing, the mean over the codes
        up to the Hamming distance `hamming`, weighted by `hamming_weights`."""
        cfg, table = self.config, self.target_table()
        hidden = self.states(codes, labels, masked, deterministic)

        def part(hidden, codes):
            logits = _logits(hidden, *table)
            if not hamming:
                return cross_entropy(logits, codes, smoothing)
            weights = hamming_weights(codes, cfg.code_bits, hamming)
            return jax.nn.logsumexp(logits, -1) - jnp.sum(weights * logits, -1)

        chunk = cfg.loss_chunk * cfg.sub_codes
        return by_parts(part, chunk, hidden, codes.reshape(len(codes), -1)).reshape(codes.shape)

    def states(self, codes, labels, masked, deterministic: bool = True) -> Float[Array, "batch places d_model"]:
        """The vectors by which the table is multiplied, for all sub-codes in the order of positions."""
        cfg = self.config
        batch, t = len(codes), cfg.sub_codes
        if codes.shape[1:] != (cfg.positions, t):
            raise ValueError(
                f"an image has {codes.shape[1]} x {codes.shape[2]} codes, but the model's grid of {cfg.grid} x "
                f"{cfg.grid} positions with {t} sub-codes has {cfg.positions} x {t}."
            )
        x = jnp.take(self.embedding, codes.reshape(batch, -1), axis=0)
        x = jnp.where(jnp.repeat(masked, t, axis=1)[..., None], self.mask_embedding, x)
        x = jnp.concatenate([jnp.repeat(self.embed_class(labels, deterministic), t, axis=1), x], axis=1)
        x = self.embedding_dropout(constrain(x, "d_model"), deterministic)
        x, _ = self.stack(x, None, deterministic=deterministic)
        return self.head_norm(gelu(self.head_dense(self.final_norm(x)[:, t:])))

    def target_table(self) -> tuple[Array, Array]:
        """The table without its gradient, and the bias."""
        return jax.lax.stop_gradient(self.embedding), self.head_bias


def hamming_weights(codes: Int[Array, "*batch"], code_bits: int, distance: int) -> Float[Array, "*batch vocab"]:
    """exp(-3 h) for the codes that differ from `codes` in h <= distance bits, divided by their sum."""
    differing = jnp.bitwise_xor(jnp.asarray(codes)[..., None], jnp.arange(2**code_bits))
    h = jax.lax.population_count(differing).astype(jnp.float32)
    weights = jnp.where(h <= distance, jnp.exp(-3 * h), 0.0)
    return weights / weights.sum(-1, keepdims=True)


def _logits(hidden, table, bias):
    logits = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
    return constrain(logits + bias.astype(jnp.float32), "vocab")


def init_params(config: MaskedElmConfig, rng: jax.Array) -> Params:
    """All parameters as plain arrays."""
    codes = jnp.zeros((1, config.positions, config.sub_codes), jnp.int32)
    masked = jnp.zeros(codes.shape[:2], bool)
    return nn.meta.unbox(MaskedElm(config).init(rng, codes, jnp.zeros(1, jnp.int32), masked)["params"])


def mask_counts(positions: int, at: Float[np.ndarray, " steps"], schedule: str) -> Int[np.ndarray, " steps"]:
    """How many positions are masked at each r: max(1, floor(N rate(r))), in float64, as in the authors' NumPy."""
    return np.maximum(1, np.floor(positions * MASK_SCHEDULES[schedule](np.asarray(at, np.float64)))).astype(np.int32)


def mask_lowest(values: Float[Array, "batch positions"], count: Int[Array, " ..."]) -> Bool[Array, "batch positions"]:
    """True at exactly the `count` lowest values of each row (of equal ones, the first)."""
    ranks = jnp.argsort(jnp.argsort(values, axis=1), axis=1)
    return ranks < jnp.broadcast_to(count, (len(values),))[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedElmModeling(ModelOfCodes, Task):
    """Trains the masked model, and draws images from it, on batches of codes, as `ElmModeling`."""

    counted = "images"

    model: MaskedElmConfig
    rounds: int = 12
    """The number of steps of the schedule of masks (T)."""
    mask_schedule: Literal["cos", "linear"] = "cos"
    """How fast the masked part of an image shrinks."""
    mask_per_image: bool = False
    """Whether a step is drawn for each image, instead of one for the batch. (The authors' option of this kind reverses
    the schedule after 10,000 updates; here it stays.)"""
    label_smoothing: float = 0.0
    hamming: int = 0
    """The largest Hamming distance of targets; 0: the targets are the codes. If it is positive, all codes up to it are
    targets, with `hamming_weights`, at all positions, masked or not, and without smoothing (the authors call it
    useless)."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1.")
        if self.mask_schedule not in MASK_SCHEDULES:
            raise ValueError(f"mask_schedule is {self.mask_schedule!r}; it must be one of {', '.join(MASK_SCHEDULES)}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1).")
        if self.hamming < 0:
            raise ValueError(f"hamming is {self.hamming}; it must be 0 or more.")

    def module(self) -> MaskedElm:
        return MaskedElm(self.model)

    def fit(self, data: Data, train: Any = None) -> MaskedElmModeling:
        """The task itself. Raises ValueError if the data do not fit the model (`jaxtok.vision.elm.check_data`)."""
        check_data(self.model, data)
        return self

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        masked = jnp.zeros(batch["codes"].shape[:2], bool)
        return self.module().init(rng, batch["codes"], batch["labels"], masked)["params"]

    def counts(self) -> Int[np.ndarray, " rounds"]:
        """The number of masked positions at each step of the schedule."""
        return mask_counts(self.model.positions, np.arange(self.rounds) / self.rounds, self.mask_schedule)

    def draw_mask(self, rng: jax.Array, images: int) -> Bool[Array, "batch positions"]:
        """A random mask for each image, with exactly as many positions as a step of the schedule, drawn too, has."""
        steps, noise = jax.random.split(rng)
        step = jax.random.randint(steps, (images,) if self.mask_per_image else (), 0, self.rounds)
        return mask_lowest(jax.random.uniform(noise, (images, self.model.positions)), jnp.asarray(self.counts())[step])

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        of_mask, of_dropout = jax.random.split(rng)
        masked = self.draw_mask(of_mask, len(batch["codes"]))
        total, count = self.masked_nats(params, batch, masked, of_dropout)
        places = {"masked": masked.sum(dtype=jnp.float32), "places": jnp.float32(masked.size)}
        return {"nats": total, "count": count} | places

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross entropy in nats over the masked sub-codes of the whole batch; also logs the masked fraction."""
        return mean(sums["nats"], sums["count"]), {"masked": sums["masked"] / sums["places"]}

    def masked_nats(
        self,
        params: Params,
        batch: Batch,
        masked: Bool[Array, "batch positions"],
        rng: jax.Array | None = None,
        plain: bool = False,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum of nats, and the number of sub-codes that it is over.

        Args:
          rng: a key for dropout; None: there is no dropout.
          plain: whether smoothed and soft targets are off.
        """
        nats = self.module().apply(
            {"params": params},
            batch["codes"],
            batch["labels"],
            masked,
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
            smoothing=0.0 if plain else self.label_smoothing,
            hamming=0 if plain else self.hamming,
            method="nats",
        )
        everywhere = self.hamming and not plain
        counted = (jnp.ones_like(masked) if everywhere else masked)[..., None] * batch["mask"][:, None, None]
        counted = jnp.broadcast_to(counted, nats.shape)
        return jnp.sum(nats * counted), jnp.sum(counted)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The sums under masks as in training, without smoothed and soft targets."""
        nats, count = self.masked_nats(params, batch, self.draw_mask(rng, len(batch["codes"])), plain=True)
        return {"nats": nats, "count": count, "images": jnp.sum(batch["mask"])}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """loss (nats per masked sub-code), nats_per_position, and examples, the number of images."""
        return code_metrics(sums, self.model.sub_codes)

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """See `Task.evaluate`; the default key is that of seed 0."""
        return super().evaluate(params, batches, jax.random.key(0) if rng is None else rng, **options)

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three times the forward pass."""
        return 3 * len(batch["codes"]) * self.model.flops()

    @property
    def sampling(self) -> type[MaskedSampling]:
        return MaskedSampling

    def draw(
        self,
        params: Params,
        conditions: Sequence[int | None],
        rng: jax.Array,
        *,
        sampling: MaskedSampling | None = None,
        on_progress: OnProgress | None = None,
    ) -> Int[Array, "batch positions sub_codes"]:
        """The codes of an image of each class (None: no class), by `generate`; progress is after each round."""
        sampling = MaskedSampling() if sampling is None else sampling
        return generate(self.model, params, conditions, sampling=sampling, rng=rng, on_progress=on_progress)

    def attention_maps(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> Float[Array, "layers batch heads places places"]:
        """The attention of each place of an image to the others, without the class (rows sum to 1).

        The places are all sub-codes in the order of positions. Half of the positions are masked, by the key.
        """
        return _attention_maps(self, params, batch["codes"], batch["labels"], rng)

    def attention_cells(self) -> Int[np.ndarray, "places 2"]:
        """The row and column of each place of `attention_maps`."""
        return np.repeat(self.model.cells(), self.model.sub_codes, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _attention_maps(task: MaskedElmModeling, params, codes, labels, rng):
    masked = jax.random.bernoulli(rng, 0.5, codes.shape[:2])
    _, state = task.module().apply({"params": params}, codes, labels, masked, method="states", mutable="intermediates")
    return attention_weights(task.model, state["intermediates"], skipped=task.model.sub_codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSampling:
    """How images are drawn."""

    rounds: int = 12
    """The number of passes through the model that draw an image (T)."""
    guidance: float = 3.0
    """The scale s of the guidance; 1 means none."""
    schedule: Literal["constant", "linear", "powercos"] = "linear"
    """How the guidance rises: with r = (j + 1) / T in round j it is s, or 1 + (s - 1) r, or
    1 + (s - 1) (1 - cos(pi r^power)) / 2."""
    power: float = 1.0
    """The exponent in `powercos`."""
    noise: float = 4.0
    """The scale of the Gumbel noise (times 1 - r) on the confidence of each draw; 0 means none. (The authors call it
    temperature; codes are drawn at temperature 1.)"""
    mask_schedule: Literal["cos", "linear"] = "cos"
    """How fast the masked part of an image shrinks."""
    remask: bool = False
    """Whether, in the first half of the rounds, a known code may be masked again if another one was drawn for it."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1.")
        if self.schedule not in ("constant", "linear", "powercos"):
            raise ValueError(f"schedule is {self.schedule!r}; it must be one of constant, linear, powercos.")
        if self.mask_schedule not in MASK_SCHEDULES:
            raise ValueError(f"mask_schedule is {self.mask_schedule!r}; it must be one of {', '.join(MASK_SCHEDULES)}.")
        check_guidance(self.guidance, self.schedule)
        if not 0 <= self.noise < math.inf or not 0 < self.power < math.inf:
            raise ValueError(
                f"noise is {self.noise} and power {self.power}; noise must be 0 or more, and power positive."
            )

    def progress(self) -> Float[np.ndarray, " rounds"]:
        return np.arange(1, self.rounds + 1) / self.rounds

    def weights(self) -> Float[np.ndarray, " rounds"]:
        """The guidance of each round."""
        r = self.progress()
        part = {"constant": 1 + 0 * r, "linear": r, "powercos": (1 - np.cos(math.pi * r**self.power)) / 2}
        return (1 + (self.guidance - 1) * part[self.schedule]).astype(np.float32)

    def counts(self, positions: int) -> Int[np.ndarray, " rounds"]:
        """The number of positions masked after each round: it falls each time, down to one, which is drawn for good."""
        unknown, counts = positions, []
        for count in mask_counts(positions, self.progress(), self.mask_schedule):
            unknown = max(1, min(unknown - 1, int(count)))
            counts.append(unknown)
        return np.array(counts, np.int32)


def generate(
    config: MaskedElmConfig,
    params: Params,
    labels: Sequence[int | None] | np.ndarray,
    *,
    sampling: MaskedSampling = MaskedSampling(),
    rng: jax.Array | None = None,
    draws: tuple[Float[np.ndarray, "rounds batch places"], Float[np.ndarray, "rounds batch positions sub_codes"]]
    | None = None,
    on_progress: OnProgress | None = None,
) -> Int[Array, "batch positions sub_codes"]:
    """Codes of images of these classes.

    Args:
      labels: a class for each image; None is no class.
      rng: a key; needed unless there are draws.
      draws: recorded uniforms for the codes of each round, and standard Gumbel numbers for the confidence.
      on_progress: called after each round with the share of the rounds that are done.

    Raises:
      ValueError: a class is out of range, or there is no key.
    """
    return draw(config, params, class_ids(config, labels), sampling, rng, draws, on_progress)[0]


def draw(config, params, labels, sampling, rng=None, draws=None, on_progress=None):
    """As `generate`, from class ids; also returns the last round's guided logits [batch, positions, sub_codes, vocab].

    If progress is reported, each round is a compiled call of its own; else one call runs all rounds.
    """
    if rng is None and draws is None:
        raise ValueError("rng is None; give a key such as jax.random.key(0).")
    weights, rounds = sampling.weights(), np.arange(sampling.rounds)
    guided = bool((weights != 1).any())
    xs = (
        rounds,
        weights,
        (sampling.noise * (1 - sampling.progress())).astype(np.float32),
        sampling.counts(config.positions),
        sampling.remask & (rounds < sampling.rounds / 2),
        draws,
    )
    shape = (len(labels), config.positions, config.sub_codes)
    state = jnp.zeros(shape, jnp.int32), jnp.ones(shape[:2], bool), jnp.zeros((*shape, config.codebook), jnp.float32)
    calls = 1 if on_progress is None else sampling.rounds
    for number in range(calls):
        part = xs if on_progress is None else jax.tree.map(lambda x, n=number: x[n : n + 1], xs)
        state = _draw_rounds(config, guided, sampling.remask, params, labels, state, part, rng)
        if on_progress is not None:
            jax.block_until_ready(state)
            on_progress((number + 1) / calls)
    codes, _, logits = state
    return codes, logits


@functools.partial(jax.jit, static_argnames=("config", "guided", "remask"), donate_argnames="state")
def _draw_rounds(config, guided, remask, params, labels, state, xs, rng):
    """The state after some rounds: the codes, which positions of them are masked, and the last round's logits."""
    model, images = MaskedElm(config), len(labels)
    if guided:  # the rows of an image are neighbours, lest a mesh separate them
        labels = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], 1).reshape(-1)

    def both(x):
        return jnp.repeat(x, 2, axis=0) if guided else x

    def one_round(carry, x):
        codes, masked, _ = carry
        number, weight, noise, count, again, draws = x
        logits = model.apply({"params": params}, both(codes), labels, both(masked))
        if guided:
            logits = logits.reshape(images, 2, *logits.shape[1:])
            logits = logits[:, 1] + weight * (logits[:, 0] - logits[:, 1])
        if draws is None:
            keys = jax.random.split(jax.random.fold_in(rng, number))
            drawn, gumbel = choose(logits, keys[0]), jax.random.gumbel(keys[1], codes.shape)
        else:
            drawn, gumbel = choose(logits, None, draws[0].reshape(codes.shape)), draws[1]
        likely = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
        unknown = masked[..., None]
        doubted = unknown | (again & (drawn != codes)) if remask else unknown
        sure = jnp.where(doubted, likely, jnp.inf) + noise * gumbel
        codes = jnp.where(unknown, drawn, codes)
        return (codes, mask_lowest(sure.mean(-1), count), logits), None

    return jax.lax.scan(one_round, state, xs)[0]


def published_masked(size: str, **options: Any) -> MaskedElmConfig:
    """The masked model of a published size, on one code of 16 bits."""
    model = published(size, "1-16", **options)
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return MaskedElmConfig(**fields | {"causal": False})


PUBLISHED = {f"elm-masked-{size}": published_masked(size) for size in ("b", "l", "xl", "xxl")}
"""The published sizes; the authors released weights of all but the first."""
