"""Memory does not grow with the steps, nor with the corpus: two curves, by hand.

python -m pytest -m drill tests/train/test_memory_growth.py -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_helpers import FAST, ROOT, TINY_SHAPE, pair_rows, stage_environment, write_jsonl

from train.metrics import read_jsonl
from train.plotting import pyplot, save_figure

STEPS = 2000
CORPUS = int(float(os.environ.get("CORPUS_GB", "2")) * 10**9)
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 800)]


def draw(curves: dict[str, tuple[list[float], list[float]]], x: str, name: str) -> None:
    """The curves as a PNG in the folder that MEMORY_PLOTS names; nothing without."""
    folder, plt = os.environ.get("MEMORY_PLOTS"), pyplot()
    if folder is None or plt is None:
        return
    figure, axes = plt.subplots(figsize=(8, 4))
    for label, (places, values) in curves.items():
        axes.plot(places, values, label=label)
    axes.set(xlabel=x, ylabel="MiB", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, Path(folder) / f"{name}.png")


def growth(steps: list[int], memory: list[float]) -> float:
    """MiB per 1,000 steps: the median slope of all pairs (Theil and Sen), which a step down or up in between does not tilt."""
    x, y = np.asarray(steps, dtype=float), np.asarray(memory)
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first]))) * 1000


@pytest.mark.drill
def test_flat_over_two_thousand_steps(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards what grows a little with each step, evaluation, sample or checkpoint: graphs, caches, rows, kernels kept for a shape."""
    random = np.random.default_rng(0)
    texts = [{"text": "".join(random.choice(SYLLABLES) for _ in range(int(random.integers(20, 200))))} for _ in range(400)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["text"][: int(random.integers(4, 60))]},
                {"role": "assistant", "content": "好的。" * 3},
            ]
        }
        for row in texts
    ]
    files = {"pretrain": write_jsonl(tmp_path / "t.jsonl", texts), "sft": write_jsonl(tmp_path / "c.jsonl", chats)}
    files["dpo"] = write_jsonl(tmp_path / "p.jsonl", pair_rows(300))
    keys = {"pretrain": "pretrain_file", "sft": "sft_file", "dpo": "preference_file"}
    curves, slopes = {}, {}
    for stage, file in files.items():
        start = [*TINY_SHAPE, f"tokenizer_dir={tokenizer_dir}"] if stage == "pretrain" else [f"model_dir={tmp_path / 'pretrain'}"]
        words = [*FAST, *start, f"data.{keys[stage]}={file}", f"data.store_dir={tmp_path / 'store'}", f"out_dir={tmp_path / stage}"]
        words += [f"train.max_steps={STEPS}", "train.log_every=10", "train.eval_every=200", "train.checkpoint_every=200"]
        words += ["train.sample_every=500", "data.max_length=128", "train.batch_size=4"]
        done = subprocess.run(
            [sys.executable, "-m", f"train.train_{stage}", *words], cwd=ROOT, env=stage_environment(), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        rows = read_jsonl(tmp_path / stage / "metrics.jsonl")
        steps, memory = [row["step"] for row in rows], [row["memory_mb"] for row in rows]
        curves[stage] = steps, memory
        slopes[stage] = growth(steps[len(steps) // 4 :], memory[len(steps) // 4 :])
        shown = "  ".join(f"{step}: {value:.1f}" for step, value in list(zip(steps, memory, strict=True))[9::20])
        print(f"\n{stage:<9} MiB at step {shown}\n{'':<9} from step {STEPS // 4} on: {slopes[stage]:+.2f} MiB per 1,000 steps", flush=True)
    draw(curves, "step", "steps")
    assert max(slopes.values()) < 2.0, "MiB per 1,000 steps"


def write_corpus(path: Path, size: int) -> None:
    """`size` bytes of JSON lines, of made-up words in two scripts; no two documents are the same."""
    random = np.random.default_rng(1)
    words = ["".join(random.choice(SYLLABLES, int(random.integers(1, 5)))) for _ in range(4000)]
    words += ["".join(random.choice(CHARACTERS, int(random.integers(1, 4)))) for _ in range(4000)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            chosen = random.choice(len(words), int(random.integers(50, 1500)))
            line = json.dumps({"text": " ".join(words[n] for n in chosen)}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode("utf-8"))


@pytest.mark.drill
def test_flat_over_a_large_corpus(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards memory that grows with the corpus: while it is read and encoded, and while rows are packed from the store."""
    corpus = tmp_path / "big.jsonl"
    write_corpus(corpus, CORPUS)
    words = [*FAST, *TINY_SHAPE, f"tokenizer_dir={tokenizer_dir}", f"data.pretrain_file={corpus}", f"data.store_dir={tmp_path / 'store'}"]
    words += [f"out_dir={tmp_path / 'run'}", "train.max_steps=500", "data.max_length=256", "train.batch_size=8", "train.log_every=10"]
    times, anonymous, mapped = [], [], []
    began = time.perf_counter()
    with open(tmp_path / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "train.train_pretrain", *words], cwd=ROOT, env=stage_environment(), stdout=log, stderr=log
        )
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            except OSError:
                break
            found = {line.split(":")[0]: int(line.split()[1]) / 2**10 for line in lines if line.startswith("Rss")}
            if found:
                times.append(time.perf_counter() - began)
                anonymous.append(found["RssAnon"])
                mapped.append(found["RssFile"])
            time.sleep(1)
    assert process.wait() == 0, (tmp_path / "log.txt").read_text(encoding="utf-8")[-2000:]
    store = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file())
    building = [value for when, value in zip(times, anonymous, strict=True) if 30 < when < times[-1] - 60]
    print(f"\ncorpus {corpus.stat().st_size / 1e9:.2f} GB, store {store / 1e9:.2f} GB, {times[-1]:.0f} s in all")
    for share in range(0, 101, 10):
        place = min(len(times) - 1, share * len(times) // 100)
        print(f"  after {times[place]:5.0f} s: {anonymous[place]:7.1f} MiB of its own, {mapped[place]:8.1f} MiB of files mapped")
    print(f"  its own memory in the middle: least {min(building):.1f}, most {max(building):.1f} MiB", flush=True)
    draw({"its own": (times, anonymous), "files mapped": (times, mapped)}, "seconds", "corpus")
    rows = [row["memory_mb"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    print(f"  in training: {rows[5]:.1f} MiB at first, {rows[-1]:.1f} at the end")
    assert max(anonymous) < 1000 and max(building) - min(building) < 150 and rows[-1] - rows[5] < 30
