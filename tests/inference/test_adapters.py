"""One conversation, several LoRA adapters on one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference import ChatSession
from model import BPETokenizer, SmartHaoAI
from model.adapter_files import save_adapter
from model.lora import LoRASettings, inject_lora, use_adapter


@pytest.fixture
def folders(tmp_path: Path, make_model, tokenizer: BPETokenizer) -> Path:
    """base, and the adapters one and two for it."""
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "base", tokenizer)
    for number, name in enumerate(("one", "two")):
        adapter = inject_lora(model, LoRASettings(r=2 + number, targets="all" if number else "q_proj,v_proj"), str(tmp_path / "base"))
        with torch.no_grad():
            for _, _, pair in adapter.pairs(model):
                pair.B.normal_(std=0.5)
        save_adapter(model, tmp_path / name)
        use_adapter(model, None)
    return tmp_path


def start(folder: Path) -> ChatSession:
    return ChatSession.from_pretrained(folder, device="cpu", temperature=0, max_new_tokens=8)


def test_switching_adapters(folders: Path) -> None:
    """Guards: answers from the cache of the adapter before, an adapter that is read again or mixed with another, a base that changed."""
    expected = {name: start(folders / name).chat("你好") for name in ("base", "one", "two")}
    assert len(set(expected.values())) == 3
    chat = start(folders / "base")
    for name in ("one", "base", "two", "one", "base"):
        chat.use_adapter(None if name == "base" else folders / name)
        assert chat.adapter == (None if name == "base" else (folders / name).as_posix())
        chat.messages = []  # the cache is not told: it must have been cleared
        assert chat.chat("你好") == expected[name], name
    (folders / "two" / "adapter_model.safetensors").unlink()
    chat.use_adapter(folders / "two")
    assert chat.adapter is not None


def test_a_session_on_an_adapter_folder(folders: Path) -> None:
    """Guards: an adapter folder without a tokenizer, and one whose adapter cannot be switched off."""
    chat = start(folders / "two")
    first = chat.chat("Hello!")
    chat.use_adapter(None)
    chat.reset()
    assert chat.chat("Hello!") == start(folders / "base").chat("Hello!") != first


def test_wrong_adapters_leave_the_session_as_it_was(folders: Path, make_model, tokenizer: BPETokenizer) -> None:
    """Guards: a conversation that goes on without an adapter, or with half of one, after a typing error."""
    chat = start(folders / "one")
    answer = chat.chat("你好")
    make_model(tokenizer, seed=5).save_pretrained(folders / "other", tokenizer)
    for wrong, error in ((folders / "nowhere", FileNotFoundError), (folders / "base", FileNotFoundError)):
        with pytest.raises(error):
            chat.use_adapter(wrong)
    stranger = start(folders / "other")
    with pytest.raises(ValueError, match="was trained on another base"):
        stranger.use_adapter(folders / "one")
    assert isinstance(stranger.engine.model, SmartHaoAI) and stranger.engine.model.adapter is None and stranger.adapter is None
    chat.reset()
    assert chat.chat("你好") == answer and chat.adapter == (folders / "one").as_posix()
