"""The one-command run: what it decides before training, and that it can be stopped, continued and repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_smart
from tools.prepare_data import SourcesUnavailable
from train.config import UsageError

ROOT = Path(__file__).parent.parent


def arguments(out: Path, *words: str):
    return train_smart._arguments(["--out", str(out), *words])


def test_larger_budgets_get_larger_models():
    sizes = [train_smart._config(train_smart.choose_shape(minutes, "cpu")).account().parameters for minutes in (2, 18, 120, 1000)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert train_smart.choose_shape(18, "cuda") != train_smart.choose_shape(18, "cpu")


def test_results_of_other_settings_are_not_mixed(tmp_path):
    """A second run with another recipe must not go on training the first one's model."""
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "sample"))
    (tmp_path / "pretrain").mkdir()
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "sample"))
    with pytest.raises(UsageError, match="--overwrite"):
        train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "quick"))
    assert (tmp_path / "pretrain").exists()
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "quick", "--overwrite"))
    assert not (tmp_path / "pretrain").exists()


def test_stages_trained_one_by_one_are_not_taken_over(tmp_path):
    (tmp_path / "sft").mkdir()
    with pytest.raises(UsageError, match="one by one"):
        train_smart._check_earlier_run(tmp_path, arguments(tmp_path))


def test_no_network_falls_back_to_the_sample_and_stays_with_it(tmp_path, monkeypatch, capsys):
    """When real corpora cannot be had, the run says so, uses the sample, and a continued run does not switch data in the middle."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def prepare(recipe, out, seed=0):
        asked.append(recipe)
        if recipe == "quick" and len(asked) == 1:
            raise SourcesUnavailable("no source could be fetched")

    monkeypatch.setattr(train_smart, "prepare", prepare)
    args = arguments(tmp_path / "weight")
    train_smart._check_earlier_run(tmp_path / "weight", args)
    assert train_smart.prepare_corpus(args).name == "sample"
    assert "no source could be fetched" in capsys.readouterr().err
    train_smart._check_earlier_run(tmp_path / "weight", args)
    assert train_smart.prepare_corpus(args).name == "sample"
    assert asked == ["quick", "sample", "sample"]


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--minutes", "-1"], ["--per-kind", "0"]])
def test_impossible_arguments(words, tmp_path):
    with pytest.raises(UsageError, match=words[0]):
        arguments(tmp_path, *words)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
def test_interrupted_run_goes_on_and_finished_stages_are_reused(tmp_path):
    """Ctrl-C during pretraining keeps the state; the same command finishes; a third run trains nothing."""
    out = tmp_path / "weight"
    # One thread: two training processes with a thread per core each would wait for one another most of the time.
    words = ["--recipe", "sample", "--minutes", "0.5", "--per-kind", "2", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(ROOT / "train_smart.py"), *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    deadline = time.monotonic() + 300
    while not (out / "pretrain" / "metrics.jsonl").is_file() or not (out / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8"):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "run the same command again" in said
    stopped_at = max(int(p.name.split("_")[1]) for p in (out / "pretrain" / "checkpoints").iterdir())
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"at step {stopped_at}" in second.stdout
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["probes"]["overall"]["total"] == 20
    before = (out / "sft" / "model.safetensors").read_bytes()
    third = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert third.returncode == 0 and third.stdout.count("finished earlier, reused") == 2
    assert (out / "sft" / "model.safetensors").read_bytes() == before
