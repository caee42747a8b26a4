"""The study of constraints: schemas of function calls become JSON schemas, and valid answers are known."""

import json
import math

import pytest

from jaxtok.studies.constraints import Constraints, is_valid, schema_of


def test_schemas_of_function_calls():
    parameters = {
        "type": "dict",
        "properties": {
            "sides": {"type": "array", "items": {"type": "float"}, "description": "in cm"},
            "unit": {"type": "string", "enum": ["cm", "m"]},
            "anything": {"type": "any"},
        },
        "required": ["sides"],
    }
    schema = schema_of(parameters)
    assert schema["type"] == "object" and not schema["additionalProperties"]
    assert schema["properties"]["sides"] == {"type": "array", "items": {"type": "number"}}
    assert schema["properties"]["anything"] == {}
    pytest.importorskip("jsonschema")
    assert is_valid(b'{"sides": [3, 4.5], "unit": "m"}', schema)
    for bad in (b'{"sides": [3', b'{"unit": "m"}', b'{"sides": [], "unit": "km"}', b'{"sides": [], "other": 1}'):
        assert not is_valid(bad, schema)


def test_bad_options():
    with pytest.raises(ValueError, match="methods has 'best'"):
        Constraints(methods=("best",))
    with pytest.raises(ValueError, match="questions is 0"):
        Constraints(questions=0)


def test_tables_of_what_was_measured(tmp_path):
    """A run that was stopped measures only what is missing: here nothing, so that no model is opened."""
    run = {
        "effective": [4.0, 2.0],
        "weighted": 10,
        "valid": 10,
        "checks": 300,
        "tokens": 100,
        "steps": 20,
        "seconds": 4,
    }
    results = {f"method awrs {seed}": run | {"log_evidence": [-3 + seed, -9.0]} for seed in (0, 1)}
    results |= {f"method rejection {seed}": run | {"log_evidence": [-math.inf, -9.0]} for seed in (0, 1)}
    costs = {("awrs", 0.0): (5, 10, 20), ("awrs", 0.1): (5, 510, 1020), ("twisted", 0.0): (1, 5, "none lives")}
    costs |= {("twisted", 0.1): (1, 105, "none lives"), ("mask", 0.0): ("one mask", 12, 13)}
    costs |= {("mask by checks", 0.0): (20000, 30, 31)}
    for (name, delay), (checks, ms, effective) in costs.items():
        row = {
            "method": name,
            "added to a check, s": delay,
            "checks a particle and step": checks,
            "ms a particle and step": ms,
        }
        results[f"cost {name} {delay:g}"] = [row | {"the same, an effective particle": effective}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    study = Constraints(
        model="nowhere",
        questions=2,
        seeds=2,
        methods=("awrs", "rejection"),
        delays=(0.0, 0.1),
        batches=(),
        peer=False,
        workdir=str(tmp_path),
    )
    assert study.run()
    text = (tmp_path / "results.md").read_text()
    assert "| awrs | 5 | 1.00 | 20 of 20 | 3.00 | 3.00 | 0.200 |" in text
    mean = math.log((math.exp(-3) + math.exp(-2)) / 2)
    assert f"| 1 | {mean:.1f} ± 0.5 | all died |" in text and "| 2 | -9.0 ± 0.0 | -9.0 ± 0.0 |" in text
    assert (tmp_path / "costs.png").stat().st_size > 10_000
