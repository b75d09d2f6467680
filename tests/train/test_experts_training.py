"""Training a mixture of experts: metrics, resuming, accumulation, and both optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import text_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train.config import DataConfig, OptimizationConfig, PretrainConfig
from train.data import Batch, make_source
from train.loop import FitResult, fit
from train.losses import Term, lm_loss
from train.metrics import OF_THE_MACHINE, read_jsonl
from train.store import open_store

Fit = Callable[..., tuple[SmartHaoAI, FitResult]]


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> Fit:
    """run(name, resume=..., loss=..., model={...}, **train settings) -> (model, result) in tmp_path / name."""
    data = DataConfig(store_dir=str(tmp_path / "store"), val_share=0.0, max_length=32)
    store = open_store(str(write_jsonl(tmp_path / "t.jsonl", text_rows(40))), tiny_tokenizer, "pretrain", data, lambda text: None)

    def run(name: str, resume: bool = False, loss: Any = lm_loss, model: Any = None, **train: Any) -> tuple[SmartHaoAI, FitResult]:
        options = {
            "precision": "fp32",
            "batch_size": 2,
            "max_steps": 6,
            "log_every": 2,
            "checkpoint_every": 0,
            "checkpoint_minutes": 0,
            "warmup_steps": 2,
            "lr": 3e-3,
            "keep_checkpoints": 50,
            **train,
        }
        settings = PretrainConfig(out_dir=str(tmp_path / name), data=data, train=OptimizationConfig(**options), resume=resume)
        shape = {
            "n_layer": 3,
            "n_head": 2,
            "n_kv_head": 1,
            "n_embd": 16,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "n_expert": 4,
            "moe_intermediate_size": 16,
            "moe_pattern": "EDE",
            "router_bias_rate": 0.01,
            "router_z_loss_coef": 0.001,
            **(model or {}),
        }
        torch.manual_seed(0)
        network = SmartHaoAI(HaoAIConfig(vocab_size=tiny_tokenizer.vocab_size, **shape))
        source = make_source(store, settings, tiny_tokenizer.pad_token_id)
        return network, fit(settings, network, source, loss, tokenizer=tiny_tokenizer, log=lambda text: None)

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_jsonl(folder / "metrics.jsonl")]


def biases(model: SmartHaoAI) -> torch.Tensor:
    found = [layer.choice_bias for layer in model.expert_layers]
    return torch.stack([bias for bias in found if bias is not None])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_writes_the_load_of_its_experts(run: Fit, tmp_path: Path, optimizer: str) -> None:
    """Guards: experts that starve unseen; a load that counts trial steps, or one micro-batch of several."""
    model, result = run(optimizer, optimizer=optimizer, accumulation_steps=2)
    rows = rows_of(tmp_path / optimizer)
    assert len(rows) == 3 and result.step == 6
    for row in rows:
        assert len(row["expert_load"]) == 2 and all(len(layer) == 4 for layer in row["expert_load"])
        for layer in row["expert_load"]:
            assert sum(layer) == pytest.approx(4, abs=0.01)  # 1 an expert: balanced
        flat = [share for layer in row["expert_load"] for share in layer]
        assert row["expert_load_max"] == max(flat) and row["expert_load_min"] == min(flat) and max(flat) > 1
        # Coefficient 0.01, balanced at k = 2, and a z-loss of about log(4) squared with 0.001.
        assert row["aux_loss"] == pytest.approx(0.02 + 0.001 * math.log(4) ** 2, rel=0.3)
    steps = biases(model) / 0.01
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)  # whole steps of the rate, one an optimiser step
    assert steps.abs().max() <= 6.001 and bool(steps.any())


def test_both_optimisers_learn(run: Fit, tmp_path: Path) -> None:
    """Guards: experts or routers that no optimiser moves."""
    for optimizer in ("adamw", "muon"):
        torch.manual_seed(0)
        model, _ = run(optimizer, optimizer=optimizer, max_steps=30, lr=1e-2)
        losses = [row["loss"] for row in rows_of(tmp_path / optimizer)]
        assert losses[-1] < losses[0] - 1
        fresh, _ = run(f"{optimizer}-start", optimizer=optimizer, max_steps=1, lr=1e-9)
        for (name, before), after in zip(fresh.named_parameters(), model.parameters(), strict=True):
            moved = (after - before).detach().flatten(1) if before.dim() == 3 else (after - before).detach()[None].flatten(1)
            assert bool((moved.norm(dim=1) > 1e-3).all()), name  # each expert of a stack by itself


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(run: Fit, tmp_path: Path, optimizer: str) -> None:
    """Guards: choice biases, loads or stacked momenta that a checkpoint forgets."""
    whole, _ = run("whole", optimizer=optimizer, max_steps=7, schedule="constant")
    run("parts", optimizer=optimizer, max_steps=7, schedule="constant", checkpoint_every=3)
    later = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    for folder in later[1:]:  # as if it had been stopped after step 3
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    resumed, result = run("parts", resume=True, optimizer=optimizer, max_steps=7, schedule="constant", checkpoint_every=3)
    assert result.step == 7
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert bool(biases(resumed).any()) and torch.equal(biases(resumed), biases(whole))
    assert rows_of(tmp_path / "parts")[-1]["expert_load"] == rows_of(tmp_path / "whole")[-1]["expert_load"]


def language_alone(model: torch.nn.Module, batch: Batch) -> list[Term]:
    return lm_loss(model, batch)[:1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_eight_rows_or_four_times_two(run: Fit, tmp_path: Path, optimizer: str) -> None:
    """Guards: what a micro-batch computes that depends on its size. The balance loss does (it is a statistic); so it is off here."""
    shape = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    options = {"optimizer": optimizer, "max_steps": 4, "log_every": 1, "model": shape}
    whole, _ = run("8x1", batch_size=8, accumulation_steps=1, **options)
    split, _ = run("2x4", batch_size=2, accumulation_steps=4, **options)
    for a, b in zip(rows_of(tmp_path / "8x1"), rows_of(tmp_path / "2x4"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"] and a["expert_load"] == b["expert_load"]
    assert torch.equal(biases(whole), biases(split))  # moved once a step, by the load of the whole step
    largest = max(float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), split.parameters(), strict=True))
    assert largest < 2e-5


def test_the_auxiliary_loss_takes_part(run: Fit) -> None:
    """Guards: a coefficient that is shown in the metrics and not trained with."""
    plain, _ = run("plain", loss=language_alone)
    with_terms, _ = run("terms", model={"router_aux_loss_coef": 1.0})
    layer = "layers.0.mlp.gate.weight"
    assert not torch.allclose(plain.state_dict()[layer], with_terms.state_dict()[layer], atol=1e-5)


def test_a_skipped_step_moves_no_bias(run: Fit, tmp_path: Path) -> None:
    """Guards: balancing by the load of a step that was refused."""
    calls = []

    def broken(model: torch.nn.Module, batch: Batch) -> list[Term]:
        calls.append(1)
        terms = lm_loss(model, batch)
        if len(calls) == 2:
            terms[0].total = terms[0].total * float("nan")
        return terms

    model, _ = run("broken", loss=broken, max_steps=2)
    whole, _ = run("whole", max_steps=2)
    assert len(calls) == 2 and rows_of(tmp_path / "broken")[-1]["skipped"] == 1
    assert float(biases(whole).abs().max()) == pytest.approx(0.02) and float(biases(model).abs().max()) == pytest.approx(0.01)
