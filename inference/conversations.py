"""Conversations in files: the messages, the settings and what was on, as one JSON object that is a row for the SFT stage as well."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.sampling import SamplingSettings
from model.files import atomic_write_text

ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Conversation:
    """What a file holds. Files written before settings were kept have messages only."""

    messages: list[dict[str, Any]]
    settings: SamplingSettings | None = None
    on: dict[str, Any] = field(default_factory=dict)


def check_messages(messages: Any) -> None:
    """Raises ValueError naming the first entry that is no message."""
    if not isinstance(messages, list):
        raise ValueError(f"a conversation is a list of messages, got {type(messages).__name__}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} needs a role, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} ({message['role']}) needs a content text")


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
        if settings is not None:
            known = {entry.name for entry in dataclasses.fields(SamplingSettings)}
            settings = SamplingSettings(**{name: value for name, value in settings.items() if name in known})
        return Conversation(stored["messages"], settings, dict(on))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a saved conversation: {error}") from error


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Raises ValueError when the file exists and is no conversation: it is not overwritten."""
    if path.exists():
        read_conversation(path)
    entries = dataclasses.asdict(dataclasses.replace(conversation.settings or SamplingSettings(), grammar=None))
    stored = {"messages": conversation.messages, "settings": entries, "on": conversation.on}
    atomic_write_text(path, json.dumps(stored, ensure_ascii=False, indent=2) + "\n")
