"""Which part of a conversation the model is shown: all of it, or as many of the newest turns as its context holds."""

from __future__ import annotations

from typing import Any

from inference.rendering import render_prompt

SMALLEST_ROOM = 16
"""Tokens that are kept for the answer to a message that alone nearly fills the context."""


def fit_prompt(
    tokenizer: Any,
    system: list[dict[str, Any]],
    messages: list[dict[str, Any]],
    dropped: int,
    context: int,
    room: int,
    thinking: bool | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> tuple[int, list[dict[str, Any]], list[int]]:
    """How many of the oldest turns (at least `dropped`) must go to leave `room` tokens for an answer; the messages that remain, the
    system's among them, and their ids. A turn begins with a user's message. Raises ValueError when the last turn alone is too long.
    """
    room = min(room, context // 2)
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    ids: list[int] = []
    for number in range(min(dropped, len(starts) - 1), len(starts)):
        shown = [*system, *messages[starts[number] if number else 0 :]]
        ids = render_prompt(tokenizer, shown, thinking, tools)
        last_turn = number == len(starts) - 1
        if len(ids) + (min(room, SMALLEST_ROOM) if last_turn else room) <= context:
            return number, shown, ids
    what = " and the tools" if tools else ""
    remedy = "shorten it, or switch the tools off" if tools else "shorten it"
    raise ValueError(
        f"the message is too long: with the system text{what} it has {len(ids)} tokens, the model's context holds "
        f"{context} and {min(room, SMALLEST_ROOM)} are kept for the answer; {remedy}"
    )
