"""The command line of tools.convert: what it refuses, and each subcommand from a checkpoint to a checked result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.checkpoint import load_pretrained, save_pretrained
from tools.convert.__main__ import _bytes, _refuse_difference, main
from tools.convert.compare import PROBE_TEXTS, Comparison, greedy, log_probs, probe_rows
from train.config import UsageError


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> Path:
    """A random model with large weights, so that a wrong layout shows, and its tokenizer."""
    torch.manual_seed(3)
    model = SmartHaoAI(HaoAIConfig(**{**vars(tiny_config), "initializer_range": 0.2})).eval()
    save_pretrained(model, tmp_path / "sft", tiny_tokenizer)
    return tmp_path / "sft"


@pytest.mark.parametrize("command", ["hf", "gguf", "onnx", "ollama"])
def test_wrong_dtype_names_the_right_ones(command: str, checkpoint: Path, tmp_path: Path) -> None:
    """Guards: a number type that the format lacks, found out after minutes of writing."""
    with pytest.raises(UsageError, match=f"q5_1 is not available for {command}; choose one of: f32"):
        main([command, str(checkpoint), str(tmp_path / "out"), "--dtype", "q5_1"])
    assert not (tmp_path / "out").exists()


def test_what_stands_there_is_not_replaced_unasked(checkpoint: Path, tmp_path: Path) -> None:
    """Guards: an export over a folder of something else, over the checkpoint itself, or over the folder around it."""
    out = tmp_path / "photos"
    out.mkdir()
    (out / "a.jpg").write_bytes(b"1")
    with pytest.raises(UsageError, match="photos exists.*--overwrite"):
        main(["hf", str(checkpoint), str(out), "--no-check"])
    with pytest.raises(UsageError, match="photos holds no model"):
        main(["hf", str(checkpoint), str(out), "--no-check", "--overwrite"])
    with pytest.raises(UsageError, match="photos is a folder; gguf writes a file"):
        main(["gguf", str(checkpoint), str(out), "--overwrite"])
    for place in (checkpoint, tmp_path):
        with pytest.raises(UsageError, match="is the original, or a folder around it"):
            main(["hf", str(checkpoint), str(place), "--overwrite"])
    assert (out / "a.jpg").read_bytes() == b"1" and (checkpoint / "model.safetensors").is_file()


def test_missing_originals_are_named(tmp_path: Path) -> None:
    """Guards: a trace, or an empty result, for a path with a typing error."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["hf", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.gguf"):
        main(["import-gguf", str(tmp_path / "nowhere.gguf"), str(tmp_path / "out")])


@pytest.mark.parametrize("command", ["hf", "gguf", "onnx", "ollama"])
def test_a_tokenizer_of_another_model_is_refused(
    command: str, tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer
) -> None:
    """Guards: an export whose tokenizer gives ids that the model lacks; the folders made for a result that was then refused."""
    pytest.importorskip("gguf" if command in ("gguf", "ollama") else "onnx" if command == "onnx" else "torch")
    small = SmartHaoAI(HaoAIConfig(**{**vars(tiny_config), "vocab_size": tiny_tokenizer.vocab_size - 1}))
    save_pretrained(small, tmp_path / "sft", tiny_tokenizer)
    with pytest.raises(ValueError, match=f"{tiny_tokenizer.vocab_size} tokens, the model only {tiny_tokenizer.vocab_size - 1}"):
        main([command, str(tmp_path / "sft"), str(tmp_path / "new" / "out"), "--no-check"])
    assert command == "ollama" or not (tmp_path / "new").exists()


def test_sizes() -> None:
    """Guards: 2GB read as 2 bytes, a unit that is dropped."""
    assert [_bytes(text) for text in ("2GB", "1.5 MiB", "70")] == [2 * 10**9, 3 * 2**19, 70]
    for text in ("2XB", "GB", "-1MB", "0.1"):
        with pytest.raises(Exception, match="is not a size"):
            _bytes(text)


def test_a_failed_check_is_an_error_and_says_that_the_file_stays() -> None:
    """Guards: a broken export that ends with status 0; a NaN that compares as small."""
    good = Comparison("x", 2e-5, 9, True, True)
    _refuse_difference(good, True, Path("m.gguf"))
    _refuse_difference(Comparison("x", 0.4, 9, True, False), False, Path("m.gguf"))
    for wrong, exact, words in (
        (Comparison("x", 0.1, 9, True, True), True, "log-probabilities differ by 1.00e-01"),
        (Comparison("x", float("nan"), 9, True, True), True, "log-probabilities differ by nan"),
        (Comparison("x", float("nan"), 9, True, True), False, "log-probabilities are not numbers"),
        (Comparison("x", 0.0, 9, False, True), False, "token ids differ"),
        (Comparison("x", 0.0, 9, None, False), True, "greedy decoding differs"),
    ):
        with pytest.raises(ValueError, match=f"m.gguf failed: {words}.*stays there"):
            _refuse_difference(wrong, exact, Path("m.gguf"))


def test_comparison_says_what_was_not_compared() -> None:
    """Guards: a check that skipped the tokenizer reported as equal."""
    line = Comparison("onnxruntime 1", 1.5e-5, 1200, None, False, note="cached 1e-5").line()
    assert line.startswith("onnxruntime 1: largest log-probability difference 1.50e-05 nats over 1,200 tokens")
    assert "ids not compared" in line and "continuation DIFFERENT" in line and line.endswith("cached 1e-5")


def test_probe_rows_and_greedy(tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: probe rows without the document's start or beyond the context; greedy tokens of another row or place."""
    rows = probe_rows(tiny_tokenizer, 20)
    assert len(rows) == len(PROBE_TEXTS) and max(map(len, rows)) == 20
    assert all(row[0] == tiny_tokenizer.document_end_id for row in rows)
    more = greedy(tiny_model, rows[0], 5)
    assert more == tiny_model.generate(torch.tensor([rows[0]]), max_new_tokens=5, temperature=0.0)[0, len(rows[0]) :].tolist()
    assert torch.allclose(log_probs(tiny_model, rows[0]).exp().sum(-1), torch.ones(20))
    full = list(range(tiny_model.config.max_position_embeddings - 2))
    assert len(greedy(tiny_model, [i % 50 for i in full], 5)) == 2


def test_hf(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: shards that lose a tensor, a folder without its tokenizer or its sampling settings, a check that checks nothing."""
    pytest.importorskip("transformers")
    (checkpoint / "README.md").write_text("about", encoding="utf-8")
    settings = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8")) | {"temperature": 0.3}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    out = tmp_path / "out"
    main(["hf", str(checkpoint), str(out), "--max-shard-size", "30KB"])
    printed = capsys.readouterr().out
    assert "checked: transformers" in printed and "ids equal" in printed and "chat template equal" in printed
    assert len(list(out.glob("model-*.safetensors"))) > 2 and not (out / "model.safetensors").exists()
    assert (out / "README.md").read_text(encoding="utf-8") == "about"
    assert json.loads((out / "generation_config.json").read_text(encoding="utf-8"))["temperature"] == 0.3
    original, written = load_pretrained(checkpoint).state_dict(), load_pretrained(out).state_dict()
    assert all(torch.equal(original[name], written[name]) for name in original)


def test_hf_in_half_precision_replaces_an_earlier_result(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: --overwrite that leaves old shards beside new weights; a type in config.json that is not the file's."""
    out = tmp_path / "out"
    main(["hf", str(checkpoint), str(out), "--max-shard-size", "30KB", "--no-check"])
    main(["hf", str(checkpoint), str(out), "--dtype", "bf16", "--no-check", "--overwrite"])
    assert "not checked (--no-check)" in capsys.readouterr().out
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    original = load_pretrained(checkpoint).embed_tokens.weight
    assert torch.equal(load_pretrained(out).embed_tokens.weight, original.bfloat16().float())


def test_hf_refuses_what_transformers_cannot_express(tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a folder that loads in transformers as another model."""
    changed = {"qk_norm": False, "use_sliding_window": True, "window_size": 8, "window_pattern": "SL"}
    save_pretrained(SmartHaoAI(HaoAIConfig(**{**vars(tiny_config), **changed})), tmp_path / "own", tiny_tokenizer)
    with pytest.raises(ValueError, match="has no architecture in transformers: .*window"):
        main(["hf", str(tmp_path / "own"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_gguf_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a way through GGUF that changes weights or the vocabulary; results that nobody runs."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    main(["gguf", str(checkpoint), str(tmp_path / "model.gguf"), "--dtype", "f32"])
    main(["import-gguf", str(tmp_path / "model.gguf"), str(tmp_path / "back")])
    printed = capsys.readouterr().out
    assert printed.count("checked: llama.cpp") == 2 and "DIFFERENT" not in printed
    original, again = load_pretrained(checkpoint).state_dict(), load_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(original[name], again[name]) for name in original)


@pytest.mark.parametrize("name", ["model.onnx", "folder"])
def test_onnx(name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an OUT that is a file taken for a folder, or the other way round."""
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    main(["onnx", str(checkpoint), str(tmp_path / name)])
    assert "checked: onnxruntime" in capsys.readouterr().out
    assert (tmp_path / name).is_file() == name.endswith(".onnx")
    with pytest.raises(UsageError, match="exists"):
        main(["onnx", str(checkpoint), str(tmp_path / name)])


def test_checkpoint_of_a_running_training_is_finished_first(
    tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a checkpoint with residual scales and training-only heads refused, or exported without its scales."""
    pytest.importorskip("transformers")
    model = SmartHaoAI(dataclasses.replace(tiny_config, residual_scale=True, deep_supervision="tokens"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.add_(0.5 * torch.randn_like(parameter))
    save_pretrained(model, tmp_path / "step", tiny_tokenizer, resumable=True)
    main(["hf", str(tmp_path / "step"), str(tmp_path / "out")])  # fails when log-probabilities differ
    said = capsys.readouterr().out
    assert "residual_scale=True" in said and "deep_supervision='tokens'" in said
