"""The benchmark: rows take turns, figures and ratios are right, wrong results are seen."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model import BPETokenizer, SmartHaoAI
from model.config import HaoAIConfig
from tools import bench
from tools.benchmark import decoding, gpu, measure, plain, quality, runs, shapes, training
from tools.benchmark.machine import Ceilings
from tools.benchmark.measure import Check, Measured, Missing, Row, Turn, ratios, take_turns
from tools.benchmark.report import Result
from train.config import UsageError

TINY = "layers=2,width=32,heads=4,kv_heads=2,ffn=64,vocab=400"
EAGER = "train.compile=off"  # compiling takes longer than all of these tests
CALLS: list[str] = []


def counted(name: str, seconds: list[float], turn: Turn) -> None:
    """A row of 100 units a turn, with these times."""
    turn({"ready": name})
    for each in seconds:
        CALLS.append(name)
        turn({"units": 100, "seconds": each})


def absent(turn: Turn) -> None:
    raise Missing("pip install nothing")


def broken(turn: Turn) -> None:
    raise RuntimeError("out of luck")


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "out.json"
    status = bench.main([*words, "--json", str(file)], isolated=False)
    return status, json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "set_threads", lambda count: None)


def test_rows_take_turns_and_ratios_are_of_the_same_round() -> None:
    """Guards: rows measured one after the other; the first round counted; ratios of medians where the machine's speed changed."""
    CALLS.clear()
    said: list[str] = []
    rows = [
        Row("a", partial(counted, "a", [9.0, 1.0, 2.0, 4.0])),
        Row("absent", absent),
        Row("b", partial(counted, "b", [9.0, 2.0, 6.0, 40.0])),
    ]
    between: list[int] = []
    found = take_turns(rows, 3, isolated=False, between=lambda: between.append(1), log=said.append)
    assert CALLS == ["b", "a", "a", "b", "b", "a", "a", "b"] and len(between) == 3
    assert any("absent" in line and "pip install nothing" in line for line in said)
    a, b = found
    assert a.facts["ready"] == "a" and a.rates == [100, 50, 25] and b.rate == {"median": 100 / 6, "min": 2.5, "max": 50}
    assert ratios(found, {"a": ["b", "a", "nothing"]}) == {"a / b": 3.0}  # of 2, 3 and 10


def test_a_row_that_fails_is_named() -> None:
    """Guards: a benchmark that hangs, or shows a table with a row missing, when a program breaks."""
    with pytest.raises(ValueError, match="'wrong' failed(.|\n)*out of luck"):
        take_turns([Row("wrong", broken), Row("a", partial(counted, "a", [1.0]))], 1, isolated=False)


def test_a_row_in_a_process_of_its_own() -> None:
    """Guards: peak memory of another row or of this process; errors of a process lost."""
    size = 64 * 2**20
    (found,) = take_turns([Row("memory", partial(holding, size))], 1, log=lambda text: None)
    assert found.facts["peak_memory_mb"] is None or found.facts["peak_memory_mb"] + 60 < (found.peak_memory_mb or 0)
    with pytest.raises(ValueError, match="out of luck"):
        take_turns([Row("wrong", broken)], 1, log=lambda text: None)


def holding(size: int, turn: Turn) -> None:
    turn({})
    block = b"x" * size
    turn({"units": len(block), "seconds": 1.0})
    turn({"units": len(block), "seconds": 1.0})


def test_training_rows_agree_and_the_file_has_its_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: programs that compute different things; fields of the JSON that scripts read; variants ignored."""
    pytest.importorskip("transformers", reason="a row of the comparison")
    short = ["--rounds", "1", "--seconds", "0.01", "--batch", "2", "--row-length", "64"]
    own = ["--own", "data.max_length=64", "train.batch_size=2", EAGER]
    status, data = run(tmp_path, "train", "--shape", TINY, *short, "train.optimizer=adamw,model.n_expert=2", *own)
    assert status == 0 and data["correct"] and data["command"].startswith("python -m tools.bench train")
    names = [row["name"] for row in data["rows"]]
    variant = "ours train.optimizer=adamw,model.n_expert=2"
    assert names == ["ours", variant, "plain fp32", "plain bf16", "transformers fp32", "transformers bf16"]
    for row in data["rows"]:
        assert set(row["tokens_per_second"]) == {"median", "min", "max"} and row["tokens_per_second"]["min"] > 0
        assert 0 < row["share_of_ceiling"] and len(row["checks"]) == 2 and all(check["ok"] for check in row["checks"])
    assert {"machine", "ceilings", "rows", "ratios"} <= set(data) and {"ours / plain fp32", f"{variant} / ours"} <= set(data["ratios"])
    assert data["ceilings"]["bf16_4096x512x2048_tflops"]["median"] > 0
    by_name = {row["name"]: row["tokens_per_second"]["median"] for row in data["rows"]}
    assert data["ratios"]["ours / plain fp32"] == pytest.approx(by_name["ours"] / by_name["plain fp32"], rel=1e-3)
    assert "ours train.optimizer=adamw" in capsys.readouterr().out


def test_a_wrong_loss_makes_the_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a program that is fast because it computes something else."""
    right = plain.plain_loss
    monkeypatch.setattr(plain, "plain_loss", lambda logits, labels: right(logits, labels) * 1.01)
    short = ["--rounds", "1", "--seconds", "0.01", "--batch", "2", "--row-length", "64", "--own", "data.max_length=64", EAGER]
    status, data = run(tmp_path, "train", "--shape", TINY, "--against", "plain", *short)
    assert status == 1 and not data["correct"] and "WRONG plain fp32: loss" in capsys.readouterr().out
    assert [check["ok"] for row in data["rows"] if row["name"] == "ours" for check in row["checks"]] == [True, True]


def test_not_a_number_is_wrong() -> None:
    """Guards: nan that passes because it is not larger than the tolerance."""
    assert not Check("loss", math.nan, 1.0, math.nan, 1.0).ok
    assert not measure.relative("loss", math.inf, 1.0, 0.1).ok


def test_answers_agree(tmp_path: Path, tiny_model, tiny_tokenizer) -> None:
    """Guards: decode rows of other weights or prompts; a share of the wrong ceiling."""
    pytest.importorskip("transformers", reason="a row of the comparison")
    words = ["--shape", TINY, "--rounds", "1", "--seconds", "0.01", "--against", "transformers"]
    status, data = run(tmp_path, "decode", *words, "--batches", "1", "3", "--prompt", "6", "--new", "5", "--precision", "fp32", "int8")
    assert status == 0 and [row["group"] for row in data["rows"]] == ["batch 1"] * 4 + ["batch 3"] * 4
    assert "ours fp32 / transformers fp32, batch 3" in data["ratios"] and all(row["first_ms"]["rounds"] for row in data["rows"])
    tiny_model.save_pretrained(tmp_path / "given", tiny_tokenizer)
    words += ["--model", str(tmp_path / "given"), "--batcher", "--precision", "fp32"]
    status, data = run(tmp_path, "prefill", *words, "--prompts", "20")
    assert status == 0 and data["share_of"] == "the bf16 product" and data["rows"][0]["group"] == "prompt 20"
    assert [row["name"] for row in data["rows"]][:2] == ["ours fp32", "ours fp32, batcher"] and "given" in data["what"]
    with pytest.raises(UsageError, match="context of .* is 256"):
        run(tmp_path, "prefill", *words, "--prompts", "500")


def test_wrong_logits_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a check of answers that anything passes."""
    make = decoding.make_engine

    def other(folder: Path, precision: str, device: str) -> Any:
        engine = make(folder, precision, device)
        engine.model.norm.weight.data[0] = 3.0
        return engine

    monkeypatch.setattr(decoding, "make_engine", other)
    words = [
        "--shape",
        TINY,
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--against",
        "--batches",
        "1",
        "--prompt",
        "4",
        "--new",
        "3",
        "--precision",
        "fp32",
    ]
    status, data = run(tmp_path, "decode", *words)
    assert status == 1 and not data["rows"][0]["checks"][0]["ok"]


def test_the_plain_model_computes_the_same(seed: int, tmp_path: Path) -> None:
    """Guards: an unfair or wrong opponent, and weights loaded under wrong names."""
    config = HaoAIConfig(vocab_size=400, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=64, max_position_embeddings=32)
    ours = SmartHaoAI(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = plain.PlainModel(config)
    from safetensors.torch import load_file

    theirs.load_disk_weights(load_file(tmp_path / "model.safetensors"))
    ids = torch.randint(400, (2, 9))
    torch.testing.assert_close(theirs(ids), ours(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="dense"):
        plain.PlainModel(HaoAIConfig(vocab_size=400, n_expert=2))


def test_padded_rows_hold_what_is_said() -> None:
    """Guards: padding that is learned, or counted as tokens."""
    ids, labels = plain.padded_rows([[1, 2, 3], [4, 5, 6, 7, 8]], 4, pad_id=9)
    assert ids.tolist() == [[1, 2, 3, 9], [4, 5, 6, 7]] and labels.tolist() == [[1, 2, 3, -100], [4, 5, 6, 7]]
    run = plain.PlainRun.of(HaoAIConfig(vocab_size=32, n_layer=1, n_head=2, n_embd=16, max_position_embeddings=8))
    losses = [run.step(ids, labels) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_documents_fill_padded_rows_as_they_do_in_practice(tmp_path: Path) -> None:
    """Guards: a padded opponent that wastes more, or less, than the text of the comparison did (85% real)."""
    place = shapes.prepare(tmp_path, shapes.parse_shape(TINY, 64))
    store, _ = training.documents_of(place)
    lengths = store.train.lengths.clip(max=shapes.ROW_LENGTH)
    assert 0.82 < float(lengths.mean()) / shapes.ROW_LENGTH < 0.88


def test_shapes(tmp_path: Path) -> None:
    """Guards: a shape that is not the one of the published figures; typing errors taken for defaults."""
    known = shapes.parse_shape("known", 512)
    assert (known.n_layer, known.n_embd, known.ffn_size, known.n_head, known.kv_heads, known.vocab_size) == (8, 512, 1664, 8, 4, 6400)
    assert 29e6 < known.account().parameters < 31e6
    assert shapes.parse_shape("layers=3,width=64,heads=4,kv_heads=2", 16).n_layer == 3
    assert 0.09e9 < shapes.parse_shape("0.1b", 16).account().parameters < 0.15e9
    assert 0.35e9 < shapes.parse_shape("0.4b", 16).account().parameters < 0.45e9
    for wrong in ("unknown", "layers=two", "width=33,heads=8", "depth=3"):
        with pytest.raises(UsageError):
            shapes.parse_shape(wrong, 16)
    with pytest.raises(UsageError):
        bench.main(["train", "--rounds", "0"])
    assert (tmp_path).is_dir()


def test_the_account_of_a_result() -> None:
    """Guards: columns mixed up; a table that hides that something was wrong."""
    row = Measured("ours", "batch 1", rates=[10.0, 30.0, 20.0], peak_memory_mb=5.0, extra={"first_ms": [3.0, 1.0, 2.0]})
    row.checks.append(measure.relative("loss", 1.0, 1.0, 0.1))
    result = Result("what", "machine", [row], Ceilings(small=True), {"ours / x": 2.0}, {("batch 1", "ours"): 0.5}, "all")
    assert result.ok and result.json()["rows"][0]["share_of_ceiling"] == 0.5
    cells = result.table()[1].split("  ")
    assert [cell.strip() for cell in cells if cell.strip()] == ["batch 1: ours", "20", "(10-30)", "5", "50.0%", "2.0"]
    assert "| batch 1: ours | 20 | 10-30 | 5 | 50% |" in result.markdown()
    row.checks.append(measure.relative("norm", 2.0, 1.0, 0.1))
    assert not result.ok and "WRONG batch 1: ours: norm" in result.text()


def test_experts_and_windows(tmp_path: Path) -> None:
    """Guards: rows of experts or windows that are the dense, full model; experts that cost more parameters per token."""
    words = ["experts", "--shape", TINY, "--contexts", "24", "--seconds", "0.01", "--rounds", "1", "--own", EAGER]
    file = tmp_path / "out.json"
    assert bench.main([*words, "--json", str(file)], isolated=False) == 0
    train, decode = json.loads(file.read_text(encoding="utf-8"))
    assert len(train["rows"]) == len(decode["rows"]) == 4
    assert "8 experts, 2 used / dense, full attention, rows of 24" in train["ratios"]
    assert "windows of 512 / dense, full attention, context 24" in decode["ratios"]


def test_gpu_rows_run_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a script for rare machines that breaks on a name; one that says nothing where it cannot run."""
    pytest.importorskip("transformers", reason="a row of the comparison")
    assert any("train.compile=on" in words for words in gpu.variants(2, 96).values())
    monkeypatch.setattr(gpu, "SWITCHES", {"compile": (False,)})
    out = tmp_path / "gpu"
    words = ["gpu", "--out", str(out), "--shapes", TINY, "--batch", "2", "--length", "96", "--seconds", "0.01", "--rounds", "1"]
    assert bench.main([*words, "--device", "cpu"], isolated=False) == 0
    training_result, decoding_result = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    assert len(training_result["rows"]) == len(gpu.variants(2, 96)) and len(decoding_result["rows"]) == 9
    assert "peak of the plan" in " ".join(training_result["notes"])
    assert (out / "gpu.md").read_text(encoding="utf-8").count("\n## ") == 1
    if not torch.cuda.is_available():
        capsys.readouterr()
        assert bench.main(["gpu", "--out", str(tmp_path / "none")]) == 1
        assert "no CUDA" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_start_names_what_is_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a table of start-up times that cannot say what takes the time."""
    words = ["start", "--shape", TINY, "--rounds", "1", "--only", "python", "import SmartHaoAI"]
    status, data = run(tmp_path, *words)
    assert status == 0 and [row["name"] for row in data["rows"]] == ["python", "import SmartHaoAI"]
    assert data["rows"][0]["seconds"]["median"] < data["rows"][1]["seconds"]["median"]
    assert any(name == "torch" for name, _, _ in data["imports"]["import SmartHaoAI"]) and "torch" in capsys.readouterr().out


def test_a_profile_accounts_for_the_whole_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: operations that are counted twice or not at all; attention and loss lost among the products they consist of."""
    words = ["profile", "--shape", TINY, "--steps", "2", "--batches", "2", "--precision", "bf16", "--own", EAGER, "train.precision=fp32"]
    status, data = run(tmp_path, *words)
    assert status == 0 and list(data["rows"]) == ["training", "decoding, batch 2, bf16"]
    training, decoding = (row["milliseconds"] for row in data["rows"].values())
    assert {"attention", "loss", "optimiser", "matrix products"} <= set(training)
    assert {"attention", "matrix products"} <= set(decoding)
    for row in data["rows"].values():
        # Recorded work cannot take longer than the clock says: then something would be counted twice.
        assert row["milliseconds"]["between operations (Python)"] > 0
    assert "between operations" in capsys.readouterr().out


def test_all_commands_are_there() -> None:
    """Guards: a command that the parser knows and nothing carries out."""
    parser = bench.make_parser()
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    assert set(commands) == set(runs.RUNS)


def test_quality_of_both_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: programs that are measured on other text than was said, or a plain model that loses its weights on the way to the disk."""
    files = []
    for name, rows in (("train", range(400)), ("held_out", range(400, 420))):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{row} and {row} are {2 * row}. " * 5}) + "\n" for row in rows), encoding="utf-8")
        files.append(str(file))
    shape = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.head_dim=16", "data.max_length=64", "train.batch_size=4"]
    words = ["quality", "--train", files[0], "--val", files[1], "--minutes", "0.05", "--shape", TINY, "--context", "64"]
    out = tmp_path / "out.json"
    status = bench.main([*words, "--own", *shape, "--out", str(tmp_path / "runs"), "--json", str(out)], isolated=False)
    assert status == 0 and "held_out.jsonl, bits/byte" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"ours, 0.05 minutes", "plain fp32"}
    for row in rows.values():
        assert row["steps"] > 0 and row["tokens"] > 0 and 0 < row["bits_per_byte"]["held_out.jsonl"] < 8


def test_the_plain_model_on_disk(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a plain model that is measured with other weights than it was trained to."""
    config = shapes.parse_shape(f"{TINY[: TINY.rindex('=')]}={tiny_tokenizer.vocab_size}", 128)
    run = plain.PlainRun.of(config)
    ids = torch.randint(tiny_tokenizer.vocab_size, (2, 9))
    run.step(ids, ids)
    quality.save(run, config, tiny_tokenizer, tmp_path / "plain")
    written = SmartHaoAI.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, run.model(ids), rtol=1e-4, atol=1e-5)
