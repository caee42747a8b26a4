"""The training loop: one for every Task, through surgeries on the model, interruptions and resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxtok.configuration import differences
from jaxtok.protocols import Data, Surgery, Task
from jaxtok.training.checkpoints import (
    Checkpoints,
    Meta,
    abstract_opt_state,
    abstract_params,
    example_batch,
    read_config,
    with_shardings,
    write_config,
)
from jaxtok.training.distributed import barrier, gather, is_main
from jaxtok.training.experiment import MAY_CHANGE, Experiment, TrainConfig
from jaxtok.training.lock import RunLock
from jaxtok.training.logs import GUARDED, Display, MetricsLog, NoLog
from jaxtok.training.mesh import Layout, make_layout, one_device, unboxed
from jaxtok.training.optimizer import (
    descend,
    full_params,
    learning_rates,
    make_optimizer,
    move_average,
    operate,
    rounded,
)
from jaxtok.training.peak import peak_flops

INTERRUPTED = 75
"""The exit code of a run that SIGTERM or Ctrl-C ended, that has saved, and that the same command resumes."""


class DeadRun(ValueError):
    """A run that its task's guard has ended (`jaxtok.protocols.Task.guard`); the message is the guard's sentence."""


@flax.struct.dataclass
class TrainState:
    """What a step changes; `step` counts over all stages of the run."""

    step: jax.Array
    stage_start: jax.Array
    """The step at which the learning-rate schedule began anew."""
    params: Any
    opt_state: Any
    rng: jax.Array
    """The run's key, which stays the same; each step folds its own number in."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    directory: Path
    step: int
    interrupted: bool
    task: Any
    params: Any
    metrics: dict[str, float]
    """The numbers of the last evaluation."""
    flops: float
    """The model FLOPs of all training so far, including that of the runs from which this one was forked."""


def train(experiment: Experiment, *, start: Callable[[], Any] | None = None, quiet: bool = False) -> Result:
    """Trains a run, or resumes it from the newest checkpoint in its folder; a finished run is only evaluated again.

    A run that was interrupted and resumed ends with the same parameters, bit for bit, as one that was not.

    Args:
      experiment: the run.
      start: opens the `jaxtok.model.Model` whose parameters a new run starts with (`start_from`); not called if a run
        is resumed.
      quiet: show no progress.

    Raises:
      ValueError: the folder holds a run of another config; the message names the fields that differ.
      FloatingPointError: the loss or a gradient is not finite; the batch is saved in the run's folder.
      DeadRun: the task's guard says that the run is not worth going on with.
    """
    experiment = experiment.fitted()
    directory, config = experiment.directory, experiment.train
    layout = make_layout(experiment.mesh)
    weights = None
    if not _steps(directory):  # a missing file is noticed before the data are opened, which may have to be fetched
        with layout.active():
            weights = experiment.task.load_weights(abstract_params(experiment.task, experiment.data, layout))
    _check_validation(experiment, layout)
    with contextlib.ExitStack() as held:
        lock = held.enter_context(RunLock(directory))
        resumed = _check_config(directory, experiment)
        source = start() if start and not resumed else None  # which is opened on one device, before the mesh is active
        held.enter_context(layout.active())
        checkpoints = held.enter_context(Checkpoints(directory, config.keep_checkpoints))
        interrupt = held.enter_context(_Interrupt(config.save_deadline))
        run, notes = _start(experiment, checkpoints, layout, source, weights)
        del weights
        if is_main():
            write_config(directory, experiment)
        log = MetricsLog(directory, run.meta.step, config.tensorboard) if is_main() else NoLog()
        evaluated, guarded = gather(log.evaluated)[0], deque(gather(list(log.trained))[0], GUARDED)
        total = experiment.total_steps

        def fit() -> _Run:
            return _fit(run, experiment, evaluated, guarded, layout, checkpoints, log, display, interrupt, lock)

        try:
            with Display(experiment.name, total, run.meta.step, enabled=is_main() and not quiet) as display:
                for text in notes:
                    display.say(text)
                if run.meta.step:
                    display.say(f"resuming {directory} at step {run.meta.step} of {total}")
                for stage in range(run.meta.stage, len(experiment.stages) + 1):
                    surgery = experiment.stages[stage - 1] if stage else None
                    if stage > run.meta.stage:
                        run = _operate(run, surgery, layout)
                        size, what = count(run.state.params), type(surgery).__name__
                        display.say(f"{experiment.name} {run.meta.step}/{total}: {what}, now {size:,} parameters")
                    run = fit()
                    if not interrupt.received and run.meta.schedule_end < (end := experiment.ends[stage]):
                        run = _prolonged(run, end, layout)
                        display.say(f"{experiment.name} {run.meta.step}/{total}: {_schedule(run.meta)}")
                        run = fit()
                    if interrupt.received:
                        display.say(f"interrupted: saved step {run.meta.step} in {directory}; the same command resumes")
                        break
                if not run.metrics and not interrupt.received:  # there was nothing left to train
                    rows = layout.rows(run.meta.data.batch_size)
                    found = _evaluate(run.meta.task, run.state.params, run.meta.data, layout, rows, interrupt)
                    run = dataclasses.replace(run, metrics=found or {})
        finally:
            log.close()
            run.data.close()
    meta = run.meta
    return Result(directory, meta.step, interrupt.received, meta.task, run.state.params, run.metrics, meta.flops)


def count(params: Any) -> int:
    """Returns how many numbers a tree of parameters has."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclasses.dataclass
class _Run:
    """A run in memory."""

    meta: Meta
    state: TrainState
    data: Any
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def initial_state(
    task: Any,
    train_config: TrainConfig,
    data: Any,
    layout: Layout | None = None,
    params: Any = None,
    weights: Any = None,
) -> TrainState:
    """Makes the state at step 0: parameters (new ones, or these) and optimizer state, on their own devices.

    The default layout is one device. `weights` is what the task's `load_weights` has made of abstract parameters.
    """
    layout = layout or one_device()
    optimizer = make_optimizer(train_config.optimizer)

    def make(params) -> TrainState:
        rng = jax.random.key(train_config.seed)
        if params is None:
            params = unboxed(task.init(rng, example_batch(data)))
        return _state(0, 0, params, optimizer.init(params), rng)

    with layout.active():
        abstract = abstract_state(task, train_config, data, layout)
        weights = task.load_weights(abstract.params) if weights is None else weights
        state = jax.jit(make, out_shardings=_shardings(abstract))(params)
        read = [not isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights)]
        if any(read):
            params = jax.tree.map(
                lambda new, old: old if isinstance(new, jax.ShapeDtypeStruct) else jax.device_put(new, old.sharding),
                weights,
                state.params,
            )
            opt_state = jax.jit(optimizer.init, out_shardings=_shardings(state.opt_state))(params)
            state = state.replace(params=params, opt_state=opt_state)
    return state


def abstract_state(task: Any, train_config: TrainConfig, data: Any, layout: Layout) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state."""
    params = abstract_params(task, data, layout)
    optimizer = abstract_opt_state(make_optimizer(train_config.optimizer), params, layout)
    state = jax.eval_shape(lambda: _state(0, 0, None, None, jax.random.key(0)))
    state = with_shardings(state, jax.tree.map(lambda _: layout.replicated, state))
    return state.replace(params=params, opt_state=optimizer)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _state(step: int, stage_start: int, params: Any, opt_state: Any, rng: jax.Array) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), jnp.asarray(stage_start, jnp.int32), params, opt_state, rng)


def _start(
    experiment: Experiment, checkpoints: Checkpoints, layout: Layout, source: Any | None, weights: Any | None
) -> tuple[_Run, list[str]]:
    """Returns the run at its newest whole checkpoint, or at step 0, and what there is to tell about it.

    `weights` is what the task's `load_weights` has made of abstract parameters; None: it is called if it is needed.
    """
    optimizer = make_optimizer(experiment.train.optimizer)

    def read(step: int) -> tuple[Meta, TrainState, dict[str, Any] | None]:
        stored = checkpoints.meta(step)
        same_data = stored.experiment.data == experiment.data
        if not same_data:  # only in a forked run that has made no step
            stored = dataclasses.replace(stored, data=experiment.data)
        params = abstract_params(stored.task, stored.data, layout)
        abstract = abstract_opt_state(optimizer, params, layout)
        config = experiment.train.optimizer
        old = dataclasses.replace(stored.experiment.train.optimizer, master_weights=config.master_weights)
        same_kind = jax.tree.structure(abstract) == jax.tree.structure(jax.eval_shape(make_optimizer(old).init, params))
        params = checkpoints.params(step, params)
        opt_state = checkpoints.opt_state(step, config, params, layout) if same_kind else None
        if opt_state is None:
            opt_state = jax.jit(optimizer.init, out_shardings=_shardings(abstract))(params)
        make = jax.jit(
            lambda: _state(step, stored.stage_start, None, None, jax.random.key(experiment.train.seed)),
            out_shardings=layout.replicated,
        )
        state = make().replace(params=params, opt_state=opt_state)
        return stored, state, checkpoints.data(step) if same_data else None

    newest, damaged = checkpoints.newest(read)
    if newest is None:
        data = experiment.data.train_batches(layout.rows(experiment.data.batch_size))
        notes: list[str] = []
        params = None if source is None else start_from(experiment, source, layout, notes.append)
        state = initial_state(experiment.task, experiment.train, experiment.data, layout, params, weights)
        meta = Meta(step=0, stage=0, stage_start=0, task=experiment.task, experiment=experiment)
        return _Run(meta, state, data), notes
    stored, state, position = newest
    data = stored.data.train_batches(layout.rows(stored.data.batch_size))
    notes = [
        f"checkpoint {step} is damaged: {e}; it is now {checkpoints.set_aside(step)}" for step, e in damaged.items()
    ]
    if position is not None:
        data.set_state(position)
    schedule_end = stored.schedule_end if stored.step else 0  # a forked run may have got another number of steps
    return _Run(dataclasses.replace(stored, experiment=experiment, schedule_end=schedule_end), state, data), notes


def start_from(
    experiment: Experiment,
    source: Any,
    layout: Layout | None = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    """Makes the first parameters of a run from another model's.

    The parameters of a model of the run's kind and sizes are taken as they are; those of another model go through the
    surgery `experiment.start`. What `source` does not have, such as the optimizer's state, starts anew.

    Args:
      experiment: the run, with a task that fits its data.
      source: the `jaxtok.model.Model`, with its parameters on this process's host or device.
      layout: where the parameters are to be; default: on one device.
      say: called with a text if the run's task differs from that of the parameters, as in its dropout.

    Raises:
      ValueError: the models differ and there is no surgery, or the surgery does not lead to the run's model.
    """
    layout = layout or one_device()
    task, data, own = source.task, source.data, experiment.task
    abstract = abstract_params(own, experiment.data, layout)
    kinds = [f"{type(t).__name__} of a {type(t.model).__name__}" for t in (task, own)]
    name = source.path or "the model to start from"
    if kinds[0] == kinds[1] and not _difference(source.params, abstract):
        afterwards = task

        def change(params):
            return params
    else:
        if experiment.start is None:
            difference = _difference(source.params, abstract)
            raise ValueError(
                f"{name} is a {kinds[0]} and this run trains a {kinds[1]}: "
                f"{difference or 'the kinds differ'}; give a model of the run's kind and sizes, or set `start` in the "
                "config to the surgery that turns one into the other."
            )
        surgery = experiment.start.towards(own)
        afterwards, _ = surgery.task(task, data)
        rng = jax.random.key(experiment.train.seed)

        def change(params):
            with nn.logical_axis_rules(()):
                return surgery.params(task, data, params, None, rng)[0]

        if difference := _difference(jax.eval_shape(change, source.params), abstract):
            raise ValueError(
                f"{name} is a {kinds[0]}, which {type(surgery).__name__} does not turn into the run's {kinds[1]}: "
                f"{difference}; change `task` or `start` in the config."
            )

    if say and (changed := differences(own, afterwards)):
        say(f"starts with the parameters of {name}, but with {'; '.join(changed)}")
    shardings = _shardings(abstract_params(task, data, layout))
    params = jax.tree.map(lambda x, sharding: jax.device_put(np.asarray(x), sharding), source.params, shardings)
    dtypes = jax.tree.map(lambda x: x.dtype, abstract)
    with layout.active():
        cast = jax.jit(lambda p: jax.tree.map(jnp.astype, change(p), dtypes), out_shardings=_shardings(abstract))
        return cast(params)


def _difference(given: Any, expected: Any) -> str:
    """Returns how the shapes of two trees of parameters differ first; empty if they do not."""
    trees = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, expected))
    )
    ours, theirs = trees
    for path in ours | theirs:
        if ours.get(path) != theirs.get(path):
            here, there = (f"has the shape {x[path]}" if path in x else "is missing" for x in (ours, theirs))
            return f"{path} {here} in the first and {there} in the second"
    return ""


def _operate(run: _Run, surgery: Surgery, layout: Layout) -> _Run:
    """Returns the run after a surgery, in a new stage whose learning-rate schedule starts anew."""
    meta, config = run.meta, run.meta.experiment.train
    kept = run.state.opt_state if surgery.optimizer == "keep" else None
    rng = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1 - meta.stage)
    optimizer = make_optimizer(config.optimizer)
    task, data, program = compile_surgery(surgery, meta.task, meta.data, run.state.params, kept, rng, optimizer, layout)
    params, opt_state = program(run.state.params, kept)
    state = run.state.replace(stage_start=_now(run, layout), params=params, opt_state=opt_state)
    batches = run.data
    if data != meta.data:
        batches.close()
        batches = data.train_batches(layout.rows(data.batch_size))
    meta = dataclasses.replace(meta, task=task, data=data, stage=meta.stage + 1, stage_start=meta.step, schedule_end=0)
    return _Run(meta, state, batches)


def _prolonged(run: _Run, end: int, layout: Layout) -> _Run:
    """Returns a run that has come to the end of its schedule with a new one, up to step `end`."""
    meta = dataclasses.replace(run.meta, stage_start=run.meta.step, schedule_end=end)
    return dataclasses.replace(run, meta=meta, state=run.state.replace(stage_start=_now(run, layout)))


def _schedule(meta: Meta) -> str:
    """Returns a sentence on the schedule of the steps that were added to a run."""
    optimizer, steps = meta.experiment.train.optimizer, meta.schedule_end - meta.stage_start
    warmup = f"a warm-up of {optimizer.warmup * steps:,.0f} steps to " if optimizer.warmup else ""
    return (
        f"{steps:,} more steps, in which the learning rate begins anew: {warmup}{optimizer.learning_rate:g}, then "
        f"{optimizer.schedule}, at least {optimizer.min_learning_rate:g}"
    )


def _now(run: _Run, layout: Layout) -> jax.Array:
    """Returns a copy of the run's step."""
    return jax.jit(lambda step: step + 0, out_shardings=layout.replicated)(run.state.step)


def compile_surgery(
    surgery: Surgery,
    task: Task,
    data: Data,
    params: Any,
    opt_state: Any,
    rng: jax.Array,
    optimizer: optax.GradientTransformation,
    layout: Layout,
) -> tuple[Task, Data, Callable[[Any, Any], tuple[Any, Any]]]:
    """Returns task and data after a surgery, and the compiled program that changes parameters and optimizer state.

    All arrays stay on their mesh. The optimizer's state starts anew if the surgery returns none.

    Raises:
      ValueError: the surgery cannot change the task.
    """
    task_after, data_after = surgery.task(task, data)
    abstract = abstract_params(task_after, data_after, layout)
    seed = np.asarray(jax.random.key_data(rng))

    def change(params, opt_state):
        with nn.logical_axis_rules(()):  # new modules are made with a batch of one, which no mesh divides
            key = jax.random.wrap_key_data(seed)
            params, opt_state = operate(surgery, task, data, params, opt_state, key, abstract)
        return params, optimizer.init(params) if opt_state is None else opt_state

    if difference := _difference(jax.eval_shape(change, params, opt_state)[0], abstract):
        raise ValueError(f"the parameters after {type(surgery).__name__} are not those of its task: {difference}.")
    out = _shardings((abstract, abstract_opt_state(optimizer, abstract, layout)))
    with layout.active():
        return task_after, data_after, jax.jit(change, out_shardings=out).lower(params, opt_state).compile()


@functools.lru_cache(maxsize=16)
def make_train_step(task: Any, train_config: TrainConfig, steps: int, data: Any, layout: Layout):
    """Returns the compiled update `(state, batch) -> (state, metrics)` of a stage of `steps`."""
    optimizer = make_optimizer(train_config.optimizer)
    parts = train_config.accumulate

    def gradients(params, batch, rng, step):
        return jax.value_and_grad(task.loss, has_aux=True)(params, batch, rng, step)

    def accumulated(params, batch, rng, step):
        """The same, of a batch in parts, by the chain rule: the loss is a function of sums over the parts.

        The derivative by the sums needs those of the whole batch first. Of a mean, that is only its count, and the
        compiler leaves out the rest of that first pass.
        """
        batches = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
        state = jax.lax.stop_gradient(params)

        def sums(params, part):
            found = task.loss_sums(params, part[0], jax.random.fold_in(rng, part[1]), step)
            return jax.tree.map(lambda x: x.astype(jnp.float32), found)

        def added(function):
            """The sum of a function of the parts, in float32."""

            def add(total, part):
                return jax.tree.map(jnp.add, total, function(part)), None

            each = (batches, jnp.arange(parts))
            shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], each))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
            return jax.lax.scan(add, zeros, each)[0]

        def of_part(part):
            found, pull = jax.vjp(lambda p: sums(p, part), params)
            return found, pull(slopes)[0]

        slopes = jax.grad(lambda total: task.loss_of(total, state, step)[0])(added(lambda part: sums(params, part)))
        total, grads = added(of_part)
        return task.loss_of(total, state, step), grads

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        (loss, metrics), grads = (gradients if parts == 1 else accumulated)(state.params, batch, rng, state.step)
        trainable = task.trainable(state.params)
        if trainable is not None:
            grads = jax.tree.map(jnp.multiply, grads, trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        rates = learning_rates(train_config.optimizer, state.step - state.stage_start, steps)
        updates = descend(updates, rates)
        if trainable is not None:  # weight decay moves parameters without a gradient
            updates = jax.tree.map(jnp.multiply, updates, trainable)
        params = optax.apply_updates(full_params(opt_state, state.params), updates)
        named = {"_".join(filter(None, ("learning_rate", part))): rate for part, rate in rates.items()}
        norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        metrics = {"loss": loss, "gradient_norm": norm} | named | metrics
        params = task.after_step(params, metrics, state.step)
        metrics.pop("state", None)
        opt_state = move_average(train_config.optimizer, opt_state, params, state.step + 1, trainable)
        params, opt_state = rounded(params, opt_state, state.params)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    state = _shardings(abstract_state(task, train_config, data, layout))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state, layout.replicated))


def _fit(
    run: _Run,
    experiment: Experiment,
    evaluated: int,
    guarded: deque,
    layout: Layout,
    checkpoints,
    log,
    display,
    interrupt,
    lock,
) -> _Run:
    """Trains up to the end of the run's schedule, or until interrupted.

    Args:
      evaluated: the step of the last evaluation before the run was resumed.
      guarded: the rows of training that the task's guard is to see; new ones are added.
    """
    config, task = experiment.train, run.meta.task
    step, state, end = run.meta.step, run.state, run.meta.schedule_end
    data = run.meta.data
    train_step = make_train_step(task, config, end - run.meta.stage_start, data, layout)
    flops = task.flops(example_batch(data))
    peak = peak_flops()
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()  # simulated devices share one CPU
    rows = layout.rows(data.batch_size)
    pending: deque = deque()  # (step, batch, metrics) of updates whose numbers have not been fetched
    values: dict[str, float] = {}  # the numbers of the newest update whose numbers have been fetched
    meta, evaluation, saved = run.meta, run.metrics, step if step == checkpoints.latest_step() else -1
    clock, logged = time.perf_counter(), step
    idle = 0.0  # seconds since the last log line outside training

    def fetch(at_most: int) -> None:
        """Fetches the numbers of updates until so many are pending; raises at one that is not finite."""
        nonlocal values
        while len(pending) > at_most:
            number, batch, metrics = pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
                checkpoints.wait()
                part = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
                path = experiment.directory / f"nonfinite_step_{number}{part}.npz"
                np.savez(path, **batch)
                raise FloatingPointError(
                    f"the loss is {values['loss']} and the gradient norm {values['gradient_norm']} at step {number}; "
                    f"its batch is in {path}, and the last checkpoint is of step {checkpoints.latest_step()}. "
                    "Try a lower learning rate, more warm-up, or clipping."
                )

    def save() -> None:
        nonlocal saved
        lock.check()
        fetch(0)
        position = {stream: at for part in gather(run.data.get_state()) for stream, at in part.items()}
        try:
            checkpoints.save(meta, state.params, state.opt_state, position)
            if step == end or interrupt.received:
                checkpoints.wait()
        except OSError as error:
            last = checkpoints.latest_step()
            kept = "there is no earlier one" if last is None else f"the last whole one is of step {last}"
            must = step == end or interrupt.received or jax.process_count() > 1
            if must or config.on_full_disk == "stop" or error.errno != errno.ENOSPC:
                raise OSError(f"a checkpoint could not be saved at step {step}: {error}; {kept}.") from error
            display.say(f"step {step}: a checkpoint could not be saved: {error}; {kept}, and training goes on")
        else:
            saved = step

    def evaluate() -> None:
        """Evaluates; if that is interrupted, the resumed run does it. What it fails at is saved."""
        nonlocal evaluation
        fetch(0)
        try:
            numbers = _evaluate(task, state.params, data, layout, rows, interrupt)
        except Exception:
            if step != saved and jax.process_count() == 1:
                save()
            raise
        if numbers is not None:
            evaluation = numbers
            log.write(step, "validation", evaluation | {"train_flops": meta.flops, "train_seconds": meta.elapsed})
            display.numbers(step, "validation", evaluation)

    def due(number: int) -> bool:
        return number == end or bool(config.eval_every and number % config.eval_every == 0)

    if run.meta.stage_start < step and due(step) and step != evaluated:
        evaluate()
    while step < end and not interrupt.check():
        lock.check()
        batch = next(run.data)
        state, metrics = train_step(state, layout.put(batch, rows, data.batch_spec()))
        step += 1
        pending.append((step, batch, metrics))
        fetch(1)  # one update stays in flight while the host goes on
        display.advance(step)
        meta = dataclasses.replace(meta, step=step, flops=meta.flops + flops)
        if step % config.log_every == 0 or step == end or (step == 1 and task.guard is not None):
            fetch(0)
            seconds = time.perf_counter() - clock - idle
            meta = dataclasses.replace(meta, elapsed=meta.elapsed + seconds)
            speed = (step - logged) / seconds
            row = values | {"seconds_per_step": 1 / speed, f"{data.unit}_per_second": speed * data.units}
            if peak:
                row["fraction_of_peak"] = speed * flops / (peak * devices)
            log.write(step, "train", row)
            display.numbers(step, "train", row)
            if task.guard is not None:
                guarded.append({"step": step} | row)
                if verdict := task.guard(guarded):
                    checkpoints.wait()
                    raise DeadRun(verdict)
            clock, logged, idle = time.perf_counter(), step, 0.0
        pause = time.perf_counter()
        if step == end or step % config.checkpoint_every == 0:
            save()
        if due(step):
            evaluate()
        idle += time.perf_counter() - pause
    if step != saved:
        save()
    return _Run(meta, state, run.data, evaluation)


class _Stop(Exception):
    """Ends an evaluation that is interrupted."""


def _evaluate(task, params, data, layout, rows, interrupt) -> dict[str, float] | None:
    """Evaluates on the validation split; returns None if interrupted."""

    def batches():
        for batch in data.eval_batches("validation", rows):
            if interrupt.check():
                raise _Stop
            yield layout.put(batch, rows, data.batch_spec())

    try:
        return task.evaluate(params, batches())
    except _Stop:
        return None


def _check_validation(experiment: Experiment, layout: Layout) -> None:
    """Checks that there is something to evaluate on, which would otherwise come up after many steps.

    Raises:
      ValueError: there is nothing that counts; if it is the data that refuse, the message is theirs.
    """
    data = dataclasses.replace(experiment.data, eval_limit=0)  # which would read many rows to draw some of them
    batches = data.eval_batches("validation", layout.rows(data.batch_size))
    found = any(np.any(batch["mask"]) if "mask" in batch else True for batch in batches)
    if not any(gather(found)):
        raise ValueError(
            f"the validation split of {getattr(data, data.source)} holds no {experiment.task.counted} that count, so "
            "the run could not be evaluated; give more data."
        )


def _steps(directory: Path) -> list[int]:
    """Returns the steps that a run has saved."""
    return [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]


def _check_config(directory: Path, experiment: Experiment) -> bool:
    """Checks that a run that has made a step keeps its config, and that a forked one without steps keeps its task.

    The number of steps of the last stage may grow. Returns whether there is a run.
    """
    if steps := _steps(directory):
        stored = read_config(directory)
        changed = [d for d in differences(experiment, stored) if not d.startswith(MAY_CHANGE)]
        last = f"stages.{len(experiment.stages) - 1}.steps: " if experiment.stages else "train.steps: "
        if experiment.total_steps >= stored.total_steps:
            changed = [d for d in changed if not d.startswith(last)]
        if changed := [d for d in changed if max(steps) > 0 or d.startswith("task")]:
            longer = " (The number of steps can be raised, but not lowered.)" if changed[0].startswith(last) else ""
            raise ValueError(
                f"{directory} holds a run of another config: {'; '.join(changed)}. "
                f"Choose another --workdir for a run of this one.{longer}"
            )
    barrier("config")
    return bool(steps)


class _Interrupt:
    """Notes SIGTERM and Ctrl-C in `received` instead of obeying; a second Ctrl-C is obeyed.

    With several processes, the one that gets the signal tells the others, and all see it at the same call of `check`.
    From then on, a process has `deadline` seconds to save and exit; after them it exits unsaved.
    """

    def __init__(self, deadline: float = 0.0):
        self.received = False
        self._deadline = deadline
        self._signalled = False
        self._calls = 0
        self._timer: threading.Timer | None = None
        self._many = jax.process_count() > 1

    def __enter__(self) -> _Interrupt:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            # With several processes, JAX listens for SIGTERM itself: it makes all of them stop at the same step.
            signals = (signal.SIGINT,) if self._many else (signal.SIGTERM, signal.SIGINT)
            self._previous = {s: signal.signal(s, self._receive) for s in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._timer:
            self._timer.cancel()

    def check(self) -> bool:
        """Whether to save and exit; all processes must call it equally often."""
        self._calls += 1
        if not self.received and (
            multihost_utils.reached_preemption_sync_point(self._calls) if self._many else self._signalled
        ):
            self.received = True
            self._start_timer()
        return self.received

    def _receive(self, number, frame) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._start_timer()

    def _start_timer(self) -> None:
        if self._deadline and self._timer is None:
            self._timer = threading.Timer(self._deadline, self._leave)
            self._timer.daemon = True
            self._timer.start()

    def _leave(self) -> None:
        print(
            f"the run was not saved within train.save_deadline = {self._deadline:g} s of the signal; "
            "the same command resumes it from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(INTERRUPTED)
