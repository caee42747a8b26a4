"""ELECTRA (arXiv 2003.10555): encoders that learn to tell which tokens of a text a small generator has replaced.

A generator, which is an encoder for masked words, fills chosen places with samples. The discriminator says for every
place whether its token is the original one; it is the model that is kept. The variants of the paper's section 3.4 and
Electric (arXiv 2012.08561) are options of one Task.

Initial weights are normal with standard deviation 0.02; the authors truncate this normal at two deviations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.lm.bert import Bert, BertConfig
from jaxtok.lm.fitting import fit_text
from jaxtok.lm.masked_words import Masking, Slots, put, slot_logits, take, weighted_mean
from jaxtok.nn.linear import ACTIVATIONS
from jaxtok.nn.losses import bits_per_byte, cross_entropy
from jaxtok.protocols import Batch, Data, Params, Sums, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(BertConfig):
    """BERT's encoder with embeddings of their own width. Defaults: the small discriminator."""

    d_model: int = 256
    num_heads: int = 4
    mlp_dim: int = 1024
    embedding_size: int = 128
    mask_head: bool = False
    pooler: bool = False
    next_sentence: bool = False
    replaced_head: bool = True
    """Whether there is a head that says which tokens are replaced."""
    head_activation: Literal["", "gelu", "gelu_tanh", "silu", "relu"] = ""
    """The activation of the heads for masked words and classes; empty: the same as `activation` (the authors). Hugging
    Face has gelu."""

    def __post_init__(self):
        super().__post_init__()
        if self.head_activation and self.head_activation not in ACTIVATIONS:
            raise ValueError(
                f"head_activation is {self.head_activation!r}; it must be one of {', '.join(ACTIVATIONS)}."
            )
        if self.pooler or self.next_sentence or self.positions_from_ids:
            raise ValueError("an ELECTRA has no pooler, next_sentence or positions_from_ids; they must be False.")

    def module(self) -> Electra:
        return Electra(self)


class Electra(Bert):
    """Tokens to hidden states. The methods `replaced`, `masked_words` and `classes` are its heads."""

    config: ElectraConfig

    def setup(self):
        super().setup()
        cfg = self.config
        if cfg.replaced_head:
            self.replaced_dense = self.linear(cfg.d_model, ("d_model", "channels"))
            glorot = nn.initializers.glorot_uniform()
            self.replaced_output = self.linear(1, ("d_model", "classes"), glorot)

    def replaced(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch length"]:
        """Logits that the tokens are replaced; float32."""
        y = ACTIVATIONS[self.config.activation](self.replaced_dense(hidden))
        return constrain(self.replaced_output(y)[..., 0].astype(jnp.float32))

    def head_activation(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return ACTIVATIONS[self.config.head_activation or self.config.activation](x)

    def classes(self, hidden: Float[Array, "batch length d_model"]) -> Float[Array, "batch classes"]:
        """Logits of the text's class, from the first token; float32."""
        return self.classifier(self.head_activation(self.classifier_dense(hidden[:, 0]))).astype(jnp.float32)

    def everything(self, tokens, mask=None, types=None):
        heads = super().everything(tokens, mask, types)
        return heads | ({"replaced": self.replaced(heads["hidden"])} if self.config.replaced_head else {})


class Towers(nn.Module):
    """Electric's generator: a causal encoder from each side. Together they have read all that is around a place.

    Their states are shifted by one place and joined before the head for masked words. The state that leaves the row at
    one end comes in at the other, as in the authors' code. That does no harm: the first and the last place of a row
    hold [CLS] and padding or [SEP], which are never chosen.
    """

    config: ElectraConfig

    def setup(self):
        self.left = Electra(dataclasses.replace(self.config, causal=True))
        self.right = Electra(dataclasses.replace(self.config, causal=True, mask_head=False))

    def __call__(self, tokens, mask, types, deterministic: bool = True) -> Float[Array, "batch length vocab"]:
        """Logits of every word, given all others."""
        left = self.left(tokens, mask, types, deterministic)
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        flipped = (jnp.flip(x, 1) for x in (tokens, mask, types))
        right = jnp.flip(self.right(*flipped, deterministic, jnp.flip(places, 1)), 1)
        return self.left.masked_words(jnp.concatenate([jnp.roll(left, 1, 1), jnp.roll(right, -1, 1)], -1))


class Choices(NamedTuple):
    """All that is random in a step, except for dropout."""

    slots: Slots
    draws: Float[Array, "batch slots"]
    """Uniform in [0, 1); they decide which places become the mask for the generator."""
    noise: Float[Array, "batch slots vocab"]
    """Uniform in [0, 1); the samples are made from it."""


_EMBEDDINGS = ("embedding", "position_embedding", "type_embedding", "embedding_norm")
_HEAD = ("head_dense", "head_norm", "head_bias", "head_matrix")
_OBJECTIVES = ("replaced", "replaced_masked", "replace_mlm", "all_tokens_mlm", "electric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplacedTokens(Task):
    """Trains a discriminator together with its generator, on the batches of `jaxtok.lm.masked_words.MaskedWords`.

    loss = generator_weight * L_MLM + discriminator_weight * L_Disc (section 2). No gradient goes through the samples.
    The parameters are {"discriminator": ..., "generator": ...}; the discriminator's hold what both share.
    """

    counted = "words"

    model: ElectraConfig = ElectraConfig()
    """The discriminator."""
    masking: Masking = Masking()
    generator_width: float = 0.25
    """The generator's d_model, as a part of the discriminator's. Its MLP is 4 times as wide, and it has a head for
    every 64 channels."""
    generator_depth: float = 1.0
    """The generator's layers, as a part of the discriminator's."""
    sharing: Literal["embeddings", "nothing", "everything"] = "embeddings"
    """What the generator shares with the discriminator. embeddings: those of tokens, positions and types, and their
    norm; nothing: its embeddings have its own width; everything: one encoder of the discriminator's size is both, and
    only the heads differ."""
    generator: Literal["encoder", "uniform", "towers"] = "encoder"
    """The kind of generator. encoder: it predicts masked words; uniform: every word is equally likely; towers:
    Electric's, which reads the text without masks and learns to predict all places."""
    objective: Literal["replaced", "replaced_masked", "replace_mlm", "all_tokens_mlm", "electric"] = "replaced"
    """What the discriminator predicts. replaced: which tokens differ from the original (ELECTRA); replaced_masked: the
    same, at the chosen places only (ELECTRA 15%); replace_mlm: the original words at the chosen places; all_tokens_mlm:
    the original words at all places, by a mixture of copying the input and the softmax; electric: which places were
    chosen, from the energy of the text. With replace_mlm and all_tokens_mlm, discriminator_weight should be near 1."""
    temperature: float = 1.0
    """The temperature of the samples."""
    disallow_correct: bool = False
    """Whether a sample is never the original word."""
    generator_weight: float = 1.0
    discriminator_weight: float = 50.0

    def __post_init__(self):
        for field, allowed in (
            ("sharing", ("embeddings", "nothing", "everything")),
            ("generator", ("encoder", "uniform", "towers")),
            ("objective", _OBJECTIVES),
        ):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}.")
        for field in ("generator_width", "generator_depth", "temperature"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
        for field in ("generator_weight", "discriminator_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        if self.objective == "electric" and self.generator != "towers":
            raise ValueError(
                f"generator is {self.generator!r}; it must be 'towers', as the objective electric needs towers."
            )
        if self.sharing == "everything" and self.generator != "encoder":
            raise ValueError(f"generator is {self.generator!r}; it must be 'encoder', as sharing is 'everything'.")
        self.masking.check(self.model.vocab_size)
        self.generator_config  # noqa: B018  (raises what does not fit)

    @property
    def discriminator_config(self) -> ElectraConfig:
        """`model`, with the heads that the objective needs."""
        words = self.objective in ("replace_mlm", "all_tokens_mlm")
        return dataclasses.replace(self.model, mask_head=words, replaced_head=self.objective != "replace_mlm")

    @property
    def generator_config(self) -> ElectraConfig:
        """The generator as a model of its own."""
        heads = {"mask_head": True, "replaced_head": False, "num_classes": 0}
        if self.sharing == "everything":
            return dataclasses.replace(self.model, **heads)
        width = max(1, round(self.model.d_model * self.generator_width))
        return dataclasses.replace(
            self.model,
            d_model=width,
            num_layers=max(1, round(self.model.num_layers * self.generator_depth)),
            num_heads=max(1, width // 64),
            mlp_dim=4 * width,
            embedding_size=self.model.embedding_width if self.sharing == "embeddings" else 0,
            **heads,
        )

    def fit(self, data: Data, train: Any = None) -> ReplacedTokens:
        """See `jaxtok.lm.fitting.fit_text`."""
        return fit_text(self, data)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        self.masking.check(self.model.vocab_size)
        ours, theirs = jax.random.split(rng)
        tokens = jnp.asarray(batch["tokens"])
        params = {"discriminator": self.discriminator_config.module().init(ours, tokens, method="everything")["params"]}
        if self.generator == "uniform":
            return params
        if self.generator == "towers":
            real, types = jnp.ones(tokens.shape, bool), jnp.zeros_like(tokens)
            towers = Towers(self.generator_config).init(theirs, tokens, real, types)["params"]
            return params | {"generator": {tower: self._own(towers[tower]) for tower in ("left", "right")}}
        generator = self.generator_config.module().init(theirs, tokens, method="everything")["params"]
        return params | {"generator": self._own(generator)}

    def owns(self, name: str) -> bool:
        """Whether a parameter of the generator, by its first name, is its own."""
        if self.sharing == "everything":
            return name in _HEAD
        return self.sharing == "nothing" or name not in _EMBEDDINGS

    def _own(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in params.items() if self.owns(name)}

    def generator_params(self, params: Params) -> Params:
        """The generator's parameters and those that it shares, for the module of `generator_config` (or the towers)."""
        shared = params["discriminator"]
        if self.sharing == "nothing":
            return params["generator"]
        if self.sharing == "embeddings":
            shared = {name: shared[name] for name in _EMBEDDINGS}
        if self.generator == "towers":
            return {tower: {**shared, **own} for tower, own in params["generator"].items()}
        return {**shared, **params["generator"]}

    def export(self, params: Params) -> tuple[ElectraConfig, Params]:
        """The discriminator as a model of its own: its config and its parameters."""
        return self.discriminator_config, params["discriminator"]

    def choose(self, rng: jax.Array, batch: Batch) -> Choices:
        """The random choices of a step."""
        places, draw, noise = jax.random.split(rng, 3)
        slots = self.masking.choose(places, self.masking.candidates(batch["tokens"], batch["mask"]), batch["mask"])
        shape = slots.places.shape
        noise = jax.random.uniform(noise, (*shape, self.model.vocab_size))
        return Choices(slots, jax.random.uniform(draw, shape), constrain(noise, "batch", None, "vocab"))

    def run(self, params: Params, batch: Batch, choices: Choices, dropout: jax.Array | None = None) -> dict[str, Array]:
        """Runs both models forward.

        Returns:
          masked [batch, length]: what the generator reads.
          words [batch, slots, vocab], nats [batch, slots]: its logits, and its cross entropy at the original words.
          samples [batch, slots], corrupted [batch, length]: words drawn from it, and the text with them.
          labels [batch, length]: 1 where a token is replaced (for electric: chosen), as the discriminator should say.
          replaced [batch, length]: the discriminator's logits (all_tokens_mlm: those of copying; replace_mlm: none).
          sums: the total and the weight of each part of the loss, for `loss_of`.
          generator_loss, discriminator_loss, loss: scalars.
        """
        slots, tokens = choices.slots, batch["tokens"]
        real, types = batch["mask"].astype(jnp.float32), batch["types"]
        keys = (None, None) if dropout is None else jax.random.split(dropout)
        targets = take(tokens, slots.places)
        masked = self.masking.hide(tokens, slots, choices.draws)
        words, everywhere = self._generate(params, masked, tokens, real, types, slots, keys[0])
        nats = cross_entropy(words, targets)
        if everywhere is None:
            generator = jnp.sum(nats * slots.weights), jnp.sum(slots.weights)
        else:
            candidates = self.masking.candidates(tokens, real).astype(jnp.float32)
            generator = jnp.sum(cross_entropy(everywhere, tokens) * candidates), jnp.sum(candidates)
        samples = sample(words, choices.noise, self.temperature, targets if self.disallow_correct else None)
        corrupted = put(tokens, slots.places, slots.weights, samples)
        chosen = put(jnp.zeros_like(tokens), slots.places, slots.weights, jnp.ones_like(samples))
        labels = chosen * (corrupted != tokens) if self.objective != "electric" else chosen
        result = {"masked": masked, "words": words, "nats": nats, "samples": samples, "corrupted": corrupted}
        result |= {"labels": labels}

        def discriminator(*args, **kwargs):
            rngs = None if keys[1] is None else {"dropout": keys[1]}
            module = self.discriminator_config.module()
            return module.apply({"params": params["discriminator"]}, *args, rngs=rngs, **kwargs)

        hidden = discriminator(corrupted, real > 0, types, deterministic=dropout is None)
        if self.objective == "replace_mlm":
            logits = discriminator(hidden, slots.places, method="masked_words")
            values, weights = cross_entropy(logits, targets), slots.weights
        else:
            logits = discriminator(hidden, method="replaced")
            values, weights = None, real
            if self.objective == "all_tokens_mlm":
                values = copying_nats(logits, discriminator(hidden, method="masked_words"), corrupted, tokens)
            elif self.objective == "electric":  # log q of the generator, and the log odds of a chosen place
                energy = jax.lax.stop_gradient(-cross_entropy(everywhere, corrupted))
                logits = logits + energy + math.log(self.masking.rate / (1 - self.masking.rate))
            elif self.objective == "replaced_masked":
                weights = real * chosen
            if values is None:
                values = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)
            result["replaced"] = logits
        sums = {"generator": generator, "discriminator": (jnp.sum(values * weights), jnp.sum(weights))}
        loss, parts = self.loss_of(sums, params, jnp.zeros((), jnp.int32))
        return result | parts | {"sums": sums, "loss": loss}

    def _generate(self, params, masked, tokens, real, types, slots, dropout):
        """The generator's logits at the slots; and at all places, if it is towers."""
        if self.generator == "uniform":
            return jnp.zeros((*slots.places.shape, self.model.vocab_size), jnp.float32), None
        theirs = self.generator_params(params)
        if self.generator == "encoder":
            return slot_logits(self.generator_config, theirs, masked, real, types, slots, dropout), None
        everywhere = Towers(self.generator_config).apply(
            {"params": theirs},
            tokens,
            real > 0,
            types,
            deterministic=dropout is None,
            rngs=None if dropout is None else {"dropout": dropout},
        )
        return take(everywhere, slots.places), everywhere

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        choose, dropout = jax.random.split(rng)
        return self.run(params, batch, self.choose(choose, batch), dropout)["sums"]

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the joint loss; also logs both parts."""
        parts = {f"{name}_loss": weighted_mean(*sums[name]) for name in ("generator", "discriminator")}
        loss = self.generator_weight * parts["generator_loss"]
        return loss + self.discriminator_weight * parts["discriminator_loss"], parts

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        choices = self.choose(rng, batch)
        result = self.run(params, batch, choices)
        slots, real = choices.slots, batch["mask"].astype(jnp.float32)
        targets = take(batch["tokens"], slots.places)
        of_slots = {
            "nats": result["nats"],
            "words": jnp.ones_like(result["nats"]),
            "bytes": take(batch["bytes"], slots.places),
            "likeliest": result["words"].argmax(-1) == targets,
            "sampled": result["samples"] == targets,
        }
        sums = {name: jnp.sum(x * slots.weights) for name, x in of_slots.items()}
        chosen = put(jnp.zeros_like(batch["tokens"]), slots.places, slots.weights, jnp.ones_like(slots.places))
        weights = {"replaced_masked": chosen * real, "replace_mlm": slots.weights}.get(self.objective, real)
        logits = result.get("replaced", jnp.zeros_like(real))
        claims = (logits > 0).astype(jnp.int32)
        return sums | {
            "discriminator_loss": result["discriminator_loss"] * jnp.sum(weights),
            "discriminator_weight": jnp.sum(weights),
            "right": jnp.sum((claims == result["labels"]) * real),
            "claimed": jnp.sum(claims * real),
            "histograms": histograms(logits, result["labels"], real),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns means over all places of all batches.

        loss: the joint loss, as in training.
        generator_loss, bits_per_byte, generator_accuracy, sampled_accuracy: nats a chosen word, bits per byte of the
          chosen words' text, and how often the likeliest and the sampled word are right.
        discriminator_loss: the mean over the places that count in training.
        accuracy, baseline_accuracy, precision, recall, auc: how well replaced tokens are told at all real places, if
          that is the objective; the baseline calls every token original, and auc says how often a replaced token has a
          higher logit than an original one.
        replaced, tokens: the numbers of replaced tokens and of all real ones.
        """
        words, counts = sums["words"], sums["histograms"]
        generator_loss = sums["nats"] / words
        discriminator_loss = sums["discriminator_loss"] / max(sums["discriminator_weight"], 1.0)
        metrics = {
            "loss": self.generator_weight * generator_loss + self.discriminator_weight * discriminator_loss,
            "generator_loss": generator_loss,
            "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
            "generator_accuracy": sums["likeliest"] / words,
            "sampled_accuracy": sums["sampled"] / words,
            "discriminator_loss": discriminator_loss,
        }
        original, replaced = counts.sum(1).tolist()
        if self.objective in ("replaced", "replaced_masked", "electric"):
            hits = float(counts[1, _BINS // 2 :].sum())
            metrics |= {
                "accuracy": sums["right"] / (original + replaced),
                "baseline_accuracy": original / (original + replaced),
                "precision": hits / max(sums["claimed"], 1.0),
                "recall": hits / max(replaced, 1.0),
                "auc": area_under_curve(counts),
                "replaced": replaced,
                "tokens": original + replaced,
            }
        return metrics

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["tokens"].shape
        slots = self.masking.slots(length)
        model, theirs = self.discriminator_config, self.generator_config
        total = length * (model.flops(length) + 2 * model.d_model * (model.d_model + 1))
        total += {"replace_mlm": slots, "all_tokens_mlm": length}.get(self.objective, 0) * model.mask_head_flops()
        if self.generator == "encoder":
            total += length * theirs.flops(length) + slots * theirs.mask_head_flops()
        elif self.generator == "towers":
            head = theirs.mask_head_flops() + 2 * theirs.embedding_width * theirs.d_model
            total += length * (2 * theirs.flops(length) + head)
        return 3 * rows * total


def sample(
    logits: Float[Array, "batch slots vocab"],
    noise: Float[Array, "batch slots vocab"],
    temperature: float = 1.0,
    disallowed: Int[Array, "batch slots"] | None = None,
) -> Int[Array, "batch slots"]:
    """Words drawn from softmax(logits / temperature) by Gumbel noise made of uniform `noise`; without gradient."""
    logits = jax.lax.stop_gradient(logits.astype(jnp.float32)) / temperature
    if disallowed is not None:
        logits = logits - 1000.0 * jax.nn.one_hot(disallowed, logits.shape[-1])
    return jnp.argmax(logits - jnp.log(-jnp.log(noise + 1e-9) + 1e-9), -1).astype(jnp.int32)


def copying_nats(copy: Array, words: Array, tokens: Array, targets: Array) -> Float[Array, "batch length"]:
    """-log(c [token = target] + (1 - c) softmax(words)[target]) with c = sigmoid(copy)."""
    chosen = -jax.nn.softplus(copy) - cross_entropy(words, targets)
    copied = jnp.where(tokens == targets, -jax.nn.softplus(-copy), -jnp.inf)
    return -jnp.logaddexp(chosen, copied)


_BINS, _RANGE = 4096, 16.0


def histograms(logits: Array, labels: Array, weights: Array) -> Float[Array, "2 bins"]:
    """How many logits of each label are in each bin between -16 and 16; the upper half of the bins is above 0."""
    bins = jnp.clip(jnp.ceil((logits / _RANGE + 1) * (_BINS // 2)) - 1, 0, _BINS - 1).astype(jnp.int32)
    return jnp.zeros((2, _BINS)).at[labels, bins].add(weights)


def area_under_curve(counts: np.ndarray) -> float:
    """The area under the ROC curve, from `histograms`: how likely a logit of label 1 is in a higher bin than one of
    label 0, where the same bin counts half. It is 0.5 if a label is missing.
    """
    original, replaced = counts
    if not original.sum() or not replaced.sum():
        return 0.5
    below = np.cumsum(original) - original / 2
    return float(np.sum(replaced * below) / (original.sum() * replaced.sum()))


_BASE = {"d_model": 768, "num_heads": 12, "mlp_dim": 3072, "embedding_size": 768}
_LARGE = {"num_layers": 24, "d_model": 1024, "num_heads": 16, "mlp_dim": 4096, "embedding_size": 1024}

PUBLISHED = {
    "small": ReplacedTokens(),
    "base": ReplacedTokens(model=ElectraConfig(**_BASE), generator_width=1 / 3),
    "large": ReplacedTokens(model=ElectraConfig(**_LARGE), masking=Masking(rate=0.25)),
}
"""The paper's sizes (appendix A) of discriminator and generator. The released small model was trained longer, with a
generator as wide as the discriminator: `dataclasses.replace(PUBLISHED["small"], generator_width=1.0)`."""
