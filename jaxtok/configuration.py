"""Configs as files: typed frozen dataclasses that are read from Python files, written to JSON, and compared.

A config file is a Python file that defines `config` or `configs`. Only its owner's code runs: what is read back from a
checkpoint is JSON, and names classes of the jaxtok package (or of modules that are already imported) only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import numbers
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import tyro

from jaxtok import systems

T = TypeVar("T")

MOVED: dict[str, str] = {
    "jaxtok.lm.growth:Growth": "jaxtok.transfer.growth:Growth",
    "jaxtok.training.lora:Lora": "jaxtok.transfer.lora:Lora",
}
"""Types that have moved since configs were stored: the stored "module:Class" -> the one of today.

A dataclass whose fields have changed says so itself, in class variables that its subclasses inherit:
  RENAMED: ClassVar[dict[str, str]]  fields that have another name now: the old name -> the new one
  RETIRED: ClassVar[dict[str, Any]]  fields that no longer exist: the name -> the value at which a stored one is
                                     dropped; any other value is an error
A class that has become several has a class method `saved_before`, which maps stored fields to a class and its fields.
"""


def load_config(config: str | Path) -> Any:
    """Returns the config of a name (`jaxtok train --help` lists them), of a Python file, or of FILE:NAME.

    A file defines `config`, or `configs`: a dictionary from names to configs, or to functions that make them.

    Raises:
      FileNotFoundError: there is neither such a file nor a config of that name.
      ValueError: the file is not a Python file, has an error, or defines no config of that name.
    """
    text = str(config)
    file, _, name = text.rpartition(":")
    path, name = (Path(file), name) if file.endswith(".py") else (Path(text), "")
    known = systems.configs()
    if text in known:
        path, name = known[text].file, text
    elif not path.is_file():
        candidates = [*known, *(str(p) for p in path.parent.glob("*.py"))]
        hint = systems.nearest(path.stem, candidates, "; `jaxtok list` shows them")
        raise FileNotFoundError(f"there is no config {text!r}{hint}")
    elif path.suffix != ".py":
        raise ValueError(f"{path} is not a config; it must be a Python file that defines one, or the name of a config.")
    return _config_of(path, name)


def _config_of(path: Path, name: str) -> Any:
    with _errors_of(path):
        namespace = runpy.run_path(str(path))
    configs = dict(namespace.get("configs", {}))
    if "config" in namespace:
        configs[path.stem] = namespace["config"]
    if not configs:
        raise ValueError(f"{path} defines no `config`; it must assign one, such as `config = Experiment(...)`.")
    if not name and len(configs) > 1:
        names = ", ".join(configs)
        raise ValueError(f"{path} defines {names}; name one of them, as {path}:{next(iter(configs))}.")
    name = name or next(iter(configs))
    if name not in configs:
        hint = systems.nearest(name, configs, f"; it defines {', '.join(configs)}")
        raise ValueError(f"{path} defines no {name!r}{hint}")
    with _errors_of(path):
        return configs[name]() if callable(configs[name]) else configs[name]


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns whatever a user's file does wrong into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be used{_line_of(error, path)}: {kind}{error}") from error


def _line_of(error: BaseException, path: Path) -> str:
    """Returns `, line N` if the error came from a line of the file, else an empty text."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def replaced(config: T, changes: Mapping[str, Any]) -> T:
    """Returns the config with fields replaced by their dotted names: `{"train.steps": 100, "stages.0.init": "copy"}`.

    Raises:
      ValueError: there is no such field, or its value is impossible.
    """
    for name, value in changes.items():
        config = _replaced(config, name.split("."), value, name)
    return config


def _replaced(config: Any, path: Sequence[str], value: Any, name: str) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(config, tuple) and first.isdigit() and int(first) < len(config):
        index = int(first)
        return (*config[:index], _replaced(config[index], rest, value, name), *config[index + 1 :])
    fields = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if first not in fields:
        hint = systems.nearest(first, fields, f"; it must be one of {', '.join(fields)}" if fields else "")
        raise ValueError(f"{name} is not a field: a {type(config).__name__} has no {first!r}{hint}")
    old = getattr(config, first)
    if not rest and value is not None and not _may_replace(old, value):
        raise ValueError(f"{name} is {value!r}; it must be of type {type(old).__name__}.")
    return dataclasses.replace(config, **{first: _replaced(old, rest, value, name)})


def _may_replace(old: Any, value: Any) -> bool:
    """Tells whether a number replaces a number, and a truth value a truth value; the config's class checks the rest."""
    if isinstance(old, bool):
        return isinstance(value, bool)
    kind = {int: numbers.Integral, float: numbers.Real}.get(type(old))
    return kind is None or (isinstance(value, kind) and not isinstance(value, bool))


def override(config: T, arguments: Sequence[str], prog: str, about: str = "") -> T:
    """Returns the config with fields replaced from a command line of dotted names: `--train.steps 100`.

    An unknown name or an impossible value ends the program with a message that names the nearest known ones.

    Args:
      about: what the config is, for the help.
    """
    return command_line(
        type(config),
        arguments,
        default=config,
        prog=prog,
        description=about or inspect.getdoc(type(config)),
        config=(tyro.conf.AvoidSubcommands,),
    )


def command_line(f: Any, arguments: Sequence[str], **options: Any) -> Any:
    """Calls `tyro.cli`, whose help then breaks lines only where the terminal ends.

    By itself, it keeps the source's line breaks before indented lines, as it gets them from `docstring_parser`.
    """

    def joined(parse: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            found = parse(*args)
            for parameter in found.params:
                parameter.description = " ".join((parameter.description or "").split()) or None
            return found

        return function

    own = {name: getattr(docstring_parser, name) for name in ("parse", "parse_from_object")}
    for name, parse in own.items():
        setattr(docstring_parser, name, joined(parse))
    try:
        return tyro.cli(f, args=list(arguments), **options)
    finally:
        for name, parse in own.items():
            setattr(docstring_parser, name, parse)


def to_json(value: Any) -> Any:
    """Returns a config as values that `json` can write; each dataclass carries the name of its type."""
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
    """Inverts `to_json`, also for what an older version wrote. Fields that a class has gained take their defaults.

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
        raise ValueError(f"the stored config gives {cls.__name__} the fields {', '.join(unknown)}; it has none such.")
    return cls(**fields)


def _named(name: str) -> type:
    """Returns the dataclass of a stored type name, which may be an old one."""
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
    """Returns a table of a dataclass, joined with those of its base classes."""
    return {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get(table, {}).items()}


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Returns where two configs differ, one line each: `train.steps: 100, not 200`."""
    if type(a) is type(b) and dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a)]
        return [d for n in names for d in differences(getattr(a, n), getattr(b, n), f"{prefix}{n}.")]
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{prefix}{i}.")]
    return [] if a == b else [f"{prefix.rstrip('.')}: {a}, not {b}"]
