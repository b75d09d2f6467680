"""An adapter and its base as one checkpoint, and exporters that are given an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.adapter_files import load_adapter
from model.lora import LoRASettings, inject_lora
from tools.convert.__main__ import main


@pytest.fixture
def adapter(tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> Path:
    """An adapter that matters, beside its base."""
    torch.manual_seed(3)
    model = SmartHaoAI(HaoAIConfig(**{**vars(tiny_config), "initializer_range": 0.2})).eval()
    model.save_pretrained(tmp_path / "sft", tiny_tokenizer)
    trained = inject_lora(model, LoRASettings(r=4), str(tmp_path / "sft"))
    with torch.no_grad():
        for _, _, pair in trained.pairs(model):
            pair.B.normal_(std=0.3)
    model.save_pretrained(tmp_path / "lora", tiny_tokenizer)
    return tmp_path / "lora"


def both(adapter: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base with the adapter beside it, and of the model in `out`."""
    apart, whole = SmartHaoAI.from_pretrained(adapter.parent / "sft"), SmartHaoAI.from_pretrained(out)
    load_adapter(apart, adapter)
    ids = torch.randint(300, (2, 30))
    with torch.no_grad():
        return apart(ids).logits, whole(ids).logits


@pytest.mark.parametrize("command", ["merge-lora", "hf"])
def test_merging(command: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a base that is written out without the adapter, a folder that still needs the base, a check that checks nothing."""
    pytest.importorskip("transformers")  # which checks what was written
    out = tmp_path / "out"
    main([command, str(adapter), str(out)])
    printed = capsys.readouterr().out
    assert "checked: " in printed and "token ids equal; greedy continuation equal" in printed
    (tmp_path / "sft").rename(tmp_path / "sft_moved")
    whole = SmartHaoAI.from_pretrained(out)
    (tmp_path / "sft_moved").rename(tmp_path / "sft")
    assert whole.adapter is None and (out / "model.safetensors").is_file() and not (out / "adapter_config.json").exists()
    expected, found = both(adapter, out)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert (out / "generation_config.json").is_file() and BPETokenizer.from_pretrained(out).vocab_size == whole.config.vocab_size


def test_half_precision_and_mistakes(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: rounding reported as a failed check; a whole model "merged"; a base that is gone, told by a trace."""
    main(["merge-lora", str(adapter), str(tmp_path / "half"), "--dtype", "bf16"])
    assert "checked: " in capsys.readouterr().out
    expected, found = both(adapter, tmp_path / "half")
    assert 0 < (found - expected).abs().max() < 0.5
    with pytest.raises(ValueError, match="sft is no adapter but a whole model"):
        main(["merge-lora", str(tmp_path / "sft"), str(tmp_path / "out")])
    (tmp_path / "sft").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="needs its base"):
        main(["merge-lora", str(adapter), str(tmp_path / "out")])


@pytest.mark.parametrize("command", ["gguf", "onnx"])
def test_exporters_take_an_adapter(command: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an export of the base alone, or one that looks for weights in the adapter's folder."""
    pytest.importorskip("gguf" if command == "gguf" else "onnxscript")
    merged = tmp_path / "merged"
    main(["merge-lora", str(adapter), str(merged), "--no-check"])
    files = []
    for number, source in enumerate((adapter, merged)):
        out = tmp_path / f"out{number}"
        main([command, str(source), str(out), "--dtype", "f32", "--no-check"])
        files.append(out)
    if command == "gguf":
        from tools.convert.gguf_file import GGUFFile

        first, second = (GGUFFile(file) for file in files)
        assert all((first.read(name) == second.read(name)).all() for name in first.tensors)
    else:
        assert sorted(file.name for file in files[0].iterdir()) == sorted(file.name for file in files[1].iterdir())
        assert (files[0] / "config.json").read_text(encoding="utf-8") == (files[1] / "config.json").read_text(encoding="utf-8")
