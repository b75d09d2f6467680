"""What an answer was and what it took, and the events by which it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Event = tuple[Literal["reasoning", "answer", "tool"], str]


@dataclass
class Reply:
    """The last answer and what it took."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = "interrupted"
    """"stop", "length" (max_new_tokens or the context is used up), or "interrupted"."""
    prompt_tokens: int = 0
    """Of the last prompt, where tools made several."""
    completion_tokens: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    """Until the first token."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were still there from the turn before."""
    reasoning_steps: int = 0
    """Steps of the reasoning head that the reply took, over all its tokens, where halting is on; 0 where it is not."""
    template: str = ""
    reason: str = ""
    """The template that was used, and why."""
    confidence: float | None = None
    votes: dict[str, int] = field(default_factory=dict)
    """What several lines of reasoning came to, where votes were asked for."""

    @property
    def tokens_per_second(self) -> float:
        """From the question to the last token."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


@dataclass
class Reasoning:
    """How an answer is thought over: how many lines of thought vote (above 1 the answer comes whole), the most tokens of one (None: as
    many as an answer may have), and whether the calculator works out sums in it."""

    votes: int = 1
    budget: int | None = None
    calculator: bool = True
