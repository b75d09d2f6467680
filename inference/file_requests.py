"""What the file assistant can be asked for: one JSON object of the form FILE_PARAMETERS, from a rule, a tool call or a model; a model
plans with several of them, in the form PLAN_SCHEMA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inference.json_schema import problems

OPERATIONS = ("list", "read", "create", "make_folder", "update", "move", "copy", "rename", "delete", "classify", "tag")
LOOKS = ("list", "read")
GROUPINGS = ("type", "suffix", "month", "tag")
MOST_TAGS = 20

FILE_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "operation": {"type": "string", "enum": list(OPERATIONS)},
        "path": {"type": "string", "maxLength": 1024, "description": "file or folder, such as notes/a.txt; or a pattern, such as *.txt"},
        "to": {"type": "string", "maxLength": 1024, "description": "move, copy: folder or new path; rename: new name, or pattern (*.jpg)"},
        "content": {"type": "string", "description": "create: the text; update: the new text"},
        "find": {"type": "string", "minLength": 1, "description": "update: the text to replace by content"},
        "mode": {"type": "string", "enum": ["replace", "append"], "description": "update: the whole file (default), or add at its end"},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 50}, "minItems": 1, "maxItems": MOST_TAGS},
        "remove": {"type": "boolean", "description": "tag: take the tags away"},
        "by": {"type": "string", "enum": list(GROUPINGS), "description": "classify: into folders by this; default: type"},
        "subfolders": {"type": "boolean", "description": "patterns also look into subfolders"},
    },
    "required": ["operation"],
    "additionalProperties": False,
}
PLAN_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"operations": {"type": "array", "items": FILE_PARAMETERS, "minItems": 1, "maxItems": 20}},
    "required": ["operations"],
    "additionalProperties": False,
}
# What each operation needs, and what it may have beside that.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "list": ((), ("path", "subfolders", "tags")),
    "read": (("path",), ()),
    "create": (("path",), ("content",)),
    "make_folder": (("path",), ()),
    "update": (("path", "content"), ("mode", "find")),
    "move": (("path", "to"), ("subfolders",)),
    "copy": (("path", "to"), ("subfolders",)),
    "rename": (("path", "to"), ("subfolders",)),
    "delete": (("path",), ("subfolders",)),
    "classify": ((), ("path", "by")),
    "tag": (("path", "tags"), ("subfolders", "remove")),
}


def check_requests(requests: Sequence[Any]) -> None:
    """ValueError that says which request is wrong, and how."""
    for number, request in enumerate(requests, start=1):
        where = f"operation {number}" if len(requests) > 1 else ""
        found = problems(request, FILE_PARAMETERS, where)
        if not found:
            needed, possible = _FIELDS[request["operation"]]
            found = [f"{request['operation']} needs {name}" for name in needed if name not in request]
            found += [f"{request['operation']} takes no {name}" for name in request if name not in ("operation", *needed, *possible)]
        if found:
            raise ValueError(f"the plan cannot be used: {'; '.join(found)}")
