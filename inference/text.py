"""From generated token ids to text that may be shown: whole characters, no stop strings, thinking kept apart."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Literal

Channel = Literal["reasoning", "answer"]
Segment = tuple[Channel, str]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def special_id(tokenizer: Any, name: str) -> int | None:
    """The id of a special token, or None when the tokenizer has no such token."""
    found = tokenizer.token_id(name)
    return None if found is None else int(found)


def starts_in_reasoning(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt (token ids) ends inside an open <think>, so that the reply begins with thinking."""
    opened = special_id(tokenizer, THINK_OPEN)
    if opened is None:
        return False
    edges = {special_id(tokenizer, THINK_CLOSE), special_id(tokenizer, "<|im_start|>"), *tokenizer.stop_ids}
    for token in reversed(prompt):
        if token in edges:
            return False
        if token == opened:
            return True
    return False


class ReplyText:
    """Turns the tokens of one reply into segments (channel, text) as early as they are certain.

    A character is held back until all its bytes are there, and the end of the answer as long as it may be the beginning
    of a stop string. Bytes that can never become a character show as U+FFFD; a character cut off by the end is dropped, and so
    is the space that a SentencePiece tokenizer writes before the first word.
    Stop strings are looked for in the answer, not in the thinking.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), reasoning: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._opened, self._closed = special_id(tokenizer, THINK_OPEN), special_id(tokenizer, THINK_CLOSE)
        self._vocab_size, self._hidden = tokenizer.vocab_size, tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.in_reasoning = reasoning
        """Whether the reply is inside its thinking at the moment."""
        self._pending = ""  # answer text that may be the beginning of a stop string
        self._line_ends = ""  # line ends of the thinking that are dropped if the thinking ends here
        self._skip_line_ends = reasoning  # at the beginning of the thinking, and of the answer after it
        self._skip_space = tokenizer.drops_first_space
        self._parts: dict[Channel, list[str]] = {"reasoning": [], "answer": []}
        self.stopped = False
        """True once a stop string was found; later tokens are ignored."""

    @property
    def channel(self) -> Channel:
        return "reasoning" if self.in_reasoning else "answer"

    @property
    def text(self) -> str:
        """The answer so far, as far as it is certain."""
        return "".join(self._parts["answer"])

    @property
    def reasoning(self) -> str:
        """The thinking so far."""
        return "".join(self._parts["reasoning"])

    def push(self, token: int) -> list[Segment]:
        """Take one token; returns what became certain by it (often one segment, sometimes none)."""
        if self.stopped:
            return []
        if token == self._opened or token == self._closed:
            return self._switch(reasoning=token == self._opened)
        # A model's vocabulary may be larger than its tokenizer's; the surplus ids stand for nothing.
        if token in self._hidden or token >= self._vocab_size:
            return []
        return self._take(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> list[Segment]:
        """The reply is over: release what was held back."""
        self._decoder.reset()
        pending, self._pending = self._pending, ""
        return self._emit("answer", pending)

    def _switch(self, reasoning: bool) -> list[Segment]:
        segments = self.finish()
        self.in_reasoning = reasoning
        self._skip_line_ends = True
        self._skip_space = self._tokenizer.drops_first_space
        self._line_ends = ""
        return segments

    def _take(self, text: str) -> list[Segment]:
        if self._skip_space and text:
            text = text.removeprefix(" ")
            self._skip_space = False
        if self._skip_line_ends:
            text = text.lstrip("\n")
            self._skip_line_ends = not text
        if not text:
            return []
        if self.in_reasoning:
            text = self._line_ends + text
            shown = text.rstrip("\n")
            self._line_ends = text[len(shown) :]
            return self._emit("reasoning", shown)
        self._pending += text
        found = [at for at in (self._pending.find(stop) for stop in self._stop) if at >= 0]
        if found:
            shown, self._pending, self.stopped = self._pending[: min(found)], "", True
        else:
            held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
            shown = self._pending[: len(self._pending) - held]
            self._pending = self._pending[len(shown) :]
        return self._emit("answer", shown)

    def _emit(self, channel: Channel, text: str) -> list[Segment]:
        if not text:
            return []
        self._parts[channel].append(text)
        return [(channel, text)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (but not all of it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def visible_length(text: str, mark: str, ended: bool) -> int:
    """How much of a growing text may be shown when nothing from `mark` on may: all that cannot be its beginning."""
    at = text.find(mark)
    return at if at >= 0 else len(text) - (0 if ended else _overlap(text, mark))
