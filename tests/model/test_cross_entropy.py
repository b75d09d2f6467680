"""The chunked cross-entropy against torch's own in double precision, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import model.cross_entropy as cross_entropy
from model.cross_entropy import linear_cross_entropy, linear_log_probs


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
    assert linear_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long))[0].shape == (0,)


def test_huge_logits_stay_finite(seed: int) -> None:
    """Guards: exp of a large logit."""
    hidden, weight, targets, _ = inputs(5)
    assert torch.isfinite(linear_cross_entropy(hidden * 1e4, weight, targets))


def test_linear_log_probs(seed: int) -> None:
    """Guards: log-probabilities that do not sum to the loss."""
    hidden, weight, targets, _ = inputs(21)
    logs = linear_log_probs(hidden, weight, targets)[0]
    exact = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logs.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-logs.sum(), linear_cross_entropy(hidden, weight, targets))


def exact_head(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N,) from all logits at once."""
    logits = hidden @ weight.T
    logs = ((cap * torch.tanh(logits / cap) if cap else logits) / temperature).log_softmax(dim=-1)
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(dim=-1)


@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_each_log_prob_has_its_own_gradient(rows: int, cap: float, seed: int) -> None:
    """Guards: a chunk, the cap's slope, the temperature or the entropy's part left out of one of the gradients."""
    hidden, weight, targets, scale = inputs(rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    other = torch.randn(rows)
    values, entropies = linear_log_probs(hidden, weight, targets, softcap=cap, temperature=1.7, entropy=True)
    assert entropies is not None
    (values * scale + entropies * other).sum().backward()
    expected_values, expected_entropies = exact_head(exact_hidden, exact_weight, targets, cap, 1.7)
    (expected_values * scale.double() + expected_entropies * other.double()).sum().backward()
    torch.testing.assert_close(values.detach().double(), expected_values.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.detach().double(), expected_entropies.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-5)


def test_float64_log_probs_pass_finite_differences(seed: int) -> None:
    """Guards: a gradient that agrees with another one that is wrong in the same way."""
    hidden, weight, targets, _ = inputs(3)
    leaves = (hidden.double().requires_grad_(), weight.double().requires_grad_())

    def both(h: Tensor, w: Tensor) -> Tensor:
        values, entropies = linear_log_probs(h, w, targets, softcap=4.0, temperature=0.8, entropy=True)
        assert entropies is not None
        return torch.stack((values, entropies))

    assert torch.autograd.gradcheck(both, leaves)


def test_log_probs_without_and_with_gradient_are_equal(seed: int) -> None:
    """Guards: a first ratio that is not exactly 1, a first KL that is not exactly 0."""
    hidden, weight, targets, _ = inputs(21)
    hidden.requires_grad_()
    with torch.no_grad():
        before = linear_log_probs(hidden, weight, targets, temperature=0.7)[0]
    values, entropies = linear_log_probs(hidden, weight, targets, temperature=0.7, entropy=True)
    assert torch.equal(before, values) and not before.requires_grad and values.requires_grad
    assert entropies is not None and linear_log_probs(hidden, weight, targets)[1] is None


def test_log_probs_with_one_side_frozen(seed: int) -> None:
    """Guards: a frozen head (LoRA) or trunk that gets, or costs, a gradient."""
    hidden, weight, targets, _ = inputs(10)
    linear_log_probs(hidden.requires_grad_(), weight, targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None
    linear_log_probs(hidden.detach(), weight.requires_grad_(), targets)[0].sum().backward()
    assert weight.grad is not None


def test_log_probs_under_autocast_and_in_bfloat16(seed: int) -> None:
    """Guards: a backward pass outside autocast that multiplies other types than the forward pass; log-probabilities rounded to bf16."""
    hidden, weight, targets, _ = inputs(20)
    exact = exact_head(hidden.double(), weight.double(), targets, 0.0, 1.0)[0]
    for leaves in ((hidden.clone(), weight.clone()), (hidden.bfloat16(), weight.bfloat16())):
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = linear_log_probs(*leaves, targets)[0]
        values.sum().backward()
        assert values.dtype == torch.float32 and all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        torch.testing.assert_close(values.detach().double(), exact, rtol=0.05, atol=0.15)


def test_log_probs_never_hold_all_logits(seed: int) -> None:
    """Guards: (N, V) kept for the backward pass, or built as a whole."""
    hidden, weight, targets = torch.randn(600, 4, requires_grad=True), torch.randn(700, 4, requires_grad=True), torch.arange(600)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_log_probs(hidden, weight, targets, entropy=True)[0].sum().backward()
    assert 0 < largest <= cross_entropy.ROW_MULTIPLE * 700 < hidden.shape[0] * 700


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_log_probs_of_greedy_decoding_are_refused(temperature: float) -> None:
    """Guards: infinite log-probabilities that surface as a loss of nan."""
    with pytest.raises(ValueError, match="temperature"):
        linear_log_probs(*inputs(2)[:3], temperature=temperature)


def test_position_log_probs_take_the_target_of_the_same_position(make_model, seed: int) -> None:
    """Guards: a second shift of targets that are shifted already."""
    model = make_model()
    ids, targets = torch.randint(61, (2, 7)), torch.randint(61, (2, 7))
    targets[0, 3] = -100
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits, dim=-1)
    expected = logs.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    torch.testing.assert_close(model.position_log_probs(ids, targets), expected, rtol=1e-4, atol=1e-5)
