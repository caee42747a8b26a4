"""Checks the shapes and dtypes in signatures while the tests run; `install` is called before jaxtok is imported.

Only arrays are checked, by shape and dtype: a test may pass a NumPy array for a JAX one, and 0 for 0.0. They are
checked after the call, so that a function can raise its own errors first.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Union

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

_ARRAY = re.compile(r"\[(jax\.|np\.)?(Array|ndarray), ")


def install() -> None:
    """Has every function of jaxtok checked whose signature has an array.

    jaxtyping would wrap the others, too, and those inside of functions again with each call, which takes long.
    """
    jaxtyping.jaxtyped = functools.partial(_wrapped, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook("jaxtok", "shapes.check")


def _wrapped(wrap: Callable, function: Any = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_wrapped, wrap, **options)
    inner = getattr(function, "fget", None) or getattr(function, "__func__", None) or function
    hints, known = getattr(inner, "__annotations__", {}).values(), getattr(inner, "__globals__", {})
    of_arrays = any(_ARRAY.search(f"{hint} {known.get(str(hint).split(' | ')[0])}") for hint in hints)
    return wrap(function, **options) if of_arrays else function


def check(function: Callable) -> Callable:
    """The function, which then raises where an array has another shape than its signature says.

    jaxtyping calls it twice for each function: for a check of the arguments alone, which says that it returns Any, and
    for a check of arguments and result.
    """
    # Dataclasses that are pytrees hold placeholders of arrays, too.
    if function.__name__ == "__init__" or function.__annotations__.get("return", Any) is Any:
        return function
    hints = {name: _of_arrays(hint) for name, hint in function.__annotations__.items()}
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function)


def _of_arrays(hint: Any) -> Any:
    """The hint for any kind of array; Any if it has no array."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        any_array = hint.dtype[Any, hint.dim_str]
        return any_array if hint.dim_str else Union[any_array, bool, int, float]  # noqa: UP007
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    ours = [part if part is Ellipsis or part is type(None) else _of_arrays(part) for part in parts]
    if not any(new is not old and new is not Any for new, old in zip(ours, parts)):
        return Any
    if origin in (Union, types.UnionType):
        kept = [old if new is Any else new for new, old in zip(ours, parts)]
        return Union[tuple(kept)]  # noqa: UP007
    return origin[tuple(ours)] if origin in (tuple, list, dict) else Any
