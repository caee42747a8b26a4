"""Collapse of an image tokenizer, seen early: what is logged from the first step on, and a rule that stops a dead run.

A tokenizer is dead when its codes no longer depend on the image. The decoder then models all images at once, its loss
looks harmless, and nothing wakes it up. Three numbers tell:

    code_std     the standard deviation of codes over the images of a batch, the mean over positions and scalars
    codes_used   how many codes occur in the batch; and code_perplexity, that of their shares
    null_gap     the loss without the condition minus the loss with it

A task adds `code_sums` of its codes to its `loss_sums`, gives `code_health` of the batch's sums as metrics, and has a
`CollapseGuard` as its `guard`, which the training loop asks after each row that it logs (`jaxtok.protocols.Task`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.axes import constrain
from jaxtok.nn.quantizers import code_counts, perplexity

COUNTED = 2**20
"""The largest vocabulary whose codes are counted."""


def code_sums(
    codes: Float[Array, "batch positions scalars"],
    mask: Float[Array, " batch"],
    ids: Int[Array, "batch positions"] | None = None,
    size: int = 0,
) -> dict[str, Array]:
    """What `code_health` is made of; it adds up over the parts of a batch, and over batches.

    Args:
      codes: the numbers that stand for the codes (vectors of a codebook, scalars, bits).
      mask: 1 where the image counts.
      ids: the codes as numbers below `size`; None, or above `COUNTED`: they are not counted.
    """
    codes, weights = codes.astype(jnp.float32), mask[:, None, None]
    sums = {
        "code_sum": jnp.sum(codes * weights, 0),
        "code_square": jnp.sum(jnp.square(codes) * weights, 0),
        "code_images": jnp.sum(mask),
    }
    if ids is None or not 0 < size <= COUNTED:
        return sums
    counted = jnp.where(mask[:, None] > 0, ids, size)  # codes of images that fill the batch are dropped
    return sums | {"codes": constrain(code_counts(counted, size), None)}


def code_health(sums: Mapping[str, Array]) -> dict[str, Array]:
    """code_std, and if codes were counted, codes_used and code_perplexity."""
    images = jnp.maximum(jnp.asarray(sums["code_images"], jnp.float32), 1)
    mean = sums["code_sum"] / images
    variance = jnp.maximum(sums["code_square"] / images - jnp.square(mean), 0)
    found = {"code_std": jnp.sqrt(variance).mean()}
    if "codes" in sums:
        counts = jnp.asarray(sums["codes"])
        found |= {"codes_used": jnp.sum(counts > 0).astype(jnp.float32), "code_perplexity": perplexity(counts)}
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollapseGuard:
    """Says that a run is dead if one of the numbers has been too small in every logged row of many steps.

    A number that a task does not log is not judged. A healthy run may begin below a limit (the gap begins at 0, if the
    decoder's last layer does), so what counts is how long it stays there.
    """

    least_std: float = 0.01
    """The least `code_std`."""
    least_used: int = 2
    """The least `codes_used`."""
    least_gap: float = 1e-3
    """The least `null_gap`."""
    patience: int = 500
    """The number of steps for which the codes may be too much alike."""
    gap_patience: int = 2000
    """The number of steps for which the gap may be too small."""

    def __post_init__(self):
        for field in ("patience", "gap_patience"):
            if getattr(self, field) < 1:
                raise ValueError(f"guard.{field} is {getattr(self, field)}; it must be at least 1.")

    def __call__(self, rows: Sequence[Mapping[str, float]]) -> str:
        """One sentence that says why the run is dead; empty: it lives.

        Args:
          rows: the logged numbers of training up to now, in order, each with its `step`.
        """
        rules = (
            ("code_std", self.least_std, self.patience, "the codes of all images are alike"),
            ("codes_used", self.least_used, self.patience, "almost no code is used"),
            ("null_gap", self.least_gap, self.gap_patience, "the decoder does without the codes"),
        )
        for name, least, patience, meaning in rules:
            since = None
            for row in reversed(rows):
                value = row.get(name, math.nan)
                if not value < least:
                    break
                since = row["step"]
            if since is not None and rows[-1]["step"] - since >= patience:
                now = rows[-1]
                return (
                    f"the tokenizer has collapsed: {name} has been below {least:g} since step {since} (it is "
                    f"{now[name]:.2g} at step {now['step']}), so {meaning}; train with a lower learning rate, a longer "
                    "warm-up or times nearer to noise, or set task.guard to None to go on."
                )
        return ""
