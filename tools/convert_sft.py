"""Rewrites conversations from any format that training reads into one format.

    python -m tools.convert_sft IN OUT.jsonl --to messages|alpaca|sharegpt|prompt_response|cot [--overwrite] [--strict]

IN is a file, folder or glob. Every row that is written is read back and compared: a row that the format cannot hold (turns of a
tool in alpaca, several questions in cot) is left out and named with its line, a row that loses a part (tool descriptions, a
question without an answer) is written and the loss counted. Fields that no format knows (source, lang, ...) are copied. Of a
preference pair the chosen answer is kept. Exit status: 0; 1 when no row was written, or with `--strict` anything was left out
or lost; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.files import temporary_name
from train.config import UsageError
from train.formats import (
    BadRows,
    Conversation,
    Judged,
    Message,
    Preference,
    RawRow,
    RowError,
    as_conversation,
    expand_paths,
    read_rows,
    recognise,
)

Row = dict[str, Any]
KNOWN_FIELDS = frozenset(
    "text conversations messages prompt response completion instruction input output history system user assistant cot final "
    "reasoning_content chosen rejected label tools".split()
)


@dataclass
class ConvertReport:
    """What became of the rows of one conversion."""

    read: int = 0
    written: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    """Rows that were written without a part of what they held, by what is missing."""
    bad: BadRows = field(default_factory=BadRows)

    def print(self, out: Path, kind: str) -> None:
        print(f"wrote {out.as_posix()}: {self.written:,} of {self.read:,} rows as {kind}")
        for loss, count in self.losses.most_common():
            print(f"  lost in {count:,} row{'s' if count > 1 else ''}: {loss}")
        self.bad.report(print)


def convert_file(spec: Any, out: Path, kind: str) -> ConvertReport:
    """Write every usable row of the files that `spec` names to `out` (JSON lines) as `kind`, a key of FORMATS.

    Without a usable row `out` stays as it is. Raises FileNotFoundError for missing files.
    """
    report = ConvertReport()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for source in expand_paths(spec):
                for raw in read_rows(source.path):
                    report.read += 1
                    row = _converted(raw, kind, report)
                    if row is not None:
                        # Other fields of a table may hold dates and the like; conversations are text by now.
                        file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                        report.written += 1
        if report.written:
            os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _converted(raw: RawRow, kind: str, report: ConvertReport) -> Row | None:
    """The row in its new form; None when it cannot be, which `report` then says."""
    try:
        if raw.error is not None:
            raise RowError(raw.error)
        sample = recognise(raw.value)
        conversation = as_conversation(sample)
        row, losses = convert_row(conversation, kind)
    except RowError as error:
        report.bad.add(raw.path, raw.line, str(error))
        return None
    if isinstance(sample, Preference):
        losses.append("the rejected answer")
    elif isinstance(sample, Judged):
        losses.append("the verdict (label)")
    report.losses.update(losses)
    extra = {key: value for key, value in raw.value.items() if key not in KNOWN_FIELDS and key not in row and value is not None}
    return {**row, **extra}


def convert_row(conversation: Conversation, kind: str) -> tuple[Row, list[str]]:
    """A conversation as a row of `kind`, and what the row does not hold of it. Raises RowError when the row would say something else."""
    messages = list(conversation.messages)
    losses = []
    if kind not in ("messages", "sharegpt"):
        while messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) < len(conversation.messages):
            losses.append("the turns after the last answer")
        if not any(message["role"] == "user" for message in messages):
            raise RowError(f"{kind} needs a question before the last answer")
    row = FORMATS[kind](messages)
    if conversation.tools:
        row["tools"] = conversation.tools
    back = as_conversation(recognise(row))
    if back.messages != messages:
        differing = next((i for i, (a, b) in enumerate(zip(messages, back.messages, strict=False)) if a != b), "last")
        raise RowError(f"{kind} does not give back turn {differing} of the conversation as it is")
    if (back.tools or None) != (conversation.tools or None):
        losses.append("the tool descriptions")
    return row, losses


# ---------------------------------------------------------------- the formats


def _spoken(message: Message) -> str:
    """What a turn says as one text; reasoning and tool calls stand in their tags, where every reader finds them."""
    text = message["content"]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    text = "\n".join([*([text] if text else []), *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])
    thought = message.get("reasoning_content")
    return f"<think>\n{thought}\n</think>\n\n{text}" if thought else text


def _split_system(messages: list[Message], kind: str) -> tuple[Row, list[Message]]:
    """The system prompt as a field, and the turns after it, which have to be questions and answers in turn."""
    system = {"system": messages[0]["content"]} if messages[0]["role"] == "system" else {}
    turns = messages[len(system) :]
    for index, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise RowError(f"{kind} holds questions and answers in turn; turn {index + len(system)} is the {message['role']}'s")
    return system, turns


def _as_messages(messages: list[Message]) -> Row:
    return {"messages": messages}


def _as_sharegpt(messages: list[Message]) -> Row:
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    return {"conversations": [{"from": names[message["role"]], "value": _spoken(message)} for message in messages]}


def _as_alpaca(messages: list[Message]) -> Row:
    system, turns = _split_system(messages, "alpaca")
    said = [_spoken(turn) for turn in turns]
    history = {"history": [list(pair) for pair in zip(said[:-2:2], said[1:-2:2], strict=True)]} if len(said) > 2 else {}
    return {**system, **history, "instruction": said[-2], "input": "", "output": said[-1]}


def _as_prompt_response(messages: list[Message]) -> Row:
    if len(messages) == 2 and messages[0]["role"] == "user":
        return {"prompt": messages[0]["content"], "response": _spoken(messages[1])}
    return {"prompt": messages[:-1], "response": _spoken(messages[-1])}


def _as_cot(messages: list[Message]) -> Row:
    system, turns = _split_system(messages, "cot")
    if len(turns) != 2:
        raise RowError(f"cot holds one question and its answer, the conversation has {len(turns)} turns")
    question, answer = turns
    if "tool_calls" in answer:
        raise RowError("cot has no place for tool calls")
    return {
        "system": system.get("system", ""),
        "user": question["content"],
        "cot": answer.get("reasoning_content", ""),
        "final": answer["content"],
    }


FORMATS: dict[str, Callable[[list[Message]], Row]] = {
    "messages": _as_messages,
    "alpaca": _as_alpaca,
    "sharegpt": _as_sharegpt,
    "prompt_response": _as_prompt_response,
    "cot": _as_cot,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion; returns the exit status."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_sft", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="file, folder or glob of any format that training reads")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .jsonl file to write")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a row is left out or loses something")
    options = parser.parse_args(argv)
    check_out(options.out, options.overwrite, [file.path for file in expand_paths(options.source)])
    report = convert_file(options.source, options.out, options.to)
    report.print(options.out, options.to)
    if not report.written:
        raise ValueError(f"no row of {options.source} is a conversation that {options.to} can hold")
    return 1 if options.strict and (report.bad.total or report.losses) else 0


def check_out(out: Path, overwrite: bool, read: Sequence[Path] = ()) -> None:
    """Refuse an output that is no .jsonl file, exists without --overwrite, or is one of the files `read`. Raises UsageError."""
    if out.suffix != ".jsonl":
        raise UsageError(f"{out} is no .jsonl file; rows are written as JSON lines")
    if any(out.resolve() == path.resolve() for path in read):
        raise UsageError(f"{out} is also what is read; name another file")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; replace it with --overwrite")


if __name__ == "__main__":
    from train.program import run_main

    run_main(main)
