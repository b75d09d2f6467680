"""Every alignment stage, killed by SIGKILL and resumed by the same command, ends bit for bit where the uninterrupted run ends."""

from __future__ import annotations

import importlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import FAST, call_main, chat_rows, pair_rows, run_python, write_jsonl

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train.checkpoints import list_checkpoints, load_state, newest_checkpoint
from train.metrics import EVENTS_FILE, METRICS_FILE, OF_THE_MACHINE, read_jsonl

pytestmark = pytest.mark.slow

# Runs a stage as `python -m` does; it dies without any clean-up in update number `at` of the process (its gradients are there, the
# weights are not changed yet), when `at` reference batches were measured, or when the finished model is about to be written.
DRIVER = """
import os, runpy, sys
import train.loop, train.pairs
import train.stage

module, point, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = [module, *sys.argv[4:]]
calls = []

def dies(original):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), 9) if os.name != "nt" else os._exit(137)
        return original(*args, **kwargs)
    return call

if point == "update":
    train.loop._Fit._update = dies(train.loop._Fit._update)
elif point == "batch":
    train.pairs.PackedPairs._batch = dies(train.pairs.PackedPairs._batch)
elif point == "finish":
    train.stage.save_pretrained = dies(train.stage.save_pretrained)
runpy.run_module(module, run_name="__main__")
"""
Stage = Callable[[str, list[str]], str]
TIMES = {*OF_THE_MACHINE, "preparing"}
STEPS, EVERY = 8, 3
ROLLOUT = [
    "rollout.prompts=2",
    "rollout.samples=4",
    "rollout.max_new_tokens=10",
    "rollout.eval_prompts=3",
    "train.batch_size=3",
    "train.accumulation_steps=2",
    "data.val_share=0.2",
    "rewards.overlap=1",
    "rewards.variety=1",
]  # 8 answers in 3 batches, twice: a rollout is 3 steps
STAGES: dict[str, tuple[str, list[str]]] = {
    "sft on reasoning": (
        "train.train_sft",
        ["data.sft_file=[{files}/thoughts.jsonl, {{path: {files}/chats.jsonl, weight: 2}}]", "train.optimizer=muon", "model.dropout=0.1"],
    ),
    "lora": ("train.train_lora", ["data.sft_file={files}/chats.jsonl", "lora.r=4", "lora.dropout=0.1", "lora.dora=true"]),
    "reward": ("train.train_reward", ["data.preference_file={files}/pairs.jsonl", "model.dropout=0.1"]),
    "dpo": ("train.train_dpo", ["data.preference_file={files}/pairs.jsonl", "model.dropout=0.1", "train.accumulation_steps=2"]),
    "kto": ("train.train_dpo", ["data.preference_file={files}/judged.jsonl", "dpo.loss=kto", "lora.r=4"]),
    "ppo": (
        "train.train_ppo",
        [*ROLLOUT, "data.prompt_file={files}/chats.jsonl", "reward_model_dir={files}/reward", "ppo.epochs=2", "ppo.kl_target=0.5"],
    ),
    "grpo": (
        "train.train_grpo",
        [*ROLLOUT, "data.prompt_file={files}/chats.jsonl", "grpo.epochs=2", "grpo.beta=0.05", "lora.r=4"],
    ),
    "distilled logits": (
        "train.train_distill",
        ["teacher_dir={files}/sft", "data.sft_file={files}/chats.jsonl", "distill.top_k=8", "distill.temperature=1.5", "model.dropout=0.1"],
    ),
    "distilled traces": (
        "train.train_distill",
        ["teacher_dir=none", "data.sft_file={files}/thoughts.jsonl", "distill.structure_weight=5", "model.dropout=0.1"],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BPETokenizer) -> Path:
    """Data, a chat model of one layer in `sft`, and a reward model on it."""
    folder = tmp_path_factory.mktemp("files")
    shape = HaoAIConfig(
        vocab_size=tiny_tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, intermediate_size=64, max_position_embeddings=128
    )
    torch.manual_seed(1)
    SmartHaoAI(shape).save_pretrained(folder / "sft", tiny_tokenizer)
    SmartHaoAI(shape).save_pretrained(folder / "other", tiny_tokenizer)
    judge = RewardModel(shape)
    torch.nn.init.normal_(judge.score_head.weight, std=0.3)
    judge.save_pretrained(folder / "reward", tiny_tokenizer)
    write_jsonl(folder / "chats.jsonl", chat_rows(40))
    write_jsonl(folder / "pairs.jsonl", pair_rows(30))
    judged = [{"prompt": f"{i} + 1 = ?", "completion": f"{i + 1 + i % 2}", "label": i % 2 == 0} for i in range(30)]
    write_jsonl(folder / "judged.jsonl", judged)
    thoughts = [{"prompt": f"{i} + 2 = ?", "response": f"<think>{i} + 1 = {i + 1}</think>{i + 2}"} for i in range(30)]
    write_jsonl(folder / "thoughts.jsonl", thoughts)
    return folder


def words(files: Path, out: Path, more: list[str]) -> list[str]:
    """Settings of a small run; each run has token stores, reference and teacher caches of its own."""
    return [
        *FAST,
        f"model_dir={files / 'sft'}",
        f"out_dir={out}",
        f"data.store_dir={out}_store",
        "data.max_length=96",
        "data.val_share=0.1",
        "train.max_steps=" + str(STEPS),
        "train.checkpoint_every=" + str(EVERY),
        "train.keep_checkpoints=99",
        "train.log_every=1",
        "train.eval_every=4",
        "train.eval_first=true",
        "train.lr=3e-3",
        *(word.format(files=files) for word in more),
    ]


def killed(folder: Path, module: str, point: str, at: int, settings: list[str]) -> None:
    """Run the stage until it dies."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    died = run_python(str(driver), module, point, str(at), *settings, cwd=folder)
    assert died.returncode in (-9, 137), (died.returncode, died.stdout, died.stderr)


@pytest.fixture
def stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Stage:
    """stage(module, words) runs the command to its end in this process and returns what it printed."""

    def run(module: str, settings: list[str]) -> str:
        status, out, err = call_main(importlib.import_module(module).main, settings, capsys, monkeypatch)
        assert status == 0, out + err
        return out

    return run


def logged(file: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_jsonl(file)]


def state_of(checkpoint: Path) -> dict[str, Any]:
    state = load_state(checkpoint)
    for part in ("progress", "window"):
        state[part] = {name: value for name, value in state[part].items() if name not in TIMES}
    return state


def assert_equal(one: Path, two: Path) -> None:
    """The finished models, all rows of both logs, and the last checkpoints: weights, optimisers, random states and cursors with the
    answers of a rollout."""
    for name in (METRICS_FILE, EVENTS_FILE):
        assert logged(one / name) == logged(two / name), name
    last = [newest_checkpoint(folder) for folder in (one, two)]
    assert last[0] is not None and last[1] is not None and last[0].name == last[1].name
    assert state_of(last[0]) == state_of(last[1])
    weights = [file.relative_to(one) for folder in (one, last[0]) for file in folder.glob("*.safetensors")]
    assert len(weights) == 3, "the model (or its adapter) twice, and the optimisers"
    for file in weights:
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])] == [], file


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_resumes_exactly(name: str, files: Path, tmp_path: Path, stage: Stage, seed: int) -> None:
    """Guards what a checkpoint might forget of a stage: cursor, rollout buffer, controller, value head, adapter, references that are
    taken from the trained model instead of the first one, random state, half-written caches."""
    module, more = STAGES[name]
    stage(module, words(files, tmp_path / "whole", more))
    at = random.Random(seed).randint(EVERY + 2, STEPS)  # not the step behind the checkpoint: its row has to go again
    killed(tmp_path, module, "update", at, words(files, tmp_path / "killed", more))
    left = newest_checkpoint(tmp_path / "killed")
    assert left is not None and load_state(left)["step"] == (at - 1) // EVERY * EVERY
    assert not (tmp_path / "killed" / "report.md").exists()
    stage(module, [*words(files, tmp_path / "killed", more), "resume=true"])
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in read_jsonl(tmp_path / "killed" / METRICS_FILE)] == list(range(STEPS + 1))
    assert len({row["loss"] for row in read_jsonl(tmp_path / "killed" / METRICS_FILE)}) > STEPS // 2, "it learned nothing to compare"


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_kill_between_the_passes_over_a_rollout(name: str, files: Path, tmp_path: Path, stage: Stage) -> None:
    """Guards answers, old log-probabilities and the order of prompts when a checkpoint stands in the middle of a rollout."""
    module, more = STAGES[name]
    more = [*more, "train.checkpoint_every=1", "ppo.stop_kl=0" if name == "ppo" else "grpo.resample=1"]
    stage(module, words(files, tmp_path / "whole", more))
    killed(tmp_path, module, "update", 6, words(files, tmp_path / "killed", more))
    cursor = load_state(list_checkpoints(tmp_path / "killed")[-1])["cursor"]
    assert cursor["round"] == 1 and cursor["position"] == 4 and len(cursor["samples"]) == 8, "two steps of three were taken"
    stage(module, [*words(files, tmp_path / "killed", more), "--resume"])
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    one, two = ([state_of(path)["cursor"] for path in list_checkpoints(tmp_path / run)] for run in ("whole", "killed"))
    assert one == two and len(one) == STEPS
    asked = [tuple(sample["prompt"] for sample in cursor["samples"]) for cursor in one]
    assert len(set(asked)) == 3, "three rollouts, each with questions of its own"


@pytest.mark.parametrize(("name", "point", "at"), [("dpo", "batch", 3), ("distilled logits", "update", 2), ("ppo", "update", 2)])
def test_a_kill_before_the_first_checkpoint(name: str, point: str, at: int, files: Path, tmp_path: Path, stage: Stage) -> None:
    """Guards against a cache that was begun and is taken for a whole one, and rows of an attempt of which nothing is left."""
    module, more = STAGES[name]
    stage(module, words(files, tmp_path / "whole", more))
    killed(tmp_path, module, point, at, words(files, tmp_path / "killed", more))
    assert newest_checkpoint(tmp_path / "killed") is None
    stage(module, [*words(files, tmp_path / "killed", more), "--resume"])
    assert_equal(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("point", ["update", "finish"])
def test_rlhf_goes_on_in_its_second_stage(point: str, files: Path, tmp_path: Path, stage: Stage) -> None:
    """Guards the chain: the finished reward model is used as it is, PPO goes on within its rollout; a stage that was killed before
    its model was written is not taken for finished."""
    more = [*ROLLOUT, "data.preference_file={files}/pairs.jsonl", "data.prompt_file={files}/chats.jsonl"]

    def settings(name: str) -> list[str]:
        return words(files, tmp_path / name, more)

    stage("train_rlhf", settings("whole"))
    killed(tmp_path, "train_rlhf", point, STEPS + 6 if point == "update" else 1, settings("killed"))
    assert (tmp_path / "killed" / "reward" / "model.safetensors").is_file() == (point == "update")
    said = stage("train_rlhf", [*settings("killed"), "resume=true"])
    assert ("used as it is" in said) == (point == "update")
    for part in ("reward", "ppo"):
        assert_equal(tmp_path / "whole" / part, tmp_path / "killed" / part)


def test_newest_stays_what_it_was(files: Path, tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a chat model that is finished between the kill and --resume: it must become neither base nor reference of the run."""
    module, more = STAGES["dpo"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files / "sft", tmp_path / "weight" / "sft")
    stage(module, words(files, tmp_path / "whole", more))
    settings = [word for word in words(files, tmp_path / "killed", more) if not word.startswith("model_dir=")]
    killed(tmp_path, module, "update", 5, settings)
    shutil.copytree(files / "other", tmp_path / "weight" / "reasoning")
    assert "weight/reasoning" not in stage(module, [*settings, "--resume"])
    assert_equal(tmp_path / "whole", tmp_path / "killed")
