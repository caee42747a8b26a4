"""jaxtok: JAX / Flax reference implementations of published systems about tokens.

    import jaxtok

    model = jaxtok.open("runs/tokenformer_small")
    model.generate("def ")
    model.logits("def ").shape

Importing it is quick and does not import JAX; each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PATHS = {
    "Model": "jaxtok.model:Model",
    "evaluate": "jaxtok.door:evaluate",
    "generate": "jaxtok.door:generate",
    "list": "jaxtok.systems:find",
    "open": "jaxtok.door:open_model",
    "published": "jaxtok.door:published",
    "train": "jaxtok.door:train",
}

if TYPE_CHECKING:
    from jaxtok.door import evaluate, generate, published, train
    from jaxtok.door import open_model as open
    from jaxtok.model import Model
    from jaxtok.systems import find as list

__all__ = ["Model", "evaluate", "generate", "list", "open", "published", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PATHS:
        raise AttributeError(f"module 'jaxtok' has no attribute {name!r}")
    module, _, attribute = _PATHS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> Any:
    return sorted({*globals(), *_PATHS})
