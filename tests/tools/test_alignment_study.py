"""tools.alignment_study: the commands that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.alignment_study import Study
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
