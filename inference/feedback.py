"""What a user thinks of answers, as rows that the training stages read.

    feedback = Feedback("training_data", model="weight/sft")
    feedback.good(prompt, answer)                 # sft/feedback/chat.jsonl      {"conversations": [...]}
    feedback.bad(prompt, answer, "a better one")  # rlhf/feedback/chat.jsonl     {"prompt", "chosen", "rejected"}
    feedback.bad(prompt, answer)                  # judged/feedback/chat.jsonl   {"prompt", "completion", "label": false}
    feedback.better(prompt, chosen, rejected)     # rlhf/feedback/chat.jsonl

A good and a bad verdict on two answers to one prompt make a pair as well. Each kind lies below the folder that its stage reads by
default. Rows are appended whole and flushed to the disk; what was there is never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Message = dict[str, Any]
FILE = Path("feedback") / "chat.jsonl"
CONVERSATIONS, PAIRS, JUDGED = "sft", "rlhf", "judged"


class Feedback:
    """Writes verdicts on answers below `folder` (subfolders sft, rlhf and judged).

    A prompt is a list of messages that ends with the user's (or a tool's); an answer is the message of the assistant. tools: the
    descriptions that the model was shown. source: what else is to be kept beside the row; thinking=False says that the thinking was
    skipped. Every method returns the files that it wrote to, and raises ValueError for what no stage could learn from, OSError where
    nothing can be written.
    """

    def __init__(self, folder: str | Path = "training_data", model: str = "") -> None:
        self.folder = Path(folder)
        self.model = model
        self._verdicts: dict[str, dict[bool, Message]] = {}

    def good(self, prompt: Sequence[Message], answer: Message, **source: Any) -> list[Path]:
        """The answer is worth learning; with an answer to the same prompt that was bad, a pair as well."""
        _check(prompt, answer)
        written = [self._append(CONVERSATIONS, {"conversations": [*prompt, answer]}, [answer], source)]
        return written + self._paired(prompt, answer, True, source)

    def bad(self, prompt: Sequence[Message], answer: Message, better: str = "", **source: Any) -> list[Path]:
        """The answer is not wanted; `better` says what it should have been."""
        _check(prompt, answer)
        if better.strip():
            return self.better(prompt, {"role": "assistant", "content": better.strip()}, answer, **source)
        written = [self._append(JUDGED, {"prompt": list(prompt), "completion": [answer], "label": False}, [answer], source)]
        return written + self._paired(prompt, answer, False, source)

    def better(self, prompt: Sequence[Message], chosen: Message, rejected: Message, **source: Any) -> list[Path]:
        """Of two answers to one prompt the first is preferred."""
        _check(prompt, chosen)
        _check(prompt, rejected)
        if chosen == rejected:
            raise ValueError("the two answers are the same: nothing can be learned from preferring one")
        row = {"prompt": list(prompt), "chosen": [chosen], "rejected": [rejected]}
        return [self._append(PAIRS, row, [chosen, rejected], source)]

    def _paired(self, prompt: Sequence[Message], answer: Message, verdict: bool, source: dict[str, Any]) -> list[Path]:
        verdicts = self._verdicts.setdefault(json.dumps(list(prompt), sort_keys=True), {})
        verdicts[verdict] = answer
        other = verdicts.get(not verdict)
        if other is None or other == answer:
            return []
        return self.better(prompt, verdicts[True], verdicts[False], **source)

    def _append(self, kind: str, row: dict[str, Any], answers: list[Message], source: dict[str, Any]) -> Path:
        path = self.folder / kind / FILE
        source = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "model": self.model, **source}
        if tools := source.pop("tools", None):
            row["tools"] = tools
        if source.get("thinking") is False and not any(answer.get("reasoning_content") for answer in answers):
            row["chat_template_kwargs"] = {"enable_thinking": False}
        append_row(path, {**row, "source": source})
        return path


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line in one write, on the disk when this returns. A line that a crash cut off does not spoil this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    with open(path, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def _check(prompt: Sequence[Message], answer: Message) -> None:
    if not prompt or prompt[-1].get("role") not in ("user", "tool"):
        raise ValueError("there is no question to which this is the answer: say something first")
    if not str(answer.get("content", "")).strip():
        raise ValueError("the answer is empty: nothing can be learned from it")
