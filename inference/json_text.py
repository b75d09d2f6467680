"""JSON as models write it: read strictly, and repaired only where there is one way to understand it.

Repaired: a code fence around it, line breaks inside texts, a comma before a closing bracket, closing brackets that are missing (or
too many) at the very end, and a dict in Python's spelling ('...', True, None). Refused: words before or behind it, a text that is
not closed, a key twice, NaN and Infinity, half a character ("\\ud83d" alone).
"""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

MAX_CHARACTERS = 100_000
MAX_DEPTH = 40
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*(?:(")|\\?\Z)|[\[\]{}]|,(?=\s*[}\]])', re.DOTALL)
_CLOSES = {"{": "}", "[": "]"}


class JsonTextError(ValueError):
    """Not JSON, and no repair is certain; the message says where reading stopped."""


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that a text consists of. Raises JsonTextError."""
    if len(text) > MAX_CHARACTERS:
        raise JsonTextError(f"it has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    fenced = _FENCE.fullmatch(text)
    text = (fenced.group(1) if fenced else text).strip()
    try:
        value = _loads(text)
    except _Twice:
        raise
    except ValueError as error:
        value = _mended(text, error)
    if not isinstance(value, dict):
        raise JsonTextError(f"an object in braces is expected, not {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise JsonTextError(f"{ascii(error.object[error.start])} is half a character") from error
    except RecursionError as error:
        raise JsonTextError("it is nested too deeply") from error
    return value


def _mended(text: str, error: ValueError) -> Any:
    for read, source in ((_loads, _repaired(text)), (_python, text)):
        if source is not None:
            try:
                return read(source)
            except _Twice:
                raise
            except ValueError:
                continue  # the first error says most
    raise JsonTextError(_words(text, error)) from error


class _Twice(JsonTextError):
    """A key that stands twice: no repair could tell which one counts."""


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise JsonTextError("it is nested too deeply") from error


def _repaired(text: str) -> str | None:
    """The text with its commas and closing brackets mended; None when it is nested too deeply or its brackets do not match."""
    open_, kept, at = [], [], 0
    for match in _PIECE.finditer(text):
        piece = match.group()
        kept.append(text[at : match.start()])
        at = match.end()
        if piece.startswith('"') and not match.group(1):
            return None  # a text was cut off: what it was to say is unknown
        if piece in ("{", "["):
            open_.append(_CLOSES[piece])
            if len(open_) > MAX_DEPTH:
                raise JsonTextError(f"it is nested deeper than {MAX_DEPTH}")
        elif piece in ("}", "]"):
            if not open_ and not text[match.start() :].strip("}] \n"):
                at = len(text)  # brackets too many, behind a whole object
                break
            if not open_ or open_.pop() != piece:
                return None
        if piece != ",":
            kept.append(piece)
    if text[at:].strip():  # so was a number or a list
        return None
    return "".join(kept) + "".join(reversed(open_))


def _python(text: str) -> Any:
    """A dict in Python's spelling; only what JSON can hold, too."""
    try:
        tree = ast.parse(text, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                _once([(str(ast.literal_eval(key)), None) for key in node.keys if key is not None])
        value = ast.literal_eval(tree)
        return _loads(json.dumps(value, allow_nan=False))
    except _Twice:
        raise
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise JsonTextError(str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(f"the key {key!r:.60} stands twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _no_constant(name: str) -> Any:
    raise JsonTextError(f"{name} is no JSON")


def _words(text: str, error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg} at {text[error.pos : error.pos + 20]!r}" if error.pos < len(text) else "it ends too early"
