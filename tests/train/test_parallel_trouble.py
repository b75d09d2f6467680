"""Several processes when a run does not go well: what one of them would decide, all decide."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_parallel import STAGES, TOLERANCE, Workshop, compare, gloo, metrics
from training_helpers import ROOT

from model import BPETokenizer
from model.checkpoint import open_weights
from train.checkpoints import damage, list_checkpoints
from train.metrics import read_jsonl

SPOILT = """
import importlib, math, os
import torch
from train import loop, parallel, stage
from train.program import run_main

add_up, lm_loss = parallel.add_up, stage.lm_loss
steps, scores = iter(range(1, 1000)), iter([3.0, 1.0] + [2.0] * 100)


def spoilt_sums(loss_sum, *others):
    total, *rest = add_up(loss_sum, *others)
    return (math.nan if next(steps) in (6, 7) else total, *rest)


def narrow_loss(model, batch):
    if os.environ["TROUBLE"] == "memory" and os.environ.get("RANK") == "1" and len(batch.inputs["input_ids"]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return lm_loss(model, batch)


stage.lm_loss = narrow_loss
if os.environ["TROUBLE"] == "losses":
    parallel.add_up = spoilt_sums
    loop.score = lambda evaluated: next(scores)
run_main(importlib.import_module(f"train.train_{os.environ['STAGE']}").main, several=True)
"""
"""A stage whose steps 6 and 7 are not finite and whose second evaluation is the best; or whose second process has little memory."""


@pytest.fixture
def spoilt(tiny_tokenizer: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """spoilt("losses" or "memory", stage, processes, out_dir, words, status) runs it and returns what was said."""
    workshop = Workshop(tmp_path, tiny_tokenizer)
    (tmp_path / "spoilt_stage.py").write_text(SPOILT, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def run(trouble: str, stage: str, processes: int, out: Path, *words: str, failing: bool = False) -> str:
        monkeypatch.setenv("TROUBLE", trouble)
        monkeypatch.setenv("STAGE", STAGES[stage][0])
        own = [word.replace("FOLDER", str(tmp_path)) for word in STAGES[stage][1]]
        done = workshop.run(processes, "spoilt_stage", *own, f"out_dir={out}", *words, status=None)
        assert (done.returncode != 0) == failing, done.stderr
        return done.stdout + done.stderr

    return run


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "lora"])
def test_processes_go_back_and_stop_together(stage: str, spoilt: Callable[..., str], tmp_path: Path) -> None:
    """Guards: weights that only one process takes back, the best weights of a divided model that are lost or half read, a share of a
    checkpoint that its checksums do not cover, and blocks that are computed again in the backward pass to other gradients."""
    words = ["train.max_steps=20", "train.checkpoint_every=2", "train.eval_every=3", "train.max_skipped_steps=1", "train.patience=4"]
    words += ["train.adaptive_clip=2.5"]
    spoilt("losses", stage, 1, tmp_path / "one", *words)
    events = [(row["step"], row["event"]) for row in read_jsonl(tmp_path / "one" / "events.jsonl") if row["event"] != "sample"]
    assert events == [(6, "skipped"), (7, "skipped"), (7, "rolled_back"), (18, "stopped_early")]
    best = {name: tensor.clone() for name, tensor in _weights(tmp_path / "one").items()}
    for how in ("ddp", "fsdp") if stage == "pretrain" else ("fsdp",):
        out = tmp_path / how
        spoilt("losses", stage, 2, out, *words, f"train.parallel={how}", "train.activation_checkpointing=true")
        losses, others = compare(metrics(tmp_path / "one"), metrics(out))
        assert losses < TOLERANCE and others < 10 * TOLERANCE, how
        assert [(row["step"], row["event"]) for row in read_jsonl(out / "events.jsonl") if row["event"] != "sample"] == events
        assert max(float((best[name] - tensor).abs().max()) for name, tensor in _weights(out).items()) < TOLERANCE
        assert [damage(path) for path in list_checkpoints(out)] == [None] * len(list_checkpoints(out))
    shares = list(list_checkpoints(tmp_path / "fsdp")[-1].glob("optimizer-*.safetensors"))
    assert len(shares) == 2
    shares[0].write_bytes(shares[0].read_bytes()[:-1])
    said = spoilt("", stage, 2, tmp_path / "fsdp", *words, "train.parallel=fsdp", "--resume")
    assert said.count(f"{shares[0].name} is cut off") == 1


@gloo
@pytest.mark.slow
def test_one_process_with_too_little_memory_ends_the_run_with_advice(spoilt: Callable[..., str], tmp_path: Path) -> None:
    """Guards: a process that halves its rows while the others wait for it for ever, and advice that a resumed run does not follow."""
    words = ["train.max_steps=4", "train.batch_size=8", "train.micro_batch=4", "train.checkpoint_every=1"]
    said = spoilt("memory", "sft", 2, tmp_path / "run", *words, failing=True)
    assert "error (process 1): not enough memory for 4 rows" in said and "--resume train.micro_batch=1" in said
    assert metrics(tmp_path / "run") == []
    spoilt("memory", "sft", 2, tmp_path / "run", *words, "--resume", "train.micro_batch=1")
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    source = open_weights(folder)
    return {name: source.tensor(name) for name in source.shapes()}
