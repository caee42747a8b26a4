"""The study of constraints: schemas of function calls become JSON schemas, and valid answers are known."""

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
