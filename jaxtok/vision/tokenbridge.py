"""TokenBridge (Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation, arXiv 2503.16430).

A masked autoregressive model (MAR, arXiv 2406.11838) of an image's positions, whose head predicts the integers into
which `tokenbridge_tokenizer.py` has quantised each channel of a KL-VAE's latents. With the levels x of the known codes,

    encoder   [class x buffer; W x] + positions, normed; masked positions are left out; ViT blocks; norm
    decoder   W of these, the mask vector in the places left out, + positions; ViT blocks; norm; + output positions: z
    head      the codes of a position's channels from z (`tokenbridge_heads.py`)

In training, a share of 0.7 to 1 of the positions is masked. Images are drawn in K rounds: a random order of positions
for each image; after round k, floor(N cos(pi/2 (k+1)/K)) positions are still masked. Guidance is on z, before the head.

The encoder always sees quantised values, as in the authors' code. Here its shapes are static: in training, it has
places for the most positions that are ever kept (30 %), and those of fewer ones are hidden.
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

from jaxtok.axes import constrain, gather
from jaxtok.data.codes import CodeData
from jaxtok.nn.linear import Linear
from jaxtok.nn.losses import cross_entropy, mean
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import DTYPES, PARAM_DTYPES, REMAT_POLICIES, Stack
from jaxtok.protocols import Batch, Data, OnProgress, Params, Sums, Task
from jaxtok.vision.classes import check_classes
from jaxtok.vision.elm_sampling import class_ids
from jaxtok.vision.tokenbridge_heads import (
    ChannelHead,
    ChannelStack,
    DiffusionHead,
    ViTStack,
    denoise,
    draw_channels,
    noise_loss,
)
from jaxtok.vision.tokenbridge_tokenizer import DimensionwiseQuantizer

KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The authors' order of KL-16's channels, low frequencies first (`tokenbridge_tokenizer.frequency_order`)."""
HEADS = ("autoregressive", "parallel", "diffusion")
SCHEDULES = ("linear", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBridgeConfig:
    """Sizes; defaults: TokenBridge-L for images of 256 pixels."""

    grid: int = 16
    """The number of positions in a row and in a column (image side / stride of the VAE)."""
    channels: int = 16
    """The channels of a position, each with a code."""
    quantizer: DimensionwiseQuantizer = DimensionwiseQuantizer()
    """That of the tokenizer; the encoder sees its levels."""
    channel_order: tuple[int, ...] = KL16_ORDER
    """The order in which the head predicts the channels; empty: as they are."""
    num_classes: int = 1000
    """The number of classes; the id after the last one stands for no class."""
    buffer: int = 64
    """How many rows the class has before the positions."""
    encoder_width: int = 1024
    encoder_layers: int = 16
    encoder_heads: int = 16
    decoder_width: int = 1024
    decoder_layers: int = 16
    decoder_heads: int = 16
    head: Literal["autoregressive", "parallel", "diffusion"] = "autoregressive"
    head_width: int = 1024
    head_layers: int = 4
    head_heads: int = 8
    diffusion_layers: int = 8
    """The number of residual blocks of the diffusion head."""
    mlp_ratio: float = 4.0
    """The width of the hidden layers of the transformers, divided by their width."""
    official_first_token: bool = False
    """Whether drawing adds the embedding of the first step to the head's first input, as in the authors' code, although
    training does not: needed for their numbers with their weights."""
    mask_ratio_min: float = 0.7
    """The least share of masked positions in training. The share is drawn for each batch, from a normal distribution
    with mean 1 and std 0.25 that is cut off there and at 1."""
    class_dropout: float = 0.1
    """The probability with which a class is withheld in training, for the guidance."""
    dropout: float = 0.1
    """The dropout of attention weights, of hidden layers, and of what each part of a block adds."""
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of activations and operands; norms, softmax, logits and losses are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "projections", "dots"] = "none"
    """What a block stores for the backward pass (`StackConfig.remat`)."""

    def __post_init__(self):
        for field in ("grid", "channels", "num_classes", "buffer", "diffusion_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for part in ("encoder", "decoder", "head"):
            width, heads, layers = (getattr(self, f"{part}_{name}") for name in ("width", "heads", "layers"))
            if min(width, heads, layers) < 1 or width % heads:
                raise ValueError(
                    f"{part}_width is {width}, {part}_heads {heads} and {part}_layers {layers}; they must be at least "
                    "1, and the width a multiple of the heads."
                )
        if self.channel_order and sorted(self.channel_order) != list(range(self.channels)):
            raise ValueError(
                f"channel_order is {self.channel_order}; it must have each of 0 to {self.channels - 1} once, or be "
                "empty."
            )
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; it must be one of {', '.join(HEADS)}.")
        if self.head == "autoregressive" and self.channels < 2:
            raise ValueError("channels is 1, but head is autoregressive; with one channel it must be parallel.")
        if not 0 < self.mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min is {self.mask_ratio_min}; it must be in (0, 1].")
        for field in ("class_dropout", "dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1).")
        if not 0 < self.mlp_ratio < math.inf or not 0 < self.norm_eps < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio} and norm_eps {self.norm_eps}; they must be positive.")
        for field, allowed in (("dtype", DTYPES), ("param_dtype", PARAM_DTYPES), ("remat", REMAT_POLICIES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")

    @property
    def positions(self) -> int:
        """The number of positions of an image (N)."""
        return self.grid**2

    @property
    def code_shape(self) -> tuple[int, int]:
        return (self.grid, self.grid)

    @property
    def code_values(self) -> tuple[int, ...]:
        return (self.quantizer.levels,) * self.channels

    @property
    def order(self) -> Int[np.ndarray, " channels"]:
        """The channels in the order in which they are predicted."""
        return np.array(self.channel_order or range(self.channels))

    @property
    def most_kept(self) -> int:
        """The largest number of positions that are not masked in training."""
        return self.positions - math.ceil(self.positions * self.mask_ratio_min - 1e-3)

    def _stack(self, kind: type[ViTStack], part: str) -> ViTStack:
        width = getattr(self, f"{part}_width")
        return kind(
            num_layers=getattr(self, f"{part}_layers"),
            d_model=width,
            num_heads=getattr(self, f"{part}_heads"),
            mlp_dim=int(width * self.mlp_ratio),
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            mlp_dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            remat=self.remat,
        )

    @property
    def encoder_stack(self) -> ViTStack:
        return self._stack(ViTStack, "encoder")

    @property
    def decoder_stack(self) -> ViTStack:
        return self._stack(ViTStack, "decoder")

    @property
    def channel_stack(self) -> ChannelStack:
        return self._stack(ChannelStack, "head")

    def head_flops(self) -> float:
        """Forward FLOPs of the head for one position in training (the diffusion head: for one time)."""
        d, c = self.head_width, self.channels
        if self.head == "diffusion":
            rest = 256 * d + d * d + self.decoder_width * d + 2 * c * d + 2 * d * d
            return 2 * (rest + 5 * d * d * self.diffusion_layers)
        modulation = 2 * d * d * (6 * self.head_layers + 2)
        stack = self.channel_stack.stack_flops(c)
        return 2 * self.decoder_width * d + c * (stack + modulation + 2 * d * self.quantizer.levels)

    def flops(self, kept: int | None = None) -> float:
        """Forward FLOPs of one image in training, with so many places for positions that are not masked."""
        n, kept = self.positions, self.most_kept if kept is None else kept
        inside, outside = self.buffer + kept, self.buffer + n
        encoder = inside * self.encoder_stack.stack_flops(inside) + 2 * n * self.channels * self.encoder_width
        decoder = (
            outside * self.decoder_stack.stack_flops(outside) + 2 * inside * self.encoder_width * self.decoder_width
        )
        return encoder + decoder + n * self.head_flops()


class TokenBridge(nn.Module):
    """Maps codes, a class and a mask to features of all positions, and these to losses of their codes."""

    config: TokenBridgeConfig

    def setup(self):
        cfg = self.config
        places = cfg.buffer + cfg.positions

        def table(name, *shape):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "d_model"))
            return gather(self.param(name, init, shape, cfg.param_dtype).astype(cfg.dtype), None, "d_model")

        def linear(features):
            xavier, kinds = nn.initializers.xavier_uniform(), {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
            return Linear(features, ("channels", "d_model"), kernel_init=xavier, **kinds)

        def norm():
            return Norm("layernorm", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype)

        self.class_embedding = table("class_embedding", cfg.num_classes, cfg.encoder_width)
        self.no_class = table("no_class", 1, cfg.encoder_width)
        self.encoder_positions = table("encoder_positions", places, cfg.encoder_width)
        self.decoder_positions = table("decoder_positions", places, cfg.decoder_width)
        self.output_positions = table("output_positions", cfg.positions, cfg.decoder_width)
        self.mask_vector = table("mask_vector", 1, cfg.decoder_width)
        self.embed, self.embed_norm = linear(cfg.encoder_width), norm()
        self.encoder, self.encoder_norm = Stack(cfg.encoder_stack), norm()
        self.decoder_embed = linear(cfg.decoder_width)
        self.decoder, self.decoder_norm = Stack(cfg.decoder_stack), norm()
        self.head = (DiffusionHead if cfg.head == "diffusion" else ChannelHead)(cfg)

    def encode(
        self,
        codes: Int[Array, "batch positions channels"],
        labels: Int[Array, " batch"],
        masked: Bool[Array, "batch positions"],
        kept: int,
        deterministic: bool = True,
    ) -> Float[Array, "batch places encoder_width"]:
        """The states of the class's rows, then of the positions that are not masked, in rising order.

        Args:
          kept: the number of places for these positions; if there are fewer, the last places mean nothing.
        """
        cfg = self.config
        of_class = jnp.take(self.class_embedding, jnp.minimum(labels, cfg.num_classes - 1), axis=0)
        condition = jnp.where((labels < cfg.num_classes)[:, None], of_class, self.no_class)
        rows = jnp.broadcast_to(condition[:, None], (len(codes), cfg.buffer, cfg.encoder_width))
        x = self.embed(cfg.quantizer.dequantize(codes).astype(cfg.dtype))
        x = self.embed_norm(constrain(jnp.concatenate([rows, x], 1) + self.encoder_positions, "d_model"))
        places = jnp.argsort(masked, axis=1, stable=True)[:, :kept]
        x = jnp.concatenate([x[:, : cfg.buffer], jnp.take_along_axis(x[:, cfg.buffer :], places[..., None], axis=1)], 1)
        real = jnp.arange(kept) < (cfg.positions - masked.sum(1))[:, None]
        segments = jnp.concatenate([jnp.ones((len(codes), cfg.buffer), jnp.int32), real.astype(jnp.int32)], 1)
        x, _ = self.encoder(constrain(x, "d_model"), None, segments, deterministic=deterministic)
        return self.encoder_norm(x)

    def features(
        self,
        codes: Int[Array, "batch positions channels"],
        labels: Int[Array, " batch"],
        masked: Bool[Array, "batch positions"],
        kept: int | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch positions decoder_width"]:
        """z of all positions. Codes of masked positions do not matter; `kept` as in `encode`, by default all."""
        cfg = self.config
        x = self.encode(codes, labels, masked, cfg.positions if kept is None else kept, deterministic)
        x = self.decoder_embed(x)
        place = jnp.cumsum(~masked, axis=1) - 1  # of a position that is not masked, among these
        place = cfg.buffer + jnp.clip(place, 0, x.shape[1] - cfg.buffer - 1)
        if x.shape[1] == cfg.buffer:
            canvas = jnp.broadcast_to(self.mask_vector, (len(x), cfg.positions, cfg.decoder_width))
        else:
            canvas = jnp.take_along_axis(x, place[..., None], axis=1)
            canvas = jnp.where(masked[..., None], self.mask_vector, canvas)
        x = jnp.concatenate([x[:, : cfg.buffer], canvas], 1) + self.decoder_positions
        x, _ = self.decoder(constrain(x, "d_model"), None, deterministic=deterministic)
        return constrain(self.decoder_norm(x)[:, cfg.buffer :] + self.output_positions, "d_model")

    def __call__(
        self,
        codes: Int[Array, "batch positions channels"],
        labels: Int[Array, " batch"],
        masked: Bool[Array, "batch positions"],
        rng: jax.Array | None = None,
        kept: int | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch positions channels"]:
        """The loss of each code, masked or not: -log p in nats, of channels in the head's order. With the diffusion
        head, the squared error of the noise, the same for all channels, drawn with `rng`."""
        cfg = self.config
        z = self.features(codes, labels, masked, kept, deterministic)
        z, codes = z.reshape(-1, z.shape[-1]), codes.reshape(-1, cfg.channels)
        if cfg.head == "diffusion":
            key = jax.random.key(0) if rng is None else rng
            losses = noise_loss(self.head, z, cfg.quantizer.dequantize(codes), key)
            losses = jnp.broadcast_to(losses[:, None], codes.shape)
        else:
            ordered = codes[:, cfg.order]
            losses = cross_entropy(self.head(z, ordered, deterministic), ordered)
        return losses.reshape(*masked.shape, cfg.channels)

    def logits(
        self, z: Float[Array, "rows decoder_width"], ordered: Int[Array, "rows channels"]
    ) -> Float[Array, "rows channels levels"]:
        """The head's logits under teacher forcing, channels in its order."""
        return self.head(z, ordered)


def init_params(config: TokenBridgeConfig, rng: jax.Array) -> Params:
    """All parameters as plain arrays."""
    codes = jnp.zeros((1, config.positions, config.channels), jnp.int32)
    masked = jnp.ones(codes.shape[:2], bool)
    return nn.meta.unbox(TokenBridge(config).init(rng, codes, jnp.zeros(1, jnp.int32), masked)["params"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBridgeModeling(Task):
    """Trains the model, and draws codes from it, on batches of codes (`jaxtok.data.codes.CodeData`):

    codes   int32    [batch, positions, channels]
    labels  int32    [batch], the class; num_classes stands for none
    mask    float32  [batch], 1 where the image counts, 0 where it only fills the batch
    """

    counted = "images"

    model: TokenBridgeConfig

    def module(self) -> TokenBridge:
        return TokenBridge(self.model)

    @property
    def code_shape(self) -> tuple[int, int]:
        return self.model.code_shape

    @property
    def code_values(self) -> tuple[int, ...]:
        return self.model.code_values

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def fit(self, data: Data, train: Any = None) -> TokenBridgeModeling:
        """The task itself.

        Raises:
          ValueError: the data have other positions or codes than the model, or more classes.
        """
        if isinstance(data, CodeData):
            if not data.shape and data.grid != self.model.grid:
                raise ValueError(
                    f"task.model.grid is {self.model.grid}, but data.grid is {data.grid}; make them equal."
                )
            for field in ("shape", "values"):
                ours, theirs = getattr(self, f"code_{field}"), getattr(data, f"code_{field}")
                if theirs != ours:
                    raise ValueError(f"data.{field} is {theirs}, but the model has {ours}; make them equal.")
        check_classes(self.num_classes, data)
        return self

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        masked = jnp.ones(batch["codes"].shape[:2], bool)
        return self.module().init(rng, batch["codes"], batch["labels"], masked)["params"]

    def draw_mask(self, rng: jax.Array, images: int) -> Bool[Array, "batch positions"]:
        """Random masks with the same number of positions in each image, which is drawn."""
        of_share, of_order = jax.random.split(rng)
        least, n = self.model.mask_ratio_min, self.model.positions
        share = 1 + 0.25 * jax.random.truncated_normal(of_share, (least - 1) / 0.25, 0.0)
        count = jnp.clip(jnp.ceil(n * share), n - self.model.most_kept, n).astype(jnp.int32)
        ranks = jnp.argsort(jnp.argsort(jax.random.uniform(of_order, (images, n)), axis=1), axis=1)
        return ranks < count

    def masked_losses(
        self,
        params: Params,
        batch: Batch,
        masked: Bool[Array, "batch positions"],
        rng: jax.Array,
        *,
        labels: Int[Array, " batch"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum of the losses of masked codes, and how many they are."""
        of_dropout, of_noise = jax.random.split(rng)
        losses = self.module().apply(
            {"params": params},
            batch["codes"],
            batch["labels"] if labels is None else labels,
            masked,
            of_noise,
            kept=self.model.most_kept,
            deterministic=not train,
            rngs={"dropout": of_dropout} if train else None,
        )
        counted = masked[..., None] * batch["mask"][:, None, None] * jnp.ones(self.model.channels)
        return jnp.sum(losses * counted), jnp.sum(counted)

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        of_mask, of_labels, rest = jax.random.split(rng, 3)
        masked, images = self.draw_mask(of_mask, len(batch["codes"])), len(batch["codes"])
        withheld = jax.random.bernoulli(of_labels, self.model.class_dropout, (images,))
        labels = jnp.where(withheld, self.num_classes, batch["labels"])
        total, count = self.masked_losses(params, batch, masked, rest, labels=labels, train=True)
        places = {"masked": masked.sum(dtype=jnp.float32), "places": jnp.float32(masked.size)}
        return {"losses": total, "count": count} | places

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The mean over the masked codes of the whole batch, without weights; also logs the masked fraction."""
        return mean(sums["losses"], sums["count"]), {"masked": sums["masked"] / sums["places"]}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The sums under masks as in training, with the classes and without."""
        of_mask, rest = jax.random.split(rng)
        masked = self.draw_mask(of_mask, len(batch["codes"]))
        losses, count = self.masked_losses(params, batch, masked, rest)
        none = jnp.full_like(batch["labels"], self.num_classes)
        without, _ = self.masked_losses(params, batch, masked, rest, labels=none)
        return {"losses": losses, "without": without, "count": count, "images": jnp.sum(batch["mask"])}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """loss (nats a masked code; with the diffusion head, the squared error of the noise), class_gain (how much less
        it is than without the class), and examples, the number of images."""
        loss = sums["losses"] / sums["count"]
        return {"loss": loss, "class_gain": sums["without"] / sums["count"] - loss, "examples": sums["images"]}

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """See `Task.evaluate`; the default key is that of seed 0."""
        return super().evaluate(params, batches, jax.random.key(0) if rng is None else rng, **options)

    def trainable(self, params: Params) -> Params:
        """All but the biases of keys (in the head, of the keys' norms): they add one number to all scores of a query,
        so that their gradient is 0 but for rounding."""

        def trains(path, _):
            names = [key.key for key in path]
            of_keys = "key_norm" if names[0] == "head" else "key"
            return float(names[-2:] != [of_keys, "bias"])

        return jax.tree_util.tree_map_with_path(trains, params)

    def flops(self, batch: Batch) -> float:
        """The FLOPs of one training step: three times the forward pass."""
        return 3 * len(batch["codes"]) * self.model.flops()

    @property
    def sampling(self) -> type[TokenBridgeSampling]:
        return TokenBridgeSampling

    def draw(
        self,
        params: Params,
        conditions: Sequence[int | None],
        rng: jax.Array,
        *,
        sampling: TokenBridgeSampling | None = None,
        on_progress: OnProgress | None = None,
    ) -> Int[Array, "batch positions channels"]:
        """The codes of an image of each class (None: no class), by `generate`; progress is after each round."""
        sampling = TokenBridgeSampling() if sampling is None else sampling
        return generate(self.model, params, conditions, sampling=sampling, rng=rng, on_progress=on_progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBridgeSampling:
    """How images are drawn; defaults: those of L's published numbers."""

    rounds: int = 0
    """The number of passes through the backbone (K), at most one for each position; 0: one for each position."""
    guidance: float = 3.1
    """The scale of the guidance; 1: none."""
    schedule: Literal["linear", "constant"] = "linear"
    """Whether the guidance rises from 1 with the share of positions that are drawn, or stays."""
    temperature: float = 0.96
    """Of the codes (of the noise, with the diffusion head); 0: the most likely code."""
    diffusion_steps: int = 100
    """The number of steps of the diffusion head."""

    def __post_init__(self):
        if self.rounds < 0:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1, or 0 for one for each position.")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; it must be 0 or more, and finite (1 is none).")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more, and finite.")
        if not 1 <= self.diffusion_steps <= 1000:
            raise ValueError(f"diffusion_steps is {self.diffusion_steps}; it must be in 1..1000.")

    def counts(self, positions: int) -> Int[np.ndarray, " rounds_and_one"]:
        """How many positions are masked before the first round, and after each of them.

        Raises:
          ValueError: there are more rounds than positions, so that some would draw nothing.
        """
        if self.rounds > positions:
            raise ValueError(f"rounds is {self.rounds}; it must be at most {positions}, the number of positions.")
        rounds = self.rounds or positions
        counts = [positions]
        for k in range(rounds - 1):
            wanted = math.floor(positions * math.cos(math.pi / 2 * (k + 1) / rounds))
            counts.append(max(1, min(counts[-1] - 1, wanted)))
        return np.array([*counts, 0], np.int32)

    def weights(self, positions: int) -> Float[np.ndarray, " rounds"]:
        """The guidance of each round."""
        counts = self.counts(positions)
        # In the last round all is drawn, although the authors' formula counts one position as masked still.
        left = np.maximum(counts[1:], 1)
        part = (positions - left) / positions if self.schedule == "linear" else np.ones(len(left))
        return (1 + (self.guidance - 1) * part).astype(np.float32)


def generate(
    config: TokenBridgeConfig,
    params: Params,
    labels: Sequence[int | None] | np.ndarray,
    *,
    sampling: TokenBridgeSampling = TokenBridgeSampling(),
    rng: jax.Array | None = None,
    orders: Int[np.ndarray, "batch positions"] | None = None,
    on_progress: OnProgress | None = None,
) -> Int[Array, "batch positions channels"]:
    """Codes of images of these classes, channels in the VAE's order.

    Args:
      labels: a class for each image; None is no class.
      rng: a key; needed unless the temperature is 0 and there are orders.
      orders: an order of the positions for each image, in place of a random one; the last of it are drawn first.
      on_progress: called after each round with the share of the rounds that are done.

    Raises:
      ValueError: a class is out of range, there is no key, or there are too many rounds.
    """
    if rng is None and (sampling.temperature or orders is None):
        raise ValueError("rng is None; give a key such as jax.random.key(0).")
    ids, n = class_ids(config, labels), config.positions
    counts, weights = sampling.counts(n), sampling.weights(n)
    rng = jax.random.key(0) if rng is None else rng
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(ids)))
    if orders is None:
        of_order = jax.vmap(jax.random.fold_in, (0, None))(keys, len(weights))
        orders = jax.vmap(lambda key: jax.random.permutation(key, n))(of_order)
    codes = jnp.zeros((len(ids), n, config.channels), jnp.int32)
    most = int(np.max(counts[:-1] - counts[1:]))
    xs = (np.arange(len(weights)), counts[:-1], counts[1:], weights)
    calls = 1 if on_progress is None else len(weights)
    for number in range(calls):
        part = xs if on_progress is None else tuple(x[number : number + 1] for x in xs)
        codes = _rounds(config, sampling, most, params, ids, jnp.asarray(orders), codes, part, keys)
        if on_progress is not None:
            jax.block_until_ready(codes)
            on_progress((number + 1) / calls)
    return codes


def guided_features(
    config: TokenBridgeConfig,
    params: Params,
    codes: Int[Array, "batch positions channels"],
    labels: Int[Array, " batch"],
    masked: Bool[Array, "batch positions"],
    weight: Any,
    guided: bool,
) -> Float[Array, "batch positions decoder_width"]:
    """z, or z_u + weight (z_c - z_u) of the features with and without the class."""
    if guided:  # the rows of an image are neighbours, lest a mesh separate them
        labels = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], 1).reshape(-1)
        codes, masked = (jnp.repeat(x, 2, axis=0) for x in (codes, masked))
    z = TokenBridge(config).apply({"params": params}, codes, labels, masked, method="features")
    if not guided:
        return z
    z = z.reshape(-1, 2, *z.shape[1:])
    return (z[:, 1] + weight * (z[:, 0] - z[:, 1])).astype(z.dtype)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "most"), donate_argnames="codes")
def _rounds(config, sampling, most, params, labels, orders, codes, xs, keys):
    """The codes after some rounds, each of which draws at most `most` positions."""
    ranks, rows = jnp.argsort(orders, axis=1), jnp.arange(len(codes))[:, None]
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def one(codes, x):
        number, before, after, weight = x
        guided = sampling.guidance != 1
        z = guided_features(config, params, codes, labels, ranks < before, weight, guided)
        slots = after + jnp.arange(most)
        places = jnp.take(orders, jnp.minimum(slots, config.positions - 1), axis=1)
        z = jnp.take_along_axis(z, places[..., None], axis=1).reshape(-1, z.shape[-1])
        each = jax.vmap(lambda key: jax.random.split(key, most))(fold(keys, number)).reshape(-1)
        if config.head == "diffusion":
            drawn = denoise(config, params["head"], z, each, sampling.temperature, sampling.diffusion_steps)
            drawn = config.quantizer.quantize(drawn)
        else:
            ordered, _ = draw_channels(config, params["head"], z, each, sampling.temperature)
            drawn = ordered[:, np.argsort(config.order)]
        places = jnp.where(slots < before, places, config.positions)  # beyond the end: not drawn
        return codes.at[rows, places].set(drawn.reshape(len(codes), most, -1), mode="drop"), None

    return jax.lax.scan(one, codes, xs)[0]


def published(width: int, layers: int, heads: int, **head: Any) -> TokenBridgeConfig:
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"width": width, "layers": layers, "heads": heads}.items()
    }
    return TokenBridgeConfig(**sizes, **head)


PUBLISHED = {
    "tokenbridge-base": published(768, 12, 12, head_width=768, head_layers=4, diffusion_layers=6),
    "tokenbridge-large": published(1024, 16, 16, head_width=1024, head_layers=4, diffusion_layers=8),
    "tokenbridge-huge": published(1280, 20, 16, head_width=1024, head_layers=6, diffusion_layers=12),
}
"""Those of the authors' code; the layers of the diffusion head are MAR's."""
