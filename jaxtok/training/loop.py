"""The training loop: one for every Task, through growths of the model, interruptions and resumption."""

from __future__ import annotations

import dataclasses
import functools
import signal
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtok.configuration import differences
from jaxtok.lm.growth import Growth
from jaxtok.training.checkpoints import Checkpoints, Meta, abstract_params, example_batch, read_config, write_config
from jaxtok.training.experiment import MAY_CHANGE, Experiment, TrainConfig, resolve
from jaxtok.training.logs import Display, MetricsLog
from jaxtok.training.optimizer import learning_rate, make_optimizer
from jaxtok.training.peak import peak_flops

INTERRUPTED = 75
"""Exit code of a run that saved and left on SIGTERM or Ctrl-C, and that the same command resumes."""


@flax.struct.dataclass
class TrainState:
    """What a step changes. `step` counts over the whole run, across growths."""

    step: jax.Array
    stage_start: jax.Array
    """The step at which the learning-rate schedule began anew."""
    params: Any
    opt_state: Any
    rng: jax.Array
    """The run's key, which stays; each step folds its number in."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    directory: Path
    step: int
    interrupted: bool
    task: Any
    params: Any
    metrics: dict[str, float]
    """Of the last evaluation."""
    flops: float
    """Model FLOPs of all training so far, of the runs that this one was forked from too."""


def train(experiment: Experiment, *, quiet: bool = False) -> Result:
    """Trains, or resumes from the newest checkpoint in the experiment's folder; a finished run is only evaluated again.

    Bit-exact: a run that was interrupted and resumed ends with the same parameters as one that was not.

    Raises:
      ValueError: the folder holds a run of another config; the message names the fields that differ.
      FloatingPointError: the loss or a gradient is not finite; the batch is saved beside the checkpoints.
    """
    experiment = resolve(experiment)
    directory = experiment.directory
    with Checkpoints(directory, experiment.train.keep_checkpoints) as checkpoints, _Interrupt() as interrupt:
        if checkpoints.latest_step() is not None:
            _check_config(directory, experiment, started=checkpoints.latest_step() > 0)
        write_config(directory, experiment)
        run = _start(experiment, checkpoints)
        log = MetricsLog(directory, run.meta.step, experiment.train.tensorboard)
        total = experiment.total_steps
        try:
            with Display(experiment.name, total, run.meta.step, enabled=not quiet) as display:
                if run.meta.step:
                    display.say(f"resuming {directory} at step {run.meta.step} of {total}")
                for stage, steps in enumerate([experiment.train.steps, *(g.steps for g in experiment.growth)]):
                    if stage < run.meta.stage:
                        continue
                    if stage > run.meta.stage:
                        run = _grow(run, experiment.growth[stage - 1], experiment.train.seed)
                        size = count(run.state.params)
                        display.say(f"{experiment.name} {run.meta.step}/{total}: grown to {size:,} parameters")
                    run = _fit(run, run.meta.stage_start + steps, experiment, checkpoints, log, display, interrupt)
                    if interrupt.received:
                        display.say(f"interrupted: saved step {run.meta.step} in {directory}; the same command resumes")
                        break
        finally:
            log.close()
            run.data.close()
    meta = run.meta
    return Result(directory, meta.step, interrupt.received, meta.task, run.state.params, run.metrics, meta.flops)


def count(params: Any) -> int:
    """Numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclasses.dataclass
class _Run:
    """A run in memory."""

    meta: Meta
    state: TrainState
    data: Any
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def initial_state(task: Any, train_config: TrainConfig, data: Any) -> TrainState:
    """Step 0: fresh parameters and optimizer state."""
    rng = jax.random.key(train_config.seed)
    params = _init(task, rng, example_batch(data))
    return _state(0, 0, params, make_optimizer(train_config.optimizer).init(params), rng)


def _state(step: int, stage_start: int, params: Any, opt_state: Any, rng: jax.Array) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), jnp.asarray(stage_start, jnp.int32), params, opt_state, rng)


@functools.partial(jax.jit, static_argnums=0)
def _init(task: Any, rng: jax.Array, batch: Any) -> Any:
    return task.init(rng, batch)


def _start(experiment: Experiment, checkpoints: Checkpoints) -> _Run:
    """The newest checkpoint, or step 0."""
    data = experiment.data.train_batches()
    step = checkpoints.latest_step()
    if step is None:
        meta = Meta(step=0, stage=0, stage_start=0, task=experiment.task, experiment=experiment)
        return _Run(meta, initial_state(experiment.task, experiment.train, experiment.data), data)
    stored = checkpoints.meta(step)
    meta = dataclasses.replace(stored, experiment=experiment)
    params = checkpoints.params(step, abstract_params(meta.task, experiment.data))
    optimizer, old = (make_optimizer(e.train.optimizer) for e in (experiment, stored.experiment))
    abstract = jax.eval_shape(optimizer.init, params)
    same_kind = jax.tree.structure(abstract) == jax.tree.structure(jax.eval_shape(old.init, params))
    opt_state = checkpoints.opt_state(step, abstract) if same_kind else None
    if opt_state is None:
        opt_state = optimizer.init(params)
    if stored.experiment.data == experiment.data:
        data = checkpoints.data(step, data)
    state = _state(step, meta.stage_start, params, opt_state, jax.random.key(experiment.train.seed))
    return _Run(meta, state, data)


def _grow(run: _Run, growth: Growth, seed: int) -> _Run:
    """The run behind a growth: a new stage, whose learning-rate schedule starts anew."""
    meta = run.meta
    rng = jax.random.fold_in(jax.random.key(seed), 2**31 - 1 - meta.stage)
    if not hasattr(meta.task, "grow"):
        raise ValueError(f"the task {type(meta.task).__name__} cannot grow; leave `growth` empty.")
    kept = run.state.opt_state if growth.optimizer == "keep" else None
    task, params, opt_state = meta.task.grow(growth, run.state.params, kept, rng)
    if opt_state is None:
        opt_state = make_optimizer(meta.experiment.train.optimizer).init(params)
    meta = dataclasses.replace(meta, task=task, stage=meta.stage + 1, stage_start=meta.step)
    return _Run(meta, _state(meta.step, meta.step, params, opt_state, run.state.rng), run.data)


@functools.lru_cache(maxsize=16)
def make_train_step(task: Any, train_config: TrainConfig, steps: int):
    """The compiled update `(state, batch) -> (state, metrics)` of a stage of `steps`."""
    optimizer = make_optimizer(train_config.optimizer)
    parts = train_config.accumulate

    def gradients(params, batch, rng, step):
        return jax.value_and_grad(task.loss, has_aux=True)(params, batch, rng, step)

    def accumulated(params, batch, rng, step):
        batches = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)

        def add(total, part):
            result = gradients(params, part[0], jax.random.fold_in(rng, part[1]), step)
            return jax.tree.map(lambda t, x: t + x / parts, total, result), None

        shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], batches), rng, step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (batches, jnp.arange(parts)))[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        (loss, metrics), grads = (gradients if parts == 1 else accumulated)(state.params, batch, rng, state.step)
        trainable = task.trainable(state.params)
        if trainable is not None:
            grads = jax.tree.map(jnp.multiply, grads, trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(train_config.optimizer, state.step - state.stage_start, steps)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        if trainable is not None:  # weight decay moves parameters without a gradient
            updates = jax.tree.map(jnp.multiply, updates, trainable)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(grads), "learning_rate": rate} | metrics
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _fit(run: _Run, end: int, experiment: Experiment, checkpoints, log, display, interrupt) -> _Run:
    """Trains one stage up to step `end`, or until interrupted."""
    config, task = experiment.train, run.meta.task
    step, state = run.meta.step, run.state
    train_step = make_train_step(task, config, end - run.meta.stage_start)
    flops = task.flops(example_batch(experiment.data))
    peak = peak_flops()
    pending: deque = deque()  # (step, batch, metrics) of updates whose numbers have not been looked at
    values: dict[str, float] = {}  # the numbers of the newest update that was looked at
    meta, evaluation, saved = run.meta, run.metrics, step if step == checkpoints.latest_step() else -1
    clock, logged = time.perf_counter(), step
    idle = 0.0  # seconds since the last log line outside training

    def look(at_most: int) -> None:
        """Takes the numbers of updates until that many are pending, and stops at one that is not finite."""
        nonlocal values
        while len(pending) > at_most:
            number, batch, metrics = pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
                checkpoints.wait()
                path = experiment.directory / f"nonfinite_step_{number}.npz"
                np.savez(path, **batch)
                raise FloatingPointError(
                    f"the loss is {values['loss']} and the gradient norm {values['gradient_norm']} at step {number}; "
                    f"its batch is in {path}, and the last checkpoint is of step {checkpoints.latest_step()}. "
                    "Try a lower learning rate, more warm-up, or clipping."
                )

    def save() -> None:
        nonlocal saved
        look(0)
        checkpoints.save(meta, state.params, state.opt_state, run.data)
        saved = step

    def evaluate() -> None:
        nonlocal evaluation
        look(0)
        evaluation = task.evaluate(state.params, experiment.data.eval_batches("validation"))
        row = evaluation | {"train_flops": meta.flops, "train_seconds": meta.elapsed}
        log.write(step, "validation", row)
        display.numbers(step, "validation", evaluation)

    while step < end and not interrupt.received:
        batch = next(run.data)
        state, metrics = train_step(state, batch)
        step += 1
        pending.append((step, batch, metrics))
        look(1)  # one update stays in flight while the host goes on
        display.advance(step)
        meta = dataclasses.replace(meta, step=step, flops=meta.flops + flops)
        if step % config.log_every == 0 or step == end:
            look(0)
            seconds = time.perf_counter() - clock - idle
            meta = dataclasses.replace(meta, elapsed=meta.elapsed + seconds)
            speed = (step - logged) / seconds
            row = values | {"seconds_per_step": 1 / speed, "tokens_per_second": speed * batch_items(batch)}
            if peak:
                row["fraction_of_peak"] = speed * flops / (peak * jax.device_count())
            log.write(step, "train", row)
            display.numbers(step, "train", row)
            clock, logged, idle = time.perf_counter(), step, 0.0
        pause = time.perf_counter()
        if step == end or (config.eval_every and step % config.eval_every == 0):
            evaluate()
        if step == end or step % config.checkpoint_every == 0:
            save()
        idle += time.perf_counter() - pause
    if step != saved:
        save()
    if not evaluation and not interrupt.received:
        evaluation = task.evaluate(state.params, experiment.data.eval_batches("validation"))
    return _Run(meta, state, run.data, evaluation)


def batch_items(batch: dict[str, np.ndarray]) -> int:
    """Tokens in a batch of text; elsewhere, its rows."""
    return batch["tokens"].size if "tokens" in batch else len(next(iter(batch.values())))


def _check_config(directory: Path, experiment: Experiment, started: bool) -> None:
    """A run that has made a step keeps its config; one that was forked and has made none, only its task."""
    changed = [d for d in differences(experiment, read_config(directory)) if not d.startswith(MAY_CHANGE)]
    if changed := [d for d in changed if started or d.startswith("task")]:
        raise ValueError(
            f"{directory} holds a run of another config: {'; '.join(changed)}. "
            "Choose another --workdir (or remove that folder) to start anew."
        )


class _Interrupt:
    """Notes SIGTERM and Ctrl-C in `received` instead of obeying; a second Ctrl-C is obeyed."""

    received = False

    def __enter__(self) -> _Interrupt:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
