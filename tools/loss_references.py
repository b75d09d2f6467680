"""What `tools.loss_parity` compares the losses with: plain float64 maths, and the code of trl and torchrl itself.

Both keep most of their maths inside trainers and losses. They are called here without one: the method as a plain function, on a
stand-in that has the attributes it reads. A version that reads others makes the row fail with an AttributeError. The packages are
imported inside the functions: they are optional. Shapes as in train/losses.py; the plain functions return means where trl does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------ by hand


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    x = beta * (chosen - rejected) - beta * (ref_chosen - ref_rejected)
    return (1 - smoothing) * softplus(-x) + smoothing * softplus(x)


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    return (chosen - rejected - ref_chosen + ref_rejected - 0.5 / beta) ** 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    return softplus(gamma - beta * chosen + beta * rejected)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    odds_chosen, odds_rejected = (logs.exp() / (1 - logs.exp()) for logs in (chosen, rejected))
    return -chosen + beta * softplus(-torch.log(odds_chosen / odds_rejected))


def kto(logs: Tensor, ref: Tensor, desirable: Tensor, kl_logs: Tensor, kl_ref: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    kl = max(0.0, float((kl_logs - kl_ref).mean()))
    terms = [
        weights[0] / (1 + torch.exp(beta * (log - base - kl))) if good else weights[1] / (1 + torch.exp(beta * (kl - log + base)))
        for log, base, good in zip(logs, ref, desirable.tolist(), strict=True)
    ]
    return torch.stack(terms)


def reward(chosen: Tensor, rejected: Tensor, margin: Tensor, centre: float) -> Tensor:
    return softplus(rejected + margin - chosen) + centre * (chosen + rejected) ** 2


def kl(logs: Tensor, ref: Tensor, kind: str) -> Tensor:
    ratio = torch.exp(ref - logs)
    return {"k1": -torch.log(ratio), "k2": torch.log(ratio) ** 2 / 2, "k3": ratio - 1 - torch.log(ratio)}[kind]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The sum that defines it, sequence by sequence: advantages and returns (2, S, L)."""
    result = torch.zeros(2, *values.shape, dtype=values.dtype)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        after = torch.cat((values[row, 1:length], values.new_zeros(1)))
        errors = rewards[row, :length] + gamma * after - values[row, :length]
        for t in range(length):
            discounts = (gamma * lam) ** torch.arange(length - t, dtype=values.dtype)
            result[0, row, t] = (discounts * errors[t:]).sum()
            result[1, row, t] = result[0, row, t] + values[row, t]
    return result


def whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    real = x[mask]
    variance, mean = torch.var_mean(real, correction=1)
    whitened = (real - mean) / torch.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return torch.zeros_like(x).masked_scatter(mask, whitened)


def group_advantages(rewards: Tensor, size: int, scale: bool) -> Tensor:
    parts = [(group - group.mean()) / (torch.std(group, correction=1) + 1e-4 if scale else 1) for group in rewards.split(size)]
    return torch.cat(parts)


def clipped(logs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's surrogate, case by case."""
    ratio = logs.exp() / old.exp()
    held = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    bound = torch.full_like(ratio, 1 - low).masked_fill(advantages > 0, 1 + high)  # in float64, as plain numbers are not
    return -advantages * torch.where(held, bound, ratio)


def value(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    both = torch.stack(((values - returns) ** 2, (near - returns) ** 2))
    return both.amax(dim=0) / 2


def grpo(kind: str, logs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, longest: int) -> Tensor:
    """logs, old, mask (S, L), advantages (S,): the whole loss, a scalar."""
    A = advantages[:, None].expand_as(logs)
    ratio = logs.exp() / old.exp()
    if kind == "cispo":
        tokens = -torch.minimum(ratio, torch.full_like(ratio, 1 + high)).detach() * A * logs
    elif kind == "sapo":
        sharp = torch.where(A > 0, torch.tensor(1.0, dtype=A.dtype), torch.tensor(1.05, dtype=A.dtype))
        tokens = -A * 4 / sharp / (1 + torch.exp(sharp * (1 - ratio)))
    else:
        tokens = clipped(logs, old, A, low, high)
    if kind in ("grpo", "sapo"):
        return torch.stack([row[real].mean() for row, real in zip(tokens, mask, strict=True)]).mean()
    return tokens[mask].sum() / (len(logs) * longest) if kind == "dr_grpo" else tokens[mask].mean()


def divergence(logits: Tensor, other: Tensor, temperature: float) -> Tensor:
    """KL between the rows' distributions."""
    p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (logits, other))
    return (p * torch.log(p / q)).sum(-1)


def merged_divergence(logits: Tensor, other: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """The same where all tokens but `ids` (N, k) count as one."""
    merged = []
    for x in (logits, other):
        p = torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True)
        merged.append(torch.cat((p.gather(1, ids), p.scatter(1, ids, 0).sum(-1, keepdim=True)), dim=1))
    return (merged[0] * torch.log(merged[0] / merged[1])).sum(-1)


def head(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, temperature: float) -> Tensor:
    """Log-probabilities and entropies of a language-model head, (2, N)."""
    logits = hidden @ weight.T
    p = torch.exp((softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature)
    p = p / p.sum(-1, keepdim=True)
    return torch.stack((torch.log(p[torch.arange(len(targets)), targets]), -(p * torch.log(p)).sum(-1)))


# ------------------------------------------------------------------------------------------------ packages


def _trainer(**attributes: Any) -> Any:
    """A stand-in for a trainer in evaluation, on one process."""
    accelerator = SimpleNamespace(
        device="cpu", num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    metrics: Any = defaultdict(lambda: defaultdict(list))
    shared = {"model": SimpleNamespace(training=False), "accelerator": accelerator, "_metrics": metrics, "aux_loss_enabled": False}
    return SimpleNamespace(**{**shared, "_total_train_tokens": 0, "_tp_size": 1, **attributes})


def _padded_inputs(logs: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Inputs of one prompt token before each completion, and a model whose log-probabilities are `logs` (S, L)."""
    whole = torch.cat((torch.zeros(len(mask), 1, dtype=torch.long), mask.long()), dim=1)
    inputs = {"input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}
    zeros = torch.zeros_like(logs)
    shown = SimpleNamespace(log_probs=logs * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return inputs, lambda **_: shown


def trl_dpo(kind: str, logs: Tensor, mask: Tensor, ref: Tensor, beta: float) -> Tensor:
    """trl's DPO or IPO: a mean over pairs. logs and mask (2P, L), the chosen answers first; ref (2P,) sums."""
    from trl.trainer.dpo_trainer import DPOTrainer

    stand_in = _trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
    )
    inputs, model = _padded_inputs(logs, mask)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref.chunk(2)
    return DPOTrainer._compute_loss(stand_in, model, inputs, False)


def trl_cpo(kind: str, chosen: Any, rejected: Any, beta: float, gamma: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """trl's CPO, whose kinds are SimPO and, on differences to a reference, DPO with label smoothing: (P,)."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    stand_in = _trainer(alpha=0.0, loss_type=kind, beta=beta, simpo_gamma=gamma, label_smoothing=smoothing)
    return CPOTrainer.cpo_loss(stand_in, chosen, rejected)[0]


def trl_orpo(chosen: Any, rejected: Any, beta: float) -> Tensor:
    """trl's odds-ratio term with the cross-entropy that it is subtracted from, (P,)."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    return -chosen - ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), chosen, rejected)[0]


def trl_kto(
    logs: Tensor, mask: Tensor, ref: Tensor, desirable: Tensor, kl_logs: Tensor, kl_ref: Tensor, beta: float, weights: tuple[float, float]
) -> Tensor:
    """trl's KTO: a mean over answers. logs and mask (S, L), ref, kl_logs and kl_ref (S,) sums."""
    from trl.trainer.kto_trainer import KTOTrainer

    stand_in = _trainer(
        _compute_kl_logps=lambda model, batch: kl_logs,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    inputs, model = _padded_inputs(logs, mask)
    return KTOTrainer._compute_loss(stand_in, model, {**inputs, "label": desirable, "ref_logps": ref, "ref_KL_logps": kl_ref}, False)


def trl_reward(chosen: Tensor, rejected: Tensor, margin: Tensor, centre: float) -> Tensor:
    """trl's reward loss: a mean over pairs."""
    from trl.trainer.reward_trainer import RewardTrainer

    stand_in = _trainer(args=SimpleNamespace(center_rewards_coefficient=centre))
    scores = torch.cat((chosen, rejected))[:, None]
    return RewardTrainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=scores), {"margin": margin})


def trl_grpo(
    kind: str,
    logs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    longest: int,
    ref: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """trl's GRPO, the whole loss: logs, old, ref, mask (S, L), advantages (S,). With beta: plus beta times its KL, k3 times the ratio."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    whole_bound = 1 + high if kind == "cispo" else high
    settings = {"delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "use_bias_correction_kl": True}
    stand_in = _trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logs, torch.zeros_like(logs), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=kind,
        epsilon_low=low,
        epsilon_high=whole_bound,
        args=SimpleNamespace(**settings),
        use_vllm=False,
        max_completion_length=longest,
        _entropy_bonus_enabled=False,
    )
    prompt = torch.ones(len(logs), 1, dtype=torch.long)
    inputs: dict[str, Any] = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": mask.long(),
        "completion_mask": mask.to(logs.dtype),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(stand_in, None, inputs)


def trl_divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """trl's generalised Jensen-Shannon divergence, summed: beta 0 is the forward and 1 the reverse KL."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="sum")


def trl_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """trl's log-probabilities and entropies from logits, (2, N)."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = hidden @ weight.T / temperature
    return torch.stack((selective_log_softmax(logits, targets), entropy_from_logits(logits)))


def torchrl_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """torchrl's advantages and returns (2, S, L), sequence by sequence."""
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    result = torch.zeros(2, *values.shape, dtype=values.dtype)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        if not length:
            continue
        here = values[row, :length, None]
        after = torch.cat((here[1:], here.new_zeros(1, 1)))
        done = torch.arange(length)[:, None] == length - 1
        estimated = generalized_advantage_estimate(gamma, lam, here, after, rewards[row, :length, None], done, done)
        for which, part in enumerate(estimated):
            result[which, row, :length] = part[:, 0]
    return result


def torchrl_kl(logs: Tensor, ref: Tensor) -> Tensor:
    """torchrl's penalty for the distance to the reference, a mean over tokens: here over one token each."""
    from torchrl.objectives.llm.grpo import GRPOLoss

    stand_in: Any = SimpleNamespace(kl_to_ref_coeff=1.0)
    tokens = zip(logs.view(-1, 1), ref.view(-1, 1), strict=True)
    return torch.stack([GRPOLoss._kl_to_ref(stand_in, {"_cur_log_prob": log}, ref_log_prob=base)[1] for log, base in tokens]).view_as(logs)


def torchrl_policy(logs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """torchrl's clipped surrogate, which is PPO's."""
    from torchrl.objectives.llm.grpo import GRPOLoss

    stand_in: Any = SimpleNamespace(_clip_bounds=(math.log1p(-clip), math.log1p(clip)))
    return GRPOLoss._compute_policy_objective(stand_in, logs - old, advantages)[0]


def torchrl_value(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """torchrl's clipped value loss; it is not halved there."""
    from torchrl.objectives.utils import _clip_value_loss, distance_loss

    return _clip_value_loss(old, values, values.new_tensor(clip), returns, distance_loss(returns, values, "l2"), "l2")[0] / 2
