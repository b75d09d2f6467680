"""Where the assistant speaks in the text of a chat template that does not say so itself.

The conversation is rendered twice: as it is, and with unguessable marks around what the assistant says. Without the marks both
must be the same text. An assistant's turn then reaches from the end of its generation prompt (the rendering of the messages
before it, where the text begins with that; else from the first mark that survived) through the first stop token behind its
last mark. What cannot be told with certainty is a ValueError that names the message: never a mask that is silently wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from model.chat_template import unguessable

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
"""render(messages, add_generation_prompt) -> text"""

_THINK_OPEN = re.compile(r"<think>\s*")
_THINK_CLOSE = re.compile(r"</think>\s*")
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_ZERO = 0xE200  # the digit 0 in a mark
REMEDY = "leave the row out, or mark the assistant's words in chat_template.jinja with {% generation %} ... {% endgeneration %}"


def assistant_spans(render: Render, messages: list[Message], learn: set[int], stop: re.Pattern[str]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and the (start, end) of the turns in `learn` (indices of assistant messages) in it, in order.

    stop: finds the tokens that end a turn as its group 1. Raises ValueError for a conversation whose spans are not certain.
    """
    text = render(messages, False)
    learned = sorted(learn)
    if not learned:
        return text, []
    marks = _Marks()
    marked = render([marks.put(m, i) if i in learn else m for i, m in enumerate(messages)], False)
    clean, found = marks.take(marked)
    if clean != text:
        raise ValueError(f"the chat template rewrites what {_culprit(render, messages, learned, text)} says; {REMEDY}")
    spans: list[tuple[int, int]] = []
    for i in learned:
        start, last = _begin(render, messages, i, text, found), max((at for at, _, n in found if n == i), default=0)
        end = _end(render, messages, i, text, last, stop)
        if spans and start < spans[-1][1]:
            raise ValueError(f"the chat template does not keep {_name(i)} apart from the turn before it; {REMEDY}")
        spans.append((start, end))
    return text, spans


def with_thinking(message: Message) -> Message:
    """The message with its reasoning in the content, for a template that knows thinking only there; else it would not be learned."""
    thought, content = message.get("reasoning_content"), message.get("content")
    if not isinstance(thought, str) or not thought.strip() or not isinstance(content, str | None):
        return message
    return {**message, "content": f"<think>\n{thought.strip()}\n</think>\n\n{content or ''}"}


class _Marks:
    """Marks to put into messages and to find again, each with its number in letters as unlikely to be changed as the rest."""

    def __init__(self) -> None:
        self.secret = unguessable("\ufdd2", "\ufdd3")
        self.kinds: list[tuple[str, int]] = []

    def _new(self, kind: str, message: int) -> str:
        self.kinds.append((kind, message))
        return self.secret + "".join(chr(_ZERO + int(digit)) for digit in str(len(self.kinds) - 1)) + "\ufdd3"

    def put(self, message: Message, number: int) -> Message:
        """A copy with marks inside the whitespace around its texts, which templates like to strip."""
        copy = dict(message)
        for field in ("reasoning_content", "content"):
            if isinstance(message.get(field), str) and message[field].strip():
                copy[field] = self._around(message[field], number)
        if message.get("tool_calls"):
            copy["tool_calls"] = [self._call(call, number) for call in message["tool_calls"]]
        return copy

    def _around(self, text: str, number: int) -> str:
        """Marks at both ends, and again behind thinking tags: templates cut there. None stands before a tag that opens the text."""
        core = text.strip()
        first = text.index(core[0])
        opened, closed = _THINK_OPEN.match(text, first, first + len(core)), _THINK_CLOSE.search(text)
        cuts = [("begin", opened.end() if opened else first)]
        if closed and closed.end() < first + len(core):
            if not text[cuts[0][1] : closed.start()].strip():
                cuts = []  # empty thinking stays empty
            cuts.append(("begin", closed.end()))
        cuts.append(("end", first + len(core)))
        pieces, before = [], 0
        for kind, at in cuts:
            pieces += [text[before:at], self._new(kind, number)]
            before = at
        return "".join(pieces) + text[before:]

    def _call(self, call: Any, number: int) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return call
        named = {**function, "name": self._new("call", number) + function["name"] + self._new("end", number)}
        return {**call, "function": named} if "function" in call else named

    def take(self, text: str) -> tuple[str, list[tuple[int, str, int]]]:
        """The text without marks, and (position in it, kind, message) of each. ValueError when one stands there twice."""
        parts = re.split(f"{self.secret}([{chr(_ZERO)}-{chr(_ZERO + 9)}]+)\ufdd3", text)
        found, length, seen = [], len(parts[0]), set()
        for digits, following in zip(parts[1::2], parts[2::2], strict=True):
            serial = int("".join(str(ord(letter) - _ZERO) for letter in digits))
            kind, message = self.kinds[serial]
            if serial in seen:
                raise ValueError(f"the chat template writes {_name(message)} more than once; {REMEDY}")
            seen.add(serial)
            found.append((length, kind, message))
            length += len(following)
        return "".join(parts[::2]), found


def _begin(render: Render, messages: list[Message], i: int, text: str, found: list[tuple[int, str, int]]) -> int:
    own = [(at, kind) for at, kind, message in found if message == i]
    begins = [(at, kind) for at, kind in own if kind != "end"]
    if not begins or len(own) == len(begins) or begins[0][0] > own[-1][0]:
        what = "its tool calls" if messages[i].get("tool_calls") else "what it says"
        raise ValueError(f"the chat template leaves out {_name(i)} or {what}, so that nothing of it can be learned; {REMEDY}")
    at, kind = begins[0]
    if i > 0:
        try:
            prompt = render(messages[:i], True)
        except ValueError:  # some templates refuse a conversation that is cut there
            prompt = ""
        if prompt and len(prompt) <= at and text.startswith(prompt):
            return len(prompt)
    if kind == "call":
        raise ValueError(f"the chat template does not show where {_name(i)}, a tool call, begins; {REMEDY}")
    opened = _OPENED.search(text, 0, at)
    return opened.start() if opened else at


def _end(render: Render, messages: list[Message], i: int, text: str, last: int, stop: re.Pattern[str]) -> int:
    match = next((match for match in stop.finditer(text, last) if match.group(1)), None)
    if match is not None and text[last : match.start()].strip() and i + 1 < len(messages):
        # Arguments of a tool call may follow the last mark, the words of the next message may not.
        try:
            ended = render(messages[: i + 1], False)
        except ValueError:
            ended = ""
        content = messages[i + 1].get("content")
        following = content.strip() if isinstance(content, str) else ""
        within = text.startswith(ended) and match.end() <= len(ended)
        match = match if within or (following and following not in text[last : match.start()]) else None
    if match is None:
        raise ValueError(
            f"the chat template writes no stop token behind {_name(i)}, so that the model could not learn to stop; "
            "write {{ eos_token }} behind the assistant's words in chat_template.jinja"
        )
    return match.end()


def _culprit(render: Render, messages: list[Message], learned: list[int], text: str) -> str:
    for i in learned:
        marks = _Marks()
        if marks.take(render([marks.put(m, i) if n == i else m for n, m in enumerate(messages)], False))[0] != text:
            return _name(i)
    return "the assistant"


def _name(i: int) -> str:
    return f"message {i + 1}"
