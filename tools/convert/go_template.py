"""A reader of the part of Go's text/template that our Modelfile templates use, so that they are checked where there is no Go.

Text, comments, {{- trim marks -}}, if / else if / else, range (lists by index, maps by sorted key), variables, fields, literals and the
functions below. Everything else raises ValueError. As in Go: `len` and `slice` count bytes, `and` and `or` give the deciding value and
stop there, an undefined key of the outermost map is empty, a missing field of a struct is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r'\{\{(-\s)?((?:"(?:\\.|[^"\\])*"|`[^`]*`|/\*.*?\*/|[^"`}]|\}(?!\}))*?)(\s-)?\}\}', re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?\d+)|(?P<variable>\$\w*(?:\.\w+)*)|(?P<fields>(?:\.\w+)+)"""
    r"""|(?P<dot>\.)|(?P<word>\w+)|(?P<mark>:=|=|\(|\)|,))"""
)


class Struct(dict[str, Any]):
    """A Go struct: field name -> value. As JSON: names begin in lower case, empty fields are left out."""

    def to_json(self) -> dict[str, Any]:
        return {name[0].lower() + name[1:]: value for name, value in self.items() if value or value is False or value == 0}


@dataclass
class _Node:
    """kind: text | output | set | if | range."""

    kind: str
    value: Any = None
    names: list[str] = field(default_factory=list)
    declares: bool = False
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


def render_go(template: str, values: Mapping[str, Any]) -> str:
    """Execute a template on `values` (outermost names -> value). ValueError names what cannot be read or executed."""
    nodes, _ = _parse(_split(template), closes=False)
    output: list[str] = []
    _execute(nodes, dict(values), [{"$": dict(values)}], output)
    return "".join(output)


def _split(template: str) -> list[tuple[str, str]]:
    """("text" | "action", content) in order, white space trimmed as the marks ask."""
    pieces: list[tuple[str, str]] = []
    end, trim_next = 0, False
    for found in _ACTION.finditer(template):
        text = template[end : found.start()]
        text = text.lstrip(" \t\r\n") if trim_next else text
        pieces.append(("text", text.rstrip(" \t\r\n") if found[1] else text))
        pieces.append(("action", found[2].strip()))
        end, trim_next = found.end(), bool(found[3])
    text = template[end:]
    pieces.append(("text", text.lstrip(" \t\r\n") if trim_next else text))
    if any(kind == "text" and "{{" in text for kind, text in pieces):
        raise ValueError("the Go template has an action that is not closed")
    return pieces


def _parse(pieces: list[tuple[str, str]], closes: bool) -> tuple[list[_Node], str | None]:
    """Nodes up to the matching `end` or `else ...`, which is returned; consumes `pieces` from the front."""
    nodes: list[_Node] = []
    while pieces:
        kind, content = pieces.pop(0)
        if kind == "text":
            nodes += [_Node("text", content)] if content else []
            continue
        if content.startswith("/*"):
            continue
        word, _, rest = content.partition(" ")
        if word in ("end", "else"):
            if not closes:
                raise ValueError(f"the Go template has {{{{ {content} }}}} without a beginning")
            return nodes, content
        if word in ("if", "range"):
            nodes.append(_branch(word, rest, pieces))
        elif word in ("with", "define", "template", "block", "break", "continue"):
            raise ValueError(f"the Go template uses {word!r}, which this reader does not know")
        else:
            nodes.append(_statement("output", content))
    if closes:
        raise ValueError("the Go template lacks an {{ end }}")
    return nodes, None


def _branch(word: str, rest: str, pieces: list[tuple[str, str]]) -> _Node:
    node = _statement(word, rest)
    node.body, closing = _parse(pieces, closes=True)
    if closing and closing.startswith("else if "):
        node.otherwise = [_branch("if", closing.removeprefix("else if "), pieces)]
    elif closing == "else":
        node.otherwise, closing = _parse(pieces, closes=True)
        if closing != "end":
            raise ValueError("the Go template has two {{ else }} in a row")
    return node


def _statement(kind: str, source: str) -> _Node:
    """`[$a[, $b] :=|=] expression` as a node whose value is the expression's tree."""
    tokens: list[tuple[str, str]] = []
    position = 0
    while source[position:].strip():
        found = _TOKEN.match(source, position)
        if not found:
            raise ValueError(f"the Go template has {source[position:]!r}, which this reader does not know")
        kind_of = str(found.lastgroup)
        # Fields right behind a parenthesis belong to its value, behind a space they are the next argument.
        follows = bool(tokens) and tokens[-1] == ("mark", ")") and not source[position].isspace()
        tokens.append(("chain" if kind_of == "fields" and follows else kind_of, found[kind_of]))
        position = found.end()
    node = _Node(kind)
    assign = next((i for i, token in enumerate(tokens) if token in (("mark", ":="), ("mark", "="))), None)
    if assign is not None:
        node.names = [text for name, text in tokens[:assign] if name == "variable"]
        node.declares = tokens[assign][1] == ":="
        node.kind = "set" if kind == "output" else kind
        tokens = tokens[assign + 1 :]
    node.value = _expression(tokens)
    if tokens:
        raise ValueError(f"the Go template has {tokens[0][1]!r} where an expression ends")
    return node


def _expression(tokens: list[tuple[str, str]]) -> Any:
    """("call", name, arguments) or a single operand; consumes up to a closing parenthesis."""
    operands: list[Any] = []
    while tokens and tokens[0] != ("mark", ")"):
        kind, text = tokens.pop(0)
        if (kind, text) == ("mark", "("):
            inner = _expression(tokens)
            if not tokens:
                raise ValueError("the Go template lacks a closing parenthesis")
            tokens.pop(0)
            names = tokens.pop(0)[1] if tokens and tokens[0][0] == "chain" else ""
            operands.append(("fields_of", inner, names))
        else:
            operands.append((kind, text))
    if not operands:
        raise ValueError("the Go template has an empty expression")
    if operands[0][0] == "word" and operands[0][1] not in ("true", "false", "nil"):
        return ("call", operands[0][1], operands[1:])
    if len(operands) > 1:
        raise ValueError(f"the Go template calls {operands[0][1]!r}, which is no function")
    return operands[0]


def _execute(nodes: list[_Node], dot: Any, scopes: list[dict[str, Any]], output: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            output.append(node.value)
        elif node.kind == "output":
            output.append(_printed(_value(node.value, dot, scopes)))
        elif node.kind == "set":
            _assign(node, _value(node.value, dot, scopes), scopes)
        elif node.kind == "if":
            chosen = node.body if _value(node.value, dot, scopes) else node.otherwise
            _execute(chosen, dot, [*scopes, {}], output)
        else:
            _loop(node, dot, scopes, output)


def _loop(node: _Node, dot: Any, scopes: list[dict[str, Any]], output: list[str]) -> None:
    over = _value(node.value, dot, scopes)
    if over is not None and not isinstance(over, (dict, list)):
        raise ValueError(f"the Go template ranges over {over!r}")
    items = sorted(over.items()) if isinstance(over, dict) else list(enumerate(over or []))
    for key, item in items:
        scope = dict(zip(node.names, (key, item) if len(node.names) == 2 else (item,), strict=False))
        _execute(node.body, item, [*scopes, scope], output)
    if not items:
        _execute(node.otherwise, dot, [*scopes, {}], output)


def _assign(node: _Node, value: Any, scopes: list[dict[str, Any]]) -> None:
    name = node.names[0]
    if node.declares:
        scopes[-1][name] = value
        return
    for scope in reversed(scopes):
        if name in scope:
            scope[name] = value
            return
    raise ValueError(f"the Go template sets {name} before it is declared")


def _value(tree: Any, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    kind, text = tree[0], tree[1]
    if kind == "call":
        return _call(text, tree[2], dot, scopes)
    if kind == "fields_of":
        return _fields(_value(text, dot, scopes), tree[2])
    if kind == "string":
        return text[1:-1] if text[0] == "`" else json.loads(text)
    if kind == "number":
        return int(text)
    if kind == "variable":
        name, _, rest = text.partition(".")
        for scope in reversed(scopes):
            if name in scope:
                return _fields(scope[name], "." + rest if rest else "")
        raise ValueError(f"the Go template reads {name} before it is declared")
    if kind == "word":
        return {"true": True, "false": False, "nil": None}[text]
    return _fields(dot, text if kind == "fields" else "")


def _fields(value: Any, names: str) -> Any:
    for name in names.split(".")[1:]:
        if isinstance(value, Struct):
            if name not in value:
                raise ValueError(f"the Go template reads the field {name}, which {sorted(value)} do not have")
            value = value[name]
        elif isinstance(value, dict):
            value = value.get(name)
        else:
            raise ValueError(f"the Go template reads the field {name} of {value!r}")
    return value


def _call(name: str, arguments: list[Any], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if name in ("and", "or"):
        value: Any = None
        for argument in arguments:
            value = _value(argument, dot, scopes)
            if bool(value) == (name == "or"):
                return value
        return value
    if name not in _FUNCTIONS:
        raise ValueError(f"the Go template calls {name!r}, which this reader does not know")
    return _FUNCTIONS[name](*[_value(argument, dot, scopes) for argument in arguments])


def _length(value: Any) -> int:
    return len(value.encode("utf-8", "surrogateescape")) if isinstance(value, str) else len(value)


def _slice(value: Any, *bounds: int) -> Any:
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    first, last = [*bounds, len(data)][:2] if len(bounds) == 1 else bounds
    if not 0 <= first <= last <= len(data):
        raise ValueError(f"the Go template slices {first}:{last} of {len(data)}")
    part = data[first:last]
    return part.decode("utf-8", "surrogateescape") if isinstance(value, str) else part


def go_json(value: Any) -> str:
    """JSON as Go writes it: no spaces, keys of maps sorted, `<`, `>`, `&` escaped."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return {name: _plain(item) for name, item in value.to_json().items()}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in sorted(value.items())}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int)):
        return str(value)
    raise ValueError(f"the Go template prints {value!r}, which this reader does not know how to print")


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "not": lambda value: not value,
    "eq": lambda value, *others: value in others,
    "ne": lambda value, other: value != other,
    "lt": lambda value, other: value < other,
    "le": lambda value, other: value <= other,
    "gt": lambda value, other: value > other,
    "ge": lambda value, other: value >= other,
    "len": _length,
    "slice": _slice,
    "index": lambda value, key: value[key],
    "json": go_json,
}

__all__ = ["Struct", "go_json", "render_go"]
