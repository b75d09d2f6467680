"""Losses: pure functions. `lm_loss` goes from a model and a batch to named terms; the others from tensors to tensors.

Each term is a sum together with the name of the weight it is divided by. The loop divides by the weight's total over all
micro-batches, so that a token counts the same however a step is split. The tensor functions give one value per pair, answer or token,
never a mean: the stage adds them up to a term. `python -m tools.loss_parity` compares all of them with other implementations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.output import ModelOutput
from train.config import GRPO_KINDS as GRPO_KINDS
from train.data import Batch


@dataclass
class Term:
    """`total` (a scalar with gradient) is divided by the step's total of `weight`. A metric is logged so, and never differentiated."""

    name: str
    total: Tensor
    weight: str
    metric: bool = False


def lm_loss(model: torch.nn.Module, batch: Batch) -> list[Term]:
    """Next-token cross-entropy over the labelled tokens, in nats: pretraining and SFT differ only by their labels.

    A mixture of experts adds its auxiliary loss: a statistic of each micro-batch, averaged over those of a step.
    """
    return lm_terms(model(**batch.inputs))


def lm_terms(out: ModelOutput) -> list[Term]:
    """The terms of `lm_loss` from what the model returned for a batch with labels."""
    assert out.loss_sum is not None
    terms = [Term("loss", out.loss_sum, "tokens")]
    if out.aux_loss is not None:
        terms.append(Term("aux_loss", out.aux_loss, "micro_batches"))
    for name, total in out.deep_losses.items():
        # Over the same weight as the loss, so that a token counts the same however a step is split.
        terms.append(Term(name, total, "tokens"))
    return terms


# ------------------------------------------------------------------------------------------------ preferences
# P pairs. What a term of them is divided by is the number of pairs: Term("loss", losses.sum(), "pairs").


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., 2023), (P,); ln 2 while the model equals the reference.

    The arguments (P,) are log-probabilities of whole completions, end token included. label_smoothing: assumed share of
    labels that are the wrong way round (conservative DPO, Mitchell 2023).
    """
    return _preferred(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation (Azar et al., 2023), (P,). Here the arguments (P,) are means over the completion's tokens."""
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)).square()


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """SimPO (Meng et al., 2024), (P,): no reference, a target margin gamma. The arguments (P,) are means over the tokens."""
    return _preferred(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Odds-ratio preference optimisation (Hong et al., 2024), (P,): the chosen answer's mean cross-entropy plus beta times the
    odds-ratio loss; no reference. The arguments (P,) are means over the tokens.

    The mean is each answer's own, as in the paper; trl takes that of all tokens of a batch.
    """
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p. Above p = 1 - 1e-6 it stays there, with gradient 0 through 1 - p."""
    log_prob_inside = log_prob.clamp(max=-1e-6)
    near_one = log_prob_inside > -math.log(2)
    rest = torch.where(near_one, torch.log(-torch.expm1(log_prob_inside)), torch.log1p(-torch.exp(log_prob_inside)))
    return log_prob - rest


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024), (S,): answers judged good or bad one by one.

    log_probs, ref_log_probs (S,) of whole completions, desirable (S,) bool, kl from `kto_kl`. Divide by the number of answers.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(beta * sign * (log_probs - ref_log_probs - kl)))


def kto_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KTO's reference point, a scalar without gradient: how far the model is from the reference, estimated on mismatched pairs.

    The arguments (S,) are log-probabilities of completions under a prompt that is not their own. As in trl, the completions of a
    micro-batch move on by one: prompt i with completion i - 1, the first prompt with the last completion. The mean is clamped at 0,
    and 0 without pairs. It is a statistic of the micro-batch: splitting a step otherwise changes it.
    """
    difference = (log_probs - ref_log_probs).detach()
    return difference.mean().clamp(min=0) if difference.numel() else difference.new_zeros(())


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centre_coef: float = 0.0) -> Tensor:
    """Bradley-Terry loss of a reward model, (P,), from the scores (P,) of both answers.

    margin (P,): by how much the chosen one should win (Touvron et al., 2023). centre_coef: pulls the scores of a pair towards
    a sum of 0 (Eisenstein et al., 2023), since the loss leaves their level open.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -F.logsigmoid(difference)
    return losses + centre_coef * (chosen + rejected).square() if centre_coef else losses


def _preferred(logits: Tensor, label_smoothing: float) -> Tensor:
    losses = -F.logsigmoid(logits)
    return (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits) if label_smoothing else losses


# ------------------------------------------------------------------------------------- reinforcement learning
# N tokens of completions; S sequences as rows (S, L) with zeros behind where time matters.


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k3") -> Tensor:
    """KL(model, reference) estimated at each token that the model sampled, (N,) nats (Schulman, 2020: approximating KL divergence).

    k1: unbiased, of either sign. k2: small variance, biased; its gradient is that of the KL. k3: unbiased, never negative. As a loss,
    k1 has an expected gradient of 0: it belongs into the reward. k3 under an older policy's samples is unbiased once it is
    multiplied by the ratio exp(log_probs - old_log_probs), as trl does. Raises ValueError for another kind.
    """
    difference = log_probs - ref_log_probs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {kind!r}; known: k1, k2, k3")


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2015): advantages and returns (S, L), 0 where mask is 0.

    rewards, values, mask (S, L): value t is of the state in which token t was chosen, reward t is for choosing it. After a sequence's
    last real token the value is 0. Positions that are not real are passed over.
    """
    real = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        here = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(real[:, t], here, next_advantage)
        next_value = torch.where(real[:, t], values[:, t], next_value)
        advantages[:, t] = here
    return advantages.masked_fill(~real, 0), (advantages + values).masked_fill(~real, 0)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """x with mean 0 (or its own mean, without shift_mean) and variance 1, over where mask (as x) is real; 0 elsewhere.

    The variance has N - 1 in the denominator and 1e-8 added, as in trl's PPO. A single value has the variance 0.
    """
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    count = weight.sum()
    mean = (x * weight).sum() / count.clamp(min=1)
    variance = ((x - mean).square() * weight).sum() / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * weight


def ppo_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Clipped surrogate of PPO (Schulman et al., 2017) for each token, (N,): -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)."""
    return _clipped_surrogate((log_probs - old_log_probs).exp(), advantages, clip, clip)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, (N,): the larger one of the value and of the value clipped to old +- clip."""
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Rewards (G * K,), the K answers to a prompt standing together, less their group's mean; with `scale` over its standard
    deviation (K - 1 in the denominator) + 1e-4 (Shao et al., 2024). (G * K,); exactly 0 where a group's rewards are equal.

    Raises ValueError for groups of fewer than 2 and for rewards that do not make whole groups.
    """
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 answers to compare, not {group_size}")
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0).flatten()


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kind: str = "dapo",
) -> Tensor:
    """What each token contributes, (N,); `grpo_weights` says how the tokens are added up. advantages (N,) are those of its sequence.

    grpo (Shao et al., 2024), bnpo, dapo (Yu et al., 2025; clip_high above clip_low) and dr_grpo (Liu et al., 2025) share PPO's
    clipped surrogate. cispo (MiniMax, 2025): -A log p weighted by the ratio, which is cut at 1 + clip_high and has no gradient (trl's
    epsilon_high is this whole bound). sapo (Qwen, 2025): a soft gate in place of clipping. Raises ValueError for another kind.
    """
    ratio = (log_probs - old_log_probs).exp()
    if kind == "cispo":
        return -ratio.detach().clamp(max=1 + clip_high) * advantages * log_probs
    if kind == "sapo":
        sharpness = torch.where(advantages > 0, 1.0, 1.05)  # falling tokens are let go sooner
        return -torch.sigmoid(sharpness * (ratio - 1)) * 4 / sharpness * advantages
    _check_kind(kind)
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high)


def grpo_weights(kind: str, lengths: Tensor, max_length: int = 0) -> tuple[Tensor, str]:
    """(N,) weight of each token, and by what the weighted sum is divided: Term("loss", (values * weights).sum(), divisor).

    lengths (S,): tokens of each completion of the micro-batch, in order. grpo and sapo: mean of the sequences' means. bnpo: mean over
    the micro-batch's tokens. dapo and cispo: mean over the tokens of the whole step. dr_grpo: sum over the sequences' number times
    max_length, which favours neither short nor long answers. Raises ValueError for another kind and for dr_grpo without max_length.
    """
    _check_kind(kind)
    ones = torch.ones(int(lengths.sum()), device=lengths.device)
    if kind in ("grpo", "sapo"):
        return ones / lengths.repeat_interleave(lengths), "sequences"
    if kind == "dr_grpo":
        if max_length < 1:
            raise ValueError("dr_grpo needs max_length, the largest number of new tokens")
        return ones / max_length, "sequences"
    if kind == "bnpo":
        return ones / max(len(ones), 1), "micro_batches"
    return ones, "tokens"


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _check_kind(kind: str) -> None:
    if kind not in GRPO_KINDS:
        raise ValueError(f"unknown kind of GRPO loss {kind!r}; known: {', '.join(GRPO_KINDS)}")


# ----------------------------------------------------------------------------------------------- distillation
# Not multiplied by temperature squared (Hinton et al., 2015), which keeps the gradient's size at high temperatures: a caller's choice.


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher, student) of each row, (N,) nats, from logits (N, V): the student covers all that the teacher would say."""
    return _divergence((teacher_logits / temperature).log_softmax(dim=-1), (student_logits / temperature).log_softmax(dim=-1))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student, teacher) of each row, (N,) nats, from logits (N, V): the student keeps to what the teacher finds likely."""
    return forward_kl(teacher_logits, student_logits, temperature)


def topk_logs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (N, k + 1) of tokens `ids` (N, k) and, last, of all others together; (N, V) where ids are all tokens.

    Of a teacher, with ids = logits.topk(k).indices, this is what `topk_forward_kl` needs.
    """
    logs = (logits / temperature).log_softmax(dim=-1)
    chosen = logs.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    rest = logs.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat((chosen, rest), dim=-1)


def topk_forward_kl(student_logits: Tensor, teacher_ids: Tensor, teacher_logs: Tensor, temperature: float = 1.0) -> Tensor:
    """`forward_kl` where of the teacher only `topk_logs` (at the same temperature) are known: all other tokens count as one.

    (N,) nats; never more than the full divergence, and equal to it for k = V.
    """
    return _divergence(teacher_logs, topk_logs(student_logits, teacher_ids, temperature))


def topk_reverse_kl(student_logits: Tensor, teacher_ids: Tensor, teacher_logs: Tensor, temperature: float = 1.0) -> Tensor:
    """`reverse_kl` in the same way: (N,) nats."""
    return _divergence(topk_logs(student_logits, teacher_ids, temperature), teacher_logs)


def _divergence(logs: Tensor, other_logs: Tensor) -> Tensor:
    return (logs.exp() * (logs - other_logs)).sum(dim=-1)
