"""The rounds of an answer with tools: reply, calls, results, and again, until the model answers.

new = answer_with_tools(generate, [{"role": "user", "content": "What is 12.5% of 640?"}], default_tools())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from inference.reply import Event
from inference.toolbox import Toolbox, spoken

TOOL_ROUNDS = 4
MOST_CALLS = 8
"""Calls of one reply that are run."""
LIMIT_TEXT = "error: no more tool calls are possible now; answer with what you know"

Message = dict[str, Any]


class Said(Protocol):
    """What a model replied; `inference.reply.Reply` is one."""

    text: str
    reasoning: str


def answer_with_tools(
    generate: Callable[[list[Message]], Said], messages: Sequence[Mapping[str, Any]], toolbox: Toolbox, max_rounds: int = TOOL_ROUNDS
) -> list[Message]:
    """Let a model call tools until it answers; the messages that this adds, the last of them its answer.

    generate: the model's reply to a conversation rendered with `toolbox.schemas()`. Raises ValueError for max_rounds below 0, and
    whatever `generate` raises.
    """
    if max_rounds < 0:
        raise ValueError(f"max_rounds={max_rounds} must be 0 (no calls) or more")
    conversation = [dict(message) for message in messages]

    def one_reply(message: Message) -> Generator[Event, None, str]:
        reply = generate(list(conversation))
        message["content"] = spoken(reply.text)[0]
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        conversation.append(message)
        yield "answer", message["content"]
        return reply.text

    for _ in with_tools(one_reply, conversation, lambda: toolbox, max_rounds):
        pass
    return conversation[len(messages) :]


def with_tools(
    one_reply: Callable[[Message], Generator[Event, None, str]],
    messages: list[Message],
    toolbox: Callable[[], Toolbox | None],
    rounds: int = TOOL_ROUNDS,
) -> Iterator[Event]:
    """one_reply(message): streams the model's reply to `messages`, to which it adds `message`, and returns all that was written, calls
    included. toolbox(): the tools that are on, None for none. Calls become `tool_calls` of their message, results messages of the role
    "tool". One reply's calls beyond MOST_CALLS are not run. After `rounds` rounds the model is told to answer; calls in the reply to
    that are left out.
    """
    made = 0
    for round_ in range(rounds + 2):
        message: Message = {"role": "assistant", "content": ""}
        written = yield from one_reply(message)
        tools = toolbox()
        calls = [] if tools is None else tools.calls(written)
        if tools is None or not calls or round_ > rounds:
            return
        message["content"] = spoken(written)[0]
        if message["content"]:
            yield "answer", "\n\n"  # what is said next is a paragraph of its own
        if any(call.error and not call.name for call in calls):
            message["content"] = written  # what was no call stays as it was written, so that the error makes sense
        else:
            message["tool_calls"] = [
                {"id": f"call_{made + n}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for n, call in enumerate(calls, start=1)
            ]
        for index, call in enumerate(calls):
            made += 1
            result = LIMIT_TEXT if round_ == rounds or index >= MOST_CALLS else tools.run(call)
            messages.append({"role": "tool", "tool_call_id": f"call_{made}", "name": call.name, "content": result})
            yield "tool", f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)}) → {result}"
