"""Trouble on the way: gradients that are cut back, loss spikes, the way back to a good checkpoint, and the early end."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_helpers import Runs, changed_at, largest_difference

from model import BPETokenizer, SmartHaoAI
from train.config import UsageError
from train.data import Batch
from train.losses import Term, lm_loss
from train.metrics import read_jsonl
from train.stability import SPIKE, Watch

NAN = float("nan")


@pytest.fixture
def runs(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> Runs:
    return Runs(tmp_path, tiny_tokenizer)


def kinds(runs: Runs, name: str) -> list[tuple[int, str]]:
    return [(event["step"], event["event"]) for event in runs.events(name)]


def spoilt(loss: torch.Tensor) -> torch.Tensor:
    return loss * NAN


# ---------------------------------------------------------------- watching


def test_the_published_rule_of_clipping() -> None:
    """Guards the mean and variance of the warm-up, the limit beyond the threshold, and statistics that a spike would spoil."""
    norms = np.abs(np.random.default_rng().normal(1.0, 0.1, 200))
    norms[[60, 120, 121]] = 9.0, 5.0, 30.0
    watch, threshold = Watch(), 2.5
    limits = [watch.norm_limit(float(norm), threshold) for norm in norms]
    assert limits[:25] == norms[:25].tolist()
    mean, variance = norms[:25].mean(), norms[:25].var()
    for norm, limit in zip(norms[25:], limits[25:], strict=True):
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        expected = mean + threshold**2 / z * math.sqrt(variance) if z > threshold else norm
        assert limit == pytest.approx(expected, rel=1e-6)
        mean = 0.97 * mean + 0.03 * expected
        variance = 0.97 * variance + 0.03 * (expected - mean) ** 2
    assert max(limits) < 2.0 and abs(mean - 1.0) < 0.2


def test_spikes_stand_out_and_noise_does_not() -> None:
    """Guards false alarms in a healthy falling and noisy loss, one after the level has changed for good, and a spike that hides the
    next."""
    random = np.random.default_rng()
    healthy = 3 + 5 * np.exp(-np.arange(1000) / 100) + random.normal(0, 0.15, 1000)
    watch = Watch()
    assert sum(watch.deviations(float(loss)) > SPIKE for loss in healthy) == 0
    assert all(watch.deviations(6.5 + 0.1 * n) > SPIKE for n in range(5))
    assert watch.deviations(3.0) < SPIKE
    after = [watch.deviations(float(loss)) > SPIKE for loss in random.normal(8.0, 0.15, 300)]
    assert after[0] and not any(after[100:]) and len(watch.losses) == 100
    still = Watch()
    assert all(still.deviations(1.0) == 0.0 for _ in range(50)) and still.deviations(1.01) < SPIKE < still.deviations(1.2)


def test_adaptive_clipping_cuts_a_spike_only(runs: Runs) -> None:
    """Guards a rule that changes ordinary steps, that misses an outlier, and whose memory a resumed run has lost."""
    common: dict[str, Any] = {"max_steps": 34, "clip": 0.0, "lr": 1e-3, "checkpoint_every": 17}
    wild = lambda: changed_at({31}, lambda loss: 1000 * loss)  # noqa: E731
    free, _ = runs("free", wild(), **common)
    cut, _ = runs("cut", wild(), adaptive_clip=2.5, **common)
    assert runs.rows("free")[30]["grad_norm"] == runs.rows("cut")[30]["grad_norm"] > 100
    calm, _ = runs("calm", adaptive_clip=1e6, **common)
    plain, _ = runs("plain", **common)
    assert largest_difference(calm, plain) == 0.0
    assert largest_difference(cut, plain) < largest_difference(free, plain)
    shutil.rmtree(runs.folder / "cut" / "checkpoints" / "step_000034")
    again, _ = runs("cut", changed_at({31 - 17}, lambda loss: 1000 * loss), adaptive_clip=2.5, resume=True, **common)
    assert largest_difference(cut, again) == 0.0


def test_a_spike_is_written_down(runs: Runs) -> None:
    """Guards a spike that nobody hears of, and a count in the rows that does not fit."""
    runs("run", changed_at({30}, lambda loss: 9 * loss), max_steps=32)
    (event,) = runs.events("run")
    assert (event["step"], event["event"]) == (30, "spike") and event["deviations"] > SPIKE
    assert [row["spikes"] for row in runs.rows("run")][28:] == [0, 1, 1, 1]


# ---------------------------------------------------------------- going back


def test_after_trouble_the_run_goes_back(runs: Runs) -> None:
    """Guards weights that stay spoilt, a run that goes through the same data again, one that goes on as fast as before, and a resumed
    run that forgets it."""
    trouble = {5, 6, 7}
    common: dict[str, Any] = {"max_skipped_steps": 2, "checkpoint_every": 2, "max_steps": 12}
    seen: list[torch.Tensor] = []
    bad = changed_at(trouble, spoilt)

    def loss(model: SmartHaoAI, batch: Batch) -> list[Term]:
        seen.append(batch.inputs["input_ids"])
        return bad(model, batch)

    straight, result = runs("straight", loss, **common)
    assert result.step == 12 and len(seen) == 12
    assert all(not torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n]), "no batch comes twice"
    assert kinds(runs, "straight") == [(5, "skipped"), (6, "skipped"), (7, "skipped"), (7, "rolled_back")]
    event = runs.events("straight")[-1]
    assert (event["to"], event["rate"]) == ("step_000004", 0.5), "the one of step 6 was written amid trouble"
    rows = runs.rows("straight")
    assert [row["lr"] for row in rows] == [3e-3] * 7 + [1.5e-3] * 5
    assert [row["rollbacks"] for row in rows] == [0] * 6 + [1] * 6 and rows[-1]["skipped"] == 3
    for cut in (6, 8, 10):
        shutil.copytree(runs.folder / "straight", runs.folder / f"cut{cut}")
        for later in (runs.folder / f"cut{cut}" / "checkpoints").iterdir():
            if int(later.name[-6:]) > cut:
                shutil.rmtree(later)
        resumed, _ = runs(f"cut{cut}", changed_at({step - cut for step in trouble}, spoilt), resume=True, **common)
        assert largest_difference(straight, resumed) == 0.0 and runs.rows(f"cut{cut}") == rows
        assert runs.events(f"cut{cut}") == runs.events("straight")


def test_going_back_has_an_end(runs: Runs) -> None:
    """Guards a run that goes back for ever, and one without a checkpoint that says nothing of it."""
    with pytest.raises(ValueError, match=r"2 steps in a row.*after going back 2 times.*train\.lr"):
        runs("run", changed_at(set(range(4, 99)), spoilt), max_skipped_steps=1, max_rollbacks=2, checkpoint_every=3, max_steps=40)
    assert [kind for _, kind in kinds(runs, "run")].count("rolled_back") == 2
    with pytest.raises(ValueError, match=r"2 steps in a row.*no checkpoint"):
        runs("none", changed_at(set(range(4, 99)), spoilt), max_skipped_steps=1)


def test_lasting_spikes_lead_back_when_asked_to(runs: Runs) -> None:
    """Guards a default that acts on spikes, and a setting that does not."""
    common: dict[str, Any] = {"max_steps": 36, "checkpoint_every": 15}
    spikes = {32, 33, 34}
    runs("told", changed_at(spikes, lambda loss: 9 * loss), **common)
    assert [kind for _, kind in kinds(runs, "told")] == ["spike"] * 3
    runs("back", changed_at(spikes, lambda loss: 9 * loss), max_spike_steps=2, **common)
    assert kinds(runs, "back")[-1] == (34, "rolled_back") and runs.events("back")[-1]["to"] == "step_000030"


# ---------------------------------------------------------------- early stop


def scripted(scores: list[float], seen: dict[float, float] | None = None, name: str = "val_loss") -> Any:
    """Evaluations that give these figures, and note the weights that each was given for."""
    left = list(scores)

    def evaluate(model: SmartHaoAI) -> dict[str, float]:
        score = left.pop(0)
        if seen is not None:
            seen.setdefault(score, float(next(model.parameters()).detach().double().sum()))
        return {name: score}

    return evaluate


@pytest.mark.parametrize("name", ["val_loss", "val_reward"])
def test_early_stop_keeps_the_best(runs: Runs, name: str) -> None:
    """Guards the last weights in place of the best, figures of other weights in the report, and a run that goes on or begins anew when it
    is resumed."""
    sign = 1 if name == "val_loss" else -1
    figures = [sign * value for value in (5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.2, 9.0, 9.0)]
    weights: dict[float, float] = {}
    common: dict[str, Any] = {"patience": 3, "eval_every": 2, "max_steps": 40, "keep_checkpoints": 1, "checkpoint_every": 3}
    model, result = runs("run", evaluate=scripted(figures, weights, name), **common)
    assert (result.step, result.total_steps, result.interrupted) == (14, 14, False)
    assert result.last[name] == sign * 3.0
    assert float(next(model.parameters()).detach().double().sum()) == pytest.approx(weights[sign * 3.0], abs=1e-9)
    (event,) = runs.events("run")
    assert (event["event"], event["step"], event["best_step"]) == ("stopped_early", 14, 8)
    assert sorted(path.name for path in (runs.folder / "run" / "checkpoints").iterdir()) == ["best", "step_000014"]
    again, done = runs("run", evaluate=scripted([], None, name), resume=True, **common)
    assert done.step == 14 and done.last[name] == sign * 3.0 and largest_difference(model, again) == 0.0


def test_early_stop_of_a_resumed_run(runs: Runs) -> None:
    """Guards the count and the best figure of a run that was killed in between."""
    figures = [5.0, 4.0, 4.5, 3.0, 3.5, 3.1, 3.2]
    common: dict[str, Any] = {"patience": 3, "eval_every": 2, "max_steps": 40, "checkpoint_every": 5}
    straight, _ = runs("run", evaluate=scripted(figures), **common)
    shutil.rmtree(runs.folder / "run" / "checkpoints" / "step_000014")
    resumed, result = runs("run", evaluate=scripted(figures[5:]), resume=True, **common)
    assert result.step == 14 and largest_difference(straight, resumed) == 0.0


def test_without_patience_the_last_is_kept(runs: Runs) -> None:
    """Guards runs that do not ask for it."""
    weights: dict[float, float] = {}
    model, result = runs("run", evaluate=scripted([1.0, 2.0, 3.0, 4.0], weights), eval_every=2)
    assert result.step == 8 and float(next(model.parameters()).detach().double().sum()) == weights[4.0]
    assert not (runs.folder / "run" / "checkpoints" / "best").exists()
    with pytest.raises(UsageError, match=r"train\.eval_every"):
        runs("never", patience=2, eval_every=0)


def test_events_are_told_in_the_report(runs: Runs) -> None:
    """Guards trouble that only a reader of events.jsonl would find."""
    from train.stage import told_events

    runs("run", changed_at({5, 6, 7}, spoilt), max_skipped_steps=2, checkpoint_every=2)
    assert told_events(runs.folder / "run") == "3 x skipped, 1 x rolled_back"
    assert read_jsonl(runs.folder / "none.jsonl") == [] and told_events(runs.folder / "none") is None


def test_lm_loss_is_left_alone(runs: Runs) -> None:
    """Guards the helper above: without calls to change it is the plain loss."""
    first, _ = runs("first", changed_at(set(), spoilt))
    second, _ = runs("second", lm_loss)
    assert largest_difference(first, second) == 0.0
