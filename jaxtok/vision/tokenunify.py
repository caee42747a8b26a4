"""TokenUnify (arXiv 2405.16847): pre-training on volumes by predicting tokens in three ways, then affinities of voxels.

A token is a patch of voxels; K of them are in a crop, in raster order (z slowest). With x_i the tokens, M a random set
of floor(rho K) of them, and a squared error for a likelihood:

    random    x_i for i in M, from the rest
    next      x_i from x_<i
    next-all  x_j for all j >= i, from x_<i
    L(t) = a(t) L_random + b(t) L_next + c(t) L_next-all,   t in [0, 1] the share of training that is done

There are two forms of it, and a baseline (`objective`):

official     The authors' code has no causal pass. The tokens from a random n on are replaced (by noise or 0), and the
             network, which reads in both directions, sees the whole crop. "next-all" is the error of all voxels of the
             clean crop, and "next" that of token n by a head of its own. Random prediction is a run of its own there,
             whose weights start the next one.
paper        One causal direction (`PatchConfig.orders` 1): the state after token i - 1 predicts token i, and with the
             position of j, token j. The random term has its hidden tokens replaced, and sees what is before them.
autoencoder  A masked autoencoder (arXiv 2111.06377): hidden tokens are left out, a small decoder fills them in, and
             only they count. The U-net cannot leave tokens out; it sees them replaced.

The network (`model`) is the authors' U-net (`jaxtok.vision.segmamba`), or a plain row of patches (`PatchConfig`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxtok.nn.linear import Linear
from jaxtok.nn.losses import mean
from jaxtok.nn.mamba import METHODS, Mixer, MixerConfig
from jaxtok.nn.norms import Norm
from jaxtok.protocols import Batch, Data, Params, Sums, Task
from jaxtok.vision.affinities import Pad, affinities, balance, widen_borders
from jaxtok.vision.images import as_float
from jaxtok.vision.segmamba import NewVolume, SegMambaConfig, Size, Volume, check_crops, check_sizes, mixer_of

Tokens = Float[Array, "batch tokens pd ph pw"]
PHASES = ((0.3, (0.73, 0.18, 0.09)), (0.7, (0.18, 0.73, 0.09)), (1.0, (0.09, 0.18, 0.73)))
"""The end of each phase, and the weights of random, next and next-all in it."""
OBJECTIVES = ("official", "paper", "autoencoder")
SCHEDULES = ("phases", "random", "next", "next_all", "joint", "alternating")


# --------------------------------------------------------------------------------------------------------------- tokens


def tokenise(
    crops: Shaped[Array, "batch d h w *channels"], patch: Size
) -> Shaped[Array, "batch tokens pd ph pw *channels"]:
    """The patches of crops in raster order."""
    batch, *sides = crops.shape[:4]
    rest = crops.shape[4:]
    z, y, x = (side // p for side, p in zip(sides, patch))
    cut = crops.reshape(batch, z, patch[0], y, patch[1], x, patch[2], *rest)
    order = (0, 1, 3, 5, 2, 4, 6, *range(7, cut.ndim))
    return cut.transpose(order).reshape(batch, z * y * x, *patch, *rest)


def untokenise(
    tokens: Shaped[Array, "batch tokens pd ph pw *channels"], crop: Size
) -> Shaped[Array, "batch d h w *channels"]:
    """The inverse of `tokenise`."""
    batch, patch, rest = len(tokens), tokens.shape[2:5], tokens.shape[5:]
    z, y, x = (side // p for side, p in zip(crop, patch))
    cut = tokens.reshape(batch, z, y, x, *patch, *rest)
    order = (0, 1, 4, 2, 5, 3, 6, *range(7, cut.ndim))
    return cut.transpose(order).reshape(batch, *crop, *rest)


def replace_tokens(crops: Volume, hidden: Bool[Array, "batch tokens"], fill: Tokens | float, patch: Size) -> Volume:
    """Crops with these tokens replaced by `fill`, numbers of each token or one number."""
    tokens = tokenise(crops[..., 0], patch)
    tokens = jnp.where(hidden[..., None, None, None], fill, tokens)
    return untokenise(tokens, crops.shape[1:4])[..., None]


def random_set(rng: jax.Array, batch: int, tokens: int, count: Int[Array, " batch"]) -> Bool[Array, "batch tokens"]:
    """A random set of `count` tokens for each crop."""
    order = jnp.argsort(jax.random.uniform(rng, (batch, tokens)), -1)
    rank = jnp.argsort(order, -1)
    return rank < count[:, None]


# --------------------------------------------------------------------------------------------------------------- losses


def phase_weights(t: Float[Array, "*times"], blend: float = 0.0) -> Float[Array, "*times 3"]:
    """The weights of random, next and next-all at the share t of training.

    The paper says that they change smoothly, without the numbers; by default they change at once.

    Args:
      blend: the share of training around the end of a phase in which the weights go linearly to the next ones (ours).
    """
    t = jnp.asarray(t, jnp.float32)
    weights = jnp.broadcast_to(jnp.array(PHASES[0][1]), (*t.shape, 3))
    for (end, before), (_, after) in itertools.pairwise(PHASES):
        share = jnp.clip((t - end) / blend + 0.5, 0, 1) if blend else (t >= end).astype(jnp.float32)
        weights = weights + share[..., None] * (jnp.array(after) - jnp.array(before))
    return weights


def squared_error(prediction: Array, target: Array, where: Array | None = None) -> Float[Array, ""]:
    """The mean squared error over all entries, or over those of the leading positions where `where` is 1."""
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if where is None:
        return error.mean()
    where = jnp.broadcast_to(where.reshape(*where.shape, *(1,) * (error.ndim - where.ndim)), error.shape)
    return mean(jnp.sum(error * where), jnp.sum(where))


def next_all_error(
    prediction: Float[Array, "*batch tokens tokens entries"], tokens: Float[Array, "*batch tokens entries"]
) -> Float[Array, ""]:
    """The mean over the pairs (i, j >= i), with equal weights, of the error of token j as predicted before token i."""
    pairs = jnp.triu(jnp.ones((tokens.shape[-2],) * 2))
    target = jnp.broadcast_to(tokens[..., None, :, :], prediction.shape)
    return squared_error(prediction, target, jnp.broadcast_to(pairs, prediction.shape[:-1]))


# ------------------------------------------------------------------------------------------------- the model of patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """A row of patches: a linear embedding with positions, residual Mamba layers, a norm, and a linear head.

    It compiles in seconds, and shows the effects of pre-training on small data. The defaults are those of the study.
    """

    crop: Size = (16, 48, 48)
    patch: Size = (4, 8, 8)
    d_model: int = 64
    num_layers: int = 2
    orders: Literal[1, 2, 3] = 3
    """In how many orders a layer reads; 1 is causal, as the objective "paper" needs."""
    slices: int = 4
    """The slices of the third order."""
    state_size: int = 8
    conv_kernel: int = 4
    expand: float = 2.0
    small_steps: bool = True
    out_channels: int = 1
    """1 for voxels, 3 for affinities."""
    decoder_layers: int = 0
    """The layers of a masked autoencoder's decoder, which is not kept after pre-training."""
    pair_dim: int = 0
    """The hidden units of the head that predicts token j from a state and the position of j ("paper")."""
    method: Literal["auto", "scan", "associative"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_sizes(self.crop, self.patch)
        for field in ("d_model", "num_layers", "slices", "out_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("decoder_layers", "pair_dim"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.orders not in (1, 2, 3):
            raise ValueError(f"orders is {self.orders}; it must be 1, 2 or 3.")
        if self.orders == 3 and self.tokens % self.slices:
            raise ValueError(f"slices is {self.slices}; it must divide the number of tokens in a crop, {self.tokens}.")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}.")
        self.mixer()

    @property
    def tokens(self) -> int:
        """The number of tokens of a crop, K in the paper."""
        return math.prod(c // p for c, p in zip(self.crop, self.patch))

    def mixer(self) -> MixerConfig:
        return mixer_of(self, self.d_model)

    def module(self) -> PatchModel:
        return PatchModel(self)

    def flops(self) -> float:
        """Forward FLOPs of one crop, without the heads that only pre-training has."""
        mixer, size = self.mixer(), math.prod(self.patch)
        shared = 6 * mixer.d_model * mixer.channels
        layer = shared + self.orders * (mixer.mixer_flops() - shared)
        layers = (self.num_layers + self.decoder_layers) * layer
        return self.tokens * (layers + 2 * size * self.d_model * (1 + self.out_channels))


class _PatchLayer(nn.Module):
    """x + mixer(norm(x)), one step of the scan over layers."""

    config: PatchConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens d_model"], _: None):
        cfg = self.config
        norm = Norm("layernorm", dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")
        mixer = Mixer(cfg.mixer(), cfg.orders, cfg.slices, cfg.small_steps, name="mixer")
        return x + mixer(norm(x))[0].astype(x.dtype), None


class PatchModel(nn.Module):
    """Maps crops to logits for each voxel."""

    config: PatchConfig

    def setup(self):
        cfg = self.config
        size = math.prod(cfg.patch)
        kinds = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}

        def layers(count):
            scanned = nn.scan(
                _PatchLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=count,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(cfg)

        def vectors(name, count):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "d_model"))
            return self.param(name, init, (count, cfg.d_model), cfg.param_dtype)

        self.embedding = Linear(cfg.d_model, ("patch", "d_model"), kernel_init=nn.initializers.lecun_normal(), **kinds)
        self.positions = vectors("positions", cfg.tokens)
        self.layers = layers(cfg.num_layers)
        self.norm = Norm("layernorm", **kinds)
        self.out = Linear(size * cfg.out_channels, ("d_model", "patch"), dtype=jnp.float32, param_dtype=cfg.param_dtype)
        if cfg.decoder_layers:
            self.decoder_embedding = Linear(cfg.d_model, ("d_model", "heads"), **kinds)
            self.decoder_positions = vectors("decoder_positions", cfg.tokens)
            self.mask_token = vectors("mask_token", 1)
            self.decoder = layers(cfg.decoder_layers)
            self.decoder_norm = Norm("layernorm", **kinds)
        if cfg.pair_dim:
            self.first_state = vectors("first_state", 1)
            self.next_out = Linear(size, ("d_model", "patch"), dtype=jnp.float32, param_dtype=cfg.param_dtype)
            self.pair_positions = vectors("pair_positions", cfg.tokens)
            self.pair_up = Linear(cfg.pair_dim, ("d_model", "mlp"), kernel_init=nn.initializers.lecun_normal(), **kinds)
            self.pair_out = Linear(size, ("mlp", "patch"), dtype=jnp.float32, param_dtype=cfg.param_dtype)

    def embed(self, x: Volume) -> Float[Array, "batch tokens d_model"]:
        """The embedded patches, with their positions."""
        cfg = self.config
        check_crops(x, cfg.crop)
        patches = tokenise(x[..., 0], cfg.patch).reshape(len(x), cfg.tokens, -1)
        return self.embedding(patches) + self.positions.astype(cfg.dtype)

    def states(self, tokens: Float[Array, "batch some d_model"]) -> Float[Array, "batch some d_model"]:
        return self.norm(self.layers(tokens, None)[0])

    def voxels(self, rows: Float[Array, "batch tokens entries"]) -> NewVolume:
        """The outputs of the heads as volumes, in float32."""
        patches = rows.reshape(*rows.shape[:2], *self.config.patch, -1)
        return untokenise(patches, self.config.crop).astype(jnp.float32)

    def __call__(self, x: Volume) -> NewVolume:
        """Logits [batch, depth, height, width, out_channels] in float32. Raises ValueError for another crop."""
        logits = self.voxels(self.out(self.states(self.embed(x))))
        if self.is_initializing():  # the heads that only pre-training has
            if self.config.decoder_layers:
                self.autoencode(x, jnp.broadcast_to(jnp.arange(self.config.tokens), (len(x), self.config.tokens)))
            if self.config.pair_dim:
                self.causal(x, jnp.zeros((len(x), self.config.tokens, 1), jnp.int32))
        return logits

    def autoencode(self, x: Volume, seen: Int[Array, "batch seen"]) -> NewVolume:
        """Logits of all voxels, from the tokens with these numbers only."""
        tokens = jnp.take_along_axis(self.embed(x), seen[..., None], 1)
        found = self.decoder_embedding(self.states(tokens))
        whole = jnp.broadcast_to(self.mask_token.astype(found.dtype), (len(x), self.config.tokens, found.shape[-1]))
        whole = jax.vmap(lambda w, s, f: w.at[s].set(f))(whole, seen, found)
        whole = whole + self.decoder_positions.astype(found.dtype)
        return self.voxels(self.out(self.decoder_norm(self.decoder(whole, None)[0])))

    def causal(self, x: Volume, later: Int[Array, "batch tokens pairs"]):
        """Logits of each token i from the tokens before it, and of the tokens `later` [i] from the same."""
        states = self.states(self.embed(x))
        first = jnp.broadcast_to(self.first_state.astype(states.dtype), (len(x), 1, states.shape[-1]))
        states = jnp.concatenate([first, states[:, :-1]], 1)
        pairs = states[:, :, None] + jnp.take(self.pair_positions.astype(states.dtype), later, axis=0)
        return self.next_out(states), self.pair_out(jax.nn.gelu(self.pair_up(pairs)))


# --------------------------------------------------------------------------------------------------------- pre-training


Model = SegMambaConfig | PatchConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumePretraining(Task):
    """Trains a network of volumes without labels. Batches have

    images  float32  [batch, depth, height, width, 1] in [0, 1], perhaps perturbed
    clean   float32  the same crops as they are, which are to be predicted
    mask    float32  [batch], 1 where the crop counts
    """

    counted = "crops"

    model: Model
    objective: Literal["official", "paper", "autoencoder"] = "official"
    schedule: Literal["phases", "random", "next", "next_all", "joint", "alternating"] = "phases"
    """What is predicted. phases: by the paper's weights; the official form draws one of the three tasks at each step
    with these as probabilities, the paper's adds the three. joint: next and next-all together, the authors' second
    stage (`auto_mode` 1); alternating: next only and next-all only, in turns of `turn` steps (`auto_mode` 0)."""
    blend: float = 0.0
    """See `phase_weights`."""
    turn: int = 1000
    """The steps of a turn of the schedule "alternating"; the authors' is 100 epochs."""
    fill: Literal["zero", "noise"] = "noise"
    """What replaces hidden tokens. Noise has the variance 1, although voxels are in [0, 1], as in the authors' code."""
    mask_ratio: tuple[float, float] = (0.2, 0.8)
    """The share of tokens that is hidden at random, drawn for each crop between these two. (The authors' code draws
    from U(0.2, 0.8) whatever its option says, unless that is 0.4.) A masked autoencoder takes the first one."""
    loss_region: Literal["all", "masked"] = "all"
    """The voxels that count in the random and next-all terms: all, as in the authors' code, or the hidden ones."""
    pairs: int = 8
    """How many later tokens the paper's next-all term predicts from each state; their errors are weighted such that
    the expectation is the mean over all pairs. 0: all of them."""
    steps: int = 0
    """The steps of the phases; 0: those of the run."""
    seed: int = 0
    """The seed of the order of tasks; `fit` takes the run's."""

    def __post_init__(self):
        for field, allowed in (
            ("objective", OBJECTIVES),
            ("schedule", SCHEDULES),
            ("fill", ("zero", "noise")),
            ("loss_region", ("all", "masked")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")
        if len(self.mask_ratio) != 2 or not 0 < self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}; it must be two shares in (0, 1), the smaller one first."
            )
        if self.turn < 1 or self.blend < 0 or self.steps < 0 or self.pairs < 0:
            raise ValueError(
                f"turn is {self.turn}, blend {self.blend}, steps {self.steps}, pairs {self.pairs}; turn must be at "
                "least 1, and none may be negative."
            )
        model = self.model
        if model.out_channels != 1:
            raise ValueError(f"model.out_channels is {model.out_channels}; to predict voxels it must be 1.")
        if int(model.tokens * self.mask_ratio[0]) < 1:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}, which hides no token of {model.tokens}; make it larger."
            )
        if self.objective == "paper":
            if not isinstance(model, PatchConfig) or model.orders != 1 or not model.pair_dim:
                raise ValueError(
                    "objective is paper; it needs a causal model of patches: a PatchConfig with orders = 1 and "
                    "pair_dim of at least 1."
                )
            if self.schedule in ("joint", "alternating"):
                raise ValueError(f"schedule is {self.schedule!r}; the objective paper has phases or one of the tasks.")
        predicts_next = self.objective == "official" and self.schedule not in ("random", "next_all")
        if predicts_next and isinstance(model, SegMambaConfig) and not model.next_head:
            raise ValueError(
                f"schedule is {self.schedule!r}, which predicts the next token; model.next_head must be True."
            )
        if self.objective == "autoencoder" and isinstance(model, PatchConfig):
            if not model.decoder_layers:
                raise ValueError("objective is autoencoder; model.decoder_layers must be at least 1.")
            if model.orders == 3 and self.seen % model.slices:
                raise ValueError(
                    f"mask_ratio is {self.mask_ratio}, so {self.seen} tokens are seen; their number must be a multiple "
                    f"of model.slices = {model.slices}."
                )

    @property
    def seen(self) -> int:
        """The tokens of a crop that a masked autoencoder sees."""
        return self.model.tokens - int(self.model.tokens * self.mask_ratio[0])

    def module(self) -> nn.Module:
        return self.model.module()

    def fit(self, data: Data, train: Any = None) -> VolumePretraining:
        """The task with the run's steps and seed.

        Raises:
          ValueError: the crops of the data are not those of the model.
        """
        _must_have_crops(data, self.model)
        if train is None:
            return self
        return dataclasses.replace(self, steps=self.steps or train.steps, seed=train.seed)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, as_float(batch["images"]))["params"]

    def weights(self, step: Any) -> Float[Array, " tasks"]:
        """The weights of random, next and next-all at a step; in the official form, those of a mixture have one 1."""
        fixed = {"random": (1, 0, 0), "next": (0, 1, 0), "next_all": (0, 0, 1), "joint": (0, 1, 1)}
        if self.schedule in fixed:
            return jnp.array(fixed[self.schedule], jnp.float32)
        if self.schedule == "alternating":
            odd = (jnp.asarray(step) // self.turn) % 2
            return jnp.array([[0.0, 1, 0], [0, 0, 1]])[odd]
        weights = phase_weights(jnp.asarray(step, jnp.float32) / max(self.steps, 1), self.blend)
        if self.objective == "paper":
            return weights
        key = jax.random.fold_in(jax.random.key(self.seed), step)  # of the step alone: all parts of a batch agree
        return jax.nn.one_hot(jax.random.categorical(key, jnp.log(weights)), 3)

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        if self.objective == "official":
            is_random = self.weights(step)[0] > 0
            return self._official(params, batch, rng, is_random)
        return self._paper(params, batch, rng) if self.objective == "paper" else self._autoencoder(params, batch, rng)

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The weighted sum of the step's terms, and each of them to log (next-all is logged as the error of whole
        crops, which the random task has, too)."""
        errors = {
            name: mean(total, sums[f"{name}_entries"]) for name, total in sums.items() if f"{name}_entries" in sums
        }
        if self.objective == "autoencoder":
            return errors["random"], errors
        w = self.weights(step)
        if self.objective == "paper":
            return w[0] * errors["random"] + w[1] * errors["next"] + w[2] * errors["next_all"], errors
        return (w[0] + w[2]) * errors["next_all"] + w[1] * errors.get("next", 0.0), errors

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        crops = {"crops": jnp.sum(batch["mask"])}
        if self.objective == "autoencoder":
            return self._autoencoder(params, batch, rng) | crops
        if self.objective == "paper":
            return self._paper(params, batch, rng) | crops
        hidden = self._official(params, batch, rng, jnp.array(True))
        prefix = self._official(params, batch, rng, jnp.array(False))
        both = {"random": hidden["next_all"], "random_entries": hidden["next_all_entries"]}
        return prefix | both | crops

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Mean squared errors: random, next and next_all, as far as the objective has them, and loss, their mean; and
        crops, their number."""
        names = [name for name in ("random", "next", "next_all") if f"{name}_entries" in sums]
        errors = {name: sums[name] / max(sums[f"{name}_entries"], 1.0) for name in names}
        return {"loss": sum(errors.values()) / len(errors), **errors, "crops": sums["crops"]}

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three times the forward pass."""
        return 3 * len(batch["images"]) * self.model.flops()

    # -- the three forms

    def _hide(self, rng: jax.Array, crops: Volume, hidden: Bool[Array, "batch tokens"]) -> Volume:
        shape = (len(crops), self.model.tokens, *self.model.patch)
        fill = jax.random.normal(rng, shape) if self.fill == "noise" else 0.0
        return replace_tokens(crops, hidden, fill, self.model.patch)

    def _random_set(self, rng: jax.Array, batch: int) -> Bool[Array, "batch tokens"]:
        low, high = self.mask_ratio
        ratio, order = jax.random.split(rng)
        share = jax.random.uniform(ratio, (batch,), minval=low, maxval=high) if high > low else jnp.full(batch, low)
        # With a fixed share, the product of two floats must not round below a whole number.
        count = (
            jnp.floor(share * self.model.tokens).astype(jnp.int32)
            if high > low
            else jnp.full(batch, int(self.model.tokens * low + 1e-9))
        )
        return random_set(order, batch, self.model.tokens, count)

    def _official(self, params: Params, batch: Batch, rng: jax.Array, is_random: Bool[Array, ""]) -> dict[str, Any]:
        """The sums of the completion of a prefix, or of random prediction; the compiled step is the same for both."""
        x, y, mask, patch = as_float(batch["images"]), as_float(batch["clean"]), batch["mask"], self.model.patch
        of_prefix, of_set, of_fill = jax.random.split(rng, 3)
        tokens = self.model.tokens
        kept = jax.random.randint(of_prefix, (len(x),), 1, tokens)  # n of each crop
        prefix = jnp.arange(tokens) >= kept[:, None]
        hidden = jnp.where(is_random, self._random_set(of_set, len(x)), prefix)
        logits, of_next = self.predict(params, self._hide(of_fill, x, hidden), kept)
        error = jnp.square(jax.nn.sigmoid(logits) - y)
        region = jnp.ones_like(error)
        if self.loss_region == "masked":
            shape = (*hidden.shape, *patch)
            region = untokenise(jnp.broadcast_to(hidden[..., None, None, None], shape), self.model.crop)[..., None]
        region = region * mask[:, None, None, None, None]
        sums = {"next_all": jnp.sum(error * region), "next_all_entries": jnp.sum(region)}
        if of_next is None:
            return sums
        target = jnp.take_along_axis(tokenise(x[..., 0], patch), kept[:, None, None, None, None], 1)[:, 0]
        of_next = jnp.square(jax.nn.sigmoid(of_next) - target).mean((1, 2, 3))
        size = math.prod(patch)
        return sums | {"next": jnp.sum(of_next * mask) * size, "next_entries": jnp.sum(mask) * size}

    def predict(self, params: Params, inputs: Volume, kept: Int[Array, " batch"]):
        """Logits of all voxels of these inputs, and of the token number `kept`; None if the model has no head for it.

        The model of patches has no head of its own for the next token: what it says of that patch is taken.
        """
        module, variables = self.module(), {"params": params}
        if isinstance(self.model, PatchConfig):
            logits = module.apply(variables, inputs)
            tokens = tokenise(logits[..., 0], self.model.patch)
            return logits, jnp.take_along_axis(tokens, kept[:, None, None, None, None], 1)[:, 0]
        if not self.model.next_head:
            return module.apply(variables, inputs), None
        return module.apply(variables, inputs, next_token=True)

    def _paper(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, Any]:
        x, y, mask, model = as_float(batch["images"]), as_float(batch["clean"]), batch["mask"], self.model
        of_set, of_fill, of_pairs = jax.random.split(rng, 3)
        count, tokens = len(x), model.tokens
        target = tokenise(y[..., 0], model.patch).reshape(count, tokens, -1)
        size = target.shape[-1]

        def error(logits, target):
            return jnp.square(jax.nn.sigmoid(logits) - target).sum(-1) * mask.reshape(-1, *[1] * (logits.ndim - 2))

        hidden = self._random_set(of_set, count)
        logits = self.module().apply({"params": params}, self._hide(of_fill, x, hidden))
        logits = tokenise(logits[..., 0], model.patch).reshape(count, tokens, -1)
        first = jnp.arange(tokens)[:, None]
        if self.pairs:  # j is uniform in i, ..., K - 1
            draws = jax.random.uniform(of_pairs, (count, tokens, self.pairs))
            later = first + jnp.floor(draws * (tokens - first)).astype(jnp.int32)
            later = jnp.minimum(later, tokens - 1)
            weight = (tokens - first) / self.pairs
        else:
            later = jnp.broadcast_to(jnp.arange(tokens), (count, tokens, tokens))
            weight = jnp.arange(tokens) >= first
        of_next, of_pairs = self.module().apply({"params": params}, x, later, method="causal")
        aims = jnp.take_along_axis(target[:, None], later[..., None], 2) if self.pairs else target[:, None]
        crops = jnp.sum(mask)
        return {
            "random": jnp.sum(error(logits, target) * hidden),
            "random_entries": jnp.sum(hidden * mask[:, None]) * size,
            "next": jnp.sum(error(of_next, target)),
            "next_entries": crops * tokens * size,
            "next_all": jnp.sum(error(of_pairs, aims) * weight),
            "next_all_entries": crops * (tokens * (tokens + 1) // 2) * size,
        }

    def _autoencoder(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, Any]:
        x, y, mask, model = as_float(batch["images"]), as_float(batch["clean"]), batch["mask"], self.model
        count = len(x)
        hidden = random_set(rng, count, model.tokens, jnp.full(count, model.tokens - self.seen))
        if isinstance(model, PatchConfig):
            seen = jnp.argsort(hidden, axis=-1, stable=True)[:, : self.seen]  # in raster order
            logits = self.module().apply({"params": params}, x, seen, method="autoencode")
        else:
            logits = self.module().apply({"params": params}, self._hide(jax.random.fold_in(rng, 1), x, hidden))
        error = tokenise(jnp.square(jax.nn.sigmoid(logits) - y)[..., 0], model.patch).sum((2, 3, 4))
        counts = hidden * mask[:, None]
        return {"random": jnp.sum(error * counts), "random_entries": jnp.sum(counts) * math.prod(model.patch)}


# ----------------------------------------------------------------------------------------------------------- affinities


@dataclasses.dataclass(frozen=True, kw_only=True)
class AffinityPrediction(Task):
    """Trains a network to predict affinities. Batches have

    images    float32  [batch, depth, height, width, 1] in [0, 1]
    segments  int32    [batch, depth, height, width], the segment of each voxel; 0: none
    mask      float32  [batch], 1 where the crop counts
    """

    counted = "crops"

    model: Model
    widen: bool = True
    """Whether segments are eroded in the plane first (`widen_borders`)."""
    pad: Pad = "replicate"
    """The affinities at the first voxels of a crop; see `jaxtok.vision.affinities.affinities`."""

    def __post_init__(self):
        if self.model.out_channels != 3:
            raise ValueError(f"model.out_channels is {self.model.out_channels}; for affinities it must be 3.")
        if self.pad not in ("replicate", "zero"):
            raise ValueError(f"pad is {self.pad!r}; it must be replicate or zero.")

    def module(self) -> nn.Module:
        return self.model.module()

    def fit(self, data: Data, train: Any = None) -> AffinityPrediction:
        """The task itself. Raises ValueError if the crops of the data are not those of the model, or have no labels."""
        _must_have_crops(data, self.model)
        if not getattr(data, "labelled", True):
            raise ValueError("the data have no labels, from which affinities are made; set data.labels.")
        return self

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, as_float(batch["images"]))["params"]

    def targets(self, segments: Int[Array, "batch depth height width"]):
        """The affinities of segments, and the weight of each in the loss."""
        target = affinities(widen_borders(segments) if self.widen else segments, self.pad)
        return target, balance(target)

    def affinities(self, params: Params, crops: Volume) -> NewVolume:
        """The affinities of crops, in (0, 1)."""
        return jax.nn.sigmoid(self.module().apply({"params": params}, as_float(crops)))

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        return self.sums(params, batch, rng)

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The weighted squared error: summed over the channels, as in the authors' code, and a mean over voxels."""
        return mean(sums["weighted"], sums["crops"]), {"mse": mean(sums["squared"], sums["crops"])}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        target, weight = self.targets(batch["segments"])
        error, mask = jnp.square(self.affinities(params, batch["images"]) - target), batch["mask"]
        return {
            "weighted": jnp.sum((weight * error).sum(-1).mean((1, 2, 3)) * mask),
            "squared": jnp.sum(error.mean((1, 2, 3, 4)) * mask),
            "crops": jnp.sum(mask),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """loss, the weighted squared error; mse, the mean one without weights; and crops, their number."""
        crops = sums["crops"]
        return {"loss": sums["weighted"] / crops, "mse": sums["squared"] / crops, "crops": crops}

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three times the forward pass."""
        return 3 * len(batch["images"]) * self.model.flops()


affinities_of = jax.jit(lambda task, params, crops: task.affinities(params, crops), static_argnums=0)
"""`AffinityPrediction.affinities`, compiled once for each task and size of batches."""


def _must_have_crops(data: Data, model: Model) -> None:
    shape = data.batch_spec()["images"].shape[1:]
    if shape != (*model.crop, 1):
        raise ValueError(f"data.crop is {shape[:3]}, but model.crop is {model.crop}; they must be equal.")


@dataclasses.dataclass(frozen=True)
class Adopted:
    """What came of loading parameters into a model in which some have other shapes."""

    params: Params
    fresh: tuple[str, ...]
    """The parameters that kept their first values."""
    share: float
    """Their share of all numbers in the model."""

    def __str__(self) -> str:
        names = ", ".join(self.fresh[:4]) + (", ..." if len(self.fresh) > 4 else "")
        return (
            f"{len(self.fresh)} parameters are not in the pre-trained model, or have another shape there, and start "
            f"anew ({names}): {self.share:.1%} of all numbers in the model."
        )


def adopt(first: Params, given: Params) -> Adopted:
    """Takes every given parameter whose place and shape are those of a first one; the rest keeps its first values."""
    ours, theirs = (flax.traverse_util.flatten_dict(tree) for tree in (first, given))
    fits = {place for place, x in ours.items() if place in theirs and theirs[place].shape == x.shape}
    size = {place: math.prod(x.shape) for place, x in ours.items()}
    fresh = [place for place in ours if place not in fits]
    taken = {place: theirs[place] if place in fits else x for place, x in ours.items()}
    share = sum(size[place] for place in fresh) / max(sum(size.values()), 1)
    return Adopted(flax.traverse_util.unflatten_dict(taken), tuple("/".join(place) for place in fresh), share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToAffinities:
    """The surgery that begins fine-tuning: what fits of a pre-trained network, and new parameters for the rest.

    It logs what starts anew. (The authors' loader drops it silently: with the published classes, 19.66M of 28.30M.)
    """

    to: AffinityPrediction | None = None
    """The task afterwards; None: that of the run whose `start` this is."""
    data: Any = None
    """The data afterwards, if it is a stage of a run; None: the same."""
    steps: int = 1000
    """The number of training steps after it, if it is a stage; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after pre-training is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task and the data afterwards. Raises ValueError if the task is not one of volumes, or `to` is open."""
        if not isinstance(task, VolumePretraining | AffinityPrediction):
            raise ValueError(
                f"a {type(task).__name__} does not train on volumes; give a pre-trained network of volumes."
            )
        if self.to is None:
            raise ValueError("to is None; as a stage of a run, it must be the task after pre-training.")
        return self.to, self.data or data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        to, _ = self.task(task, data)
        crop = jnp.zeros((1, *to.model.crop, 1))
        adopted = adopt(nn.meta.unbox(to.init(rng, {"images": crop})), params)
        _say(str(adopted))
        return adopted.params, None

    def towards(self, task: Task) -> ToAffinities:
        """This surgery, to the run's task."""
        return dataclasses.replace(self, to=task) if isinstance(task, AffinityPrediction) else self


@functools.cache  # parameters are made abstractly first, then compiled
def _say(text: str) -> None:
    logging.getLogger("jaxtok").warning(text)


PUBLISHED = {
    "tokenunify-base": SegMambaConfig(),
    "tokenunify-small": SegMambaConfig(features=(64, 128, 256, 512), hidden=1024),
    "tokenunify-mid": SegMambaConfig(features=(96, 192, 384, 768), hidden=1024),
    "tokenunify-large": SegMambaConfig(features=(144, 288, 576, 1104), hidden=2048),
    "tokenunify-huge": SegMambaConfig(features=(192, 384, 768, 1536), hidden=3072),
}

"""The networks for affinities. The published class for pre-training has kernel 3, one channel and the head for the next
token, and by default depths of 3."""
