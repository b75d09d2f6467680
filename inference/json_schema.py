"""JSON Schema, as far as the arguments of tools need it (draft 2020-12, the keywords of CHECKED): problems in words for a model.

problems({"n": "3"}, {"type": "object", "properties": {"n": {"type": "integer"}}})   # ["n must be integer, not string"]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

CHECKED = (
    "type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
)  # fmt: skip
NOTES = ("$schema", "title", "description", "default", "examples", "format")
MOST_PROBLEMS = 8

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and (isinstance(value, int) or isinstance(value, float) and value.is_integer()),
}
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "above"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "below"),
}
_LENGTHS = {"minItems": ("maxItems", "entries"), "minLength": ("maxLength", "characters")}


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


_FORMS: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("type",): (lambda value: isinstance(value, str) or (_is_list_of(str, value) and bool(value)), "a name or a list of names"),
    ("enum",): (lambda value: isinstance(value, list) and bool(value), "a list that is not empty"),
    ("anyOf",): (lambda value: _is_list_of(dict, value) and bool(value), "a list of schemas that is not empty"),
    ("properties",): (lambda value: isinstance(value, dict), "an object of schemas"),
    ("required",): (lambda value: _is_list_of(str, value), "a list of names"),
    ("additionalProperties",): (lambda value: isinstance(value, (bool, dict)), "true, false or a schema"),
    ("items",): (lambda value: isinstance(value, dict), "a schema"),
    ("minItems", "maxItems", "minLength", "maxLength"): (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        "a whole number of at least 0",
    ),
    tuple(_BOUNDS): (_TYPES["number"], "a number"),
    ("pattern",): (lambda value: isinstance(value, str), "a regular expression"),
}
"""What the values of keywords must be."""


def check_schema(schema: Any, where: str = "the schema") -> None:
    """ValueError when a schema uses what `problems` would pass over in silence ($ref, allOf, a mistyped keyword), or is none."""
    if not isinstance(schema, dict):
        raise ValueError(f"{where} must be an object, not {_type_name(schema)}")
    unknown = sorted(set(schema) - {*CHECKED, *NOTES})
    if unknown:
        raise ValueError(f"{where} uses {', '.join(unknown)}, which is not checked here; known: {', '.join(CHECKED)}")
    for keywords, (fits, form) in _FORMS.items():
        for keyword in keywords:
            if keyword in schema and not fits(schema[keyword]):
                raise ValueError(f"{where}: {keyword} must be {form}, not {schema[keyword]!r:.60}")
    for name in [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", []):
        if name not in _TYPES:
            raise ValueError(f"{where}: there is no type {name!r}; known: {', '.join(_TYPES)}")
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except re.error as error:
            raise ValueError(f"{where}: pattern {schema['pattern']!r} is no regular expression: {error}") from error
    for name, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{where}, property {name}")
    for name, inner in [(name, schema.get(name)) for name in ("items", "additionalProperties")]:
        if isinstance(inner, dict):
            check_schema(inner, f"{where}, {name}")
    for inner in schema.get("anyOf", []):
        check_schema(inner, f"{where}, anyOf")


def problems(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """What is wrong with a value, at most MOST_PROBLEMS sentences that name the place; [] when it fits."""
    return _problems(value, schema, where)[:MOST_PROBLEMS]


def _problems(value: Any, schema: dict[str, Any], where: str) -> list[str]:
    name = where or "the value"
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if types and not any(_TYPES[kind](value) for kind in types):
        return [f"{name} must be {' or '.join(types)}, not {_type_name(value)}"]
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        return [f"{name} must be one of {', '.join(map(repr, schema['enum']))}, not {value!r:.60}"]
    if "const" in schema and not _same(value, schema["const"]):
        return [f"{name} must be {schema['const']!r}, not {value!r:.60}"]
    if "anyOf" in schema and all(_problems(value, choice, where) for choice in schema["anyOf"]):
        return [f"{name} fits none of its {len(schema['anyOf'])} forms: {_problems(value, schema['anyOf'][0], where)[0]}"]
    found = []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found += [
            f"{name} must be {words} {schema[key]}, not {value}"
            for key, (holds, words) in _BOUNDS.items()
            if key in schema and not holds(value, schema[key])
        ]
    if isinstance(value, (list, str)):
        least_key = "minItems" if isinstance(value, list) else "minLength"
        most_key, unit = _LENGTHS[least_key]
        if len(value) < schema.get(least_key, 0):
            found.append(f"{name} needs at least {schema[least_key]} {unit}")
        if len(value) > schema.get(most_key, len(value)):
            found.append(f"{name} has {len(value)} {unit}, at most {schema[most_key]} are allowed")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{name} must match {schema['pattern']!r}")
    if isinstance(value, list) and "items" in schema:
        for number, entry in enumerate(value, start=1):
            found += _problems(entry, schema["items"], f"{where}[{number}]")
    if isinstance(value, dict):
        found += _object_problems(value, schema, where)
    return found


def _object_problems(value: dict[str, Any], schema: dict[str, Any], where: str) -> list[str]:
    inside = f"{where}." if where else ""
    properties = schema.get("properties", {})
    found = [f"{inside}{name} is missing" for name in schema.get("required", []) if name not in value]
    more = schema.get("additionalProperties", True)
    for name, entry in value.items():
        if name in properties:
            found += _problems(entry, properties[name], f"{inside}{name}")
        elif more is False:
            found.append(f"there is no {inside}{name}; known: {', '.join(properties) or 'none'}")
        elif isinstance(more, dict):
            found += _problems(entry, more, f"{inside}{name}")
    return found


def _same(left: Any, right: Any) -> bool:
    """Equal in JSON, where true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _type_name(value: Any) -> str:
    return next((name for name in ("boolean", "integer", *_TYPES) if _TYPES[name](value)), type(value).__name__)
