"""Text classification, the Task of an encoder that is fine-tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.lm.bert import BertConfig
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.protocols import Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassification:
    """Trains an encoder and its head for classes on rows as `jaxtok.data.encoders.EncoderData` has them, and

    labels  int32  [batch], the class of a row; a row without tokens does not count

    ELECTRA's fine-tuning (arXiv 2003.10555, appendix B) decays the rate by layers: `OptimizerConfig.layer_decay`.
    """

    model: BertConfig

    def __post_init__(self):
        if not self.model.num_classes:
            raise ValueError("model.num_classes is 0; set it to the number of classes.")

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.model.module().init(rng, batch["tokens"], method="everything")["params"]

    def start_from(self, trained: Params, params: Params) -> Params:
        """New parameters with those of a trained encoder, whose heads are left."""
        return {name: trained.get(name, value) for name, value in params.items()}

    def loss(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross entropy in nats; also logs the accuracy."""
        nats, correct, rows = self._judge(params, batch, rng)
        return masked_mean(nats, rows), {"accuracy": masked_mean(correct, rows)}

    def evaluate(self, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss (nats), accuracy, its mean over the classes that there are (so that each counts the same), and rows.

        Raises:
          ValueError: there was not a single text.
        """
        sums = np.zeros((3, self.model.num_classes))
        for batch in batches:
            sums += np.asarray(_evaluation_sums(self, params, batch), np.float64)
        nats, correct, rows = sums
        if not rows.sum():
            raise ValueError("the evaluation data hold no text; choose a larger corpus or split.")
        there = rows > 0
        return {
            "loss": float(nats.sum() / rows.sum()),
            "accuracy": float(correct.sum() / rows.sum()),
            "mean_class_accuracy": float(np.mean(correct[there] / rows[there])),
            "rows": float(rows.sum()),
        }

    def trainable(self, params: Params) -> Params | None:
        return None

    def flops(self, batch: Batch) -> float:
        """Of one training step: three times the forward pass, attention counted at the whole length of a row."""
        rows, length = batch["tokens"].shape
        head = 2 * self.model.d_model * (self.model.d_model + self.model.num_classes)
        return 3 * rows * (length * self.model.flops(length) + head)

    def _judge(self, params, batch, rng=None):
        module, rngs = self.model.module(), None if rng is None else {"dropout": rng}
        args = batch["tokens"], batch["mask"] > 0, batch["types"]
        hidden = module.apply({"params": params}, *args, deterministic=rng is None, rngs=rngs)
        logits = module.apply({"params": params}, hidden, method="classes")
        correct = (logits.argmax(-1) == batch["labels"]).astype(jnp.float32)
        return cross_entropy(logits, batch["labels"]), correct, batch["mask"][:, 0]


def _sums(task: TextClassification, params, batch):
    nats, correct, rows = task._judge(params, batch)
    classes = jax.nn.one_hot(batch["labels"], task.model.num_classes) * rows[:, None]
    return jnp.stack([nats @ classes, correct @ classes, rows @ classes])


_evaluation_sums = jax.jit(_sums, static_argnums=0)
