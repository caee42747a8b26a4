"""The drafters that commands know by name. A new one is its file in `jaxtok/decoding/` and a row here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtok.decoding import (
    ADED,
    ADEDState,
    Drafter,
    DraftModel,
    Generation,
    PromptLookup,
    SuffixAutomaton,
    TokenRecycling,
    Union,
)
from jaxtok.decoding.trigram_table import load_table, tokenizer_digest
from jaxtok.door import open_model
from jaxtok.model import Model


class Named(NamedTuple):
    """What a name stands for."""

    drafter: Drafter
    state: Any = None
    """The drafter's first state; None: a new one."""
    keep: Callable[[Any], Any] | None = None
    """What keeps its last state."""


def _recycling(model: Model, place: str) -> Named:
    drafter, about = TokenRecycling(), tokenizer_digest(model.tokenizer)
    state = drafter.load(place, model.task.model.vocab_size, about) if Path(place).exists() else None
    return Named(drafter, state, functools.partial(drafter.save, place, tokenizer=about))


def _copies(model: Model, count: str) -> Named:
    if not count.isdecimal() or not int(count):
        raise ValueError(f"drafter has suffix_automaton:{count}; after the colon comes a number of copies, such as 3.")
    return Named(SuffixAutomaton(matches=int(count), tokens=12))


def _draft_model(model: Model, place: str) -> Named:
    small = open_model(place)
    drafter = DraftModel(model=small.module)
    return Named(drafter, drafter.first_state(small.params))


DRAFTERS: dict[str, Callable[[Model, str], Named]] = {
    "prompt_lookup": lambda model, _: Named(PromptLookup(ends=model.ends)),
    "suffix_automaton": lambda model, _: Named(SuffixAutomaton()),
    "suffix_automaton:COPIES": _copies,
    "token_recycling": lambda model, _: Named(TokenRecycling()),
    "token_recycling:FILE.safetensors": _recycling,
    "aded:TABLE": lambda model, place: Named(ADED(), ADEDState(load_table(place, model.tokenizer))),
    "draft_model:MODEL": _draft_model,
}
"""How each drafter is made from the model that it drafts for and from what comes after the colon."""


def drafter_of(text: str, model: Model) -> tuple[Drafter, Any, Callable[[Generation], None] | None]:
    """Returns what --drafter names: the drafter, its first state (None: a new one), and what keeps its last state.

    Several names that are joined by + give a `Union`.

    Raises:
      ValueError: it names no drafter, or one that needs something else.
      FileNotFoundError: there is no such file.
    """
    found = [_named(part, text, model) for part in text.split("+")]
    keepers = [(number, named.keep) for number, named in enumerate(found) if named.keep]

    def keep_all(made: Generation) -> None:
        for number, keep in keepers:
            keep(made.state.drafter[number] if len(found) > 1 else made.state.drafter)

    keep = keep_all if keepers else None
    if len(found) == 1:
        return found[0].drafter, found[0].state, keep
    return Union(tuple(named.drafter for named in found)), tuple(named.state for named in found), keep


def _named(part: str, text: str, model: Model) -> Named:
    name, _, place = part.partition(":")
    for form, make in DRAFTERS.items():
        known, _, needed = form.partition(":")
        if (name, bool(place)) == (known, bool(needed)) and place.endswith(Path(needed).suffix):
            return make(model, place)
    *most, last = DRAFTERS
    raise ValueError(f"drafter is {text!r}, where {part!r} is none of {', '.join(most)} and {last}.")
