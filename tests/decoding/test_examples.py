"""The examples in the docstrings of `jaxtok.decoding`."""

import doctest
import importlib
import inspect

import pytest

from jaxtok import decoding

MODULES = (
    "aded",
    "awrs",
    "byte_exact",
    "byte_validity",
    "byte_vocabulary",
    "constraints",
    "draft_model",
    "engine",
    "expert_prefetch",
    "m2r2",
    "prompt_lookup",
    "sampling",
    "scorers",
    "sinks",
    "skipdecode",
    "suffix_automaton",
    "token_recycling",
    "trigram_table",
    "union",
)
TYPES = {
    "ADEDState",
    "Chooser",
    "Drafter",
    "Evictor",
    "TokenModel",
    "Verified",
    "State",
    "Piece",
    "Generation",
    "CachedTokens",
    "Scorer",
}
SHOWN_ELSEWHERE = {
    **dict.fromkeys(("Eviction", "Keyformer"), "parse_evictor"),
    **dict.fromkeys(("Constrained", "Grammar", "constrain"), "Vocabulary"),
    **dict.fromkeys(("AWRS", "PRESETS", "SMC", "sample_texts"), "configs/decoding/README.md"),
    **dict.fromkeys(("ByteMixture", "ByteModel", "Gap"), "configs/decoding/README.md"),
}
"""What has no example of its own, and where it is shown."""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"jaxtok.decoding.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_what_can_be_called_has_an_example():
    """Classes that only describe (protocols, and what is returned) need no example."""
    without = {name for name in decoding.__all__ if ">>>" not in inspect.getdoc(getattr(decoding, name))}
    assert without == TYPES | SHOWN_ELSEWHERE.keys()
