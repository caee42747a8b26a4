"""Stage I of SEED (arXiv 2307.08041, section 3.2), and the way from there to stage II (`jaxtok.vision.seed`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.data.arrays import write_arrays
from jaxtok.nn.contrastive import contrastive_nats, hard_negatives
from jaxtok.nn.losses import by_parts, cross_entropy, masked_mean
from jaxtok.nn.transformer import StackConfig
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task
from jaxtok.vision.images import as_float
from jaxtok.vision.qformer import QFormerConfig
from jaxtok.vision.seed import Aligner, Seed, SeedConfig, new_vision, see


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedAlignment(Task):
    """Stage I: trains the Q-Former so that the last query's output agrees with the image's text.

    The loss is contrastive, over the whole batch of the mesh, with label smoothing; captioning and matching are options
    of the authors' code that SEED leaves off. The rest of the paper's recipe is in configs/vision/seed.py. Batches have

    images     uint8, or float32 in [0, 1]  [batch, height, width, channels]
    tokens     int32    [batch, length], the text; the first token is the one whose state is compared
    text_mask  float32  [batch, length], 1 for real tokens
    mask       float32  [batch], 1 where the pair counts

    Parameters are {"aligner", and "vision" or "frozen": {"vision"}}.

    The authors' learning rate falls once an epoch; ours falls every step.
    """

    counted = "images"

    model: SeedConfig = SeedConfig()
    train_vision: bool = False
    """Whether the image encoder trains too. (The paper's is frozen; a small run has none that is trained already.)"""
    captioning: bool = False
    """Whether the queries' keys and values must also tell the caption (all terms weigh 1)."""
    matching: bool = False
    """Whether the last query must also tell a text from a similar one of another image."""
    smoothing: float = 0.1
    part: int = 0
    """How many pairs are run and compared at a time, a divisor of the batch; 0: all. The gradient is that of the whole
    batch. Memory then grows with the batch only by the pairs themselves and their vectors; all runs forward twice."""

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must be in [0, 1).")
        if self.part < 0:
            raise ValueError(f"part is {self.part}; it must be positive, or 0 for the whole batch.")
        if not self.model.qformer.vocab_size:
            raise ValueError("model.qformer.vocab_size is 0; it must be the size of the texts' vocabulary.")

    def fit(self, data: Data, train: Any = None) -> SeedAlignment:
        """Raises ValueError if the images have another size, texts are too long or have unknown ids, or there is one
        pair in a batch."""
        spec = data.batch_spec()
        if "tokens" not in spec:
            raise ValueError(f"the data are {type(data).__name__}, whose images have no texts; give images with texts.")
        batch, length = spec["tokens"].shape
        if batch < 2:
            raise ValueError(
                "data.batch_size is 1; the contrastive loss of one pair is always 0: it must be at least 2."
            )
        if self.part and batch % self.part:
            raise ValueError(f"task.part is {self.part}; it must divide data.batch_size = {batch}.")
        if spec["images"].shape[1:] != self.model.image_shape:
            raise ValueError(
                f"the data's images are {spec['images'].shape[1:]}; for this model they must be "
                f"{self.model.image_shape}."
            )
        if length > self.model.qformer.max_positions:
            raise ValueError(f"data.length is {length}, more than max_positions = {self.model.qformer.max_positions}.")
        ids = getattr(data, "vocab_size", 0)
        if ids >= self.model.qformer.vocab_size:
            raise ValueError(
                f"model.qformer.vocab_size is {self.model.qformer.vocab_size}; it must be above {ids}, the ids of the "
                "texts, as its last one begins a caption."
            )
        return self

    def aligner(self) -> Aligner:
        return Aligner(self.model, matching=self.matching)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        vision, aligner = jax.random.split(rng)
        cfg = self.model
        with nn.logical_axis_rules(()):  # a batch of one, which no mesh divides
            tokens = jnp.zeros((1, 2), jnp.int32)
            features = jnp.zeros((1, 1, cfg.vision.width))
            params = {"aligner": self.aligner().init(aligner, features, tokens, method="everything")["params"]}
            if found := new_vision(cfg, vision):
                params |= {"vision": found} if self.train_vision else {FROZEN: {"vision": found}}
        return params

    def _apply(self, params: Params, method: str, *arguments: Any, rng: Any = None, **options: Any) -> Any:
        rngs = None if rng is None else {"dropout": rng}
        return self.aligner().apply(
            {"params": params["aligner"]}, *arguments, method=method, deterministic=rng is None, rngs=rngs, **options
        )

    def vectors(
        self, params: Params, images: Array, tokens: Array, text_mask: Array, rng: jax.Array | None = None
    ) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
        """The vectors of images and texts, both of length 1; with a key, with dropout."""

        def of_part(images, tokens, mask, number):
            key = None if rng is None else jax.random.fold_in(rng, number[0, 0])
            v = self._apply(params, "image_feature", see(self, params, as_float(images[0])), rng=key)
            t = self._apply(params, "text_feature", tokens[0], mask[0], rng=key)
            return jnp.concatenate([v, t], -1)[None]

        arrays = images, tokens, text_mask, jnp.arange(len(images))
        both = by_parts(of_part, self.part, *(x[None] for x in arrays))[0]
        return tuple(jnp.split(both, 2, axis=-1))

    def _contrast(self, params, v, t, mask):
        """The mean of both directions' nats, for each pair."""
        temperature = params["aligner"]["temperature"]
        options = {"mask": mask, "smoothing": self.smoothing, "part": self.part}
        return (contrastive_nats(v, t, temperature, **options) + contrastive_nats(t, v, temperature, **options)) / 2

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The contrastive loss plus those that are chosen. Also logs how much images' and texts' vectors differ: their
        standard deviation over the batch, times the root of their length, is 1 for vectors in all directions and 0 if
        they have collapsed."""
        draws, negatives, other = jax.random.split(rng, 3)
        dropout = draws if self.model.qformer.dropout or self.model.qformer.attention_dropout else None
        inputs = batch["images"], batch["tokens"], batch["text_mask"]
        v, t = self.vectors(params, *inputs, dropout)
        loss = masked_mean(self._contrast(params, v, t, batch["mask"]), batch["mask"])
        metrics = {"contrastive": loss, "temperature": params["aligner"]["temperature"]}
        metrics |= {"image_std": spread(v), "text_std": spread(t)}
        if self.captioning:
            metrics["captioning"] = self._caption_loss(params, batch, other if dropout is not None else None)
            loss = loss + metrics["captioning"]
        if self.matching:
            metrics["matching"] = self._match_loss(params, batch, v, t, negatives, dropout)
            loss = loss + metrics["matching"]
        return loss, metrics

    def caption_nats(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> tuple[Array, Array]:
        """The nats of each token of the captions after the first, and which of them count."""
        tokens, bos = batch["tokens"], self.model.qformer.bos_id

        def of_part(images, tokens, mask, number):
            key = None if rng is None else jax.random.fold_in(rng, number[0, 0])
            begun = jnp.asarray(tokens[0]).at[:, 0].set(bos)
            seen = see(self, params, as_float(images[0]))
            logits = self._apply(params, "caption", seen, begun, mask[0], rng=key)
            return cross_entropy(logits[:, :-1], begun[:, 1:], self.smoothing)[None]

        arrays = batch["images"], tokens, batch["text_mask"], jnp.arange(len(tokens))
        nats = by_parts(of_part, self.part, *(x[None] for x in arrays))[0]
        return nats, batch["text_mask"][:, 1:] * batch["mask"][:, None]

    def _caption_loss(self, params, batch, rng):
        return masked_mean(*self.caption_nats(params, batch, rng))

    def _match_loss(self, params, batch, v, t, rng, dropout):
        """Of each pair, of its image with another's text, and of its text with another's image."""
        first, second = jax.random.split(rng)
        temperature = params["aligner"]["temperature"]
        texts = hard_negatives(v, t, temperature, first, part=self.part)
        pictures = hard_negatives(t, v, temperature, second, part=self.part)
        images, tokens, mask = batch["images"], batch["tokens"], batch["text_mask"]
        arrays = (
            images, tokens, mask, jnp.take(images, pictures, axis=0), jnp.take(tokens, texts, axis=0),
            jnp.take(mask, texts, axis=0), jnp.arange(len(images)),
        )  # fmt: skip

        def of_part(images, tokens, mask, other_images, other_tokens, other_mask, number):
            key = None if dropout is None else jax.random.fold_in(dropout, number[0, 0])
            own, other = (see(self, params, as_float(x[0])) for x in (images, other_images))
            logits = self._apply(
                params,
                "match",
                jnp.concatenate([own, own, other]),
                jnp.concatenate([tokens[0], other_tokens[0], tokens[0]]),
                jnp.concatenate([mask[0], other_mask[0], mask[0]]),
                rng=key,
            )
            right = (jnp.arange(3 * images.shape[1]) < images.shape[1]).astype(jnp.int32)
            return cross_entropy(logits, right).reshape(3, -1).mean(0)[None]

        nats = by_parts(of_part, self.part, *(x[None] for x in arrays))[0]
        return masked_mean(nats, batch["mask"])

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        mask = batch["mask"]
        v, t = self.vectors(params, batch["images"], batch["tokens"], batch["text_mask"])
        found = {"loss": jnp.sum(self._contrast(params, v, t, mask) * mask), "images": jnp.sum(mask)}
        scores = jnp.einsum("nd,md->nm", v, t, precision="highest")
        scores = jnp.where((mask > 0) & (mask[:, None] > 0), scores, -jnp.inf)
        own = jnp.arange(len(v))
        found["image_to_text"] = jnp.sum((scores.argmax(1) == own) * mask)
        found["text_to_image"] = jnp.sum((scores.argmax(0) == own) * mask)
        if self.captioning:
            nats, counted = self.caption_nats(params, batch)
            found |= {"caption_nats": jnp.sum(nats * counted), "caption_tokens": jnp.sum(counted)}
        return found

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Means over pairs of the contrastive loss, and of whether the nearest text of the batch is an image's own
        (image_to_text) and the nearest image a text's own (text_to_image); with captioning, caption_loss, the nats of a
        caption's token; and the number of images."""
        row = {name: sums[name] / sums["images"] for name in ("loss", "image_to_text", "text_to_image")}
        if "caption_nats" in sums:
            row["caption_loss"] = sums["caption_nats"] / max(sums["caption_tokens"], 1)
        return row | {"images": sums["images"]}

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass; of a frozen image encoder, once."""
        cfg, length = self.model, batch["tokens"].shape[1]
        context = cfg.vision.num_patches + 1
        qformer = cfg.qformer.flops(context) + cfg.qformer.flops(0, length)
        return len(batch["images"]) * ((3 if self.train_vision else 1) * cfg.vision.flops() + 3 * qformer)


def spread(x: Float[Array, "batch *positions features"]) -> Float[Array, ""]:
    """The root mean square deviation of vectors from their mean over the batch, over the root mean square of their
    lengths: 1 for vectors whose mean is 0, and 0 if all images have the same one."""
    x = x.astype(jnp.float32)
    varied = jnp.sum(jnp.square(x - x.mean(0, keepdims=True)))
    return jnp.sqrt(varied / jnp.maximum(jnp.sum(jnp.square(x)), 1e-12))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnCodes:
    """The surgery from stage I to stage II: what reads images stays as it is, and the codes are new."""

    to: Seed | None = None
    """The task afterwards, whose image encoder and Q-Former have stage I's sizes. In `Experiment.start`, None means the
    run's own task."""
    steps: int = 1000
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after stage I is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """Stage II. Raises ValueError if the task is no stage I, or `to` is missing or has other sizes."""
        if not isinstance(task, SeedAlignment):
            raise ValueError(f"a {type(task).__name__} has no codes to learn; it must be a SeedAlignment (stage I).")
        if self.to is None:
            raise ValueError("to is None; it must be the task of stage II (a Seed).")
        for field in ("vision", "qformer", "vision_norm", "image_mean", "image_std"):
            if _reads(getattr(task.model, field)) != _reads(getattr(self.to.model, field)):
                raise ValueError(f"stage II's model.{field} is not stage I's; give both the same.")
        return self.to, data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        to, _ = self.task(task, data)
        return nn.meta.unbox(to.start(reader_of(params), rng)), None

    def towards(self, task: Task) -> LearnCodes:
        return self if self.to is not None else dataclasses.replace(self, to=task)


def _reads(value: Any) -> Any:
    """A part of a model's config, without what does not change its outputs outside of training, or only rounds them."""
    if isinstance(value, QFormerConfig):
        value = value.without_text()
    if not isinstance(value, StackConfig):
        return value
    free = ("dtype", "param_dtype", "remat", "attention", "unroll", "dropout", "attention_dropout", "init_std")
    defaults = {field.name: field.default for field in dataclasses.fields(StackConfig) if field.name in free}
    return dataclasses.replace(value, **defaults)


TEXT_ONLY = ("embedding", "position_embedding", "head_dense", "head_norm", "head_bias")
"""The Q-Former's parameters that only texts need, beside the layers' `text_ffn` and its norm."""


def reader_of(params: Params) -> Params:
    """What stage II keeps of stage I's parameters, without what reads texts."""

    def images_only(tree):
        if not isinstance(tree, dict):
            return tree
        return {k: images_only(v) for k, v in tree.items() if k not in ("text_ffn", "norm_text")}

    aligner = params["aligner"]
    qformer = {k: images_only(v) for k, v in aligner["qformer"].items() if k not in TEXT_ONLY}
    reader = {"qformer": qformer} | ({"vision_norm": aligner["vision_norm"]} if "vision_norm" in aligner else {})
    vision = params.get("vision") or params.get(FROZEN, {}).get("vision")
    return {"reader": reader} | ({"vision": vision} if vision else {})


def write_states(
    task: SeedAlignment,
    params: Params,
    data: Data,
    folder: str | Path,
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    targets: Callable[[Float[np.ndarray, "batch height width channels"]], np.ndarray] | None = None,
) -> Path:
    """Writes the queries' outputs for the images of each split, for stage II with `jaxtok.data.arrays.ArrayData`: the
    image encoder, nearly all of the work, then runs once and not in every step.

    Args:
      task, params: stage I.
      data: images; see `jaxtok.protocols.ImageSource`.
      targets: maps images in [0, 1] to what the generation embedding is compared with (CLIP's image embeddings, in
        SEED), which is written too.

    Raises:
      FileExistsError: there is something in the folder of a split.
    """
    second, frozen = Seed(model=task.model), {FROZEN: reader_of(params), "codes": {}}

    def parts(split: str) -> Iterator[dict[str, np.ndarray]]:
        for batch in data.eval_batches(split):
            real = batch["mask"] > 0
            images = np.asarray(as_float(batch["images"]))
            part = {"states": np.asarray(second.causal_embeddings(frozen, images))[real]}
            yield part | ({"targets": np.asarray(targets(images))[real]} if targets else {})

    for split in splits:
        write_arrays(Path(folder) / split, parts(split))
    return Path(folder)
