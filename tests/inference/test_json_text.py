"""JSON from models: what is repaired, what is refused, and what the schema check says."""

import json
import random
import time

import pytest

from inference.json_schema import check_schema, problems
from inference.json_text import JsonTextError, read_object

UNAMBIGUOUS = [
    ('{"a": 1}', {"a": 1}),
    ('  ```json\n{"a": [1, 2]}\n```', {"a": [1, 2]}),
    ('{"a": 1,}', {"a": 1}),
    ('{"a": [1, 2,], }', {"a": [1, 2]}),
    ('{"a": {"b": "x"}', {"a": {"b": "x"}}),
    ('{"a": ["x"', {"a": ["x"]}),
    ('{"a": 1}}}', {"a": 1}),
    ('{"a": "two\nlines"}', {"a": "two\nlines"}),
    ('{"a": "},{,}"}', {"a": "},{,}"}),
    ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
    ("{'a': True, 'b': None, 'c': (1, 2)}", {"a": True, "b": None, "c": [1, 2]}),
]
AMBIGUOUS = [
    "", "no", "[1]", '"a"', '{"a": "x', '{"a": 1', '{"a": [1, 2', '{"a": ', '{"a": 1} and more', '{"a": 1, "a": 2}', "{'a': 1, 'a': 2}",
    '{"a" 1}', '{"a": NaN}', '{"a": 1e999}', "{'a': {1, 2}}", "{'a': open('x')}", '{"a": [1}', "[" * 5000, "{'a':" * 3000,
    '{"a": "\\ud83d"}', '{"\\udc00": 1}', '{"a": ["x", {"b": "\\ude00\\ud83d"}]}',
]  # fmt: skip


@pytest.mark.parametrize("text, value", UNAMBIGUOUS)
def test_repairs(text, value):
    """Guards: a model's small slips that cost a whole round of the conversation."""
    assert read_object(text) == value


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_no_guesses(text):
    """Guards: a call that runs with arguments that were never said (half a text, half a number, one of two values)."""
    with pytest.raises(JsonTextError):
        read_object(text)


def test_every_cut_of_an_object_is_whole_or_refused():
    """Guards: a repair of a text that was cut off in the middle of a value."""
    whole = {"name": "files", "arguments": {"path": 'a "b" {c}.txt', "tags": ["x", "y"], "n": 120, "deep": {"ok": True}}}
    text = json.dumps(whole)
    accepted = []
    for end in range(len(text)):
        try:
            accepted.append(read_object(text[:end]))
        except JsonTextError:
            continue

    def part_of(part, value):
        if isinstance(value, dict):
            return isinstance(part, dict) and all(key in value and part_of(inner, value[key]) for key, inner in part.items())
        if isinstance(value, list):
            return isinstance(part, list) and part == value[: len(part)]
        return part == value

    assert accepted and all(part_of(found, whole) for found in accepted)


@pytest.mark.parametrize("text", ['"' + '\\"' * 40_000, '{"a":' * 19_000, "," * 90_000 + "}", "{" + '"a":1,' * 15_000])
def test_long_nonsense_is_refused_at_once(text):
    """Guards: a reply that keeps the reader busy for minutes."""
    started = time.perf_counter()
    with pytest.raises(JsonTextError):
        read_object(text)
    assert time.perf_counter() - started < 2


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 1, "exclusiveMaximum": 10},
        "name": {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "^[a-z]"},
        "list": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
        "kind": {"enum": ["a", 1, None]},
        "either": {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
        "inner": {"type": "object", "properties": {"x": {"type": ["null", "number"]}}, "required": ["x"]},
    },
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "value, words",
    [
        ({"n": "3"}, "n must be integer, not string"),
        ({"n": True}, "n must be integer, not boolean"),
        ({"n": 1.5}, "n must be integer, not number"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"n": 10}, "n must be below 10, not 10"),
        ({}, "n is missing"),
        ({"n": 1, "m": 1}, "there is no m"),
        ({"n": 1, "name": "x"}, "name needs at least 2 characters"),
        ({"n": 1, "name": "Xyz"}, "name must match"),
        ({"n": 1, "list": [1, "x"]}, "list[2] must be number"),
        ({"n": 1, "list": [1, 2, 3]}, "list has 3 entries, at most 2"),
        ({"n": 1, "kind": True}, "kind must be one of"),
        ({"n": 1, "either": 3}, "either fits none of its 2 forms"),
        ({"n": 1, "inner": {}}, "inner.x is missing"),
        ([], "the value must be object, not array"),
    ],
)
def test_problems_say_what_is_wrong(value, words):
    """Guards: an error that a model cannot act on."""
    found = problems(value, SCHEMA)
    assert len(found) == 1 and words in found[0], found


def test_the_check_agrees_with_jsonschema():
    """Guards: an own reading of JSON Schema. 3000 random values against the reference implementation."""
    reference = pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA)
    rng = random.Random()
    leaves = [None, True, False, 0, 1, 9, 10, 2.0, 2.5, 1e30, "", "a", "ab", "abcde", "Ab", [], [1], [1, 2, 3], ["x"], {}]
    leaves += [{"x": None}, {"x": "y"}]
    for _ in range(3000):
        value = {key: rng.choice(leaves) for key in (*SCHEMA["properties"], "more") if rng.random() < 0.4}
        value = rng.choice([value, value, {"n": 3, **value}, rng.choice(leaves)])
        assert bool(problems(value, SCHEMA)) != reference.is_valid(value), value


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"$ref": "#/x"}, r"\$ref"),
        ({"type": "objekt"}, "no type 'objekt'"),
        ({"properties": {"a": {"minimun": 1}}}, "property a uses minimun"),
        ({"items": {"allOf": []}}, "items uses allOf"),
        ({"pattern": "("}, "no regular expression"),
        (3, "must be an object"),
        ({"type": 3}, "type must be a name or a list of names, not 3"),
        ({"type": []}, "type must be"),
        ({"properties": ["a"]}, "properties must be an object of schemas"),
        ({"properties": {"a": 3}}, "property a must be an object"),
        ({"required": "name"}, "required must be a list of names, not 'name'"),
        ({"anyOf": []}, "anyOf must be"),
        ({"enum": []}, "enum must be"),
        ({"minimum": "3"}, "minimum must be a number, not '3'"),
        ({"maxItems": -1}, "maxItems must be a whole number"),
        ({"items": [{}]}, "items must be a schema"),
        ({"additionalProperties": None}, "additionalProperties must be"),
        ({"pattern": None}, "pattern must be"),
    ],
)
def test_schemas_that_cannot_be_checked_are_refused(schema, words):
    """Guards: a keyword that a tool's author relies on and nobody checks."""
    with pytest.raises(ValueError, match=words):
        check_schema(schema)
