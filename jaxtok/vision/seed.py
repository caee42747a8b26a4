"""SEED (arXiv 2307.08041, 2310.01218): an image as 32 codes whose order means something, for a language model.

A frozen ViT -> a causal Q-Former (`jaxtok.vision.qformer`) -> a small MLP -> the nearest of 8192 vectors -> a small MLP
-> a few ViT blocks -> a head that gives the *generation embedding*, from which a frozen diffusion model draws.

Stage I (`jaxtok.vision.seed_alignment`) makes the last query's output agree with a text (section 3.2). Stage II
(`Seed`) learns the codes of the frozen Q-Former's outputs h (section 3.3): with u the vectors of the codes, mapped
back,

    L = 5 L_vq + 2 mean(1 - cos(Blocks(u), sg(h))) + 0.5 mean((y - target)^2)

where y is the generation embedding. Targets: in the released SEED-2, an image's embedding by CLIP ViT-H/14 (1024
numbers, not normalised); in SEED-1, 77 x 768 features of CLIP's text encoder. They are computed elsewhere and are part
of the batch (`targets`), as the diffusion models that read them are not here. So that small runs can be looked at, ours
also has `target="image"`: the generation embedding is then the image itself, pixel by pixel.

Ours, too: `prefixes` trains the decoder on first codes only, so that a prefix of codes can be decoded. (In the released
models, the first k codes are those of k queries, but nothing decodes them.)

Paper and code: text conditions (SEED-1) against image conditions (the released code, followed here by default); the
inference package has an MLP for a head, the training script a reverse Q-Former. `head` chooses.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.nn.linear import Linear, ViTStack
from jaxtok.nn.losses import mean
from jaxtok.nn.norms import Norm, unit_length
from jaxtok.nn.quantizers import CodebookAverages, NearestQuantizer, Quantized, assigned_sums, code_counts, perplexity
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task
from jaxtok.vision.collapse import CollapseGuard, code_health, code_sums
from jaxtok.vision.eva_vit import EvaViTConfig, scale_by_depth
from jaxtok.vision.images import as_float, check_codes, check_images
from jaxtok.vision.metrics import psnr
from jaxtok.vision.qformer import QFormer, QFormerConfig
from jaxtok.vision.vit import patchify

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEADS = ("mlp", "qformer", "text77")
DOWN = (256, 128, 32)
"""The widths of the MLP head, which is applied to each token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchesConfig:
    """In place of a ViT: the pixels of each patch, and which patch it is (one-hot). It has no parameters."""

    image_size: int = 8
    patch_size: int = 2
    channels: int = 3
    grey: bool = True
    """Whether a patch has the mean of its channels."""

    def __post_init__(self):
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}; it must divide image_size = {self.image_size}.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def width(self) -> int:
        return self.patch_size**2 * (1 if self.grey else self.channels) + self.num_patches

    def module(self) -> Patches:
        return Patches(self)

    def flops(self) -> float:
        return 0.0


class Patches(nn.Module):
    """Maps images to patches."""

    config: PatchesConfig

    def __call__(
        self, images: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch patches features"]:
        cfg = self.config
        images = images.mean(-1, keepdims=True) if cfg.grey else images
        x = patchify(images, cfg.patch_size)
        places = jnp.broadcast_to(jnp.eye(cfg.num_patches, dtype=x.dtype), (len(x), cfg.num_patches, cfg.num_patches))
        return jnp.concatenate([x, places], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """Sizes of all parts; defaults: the released tokenizer's."""

    vision: EvaViTConfig | PatchesConfig = EvaViTConfig()
    qformer: QFormerConfig = QFormerConfig()
    projection_dim: int = 256
    """The channels in which images and texts are compared (stage I)."""
    codebook_size: int = 8192
    code_dim: int = 32
    beta: float = 0.25
    legacy: bool = True
    """Whether beta weighs the codebook's term of the quantiser's loss, as in the authors' code, or the commitment."""
    depth: int = 4
    """The ViT blocks after the codes, for each of the two targets."""
    block_heads: int = 12
    head: Literal["mlp", "qformer", "text77"] = "mlp"
    """What makes the generation embedding: an MLP on all tokens (the inference package), a reverse Q-Former with one
    query (the training script), or one with 77 queries for text conditions (SEED-1)."""
    feature_dim: int = 1024
    """The numbers of a generation embedding (text77: of each of its 77 vectors, which is 768 in SEED-1)."""
    reverse_layers: int = 4
    text_queries: int = 77
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    vision_norm: bool = True
    """Whether there is a layer norm between the ViT and the Q-Former."""

    def __post_init__(self):
        positive = ("projection_dim", "codebook_size", "code_dim", "depth", "block_heads", "feature_dim")
        for field in (*positive, "reverse_layers", "text_queries"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; it must be 0 or more.")
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; it must be one of {', '.join(HEADS)}.")
        if self.width % self.block_heads:
            raise ValueError(f"block_heads is {self.block_heads}, which does not divide d_model = {self.width}.")
        if self.qformer.context_width != self.vision.width:
            raise ValueError(
                f"qformer.context_width is {self.qformer.context_width}; it must be {self.vision.width}, the width of "
                "the image encoder."
            )
        for field in ("image_mean", "image_std"):
            if len(getattr(self, field)) != self.vision.channels:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} numbers for {self.vision.channels} channels."
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std}; its numbers must be positive.")

    @property
    def width(self) -> int:
        return self.qformer.d_model

    @property
    def num_codes(self) -> int:
        """The codes of an image."""
        return self.qformer.num_queries

    @property
    def dtype(self) -> str:
        return self.qformer.dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.vision.image_size, self.vision.image_size, self.vision.channels)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of a generation embedding."""
        return (self.text_queries, self.feature_dim) if self.head == "text77" else (self.feature_dim,)

    def blocks(self) -> ViTStack:
        """The ViT blocks after the codes."""
        same: dict[str, Any] = {name: getattr(self.qformer, name) for name in ("dtype", "param_dtype", "remat")}
        same["init_std"] = self.qformer.init_std or self.width**-0.5
        return ViTStack(
            num_layers=self.depth, d_model=self.width, num_heads=self.block_heads, mlp_dim=4 * self.width, **same
        )

    def reverse(self) -> QFormerConfig:
        """The Q-Former that reads the decoded tokens."""
        return dataclasses.replace(
            self.qformer,
            num_layers=self.reverse_layers,
            num_queries=1 if self.head == "qformer" else self.text_queries,
            causal=False,
            context_width=self.width,
            vocab_size=0,
        )

    def normalised(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Pixels in [0, 1], as the image encoder takes them."""
        return (images - jnp.array(self.image_mean)) / jnp.array(self.image_std)


class Reader(nn.Module):
    """The part that reads images: the norm after the ViT, and the Q-Former. `text` says if it reads texts, too."""

    config: SeedConfig
    text: bool = False

    def setup(self):
        cfg = self.config
        if cfg.vision_norm:
            self.vision_norm = Norm("layernorm", dtype=cfg.dtype, param_dtype=cfg.qformer.param_dtype)
        self.qformer = QFormer(cfg.qformer if self.text else cfg.qformer.without_text())

    def image(self, features: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """What the queries read, from the ViT's states."""
        return self.vision_norm(features) if self.config.vision_norm else features

    def __call__(
        self, features: Float[Array, "batch tokens width"], **options: Any
    ) -> Float[Array, "batch codes d_model"]:
        """The queries' outputs h (the causal embeddings). Options are those of `QFormer`."""
        return self.qformer(self.image(features), **options)[0]


class Aligner(Reader):
    """Images and texts to vectors of length 1 that agree if image and text belong together."""

    text: bool = True
    matching: bool = False

    def setup(self):
        super().setup()
        cfg = self.config

        def linear(features):
            return Linear(features, ("d_model", "channels"), kernel_init=_uniform, param_dtype=cfg.qformer.param_dtype)

        self.vision_proj, self.text_proj = linear(cfg.projection_dim), linear(cfg.projection_dim)
        self.temperature = self.param("temperature", nn.initializers.constant(0.07), (), jnp.float32)
        if self.matching:
            self.match_head = linear(2)

    def image_feature(self, features, **options: Any) -> Float[Array, "batch features"]:
        """The vector of an image, from its last query alone."""
        return self.of_states(self(features, **options))

    def of_states(self, states: Float[Array, "batch codes d_model"]) -> Float[Array, "batch features"]:
        """The vector of an image from h, or from a reconstruction of it."""
        return unit_length(self.vision_proj(states[:, -1].astype(jnp.float32)))

    def text_feature(self, tokens, mask, **options: Any) -> Float[Array, "batch features"]:
        """The vector of a text, from its first token."""
        states, _ = self.qformer(None, tokens, mask, **options)
        return unit_length(self.text_proj(states[:, 0].astype(jnp.float32)))

    def caption(self, features, tokens, mask, **options: Any) -> Float[Array, "batch length vocab"]:
        """The logits of a caption's next tokens."""
        return self.qformer.caption(self.image(features), tokens, mask, **options)

    def match(self, features, tokens, mask, **options: Any) -> Float[Array, "batch 2"]:
        """The logits of whether an image and a text belong together, from the last query, which sees both."""
        states, _ = self.qformer(self.image(features), tokens, mask, **options)
        return self.match_head(states[:, self.config.num_codes - 1].astype(jnp.float32))

    def everything(self, features, tokens):
        """Runs all parts once, for initialisation."""
        self.qformer.all_parts(self.image(features), tokens)
        self.of_states(self(features)), self.text_feature(tokens, None)
        if self.matching:
            self.match(features, tokens, None)
        return self.temperature


def _uniform(key, shape, dtype=jnp.float32):
    """PyTorch's initialisation of a linear layer."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Codes(nn.Module):
    """The codes of the queries' outputs, and what is made from them."""

    config: SeedConfig
    moving: bool = False

    def setup(self):
        cfg = self.config

        def linear(features, bias=True, axes=("d_model", "channels")):
            return Linear(
                features, axes, bias, kernel_init=_uniform, dtype=cfg.dtype, param_dtype=cfg.qformer.param_dtype
            )

        def positions(name):
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None, "d_model"))
            return self.param(name, init, (cfg.num_codes, cfg.width), cfg.qformer.param_dtype)

        self.encode_hidden, self.encode_out = linear(cfg.width), linear(cfg.code_dim)
        self.quantizer = NearestQuantizer(
            cfg.codebook_size, cfg.code_dim, cfg.beta, legacy=cfg.legacy, moving=self.moving
        )
        self.decode_hidden, self.decode_out = linear(cfg.code_dim), linear(cfg.width)
        self.positions, self.image_positions = positions("positions"), positions("image_positions")
        self.blocks, self.image_blocks = Stack(cfg.blocks()), Stack(cfg.blocks())
        if cfg.head == "mlp":
            self.down = [linear(width, bias=False) for width in DOWN]
        else:
            self.reverse = QFormer(cfg.reverse())
        self.head = linear(cfg.feature_dim)

    def quantize(self, states: Float[Array, "batch codes d_model"]) -> tuple[Array, Quantized]:
        """z before, and `Quantized` after quantisation."""
        z = self.encode_out(jnp.tanh(self.encode_hidden(states))).astype(jnp.float32)
        return z, self.quantizer(z)

    def lift(self, vectors: Float[Array, "batch codes code_dim"]) -> Float[Array, "batch codes d_model"]:
        """u, from the vectors of the codes."""
        return self.decode_out(jnp.tanh(self.decode_hidden(vectors)))

    def semantic(self, u: Float[Array, "batch codes d_model"], seen=None) -> Float[Array, "batch codes d_model"]:
        """r, which should be h again. `seen` [batch, codes]: which codes are known; default: all."""
        return self._run(self.blocks, self.positions, u, seen)

    def generation(self, u: Float[Array, "batch codes d_model"], seen=None) -> Float[Array, "batch ..."]:
        """The generation embedding y, in float32."""
        cfg, g = self.config, self._run(self.image_blocks, self.image_positions, u, seen)
        if cfg.head == "mlp":
            for number, layer in enumerate(self.down):
                g = layer(g if number == 0 else jax.nn.relu(g))
            g = g if seen is None else g * seen[..., None].astype(g.dtype)
            return self.head(g.reshape(len(g), -1)).astype(jnp.float32)
        states, _ = self.reverse(g, image_mask=seen)
        y = self.head(states).astype(jnp.float32)
        return y[:, 0] if cfg.head == "qformer" else y

    def _run(self, stack, positions, u, seen):
        x = u + positions.astype(u.dtype)
        mask = None if seen is None else jnp.broadcast_to(seen[:, None], (len(u), u.shape[1], u.shape[1]))
        return stack(x, None, mask=mask)[0]

    def decode(self, codes: Int[Array, "batch codes 1"], seen=None) -> Float[Array, "batch ..."]:
        """The generation embedding of codes."""
        return self.generation(self.lift(self.quantizer.embed(codes)), seen)

    def decode_states(self, codes: Int[Array, "batch codes 1"]) -> Float[Array, "batch codes d_model"]:
        """The semantic reconstruction r of codes."""
        return self.semantic(self.lift(self.quantizer.embed(codes)))

    def __call__(self, states):
        _, quantized = self.quantize(states)
        u = self.lift(quantized.vectors)
        return self.semantic(u), self.generation(u)


def see(task: Any, params: Params, images: Array) -> Float[Array, "batch tokens width"]:
    """The states of the image encoder of either stage for images in [0, 1]."""
    cfg = task.model
    vision = params.get("vision") or params.get(FROZEN, {}).get("vision") or {}
    images = cfg.normalised(images) if isinstance(cfg.vision, EvaViTConfig) else images
    features = cfg.vision.module().apply({"params": vision}, images)
    return features if "vision" in params else jax.lax.stop_gradient(features)


def new_vision(config: SeedConfig, rng: jax.Array) -> Params:
    variables = config.vision.module().init(rng, jnp.zeros((1, *config.image_shape)))
    params = variables.get("params", {})
    return scale_by_depth(params) if params else params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seed(Task):
    """Stage II: learns the codes of images from a stage I that stays as it is; and an `ImageTokenizer`.

    `jaxtok.vision.seed_alignment.LearnCodes` takes stage I's parameters. Batches have

    images   uint8, or float32 in [0, 1]  [batch, height, width, channels]; or in their place
    states   float32  [batch, codes, d_model], the queries' outputs, computed once (`causal_embeddings`)
    targets  float32  [batch, *feature_shape], the generation embeddings; not with `target="image"`
    mask     float32  [batch], 1 where the image counts

    Parameters are {"frozen": {"vision", "reader"}, "codes", and with `ema_decay` "averages"}.
    """

    counted = "images"

    model: SeedConfig = SeedConfig()
    target: Literal["embedding", "image"] = "embedding"
    """What the generation embedding is compared with: `targets` of the batch, or the image itself."""
    code_weight: float = 5.0
    semantic_weight: float = 2.0
    generation_weight: float = 0.5
    ema_decay: float = 0.0
    """The decay of the codebook's moving averages; 0 (SEED): it learns by gradients."""
    prefixes: tuple[int, ...] = ()
    """The numbers of first codes that the decoder is trained on, in rising order, the last of which is all. Each image
    of a batch gets one of them. (): all codes always, as in SEED."""

    guard: CollapseGuard | None = CollapseGuard(least_std=1e-3)
    """The rule that ends a run whose codes have collapsed; `code_std` is that of z, before quantisation. None: there is
    none."""

    draws_codes: ClassVar[bool] = False
    draws_images: ClassVar[bool] = False

    def __post_init__(self):
        cfg = self.model
        if self.target not in ("embedding", "image"):
            raise ValueError(f"target is {self.target!r}; it must be embedding or image.")
        if self.target == "image" and (cfg.head == "text77" or cfg.feature_dim != math.prod(cfg.image_shape)):
            raise ValueError(
                f"model.feature_dim is {cfg.feature_dim} and head {cfg.head}; with target = image they must be "
                f"{math.prod(cfg.image_shape)}, the pixels' numbers, and mlp or qformer."
            )
        for field in ("code_weight", "semantic_weight", "generation_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1).")
        rising = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes))
        if self.prefixes and (not rising or self.prefixes[-1] != cfg.num_codes):
            raise ValueError(
                f"prefixes is {self.prefixes}; it must be numbers of codes in rising order, the last one "
                f"{cfg.num_codes}."
            )

    # -- an image tokenizer

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.model.image_shape

    @property
    def code_shape(self) -> tuple[int]:
        return (self.model.num_codes,)

    @property
    def code_values(self) -> tuple[int]:
        return (self.model.codebook_size,)

    def encode(
        self, params: Params, images: Float[Array, "batch height width channels"], rng: jax.Array | None = None
    ) -> Int[Array, "batch codes 1"]:
        """The codes of images in [0, 1]; nothing is drawn.

        Raises:
          ValueError: the images have another shape or type.
        """
        check_images(images, self.image_shape)
        return _encode(self, _reading(params), images)

    def decode(
        self, params: Params, codes: Int[Array, "batch codes 1"], rng: jax.Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        """Images, of all codes or of a prefix in `prefixes`, with `target="image"`.

        Raises:
          ValueError: the codes have another shape or are outside the vocabulary, or the tokenizer decodes to
            embeddings.
        """
        if self.target != "image":
            raise ValueError(
                f"this tokenizer decodes codes to an embedding {list(self.model.feature_shape)} for another image "
                "model (SEED: a Stable Diffusion that takes CLIP's image embeddings), not to images; use "
                "decode_to_embedding."
            )
        return self.decode_to_embedding(params, codes).reshape(-1, *self.image_shape)

    def decode_to_embedding(self, params: Params, codes: Int[Array, "batch codes 1"]) -> Float[Array, "batch ..."]:
        """The generation embeddings of codes, float32.

        The released model's are image embeddings of CLIP ViT-H/14 (1024 numbers, not normalised). Stable Diffusion 2.1
        unCLIP draws from them: the authors use noise level 0, 20 steps, guidance 10, an empty prompt and 768 x 768.

        Raises:
          ValueError: as `decode`.
        """
        check_codes(codes, self.prefixes or self.code_shape, self.code_values)
        codes = jnp.asarray(codes)
        known = codes.shape[1]
        if not self.prefixes:
            return _decode(self, params["codes"], codes, None)
        codes = jnp.pad(codes, ((0, 0), (0, self.model.num_codes - known), (0, 0)))
        return _decode(self, params["codes"], codes, jnp.asarray(known))

    def causal_embeddings(self, params: Params, images: Array) -> Float[Array, "batch codes d_model"]:
        """h, the queries' outputs for images in [0, 1]; they depend on no parameter that trains."""
        return _states(self, _reading(params), jnp.asarray(images))

    def decode_to_states(
        self, params: Params, codes: Int[Array, "batch codes 1"]
    ) -> Float[Array, "batch codes d_model"]:
        """The semantic reconstruction of h from codes.

        Raises:
          ValueError: the codes have another shape, or are outside the vocabulary.
        """
        check_codes(codes, self.code_shape, self.code_values)
        return _decode_states(self, params["codes"], jnp.asarray(codes))

    # -- a task

    def fit(self, data: Data, train: Any = None) -> Seed:
        """Raises ValueError if the batches have neither images of the right size nor states, or no targets."""
        spec, cfg = data.batch_spec(), self.model
        wanted = {"states": (cfg.num_codes, cfg.width)} if "states" in spec else {"images": cfg.image_shape}
        if self.target == "image":
            wanted["images"] = cfg.image_shape
        else:
            wanted["targets"] = cfg.feature_shape
        for name, shape in wanted.items():
            if name not in spec:
                raise ValueError(
                    f"the data are {type(data).__name__}, whose batches have no {name}, which stage II needs."
                )
            if tuple(spec[name].shape[1:]) != tuple(shape):
                raise ValueError(f"the data's {name} are {spec[name].shape[1:]}; for this model they must be {shape}.")
        return self

    def codes(self) -> Codes:
        """The module of the parameters' part `codes`."""
        return Codes(self.model, moving=bool(self.ema_decay))

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        vision, reader = jax.random.split(rng)
        with nn.logical_axis_rules(()):  # a batch of one, which no mesh divides
            frozen = {"reader": Reader(self.model).init(reader, jnp.zeros((1, 1, self.model.vision.width)))["params"]}
            if found := new_vision(self.model, vision):
                frozen["vision"] = found
            return self.start(frozen, jax.random.fold_in(rng, 1))

    def start(self, frozen: Params, rng: jax.Array) -> Params:
        """New parameters on top of stage I's."""
        states = jnp.zeros((1, self.model.num_codes, self.model.width))
        params = {FROZEN: frozen, "codes": self.codes().init(rng, states)["params"]}
        if self.ema_decay:
            table = nn.meta.unbox(params["codes"]["quantizer"]["embedding"])
            params["averages"] = CodebookAverages.init(table)
        return params

    def _states_of(self, params: Params, batch: Batch) -> Float[Array, "batch codes d_model"]:
        if "states" in batch:
            return batch["states"].astype(jnp.float32)
        return _read(self, _reading(params), as_float(batch["images"]))

    def _target(self, batch: Batch) -> Float[Array, "batch ..."]:
        if self.target == "embedding":
            return batch["targets"].astype(jnp.float32)
        return as_float(batch["images"]).reshape(len(batch["images"]), -1)

    def _terms(self, params: Params, batch: Batch, rng: jax.Array | None) -> dict[str, Any]:
        """The losses of each image, and what they are made of."""
        states, module = jax.lax.stop_gradient(self._states_of(params, batch)), self.codes()
        variables, seen = {"params": params["codes"]}, None
        z, quantized = module.apply(variables, states, method="quantize")
        u = module.apply(variables, quantized.vectors, method="lift")
        if self.prefixes and rng is not None:
            known = jax.random.choice(rng, jnp.array(self.prefixes), (len(states),))
            seen = jnp.arange(self.model.num_codes) < known[:, None]
        r = module.apply(variables, u, seen, method="semantic")
        y = module.apply(variables, u, seen, method="generation")
        target = self._target(batch)
        return {
            "code_loss": quantized.loss,
            "semantic": jnp.mean(1 - cosine(r, states), -1),
            "generation": jnp.mean(jnp.square(y - target), tuple(range(1, y.ndim))),
            "codes": quantized.codes,
            "z": z,
            "y": y,
        }

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        mask, terms = batch["mask"], self._terms(params, batch, rng)
        sums = {name: jnp.sum(terms[name] * mask) for name in _LOSSES} | {"images": jnp.sum(mask)}
        still = jax.lax.stop_gradient
        codes, z = terms["codes"], still(terms["z"])
        sums["health"] = code_sums(z, mask, codes[..., 0], self.model.codebook_size)
        if self.ema_decay:
            weights = jnp.broadcast_to(mask[:, None], codes.shape[:2])
            sums["assigned"] = assigned_sums(z, codes, self.model.codebook_size, weights)
        return sums

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """5 L_vq + 2 L_semantic + 0.5 L_generation, and its parts without their weights. Also logs what tells of a
        collapse (`jaxtok.vision.collapse`)."""
        metrics = {name: mean(sums[name], sums["images"]) for name in _LOSSES}
        loss = (
            self.code_weight * metrics["code_loss"]
            + self.semantic_weight * metrics["semantic"]
            + self.generation_weight * metrics["generation"]
        )
        metrics |= code_health(sums["health"])
        if self.ema_decay:
            metrics["state"] = sums["assigned"]
        return loss, metrics

    def after_step(self, params: Params, metrics: dict[str, Any], step: jax.Array) -> Params:
        """With `ema_decay`, the codebook is the moving average of what its codes stand for."""
        if not self.ema_decay:
            return params
        averages = params["averages"].update(*metrics["state"], decay=self.ema_decay)
        table = params["codes"]["quantizer"]["embedding"]
        codes = {**params["codes"], "quantizer": {"embedding": averages.table().astype(table.dtype)}}
        return {**params, "codes": codes, "averages": averages}

    def trainable(self, params: Params) -> Params | None:
        if not self.ema_decay:
            return None
        still = jax.tree.map(lambda _: 0.0, params["averages"])
        codes = jax.tree.map(lambda _: 1.0, params["codes"])
        return {
            **jax.tree.map(lambda _: 1.0, params),
            "averages": still,
            "codes": {**codes, "quantizer": {"embedding": 0.0}},
        }

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        mask, terms = batch["mask"], self._terms(params, batch, None)
        sums = {name: jnp.sum(terms[name] * mask) for name in _LOSSES} | {"images": jnp.sum(mask)}
        if self.target == "image":
            images = as_float(batch["images"])
            shown = jnp.clip(terms["y"].reshape(images.shape), 0, 1)
            sums["mse"] = jnp.sum(jnp.square(images - shown).mean((1, 2, 3)) * mask)
            sums["psnr"] = jnp.sum(jnp.minimum(psnr(images, shown), 100.0) * mask)
        size = self.model.codebook_size
        counted = jnp.where(mask[:, None, None] > 0, terms["codes"], size)  # those that fill the batch are dropped
        return sums | {"codes": constrain(code_counts(counted, size), None)}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Means over images of the loss and its parts without their weights: code_loss, semantic (1 - cos) and
        generation (the squared error); with `target="image"`, mse and psnr of pixels limited to [0, 1]; codes_used and
        their perplexity; and the number of images."""
        images = sums["images"]
        row = {name: sums[name] / images for name in sums if name not in ("images", "codes")}
        loss = (
            self.code_weight * row["code_loss"]
            + self.semantic_weight * row["semantic"]
            + self.generation_weight * row["generation"]
        )
        used = {
            "codes_used": float(np.sum(sums["codes"] > 0)),
            "perplexity": float(perplexity(jnp.asarray(sums["codes"]))),
        }
        return {"loss": loss, **row, **used, "images": images}

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: of what is frozen one forward pass, unless the batch has its states already; of
        the rest three."""
        cfg = self.model
        blocks = 2 * cfg.num_codes * cfg.blocks().stack_flops(cfg.num_codes)
        small = 2 * cfg.num_codes * (cfg.width**2 + 2 * cfg.width * cfg.code_dim + cfg.codebook_size * cfg.code_dim)
        head = (
            2 * cfg.num_codes * DOWN[-1] * cfg.feature_dim if cfg.head == "mlp" else cfg.reverse().flops(cfg.num_codes)
        )
        frozen = 0.0 if "states" in batch else cfg.vision.flops() + cfg.qformer.flops(cfg.vision.num_patches + 1)
        return len(batch["mask"]) * (frozen + 3 * (blocks + small + head))


_LOSSES = ("code_loss", "semantic", "generation")


def cosine(x: Float[Array, "*batch features"], y: Float[Array, "*batch features"]) -> Float[Array, "*batch"]:
    """The cosine of vectors, in float32."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum(x * y, -1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))


def _reading(params: Params) -> Params:
    """The parameters that encoding needs."""
    return {name: params[name] for name in (FROZEN, "codes")}


def _read(task: Seed, params: Params, images: Array) -> Float[Array, "batch codes d_model"]:
    return Reader(task.model).apply({"params": params[FROZEN]["reader"]}, see(task, params, images))


def _codes_of(task: Seed, params: Params, images: Array) -> Int[Array, "batch codes 1"]:
    states = _read(task, params, images)
    return task.codes().apply({"params": params["codes"]}, states, method="quantize")[1].codes


def _decoded(task: Seed, codes: Params, ids: Array, known: Array | None) -> Float[Array, "batch ..."]:
    seen = None if known is None else jnp.broadcast_to(jnp.arange(ids.shape[1]) < known, ids.shape[:2])
    return task.codes().apply({"params": codes}, ids, seen, method="decode")


_states = jax.jit(_read, static_argnums=0)
_encode = jax.jit(_codes_of, static_argnums=0)
_decode = jax.jit(_decoded, static_argnums=0)
_decode_states = jax.jit(
    lambda task, codes, ids: task.codes().apply({"params": codes}, ids, method="decode_states"), static_argnums=0
)


PUBLISHED = {"seed-tokenizer-2": SeedConfig()}
"""The tokenizer of SEED-LLaMA, by name."""
