"""The tasks and questions of the one-command run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.curriculum import conversations
from tools.curriculum.arithmetic import is_held_out
from tools.smart_data import _SUM, _gives_away, write_questions, write_tasks


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tasks_are_thought_about_and_answered_at_once_and_give_no_probe_away(tmp_path: Path) -> None:
    """Guards: tasks of one kind only, files that change between runs, sums of the held-out prompts among the steps."""
    write_tasks(tmp_path, 1500, 60, seed=3)
    train, valid = rows(tmp_path / "train.jsonl"), rows(tmp_path / "valid.jsonl")
    thought = [row for row in train if row["messages"][1].get("reasoning_content")]
    assert 0.4 < len(thought) / len(train) < 0.6 and len(valid) == 60
    assert {row["kind"] for row in thought} == {row["kind"] for row in train} == {row["kind"] for row in valid}
    steps = [(sign, int(a), int(b)) for row in thought for a, sign, b in _SUM.findall(row["messages"][1]["reasoning_content"])]
    assert len(steps) > 500 and not any(is_held_out(*step) for step in steps)
    assert _gives_away({"messages": [{}, {"reasoning_content": "3 + 2 = 5. 10 + 9 = 19. x = 19 - 1 = 18"}]}) == is_held_out("+", 10, 9)
    before = (tmp_path / "train.jsonl").read_bytes()
    write_tasks(tmp_path, 1500, 60, seed=3)
    assert (tmp_path / "train.jsonl").read_bytes() == before


def test_questions_are_single_ones_with_thinking_from_both_files(tmp_path: Path) -> None:
    """Guards: questions without thinking, which would teach not to think; one source pushing the other out."""
    write_tasks(tmp_path, 200, 6, seed=0)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in conversations(0, 300)), encoding="utf-8")
    write_questions(tmp_path / "questions.jsonl", 40, chats, tmp_path / "train.jsonl", seed=0)
    found = [row["messages"] for row in rows(tmp_path / "questions.jsonl")]
    tasks = [row["messages"] for row in rows(tmp_path / "train.jsonl")]
    assert len(found) == 40 and sum(turns in tasks for turns in found) == 20
    assert all(len(turns) == 2 and turns[1]["reasoning_content"] for turns in found)
    write_questions(tmp_path / "all.jsonl", 10**6, chats, tmp_path / "train.jsonl", seed=0)
    assert 40 < len(rows(tmp_path / "all.jsonl")) < 300
