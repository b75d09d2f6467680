"""Optimisers and schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model import HaoAIConfig, SmartHaoAI
from train.config import OptimizationConfig
from train.optim import Muon, build_optimizers, lr_factor, orthogonalise


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # at steps 0, 1 (warm-up of 2), 2 (peak), 52 (half of what follows), 101 (last)
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.55, 0.1 + 0.9 * 0.01]),
        ("cosine", [0.5, 1, 1, 0.55, 0.1 + 0.45 * (1 + math.cos(math.pi * 0.99))]),
        ("wsd", [0.5, 1, 1, 1, 0.1 + 0.9 * 0.01 / 0.4]),
    ],
)
def test_schedules(schedule: str, factors: list[float]) -> None:
    """Guards the shape of every schedule at its corners."""
    settings = OptimizationConfig(schedule=schedule, warmup_steps=2, min_lr_ratio=0.1, decay_share=0.4)
    assert [lr_factor(settings, step, 102) for step in (0, 1, 2, 52, 101)] == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_short_runs_have_a_usable_rate(schedule: str, total: int) -> None:
    """Guards against a run that is over before its warm-up, or a rate of 0 or above the peak."""
    settings = OptimizationConfig(schedule=schedule, warmup_steps=20, decay_share=0.0 if total == 3 else 0.4)
    factors = [lr_factor(settings, step, total) for step in range(total)]
    assert all(0 < f <= 1 for f in factors) and max(factors) == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser(name: str, tiny_model: SmartHaoAI) -> None:
    """Guards against parameters that are updated twice, or never; norms are not decayed, embeddings not orthogonalised."""
    optimizers = build_optimizers(tiny_model, OptimizationConfig(optimizer=name, weight_decay=0.1), "cpu")
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) and {id(p) for p in held} == {id(p) for p in tiny_model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["weight_decay"] == (0.1 if group["params"][0].dim() == 2 else 0.0)
            if isinstance(optimizer, Muon):
                assert all(p.dim() == 2 and p is not tiny_model.embed_tokens.weight for p in group["params"])
    assert any(isinstance(o, Muon) for o in optimizers) == (name == "muon")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_are_left_out(name: str, tiny_model: SmartHaoAI) -> None:
    """Guards fine-tuning of a part: what does not require a gradient belongs to no optimiser."""
    tiny_model.embed_tokens.weight.requires_grad_(False)
    held = {
        id(p) for o in build_optimizers(tiny_model, OptimizationConfig(optimizer=name), "cpu") for g in o.param_groups for p in g["params"]
    }
    assert held == {id(p) for p in tiny_model.parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64), (1, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    """Guards the Newton-Schulz steps against the exact U V^T of a singular value decomposition."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if min(shape) > 1:
        matrix = u @ torch.diag(s.clamp(min=float(s[0]) / 10)) @ v
    got = orthogonalise(matrix)
    values = torch.linalg.svdvals(got)
    assert got.shape == matrix.shape and values.min() > 0.6 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(got.flatten(), (u @ v).flatten(), dim=0) > 0.97
    assert torch.isfinite(orthogonalise(torch.zeros(shape))).all()


def test_muon_treats_fused_matrices_apart(tiny_model: SmartHaoAI) -> None:
    """Guards q, k, v and gate, up: their fused update equals that of separate matrices."""
    block: Any = tiny_model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    kv = attention.n_kv_head * attention.head_dim
    cases = [
        (attention.qkv_proj.weight, [attention.n_head * attention.head_dim, kv, kv]),
        (mlp.gate_up_proj.weight, [64, 64]),
    ]
    parts = [[torch.nn.Parameter(piece.detach().clone()) for piece in weight.split(rows)] for weight, rows in cases]
    fused = build_optimizers(tiny_model, OptimizationConfig(optimizer="muon", lr=0.1, weight_decay=0.1), "cpu")[1]
    apart = Muon([{"params": [p for pieces in parts for p in pieces]}], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for (weight, rows), pieces in zip(cases, parts, strict=True):
            weight.grad = torch.randn_like(weight)
            for piece, grad in zip(pieces, weight.grad.split(rows), strict=True):
                piece.grad = grad.clone()
        fused.step()
        apart.step()
    for (weight, _), pieces in zip(cases, parts, strict=True):
        torch.testing.assert_close(weight.detach(), torch.cat([p.detach() for p in pieces]))


EXPERTS: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_expert": 3}


def test_muon_treats_every_expert_apart() -> None:
    """Guards stacks of experts: the update of a stack equals that of each expert's gate, up and down matrix by itself."""
    torch.manual_seed(0)
    model = SmartHaoAI(HaoAIConfig(**EXPERTS, moe_intermediate_size=12, n_shared_expert=1))
    layers = model.expert_layers
    fused = build_optimizers(model, OptimizationConfig(optimizer="muon", lr=0.1, weight_decay=0.1), "cpu")[1]
    stacks = [(layer.gate_up_proj, 2) for layer in layers] + [(layer.down_proj, 1) for layer in layers]
    parts = [[torch.nn.Parameter(half.clone()) for expert in stack.detach() for half in expert.chunk(n)] for stack, n in stacks]
    apart = Muon([{"params": [p for pieces in parts for p in pieces]}], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for (stack, n), pieces in zip(stacks, parts, strict=True):
            stack.grad = torch.randn_like(stack)
            stack.grad[1] = 0  # an expert without tokens
            for piece, grad in zip(pieces, [half for expert in stack.grad for half in expert.chunk(n)], strict=True):
                piece.grad = grad.clone()
        fused.step()
        apart.step()
    for (stack, n), pieces in zip(stacks, parts, strict=True):
        expected = torch.stack([torch.cat([p.detach() for p in pieces[e * n : e * n + n]]) for e in range(3)])
        torch.testing.assert_close(stack.detach(), expected)
        assert torch.isfinite(stack).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_experts_have_one_optimiser_and_routers_are_not_orthogonalised(name: str) -> None:
    """Guards stacks that belong to no optimiser or are not decayed, routers in Muon, and choice biases that are trained."""
    model = SmartHaoAI(HaoAIConfig(**EXPERTS, router_bias_rate=0.1, moe_pattern="DE"))
    optimizers = build_optimizers(model, OptimizationConfig(optimizer=name, weight_decay=0.1), "cpu")
    held = {id(p): (o, g) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert held.keys() == {id(p) for p in model.parameters()}
    (layer,) = model.expert_layers
    for stack in (layer.gate_up_proj, layer.down_proj):
        optimizer, group = held[id(stack)]
        assert group["weight_decay"] == 0.1 and isinstance(optimizer, Muon) == (name == "muon")
    assert not isinstance(held[id(layer.gate.weight)][0], Muon)
    assert layer.choice_bias is not None and not layer.choice_bias.requires_grad


def test_biases_are_not_decayed() -> None:
    """Guards the biases of queries, keys and values: no decay, not in Muon."""
    model = SmartHaoAI(HaoAIConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=20, qk_norm=False, attention_bias=True))
    for name in ("adamw", "muon"):
        for optimizer in build_optimizers(model, OptimizationConfig(optimizer=name, weight_decay=0.1), "cpu"):
            for group in optimizer.param_groups:
                assert all(p.dim() >= 2 or (group["weight_decay"] == 0.0 and not isinstance(optimizer, Muon)) for p in group["params"])
