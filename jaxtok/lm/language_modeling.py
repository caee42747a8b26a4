"""Next-token prediction: the Task of every causal language model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from jaxtok.lm.fitting import fit_text
from jaxtok.nn.losses import cross_entropy, text_loss, text_metrics, text_sums
from jaxtok.nn.parameter_attention import TokenCounts, new_token_mask
from jaxtok.protocols import Batch, Data, Params, Sums, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling(Task):
    """Trains a causal language model on rows of text; see `jaxtok.protocols.Batch`."""

    counted = "tokens"

    model: Any
    """The config of the model, whose `module()` is a `jaxtok.protocols.CausalLM`, such as a `DecoderConfig`."""
    frozen_tokens: TokenCounts = TokenCounts()
    """How many parameter tokens of each projection stay as they are. If any is positive, only the later ones train."""

    def module(self) -> nn.Module:
        return self.model.module()

    def fit(self, data: Data, train: Any = None) -> LanguageModeling:
        """See `jaxtok.lm.fitting.fit_text`."""
        return fit_text(self, data)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return self.module().init(rng, batch["tokens"])["params"]

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        return text_sums(self._nats(params, batch, rng), batch["mask"], batch["bytes"])

    def loss_of(self, sums: dict[str, jax.Array], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross entropy in nats a token; also logs bits per byte of text."""
        return text_loss(sums)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        return text_sums(self._nats(params, batch), batch["mask"], batch["bytes"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns loss (nats a token), perplexity, bits_per_byte (comparable across tokenizers), tokens and bytes."""
        return text_metrics(sums)

    def trainable(self, params: Params) -> Params | None:
        return new_token_mask(params, self.frozen_tokens) if self.frozen_tokens.total() else None

    def flops(self, batch: Batch) -> float:
        """FLOPs of a training step: three times the forward pass, with attention counted over whole rows."""
        rows, length = batch["tokens"].shape
        return 3 * rows * length * self.model.flops(length)

    def _nats(self, params, batch, rng=None):
        logits, _ = self.module().apply(
            {"params": params},
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        return cross_entropy(logits, batch["targets"])
