"""Tests of tools.convert.onnx_export: the graph in onnxruntime against our own model, and the files around it."""

from __future__ import annotations

import json
import secrets
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from model import BPETokenizer, HaoAIConfig, RMSNorm, SmartHaoAI
from model.transformer import pad_left

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tools.convert import onnx_export  # noqa: E402
from tools.convert.onnx_export import OnnxRunner, check_onnx, export_onnx  # noqa: E402

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama, untied, llama3": {"qk_norm": False, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    "qwen2, all heads": {"qk_norm": False, "attention_bias": True, "n_kv_head": 4},
    "windows, yarn": {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL", "rope_scaling": YARN},
    "linear, wide heads": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 12, "n_head": 6, "n_kv_head": 2},
    "mixtral": {"qk_norm": False, "n_expert": 4, "tie_word_embeddings": False},
    "experts and a dense layer": {"n_expert": 5, "n_expert_per_token": 3, "norm_topk_prob": False, "moe_pattern": "ED"},
    "shared expert, choice bias": {"n_expert": 4, "n_shared_expert": 1, "router_bias_rate": 0.01, "moe_intermediate_size": 24},
}


def random_model(tokenizer: BPETokenizer, **fields: Any) -> SmartHaoAI:
    """A model with large fresh weights, uneven norms and biases: no part of it can be left out unnoticed."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "intermediate_size": 48, "max_position_embeddings": 96}
    model = SmartHaoAI(HaoAIConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.15, **{**shape, **fields})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
        for name, tensor in model.state_dict().items():
            if name.endswith((".bias", "choice_bias")):
                tensor.normal_(std=0.5)
    return model


def export(folder: Path, out: Path, dtype: str = "f32") -> Path:
    return export_onnx(folder, out, dtype, log=lambda line: None)


@pytest.fixture
def saved(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> tuple[SmartHaoAI, Path]:
    """A random model and the folder where it was saved."""
    model = random_model(tiny_tokenizer)
    model.save_pretrained(tmp_path / "saved", tiny_tokenizer)
    return model, tmp_path / "saved"


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_graph_computes_the_model(name: str, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a part of an architecture missing from the graph, and a graph that is right only for the lengths it was made with:
    any batch, any block after any past, and rows padded on the left must give our logits."""
    model = random_model(tiny_tokenizer, **MODELS[name])
    model.save_pretrained(tmp_path / "saved", tiny_tokenizer)
    runner = OnnxRunner(export(tmp_path / "saved", tmp_path / "model.onnx"))
    for batch, past, new in [(1, 0, 1), (1, 0, 30), (2, 1, 1), (3, 5, 1), (2, 7, 9), (3, 1, 2), (1, 20, 12)]:
        ids = torch.randint(0, tiny_tokenizer.vocab_size, (batch, past + new))
        logits = runner.in_pieces(ids, [past, new] if past else [new])
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    rows = [torch.randint(0, tiny_tokenizer.vocab_size, (length,)).tolist() for length in (17, 3, 9)]
    ids, mask = pad_left(rows, tiny_tokenizer.pad_token_id)
    for row, logits in zip(rows, runner.in_pieces(ids, [15, 1, 1], mask), strict=True):
        assert not logits.isnan().any()
        torch.testing.assert_close(logits[-len(row) :], model(torch.tensor([row])).logits[0], rtol=1e-4, atol=1e-4)


def test_check_confirms_an_export_and_exposes_another_model(saved: tuple[SmartHaoAI, Path], tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a check that passes whatever the file holds."""
    model, folder = saved
    export(folder, folder.parent / "out")
    result = check_onnx(folder, folder.parent / "out")
    assert result is not None and result.largest < 1e-4 and result.same_greedy and result.tokens > 100
    with torch.no_grad():
        model.state_dict()["layers.1.mlp.down_proj.weight"][0] += 1.0
    model.save_pretrained(folder, tiny_tokenizer)
    result = check_onnx(folder, folder.parent / "out" / "model.onnx")
    assert result is not None and result.largest > 1e-2


def test_folder_holds_what_runtimes_look_for(saved: tuple[SmartHaoAI, Path]) -> None:
    """Guards: names of inputs, outputs or files that generic runtimes do not recognise, and files of the user that vanish."""
    model, folder = saved
    out = folder.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    (out / "model.onnx_data").write_bytes(b"of an older, larger model")
    assert export(folder, out) == out / "model.onnx"
    session = OnnxRunner(out / "model.onnx").session
    parts = [f"{i}.{part}" for i in range(model.config.n_layer) for part in ("key", "value")]
    assert [v.name for v in session.get_inputs()] == ["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)]
    assert [v.name for v in session.get_outputs()] == ["logits", *(f"present.{part}" for part in parts)]
    files = {"notes.txt", "model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == {*files, "chat_template.jinja"}
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["transformers.js_config"] == {
        "dtype": "fp32",
        "kv_cache_dtype": "float32",
    }
    assert BPETokenizer.from_pretrained(out).encode("你好 12") == BPETokenizer.from_pretrained(folder).encode("你好 12")


def test_large_weights_lie_in_a_second_file(saved: tuple[SmartHaoAI, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model above protobuf's 2 GiB that cannot be written, or whose second file has another name or place."""
    model, folder = saved
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 0)
    file = export(folder, folder.parent / "out")
    assert file.stat().st_size < 2 * model.num_parameters() < file.with_name("model.onnx_data").stat().st_size
    assert json.loads(file.with_name("config.json").read_text(encoding="utf-8"))["transformers.js_config"]["use_external_data_format"]
    moved = file.parent.rename(folder.parent / "moved")
    result = check_onnx(folder, moved)
    assert result is not None and result.largest < 1e-4


def test_half_precision_halves_the_file_and_stays_close(saved: tuple[SmartHaoAI, Path]) -> None:
    """Guards: an f16 graph that onnxruntime refuses on a CPU, or that computes norms and softmax in half precision."""
    _, folder = saved
    full = export(folder, folder.parent / "full")
    half = export(folder, folder.parent / "half", dtype="f16")
    weights = {"full": 0, "half": 0}
    for file in (full, half):
        weights[file.parent.name] = sum(len(tensor.raw_data) for tensor in onnx.load(str(file)).graph.initializer)
    assert weights["half"] < 0.55 * weights["full"]
    assert json.loads(half.with_name("config.json").read_text(encoding="utf-8"))["transformers.js_config"]["kv_cache_dtype"] == "float16"
    result = check_onnx(folder, half.parent)
    assert result is not None and 0 < result.largest < 0.1


def test_tied_head_is_stored_once(saved: tuple[SmartHaoAI, Path]) -> None:
    """Guards: the embedding written a second time as the head, which makes small models much larger."""
    model, folder = saved
    file = export(folder, folder.parent / "model.onnx")
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(str(file)).graph.initializer)
    assert stored < 4 * model.num_parameters() + 2000
    assert not (folder.parent / "config.json").exists(), "OUT was a file: nothing else is written"


def test_export_is_quiet(saved: tuple[SmartHaoAI, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Guards: pages of an exporter's warnings between the lines that a user should read."""
    _, folder = saved
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = export_onnx(folder, folder.parent / "model.onnx", log=lines.append)
        check_onnx(folder, file)
    assert capfd.readouterr() == ("", "")
    assert len(lines) == 1 and "model.onnx" in lines[0] and "MiB" in lines[0]


def test_refusals_leave_nothing_behind(saved: tuple[SmartHaoAI, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: half-written files after an error, and a model's own config.json overwritten by its export."""
    _, folder = saved
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match="bf16.*f32, f16"):
        export(folder, folder.parent / "a.onnx", dtype="bf16")
    with pytest.raises(ValueError, match="own folder"):
        export(folder, folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("the graph is not valid")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    for target in ("b.onnx", "new/b.onnx", "new/folder"):
        with pytest.raises(ValueError, match="not valid"):
            export(folder, folder.parent / target)
    assert sorted(folder.parent.rglob("*")) == before
