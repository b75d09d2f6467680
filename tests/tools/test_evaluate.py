"""tools.evaluate: bits per byte of files, as scripts read it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import BPETokenizer, SmartHaoAI
from tools.curriculum import score as score_probes
from tools.evaluate import answer_probes, load, main, probe_table
from train.config import UsageError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["小猫在窗边睡觉，阳光照在它的身上。", "The quick brown fox jumps over the lazy dog."]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> Path:
    tiny_model.save_pretrained(tmp_path / "model", tiny_tokenizer)
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "文本.jsonl"
    file.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS), encoding="utf-8")
    return file


@torch.no_grad()
def by_hand(folder: Path, documents: list[str]) -> float:
    """Bits per byte with a full softmax in float64; the documents fit in one window each."""
    model, tokenizer = load(str(folder), "cpu")
    nats = size = 0.0
    for text in documents:
        ids = [tokenizer.document_end_id, *tokenizer.encode(text)]
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), dim=-1)
        nats -= float(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        size += len(text.encode("utf-8"))
    return nats / math.log(2) / size


def test_bpb_as_a_program(checkpoint: Path, texts: Path) -> None:
    """Guards the interface that scripts rely on: one JSON object on standard output, with these keys and the right figures."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.evaluate", "bpb", "--model", str(checkpoint), "--data", str(texts), "--json"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["files"]
    assert set(row) == {"file", "bytes", "tokens", "bpb"} and row["file"] == str(texts)
    assert row["bytes"] == sum(len(t.encode("utf-8")) for t in TEXTS)
    assert row["tokens"] == sum(len(BPETokenizer.from_pretrained(checkpoint).encode(t)) for t in TEXTS)
    assert row["bpb"] == pytest.approx(by_hand(checkpoint, TEXTS), rel=1e-5)


def test_several_files_and_the_limit(checkpoint: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a row per file, text for people without --json, and a limit in bytes that cuts no character in two."""
    plain = texts.with_name("b.txt")
    plain.write_text(TEXTS[0], encoding="utf-8")
    words = ["bpb", "--model", str(checkpoint), "--data", str(texts), str(plain), "--device", "cpu"]
    main([*words, "--limit-kb", "0.01", "--json"])
    rows = json.loads(capsys.readouterr().out)["files"]
    assert [(row["file"], row["bytes"]) for row in rows] == [(str(texts), 9), (str(plain), 9)]
    assert rows[0]["bpb"] == pytest.approx(by_hand(checkpoint, [TEXTS[0][:3]]), rel=1e-5)
    main(words)
    assert "bits per byte" in capsys.readouterr().out
    main([*words[:5], "--context", "8", "--stride", "3", "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["files"][0]["bpb"] > 0


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--context", "999"], "999"), (["--stride", "300"], "300"), (["--context", "4", "--stride", "5"], "5")],
)
def test_impossible_windows_are_named(checkpoint: Path, texts: Path, words: list[str], part: str) -> None:
    """Guards a message instead of a figure from a context that the model does not have."""
    with pytest.raises(ValueError, match=part):
        main(["bpb", "--model", str(checkpoint), "--data", str(texts), "--device", "cpu", *words])


@pytest.mark.parametrize(
    "words",
    [["--context", "0"], ["--context", "-4"], ["--limit-kb", "-1"], ["--limit-kb", "0"], ["--limit-kb", "nan"], ["--limit-kb", "inf"]],
)
def test_impossible_limits_are_refused(checkpoint: Path, texts: Path, words: list[str]) -> None:
    """Guards: a context of 0 that is taken for none given; a limit below 0 that cuts the ends off the texts."""
    with pytest.raises(UsageError, match=f"{words[0]} {words[1]} must"):
        main(["bpb", "--model", str(checkpoint), "--data", str(texts), "--device", "cpu", *words])


def test_steps_of_a_reasoning_head(checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a figure said to be of so many steps that was measured with those of training; options that a plain model ignores."""
    model = SmartHaoAI.from_pretrained(checkpoint, use_reasoning=True, reasoning_steps=2)
    assert model.reasoning is not None
    with torch.no_grad():
        for weight in model.reasoning.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)  # each step's prediction is another one
    model.save_pretrained(tmp_path / "head", BPETokenizer.from_pretrained(checkpoint))
    base = ["--data", str(texts), "--device", "cpu", "--json"]

    def measured(*words: str) -> float:
        main(["bpb", "--model", str(tmp_path / "head"), *base, *words])
        return json.loads(capsys.readouterr().out)["files"][0]["bpb"]

    two, one = measured("--reasoning-steps", "2"), measured("--reasoning-steps", "1")
    assert two == measured() and abs(two - one) > 1e-4
    assert measured("--reasoning-steps", "5", "--reasoning-halt", "1e-9") == pytest.approx(one, abs=1e-6)
    for words in (["bpb", *base], ["probes", "--device", "cpu"]):
        for option in ("--reasoning-steps", "--reasoning-halt"):
            with pytest.raises(ValueError, match="no reasoning head"):
                main([*words, "--model", str(checkpoint), option, "0" if option.endswith("halt") else "2"])


def test_nothing_to_measure(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Guards a division by zero for a file without text, and names for what is missing."""
    (tmp_path / "empty.jsonl").write_text('{"other": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        main(["bpb", "--model", str(checkpoint), "--data", str(tmp_path / "empty.jsonl"), "--device", "cpu"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["bpb", "--model", str(checkpoint), "--data", str(tmp_path / "nowhere.jsonl"), "--device", "cpu"])
    with pytest.raises(FileNotFoundError, match="missing"):
        main(["bpb", "--model", str(tmp_path / "missing"), "--data", str(texts), "--device", "cpu"])


def test_probes_are_answered_and_counted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that every probe gets the answer to its own prompt, whatever the batches, and that the table shows each kind."""
    monkeypatch.setattr("tools.evaluate.PROBE_TOKENS", 4)
    model, tokenizer = load(str(checkpoint), "cpu")
    answers = answer_probes(model, tokenizer, per_kind=1)
    monkeypatch.setattr("tools.evaluate.PROBE_BATCH", 3)
    again = answer_probes(model, tokenizer, per_kind=1)
    assert answers and [(p.prompt, a) for p, a, _ in answers] == [(p.prompt, a) for p, a, _ in again]
    result = score_probes(answers)
    table = probe_table(result)
    assert all(kind in table for kind in result["kinds"]) and sum(c["total"] for c in result["cells"].values()) == len(answers)
