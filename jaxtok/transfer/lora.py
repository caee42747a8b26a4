"""LoRA as a Task and as a surgery: trains a low-rank difference of any task's parameters (`jaxtok.nn.lora`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax

from jaxtok.nn.lora import LoraConfig, find_sites, init_adapter, merge, saved_paths
from jaxtok.protocols import FROZEN, Batch, Data, Params, Sums, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Task):
    """Trains an adapter of a task's model. Parameters are {"frozen": the task's, "adapter": the adapter's}.

    A run starts from new parameters, or by `AddLora` from those of a trained model (`jaxtok adapt`).
    """

    task: Any
    """The task whose parameters are frozen; only the adapter trains."""
    lora: LoraConfig = LoraConfig()

    @property
    def counted(self) -> str:
        return self.task.counted

    @property
    def model(self) -> Any:
        """The task's model. Its module cannot be used with these parameters; it can with those of `merged`."""
        return self.task.model

    def with_model(self, **fields: Any) -> Lora:
        return dataclasses.replace(self, task=self.task.with_model(**fields))

    def fit(self, data: Data, train: Any = None) -> Lora:
        return dataclasses.replace(self, task=self.task.fit(data, train))

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        base, adapter = jax.random.split(rng)
        return self.start(self.task.init(base, batch), adapter)

    def start(self, params: Params, rng: jax.Array) -> Params:
        """The parameters with the task's as the frozen ones, and an adapter that changes nothing yet."""
        sites, saved = find_sites(self.lora, params), saved_paths(self.lora, params)
        return {FROZEN: params, "adapter": init_adapter(rng, sites, saved, params)}

    def merged(self, params: Params, rng: jax.Array | None = None) -> Params:
        """The task's parameters plus the differences; with a key, the differences have dropout, as in training."""
        frozen = jax.lax.stop_gradient(params[FROZEN])
        sites = find_sites(self.lora, frozen)
        return merge(frozen, sites, params["adapter"], dropout=self.lora.dropout, rng=rng)

    def loss(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """The task's loss."""
        dropout, rng = jax.random.split(rng)
        return self.task.loss(self.merged(params, dropout), batch, rng, step)

    def loss_sums(self, params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, Any]:
        dropout, rng = jax.random.split(rng)
        return self.task.loss_sums(self.merged(params, dropout), batch, rng, step)

    def loss_of(self, sums: dict[str, Any], params: Params, step: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return self.task.loss_of(sums, params["frozen"], step)

    def sums(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        return self.task.sums(self.merged(params), batch, rng)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """The task's metrics."""
        return self.task.metrics(sums)

    def evaluate(
        self, params: Params, batches: Iterable[Batch], rng: jax.Array | None = None, **options: Any
    ) -> dict[str, float]:
        """The task's evaluation of the merged parameters; the differences are merged once."""
        return self.task.evaluate(_merged(self, params), batches, rng, **options)

    def after_step(self, params: Params, metrics: dict[str, Any], step: jax.Array) -> Params:
        """Applies the task's `after_step` to the frozen parameters, so a controller or a running mean goes on."""
        return {**params, FROZEN: self.task.after_step(params[FROZEN], metrics, step)}

    def load_weights(self, params: Params) -> Params:
        frozen = self.task.load_weights(params[FROZEN])
        return params if frozen is params[FROZEN] else {**params, FROZEN: frozen}

    def flops(self, batch: Batch) -> float:
        """The task's FLOPs: gradients of frozen matrices are computed too, as the adapter's are made from them."""
        return self.task.flops(batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddLora:
    """The surgery after which a task trains an adapter, which changes nothing yet."""

    lora: LoraConfig = LoraConfig()
    steps: int = 1000
    """The number of training steps after the surgery; the learning-rate schedule starts anew."""
    optimizer: ClassVar[Literal["keep", "reset"]] = "reset"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after an adapter was added is {self.steps}; it must be at least 1.")

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The `Lora` of a task. Raises ValueError if the task trains an adapter already."""
        if isinstance(task, Lora):
            raise ValueError(
                f"a {type(task).__name__} trains an adapter already; merge it first (jaxtok.open does), and add the "
                "new one to the merged model."
            )
        return Lora(task=task, lora=self.lora), data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        return Lora(task=task, lora=self.lora).start(params, rng), None

    def towards(self, task: Task) -> AddLora:
        """This surgery, with the adapter of the task if it is a `Lora`."""
        return dataclasses.replace(self, lora=task.lora) if isinstance(task, Lora) else self


_merged = jax.jit(lambda task, params: task.merged(params), static_argnums=0)
