"""Configs that an older version wrote still open: one for each system, and options that have moved."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxtok.configuration import from_json

STORED = json.loads((Path(__file__).parent / "goldens/configs/before.json").read_text())
"""Task and data of the tiny case of each system at commit 05f39b0, by `jaxtok.configuration.to_json`."""


@pytest.mark.parametrize("name", STORED)
def test_stored_configs_keep_every_value(name):
    agree(from_json(STORED[name]), STORED[name])


def agree(config, stored):
    if isinstance(stored, list):
        assert len(config) == len(stored)
        for ours, theirs in zip(config, stored):
            agree(ours, theirs)
    elif isinstance(stored, dict):
        assert dataclasses.is_dataclass(config)
        tables = {table: {} for table in ("RENAMED", "RETIRED")}
        for base in reversed(type(config).__mro__):
            for table, known in tables.items():
                known |= vars(base).get(table, {})
        fields = {field: value for field, value in stored.items() if field != "type"}
        if hasattr(type(config), "saved_before"):  # what has become several classes leaves out those of the others
            _, fields = type(config).saved_before(fields)
        for field, value in fields.items():
            field = tables["RENAMED"].get(field, field)
            if hasattr(config, field) or field not in tables["RETIRED"]:
                agree(getattr(config, field), value)
    else:
        assert (str(config) if isinstance(config, Path) else config) == stored


def test_an_option_of_another_system_is_refused():
    """Such a field is not dropped, as the model would be another one."""
    stored = STORED["option: full_layers"] | {"cosine_scores": True}
    with pytest.raises(ValueError, match="the field cosine_scores = True, which it no longer has"):
        from_json(stored)
