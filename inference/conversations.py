"""Conversations in files: the messages, the settings and what was on, as one JSON object that is a row for the SFT stage as well."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.json_schema import problems
from inference.reply import Reasoning
from inference.sampling import SamplingSettings
from model.files import atomic_write_text

ROLES = ("system", "user", "assistant", "tool")
_ON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "thinking": {"type": ["boolean", "null"]},
        "memory": {"type": "boolean"},
        "template": {"type": ["string", "null"]},
        "tools": {"type": "boolean"},
        "reasoning": {
            "type": ["object", "null"],
            "properties": {
                "votes": {"type": "integer", "minimum": 1},
                "budget": {"type": ["integer", "null"], "minimum": 1},
                "calculator": {"type": "boolean"},
            },
        },
    },
}


@dataclass
class Conversation:
    """What a file holds. Files written before settings were kept have messages only."""

    messages: list[dict[str, Any]]
    settings: SamplingSettings | None = None
    on: dict[str, Any] = field(default_factory=dict)
    """thinking, memory, template, tools, reasoning (a `Reasoning`, or None): what was on."""


def check_messages(messages: Any) -> None:
    """Raises ValueError naming the first entry that is no message."""
    if not isinstance(messages, list):
        raise ValueError(f"a conversation is a list of messages, got {type(messages).__name__}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} needs a role, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} ({message['role']}) needs a content text")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"message {number} is a system text; only the first message may be one")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls):
            raise ValueError(f'message {number}: tool_calls is a list of {{"function": {{"name", "arguments"}}}}')


def read_conversation(path: Path) -> Conversation:
    """Raises FileNotFoundError, or ValueError saying why the file is no conversation. Settings of a later version are left out."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not a saved conversation: {error}") from error
    if not isinstance(stored, dict) or "messages" not in stored:
        raise ValueError(f"{path} is not a saved conversation: it has no messages")
    try:
        check_messages(stored["messages"])
        settings, on = stored.get("settings"), stored.get("on") or {}
        if wrong := problems(on, _ON, "on"):
            raise ValueError("; ".join(wrong))
        if settings is not None:
            settings = _made(SamplingSettings, settings)
        if on.get("reasoning"):
            on = {**on, "reasoning": _made(Reasoning, on["reasoning"])}
        return Conversation(stored["messages"], settings, on)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a saved conversation: {error}") from error


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Raises ValueError when the file exists and is no conversation: it is not overwritten."""
    if path.exists():
        read_conversation(path)
    entries = dataclasses.asdict(dataclasses.replace(conversation.settings or SamplingSettings(), grammar=None))
    reasoning = conversation.on.get("reasoning")
    on = {**conversation.on, "reasoning": None if reasoning is None else dataclasses.asdict(reasoning)}
    stored = {"messages": conversation.messages, "settings": entries, "on": on}
    atomic_write_text(path, json.dumps(stored, ensure_ascii=False, indent=2) + "\n")


def _made(kind: Any, stored: dict[str, Any]) -> Any:
    """An object of a data class, without the fields that this version does not know."""
    known = {entry.name for entry in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in stored.items() if name in known})
