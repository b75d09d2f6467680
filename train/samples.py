"""What a row of data can be, and as what each kind serves: a text, a conversation, a preference pair.

`train.formats` makes samples of rows; its users import the names from there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from train.turns import Message, RowError


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns with at least one user and one assistant turn; `tools` are the descriptions offered to the assistant. thinking=False: the
    last question was asked with the thinking closed."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool | None = None


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, which ends with a user or tool turn; both begin with the assistant. margin: by how much the
    chosen one is better, 0 when the row does not say. thinking: as in `Conversation`."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    margin: float = 0.0
    thinking: bool | None = None


@dataclass(frozen=True)
class Judged:
    """One answer to a prompt with a verdict: True is wanted, False unwanted. Roles as in `Preference`."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[dict[str, Any]] | None = None
    thinking: bool | None = None


Sample = Text | Conversation | Preference | Judged


def as_text(sample: Sample) -> str:
    """A sample as text for pretraining and the tokenizer: reasoning and contents of its turns, joined by line ends.

    Of a preference the chosen side. Raises RowError for an answer that was judged unwanted.
    """
    if isinstance(sample, Text):
        return sample.text
    parts = []
    for message in as_conversation(sample).messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
        parts += [part for part in (message.get("reasoning_content", ""), message["content"], *calls) if part.strip()]
    return "\n".join(parts)


def as_conversation(sample: Sample) -> Conversation:
    """A sample as a conversation to learn from: itself, a preference's chosen side, or an answer judged wanted.

    Raises RowError for plain text (it has no turns) and for an answer that was judged unwanted.
    """
    if isinstance(sample, Conversation):
        return sample
    if isinstance(sample, Preference):
        return Conversation(sample.prompt + sample.chosen, sample.tools, sample.thinking)
    if isinstance(sample, Judged):
        if not sample.label:
            raise RowError("an answer judged unwanted (label false) is no example to learn from")
        return Conversation(sample.prompt + sample.completion, sample.tools, sample.thinking)
    raise RowError("plain text has no turns: expected a conversation such as {conversations} or {prompt, response}")


def as_preference(sample: Sample) -> Preference:
    """A sample as a preference pair. Raises RowError for every other kind."""
    if isinstance(sample, Preference):
        return sample
    raise RowError(f"expected a pair {{prompt, chosen, rejected}}, found a {type(sample).__name__.lower()} row")
