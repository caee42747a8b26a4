"""Text classification: the Task of an encoder that is fine-tuned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.lm.bert import Bert, BertConfig
from jaxtok.lm.fitting import fit_text
from jaxtok.nn.losses import cross_entropy, mean
from jaxtok.protocols import Batch, Data, Params, Sums, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Trains an encoder and its classifier on rows of `jaxtok.data.encoders.EncoderData`, which also have

    labels  int32  [batch], the class of a row; a row without tokens does not count

    For ELECTRA's fine-tuning (arXiv 2003.10555, appendix B), where lower layers learn more slowly, see
    `OptimizerConfig.layer_decay`.
    """

    counted = "texts"

    model: BertConfig

    def __post_init__(self):
        if not self.model.num_classes:
            raise ValueError("model.num_classes is 0; it must be the number of classes.")

    def module(self) -> Bert:
        return self.model.module()

    def fit(self, data: Data, train: Any = None) -> TextClassification:
        """See `jaxtok.lm.fitting.fit_text`."""
        return fit_text(self, data)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, batch["tokens"], method="everything")["params"]

    def start_from(self, trained: Params, params: Params) -> Params:
        """The new parameters, with those of the same name from a trained encoder in their place."""
        return {name: trained.get(name, value) for name, value in params.items()}

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        nats, correct, rows = self._scores(params, batch, rng)
        return {"nats": jnp.sum(nats * rows), "right": jnp.sum(correct * rows), "texts": jnp.sum(rows)}

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats; also logs the accuracy."""
        return mean(sums["nats"], sums["texts"]), {"accuracy": mean(sums["right"], sums["texts"])}

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        nats, correct, rows = self._scores(params, batch)
        classes = jax.nn.one_hot(batch["labels"], self.model.num_classes) * rows[:, None]
        return {"nats": nats @ classes, "right": correct @ classes, "texts": rows @ classes}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats), accuracy, mean_class_accuracy (the mean of the accuracies of all classes that occur) and
        texts, their number."""
        nats, correct, rows = (sums[name] for name in ("nats", "right", "texts"))
        occurs = rows > 0
        return {
            "loss": float(nats.sum() / rows.sum()),
            "accuracy": float(correct.sum() / rows.sum()),
            "mean_class_accuracy": float(np.mean(correct[occurs] / rows[occurs])),
            "texts": float(rows.sum()),
        }

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["tokens"].shape
        head = 2 * self.model.d_model * (self.model.d_model + self.model.num_classes)
        return 3 * rows * (length * self.model.flops(length) + head)

    def logits(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> Float[Array, "batch classes"]:
        """The logits of each text's class; with a key, with dropout."""
        module, rngs = self.module(), None if rng is None else {"dropout": rng}
        args = batch["tokens"], batch["mask"] > 0, batch["types"]
        hidden = module.apply({"params": params}, *args, deterministic=rng is None, rngs=rngs)
        return module.apply({"params": params}, hidden, method="classes")

    def _scores(self, params, batch, rng=None):
        logits = self.logits(params, batch, rng)
        correct = (logits.argmax(-1) == batch["labels"]).astype(jnp.float32)
        return cross_entropy(logits, batch["labels"]), correct, batch["mask"][:, 0]
