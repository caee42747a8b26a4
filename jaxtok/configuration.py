"""Configs as files: typed frozen dataclasses that are read from Python files, written to JSON, and compared.

A config file is a Python file that defines `config`. Only its owner's code runs: what is read back from a checkpoint
is JSON, and names classes of the jaxtok package (or of modules that are already imported) only.
"""

from __future__ import annotations

import dataclasses
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

T = TypeVar("T")

MOVED: dict[str, str] = {
    "jaxtok.lm.growth:Growth": "jaxtok.transfer.growth:Growth",
    "jaxtok.training.lora:Lora": "jaxtok.transfer.lora:Lora",
}
"""Types that stored configs name and that have moved: "module:Class", as it was stored -> as it is now.

What has changed in a dataclass, it says itself, in class variables that its subclasses inherit:
  RENAMED: ClassVar[dict[str, str]]  fields that have another name now: the old name -> the new one
  RETIRED: ClassVar[dict[str, Any]]  fields that are no more: name -> the value at which a stored one is left out; any
                                     other value raises
"""


def load_config(path: str | Path) -> Any:
    """The `config` that a Python file defines.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it defines no `config`.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").rglob("*.py"))
        hint = f" Configs here: {', '.join(known)}." if known else ""
        raise FileNotFoundError(f"there is no config file {path}.{hint}")
    namespace = runpy.run_path(str(path))
    if "config" not in namespace:
        raise ValueError(f"{path} defines no `config`; it has to assign one, such as `config = Experiment(...)`.")
    return namespace["config"]


def override(config: T, arguments: Sequence[str], prog: str) -> T:
    """The config with fields replaced from a command line of dotted names: `--train.steps 100`.

    An unknown name or an impossible value ends the program with a message that names the nearest known ones.
    """
    return tyro.cli(
        type(config),
        default=config,
        args=list(arguments),
        prog=prog,
        description=type(config).__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )


def to_json(value: Any) -> Any:
    """A config as what `json` can write, each dataclass with its type's name."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}"} | fields
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a config cannot hold a {type(value).__name__} ({value!r}); use numbers, text and dataclasses.")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, also of what an older version wrote. Fields that a class has gained take their default.

    Raises:
      ValueError: the class is unknown, or does not have a field.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    cls, fields = _named(value["type"]), {k: v for k, v in value.items() if k != "type"}
    if hasattr(cls, "saved_before"):  # a class that has become several
        cls, fields = cls.saved_before(fields)
    renamed, retired = _of_classes(cls, "RENAMED"), _of_classes(cls, "RETIRED")
    fields = {renamed.get(k, k): from_json(v) for k, v in fields.items()}
    known = {f.name for f in dataclasses.fields(cls)}
    for name in [name for name in fields if name not in known and name in retired]:
        if (stored := fields.pop(name)) != retired[name]:
            raise ValueError(
                f"the stored config gives {cls.__name__} the field {name} = {stored!r}, which it no longer has; "
                f"only {retired[name]!r} can still be read."
            )
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"the stored config gives {cls.__name__} the fields {', '.join(unknown)}; it has no such.")
    return cls(**fields)


def _named(name: str) -> type:
    """The dataclass of a type's name, by its newest name."""
    module, _, cls_name = MOVED.get(name, name).partition(":")
    if module.split(".")[0] == "jaxtok":
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "?"):  # a library is missing, not the module
                raise
    cls = getattr(sys.modules.get(module), cls_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"the stored config names {name}, which is unknown here; import its module first.")
    return cls


def _of_classes(cls: type, table: str) -> dict[str, Any]:
    """A table of a dataclass with those of the classes that it inherits from."""
    return {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get(table, {}).items()}


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Where two configs differ, one line each: `train.steps: 100, not 200`."""
    if type(a) is type(b) and dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a)]
        return [d for n in names for d in differences(getattr(a, n), getattr(b, n), f"{prefix}{n}.")]
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{prefix}{i}.")]
    return [] if a == b else [f"{prefix.rstrip('.')}: {a}, not {b}"]
