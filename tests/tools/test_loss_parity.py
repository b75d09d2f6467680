"""The table of tools.loss_parity: it covers every loss, fails for what differs, and says what it could not compare with."""

from __future__ import annotations

import importlib.util
import inspect
import json
from typing import Any

import pytest
import torch

from tools import loss_cases, loss_parity, loss_references
from tools.loss_cases import HAND, TORCHRL, TRL
from train import losses
from train.program import run_main


def call(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: loss_parity.main(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name, *rest))


def test_every_loss_is_compared() -> None:
    """Guards: a new loss that nobody holds against anything."""
    public = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__module__ == losses.__name__ and not name.startswith("_") and inspect.signature(function).return_annotation == "Tensor"
    }
    source = inspect.getsource(loss_cases)
    helpers = {"log_odds"}  # part of orpo_loss
    assert {name for name in public if f"losses.{name}" not in source} == helpers
    assert all(f"losses.{name}" in source for name in ("gae", "grpo_weights"))
    by_hand = {case.name for case in loss_cases.cases() if case.source == HAND}
    assert {case.name for case in loss_cases.cases()} - by_hand == {"grpo_loss + k3 * ratio"}


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the whole command by hand-written references alone, where no package is installed, which must be said."""
    without(monkeypatch, "trl", "torchrl")
    assert call(["--trials", "2", "--seed", "3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    expected = [case.name for case in loss_cases.cases() if case.source == HAND]
    assert [line.split("  ")[0] for line in shown[1 : 1 + len(expected)]] == expected
    assert all(line.endswith(" ok") and HAND in line for line in shown[1 : 1 + len(expected)])
    assert "seed 3" in shown[-2] and shown[-1].startswith("not compared with trl and torchrl")


@pytest.mark.parametrize("package", [TRL, TORCHRL])
def test_json(package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: figures that a program cannot read; a package that is installed and left out."""
    pytest.importorskip(package)
    other = TORCHRL if package == TRL else TRL
    without(monkeypatch, other)
    assert call(["--trials", "1", "--seed", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["seed"] == 4 and package in result["versions"] and result["missing"] == [other]
    named = [row for row in result["rows"] if row["reference"].startswith(f"{package}: ")]
    assert len(named) == len([case for case in loss_cases.cases() if case.source == package]) >= 4
    for row in result["rows"]:
        assert row["ok"] and 0 <= row["value"] <= result["limit"] and row["trials"] == 1
    assert any(row["value"] > 0 for row in result["rows"])  # fp32 against float64 never agrees to the last bit everywhere


IN_FP32 = {("orpo_loss", TRL), ("grpo_loss sapo", TRL), ("gae", TORCHRL)}  # a package that rounds some constant or step


@pytest.mark.parametrize("package", [TRL, TORCHRL])
def test_references_agree_in_float64(package: str, seed: int) -> None:
    """Guards: a reference by hand that is written from ours, or is float64 in name only, so that 1e-7 hides a wrong constant."""
    pytest.importorskip(package)
    every = loss_cases.cases()
    by_hand = {case.name: case for case in every if case.source == HAND}
    for case in every:
        if case.source != package or case.name not in by_hand:
            continue
        drawn = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in case.make().items()}
        limit = 1e-6 if (case.name, package) in IN_FP32 else 1e-13
        assert loss_parity.difference(by_hand[case.name].theirs(drawn), case.theirs(drawn)) < limit, case.name


def test_a_difference_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a table that says ok whatever it measured."""
    without(monkeypatch, "trl", "torchrl")
    right = loss_references.simpo
    monkeypatch.setattr(loss_references, "simpo", lambda *arguments: right(*arguments) * (1 + 1e-5))
    assert call(["--trials", "1", "--seed", "3"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1 and failed[0].startswith("simpo_loss")


def test_a_reference_that_cannot_be_called_fails_its_row() -> None:
    """Guards: another version of a package that silently compares nothing, or hides the rows after it."""

    def changed(_: Any) -> torch.Tensor:
        raise AttributeError("no attribute 'odds_ratio_loss'")

    case = next(case for case in loss_cases.cases() if case.name == "orpo_loss")
    row = loss_parity.compare(loss_cases.Case("x", TRL, "words", case.make, "logs", case.ours, changed), 2, 1)
    assert not row.ok and "odds_ratio_loss" in row.failed and "FAILED AttributeError" in loss_parity.table([row])


def test_rows_judge_both_columns() -> None:
    """Guards: nan or another shape that passes; a gradient that is printed and not judged."""
    assert loss_parity.difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")
    assert loss_parity.difference(torch.ones(1), torch.ones(2)) == float("inf")
    assert loss_parity.difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5
    assert loss_parity.Row("x", "y", 1, 1e-7, 1e-7).ok and loss_parity.Row("x", "y", 1, 1e-7, None).ok
    for wrong in ((1e-5, 1e-7), (1e-7, 1e-5), (float("inf"), None)):
        assert not loss_parity.Row("x", "y", 1, *wrong).ok


def test_no_trials_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a table of zeros that passes."""
    assert call(["--trials", "0"]) == 1
    assert "--trials 0" in capsys.readouterr().err
