"""What a row means: each data format is recognised by its fields, with no registration, and becomes a sample.

    for line, sample in read_samples(path, bad):      # Text | Conversation | Preference | Judged

Unusable rows are in `bad`, with file, line and reason. Formats (other fields such as "source" or "lang" are ignored):
  {"text"}   {"conversations" | "messages": [{role, content} or {from, value}]}   {"prompt", "response" | "completion" | "answer"}
  {"instruction", "input", "output"}   {"system", "user", "assistant"}   {"system", "user", "cot", "final"}
  {"question", "answer"} (GSM8K; the answer as it stands, with the steps and the "#### 42" behind them)
  {"prompt", "chosen", "rejected"}   {"prompt", "completion", "label"}
A row with {"chat_template_kwargs": {"enable_thinking": false}} answers a question asked with the thinking closed.
Decisions: two turns of one role in a row are kept as they are (merging would change what was said); an assistant may
open a conversation, but some user must speak; an empty system prompt counts as none; a conversation with a true/false
"label" is a judged answer, because teaching the bad ones would be wrong.
Finding and reading files is `train.data_files` and `train.raw_rows`, samples are `train.samples`; their names can be imported from here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from train.data_files import DataFile, expand_paths, is_token_file, read_token_ids, split_suffix
from train.raw_rows import RawRow, read_rows
from train.samples import Conversation, Judged, Preference, Sample, Text, as_conversation, as_preference, as_text
from train.turns import (
    Message,
    RowError,
    assistant_turn,
    checked_text,
    kind_of,
    parsed_json,
    plain_turn,
    read_messages,
    read_side,
    read_tools,
)

__all__ = [
    "BadRow", "BadRows", "Conversation", "DataFile", "Judged", "Message", "Preference", "RawRow", "RowError", "Sample",
    "Text", "as_conversation", "as_preference", "as_text", "expand_paths", "format_name", "is_token_file", "read_rows",
    "read_samples", "read_token_ids", "recognise", "split_suffix",
]  # fmt: skip

ANSWER_FIELDS = ("response", "completion", "answer")
"""What the answer to a `prompt` may be called."""
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")


Row = dict[str, Any]


# ---------------------------------------------------------------- recognising


def recognise(value: Any) -> Sample:
    """The sample that a row describes. Raises RowError with the field and the reason when it cannot be used."""
    return _format_of(value).build(_fields(value))


def format_name(value: Any) -> str:
    """The name of the row's format: text, conversations, messages, sharegpt, prompt-response, alpaca, user-assistant,
    user-final, question-answer, preference or judged. Raises RowError for a row of no known format; contents are not checked.
    """
    name = _format_of(value).name
    if name in ("conversations", "messages"):
        turns = parsed_json(value.get(name), name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            return "sharegpt"
    return name


@dataclass(frozen=True)
class _Format:
    name: str
    fields: str
    matches: Callable[[Row], bool]
    build: Callable[[Row], Sample]


def _fields(value: Any) -> Row:
    """Fields with null are absent: tables fill every column of every row."""
    if not isinstance(value, dict):
        hint = "; write a list of rows to a .json file" if isinstance(value, list) else ""
        raise RowError(f"row is {kind_of(value)}, expected an object with fields{hint}")
    return {key: field for key, field in value.items() if field is not None}


def _format_of(value: Any) -> _Format:
    row = _fields(value)
    for known in _FORMATS:
        if known.matches(row):
            return known
    if not value:
        raise RowError("row has no fields")
    null = [key for key in value if value[key] is None]
    found = ", ".join(sorted(map(str, value))[:20]) + (f" (null: {', '.join(map(str, null[:20]))})" if null else "")
    raise RowError(f"unknown format: found the fields {found}; known are {', '.join(known.fields for known in _FORMATS)}")


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _turns_field(row: Row) -> str | None:
    return next((name for name in ("conversations", "messages") if name in row), None)


def _is_judged(row: Row) -> bool:
    if "label" not in row:
        return False
    if "completion" in row:
        return "prompt" in row
    return isinstance(row["label"], bool) and (_turns_field(row) is not None or ("prompt" in row and "response" in row))


def _text_row(row: Row) -> Text:
    return Text(checked_text(row["text"], "text"))


def _turns_row(row: Row) -> Conversation:
    messages, tools = _conversation_field(row)
    return _conversation(messages, tools, row)


def _prompt_row(row: Row) -> Conversation:
    answer = next(name for name in ANSWER_FIELDS if name in row)
    turns = _with_system(row, read_side(row["prompt"], "prompt", "user")) + read_side(row[answer], answer, "assistant")
    return _conversation(turns, read_tools(row.get("tools")), row)


def _alpaca_row(row: Row) -> Conversation:
    answer = assistant_turn(row["output"], "output", reasoning=row.get("reasoning_content"))
    return _conversation([*_alpaca_prompt(row), answer], read_tools(row.get("tools")), row)


def _single_turn(asked: str, answered: str, reasoning: str = "reasoning_content") -> Callable[[Row], Conversation]:
    """One question and its answer, in fields of these names."""

    def build(row: Row) -> Conversation:
        answer = assistant_turn(row[answered], answered, reasoning=row.get(reasoning), reasoning_field=reasoning)
        turns = [*_with_system(row, [plain_turn("user", row[asked], asked)]), answer]
        return _conversation(turns, read_tools(row.get("tools")), row)

    return build


def _preference_row(row: Row) -> Preference:
    tools = read_tools(row.get("tools"))
    prompt: list[Message] | None = None
    if "prompt" in row:
        prompt = _with_system(row, read_side(row["prompt"], "prompt", "user"))
    elif "instruction" in row:
        prompt = _alpaca_prompt(row)
    elif _turns_field(row):
        prompt, tools = _conversation_field(row)
    both = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    if prompt is None and both:
        chosen, rejected = _transcript(row["chosen"], "chosen"), _transcript(row["rejected"], "rejected")
    else:
        chosen, rejected = (read_side(row[name], name, "assistant") for name in ("chosen", "rejected"))
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        shared, chosen, rejected = _split_shared(chosen, rejected)
        if prompt is not None and (not shared or prompt[-1] != shared[-1]):
            raise RowError("the turns of chosen and rejected do not begin with prompt")
        if prompt is None or len(shared) > len(prompt):
            prompt = _with_system(row, shared)
    prompt = prompt or []
    _check_prompt(prompt, "prompt" if "prompt" in row else "the turns shared by chosen and rejected")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[0]["role"] != "assistant":
            raise RowError(f"{name} continues with a {turns[0]['role']} turn, expected the assistant")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    return Preference(prompt, chosen, rejected, tools, _margin(row.get("margin", 0.0)), _thinking(row, chosen[-1], rejected[-1]))


def _judged_row(row: Row) -> Judged:
    if "prompt" in row:
        answer = "completion" if "completion" in row else "response"
        prompt, completion = (
            _with_system(row, read_side(row["prompt"], "prompt", "user")),
            read_side(row[answer], answer, "assistant"),
        )
        tools = read_tools(row.get("tools"))
    else:
        messages, tools = _conversation_field(row)
        prompt, completion = messages[:-1], messages[-1:]
    _check_prompt(prompt, "prompt")
    if completion[0]["role"] != "assistant":
        raise RowError(f"the judged turn is a {completion[0]['role']} turn, expected the assistant")
    return Judged(prompt, completion, _label(row["label"]), tools, _thinking(row, completion[-1]))


_FORMATS = (
    _Format("preference", "{prompt, chosen, rejected}", _has("chosen", "rejected"), _preference_row),
    _Format("judged", "{prompt, completion, label}", _is_judged, _judged_row),
    _Format("conversations", "{conversations}", _has("conversations"), _turns_row),
    _Format("messages", "{messages}", _has("messages"), _turns_row),
    _Format("alpaca", "{instruction, input, output}", _has("instruction", "output"), _alpaca_row),
    _Format(
        "prompt-response",
        "{prompt, response}",
        lambda row: "prompt" in row and any(name in row for name in ANSWER_FIELDS),
        _prompt_row,
    ),
    _Format("user-final", "{system, user, cot, final}", _has("user", "final"), _single_turn("user", "final", "cot")),
    _Format("user-assistant", "{system, user, assistant}", _has("user", "assistant"), _single_turn("user", "assistant")),
    _Format("question-answer", "{question, answer}", _has("question", "answer"), _single_turn("question", "answer")),
    _Format("text", "{text}", _has("text"), _text_row),
)


# ---------------------------------------------------------------- parts of rows


def _conversation_field(row: Row) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Turns and tools; some data sets put the tools into the system turn."""
    field = _turns_field(row)
    assert field is not None
    turns = parsed_json(row[field], field)
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    tools = read_tools(row.get("tools")) or read_tools(first.get("tools"), f"{field}[0].tools")
    return _with_system(row, read_messages(turns, field)), tools


def _alpaca_prompt(row: Row) -> list[Message]:
    asked = [checked_text(row[key], key, may_be_empty=True) for key in ("instruction", "input") if key in row]
    turns: list[Message] = []
    history = parsed_json(row.get("history", []), "history") or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowError("history is not a list of [question, answer] pairs")
    for index, (question, answer) in enumerate(history):
        turns += [plain_turn("user", question, f"history[{index}][0]"), assistant_turn(answer, f"history[{index}][1]")]
    return _with_system(row, [*turns, plain_turn("user", "\n".join(part for part in asked if part.strip()), "instruction")])


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    system = checked_text(row.get("system", ""), "system", may_be_empty=True)
    if not system.strip() or turns[:1] == [{"role": "system", "content": system}]:
        return turns
    if turns and turns[0]["role"] == "system":
        raise RowError("two different system prompts: the field system and the first turn")
    return [{"role": "system", "content": system}, *turns]


def _transcript(text: str, field: str) -> list[Message]:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...`, a wide-spread way to write conversations as preference strings."""
    pieces = _TRANSCRIPT.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError('no prompt: give "prompt", or whole conversations as lists of turns in chosen and rejected')
    pairs = zip(pieces[1::2], pieces[2::2], strict=True)
    return [plain_turn("user", said.strip(), field) if who == "Human" else assistant_turn(said.strip(), field) for who, said in pairs]


def _split_shared(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Shared leading turns, and what follows on each side: at least one turn, beginning after the last question."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _conversation(messages: list[Message], tools: list[dict[str, Any]] | None, row: Row) -> Conversation:
    for role in ("assistant", "user"):
        if not any(message["role"] == role for message in messages):
            raise RowError(f"no {role} turn (roles found: {', '.join(message['role'] for message in messages[:8])})")
    return Conversation(messages, tools, _thinking(row, messages[-1]))


def _thinking(row: Row, *answers: Message) -> bool | None:
    """The switch of a row as TRL's data sets have it: {"chat_template_kwargs": {"enable_thinking": false}}."""
    arguments = parsed_json(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise RowError(f"chat_template_kwargs is {kind_of(arguments)}, expected an object")
    thinking = arguments.get("enable_thinking")
    if not isinstance(thinking, bool | None):
        raise RowError(f"chat_template_kwargs.enable_thinking is {str(thinking)[:40]!r}, expected true or false")
    if thinking is False and any((answer.get("reasoning_content") or "").strip() for answer in answers):
        raise RowError("chat_template_kwargs.enable_thinking is false, but the answer has reasoning_content")
    return thinking


def _check_prompt(prompt: list[Message], what: str) -> None:
    if not any(message["role"] == "user" for message in prompt):
        raise RowError(f"no user turn in {what}")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"{what} ends with a turn of the {prompt[-1]['role']}, expected the user or a tool")


def _label(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowError(f"label is {str(value)[:40]!r}, expected true or false (or 1, 0)")


def _margin(value: Any) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise RowError(f"margin is {str(value)[:40]!r}, expected a number")


# ---------------------------------------------------------------- bad rows


@dataclass(frozen=True)
class BadRow:
    """A row that was skipped, and why."""

    path: Path
    line: int
    reason: str


class BadRows:
    """Counts skipped rows by reason and keeps the first `keep` of them with file and line."""

    _MOST_REASONS = 200

    def __init__(self, keep: int = 20) -> None:
        self.keep = keep
        self.first: list[BadRow] = []
        self.by_reason: Counter[str] = Counter()
        self.total = 0

    def add(self, path: str | PathLike[str], line: int, reason: str) -> None:
        """Counts one bad row. Numbers are masked in the counted reason: "turn 3" and "turn 5" fall together."""
        self.total += 1
        if len(self.first) < self.keep:
            self.first.append(BadRow(Path(path), line, reason))
        masked = re.sub(r"0x[0-9a-f]+|\d+", "N", reason)
        if masked not in self.by_reason and len(self.by_reason) >= self._MOST_REASONS:
            masked = "other reasons"
        self.by_reason[masked] += 1

    def report(self, write: Callable[[str], object] = print) -> None:
        """Writes the first bad rows, then the counts by reason when there are more; nothing when all rows were good."""
        if not self.total:
            return
        write(f"{self.total} bad row{'s' if self.total > 1 else ''} skipped:")
        for bad in self.first:
            write(f"  {bad.path}:{bad.line}: {bad.reason}")
        if self.total > len(self.first):
            write("  ... and more; counts by reason (N stands for any number):")
            for reason, count in self.by_reason.most_common():
                write(f"  {count:>9,}  {reason}")

    def raise_if_strict(self, strict: bool) -> None:
        """Raises ValueError naming the first bad row when `strict` and there is one."""
        if strict and self.total:
            where = f"; the first is {self.first[0].path}:{self.first[0].line}: {self.first[0].reason}" if self.first else ""
            raise ValueError(f"{self.total} bad row{'s' if self.total > 1 else ''} with --strict{where}")


def read_samples(
    path: str | PathLike[str], bad: BadRows, convert: Callable[[Sample], Any] | None = None, read: Callable[[Any], Sample] = recognise
) -> Iterator[tuple[int, Any]]:
    """(line, sample) of every usable row of a file; the others go to `bad`.

    `convert` (as_text, as_conversation, as_preference) turns samples into what a stage needs; its RowErrors count. `read` makes a
    sample of a row.
    """
    for row in read_rows(path):
        if row.error is not None:
            bad.add(row.path, row.line, row.error)
            continue
        try:
            sample = read(row.value)
            yielded = convert(sample) if convert else sample
        except RowError as error:
            bad.add(row.path, row.line, str(error))
            continue
        yield row.line, yielded
