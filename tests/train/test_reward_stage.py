"""The reward stage: what it learns, what it reports on held-out pairs, and that it goes on as if it had not been stopped."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import FAST, call_main, write_jsonl

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train import train_reward
from train.checkpoints import list_checkpoints
from train.config import RewardModelConfig, RewardStageConfig, parse_command_line
from train.data import IGNORE, Batch
from train.metrics import read_jsonl
from train.reward_report import PairScores, calibration_error, confidence_bins, reward_facts, score_pairs
from train.statistics import wilson
from train.train_reward import reward, reward_terms

SMART: dict[str, Any] = {"attention_gate": "head", "residual_scale": True, "use_reasoning": True, "reasoning_steps": 2}
MIXTURE: dict[str, Any] = {"n_expert": 3, "n_expert_per_token": 2, "moe_intermediate_size": 24, "router_bias_rate": 0.01}


def pair_rows(count: int) -> list[dict[str, Any]]:
    """The preferred answer says the sum; now and then it is the shorter one."""
    return [
        {
            "prompt": f"{i} + {i + 1} = ?",
            "chosen": f"答案是 {2 * i + 1}。" + (" The answer is right." if i % 3 else ""),
            "rejected": f"小猫在窗边睡觉 {i}" + "，今天天气很好" * (i % 2),
        }
        for i in range(count)
    ]


@pytest.fixture
def chat_model(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> Path:
    tiny_model.save_pretrained(tmp_path / "sft", tiny_tokenizer)
    return tmp_path / "sft"


def words(folder: Path, chat_model: Path, out: str, *more: str) -> list[str]:
    if not (folder / "pairs.jsonl").is_file():
        write_jsonl(folder / "pairs.jsonl", pair_rows(60))
    return [
        *FAST,
        "data.max_length=96",
        "data.val_share=0.3",
        f"data.preference_file={folder / 'pairs.jsonl'}",
        f"data.store_dir={folder / 'store'}",
        f"model_dir={chat_model}",
        f"out_dir={folder / out}",
        "train.accumulation_steps=1",
        "train.log_every=1",
        *more,
    ]


def run(folder: Path, chat_model: Path, out: str, *more: str) -> list[str]:
    """What the stage says."""
    said: list[str] = []
    settings = parse_command_line(RewardStageConfig, words(folder, chat_model, out, *more))
    assert reward(settings, lambda text: said.append(str(text))) == 0
    return said


def test_it_begins_at_ln_2_and_learns_to_tell_the_answers_apart(tmp_path: Path, chat_model: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a head that does not begin at zero, pairs taken for each other's halves, scores read at the wrong token, and a
    checkpoint that does not score as the report says."""
    said = run(tmp_path, chat_model, "reward", "train.max_steps=25", "train.lr=4e-3", "train.warmup_steps=2")
    before, *rows = read_jsonl(tmp_path / "reward" / "metrics.jsonl")
    assert before["step"] == 0 and before["val_accuracy"] == 0.5 and before["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["accuracy"] == 0.5
    assert rows[-1]["val_accuracy"] > 0.9 and rows[-1]["val_loss"] < 0.4 and rows[-1]["accuracy"] > 0.9
    assert any("held-out accuracy" in text and "n = " in text for text in said)
    report = (tmp_path / "reward" / "report.md").read_text(encoding="utf-8")
    for part in ("held-out accuracy", "calibration", "length difference", "where it is shorter"):
        assert part in report
    assert "RewardModel.from_pretrained" in (tmp_path / "reward" / "README.md").read_text(encoding="utf-8")
    model = RewardModel.from_pretrained(tmp_path / "reward")
    fresh = [
        [{"role": "user", "content": "91 + 92 = ?"}, {"role": "assistant", "content": answer}]
        for answer in ("答案是 183。 The answer is right.", "小猫在窗边睡觉 91")
    ]
    better, worse = model.score(fresh, tiny_tokenizer).tolist()
    assert better > worse + 0.5


def test_the_plot_is_drawn(tmp_path: Path, chat_model: Path) -> None:
    """Guards: a report whose picture is missing."""
    pytest.importorskip("matplotlib")
    run(tmp_path, chat_model, "reward", "train.max_steps=2")
    assert (tmp_path / "reward" / "reward.png").stat().st_size > 10_000


@pytest.mark.parametrize("parts", [{}, {**SMART, "dropout": 0.1}, MIXTURE], ids=["plain", "smart", "mixture"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    parts: dict[str, Any], tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, seed: int
) -> None:
    """Guards: a head, an optimiser state or a place in the data that a checkpoint forgets, with every kind of trunk."""
    SmartHaoAI(replace(tiny_config, **parts)).save_pretrained(tmp_path / "sft", tiny_tokenizer)
    steps = ["train.checkpoint_every=2", "train.optimizer=muon", "train.max_steps=4", "data.val_share=0"]
    run(tmp_path, tmp_path / "sft", "run", *steps)
    straight = RewardModel.from_pretrained(tmp_path / "run").state_dict()
    assert straight["score_head.weight"].abs().sum() > 0
    # As a run that was killed after the checkpoint of step 2 leaves it.
    (tmp_path / "run" / "model.safetensors").unlink()
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    assert any("at step 2" in text for text in run(tmp_path, tmp_path / "sft", "run", *steps, "--resume"))
    resumed = RewardModel.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def batch_of(lengths: list[int], vocabulary: int) -> Batch:
    """Two rows of packed pairs; the last two tokens of each sequence are its answer."""
    ids = torch.randint(1, vocabulary, (2, 24))
    segments, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row in range(2):
        at = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, at : at + length] = number
            labels[row, at + length - 2 : at + length] = ids[row, at + length - 2 : at + length]
            at += length
    pairs = len(lengths)
    return Batch(
        {"input_ids": ids, "labels": labels, "segment_ids": segments}, {"pairs": float(pairs)}, 48, 48, {"margins": torch.zeros(pairs)}
    )


def test_the_terms_by_hand(tiny_config: HaoAIConfig, seed: int) -> None:
    """Guards: halves of pairs mixed up between rows, a margin or a centring pull of the wrong sign or weight."""
    model = RewardModel(tiny_config)
    torch.nn.init.normal_(model.score_head.weight)
    batch = batch_of([6, 5, 3, 9], tiny_config.vocab_size)
    batch.extra["margins"] = torch.tensor([0.0, 0.5, 1.0, 2.0])
    scores = []
    for row in range(2):
        at = 0
        for length in (6, 5, 3, 9):
            scores.append(model(batch.inputs["input_ids"][row : row + 1, at : at + length]).double())
            at += length
    chosen, rejected = torch.cat(scores).view(-1, 2).unbind(1)
    margin = 0.5 * batch.extra["margins"].double()
    expected = (torch.log1p(torch.exp(-(chosen - rejected - margin))) + 0.1 * (chosen + rejected) ** 2).sum()
    terms = {term.name: term for term in reward_terms(model, batch, RewardModelConfig(margin_coef=0.5, centre_coef=0.1))}
    torch.testing.assert_close(terms["loss"].total.double(), expected, rtol=1e-5, atol=1e-6)
    assert terms["accuracy"].metric and terms["accuracy"].total == (chosen > rejected).sum()
    assert all(term.weight == "pairs" for term in terms.values())
    pairs = score_pairs(model, [batch], "cpu")
    np.testing.assert_allclose(pairs.difference, (chosen - rejected).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert pairs.chosen_length.tolist() == [2] * 4 and model.training


def test_a_mixture_balances_its_experts(tiny_config: HaoAIConfig, seed: int) -> None:
    """Guards: the routers' loss that is lost with the language-model head."""
    model = RewardModel(replace(tiny_config, **MIXTURE)).train()
    terms = partial(reward_terms, settings=RewardModelConfig())(model, batch_of([6, 5, 3, 9], tiny_config.vocab_size))
    (aux,) = [term for term in terms if term.name == "aux_loss"]
    aux.total.backward()
    router: Any = model.expert_layers[0].gate
    assert aux.weight == "micro_batches" and router.weight.grad.abs().sum() > 0
    assert model.take_aux_loss() is None


def test_calibration_and_length_bias_by_hand() -> None:
    """Guards: bins, intervals and correlations that describe something else."""
    odds = math.log(0.8 / 0.2)
    small = math.log(0.6 / 0.4)
    difference = np.array([odds, odds, odds, -odds] * 3 + [small, -small] * 4)
    bins = confidence_bins(difference)
    assert [(b.count, b.right) for b in bins] == [(4, 2), (4, 2), (4, 3), (4, 3), (4, 3)]
    assert [round(b.confidence, 6) for b in bins] == [0.6, 0.6, 0.8, 0.8, 0.8]
    assert calibration_error(bins) == pytest.approx(0.4 * 0.1 + 0.6 * 0.05)
    assert [(b.count, b.right) for b in confidence_bins(np.zeros(7))] == [(2, 1), (2, 1), (1, 0), (1, 0), (1, 0)]
    length = np.arange(20)
    facts = reward_facts(PairScores(length * 0.1, np.zeros(20), length, np.full(20, 10)))
    low, high = wilson(19, 20)
    assert facts["held-out accuracy"] == f"0.950 (95% {low:.3f} to {high:.3f}, n = 20)"
    assert "+1.00" in facts["score difference against length difference"]
    assert facts["accuracy where it is shorter"].startswith("0.900") and "n = 10" in facts["accuracy where it is shorter"]
    assert facts["the longer answer is favoured"].startswith("by the data 0.474")


def test_what_the_command_refuses(
    tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a traceback, or a run that starts, where the settings or the data cannot work."""
    call = partial(call_main, train_reward.main, capsys=capsys, monkeypatch=monkeypatch)
    status, out, err = call(words(tmp_path, chat_model, "dry", "--dry-run", "train.max_steps=3"))
    assert status == 0 and "time" in out and not (tmp_path / "dry").exists(), err
    status, _, err = call(words(tmp_path, chat_model, "x", "reward.centre_coef=-1"))
    assert status == 2 and "reward.centre_coef" in err
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "same", "rejected": "same"}])
    status, out, err = call(words(tmp_path, chat_model, "x"))
    assert status == 1 and "pairs.jsonl:1" in out + err and "Traceback" not in err
