"""A model as one works with it: task, parameters, tokenizer and data in one object."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxtok.protocols import Params, Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """What every verb, notebook and study holds in its hand; `jaxtok.open` makes it, from a run or from a `Format`."""

    task: Any
    """Fills the Task waist."""
    params: Params
    data: Any
    """Fills the Data waist: what it was trained on, or how it would be."""
    tokenizer: Tokenizer | None = None
    """None, where the data are no text."""
    begin: tuple[int, ...] = ()
    """Ids that begin every text."""
    ends: tuple[int, ...] = ()
    """Ids after any of which a text has ended."""
    pad: int | None = None
    """The id that fills rows up, where there is one."""
    path: Path | None = None
    """Where it was read from."""
    step: int = 0
    """Updates so far."""
