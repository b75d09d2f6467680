"""train_rlhf.py: words for two stages, one command from pairs to a better policy, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train_rlhf
from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train.config import RLHFConfig, UsageError, parse_command_line
from train.metrics import read_jsonl
from train_rlhf import for_stages, rlhf


def test_words_reach_the_stages_that_know_them() -> None:
    """Guards against a setting that is lost, or reaches the wrong one of two stages with equal names."""
    words = "model_dir=a data.max_length=99 rollout.prompts=3 ppo.clip=0.3 reward.centre_coef=0 rewards.format=1 lora.r=4 out_dir=x".split()
    settings = parse_command_line(RLHFConfig, for_stages([*words, "ppo.train.lr=1e-5", "reward.train.lr=1e-3", "--resume"]))
    reward, ppo = settings.reward, settings.ppo
    assert reward.model_dir == ppo.model_dir == "a" and reward.data.max_length == ppo.data.max_length == 99
    assert (ppo.rollout.prompts, ppo.ppo.clip, reward.reward.centre_coef, ppo.rewards) == (3, 0.3, 0.0, {"format": "1"})
    assert (reward.lora.r, ppo.lora.r, reward.train.lr, ppo.train.lr) == (0, 4, 1e-3, 1e-5)
    assert (Path(reward.out_dir), Path(ppo.out_dir)) == (Path("x/reward"), Path("x/ppo")) and settings.resume
    with pytest.raises(UsageError, match="unknown setting"):
        parse_command_line(RLHFConfig, for_stages(["rolout.prompts=3"]))


def test_one_command_and_going_on(
    tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the chain: pairs, reward model, PPO with that reward model; --resume trains nothing twice."""
    import json

    torch.manual_seed(1)
    SmartHaoAI(tiny_config).save_pretrained(tmp_path / "sft", tiny_tokenizer)
    pairs = [{"prompt": f"{n} + 1 = ?", "chosen": f"{n + 1}", "rejected": f"{n} 我们 散步"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    words = [
        *(f"{name}={tmp_path / folder}" for name, folder in (("model_dir", "sft"), ("out_dir", "out"), ("data.store_dir", "store"))),
        *(f"data.{name}_file={tmp_path / 'pairs.jsonl'}" for name in ("preference", "prompt")),
        *"train.precision=fp32 train.threads=1 data.max_length=96 train.max_steps=2 train.batch_size=4 train.log_every=1".split(),
        *"train.eval_every=0 rollout.prompts=8 rollout.max_new_tokens=8 rollout.eval_prompts=4".split(),
    ]
    monkeypatch.setattr(train_rlhf, "reward", None)  # what is wrong is said before the first stage
    out = tmp_path / "out" / "reward"
    for wrong, message in ((f"ppo.out_dir={out}", "are both"), ("lora.targets=nose", "nose")):
        with pytest.raises((UsageError, ValueError), match=message):
            rlhf(parse_command_line(RLHFConfig, for_stages([*words, "lora.r=2", wrong])))
    assert not out.exists()
    monkeypatch.undo()
    said: list[str] = []
    log: Any = lambda text: said.append(str(text))  # noqa: E731
    assert rlhf(parse_command_line(RLHFConfig, for_stages(words)), log) == 0
    RewardModel.from_pretrained(tmp_path / "out" / "reward")
    rows = [row for row in read_jsonl(tmp_path / "out" / "ppo" / "metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["ratio"] == 1.0 and rows[0]["kl"] == 0.0
    assert rows[0]["reward_model"] is not None
    with pytest.raises(UsageError, match="already holds a run"):
        rlhf(parse_command_line(RLHFConfig, for_stages(words)), log)
    (tmp_path / "out" / "ppo" / "report.md").unlink()  # as if PPO had been stopped after its last checkpoint
    monkeypatch.setattr(train_rlhf, "reward", None)  # must not run again
    assert rlhf(parse_command_line(RLHFConfig, for_stages([*words, "--resume"])), log) == 0
    assert (tmp_path / "out" / "ppo" / "report.md").is_file() and any("used as it is" in line for line in said)
