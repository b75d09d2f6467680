"""What is measured before the first step: rows at once, and whether blocks are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import HaoAIConfig, SmartHaoAI
from train import speed
from train.data import Batch


def batch_of(rows: int, length: int, group: int = 1) -> Batch:
    ids = torch.arange(rows * length).view(rows, length)
    return Batch({"input_ids": ids, "labels": ids}, {"tokens": 1.0}, rows * length, rows * length, {"each": ids[:, 0]}, group)


@pytest.mark.parametrize(("rows", "group", "count"), [(3, 1, 3), (7, 2, 2), (4, 1, 2), (1, 2, 4), (99, 1, 1), (2, 0, 1)])
def test_split(rows: int, group: int, count: int) -> None:
    """Guards rows that are lost or torn from their group."""
    whole = batch_of(7 if group != 2 else 8, 4, group)
    pieces = whole.split(rows)
    assert len(pieces) == count
    assert len({len(piece.inputs["input_ids"]) for piece in pieces[:-1]}) <= 1
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([piece.inputs[name] for piece in pieces]), whole.inputs[name])
    assert torch.equal(torch.cat([piece.extra["each"] for piece in pieces]), whole.extra["each"])
    assert all(not group or len(piece.inputs["input_ids"]) % group == 0 or piece is pieces[-1] for piece in pieces)


@pytest.mark.parametrize(("costs", "best"), [({8: 8.0, 4: 3.0, 2: 2.0}, 4), ({8: 8.0, 4: 3.96, 2: 2.0}, 2), ({8: 7.0, 4: 4.0, 2: 3.0}, 8)])
def test_the_fastest_number_of_rows(monkeypatch: pytest.MonkeyPatch, costs: dict[int, float], best: int) -> None:
    """Guards a choice by the time of a piece instead of all pieces, by the first round, or of a larger one within the noise."""
    calls: list[int] = []

    def timed(work: Callable[[], object], device: str) -> float:
        work()
        return 100.0 if len(calls) <= 7 else costs[calls[-1]]

    monkeypatch.setattr(speed, "timed", timed)
    monkeypatch.setattr(speed, "PASSES", (128, 256, 512))
    assert speed.best_positions(batch_of(8, 64), lambda part: calls.append(len(part.inputs["input_ids"])), "cpu") == best * 64
    assert set(calls) == {8, 4, 2}


def test_rows_that_belong_together_are_not_tried_apart() -> None:
    """Guards statistics of a batch that would change with its pieces."""
    seen: list[int] = []
    assert speed.best_positions(batch_of(8, 1024, group=0), lambda part: seen.append(0), "cpu") == 8 * 1024
    assert not seen


def test_without_a_compiler_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: HaoAIConfig) -> None:
    """Guards a run that ends, or blocks that stay half compiled, where there is no C++ compiler."""
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before would need no compiler
    model = SmartHaoAI(tiny_config)
    used, said = speed.try_compiled(model, [batch_of(1, 4)], lambda batch: None, "cpu")
    assert not used and "not compiled" in said and "/nonexistent" in said and "install a C++ compiler" in said
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_compiled_blocks_that_are_not_faster_are_not_used(monkeypatch: pytest.MonkeyPatch, tiny_config: HaoAIConfig) -> None:
    """Guards a warm-up that is paid for nothing in every step to come."""
    monkeypatch.setattr(speed, "compiler_problem", lambda: None)
    monkeypatch.setattr(speed, "timed", lambda work, device: 1.0)
    model = SmartHaoAI(tiny_config)
    used, said = speed.try_compiled(model, [batch_of(1, 4)], lambda batch: None, "cpu")
    assert not used and said.endswith("not used")
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_an_error_while_compiling_is_told_and_undone(monkeypatch: pytest.MonkeyPatch, tiny_config: HaoAIConfig) -> None:
    """Guards a long run that ends because of a compiler's bug."""
    monkeypatch.setattr(speed, "compiler_problem", lambda: None)

    def broken(batch: Batch) -> None:
        raise RuntimeError("no such instruction\nmore")

    model = SmartHaoAI(tiny_config)
    used, said = speed.try_compiled(model, [batch_of(1, 4)], broken, "cpu")
    assert not used and "RuntimeError: no such instruction" in said and "more" not in said
    assert all(module._compiled_call_impl is None for module in model.modules())
