"""Every architecture there and back: trained, in shards, in half precision and with adapters. Needs the extra `parity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_helpers import assert_equal_logits, clear_ids, load_theirs

from model import SmartHaoAI
from model.checkpoint import save_pretrained

pytest.importorskip("transformers", reason="parity tests need: pip install -e .[parity]")

WINDOWS: dict[str, Any] = {"use_sliding_window": True, "window_size": 5, "window_pattern": "S"}
EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
ALL: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"qk_norm": False, **WINDOWS},
    "mixtral": {"qk_norm": False, **EXPERTS},
    "qwen3_moe": {**EXPERTS, "moe_pattern": "DE", "norm_topk_prob": False},
}


def decisive(model: torch.nn.Module) -> None:
    """Biases that matter, and routers whose choices do not hang on a rounding error."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".gate.weight")):
                parameter.normal_(std=0.5)


def step(model: SmartHaoAI) -> SmartHaoAI:
    """One step of training on random tokens, every weight moved."""
    ids = torch.randint(model.config.vocab_size, (4, 20))
    model.train()(ids, labels=ids).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    return model.eval()


@pytest.mark.parametrize("kind", ALL)
def test_their_model_fine_tuned_here_goes_back(kind: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a downloaded model that comes back from fine-tuning as another architecture, or with another part of the weights."""
    start = make_model(**ALL[kind], n_layer=4)
    decisive(start)
    start.save_pretrained(tmp_path / "start")
    load_theirs(tmp_path / "start").save_pretrained(tmp_path / "theirs")  # config.json and weights as they write them
    ours = SmartHaoAI.from_pretrained(tmp_path / "theirs")
    assert_equal_logits(ours, load_theirs(tmp_path / "theirs"))
    step(ours).save_pretrained(tmp_path / "tuned")
    theirs = load_theirs(tmp_path / "tuned")
    assert theirs.config.model_type == kind
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    assert_equal_logits(ours, theirs)
    ids = torch.randint(61, (1, 40))
    with torch.no_grad():
        assert not torch.allclose(theirs(ids).logits, start(ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ALL)
def test_the_loss_and_its_gradient_equal_theirs(kind: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: fine-tuning here that is another fine-tuning than theirs: labels shifted twice, experts without gradient."""
    ours = make_model(**ALL[kind])
    decisive(ours)
    ours.save_pretrained(tmp_path)
    theirs = load_theirs(tmp_path)
    ids = clear_ids(ours, 2, 30)
    ours_loss, theirs_loss = ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss
    torch.testing.assert_close(ours_loss, theirs_loss, rtol=1e-5, atol=1e-6)
    ours_loss.backward()
    theirs_loss.backward()
    norms = [torch.stack([p.grad.norm() for p in model.parameters()]).norm() for model in (ours, theirs)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_shards_both_ways(kind: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: an index that only its writer reads; experts of one layer in several files."""
    ours = make_model(**ALL[kind])
    decisive(ours)
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 1
    theirs = load_theirs(tmp_path / "ours")
    assert_equal_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 1
    assert_equal_logits(SmartHaoAI.from_pretrained(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_both_ways(kind: str, dtype: torch.dtype, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: half-precision files that are read with another rounding here than there."""
    ours = make_model(**ALL[kind])
    decisive(ours)
    save_pretrained(ours, tmp_path / "ours", dtype=dtype)
    theirs = load_theirs(tmp_path / "ours")
    assert_equal_logits(SmartHaoAI.from_pretrained(tmp_path / "ours"), theirs)
    theirs.to(dtype).save_pretrained(tmp_path / "theirs")
    assert_equal_logits(SmartHaoAI.from_pretrained(tmp_path / "theirs"), load_theirs(tmp_path / "theirs"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe"])
def test_peft_adapters_train_on_our_files(kind: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: module names or shapes on which peft's usual target_modules do not find the projections; a merge that is lost here."""
    peft = pytest.importorskip("peft")
    ours = make_model(**ALL[kind])
    decisive(ours)
    ours.save_pretrained(tmp_path / "base")
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(load_theirs(tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    ids = torch.randint(61, (4, 20))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "adapter").eval()
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    back = SmartHaoAI.from_pretrained(tmp_path / "merged")
    assert_equal_logits(back, merged)
    with torch.no_grad():
        assert not torch.allclose(back(ids).logits, ours(ids).logits, atol=1e-2)
