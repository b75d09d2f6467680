"""Turns of a conversation, as any data set writes them, into one shape; every fault is a RowError that names the field.

Used by `train.formats`, which knows what whole rows mean.
"""

from __future__ import annotations

import json
import re
from typing import Any

Message = dict[str, Any]
"""{"role": system|user|assistant|tool, "content": str, "reasoning_content"?: str, "tool_calls"?: list}"""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

# A lone surrogate cannot be written as UTF-8. Structural tokens in a text are fine: texts are encoded with all of them as plain
# characters, and `BPETokenizer.render` keeps those of a message apart from the template's own.
_FORBIDDEN = re.compile("[\ud800-\udfff]")
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_SECTIONS = re.compile(r"【推理过程】(.*?)\n\s*【最终答案】(.*)", re.DOTALL)


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without file and line."""


def read_side(value: Any, field: str, role: str) -> list[Message]:
    """A prompt or an answer: a string, one turn, or a list of turns."""
    if isinstance(value, str):
        return [assistant_turn(value, field) if role == "assistant" else plain_turn(role, value, field)]
    return read_messages([value] if isinstance(value, dict) else value, field)


def read_messages(turns: Any, field: str) -> list[Message]:
    """A list of turns ({role, content} or {from, value}); empty system turns are left out."""
    if not isinstance(turns, list):
        raise RowError(f"{field} is {kind_of(turns)}, expected a list of turns")
    messages = [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if not messages:
        raise RowError(f"{field} is empty")
    return messages


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {kind_of(turn)}, expected an object with role and content")
    name = turn.get("role", turn.get("from"))
    if name is None:
        raise RowError(f"{where} has no role (its fields: {', '.join(sorted(map(str, turn))) or 'none'})")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{where}: unknown role {name!r}; known are system, user, assistant, tool (or human, gpt, observation)")
    content_field = f"{where}.{'value' if 'value' in turn and 'content' not in turn else 'content'}"
    content = turn.get("content", turn.get("value"))
    if name.lower() == "function_call":
        return assistant_turn(None, content_field, calls=content)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role == "assistant":
        reasoning_name = next((key for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)), "reasoning_content")
        return assistant_turn(content, content_field, turn.get(reasoning_name), f"{where}.{reasoning_name}", calls)
    if calls:
        raise RowError(f"{where}: tool_calls in a {role} turn, expected only in assistant turns")
    return plain_turn(role, content, content_field)


def plain_turn(role: str, content: Any, where: str) -> Message:
    """A system, user or tool turn; a tool may return nothing."""
    return {"role": role, "content": checked_text(content, where, may_be_empty=role in ("system", "tool"))}


def assistant_turn(
    content: Any, where: str, reasoning: Any = None, reasoning_field: str = "reasoning_content", calls: Any = None
) -> Message:
    """An assistant turn; reasoning and tool calls written into the content are taken out of it."""
    said = "" if content is None and calls else checked_text(content, where, may_be_empty=True)
    thought = "" if reasoning is None else checked_text(reasoning, reasoning_field, may_be_empty=True)
    inner, said = _split_thinking(said, where)
    if inner.strip() and thought.strip():
        raise RowError(f"{where} holds a <think> block and {reasoning_field} is given too: keep one")
    tool_calls = _tool_calls(calls, where.removesuffix(".content") + ".tool_calls") if calls else []
    if "<tool_call>" in said:
        tool_calls += [call for text in _TOOL_CALL.findall(said) for call in _tool_calls(text, where)]
        said = _TOOL_CALL.sub("", said).strip()
        if "<tool_call>" in said:
            raise RowError(f"{where} opens <tool_call> and never closes it")
    if not said.strip() and not tool_calls:
        raise RowError(f"{where} is empty" + (" (there is reasoning but no answer)" if (inner or thought).strip() else ""))
    message: Message = {"role": "assistant", "content": said}
    if (inner or thought).strip():
        message["reasoning_content"] = (inner or thought).strip()
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message


def _split_thinking(content: str, where: str) -> tuple[str, str]:
    """`<think>a</think><answer>b</answer>` -> (a, b); also without <answer>, or without the opening <think> that some
    templates supply, or under the headings 【推理过程】 and 【最终答案】. Anything else comes back untouched as the answer."""
    text = content.strip()
    if sections := _SECTIONS.fullmatch(text):
        return sections[1].strip(), sections[2].strip()
    opened, closed = "<think>" in text, "</think>" in text
    if not opened and not closed and not text.startswith("<answer>"):
        return "", content
    if opened and not text.startswith("<think>"):
        raise RowError(f"{where} has text before <think>: reasoning has to come first")
    if opened and not closed:
        raise RowError(f"{where} opens <think> and never closes it")
    thought, answer = text.removeprefix("<think>").split("</think>", 1) if closed else ("", text)
    answer = answer.strip()
    if answer.startswith("<answer>"):
        if not answer.endswith("</answer>"):
            raise RowError(f"{where} opens <answer> and does not end with </answer>")
        answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
    return thought.strip(), answer


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """[{"type": "function", "function": {"name", "arguments": object}}] from a list, a call, or JSON text of either."""
    calls = parsed_json(value, where, strict=True)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise RowError(f"{where} is {kind_of(calls)}, expected a list of tool calls")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"{where}: a tool call needs a name and arguments")
        arguments = parsed_json(function.get("arguments") or {}, f"{where}: arguments of {function['name']}", strict=True)
        if not isinstance(arguments, dict):
            raise RowError(f"{where}: arguments of {function['name']} are {kind_of(arguments)}, expected an object")
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        _check_plain_json(entry, where)
        found.append(entry)
    return found


def read_tools(value: Any, where: str = "tools") -> list[dict[str, Any]] | None:
    """Tool descriptions from a list of objects or its JSON text; None when there are none."""
    if value is None or value == "" or value == []:
        return None
    tools = parsed_json(value, where, strict=True)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{where} is {kind_of(tools)}, expected a list of objects")
    _check_plain_json(tools, where)
    return tools or None


def checked_text(value: Any, where: str, may_be_empty: bool = False) -> str:
    """Text, or OpenAI's list of text parts joined."""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text") else part
            if not isinstance(text, str):
                kind = f"of type {part.get('type')!r}" if isinstance(part, dict) else kind_of(part)
                raise RowError(f"{where}[{index}] is {kind}, expected a text part")
            parts.append(text)
        value = "".join(parts)
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind_of(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise RowError(f"{where} is empty")
    _check_plain(value, where)
    return value


def _check_plain(text: str, where: str) -> None:
    if _FORBIDDEN.search(text):
        raise RowError(f"{where} contains half a character (a lone UTF-16 surrogate)")


def _check_plain_json(value: Any, where: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # dates and bytes of a table, nesting without end
        raise RowError(f"{where} cannot be written as JSON ({error})") from error
    _check_plain(text, where)


def parsed_json(value: Any, where: str, strict: bool = False) -> Any:
    """JSON text -> value (CSV cells, tool arguments). Other text is an error if strict, else returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        if strict:
            raise RowError(f"{where} is not valid JSON ({error})") from error
        return value


def kind_of(value: Any) -> str:
    """The type of a JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
