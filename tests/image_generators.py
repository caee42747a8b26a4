"""What the tiny generators of image codes share; they are in their systems' test files, as `IMAGE_GENERATORS`.

`Histograms` exists for the tests only: it draws codes of any shape and any values.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.protocols import Task
from jaxtok.training.mesh import unboxed


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistogramSampling:
    temperature: float = 1.0
    rounds: int = 2
    """The number of parts in which an image is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histograms(Task):
    """Draws each sub-code by itself, as often as it occurred in a class (or in all). Parameters are counts."""

    counted = "images"
    model = None

    code_shape: tuple[int, ...]
    code_values: tuple[int, ...]
    num_classes: int

    @property
    def sampling(self):
        return HistogramSampling

    def init(self, rng, batch):
        shape = (self.num_classes + 1, math.prod(self.code_shape), len(self.code_values), max(self.code_values))
        return {"counts": jnp.broadcast_to(jnp.arange(shape[-1]) < np.array(self.code_values)[:, None], shape) * 1.0}

    def learn(self, params, batches):
        """Parameters with the exact counts of these batches."""
        counts = np.array(params["counts"])
        for batch in batches:
            for codes, label, real in zip(batch["codes"], batch["labels"], batch["mask"]):
                for row in (label, self.num_classes):
                    np.put_along_axis(
                        counts[row], codes[..., None], np.take_along_axis(counts[row], codes[..., None], -1) + real, -1
                    )
        return {"counts": counts}

    def nats(self, params, batch):
        counts = params["counts"]
        logs = jnp.log(counts / counts.sum(-1, keepdims=True))[batch["labels"]]
        return -jnp.take_along_axis(logs, batch["codes"][..., None], -1).mean((1, 2, 3))

    def loss(self, params, batch, rng, step):
        return jnp.mean(self.nats(params, batch) * batch["mask"]), {}

    def sums(self, params, batch, rng):
        return {"nats": jnp.sum(self.nats(params, batch) * batch["mask"]), "images": jnp.sum(batch["mask"])}

    def metrics(self, sums):
        return {"loss": sums["nats"] / sums["images"]}

    def flops(self, batch):
        return float(batch["codes"].size)

    def draw(self, params, conditions, rng, *, sampling=None, on_progress=None):
        if wrong := [c for c in conditions if c is not None and not 0 <= c < self.num_classes]:
            raise ValueError(f"a label is {wrong[0]}; classes are 0 to {self.num_classes - 1} (None is no class).")
        sampling = sampling or HistogramSampling()
        rows = np.array([self.num_classes if c is None else c for c in conditions])
        logits = jnp.log(jnp.asarray(params["counts"]))[rows] / sampling.temperature
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(rows)))
        parts = []
        for number, part in enumerate(np.array_split(np.arange(logits.shape[1]), sampling.rounds), 1):
            of_part = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            parts.append(jax.vmap(jax.random.categorical)(of_part, logits[:, part]))
            if on_progress:
                on_progress(number / sampling.rounds)
        return jnp.concatenate(parts, 1).astype(jnp.int32)


TEST_ONLY = {
    "histograms": lambda: Histograms(code_shape=(5,), code_values=(6, 3), num_classes=4),
    "histograms_of_volumes": lambda: Histograms(code_shape=(2, 3, 2), code_values=(7,), num_classes=4),
}


def random_params(task, seed=0):
    """Parameters of the task's shapes, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    if isinstance(task, Histograms):
        return {"counts": (n := task.init(None, {})["counts"]) * rng.exponential(size=n.shape).astype(np.float32)}
    sizes = (1, math.prod(task.code_shape), len(task.code_values))
    batch = {"codes": jax.ShapeDtypeStruct(sizes, np.int32), "labels": jax.ShapeDtypeStruct((1,), np.int32)}
    shapes = unboxed(jax.eval_shape(task.init, jax.random.key(0), batch))
    return jax.tree.map(lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), shapes)
