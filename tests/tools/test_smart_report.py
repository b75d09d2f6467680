"""What the one-command run says about its stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inference import Completion
from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from tools import smart_report
from tools.smart_data import write_tasks
from tools.smart_report import right_answers, write_report


def test_results_count_whatever_the_sentence(
    tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the stage before, which answers in sentences, counted as wrong; both columns measured in the same mode."""
    asked = []

    def generate_answers(model, tokenizer, rows, limit, thinking):
        asked.append(thinking)
        return [Completion([1], text, "", "stop") for text in ("3 + 4 = 7.", "7", "It is 8.", "Tom", "")]

    monkeypatch.setattr(smart_report, "generate_answers", generate_answers)
    rows = [{"messages": [{"role": "user", "content": "?"}], "answer": answer} for answer in ("7", "7", "7", "Tom", "Tom")]
    for thinking in (True, False):
        assert right_answers(SmartHaoAI(tiny_config), tiny_tokenizer, rows, thinking) == [True, True, False, True, False]
    assert asked == [True, False]


def test_the_report_compares_the_last_stage_with_sft(
    tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: figures of one stage under another's name, a stage left out."""
    torch.manual_seed(0)
    for name in ("pretrain", "sft", "grpo"):
        model = SmartHaoAI(HaoAIConfig(**{**vars(tiny_config), "max_position_embeddings": 512}))
        model.save_pretrained(tmp_path / name, tiny_tokenizer)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "pretrain_en.jsonl").write_text('{"text": "The fox slept. Then it rained."}\n', encoding="utf-8")
    write_tasks(tmp_path / "tasks", 1, 12, seed=0)
    monkeypatch.setattr(smart_report, "SAMPLE_QUESTIONS", ("Hello!",))
    shown = iter([True, False, False, False])
    monkeypatch.setattr(smart_report, "right_answers", lambda *words: [next(shown)] * 12)
    monkeypatch.setattr(smart_report, "answer_probes", lambda model, tokenizer, count: smart_report_probes(count))
    text = write_report(tmp_path, "grpo", tmp_path, tmp_path / "tasks" / "valid.jsonl", "sample, 1 minutes", 1, "cpu")
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [stage for stage, _, _ in facts["bits_per_byte"]] == ["pretrain", "sft", "grpo"] and facts["last"] == "grpo"
    assert facts["tasks"]["sft"]["on"]["passed"] == 12 and facts["tasks"]["grpo"]["on"]["passed"] == 0
    line = next(line for line in text.splitlines() if line.startswith("  thinking on"))
    assert line.index("12/12") < line.index("0/12", line.index("12/12") + 5)
    assert "after sft: 0 of 10" in text and "after grpo: 0 of 10" in text and "> Hello!" in text
    assert text in (tmp_path / "report.md").read_text(encoding="utf-8")


def smart_report_probes(count: int):
    from tools.curriculum import probes

    return [(probe, "", "") for probe in probes(0, count)]
