"""The table of tools.parity: it passes for what is equal, and fails for what is not."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest
import torch
from torch import nn

from model import HaoAIConfig, SmartHaoAI
from tools import parity
from train.program import run_main

ARCHITECTURES = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"}


def call(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: parity.main(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_architecture_has_a_case() -> None:
    """Guards: an architecture that is written by nobody's test, or a case whose fields make another architecture."""
    kinds = {name: parity.model_type(case.config()) for name, case in parity.CASES.items()}
    assert set(kinds.values()) == ARCHITECTURES
    assert all(case.architecture == kinds[name] for name, case in parity.CASES.items())
    assert parity.WINDOW < parity.PROMPT + parity.NEW_TOKENS <= parity.TOKENS <= parity.SHAPE["max_position_embeddings"]


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: every architecture in both directions, with fresh weights; the exit status and what is printed."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(parity, "TOKENS", 16)  # beyond the window, and short: every token is a forward pass
    monkeypatch.setattr(parity, "NEW_TOKENS", 8)
    assert call(["--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and [row["case"] for row in result["rows"]] == list(parity.CASES) and result["versions"]["transformers"]
    for row in result["rows"]:
        assert row["ok"] and row["greedy"] and row["parameters"], row
        # Two implementations never agree to the last bit in all three columns: zeros would mean that nothing was compared.
        assert 0 < max(row["to_transformers"], row["from_transformers"], row["cached"]) < row["limit"]


def test_a_seed_repeats_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a failure that cannot be looked at again."""
    pytest.importorskip("transformers")
    outputs = []
    for _ in range(2):
        assert call(["--only", "qwen2", "--seed", "12"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "seed 12" in outputs[0]
    lines = outputs[0].splitlines()
    assert lines[0].split() == "case architecture ours -> transformers transformers -> ours cached greedy parameters limit".split()
    assert lines[1].split()[:2] == ["qwen2", "qwen2"] and lines[1].endswith("ok")


def test_a_difference_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a table that says ok whatever it measured."""
    pytest.importorskip("transformers")
    load = parity.load_theirs

    def disturbed(folder: Any) -> Any:
        model = load(folder)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.001)
        return model

    monkeypatch.setattr(parity, "load_theirs", disturbed)
    assert call(["--only", "llama untied", "--seed", "3"]) == 1
    assert "FAILED (seed 3)" in capsys.readouterr().out


def test_rows_judge_each_column() -> None:
    """Guards: a column that is printed and not judged; nan that is smaller than every limit."""
    good: dict[str, Any] = {
        "case": "x",
        "architecture": "llama",
        "seed": 1,
        "to_transformers": 1e-6,
        "from_transformers": 1e-6,
        "cached": 1e-6,
        "greedy": True,
        "parameters": True,
        "limit": 1e-5,
    }
    assert parity.Row(**good).ok
    for change in ({"to_transformers": 2e-5}, {"from_transformers": 2e-5}, {"cached": 2e-5}, {"greedy": False}, {"parameters": False}):
        assert not parity.Row(**{**good, **change}).ok
    assert parity.difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")
    assert parity.difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5


def test_ties_of_routers_are_seen() -> None:
    """Guards: a table that fails at random because two experts were equal, or that never looks."""
    model = SmartHaoAI(HaoAIConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=20, n_expert=4)).eval()
    parity.randomise(model)
    ids = torch.randint(20, (1, 8))
    with torch.no_grad():
        assert parity.router_gap(model, ids) > 0
        gate = model.expert_layers[1].gate.weight
        gate.copy_(gate[:1].expand(4, -1))
        assert parity.router_gap(model, ids) < parity.TIE
    dense = SmartHaoAI(HaoAIConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=20)).eval()
    assert parity.router_gap(dense, ids) == 1.0


def test_random_weights_reach_every_part() -> None:
    """Guards: a norm of ones or a bias of zeros, whose loss nobody would notice."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(50), "mlp": nn.ModuleDict({"gate": nn.Linear(50, 50), "up": nn.Linear(50, 50)})})
    parity.randomise(model)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert 0.5 <= float(values["norm.weight"].min()) < float(values["norm.weight"].max()) <= 1.5
    assert 0.4 < float(values["mlp.gate.weight"].std()) < 0.6 and 0.3 < float(values["mlp.up.bias"].std()) < 0.8
    assert 0.1 < float(values["mlp.up.weight"].std()) < 0.2


def test_without_transformers_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an ImportError where an install command belongs."""
    importing = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return importing(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert call([]) == 1
    shown = capsys.readouterr()
    assert ".[parity]" in shown.err and not shown.out


def test_an_unknown_case_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an empty table that passes."""
    assert call(["--only", "gpt2"]) == 1
    assert "qwen3_moe" in capsys.readouterr().err
