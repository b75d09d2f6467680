"""Helpers of the training tests: stores with exact contents, small data files, and stages run as their users run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.program import run_main
from train.store import TokenStore

ROOT = Path(__file__).resolve().parents[2]
TINY_SHAPE = [
    "model.preset=none",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_kv_head=1",
    "model.n_embd=32",
    "model.intermediate_size=64",
]
FAST = [
    "train.precision=fp32",
    "train.batch_size=2",
    "train.threads=1",
    "train.eval_every=0",
    "train.eval_tokens=200",
    "data.max_length=32",
    "train.checkpoint_minutes=0",
]


def write_store(
    folder: Path,
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]] | None = None,
    sources: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> TokenStore:
    """A store of exactly these training documents, as files; `sources` says how many documents each source holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows, marks in (("train", documents, masks), ("val", [], [])):
        np.cumsum([0, *map(len, rows)]).astype(np.int64).tofile(folder / f"{split}.offsets.bin")
        np.asarray([t for row in rows for t in row], dtype=np.uint16).tofile(folder / f"{split}.tokens.bin")
        if masks is not None:
            np.asarray([m for row in marks or [] for m in row], dtype=np.uint8).tofile(folder / f"{split}.mask.bin")
    counts = list(sources or [len(documents)])
    stops = np.cumsum(counts).tolist()
    meta = {
        "kind": "pretrain" if masks is None else "sft",
        "dtype": "uint16",
        "bad": 0,
        "sources": [
            {"path": f"source{n}", "train": [stop - count, stop], "val": [0, 0]}
            for n, (count, stop) in enumerate(zip(counts, stops, strict=True))
        ],
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return TokenStore(folder, {f"source{n}": w for n, w in enumerate(weights or [1.0] * len(counts))})


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSON lines; strings are taken as finished lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def text_rows(count: int) -> list[dict[str, str]]:
    return [{"text": f"小猫第{i}次在窗边睡觉。The quick brown fox jumps over {i} lazy dogs and {i * 7 % 13} cats."} for i in range(count)]


def chat_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i} + {i + 1} = ?"},
                {"role": "assistant", "content": f"答案是 {2 * i + 1}。"},
            ]
        }
        for i in range(count)
    ]


def pair_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + {i + 1} = ?", "chosen": f"答案是 {2 * i + 1}。", "rejected": f"I do not know {i}."} for i in range(count)]


def stage_environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }


def run_python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python with these words from the repository root (or `cwd`) and return the finished process."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=stage_environment(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
        check=False,
    )


def run_stage(module: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_python("-m", module, *words, cwd=cwd)


def call_main(
    main: Callable[[], int | None],
    words: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[int, str, str]:
    """A stage's command in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["stage", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    shown = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, shown.out, shown.err
