"""tools.reasoning_modes: what it counts as right, and a whole run on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inference.reasoning import ReasoningResult, Sample
from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from tools.reasoning_modes import BASE, is_right, main, measure_modes, modes, read_rows, table
from tools.reasoning_tasks import make_dataset
from train.config import UsageError


def test_every_task_draws_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards votes that draw alike for all tasks, where one unlucky draw would count many times; and the share of right samples."""
    seeds = []

    def generate(engine: object, messages: object, **options: object) -> ReasoningResult:
        seeds.append(options["settings"].seed)  # type: ignore[attr-defined]
        found = result("12")
        found.samples = [Sample("12", result="12", finish_reason="stop"), Sample("7", result="7", finish_reason="stop")]
        return found

    monkeypatch.setattr("tools.reasoning_modes.generate_with_reasoning", generate)
    rows = [{"messages": [{"role": "user", "content": "?"}], "answer": "12"}] * 3
    found = measure_modes(None, rows, {BASE: modes(2, 4, 0.8, 40)["votes of 2"]})  # type: ignore[arg-type]
    assert seeds[1:] == [0, 1, 2] and [row["samples_right"] for row in found[BASE]] == [0.5] * 3


def result(answer: str, finish_reason: str = "stop") -> ReasoningResult:
    return ReasoningResult("", answer, answer or None, 0.5, "probability", [], [], [], 0, finish_reason, 1, 1, 0.1)


def test_what_is_right() -> None:
    """Guards a right number that was cut off, or that is written in another way."""
    row = {"messages": [], "answer": "12"}
    assert is_right(result("12"), row) and is_right(result("12.0"), row)
    assert not any((is_right(result("12", "length"), row), is_right(result("1"), row), is_right(result(""), row)))


def test_table_compares_the_same_tasks() -> None:
    """Guards the difference to the base: of the same tasks, with an interval that holds it."""
    row = {"samples_right": 0.7, "tokens": 10, "seconds": 0.5}
    rows = [{**row, "right": n % 4 > 0, "confidence": 0.25 + 0.5 * (n % 4 > 0)} for n in range(40)]
    worse = [{**row, "right": row["right"] and n % 2 == 0, "seconds": 1.5} for n, row in enumerate(rows)]
    lines = table({BASE: rows, "off": worse})
    assert "30 of 40: 75.0% (60%–86%) | – | 70.0% | 0.75 / 0.25 | 10 | 0.500 | 1.00 |" in lines[2]
    assert "10 of 40: 25.0%" in lines[3] and lines[3].endswith("| 1.500 | 3.00 |") and "-50.0% (-65% to -35%)" in lines[3]


def test_a_whole_run(tmp_path: Path, tiny_tokenizer: BPETokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the command from the files to the report."""
    make_dataset(tmp_path / "tasks", 24, 24, kinds=("sums",), style="think")
    torch.manual_seed(0)
    config = HaoAIConfig(vocab_size=tiny_tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, max_position_embeddings=160)
    SmartHaoAI(config).save_pretrained(tmp_path / "model", tiny_tokenizer)
    tasks, out = str(tmp_path / "tasks" / "valid.jsonl"), str(tmp_path / "out")
    words = ["--limit", "2", "--samples", "2", "--budget", "4", "--max-new-tokens", "40", "--device", "cpu", "--out", out]
    main([str(tmp_path / "model"), "--tasks", tasks, *words])
    report = json.loads((tmp_path / "out" / "modes.json").read_text(encoding="utf-8"))
    assert list(report["modes"]) == list(modes(2, 4, 0.8, 40)) and all(len(rows) == 2 for rows in report["modes"].values())
    assert all(row["cut"] for row in report["modes"]["budget of 4"]) and not any(row["cut"] for row in report["modes"][BASE])
    assert "| votes of 2 |" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--samples 1"):
        main([str(tmp_path / "model"), "--tasks", tasks, "--samples", "1"])


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    """Guards a report about nothing."""
    with pytest.raises(FileNotFoundError, match="make_reasoning"):
        read_rows(tmp_path / "valid.jsonl", None, None)
    (tmp_path / "valid.jsonl").write_text('{"messages": [], "answer": "1", "kind": "sums"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="no rows of these kinds"):
        read_rows(tmp_path / "valid.jsonl", ["order"], None)
    assert len(read_rows(tmp_path / "valid.jsonl", ["sums"], 5)) == 1
