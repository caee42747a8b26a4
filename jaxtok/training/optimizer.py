"""Optimizers from optax by name, and the learning-rate schedules of GPT-NeoX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtok.protocols import FROZEN, Surgery

OPTIMIZERS = ("adamw", "lion", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "exponential", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimizer, its schedule and its clipping; the defaults are TokenFormer's recipe."""

    name: Literal["adamw", "lion", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 6e-4
    min_learning_rate: float = 6e-5
    """The bound below which the learning rate does not fall after the warm-up."""
    schedule: Literal["cosine", "linear", "exponential", "constant"] = "cosine"
    warmup: float = 0.01
    """The part of the steps in which the learning rate rises from 0."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """The decoupled weight decay, of all parameters but biases and the scales of norms."""
    clip: float = 1.0
    """The largest global norm of the gradient; 0: no clipping."""
    bias_correction: bool = True
    """Whether Adam divides its moments by 1 - b^t; BERT's and ELECTRA's code does not."""
    warmup_times_decay: bool = False
    """Whether the rate decays from the first step on, with the warm-up as its factor (BERT's and ELECTRA's code)."""
    layer_decay: float = 1.0
    """The factor of the learning rate from one layer to the one before it (ELECTRA's fine-tuning): its power is
    n + 1 - i for layer i (from 0) of n, n + 2 for what comes before the layers, and 0 for what comes after them."""

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name is {self.name!r}; it must be one of {', '.join(OPTIMIZERS)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        if self.learning_rate <= 0 or not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"learning_rate is {self.learning_rate} and min_learning_rate {self.min_learning_rate}; "
                "the first must be positive and the second between 0 and the first."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it must be a part of the steps, in [0, 1).")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be in (0, 1].")
        if self.clip < 0 or self.weight_decay < 0:
            raise ValueError(f"clip is {self.clip} and weight_decay {self.weight_decay}; neither may be negative.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartOptimizer(OptimizerSettings):
    """The optimizer of a part of the parameters, with a state, rates and clipping of its own."""

    part: str = ""
    """The part's name at the top of the tree of parameters."""
    start: int = 0
    """The step of its first update; before it, parameters and state stay as they are. The schedule counts from the
    run's first step."""

    def __post_init__(self):
        super().__post_init__()
        if not self.part:
            raise ValueError(
                "part is empty in optimizer.parts; it must be a name at the top of the tree of parameters."
            )
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(OptimizerSettings):
    """How the parameters are updated, except for parts that have an optimizer of their own."""

    parts: tuple[PartOptimizer, ...] = ()
    ema_decay: float = 0.0
    """The decay of a moving average of the parameters, average = decay average + (1 - decay) parameters, which is kept
    in the optimizer's state; 0: none."""
    ema_every: int = 1
    """The number of updates between two steps of the average."""
    master_weights: bool = True
    """Whether the optimizer updates parameters of lower precision (bfloat16) in float32 copies of its own, and keeps
    its moments and the average in float32. Otherwise all of them have the parameters' precision, which takes less
    memory, but updates below about 1/256 of a parameter are lost."""

    def __post_init__(self):
        super().__post_init__()
        names = [part.part for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"optimizer.parts are {', '.join(names)}; each part can have one optimizer.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1).")
        if self.ema_every < 1:
            raise ValueError(f"ema_every is {self.ema_every}; it must be at least 1.")


def learning_rate(config: OptimizerSettings, step: Any, steps: int) -> jax.Array:
    """Returns the rate of update `step` (from 0) in a run of `steps`, as GPT-NeoX's AnnealingLR has it, in float32.

    With w = warmup * steps, which is not rounded, the rate is lr * step / w up to step w (so the very first update has
    rate 0). After it, the rate is as follows, but never below the minimum (with `warmup_times_decay`, w is 0 in these
    formulas, and step / w is a factor of the rate):
        cosine       min + (lr - min) / 2 * (1 + cos(pi (step - w) / (steps - w)))
        linear       lr (steps - step) / (steps - w)
        exponential  lr exp(-0.693 (step - w) / (steps - w))
        constant     lr
    """
    high, low = config.learning_rate, config.min_learning_rate
    step = jnp.asarray(step, jnp.float32)
    warm = config.warmup * steps
    part = step / steps if config.warmup_times_decay else (step - warm) / (steps - warm)
    match config.schedule:
        case "cosine":
            rate = low + (high - low) / 2 * (1 + jnp.cos(math.pi * part))
        case "linear":
            rate = high * (1 - part)
        case "exponential":
            rate = high * jnp.exp(-0.693 * part)
        case _:
            rate = jnp.full_like(step, high)
    rate = jnp.maximum(rate, low)
    if config.warmup_times_decay and warm:
        return rate * jnp.minimum(step / warm, 1)
    return jnp.where(step <= warm, high * step / warm, rate) if warm else rate


def learning_rates(config: OptimizerConfig, step: Any, steps: int) -> dict[str, jax.Array]:
    """Returns each `learning_rate`: those of the parts by their names, and that of the rest under ""."""
    return {"": learning_rate(config, step, steps)} | {p.part: learning_rate(p, step, steps) for p in config.parts}


def descend(updates: Any, rates: Mapping[str, jax.Array]) -> Any:
    """Returns directions times minus their learning rates."""

    def scaled(tree, rate):
        return jax.tree.map(lambda u: -rate * u, tree)

    if len(rates) == 1:
        return scaled(updates, rates[""])
    return {name: scaled(part, rates.get(name, rates[""])) for name, part in updates.items()}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that gives the direction of the update, to be multiplied by minus the learning rate.

    If parts of it start late, `update` needs the `step`, from 0.
    """
    optimizer = _in_parts(_direction(config), config.parts) if config.parts else _direction(config)
    optimizer = _with_master(optimizer) if config.master_weights else _in_precision(optimizer)
    return without_frozen(_with_average(optimizer, config.master_weights) if config.ema_decay else optimizer)


def _direction(config: OptimizerSettings) -> optax.GradientTransformation:
    scale = {
        "adamw": lambda: _adam(config),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "sgd": lambda: optax.trace(config.b1),
    }[config.name]()
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    parts.append(scale)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if config.layer_decay < 1:
        parts.append(optax.stateless(lambda updates, _: decay_by_layer(updates, config.layer_decay)))
    return optax.chain(*parts)


def _in_parts(rest: optax.GradientTransformation, parts: tuple[PartOptimizer, ...]) -> Any:
    """Updates each part with its own optimizer and all else with `rest`. The state is (rest's, the parts' by name)."""
    # Not optax.partition: its state is another tree, with which saved runs would not open, and it has no late start.
    own = {part.part: _direction(part) for part in parts}

    def cut(tree):
        if tree is None:
            return None, dict.fromkeys(own)
        if missing := [name for name in own if name not in tree]:
            raise ValueError(
                f"optimizer.parts names {missing[0]!r}, but the parameters at the top are {', '.join(sorted(tree))}."
            )
        # A part keeps its name, by which its moments get their sharding.
        return {k: v for k, v in tree.items() if k not in own}, {name: {name: tree[name]} for name in own}

    def init(params):
        others, cuts = cut(params)
        return rest.init(others), {name: optimizer.init(cuts[name]) for name, optimizer in own.items()}

    def update(updates, state, params=None, *, step=None, **_):
        (grads, grads_of), (values, values_of) = cut(updates), cut(params)
        changed, rest_state = rest.update(grads, state[0], values)
        states = {}
        for part in parts:
            name, old = part.part, state[1][part.part]
            moved, new = own[name].update(grads_of[name], old, values_of[name])
            if part.start:
                active = step >= part.start
                moved = jax.tree.map(lambda u, active=active: jnp.where(active, u, 0), moved)
                new = jax.tree.map(lambda a, b, active=active: jnp.where(active, a, b), new, old)
            changed, states[name] = {**changed, **moved}, new
        return changed, (rest_state, states)

    return optax.GradientTransformationExtraArgs(init, update)


class Mastered(NamedTuple):
    """An optimizer's state, and float32 copies of the parameters that have a lower precision."""

    state: Any
    master: Any
    """A tree like the parameters, with `optax.MaskedNode` in place of those that are float32 themselves."""


def _with_master(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of float32 copies of the parameters; `full_params` and `rounded` say how they are used.

    If all parameters are float32, it is the optimizer itself, with the same state.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        state = optimizer.init(jax.tree.map(_float32, params))
        return Mastered(state, _copies(params)) if any(map(_is_low, jax.tree.leaves(params))) else state

    def update(updates, state, params=None, **options):
        if not isinstance(state, Mastered):
            return optimizer.update(updates, state, params, **options)
        full = None if params is None else full_params(state, params)
        changed, inner = optimizer.update(jax.tree.map(_float32, updates), state.state, full, **options)
        return changed, Mastered(inner, state.master)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_precision(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer, whose gradients come in the parameters' precision."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **options):
        if params is not None:
            updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        return optimizer.update(updates, state, params, **options)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _is_low(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def _float32(x: Any) -> Any:
    return x.astype(jnp.float32) if _is_low(x) else x


def _copies(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32) if _is_low(p) else optax.MaskedNode(), params)


def full_params(opt_state: Any, params: Any) -> Any:
    """Returns the parameters with the optimizer's float32 copies in place of those of lower precision."""
    state = opt_state.state if isinstance(opt_state, Averaged) else opt_state
    if not isinstance(state, Mastered):
        return params
    full = jax.tree.map(lambda p, m: p if isinstance(m, optax.MaskedNode) else m, _not_frozen(params), state.master)
    return {**params, **full} if _is_split(params) else full


def rounded(full: Any, opt_state: Any, dtypes: Any) -> tuple[Any, Any]:
    """Inverts `full_params`: returns the parameters in their own precision, and the state with their float32 copies.

    Args:
      full: the parameters in float32.
      opt_state: the optimizer's state, with other copies or none.
      dtypes: arrays (or their shapes) of the parameters' precision.
    """
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), full, dtypes)
    copies = jax.tree.map(lambda x, p: x if _is_low(p) else optax.MaskedNode(), _not_frozen(full), _not_frozen(params))
    match opt_state:
        case Averaged(Mastered() as state):
            return params, opt_state._replace(state=state._replace(master=copies))
        case Mastered():
            return params, opt_state._replace(master=copies)
    return params, opt_state


def operate(surgery: Surgery, task: Any, data: Any, params: Any, opt_state: Any, rng: jax.Array, like: Any) -> Any:
    """Returns the parameters and the optimizer's state (or None) after a surgery.

    If the optimizer has float32 copies, the surgery changes these, and the parameters are rounded to them.

    Args:
      like: arrays (or their shapes) of the precision of the parameters after the surgery.
    """
    full = params if opt_state is None else full_params(opt_state, params)
    inner = opt_state.state if isinstance(opt_state, Mastered) else opt_state
    params, state = surgery.params(task, data, full, inner, rng)
    if state is not None and isinstance(opt_state, Mastered):
        return rounded(params, Mastered(state, None), like)
    return params, state


def converted(config: OptimizerConfig, opt_state: Any, params: Any) -> Any:
    """Returns a state that was kept with another choice of `master_weights` (older versions had no float32 copies)."""
    new = make_optimizer(config).init(params)

    def cast(new, old):
        match new, old:
            case Averaged(), Averaged():
                return Averaged(cast(new.state, old.state), cast(new.average, old.average))
            case Mastered(), _:
                return Mastered(cast(new.state, old), new.master)
            case _, Mastered():
                return cast(new, old.state)
        return jax.tree.map(lambda n, o: o.astype(n.dtype), new, old)

    return cast(new, opt_state)


class Averaged(NamedTuple):
    """An optimizer's state and a moving average of the parameters."""

    state: Any
    average: Any


def _with_average(optimizer: optax.GradientTransformation, float32: bool) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with room for the average, which `move_average` moves once the update is applied."""
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):  # the average is a copy, as a training step takes over the memory of both
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32 if float32 and _is_low(p) else p.dtype), params)
        return Averaged(optimizer.init(params), average)

    def update(updates, state, params=None, **options):
        changed, inner = optimizer.update(updates, state.state, params, **options)
        return changed, Averaged(inner, state.average)

    return optax.GradientTransformationExtraArgs(init, update)


def move_average(config: OptimizerConfig, opt_state: Any, params: Any, updates: Any, trainable: Any = None) -> Any:
    """Returns the optimizer's state after update number `updates` (from 1), which made `params` (see `full_params`).

    The average of what does not train (`trainable` is 0) is its present value.
    """
    if not config.ema_decay:
        return opt_state
    due, decay = updates % config.ema_every == 0, config.ema_decay

    def one(average, new, trains=1.0):
        mean = decay * average + (1 - decay) * new
        return jnp.where(trains, jnp.where(due, mean, average), new).astype(average.dtype)

    trees = [params] if trainable is None else [params, trainable]
    return opt_state._replace(average=jax.tree.map(one, opt_state.average, *map(_not_frozen, trees)))


def averaged_params(opt_state: Any, params: Any) -> Any:
    """Returns the parameters with their averages, in the averages' precision, in place of themselves.

    Raises:
      ValueError: the run kept none.
    """
    if not isinstance(opt_state, Averaged):
        raise ValueError("the run kept no moving average of its parameters; train it with optimizer.ema_decay > 0.")
    return {**params, **opt_state.average} if isinstance(params, Mapping) else opt_state.average


def without_frozen(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of all parameters but those under `FROZEN` at the top, which stay and have no state."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **options):
        changed, state = optimizer.update(_not_frozen(updates), state, _not_frozen(params), **options)
        if _is_split(updates):
            changed = {**changed, FROZEN: jax.tree.map(jnp.zeros_like, updates[FROZEN])}
        return changed, state

    return optax.GradientTransformationExtraArgs(lambda params: optimizer.init(_not_frozen(params)), update)


def _not_frozen(tree: Any) -> Any:
    return {name: part for name, part in tree.items() if name != FROZEN} if _is_split(tree) else tree


def _is_split(tree: Any) -> bool:
    return isinstance(tree, Mapping) and FROZEN in tree


def _adam(config: OptimizerSettings) -> optax.GradientTransformation:
    """Returns optax's Adam, with or without the correction of its moments."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.bias_correction:
        return adam

    def update(updates, state, params=None):
        _, state = adam.update(updates, state, params)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


_KEPT = re.compile(r"(^|_)(scale|bias)$|^(a_log|skip)$")
_INPUTS = re.compile(r"(^|_)(embeddings?|positions)(_|$)")


def decay_by_layer(updates: Any, decay: float) -> Any:
    """Scales the updates of a model with one stack of layers (under `blocks`): the farther from its end, the smaller.

    Raises:
      ValueError: there is no stack, or more than one.
    """
    paths = jax.tree_util.tree_leaves_with_path(updates)
    stacks = {path[: _block(path)]: len(leaf) for path, leaf in paths if _block(path) is not None}
    if len(stacks) != 1:
        raise ValueError(f"layer_decay needs a model with one stack of layers; this one has {len(stacks)}.")
    (count,) = stacks.values()

    def scaled(path, update):
        if _block(path) is not None:
            factor = decay ** (count + 1 - jnp.arange(count, dtype=update.dtype))
            return update * factor.reshape(-1, *[1] * (update.ndim - 1))
        is_input = any(_INPUTS.search(key.key) for key in path)
        return update * decay ** (count + 2) if is_input else update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _block(path: Any) -> int | None:
    """Returns where in a path the layers of a stack are."""
    return next((k for k, key in enumerate(path) if key.key == "blocks"), None)


def decayed(params: Any) -> Any:
    """Returns True for the parameters under weight decay: all but scales, biases (bias, head_bias, up_bias, ...), and
    Mamba's rates and skips."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _KEPT.search(path[-1].key), params)
