"""tools.alignment_report: what is compared with what, and how sure it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from tools import alignment_report
from tools.alignment_report import WORKING, Measured, changes, main, table
from train.config import UsageError
from train.statistics import bootstrap


def measured(passed: list[float], bits: float = 2.0) -> Measured:
    return Measured({"probes, greedy": passed, f"{WORKING}, valid": passed}, [[1, 2]] * len(passed), {"valid": bits})


def test_pairs_are_compared_prompt_by_prompt_and_seed_by_seed() -> None:
    """Guards: a seed measured against another seed's beginning, ties counted as wins, the sign of a cost."""
    before = [measured([0, 0, 1, 1], 2.0), measured([1, 1, 1, 1], 2.5)]
    after = [measured([1, 0, 1, 1], 2.1), measured([1, 1, 1, 0], 2.7)]
    scores = [np.array(values) for values in ([0.0, 0, 0, 0], [0.0, 0, 0, 0], [1.0, 1, 0, -1], [0.0, 0, 0, 0])]
    found = {change.name: change for change in changes(before, after, scores)}
    share = found["probes, greedy"]
    assert (share.before, share.after, share.seeds) == (0.75, 0.75, [0.25, -0.25])
    assert found["win rate by the reward model"].after == pytest.approx((2 + 0.5 + 0 + 4 * 0.5) / 8)
    assert found[f"win rate by {WORKING}, valid"].after == pytest.approx(0.5 + (0.5 - 0.5) / 8)
    bits = found["bits per byte, valid"]
    assert (bits.difference, bits.low, bits.high) == pytest.approx((0.15, 0.1, 0.2))
    one = {change.name: change for change in changes([before[0]], after)}
    assert one["probes, greedy"].seeds == [0.25, 0.25], "one model before stands for every seed"
    assert "| bits per byte, valid | 2.250 | 2.400 | +0.150 |" in table(list(found.values()))


def test_bootstrap_covers_the_truth_and_knows_certainty() -> None:
    """Guards: an interval that is too narrow because prompts of one seed are taken for independent seeds."""
    random = np.random.default_rng()
    covered = 0
    for _ in range(60):
        shift = random.normal(0, 0.2, size=(8, 1))  # seeds differ by more than prompts do
        low, high = bootstrap(0.3 + shift + random.normal(0, 0.5, size=(8, 100)), draws=300, seed=int(random.integers(2**31)))
        covered += low <= 0.3 <= high
    assert covered >= 44, covered  # of an interval that ignores seeds, about half
    assert bootstrap(np.ones((3, 5))) == (1.0, 1.0)
    low, high = bootstrap(np.array([[1.0, -1.0] * 20]))
    assert low < 0 < high


def test_from_the_command_line(
    tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the whole way from folders to the report, and that equal models are found equal."""
    torch.manual_seed(0)
    start, ends = str(tmp_path / "before"), [str(tmp_path / f"after/seed_{n}") for n in (0, 1)]
    for folder in (start, ends[1]):
        SmartHaoAI(tiny_config).save_pretrained(folder, tiny_tokenizer)
    shutil.copytree(start, ends[0])
    RewardModel(tiny_config).save_pretrained(tmp_path / "reward", tiny_tokenizer)
    text = tmp_path / "valid.jsonl"
    text.write_text('{"text": "The fox slept. Then it rained."}\n', encoding="utf-8")
    out = tmp_path / "report"
    more = ["--probes", "1", "--reward-model", str(tmp_path / "reward"), "--text", str(text), "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(alignment_report, "SAMPLED", replace(alignment_report.SAMPLED, max_new_tokens=8))
    main(["--before", start, "--after", *ends, *more])
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    names = [change["name"] for change in found["changes"]]
    assert names[-1] == "bits per byte, valid" and "win rate by the reward model" in names
    for change in found["changes"]:
        assert len(change["seeds"]) == 2 and change["seeds"][0] == 0.0, change
    for wrong, reason in (
        (["--before", start, start, "--after", *ends, ends[0], *more], "--before names 2 models, --after 3"),
        (["--before", start, "--after", start], "nothing is measured"),
        (["--before", start, "--after", start, "--reward-model", "x", "--text", str(text)], "give --probes N or --tasks"),
    ):
        with pytest.raises(UsageError, match=reason):
            main(wrong)
