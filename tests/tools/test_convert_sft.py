"""Conversations between formats: what is written reads back as what was there, and what cannot be kept is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.convert_sft import FORMATS, convert_file, convert_row, main
from train.config import UsageError
from train.formats import BadRows, Conversation, RowError, as_conversation, read_samples, recognise

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "名": "值"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def turns(*said: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


SYSTEM = {"role": "system", "content": "be brief"}
THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "r\n\nr2"}
SIMPLE = [
    Conversation(turns("q", "a")),
    Conversation([SYSTEM, *turns("你好\n再见", " a\n\n```\nx\n```")]),
    Conversation([*turns("q"), THOUGHT]),
    Conversation([*turns("q"), THOUGHT], TOOLS),
]
SEVERAL = [
    Conversation(turns("q", "a", "q2", "a2", "q3", "a3")),
    Conversation([SYSTEM, *turns("q"), THOUGHT, *turns("q2"), THOUGHT]),
    Conversation([*turns("q"), {"role": "assistant", "content": "see", "tool_calls": [CALL, CALL]}], TOOLS),
]
UNEVEN = [
    Conversation(
        [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, THOUGHT], TOOLS
    ),
    Conversation([{"role": "assistant", "content": "hi"}, *turns("q", "a")]),
    Conversation([*turns("q"), *turns("q2", "a")]),
]
HOLDS = [(kind, c) for kind in FORMATS for c in SIMPLE]
HOLDS += [(kind, c) for kind in FORMATS if kind != "cot" for c in SEVERAL]
HOLDS += [(kind, c) for kind in ("messages", "sharegpt", "prompt_response") for c in UNEVEN]


@pytest.mark.parametrize(("kind", "conversation"), HOLDS)
def test_a_written_row_reads_back_the_same(kind: str, conversation: Conversation) -> None:
    """Guards: reasoning, system prompts, earlier turns or tool calls that vanish on the way to another format and back."""
    row, losses = convert_row(conversation, kind)
    assert losses == []
    assert as_conversation(recognise(json.loads(json.dumps(row)))) == conversation


@pytest.mark.parametrize(
    ("kind", "conversation", "reason"),
    [
        *(("alpaca", c, "alpaca holds questions and answers in turn; turn") for c in UNEVEN),
        *(("cot", c, "^cot ") for c in [*SEVERAL, *UNEVEN]),
        ("cot", SEVERAL[0], "the conversation has 6 turns"),
        ("cot", SEVERAL[2], "no place for tool calls"),
        ("prompt_response", Conversation([{"role": "assistant", "content": "hi"}, *turns("q")]), "needs a question before"),
        # Read back, this answer would be taken for reasoning.
        ("alpaca", Conversation(turns("q", "I write </think> here")), "does not give back turn 1"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(kind: str, conversation: Conversation, reason: str) -> None:
    """Guards: rows written with turns left out or shifted, which would teach something else than the source."""
    with pytest.raises(RowError, match=reason):
        convert_row(conversation, kind)


def test_files_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a bad row that stops the file or vanishes unnamed; losses nobody hears of; other fields that are dropped."""
    rows = [
        {"conversations": turns("q", "a"), "source": "x", "lang": None},
        {"text": "no turns"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "completion": "a", "label": True},
        {"messages": turns("q", "a", "never answered")},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n", encoding="utf-8")
    assert main([str(source), str(out), "--to", "alpaca"]) == 0
    shown = capsys.readouterr().out
    assert "4 of 6 rows as alpaca" in shown and "in.jsonl:2: plain text has no turns" in shown and "in.jsonl:6: not valid JSON" in shown
    for loss in ("the rejected answer", "the verdict (label)", "the turns after the last answer"):
        assert f"lost in 1 row: {loss}" in shown
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written[0] == {"instruction": "q", "input": "", "output": "a", "source": "x"}
    assert [row["output"] for row in written] == ["a", "good", "a", "a"]
    assert main([str(source), str(out), "--to", "cot", "--strict", "--overwrite"]) == 1


def test_a_file_survives_every_format(tmp_path: Path) -> None:
    """Guards: a chain of conversions that changes a conversation step by step."""
    conversations = [c for c in SIMPLE]
    path = tmp_path / "start.jsonl"
    path.write_text("".join(json.dumps({"messages": c.messages, "tools": c.tools}) + "\n" for c in conversations), encoding="utf-8")
    for number, kind in enumerate([*FORMATS, "messages"]):
        after = tmp_path / f"{number}.jsonl"
        assert convert_file(str(path), after, kind).written == len(conversations)
        path = after
    assert [sample for _, sample in read_samples(path, BadRows(), as_conversation)] == conversations


def test_outputs_that_would_destroy_something(tmp_path: Path) -> None:
    """Guards: an input overwritten by its own conversion; an earlier result replaced by nothing."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"text": "x"}) + "\n", encoding="utf-8")
    out.write_text("kept", encoding="utf-8")
    with pytest.raises(UsageError, match="also what is read"):
        main([str(source), str(source), "--to", "cot", "--overwrite"])
    with pytest.raises(UsageError, match="--overwrite"):
        main([str(source), str(out), "--to", "cot"])
    with pytest.raises(UsageError, match=".jsonl"):
        main([str(source), str(tmp_path / "out.json"), "--to", "cot"])
    with pytest.raises(ValueError, match="no row of"):
        main([str(source), str(out), "--to", "cot", "--overwrite"])
    assert out.read_text(encoding="utf-8") == "kept" and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
