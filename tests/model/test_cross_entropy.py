"""The chunked cross-entropy against torch's own in double precision, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import model.cross_entropy as cross_entropy
from model.cross_entropy import linear_cross_entropy, token_log_probs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and a rest, without a thousand rows."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(rows, 12), torch.randn(31, 12), torch.randint(31, (rows,)), torch.rand(rows) * 3


@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_both_gradients(rows: int, weighted: bool, seed: int) -> None:
    """Guards: a chunk left out, weights applied to the value only, a gradient that ignores what comes after the sum."""
    hidden, weight, targets, token_weights = inputs(rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, token_weights if weighted else None)
    (loss * 0.37).backward()
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = F.cross_entropy(exact_hidden @ exact_weight.T, targets, reduction="none")
    exact = (losses * token_weights.double()).sum() if weighted else losses.sum()
    (exact * 0.37).backward()
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-5)


def test_only_one_side_needs_a_gradient(seed: int) -> None:
    """Guards: a frozen head (LoRA) or frozen trunk (a head trained alone)."""
    hidden, weight, targets, _ = inputs(10)
    linear_cross_entropy(hidden.requires_grad_(), weight, targets).backward()
    assert hidden.grad is not None and weight.grad is None
    linear_cross_entropy(hidden.detach(), weight.requires_grad_(), targets).backward()
    assert weight.grad is not None


def test_evaluation_does_not_pay_for_gradients(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a (V, C) gradient and two more products per chunk in every evaluation."""
    hidden, weight, targets, _ = inputs(10)
    asked = []
    function = cross_entropy._LinearCrossEntropy
    original = function.forward

    def forward(ctx, *arguments):
        asked.extend(ctx.needs_input_grad)
        return original(ctx, *arguments)

    monkeypatch.setattr(function, "forward", staticmethod(forward))
    with torch.no_grad():
        linear_cross_entropy(hidden, torch.nn.Parameter(weight), targets)
    assert asked and not any(asked)


def test_bfloat16_stays_near_and_keeps_its_types(seed: int) -> None:
    """Guards: gradients that come back in another type than their tensor's."""
    hidden, weight, targets, _ = inputs(20)
    low_hidden, low_weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    loss = linear_cross_entropy(low_hidden, low_weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and low_hidden.grad.dtype == low_weight.grad.dtype == torch.bfloat16
    exact = F.cross_entropy(low_hidden.double() @ low_weight.double().T, targets, reduction="sum")
    assert abs(loss.item() - exact.item()) < 0.02 * abs(exact.item())


def test_no_rows(seed: int) -> None:
    """Guards: a batch without labels."""
    hidden, weight = torch.randn(0, 12, requires_grad=True), torch.randn(31, 12, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and torch.equal(weight.grad, torch.zeros(31, 12))
    assert token_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_huge_logits_stay_finite(seed: int) -> None:
    """Guards: exp of a large logit."""
    hidden, weight, targets, _ = inputs(5)
    assert torch.isfinite(linear_cross_entropy(hidden * 1e4, weight, targets))


def test_token_log_probs(seed: int) -> None:
    """Guards: log-probabilities that do not sum to the loss."""
    hidden, weight, targets, _ = inputs(21)
    logs = token_log_probs(hidden, weight, targets)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logs.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-logs.sum(), linear_cross_entropy(hidden, weight, targets))


def test_position_log_probs_take_the_target_of_the_same_position(make_model, seed: int) -> None:
    """Guards: a second shift of targets that are shifted already."""
    model = make_model()
    ids, targets = torch.randint(61, (2, 7)), torch.randint(61, (2, 7))
    targets[0, 3] = -100
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits, dim=-1)
    expected = logs.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    torch.testing.assert_close(model.position_log_probs(ids, targets), expected, rtol=1e-4, atol=1e-5)
