"""One answer with tools, told as it comes: reply, calls, results, and again, until the model answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

from inference.reply import Event
from inference.toolbox import LIMIT_TEXT, MOST_CALLS, Toolbox, spoken

TOOL_ROUNDS = 4

Message = dict[str, Any]


def with_tools(
    one_reply: Callable[[Message], Generator[Event, None, str]],
    messages: list[Message],
    toolbox: Callable[[], Toolbox | None],
    rounds: int = TOOL_ROUNDS,
) -> Iterator[Event]:
    """one_reply(message): streams the model's reply to `messages`, to which it adds `message`, and returns all that was written, calls
    included. toolbox(): the tools that are on, None for none. Calls become `tool_calls` of their message, results messages of the role
    "tool". After `rounds` rounds the model is told to answer; calls in the reply to that are left out.
    """
    made = 0
    for round_ in range(rounds + 2):
        message: Message = {"role": "assistant", "content": ""}
        written = yield from one_reply(message)
        tools = toolbox()
        calls = [] if tools is None else tools.calls(written)
        if tools is None or not calls or round_ > rounds:
            return
        if any(call.error and not call.name for call in calls):
            message["content"] = written  # what was no call stays as it was written, so that the error makes sense
        else:
            message["content"] = spoken(written)[0]
            message["tool_calls"] = [
                {"id": f"call_{made + n}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for n, call in enumerate(calls, start=1)
            ]
        for index, call in enumerate(calls):
            made += 1
            result = LIMIT_TEXT if round_ == rounds or index >= MOST_CALLS else tools.run(call)
            messages.append({"role": "tool", "tool_call_id": f"call_{made}", "name": call.name, "content": result})
            yield "tool", f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)}) → {result}"
