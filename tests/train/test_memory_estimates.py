"""What --dry-run says of the memory, against what the run then takes: a table over stages and shapes.

python -m pytest -m drill tests/train/test_memory_estimates.py -s
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from training_helpers import ROOT, run_stage

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train.config import DataConfig, TokenizerConfig, TokenizerStageConfig
from train.metrics import read_jsonl
from train.train_tokenizer import train_tokenizer

SAMPLES = ROOT / "training_data"
NANO, MINI = HaoAIConfig.preset("nano"), HaoAIConfig.preset("mini")
EXPERTS = ["model.preset=nano", "model.n_expert=8", "model.n_expert_per_token=2"]
WIDE = ["model.preset=none", "model.n_layer=4", "model.n_head=8", "model.n_embd=768", "model.vocab_size=16384"]
CASES: dict[str, tuple[str, list[str]]] = {
    "pretrain nano": ("pretrain", ["model.preset=nano", "data.max_length=256", "train.batch_size=16"]),
    "pretrain nano, muon": ("pretrain", ["model.preset=nano", "train.optimizer=muon", "data.max_length=256"]),
    "pretrain nano, 64 rows at once": ("pretrain", ["model.preset=nano", "train.batch_size=64", "train.micro_batch=64"]),
    "pretrain nano, 64 rows, blocks again": (
        "pretrain",
        ["model.preset=nano", "train.batch_size=64", "train.micro_batch=64", "train.activation_checkpointing=true"],
    ),
    "pretrain nano, bf16": ("pretrain", ["model.preset=nano", "train.precision=bf16"]),
    "pretrain mini": ("pretrain", ["model.preset=mini", "data.max_length=512", "train.batch_size=8"]),
    "pretrain mini, accumulation": ("pretrain", ["model.preset=mini", "train.batch_size=4", "train.accumulation_steps=4"]),
    "pretrain wide, 4 layers": ("pretrain", [*WIDE, "data.max_length=256"]),
    "pretrain 8 experts": ("pretrain", EXPERTS),
    "pretrain nano-smart": ("pretrain", ["model.preset=nano-smart", "model.use_reasoning=true"]),
    "sft mini": ("sft", ["model_dir=MINI"]),
    "lora mini": ("lora", ["model_dir=MINI", "lora.r=8"]),
    "dpo nano": ("dpo", ["model_dir=NANO"]),
    "dpo mini": ("dpo", ["model_dir=MINI", "train.batch_size=8"]),
    "dpo mini, adapter": ("dpo", ["model_dir=MINI", "lora.r=8", "train.batch_size=8"]),
    "reward mini": ("reward", ["model_dir=MINI", "train.batch_size=8"]),
    "ppo nano": ("ppo", ["model_dir=NANO", "reward_model_dir=REWARD"]),
    "ppo mini, adapter": ("ppo", ["model_dir=MINI", "reward_model_dir=REWARD", "lora.r=8"]),
    "grpo mini": ("grpo", ["model_dir=MINI", "rewards.length=1"]),
    "distill nano from mini": ("distill", ["model.preset=nano", "teacher_dir=MINI", "data.max_length=256"]),
    "distill nano, 32 kept": ("distill", ["model.preset=nano", "teacher_dir=MINI", "distill.top_k=32", "data.max_length=256"]),
}
COMMON = ["train.threads=1", "train.max_steps=2", "train.eval_tokens=4000", "train.compile=off", "train.precision=fp32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models of two sizes, a reward model and a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    data = DataConfig(pretrain_file=str(SAMPLES / "pretrain"))
    settings = TokenizerStageConfig(out_dir=str(folder / "tokenizer"), data=data, tokenizer=TokenizerConfig(vocab_size=2048))
    tokenizer: BPETokenizer = train_tokenizer(settings, lambda text: None)
    for name, shape in (("NANO", NANO), ("MINI", MINI)):
        torch.manual_seed(0)
        SmartHaoAI(shape).save_pretrained(folder / name, tokenizer)
    reward = RewardModel(NANO)
    torch.nn.init.normal_(reward.score_head.weight)
    reward.save_pretrained(folder / "REWARD", tokenizer)
    return folder


def measured(models: Path, folder: Path, stage: str, words: list[str]) -> tuple[float, float, float]:
    """MiB: of the plan before anything is allocated, measured by --dry-run, and the peak of the run."""
    words = [re.sub(r"(NANO|MINI|REWARD)$", lambda found: str(models / found[0]), word) for word in words]
    own = [] if any(word.startswith("model_dir=") for word in words) else [f"tokenizer_dir={models / 'tokenizer'}"]
    words = [*COMMON, *own, f"data.store_dir={models / 'store'}", f"out_dir={folder / 'run'}", *words]
    done = run_stage(f"train.train_{stage}", *words, "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    plan = float(re.search(r"memory +about ([\d,]+) MiB", done.stdout)[1].replace(",", ""))
    dry = float(re.search(r"peak +([\d,]+) MiB", done.stdout)[1].replace(",", ""))
    for kept in (models / "store").glob("teacher*"):
        shutil.rmtree(kept)  # with it the run would need no teacher
    done = run_stage(f"train.train_{stage}", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return plan, dry, read_jsonl(folder / "run" / "metrics.jsonl")[-1]["peak_memory_mb"]


@pytest.mark.drill
@pytest.mark.parametrize("name", CASES)
def test_a_row_of_the_table(models: Path, tmp_path: Path, name: str) -> None:
    """Guards a dry run that promises a run for which memory does not suffice."""
    plan, dry, run = measured(models, tmp_path, *CASES[name])
    print(
        f"\n{name:<38}plan {plan:6,.0f}   dry run {dry:6,.0f}   run {run:6,.0f} MiB   {dry / run - 1:+.1%} ({plan / run - 1:+.1%})",
        flush=True,
    )
    assert dry == pytest.approx(run, rel=0.15)


@pytest.mark.slow
def test_one_row_of_the_table(models: Path, tmp_path: Path) -> None:
    """Guards the same in CI, for the stage whose pairs the plan once did not count."""
    _, dry, run = measured(models, tmp_path, *CASES["dpo nano"])
    assert dry == pytest.approx(run, rel=0.15)
