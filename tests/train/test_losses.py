"""Losses: what holds exactly, edges and errors here; agreement with float64 maths, trl and torchrl through `tools.loss_cases`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tools.loss_cases import HAND, Case, cases
from tools.loss_parity import compare
from train import losses

LN2 = torch.tensor(math.log(2)).item()

pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.name} {case.source}")
def test_value_and_gradient_against_the_reference(case: Case, seed: int) -> None:
    """Guards: a sign, a mean in place of a sum, a mask, a clip bound or a temperature that is not the published one."""
    if case.source != HAND:
        pytest.importorskip(case.source)
    row = compare(case, 3, seed)
    assert not row.failed, row.failed
    # Wider than the tool's limit: a fresh seed may meet an ill-conditioned sum, a wrong formula is never this near.
    assert row.value < 3e-6 and (row.gradient or 0.0) < 3e-6


def leaves(*shape: int, count: int) -> list[Tensor]:
    return [(-3 * torch.rand(shape)).requires_grad_() for _ in range(count)]


# ---------------------------------------------------------------------------------------------- preferences


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_dpo_begins_at_ln_2(beta: float) -> None:
    """Guards: a reference that is not subtracted from both answers; a first loss near ln 2 for the wrong reason."""
    chosen, rejected = leaves(5, count=2)
    for smoothing in (0.0, 0.2):
        found = losses.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta, smoothing)
        torch.testing.assert_close(found, torch.full((5,), LN2), rtol=0, atol=0 if not smoothing else 1e-7)
    gradient = torch.autograd.grad(losses.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta).sum(), (chosen, rejected))
    torch.testing.assert_close(gradient[0], torch.full((5,), -beta / 2))
    torch.testing.assert_close(gradient[1], torch.full((5,), beta / 2))


def test_preferences_far_apart_stay_finite() -> None:
    """Guards: log(sigmoid(x)) of a large x."""
    far, near = torch.tensor([-5000.0, 0.0]), torch.tensor([0.0, -5000.0])
    zero = torch.zeros(2)
    for found in (
        losses.dpo_loss(far, near, zero, zero, 1.0, 0.1),
        losses.simpo_loss(far, near, 2.0, 1.0),
        losses.reward_loss(far, near),
        losses.kto_loss(far, zero, torch.tensor([True, False]), torch.tensor(0.0), 1.0),
    ):
        assert torch.isfinite(found).all()
    assert losses.reward_loss(far, near)[0] == 5000


def test_orpo_of_a_certain_answer_is_finite() -> None:
    """Guards: log(1 - 1) for an answer learned by heart, and the gradient of its neighbour branch."""
    chosen, rejected = torch.tensor([0.0, -1e-9, -0.3, -60.0], requires_grad=True), torch.tensor([-0.5, -60.0, 0.0, -1e-9])
    found = losses.orpo_loss(chosen, rejected, 0.2)
    found.sum().backward()
    assert torch.isfinite(found).all() and chosen.grad is not None and torch.isfinite(chosen.grad).all()
    p = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.999], dtype=torch.float64)
    torch.testing.assert_close(losses.log_odds(p.log()), torch.log(p / (1 - p)), rtol=1e-9, atol=1e-9)


def test_the_margin_of_a_reward_counts_against_the_chosen_answer() -> None:
    """Guards: a margin with the wrong sign; centring that is on by default."""
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    plain = losses.reward_loss(chosen, rejected)
    assert losses.reward_loss(chosen, rejected, torch.tensor([0.5])) > plain
    torch.testing.assert_close(losses.reward_loss(chosen, rejected, centre_coef=0.1), plain + 0.1)
    assert losses.reward_loss(torch.zeros(1), torch.zeros(1)).item() == LN2


def test_the_reference_point_of_kto_is_clamped_and_has_no_gradient() -> None:
    """Guards: a negative KL, a gradient through the mismatched pairs, a mean of nothing."""
    logs = torch.randn(4, requires_grad=True)
    kl = losses.kto_kl(logs, logs.detach() - 2)
    assert kl.item() == pytest.approx(2) and not kl.requires_grad
    assert losses.kto_kl(logs, logs.detach() + 2).item() == 0
    assert losses.kto_kl(logs[:0], logs[:0]).item() == 0
    desirable = torch.tensor([True, False, True, False])
    found = losses.kto_loss(logs, logs.detach(), desirable, torch.zeros(()), 0.1)
    assert found.tolist() == [0.5] * 4
    found.sum().backward()
    assert logs.grad is not None and logs.grad.sign().tolist() == [-1, 1, -1, 1]  # good answers up, bad ones down
    weighted = losses.kto_loss(logs, logs.detach(), desirable, torch.zeros(()), 0.1, 2.0, 0.0)
    assert weighted.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_no_pairs() -> None:
    """Guards: a micro-batch whose pairs were all left out."""
    none = torch.zeros(0, requires_grad=True)
    for found in (
        losses.dpo_loss(none, none, none, none, 0.1),
        losses.ipo_loss(none, none, none, none, 0.1),
        losses.simpo_loss(none, none, 2.0, 1.0),
        losses.orpo_loss(none, none, 0.1),
        losses.reward_loss(none, none, none, 0.1),
        losses.kto_loss(none, none, torch.zeros(0, dtype=torch.bool), torch.zeros(()), 0.1),
    ):
        assert found.shape == (0,) and found.sum().item() == 0


# ----------------------------------------------------------------------------------- reinforcement learning


def test_equal_log_probs_have_a_ratio_of_exactly_1() -> None:
    """Guards: a first update that is clipped, or whose KL is not 0."""
    logs = -30 * torch.rand(200)
    advantages = torch.randn(200)
    assert torch.equal(losses.ppo_policy_loss(logs, logs, advantages, 0.2), -advantages)
    for kind in ("grpo", "bnpo", "dapo", "dr_grpo"):
        assert torch.equal(losses.grpo_loss(logs, logs, advantages, kind=kind), -advantages)
    for kind in ("k1", "k2", "k3"):
        assert torch.equal(losses.kl_estimate(logs, logs, kind), torch.zeros(200))


@pytest.mark.parametrize("kind", losses.GRPO_KINDS)
def test_the_first_gradient_is_the_policy_gradient(kind: str) -> None:
    """Guards: half a gradient where the two branches of the clip are equal; a kind that starts from another one."""
    logs = (-3 * torch.rand(9)).requires_grad_()
    advantages = torch.randn(9)
    (gradient,) = torch.autograd.grad(losses.grpo_loss(logs, logs.detach(), advantages, kind=kind).sum(), logs)
    torch.testing.assert_close(gradient, -advantages)


def test_what_is_clipped_has_no_gradient() -> None:
    """Guards: bounds that are swapped, or clip what should come back."""
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.25])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    logs = ratio.log().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.ppo_policy_loss(logs, torch.zeros(5), advantages, 0.2).sum(), logs)
    assert (gradient != 0).tolist() == [True, False, False, True, False]
    (gradient,) = torch.autograd.grad(losses.grpo_loss(logs, torch.zeros(5), advantages, 0.2, 0.28).sum(), logs)
    assert (gradient != 0).tolist() == [True, False, False, True, True]  # 1.25 is within the higher bound


def test_kl_estimates_of_a_known_divergence() -> None:
    """Guards: estimators of the KL in the other direction."""
    p, q = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * losses.kl_estimate(p.log(), q.log(), kind)).sum(), exact)
    assert (losses.kl_estimate(p.log(), q.log(), "k3") >= 0).all()
    with pytest.raises(ValueError, match="k4.*k1, k2, k3"):
        losses.kl_estimate(p, q, "k4")


def test_k3_of_tiny_differences_is_not_lost() -> None:
    """Guards: exp(x) - x - 1 in fp32, which is 0 or negative for small x."""
    logs = torch.full((4,), -1.0)
    found = losses.kl_estimate(logs, logs + torch.tensor([1e-3, -1e-3, 3e-4, -3e-4]), "k3")
    assert (found > 0).all()


def test_advantages_of_a_single_step_and_of_nothing() -> None:
    """Guards: a value taken from the padding behind a sequence, or from the next one; sequences without tokens."""
    rewards, values = torch.tensor([[1.0, 9.0], [0.0, 0.0]]), torch.tensor([[0.25, 7.0], [3.0, 3.0]])
    advantages, returns = losses.gae(rewards, values, torch.tensor([[1, 0], [0, 0]]), 0.9, 0.8)
    assert advantages.tolist() == [[0.75, 0.0], [0.0, 0.0]] and returns.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    advantages, returns = losses.gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), 1.0, 0.95)
    assert advantages.shape == returns.shape == (2, 0)


def test_gaps_are_passed_over() -> None:
    """Guards: tool results inside a completion that break the chain of rewards."""
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    whole = losses.gae(rewards, values, torch.ones(1, 4), 0.9, 0.8)
    spread = torch.tensor([True, False, True, True, False, True])[None]
    gapped_rewards, gapped_values = (torch.full((1, 6), 5.0).masked_scatter(spread, x) for x in (rewards, values))
    for ours, expected in zip(losses.gae(gapped_rewards, gapped_values, spread, 0.9, 0.8), whole, strict=True):
        torch.testing.assert_close(ours[spread], expected[0])
        assert not ours[~spread].any()


def test_returns_with_lambda_1_are_sums_of_rewards() -> None:
    """Guards: a discount applied twice."""
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    _, returns = losses.gae(rewards, values, torch.ones(3, 5), 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-5, atol=1e-5)


def test_whitening_of_nothing_one_and_equal_values() -> None:
    """Guards: nan from a variance of one value, padding that counts, padding that is not 0 afterwards."""
    mask = torch.tensor([[True, False], [False, False]])
    assert losses.whiten(torch.tensor([[3.0, 8.0], [8.0, 8.0]]), mask).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert losses.whiten(torch.tensor([[3.0, 8.0], [8.0, 8.0]]), mask, shift_mean=False).tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert losses.whiten(torch.randn(2, 2), torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert losses.whiten(torch.full((4,), 2.0)).tolist() == [0.0] * 4
    found = losses.whiten(torch.randn(1000) * 7 + 30)
    assert abs(found.mean()) < 1e-4 and abs(found.std() - 1) < 1e-3


def test_groups_of_equal_rewards_teach_nothing() -> None:
    """Guards: rounding of a mean, divided by 1e-4, that becomes an advantage; groups cut at the wrong place."""
    rewards = torch.cat((torch.full((3,), 0.1), torch.tensor([0.0, 1.0, 1.0])))
    for scale in (True, False):
        found = losses.group_advantages(rewards, 3, scale)
        assert found[:3].tolist() == [0.0] * 3 and found[3] < 0 < found[4] == found[5]
    with pytest.raises(ValueError, match="at least 2"):
        losses.group_advantages(rewards, 1)
    with pytest.raises(ValueError, match="6 rewards.*groups of 4"):
        losses.group_advantages(rewards, 4)


def test_each_aggregation_divides_by_its_own() -> None:
    """Guards: a long answer that counts more, or less, than its aggregation says."""
    lengths = torch.tensor([1, 0, 3])
    weights = {kind: losses.grpo_weights(kind, lengths, max_length=8) for kind in losses.GRPO_KINDS}
    thirds = pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3])
    assert weights["grpo"][0].tolist() == thirds and weights["sapo"][0].tolist() == thirds
    assert weights["bnpo"][0].tolist() == [0.25] * 4 and weights["dr_grpo"][0].tolist() == [0.125] * 4
    assert weights["dapo"][0].tolist() == weights["cispo"][0].tolist() == [1.0] * 4
    divisors = {kind: divisor for kind, (_, divisor) in weights.items()}
    assert divisors == dict(grpo="sequences", sapo="sequences", dr_grpo="sequences", bnpo="micro_batches", dapo="tokens", cispo="tokens")
    assert all(losses.grpo_weights(kind, lengths[:0], 8)[0].shape == (0,) for kind in losses.GRPO_KINDS)
    with pytest.raises(ValueError, match="max_length"):
        losses.grpo_weights("dr_grpo", lengths)
    with pytest.raises(ValueError, match="'ppo'.*dapo"):
        losses.grpo_weights("ppo", lengths)
    with pytest.raises(ValueError, match="'ppo'.*dapo"):
        losses.grpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), kind="ppo")


# --------------------------------------------------------------------------------------------- distillation


def test_divergences_of_equal_rows_and_whole_vocabularies() -> None:
    """Guards: a divergence that is not 0 between equals; a remainder counted where there is none, or with a gradient of nan."""
    student, teacher = torch.randn(4, 11, requires_grad=True), torch.randn(4, 11)
    assert not losses.forward_kl(teacher, teacher, 2.0).any() and not losses.reverse_kl(teacher, teacher, 2.0).any()
    for k in (1, 5, 11):
        ids = teacher.topk(k).indices
        logs = losses.topk_logs(teacher, ids, 2.0)
        torch.testing.assert_close(logs.exp().sum(-1), torch.ones(4))
        for top, full in ((losses.topk_forward_kl, losses.forward_kl), (losses.topk_reverse_kl, losses.reverse_kl)):
            found, whole = top(student, ids, logs, 2.0), full(student, teacher, 2.0)
            assert (found <= whole + 1e-6).all() and (found >= -1e-6).all()
            (gradient,) = torch.autograd.grad(found.sum(), student)
            assert torch.isfinite(gradient).all()
            if k == 11:
                torch.testing.assert_close(found, whole)


def test_the_direction_of_a_divergence() -> None:
    """Guards: forward and reverse exchanged: the forward one punishes what the student leaves out."""
    teacher = torch.tensor([[5.0, 5.0, -5.0]])
    covers_half, covers_more = torch.tensor([[5.0, -5.0, -5.0]]), torch.tensor([[5.0, 5.0, 5.0]])
    assert losses.forward_kl(covers_half, teacher) > losses.forward_kl(covers_more, teacher)
    assert losses.reverse_kl(covers_half, teacher) < losses.reverse_kl(covers_more, teacher)
