"""Blocks that are computed again in backward: the same loss, the same gradients, less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import HaoAIConfig, SmartHaoAI
from train.speed import compile_blocks

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
EXPERTS = {"n_expert": 4, "moe_intermediate_size": 32, "moe_pattern": "DE", "router_z_loss_coef": 0.01, "router_bias_rate": 0.01}
SMART = {
    "value_residual": True,
    "value_embedding": True,
    "residual_scale": True,
    "attention_gate": "head",
    "use_sliding_window": True,
    "window_size": 8,
    "deep_supervision": "layers",
    "use_reasoning": True,
}


def learned(parts: dict[str, Any], again: bool, compiled: bool = False, bf16: bool = False) -> tuple[float, list[torch.Tensor], Any, int]:
    """Loss, gradients, expert load and the bytes that were kept for backward, of one seeded pass over packed rows."""
    torch.manual_seed(7)
    model = SmartHaoAI(HaoAIConfig(**{**SHAPE, **parts})).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.activation_checkpointing = again
    ids = torch.randint(0, 96, (3, 48))
    segments = torch.ones_like(ids)
    segments[:, 20:] = 2
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if compiled:
        compile_blocks(model)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(ids, labels=ids, segment_ids=segments)
        loss = torch.stack([out.loss_sum, *([] if out.aux_loss is None else [out.aux_loss]), *out.deep_losses.values()]).sum()
    loss.backward()
    gradients = [torch.zeros(1) if p.grad is None else p.grad for p in model.parameters()]
    return float(loss.detach()), gradients, model.take_expert_load(), sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "parts",
    [{}, {"dropout": 0.2, "attention_dropout": 0.2}, EXPERTS, {**EXPERTS, "dropout": 0.2}, SMART],
    ids=["dense", "dropout", "experts", "experts-dropout", "smart"],
)
def test_the_same_is_learned(parts: dict[str, Any], bf16: bool) -> None:
    """Guards other dropout masks, another type or another route of a token in the second pass, parts of a block that lose their
    gradient, and experts' work that is counted twice."""
    plain, again = learned(parts, False, bf16=bf16), learned(parts, True, bf16=bf16)
    assert plain[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))
    assert any(bool(gradient.any()) for gradient in plain[1])
    if plain[2] is not None:
        assert torch.equal(plain[2], again[2]) and float(again[2].sum()) > 0
    assert again[3] < 0.75 * plain[3], "less is kept"


def test_nothing_is_left_behind() -> None:
    """Guards a graph that stays alive in a layer after the second pass has written its routing there."""
    torch.manual_seed(0)
    model = SmartHaoAI(HaoAIConfig(**{**SHAPE, **EXPERTS})).train()
    model.activation_checkpointing = True
    ids = torch.randint(0, 96, (2, 16))
    out = model(ids, labels=ids)
    (out.loss + out.aux_loss).backward()
    assert all(layer.routing is None for layer in model.expert_layers)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{}, EXPERTS], ids=["dense", "experts"])
def test_with_compiled_blocks(parts: dict[str, Any]) -> None:
    """Guards a compiled block that cannot be repeated, or computes something else when it is."""
    plain, again = learned(parts, False), learned(parts, True, compiled=True)
    assert again[0] == pytest.approx(plain[0], rel=1e-4)
    for a, b in zip(plain[1], again[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
