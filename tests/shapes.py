"""Checks the shapes and dtypes in signatures while the tests run; `jaxtyping.install_import_hook` applies it.

Only arrays are checked, by shape and dtype: a test may pass a NumPy array for a JAX one, and 0 for 0.0. They are
checked after the call, so that a function can raise its own errors first.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Union

from beartype import beartype
from jaxtyping import AbstractArray


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
