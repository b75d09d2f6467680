"""tools.alignment_study: the commands that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import alignment_report
from tools.alignment_study import FEW, HELD_OUT, REWARD_FACTS, Study, run
from train import config
from train.config import parse_command_line

SETTINGS = {
    "train.train_sft": config.SFTConfig,
    "train.train_grpo": config.GRPOStageConfig,
    "train.train_reward": config.RewardStageConfig,
    "train.train_dpo": config.DPOStageConfig,
    "train.train_ppo": config.PPOStageConfig,
    "train.train_distill": config.DistillStageConfig,
}


@pytest.mark.parametrize("stage", ["reasoning", "grpo", "reward", "dpo", "ppo", "distil", "distil_alone"])
def test_every_stage_takes_its_words(stage: str, tmp_path: Path) -> None:
    """Guards: a setting that was renamed, and a stage that starts from another model than the report compares it with."""
    study = Study("weight/sft", "chats.jsonl", [], tmp_path, seeds=3, threads=1)
    module, words = study.words(stage, 2)
    settings = parse_command_line(SETTINGS[module], words)
    start = {"reasoning": "weight/sft", "distil": None, "distil_alone": None}.get(stage, str(study.folder("reasoning", 0)))
    assert settings.model_dir == start
    if stage.startswith("distil"):
        assert settings.teacher_dir == ("weight/sft" if stage == "distil" else None)


def test_nobody_is_asked_what_was_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards questions that are also among the tasks to learn from or to be tested on; held-out conversations the student has seen."""

    def make_reasoning(study: Study, module: str, out: str, *words: str, into: Path | None = None) -> None:
        Path(out).mkdir(parents=True)
        for name, numbers in {"train": range(10), "valid": range(10, 14)}.items():
            shift = 8 * ("1" in words)
            rows = [json.dumps({"messages": [{"role": "user", "content": f"{n + shift}?"}]}) + "\n" for n in numbers]
            (Path(out) / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")

    monkeypatch.setattr(Study, "_call", make_reasoning)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(f"{n}\n" for n in range(FEW + HELD_OUT)), encoding="utf-8")
    study = Study("weight/sft", str(chats), [], tmp_path / "out", seeds=1, threads=1)
    study.prepare()
    asked = {name: (study.questions / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "valid")}
    assert [json.loads(line)["messages"][0]["content"] for line in asked["train"].splitlines()] == ["14?", "15?", "16?", "17?"]
    assert len(asked["valid"].splitlines()) == 4
    few, held_out = (set(file.read_text(encoding="utf-8").split()) for file in (study.few, study.held_out))
    assert (len(few), len(held_out), few & held_out) == (FEW, HELD_OUT, set())
    study.prepare()  # a second time, all of it is there
    short = tmp_path / "short.jsonl"
    short.write_text("0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has 1 conversations, 2,600 are needed"):
        Study("weight/sft", str(short), [], tmp_path / "other", seeds=1, threads=1).prepare()


@pytest.mark.parametrize("only", [["grpo"], ["grpo", "reward", "distil"]])
def test_the_report(only: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a table that compares other models than were trained, and hours of training that end in a missing reward model."""
    asked: list[list[str]] = []

    def train(study: Study, stage: str, seed: int) -> None:
        study.folder(stage, seed).mkdir(parents=True)
        (study.folder(stage, seed) / "report.md").write_text("".join(f"- {fact}: 0.7\n" for fact in REWARD_FACTS), encoding="utf-8")

    def report(words: list[str]) -> None:
        asked.append(words)
        file = Path(words[words.index("--out") + 1]) / "report.md"
        file.parent.mkdir(parents=True)
        file.write_text("# Title\n\n| a table |\n", encoding="utf-8")

    for name in ("prepare", "make_pairs"):
        monkeypatch.setattr(Study, name, lambda study: None)
    monkeypatch.setattr(Study, "train", train)
    monkeypatch.setattr(alignment_report, "main", report)
    study = Study("weight/sft", "chats.jsonl", ["text.jsonl"], tmp_path, seeds=2, threads=1, log=lambda text: None)
    run(study, only)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"## {stage}" in text for stage in only) and text.count("| a table |") == len(asked)
    grpo = asked[0]
    assert grpo[:5] == ["--before", str(study.folder("reasoning", 0)), "--after", *study.folders("grpo")]
    assert ("--reward-model" in grpo) == ("reward" in only) and grpo[-2:] == ["--text", "text.jsonl"]
    assert "reward" not in only or "| held-out accuracy | 0.7 | 0.7 |" in text
