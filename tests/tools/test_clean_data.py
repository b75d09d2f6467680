"""tools.clean_data: every row is accounted for, formats stay, duplicates and test questions go, nothing half-written."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from tools.clean_data import main
from train.config import UsageError
from train.formats import read_rows

STORY = "从前有一座山，山上有一座庙，庙里住着一位老和尚。" + "".join(
    f"第{i}天，他看见{chr(0x4E00 + 37 * i)}从{chr(0x5E00 + 11 * i)}里走出来。" for i in range(20)
)
QUESTION = "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May, how many clips?"


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def cleaned(out: Path) -> list[Any]:
    return [row.value for row in read_rows(out)]


def test_every_row_is_kept_or_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: rows that vanish; a report without file and line; a format that cleaning changes."""
    talk = {"conversations": [{"role": "user", "content": "１＋１＝？"}, {"role": "assistant", "content": "2"}], "source": "手写"}
    rows: list[Any] = [
        {"text": STORY, "lang": "zh"},
        talk,
        "{not json",
        {"text": "短"},
        {"text": STORY},
        {"text": STORY.replace("老和尚", "小和尚") + "\n上一篇 下一篇"},
        {"text": "很好很好。" * 100},
        {"text": "Homework: " + QUESTION + " The answer is seventy two."},
        {"text": "\ud800 half a character".encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")},
        {"unknown": 1},
        talk,
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    source = tmp_path / "数据 one.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    test_set = write(tmp_path / "eval.jsonl", [{"question": QUESTION, "answer": "72"}])
    out, report = tmp_path / "out" / "clean.jsonl", tmp_path / "report.json"
    assert main([str(source), "--out", str(out), "--report", str(report), "--against", str(test_set)]) == 0
    expected = {"text": STORY, "lang": "zh"}
    spoken = {"conversations": [{"role": "user", "content": "1＋1＝？"}, {"role": "assistant", "content": "2"}], "source": "手写"}
    assert cleaned(out) == [expected, spoken]
    found = json.loads(report.read_text(encoding="utf-8"))
    counts = {rule: facts["rows"] for rule, facts in found["removed"].items() if facts["rows"]}
    assert counts == {"unreadable": 3, "short": 1, "exact duplicate": 2, "near-duplicate": 1, "repetitive": 1, "contaminated": 1}
    assert found["read"] == 11 == found["kept"] + sum(counts.values()) and found["files"] == [{"file": str(source), "rows": 11}]
    lines_of = {rule: [e["line"] for e in facts["examples"]] for rule, facts in found["removed"].items()}
    assert lines_of["unreadable"] == [3, 9, 10] and lines_of["exact duplicate"] == [5, 11] and lines_of["near-duplicate"] == [6]
    assert found["removed"]["near-duplicate"]["examples"][0]["reason"].startswith(f"as {source}:1 (")
    assert found["removed"]["contaminated"]["examples"][0]["reason"].endswith("eval.jsonl:1")
    assert found["lines"]["removed"] == 1 and found["lines"]["examples"][0]["reason"] == "上一篇 下一篇"
    assert "near-duplicate" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["clean.jsonl"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_cleaning_twice_changes_nothing(suffix: str, tmp_path: Path) -> None:
    """Guards: output that cannot be read back, or that differs from run to run; repairs that go on forever."""
    rows = [{"text": f"{STORY[: 40 + i]} 第{i}种说法，Ａnd ｅnglish caf\u00c3\u00a9."} for i in range(0, 200, 40)]
    source = write(tmp_path / "in.jsonl", rows)
    first, second, third = (tmp_path / f"{name}.jsonl{suffix}" for name in ("first", "second", "third"))
    assert (
        main([str(source), "--out", str(first)])
        == main([str(first), "--out", str(second)])
        == main([str(source), "--out", str(third)])
        == 0
    )
    assert cleaned(first) == cleaned(second) != [] and first.read_bytes() == third.read_bytes()
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opener(first, "rb") as file:  # type: ignore[operator]
        assert "And english café".encode() in file.read()


def test_strict_names_the_place_and_leaves_nothing(tmp_path: Path) -> None:
    """Guards: half a result under the final name; a stop that does not say where."""
    source = write(tmp_path / "in.jsonl", [{"text": STORY}, "{broken", {"text": STORY}])
    with pytest.raises(ValueError, match=r"in\.jsonl:2: not valid JSON"):
        main([str(source), "--out", str(tmp_path / "out" / "x.jsonl"), "--strict"])
    assert list((tmp_path / "out").iterdir()) == []


def test_short_rows_of_one_pattern_stay(tmp_path: Path) -> None:
    """Guards: sums of one pattern taken for copies of each other."""
    rows = [{"prompt": f"小明有{i}个苹果，又买了{i + 3}个，一共有几个？", "response": f"{2 * i + 3}"} for i in range(50)]
    out = tmp_path / "out.jsonl"
    assert main([str(write(tmp_path / "in.jsonl", rows)), "--out", str(out)]) == 0
    assert cleaned(out) == rows


def test_wrong_command_lines(tmp_path: Path) -> None:
    """Guards: an input overwritten by its own cleaning, a result replaced without being asked."""
    source = write(tmp_path / "in.jsonl", [{"text": STORY}])
    (tmp_path / "old.jsonl").write_text("mine", encoding="utf-8")
    for out, words in (
        ("in.jsonl", "one of the files"),
        ("old.jsonl", "--overwrite"),
        ("out.txt", "ends with"),
    ):
        with pytest.raises(UsageError, match=words):
            main([str(source), "--out", str(tmp_path / out)])
    with pytest.raises(UsageError, match="share"):
        main([str(source), "--out", str(tmp_path / "a.jsonl"), "--near", "2"])
    assert main([str(source), "--out", str(tmp_path / "old.jsonl"), "--overwrite"]) == 0
    assert main([str(source), "--out", str(tmp_path / "none.jsonl"), "--min-letters", "100000"]) == 1
