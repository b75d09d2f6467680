"""What `train_smart.py` learns from after the conversations: reasoning tasks, and questions for pairs of answers. All of it is made by
program, with the answers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from model.files import atomic_write_text
from tools.curriculum import arithmetic
from tools.reasoning_tasks import KINDS
from tools.reasoning_tasks.dataset import split_rows
from tools.reasoning_tasks.wordings import LANGUAGES

_SUM = re.compile(r"(\d+) ([+-]) (\d+) =")

Row = dict[str, Any]


def write_tasks(folder: Path, rows: int, test_rows: int, seed: int) -> None:
    """train.jsonl (half of it with thinking) and valid.jsonl (other problems) of tools.make_reasoning in `folder`.

    Steps that the curriculum's held-out prompts ask for are left out of train.jsonl: what those prompts measure stays unseen.
    """
    kinds = tuple(KINDS)
    train = split_rows("train", rows, seed, kinds, LANGUAGES, "both")
    _write(folder / "train.jsonl", (row for row in train if not _gives_away(row)))
    _write(folder / "valid.jsonl", split_rows("valid", test_rows, seed, kinds, LANGUAGES, "think"))


def _gives_away(row: Row) -> bool:
    steps = _SUM.findall(row["messages"][-1].get("reasoning_content", ""))
    return any(arithmetic.is_held_out(sign, int(a), int(b)) for a, sign, b in steps)


def write_questions(path: Path, count: int, chats: Path, tasks: Path, seed: int) -> None:
    """Up to `count` training questions whose answers are thought about, in equal parts sums of the curriculum (`chats`) and `tasks`."""
    rng = random.Random(f"smart/questions/{seed}")
    chosen: list[Row] = []
    for file in (chats, tasks):
        found = [turns for turns in map(_turns, file.read_text(encoding="utf-8").splitlines()) if _thinks_once(turns)]
        chosen += [{"messages": turns} for turns in rng.sample(found, min(len(found), count // 2))]
    rng.shuffle(chosen)
    _write(path, chosen)


def _turns(line: str) -> Sequence[Row]:
    row = json.loads(line)
    return row["conversations"] if "conversations" in row else row["messages"]


def _thinks_once(turns: Sequence[Row]) -> bool:
    return len(turns) == 2 and bool(turns[1].get("reasoning_content"))


def _write(path: Path, rows: Iterable[Row]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
