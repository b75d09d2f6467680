"""Runs that are stopped or killed leave a usable checkpoint, from which --resume goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_helpers import FAST, ROOT, TINY_SHAPE, chat_rows, run_python, stage_environment, text_rows, write_jsonl

from model import SmartHaoAI
from train.checkpoints import list_checkpoints, load_state, newest_checkpoint
from train.config import PretrainConfig, SFTConfig, parse_command_line
from train.metrics import read_jsonl
from train.train_pretrain import pretrain
from train.train_sft import sft

# Dies without any clean-up at one call of the write of the second checkpoint (step 4).
DRIVER = """
import os, shutil, sys
from pathlib import Path
import train.checkpoints as checkpoints
from train.program import run_main
from train.train_pretrain import main

point, calls = sys.argv.pop(1), []

def dies(original, at):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), 9) if os.name != "nt" else os._exit(137)
        return original(*args, **kwargs)
    return call

if point == "optimizer":
    checkpoints.save_weights = dies(checkpoints.save_weights, 2)
elif point == "rename":
    replace = os.replace
    die = dies(replace, 2)
    os.replace = lambda a, b: (die if Path(b).name.startswith("step_") else replace)(a, b)
elif point == "delete":
    rmtree = shutil.rmtree
    die = dies(rmtree, 2)  # the first is behind its own write
    shutil.rmtree = lambda path, *a, **k: (die if Path(path).name.startswith("step_000002.") else rmtree)(path, *a, **k)
run_main(main)
"""


def pretrain_words(folder: Path, tokenizer_dir: Path, out: str, *more: str) -> list[str]:
    if not (folder / "text.jsonl").is_file():
        write_jsonl(folder / "text.jsonl", text_rows(40))
    return [
        *TINY_SHAPE,
        *FAST,
        f"data.pretrain_file={folder / 'text.jsonl'}",
        f"data.store_dir={folder / 'store'}",
        f"tokenizer_dir={tokenizer_dir}",
        f"out_dir={folder / out}",
        *more,
    ]


STEPS = [
    "train.max_steps=6",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.keep_checkpoints=1",
    "model.dropout=0.1",
]


@pytest.fixture(scope="module")
def straight_weights(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, torch.Tensor]:
    """Weights of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    assert pretrain(parse_command_line(PretrainConfig, pretrain_words(folder, tokenizer_dir, "run", *STEPS)), lambda text: None) == 0
    return SmartHaoAI.from_pretrained(folder / "run").state_dict()


@pytest.mark.parametrize("point", ["optimizer", "rename", "delete"])
def test_a_kill_while_a_checkpoint_is_written(
    point: str, tmp_path: Path, tokenizer_dir: Path, straight_weights: dict[str, torch.Tensor]
) -> None:
    """Guards against a half-written checkpoint being taken for a whole one, and against losing the one before."""
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    words = pretrain_words(tmp_path, tokenizer_dir, "killed", *STEPS)
    died = run_python(str(tmp_path / "driver.py"), point, *words)
    assert died.returncode in (-9, 137), died.stderr
    out = tmp_path / "killed"
    left = newest_checkpoint(out)
    assert left is not None and load_state(left)["step"] == (4 if point == "delete" else 2)
    assert not list((out / "checkpoints").glob("*.tmp"))
    assert pretrain(parse_command_line(PretrainConfig, [*words, "--resume"]), lambda text: None) == 0
    weights = SmartHaoAI.from_pretrained(out).state_dict()
    assert all(torch.equal(weights[name], straight_weights[name]) for name in straight_weights)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in list_checkpoints(out)] == ["step_000006"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these signals to one process")
@pytest.mark.parametrize(("number", "module"), [(signal.SIGTERM, "train.train_pretrain"), (signal.SIGINT, "train.train_sft")])
def test_a_stop_signal_saves_and_resume_finishes(number: signal.Signals, module: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards Ctrl-C and a termination request: the step is finished, the state saved, the exit status 130."""
    words = pretrain_words(
        tmp_path,
        tokenizer_dir,
        "run",
        "train.log_every=1",
        "train.checkpoint_every=0",
        "model_dir=none",
        f"data.sft_file={write_jsonl(tmp_path / 'chat.jsonl', chat_rows(40))}",
    )
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", module, *words, "train.max_steps=100000"],
        cwd=ROOT,
        env=stage_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(read_jsonl(out / "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            shown = b"".join(process.communicate(timeout=60)).decode("utf-8", errors="replace")
        finally:
            process.kill()
    assert process.returncode == 130, shown
    assert "--resume" in shown and "Traceback" not in shown
    (checkpoint,) = list_checkpoints(out)
    step = load_state(checkpoint)["step"]
    assert 3 <= step < 100_000 and not (out / "model.safetensors").exists()
    more = [*words, f"train.max_steps={step + 2}", "--resume"]
    if module == "train.train_pretrain":
        assert pretrain(parse_command_line(PretrainConfig, more), lambda text: None) == 0
    else:
        assert sft(parse_command_line(SFTConfig, more), lambda text: None) == 0
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == list(range(1, step + 3))
    assert (out / "model.safetensors").is_file()
