"""From a conversation to the token ids that a reply follows: the one way for sessions, reasoning and measurements."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from inference.text import THINK_CLOSE, THINK_OPEN, special_id, starts_in_reasoning

DEFAULT_CLOSE = f"\n{THINK_CLOSE}\n\n"


def render_prompt(
    tokenizer: Any, messages: Sequence[dict[str, Any]], thinking: bool | None = None, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Ids of a conversation, ready for the assistant's turn. thinking: True opens it, False skips it, None leaves it to the model.

    Raises ValueError for a conversation that the chat template refuses, and when thinking is asked of a model that has no token for it.
    """
    ids = list(tokenizer.render(list(messages), tools=tools, add_generation_prompt=True, enable_thinking=thinking).ids)
    if not thinking:
        return ids
    if special_id(tokenizer, THINK_OPEN) is None:
        raise ValueError(
            f"thinking was asked for, but this model's vocabulary has no {THINK_OPEN} token: it was not trained to think apart; "
            "leave the thinking to the model (None, in the chat auto) or switch it off"
        )
    if starts_in_reasoning(tokenizer, ids):  # some templates open the thinking themselves
        return ids
    return [*ids, *tokenizer.encode(THINK_OPEN + "\n", parse_special=True)]


def thinking_end(tokenizer: Any) -> str:
    """What the chat template writes between a thought and the answer after it, for most "\\n</think>\\n\\n"."""
    thought, said = (f"words{secrets.token_hex(8)}" for _ in range(2))
    messages = [{"role": "user", "content": "words"}, {"role": "assistant", "reasoning_content": thought, "content": said}]
    try:
        text: str = tokenizer.render(messages).text
    except ValueError:  # a template that refuses the smallest conversation
        return DEFAULT_CLOSE
    between = text.partition(thought)[2].partition(said)[0]
    return between if THINK_CLOSE in between and len(between) < 2 * len(DEFAULT_CLOSE) else DEFAULT_CLOSE
