"""Growing a trained TokenFormer by appending parameter tokens (arXiv 2410.23168, section 3.3).

K <- [K_old; K_new] and V <- [V_old; V_new] in any of the five groups; width, depth and heads stay. With zero new keys
the new scores are 0 and GELU(0) = 0, so the function is preserved as long as the factor tau = sqrt(tokens) in the
normalisation keeps its old value. The paper says so; the authors' PyTorch code recomputes tau from the new number of
tokens and draws new keys at random, which perturbs the model. Both are here:

    grow(config, params, to=counts, rng=key)                       # the paper: exact
    grow(config, params, to=counts, rng=key, init="random")        # the authors' released recipe: not exact
    grow(config, params, to=counts, rng=key, init="copy")          # whole multiples of the old tokens: exact
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtok.nn.parameter_attention import GROUPS, ParameterAttentionStack, TokenCounts, group_of
from jaxtok.protocols import Data, Params, Task

Init = Literal["zero_keys", "copy", "random"]
Scale = Literal["auto", "fixed", "current"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """The surgery that grows a task's `model`, a stack of parameter attentions."""

    to: TokenCounts = TokenCounts()
    """The number of parameter tokens of each group afterwards; 0 leaves a group as it is."""
    steps: int = 1000
    """The number of training steps after the growth; the learning-rate schedule starts anew."""
    init: Init = "zero_keys"
    """How new tokens begin; see `grow`."""
    scale: Scale = "auto"
    """tau^2 of the grown groups; see `grow`."""
    optimizer: Literal["keep", "reset"] = "reset"
    """Whether the optimizer keeps its state, with moments of 0 for the new tokens, or begins anew, as in the authors'
    code."""
    train: Literal["all", "new"] = "all"
    """Which parameters train afterwards: all, or the new tokens only."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps after a growth is {self.steps}; it must be at least 1.")
        _check_choices(self.init, self.scale)

    def task(self, task: Task, data: Data) -> tuple[Task, Data]:
        """The task with the new counts, and with the old ones as its `frozen_tokens` if only new tokens train.

        Raises:
          ValueError: the model has no parameter tokens, or cannot grow like this (`grow`).
        """
        model = task.model
        if not isinstance(model, ParameterAttentionStack) or task.module() is None:
            raise ValueError(
                f"the task {type(task).__name__} with the model {type(model).__name__} has no parameter tokens of its "
                "own, so it cannot grow; leave out the growth."
            )
        changes = {"model": grown_config(model, self.to, self.init, self.scale)}
        if hasattr(task, "frozen_tokens"):
            changes["frozen_tokens"] = model.tokens if self.train == "new" else TokenCounts()
        elif self.train == "new":
            raise ValueError(f"a {type(task).__name__} trains all its parameters; growth.train must be all.")
        return dataclasses.replace(task, **changes), data

    def params(self, task: Task, data: Data, params: Params, opt_state: Any, rng: jax.Array) -> tuple[Params, Any]:
        return grow(task.model, params, opt_state, to=self.to, rng=rng, init=self.init, scale=self.scale)[1:]

    def towards(self, task: Task) -> Growth:
        """This growth, to the tokens of the task's model."""
        return dataclasses.replace(self, to=self.to | task.model.tokens)


class Grown(NamedTuple):
    config: Any
    params: Any
    opt_state: Any


def grow(
    config: ParameterAttentionStack,
    params: Any,
    opt_state: Any = None,
    *,
    to: TokenCounts,
    rng: jax.Array,
    init: Init = "zero_keys",
    scale: Scale = "auto",
    exact: bool = False,
) -> Grown:
    """A larger model that has the old one's parameter tokens as the first rows. Pure: the arguments stay as they are.

    Args:
      config: the model's config; that of the result has the new counts, and `norm_tokens` if tau^2 keeps an old value.
      params: the model's parameters; `keys` and `values` are [layers, param_tokens, d_model].
      opt_state: the state of any optax optimizer; moments of a grown parameter are padded with zeros.
      to: the number of tokens of each group afterwards; 0 leaves a group as it is.
      rng: a key for the new rows.
      init: how new rows begin. zero_keys: keys 0 and random values; copy: copied keys and values 0, for whole multiples
        of the old number; random: keys and values as in a new model.
      scale: tau^2 of the grown groups. fixed: as before; current: in proportion to the tokens; auto: fixed for
        zero_keys, else current.
      exact: whether a growth that does not preserve the function is an error.

    Raises:
      ValueError: a group would have fewer tokens than now, none would grow, copies would make no whole multiple, or the
        growth is not exact although `exact` asks for it.
    """
    larger = grown_config(config, to, init, scale)
    to = larger.tokens
    if exact and (reason := why_not_exact(config, init, scale)):
        raise ValueError(f"exact is True, but this growth would not preserve the function: {reason}.")

    def grow_leaf(path, leaf, fill):
        group = group_of(path)
        if group is None or getattr(to, group) == leaf.shape[-2]:
            return leaf
        old, new = leaf.shape[-2], getattr(to, group)
        shape = (*leaf.shape[:-2], new - old, leaf.shape[-1])
        return jnp.concatenate([leaf, fill(group, path[-1].key, leaf, shape)], axis=-2)

    def new_rows(group, kind, leaf, shape):
        if (kind, init) in (("keys", "zero_keys"), ("values", "copy")):
            return jnp.zeros(shape, leaf.dtype)
        if kind == "keys" and init == "copy":
            return jnp.concatenate([leaf] * (shape[-2] // leaf.shape[-2]), axis=-2)
        key = jax.random.fold_in(rng, 2 * GROUPS.index(group) + (kind == "values"))
        std = config.init_std if kind == "keys" else config.output_init_std
        return (std * jax.random.normal(key, shape)).astype(leaf.dtype)

    def grow_moment(path, leaf):
        group = group_of(path)
        if group is None or jnp.size(leaf) <= 1:
            return leaf
        if leaf.ndim < 2 or leaf.shape[-2] != getattr(config.tokens, group):
            raise ValueError(
                f"the optimizer keeps {jax.tree_util.keystr(path)} of shape {leaf.shape}, not one number for each "
                "parameter, so its state cannot grow; reset it (optimizer = reset)."
            )
        return grow_leaf(path, leaf, lambda group, kind, leaf, shape: jnp.zeros(shape, leaf.dtype))

    grown = jax.tree_util.tree_map_with_path(lambda p, x: grow_leaf(p, x, new_rows), params)
    if opt_state is not None:
        opt_state = jax.tree_util.tree_map_with_path(grow_moment, opt_state)
    return Grown(larger, grown, opt_state)


def grown_config(
    config: ParameterAttentionStack, to: TokenCounts, init: Init = "zero_keys", scale: Scale = "auto"
) -> ParameterAttentionStack:
    """A model's config after a growth.

    Raises:
      ValueError: a group would have fewer tokens than now, none would grow, or copies would make no whole multiple.
    """
    _check_choices(init, scale)
    to = to | config.tokens
    for group in GROUPS:
        old, new = getattr(config.tokens, group), getattr(to, group)
        if new < old:
            raise ValueError(f"{group} has {old} parameter tokens and cannot grow to {new}; ask for {old} or more.")
        if init == "copy" and new % old:
            raise ValueError(f"{group} has {old} parameter tokens; copies must make a multiple of that, not {new}.")
    if to == config.tokens:
        raise ValueError(f"every group already has the tokens asked for ({to}); ask for more in at least one.")
    norm = TokenCounts(**{g: _norm_tokens(config, to, g, _resolve(init, scale)) for g in GROUPS})
    return dataclasses.replace(config, tokens=to, norm_tokens=norm)


def why_not_exact(config: ParameterAttentionStack, init: Init, scale: Scale = "auto") -> str | None:
    """None if growth preserves the function, else the reason why it does not."""
    scale, kind = _resolve(init, scale), config.normalization
    if init == "random":
        return "random new keys have scores of their own"
    if init == "copy":
        if kind == "gelu":
            return None  # no normalisation, and the copies' values are 0
        if kind == "softmax":
            return None  # its factor is the number of tokens in any case
        if kind == "gelu_layer_norm":
            return None
        if config.normalization_eps:
            return f"copied keys grow the norm but not normalization_eps = {config.normalization_eps}"
        return None if scale == "current" else "copied keys grow the norm, so tau has to grow too (scale = current)"
    if kind == "softmax":
        return "under softmax a zero score has weight exp(0) = 1 (copied keys preserve it)"
    if kind == "gelu_layer_norm":
        return "zero scores change the mean and variance over the parameter tokens (copied keys preserve them)"
    if kind == "gelu":
        return None
    return None if scale == "fixed" else "tau grows with the number of tokens (scale = fixed keeps it)"


def _resolve(init: Init, scale: Scale) -> Scale:
    if scale == "auto":
        return "fixed" if init == "zero_keys" else "current"
    return scale


def _norm_tokens(config, to: TokenCounts, group: str, scale: Scale) -> int:
    """tau^2 of a group after growth; 0 stands for the number of tokens."""
    old, new, norm = (getattr(counts, group) for counts in (config.tokens, to, config.norm_tokens))
    if new == old:
        return norm
    if scale == "fixed":
        return norm or old
    return round(norm * new / old)


def _check_choices(init: str, scale: str) -> None:
    if init == "zero_both":
        raise ValueError(
            "init is zero_both, but with zero keys and zero values neither ever gets a gradient; use zero_keys or copy."
        )
    if init not in ("zero_keys", "copy", "random"):
        raise ValueError(f"init is {init!r}; it must be one of zero_keys, copy, random.")
    if scale not in ("auto", "fixed", "current"):
        raise ValueError(f"scale is {scale!r}; it must be one of auto, fixed, current.")
