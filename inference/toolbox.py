"""Tools that a model may call: what it says is parsed, checked, run within limits, and the result goes back to it.

    toolbox = default_tools()
    for call in toolbox.calls(reply): print(toolbox.run(call))      # the rounds of a conversation: inference.tool_rounds

The format is that of the chat template (Qwen3, Hermes): <tool_call>{"name": ..., "arguments": {...}}</tool_call>, results in a turn
of the role "tool". Whatever goes wrong becomes a text that the model reads: a tool never raises into the conversation.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from inference.calculator import calculate, write_number
from inference.clock import CLOCK_PARAMETERS, clock
from inference.file_requests import FILE_PARAMETERS
from inference.json_schema import check_schema, problems
from inference.json_text import JsonTextError, read_object

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_RECORDS = 1000
MOST_PLACES = 1024
"""Decimals of a sum that are written out; the calculator makes no more."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_BLOCK = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|(?={OPEN})|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """One function that the model may call.

    parameters: a JSON Schema of type object (keywords: `inference.json_schema.CHECKED`). run(**arguments) returns text, or something
    that JSON can hold. A tool with `seconds` runs in a thread of its own, and an answer later than that is not waited for (Python
    cannot end the thread); None runs it in the caller's thread without a limit, as what asks the user or holds a database must.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[..., Any]
    seconds: float | None = 10.0


@dataclass(frozen=True)
class ToolCall:
    """What the model asked for. `error` says why it cannot be run."""

    name: str
    arguments: dict[str, Any]
    id: str = ""
    error: str = ""


class Toolbox:
    """The tools of a conversation. `records` holds the last MOST_RECORDS calls: time, name, arguments, result, failed, seconds."""

    def __init__(self, tools: Sequence[Tool] = (), most_characters: int = 4000) -> None:
        if most_characters < 100:
            raise ValueError(f"most_characters={most_characters}: a result needs at least 100 characters")
        self.most_characters = most_characters
        """Longer results are cut off, so that one file does not fill the context."""
        self.records: deque[dict[str, Any]] = deque(maxlen=MOST_RECORDS)
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            self.add(tool)

    def add(self, tool: Tool) -> None:
        """Raises ValueError for a name that is taken or no identifier, and for parameters that cannot be checked."""
        if not _NAME.fullmatch(tool.name):
            raise ValueError(f"tool name {tool.name!r}: use up to 64 letters, digits, _ and -, beginning with a letter")
        if tool.name in self._tools:
            raise ValueError(f"there is a tool {tool.name!r} already; remove it first or choose another name")
        if tool.parameters.get("type") != "object":
            raise ValueError(f"tool {tool.name}: parameters must be a JSON Schema of type object")
        if tool.seconds is not None and tool.seconds <= 0:
            raise ValueError(f"tool {tool.name}: seconds={tool.seconds} must be above 0, or None for no limit")
        check_schema(tool.parameters, f"tool {tool.name}: parameters")
        self._tools[tool.name] = tool

    def remove(self, name: str) -> None:
        """Raises ValueError when there is none of this name."""
        if self._tools.pop(name, None) is None:
            raise ValueError(f"there is no tool {name!r}; known: {', '.join(self.names()) or 'none'}")

    def names(self) -> list[str]:
        return list(self._tools)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as the chat template and the OpenAI interface take them."""
        return [
            {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters}}
            for tool in self._tools.values()
        ]

    def calls(self, reply: str | Sequence[int], tokenizer: Any = None) -> list[ToolCall]:
        """The calls in a reply, in their order; [] when it has none. Token ids need the tokenizer that made them.

        A call that cannot be read or does not fit its tool is among them, with its `error`. A last call without its closing tag
        counts when its JSON is whole.
        """
        if not isinstance(reply, str):
            if tokenizer is None:
                raise ValueError("calls of token ids need the tokenizer: calls(ids, tokenizer)")
            reply = b"".join(tokenizer.token_bytes(token) for token in reply).decode("utf-8", "replace")
        blocks = (match.group(1) for match in _BLOCK.finditer(spoken(reply)[1]))
        return [self._read(block, f"call_{number}") for number, block in enumerate(blocks, start=1)]

    def _read(self, block: str, number: str) -> ToolCall:
        try:
            found = read_object(block)
        except JsonTextError as error:
            return ToolCall("", {}, number, f"the call is not valid JSON: {error}; write {_FORM}")
        name = found.get("name")
        given = found.get("arguments", found.get("parameters", {}))
        if not isinstance(name, str):
            return ToolCall("", {}, number, f"the call has no name; write {_FORM}")
        if isinstance(given, str):  # as in the OpenAI interface
            try:
                given = read_object(given or "{}")
            except JsonTextError as error:
                return ToolCall(name, {}, number, f"the arguments are not valid JSON: {error}")
        if not isinstance(given, dict):
            return ToolCall(name, {}, number, f"the arguments must be an object; write {_FORM}")
        return self.checked(ToolCall(name, given, number))

    def checked(self, call: ToolCall) -> ToolCall:
        """The call, with an error when there is no such tool or its arguments do not fit."""
        tool = self._tools.get(call.name)
        if tool is None:
            close = difflib.get_close_matches(call.name, self._tools, n=1)
            nearest = f" (did you mean {close[0]}?)" if close else ""
            error = f"there is no tool {call.name!r:.80}{nearest}; known: {', '.join(self._tools) or 'none'}"
        else:
            error = "; ".join(problems(call.arguments, tool.parameters))
            if error:
                error += f". The parameters of {tool.name} are {_json(tool.parameters)}"
        return ToolCall(call.name, call.arguments, call.id, error)

    def run(self, call: ToolCall) -> str:
        """The result as JSON or text, cut to `most_characters`; a mistake or a failure as "error: ...". Never raises one."""
        started = time.perf_counter()
        error = call.error or self.checked(call).error
        result, failed = (f"error: {error}", True) if error else self._run(self._tools[call.name], call.arguments)
        if len(result) > self.most_characters:
            kept = self.most_characters - 60
            result = f"{result[:kept]}\n(cut off: {len(result) - kept} of {len(result)} characters left out)"
        # A result must not end its own turn in the rendered conversation.
        result = re.sub(r"<(/?tool_response)", r"< \1", result)
        self.records.append(
            {
                "time": datetime.now().astimezone().isoformat(timespec="seconds"),
                "name": call.name,
                "arguments": call.arguments,
                "result": result,
                "failed": failed,
                "seconds": round(time.perf_counter() - started, 6),
            }
        )
        return result

    def _run(self, tool: Tool, arguments: dict[str, Any]) -> tuple[str, bool]:
        """The result as text, and whether it is a failure."""
        outcome: list[tuple[str, bool]] = []

        def work() -> None:
            try:
                value = tool.run(**arguments)
                outcome.append((value if isinstance(value, str) else _json(value), False))
            except (ValueError, OSError) as error:  # a mistake in the arguments: its message is for the model
                outcome.append((f"error: {error}", True))
            except Exception as error:  # noqa: BLE001 - a tool of someone else must not end the conversation
                outcome.append((f"error: {tool.name} failed: {type(error).__name__}: {error}", True))

        if tool.seconds is None:
            work()
        else:
            thread = threading.Thread(target=work, name=f"tool {tool.name}", daemon=True)
            thread.start()
            thread.join(tool.seconds)
        return outcome[0] if outcome else (f"error: {tool.name} gave no answer within {tool.seconds:g} seconds", True)


def spoken(text: str) -> tuple[str, str]:
    """What a reply says to the user, and its calls: (before the first <tool_call>, from there on), without thinking, which may
    mention calls."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    at = text.find(OPEN)
    return (text, "") if at < 0 else (text[:at].rstrip(), text[at:])


def default_tools(memory: Any = None, files: Any = None) -> Toolbox:
    """calculator and clock; with a ConversationMemory its search; with a FileAssistant the files of its folder."""
    tools = [
        Tool(
            "calculator", "Work out an arithmetic expression exactly", _one_text("expression", "such as (1 + 2) * 3.5 or 12.5% * 640"), _sum
        ),
        Tool("clock", "The date and time now; add to a date, days between dates, other time zones", CLOCK_PARAMETERS, clock),
    ]
    if memory is not None:

        def search(query: str) -> str:
            found = memory.retrieve(query)
            return "\n".join(f"- {entry.role}: {entry.text}" for entry in found) or "nothing about this was remembered"

        description = "Search what the user said in earlier conversations"
        tools.append(Tool("memory_search", description, _one_text("query", "what to look for"), search, seconds=None))
    if files is not None:
        tools.append(Tool("files", files.description, FILE_PARAMETERS, files.run, seconds=None))
    return Toolbox(tools)


def _one_text(name: str, description: str) -> dict[str, Any]:
    text = {"type": "string", "description": description, "minLength": 1, "maxLength": 500}
    return {"type": "object", "properties": {name: text}, "required": [name], "additionalProperties": False}


def _sum(expression: str) -> str:
    value = calculate(expression)
    if 10**MOST_PLACES % value.denominator:  # no end to its decimals
        return f"{value} (about {float(value):.10g})"
    return write_number(value, most_places=MOST_PLACES)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_FORM = f'{OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}'
