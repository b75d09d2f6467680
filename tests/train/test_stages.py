"""The commands: what they do without arguments, what they refuse, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from training_helpers import FAST, TINY_SHAPE, call_main, chat_rows, run_stage, text_rows, write_jsonl

from model import BPETokenizer, SmartHaoAI
from train import train_pretrain, train_sft, train_tokenizer
from train.checkpoints import list_checkpoints
from train.metrics import read_jsonl

MAINS: dict[str, Callable[[], int | None]] = {
    "pretrain": train_pretrain.main,
    "sft": train_sft.main,
    "tokenizer": train_tokenizer.main,
}
Command = Callable[..., tuple[int, str, str]]
SMALL = [*FAST, "train.max_steps=2", "train.log_every=1"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("pretrain", words...) in an empty working directory: (status, stdout, stderr). Data lies in training_data/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HAOAI_DEBUG", raising=False)
    write_jsonl(tmp_path / "training_data" / "pretrain" / "a.jsonl", text_rows(30))
    write_jsonl(tmp_path / "training_data" / "sft" / "c.jsonl", chat_rows(30))
    return lambda stage, *words: call_main(MAINS[stage], words, capsys, monkeypatch)


@pytest.fixture
def pretrained(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> Path:
    """A finished model of context 256 in weight/pretrain."""
    tiny_model.save_pretrained(tmp_path / "weight" / "pretrain", tiny_tokenizer)
    return tmp_path / "weight" / "pretrain"


def one_error(result: tuple[int, str, str], status: int, *parts: str) -> None:
    """The command ended with `status` and one line on standard error that holds `parts`."""
    assert result[0] == status, result
    lines = [line for line in result[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result[2] and all(part in lines[0] for part in parts), result[2]


def test_a_tokenizer_is_reused_until_something_changes(command: Command, tmp_path: Path) -> None:
    """Guards against training again for nothing, and against keeping the tokenizer of another corpus or size."""
    file = tmp_path / "weight" / "tokenizer" / "tokenizer.json"
    assert command("tokenizer", "tokenizer.vocab_size=300")[0] == 0
    first = file.stat().st_mtime_ns
    status, out, _ = command("tokenizer", "tokenizer.vocab_size=300")
    assert status == 0 and "reused" in out and file.stat().st_mtime_ns == first
    assert command("tokenizer", "tokenizer.vocab_size=320")[0] == 0
    assert BPETokenizer.from_pretrained(file.parent).vocab_size == 320
    write_jsonl(tmp_path / "training_data" / "pretrain" / "b.jsonl", text_rows(3))
    second = file.stat().st_mtime_ns
    assert "reused" not in command("tokenizer", "tokenizer.vocab_size=320")[1] and file.stat().st_mtime_ns != second
    one_error(command("tokenizer", "tokenizer.vocab_size=260"), 1, "260", "at least")
    assert command("tokenizer", "--dry-run", "out_dir=dry")[0] == 0 and not (tmp_path / "dry").exists()


def test_a_foreign_tokenizer_is_not_replaced(command: Command, tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards a tokenizer that was put there by hand."""
    tiny_tokenizer.save_pretrained(tmp_path / "mine")
    before = (tmp_path / "mine" / "tokenizer.json").read_bytes()
    one_error(command("tokenizer", "out_dir=mine", "tokenizer.vocab_size=300"), 2, "mine")
    assert (tmp_path / "mine" / "tokenizer.json").read_bytes() == before


def test_pretraining_then_fine_tuning_without_any_path(command: Command, tmp_path: Path) -> None:
    """Guards the defaults: a missing tokenizer is trained first (and said), SFT starts from weight/pretrain, and each leaves
    a finished, self-contained checkpoint."""
    status, out, err = command("pretrain", *TINY_SHAPE, *SMALL, "model.vocab_size=300")
    assert status == 0 and "no tokenizer" in out, err
    assert BPETokenizer.from_pretrained(tmp_path / "weight" / "tokenizer").vocab_size == 300
    status, out, err = command("sft", *SMALL)
    assert status == 0, err
    for name in ("pretrain", "sft"):
        folder = tmp_path / "weight" / name
        there = {p.name for p in folder.iterdir()}
        assert there >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
            "run.yaml",
            "metrics.jsonl",
            "report.md",
            "README.md",
            "checkpoints",
        }
        assert SmartHaoAI.from_pretrained(folder).config.n_layer == 2
        assert "parameters" in (folder / "report.md").read_text(encoding="utf-8")
        assert "run.yaml" in (folder / "README.md").read_text(encoding="utf-8")
        assert not list(folder.rglob("*.tmp"))
    assert "weight/pretrain" in (tmp_path / "weight" / "sft" / "report.md").read_text(encoding="utf-8").replace("\\", "/")


def test_a_filled_out_dir_is_refused_replaced_or_continued(command: Command, pretrained: Path, tmp_path: Path) -> None:
    """Guards against two runs mixed in one directory, and against files lost to --overwrite before anything was checked."""
    words = ["out_dir=run", *SMALL]
    assert command("sft", *words, "--resume")[0] == 0, "--resume with no checkpoint starts fresh"
    old = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    one_error(command("sft", *words), 2, "out_dir=run", "--resume", "--overwrite")
    for bad in (
        ["data.sft_file=nowhere.jsonl"],
        ["model.n_layer=7"],
        ["--dry-run"],
        ["data.max_length=999"],
        ["train.device=nonsense"],
        ["data.val_file=nowhere.jsonl"],
    ):
        command("sft", *words, "--overwrite", *bad)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == old, bad
    assert command("sft", *words, "--overwrite", "train.max_steps=1")[0] == 0
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert command("sft", *words, "--resume", "train.max_steps=3")[0] == 0
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_000001", "step_000003"]


def test_overwrite_deletes_only_what_a_run_wrote(command: Command, pretrained: Path, tmp_path: Path) -> None:
    """Guards foreign files, the checkpoint to start from, and a file in place of a directory."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    one_error(command("sft", "out_dir=photos", "--overwrite", *SMALL), 2, "photos")
    one_error(command("sft", "out_dir=weight/pretrain", "--overwrite", *SMALL), 2, "model_dir")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    one_error(command("sft", "out_dir=file", *SMALL), 2, "file")
    one_error(command("sft", "out_dir=", *SMALL), 2, "out_dir")
    assert (tmp_path / "photos" / "a.jpg").is_file() and (pretrained / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_dry_run_writes_no_out_dir(command: Command, pretrained: Path, tmp_path: Path, stage: str, tokenizer_dir: Path) -> None:
    """Guards --dry-run: parameters, memory, tokens and time are printed, nothing is trained or kept."""
    words = [
        "out_dir=dry",
        *SMALL,
        "--dry-run",
        *([*TINY_SHAPE, f"tokenizer_dir={tokenizer_dir}"] if stage == "pretrain" else []),
    ]
    status, out, err = command(stage, *words)
    assert status == 0 and not (tmp_path / "dry").exists(), err
    assert all(word in out for word in ("parameters", "memory", "tokens", "time"))


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (["train.lrr=1"], 2, ["train.lr"]),
        (["model.n_layr=1"], 2, ["model.n_layer"]),
        (["data.sft_file=nowhere.jsonl"], 1, ["nowhere.jsonl"]),
        (["model_dir=nowhere"], 1, ["nowhere"]),
        (["tokenizer_dir=nowhere"], 1, ["nowhere"]),
        (["model.n_layer=3"], 2, ["model.n_layer=3", "2"]),
        (["model.n_embd=64"], 2, ["model.n_embd"]),
        (["data.max_length=512"], 2, ["512", "256"]),
        (["model.dropout=1.5"], 2, ["dropout", "1.5"]),
        (["model.reasoning_halt=0.5"], 2, ["model.reasoning_halt=0.5", "0.0"]),
        (["train.device=nonsense"], 2, ["nonsense"]),
        (["data.sft_file=training_data/pretrain/a.jsonl"], 1, ["a.jsonl"]),
        (["data.val_file=nowhere.jsonl"], 1, ["nowhere.jsonl"]),
    ],
)
def test_mistakes_are_one_line(command: Command, pretrained: Path, tmp_path: Path, words: list[str], status: int, parts: list[str]) -> None:
    """Guards against tracebacks, and against an out_dir left by a run that never began: 2 for usage, 1 for a failed run."""
    one_error(command("sft", *SMALL, "out_dir=run", *words), status, *parts)
    assert not (tmp_path / "run").exists()


def test_the_checkpoints_shape_wins_over_a_preset(command: Command, pretrained: Path, tmp_path: Path) -> None:
    """Guards `model_dir`: a preset's shape is ignored, the same value given by name is accepted."""
    status, _, err = command("pretrain", *SMALL, "out_dir=more", "model_dir=weight/pretrain", "model.preset=nano", "model.n_layer=2")
    assert status == 0, err
    assert SmartHaoAI.from_pretrained(tmp_path / "more").config.n_embd == 32


def test_settings_of_training_change_from_stage_to_stage(command: Command, pretrained: Path, tmp_path: Path) -> None:
    """Guards fine-tuning that cannot set what only training heeds, or that hands on another model than it trained."""
    words = ["model.use_reasoning=true", "model.reasoning_steps=2", "model.reasoning_ponder_coef=0.1", "model.dropout=0.2"]
    status, _, err = command("sft", *SMALL, "out_dir=first", *words)
    assert status == 0, err
    words = ["model.reasoning_ponder_coef=0.02", "model.reasoning_halt=0.5", "model.dropout=0", "model.reasoning_steps=2"]
    status, _, err = command("sft", *SMALL, "model_dir=first", "out_dir=second", *words)
    assert status == 0, err
    first, second = (SmartHaoAI.from_pretrained(tmp_path / name).config for name in ("first", "second"))
    assert (first.dropout, first.reasoning_ponder_coef, first.reasoning_halt) == (0.2, 0.1, 0.0)
    assert second == replace(first, dropout=0.0, reasoning_ponder_coef=0.02, reasoning_halt=0.5)
    one_error(command("sft", *SMALL, "model_dir=first", "out_dir=third", "model.reasoning_steps=9"), 2, "model.reasoning_steps=9", "has 2")
    assert not (tmp_path / "third").exists()


def test_a_row_shorter_than_one_turn(command: Command, pretrained: Path) -> None:
    """Guards fine-tuning with a context that no conversation fits in: cuts are reported, losses stay finite."""
    status, out, err = command("sft", *SMALL, "data.max_length=10", "train.log_every=1")
    assert status == 0 and "data.max_length=10" in out, err
    rows = read_jsonl(pretrained.parent / "sft" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["loss"] < 20 for row in rows)


def test_a_context_too_short_for_the_samples(command: Command, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards against a run that fails at its very end because a sample question does not fit in the model's context."""
    words = ["model_dir=none", f"tokenizer_dir={tokenizer_dir}", *TINY_SHAPE, *SMALL]
    for stage in ("sft", "pretrain"):
        status, _, err = command(stage, *words, "data.max_length=6", f"out_dir={stage}")
        assert status == 0 and (tmp_path / stage / "model.safetensors").is_file(), err


def test_commands_end_cleanly_as_programs(tmp_path: Path) -> None:
    """Guards the programs themselves: exit status, one line of error, UTF-8 on both streams."""
    bad = run_stage("train.train_sft", f"model_dir={tmp_path / '没有'}", f"out_dir={tmp_path / 'run'}")
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "没有" in bad.stderr and not bad.stdout
    usage = run_stage("train.train_pretrain", "train.lrr=1")
    assert usage.returncode == 2 and usage.stderr.startswith("error: ") and usage.stderr.count("\n") == 1
    help_page = run_stage("train.train_tokenizer", "--help")
    assert help_page.returncode == 0 and "tokenizer.vocab_size=" in help_page.stdout


def test_weights_in_the_report_are_those_of_the_data(command: Command, pretrained: Path, tmp_path: Path) -> None:
    """Guards mixtures: a weighted source is read, named with its weight, and held-out data can come from a file."""
    val = write_jsonl(tmp_path / "val.jsonl", chat_rows(4))
    source = json.dumps([{"path": "training_data/sft/c.jsonl", "weight": 2}])
    status, _, err = command("sft", *SMALL, f"data.sft_file={source}", f"data.val_file={val}")
    assert status == 0, err
    report = (tmp_path / "weight" / "sft" / "report.md").read_text(encoding="utf-8")
    assert "(x2)" in report and "held-out bits per byte" in report
