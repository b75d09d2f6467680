"""The comparisons of `tools.loss_parity`: random inputs, a function of ours, and the same in the words of a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.cross_entropy import linear_log_probs
from tools import loss_references as r
from train import losses

PAIRS, TOKENS, ROWS, WIDTH, VOCABULARY, TOP = 6, 9, 24, 16, 40, 5
BETA, SMOOTHING, GAMMA, CLIP, HIGH, TEMPERATURE, CENTRE, DISCOUNT, LAMBDA = 0.3, 0.1, 0.8, 0.2, 0.28, 1.7, 0.05, 0.97, 0.9
KTO_WEIGHTS = (1.3, 0.7)
HAND, TRL, TORCHRL = "float64 by hand", "trl", "torchrl"

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A function of ours and the same of a reference, both of all inputs by name."""

    name: str
    source: str
    """HAND, or the package whose code is called."""
    what: str
    """The reference in words."""
    make: Callable[[], Inputs]
    wanted: str
    """Names of the inputs whose gradient is compared; empty where nothing is ever differentiated."""
    ours: Function
    theirs: Function


# --------------------------------------------------------------------------------------------------- inputs


def _mask(rows: int) -> Tensor:
    """(rows, TOKENS) bool: completions of every length, the first of a single token."""
    lengths = torch.randint(1, TOKENS + 1, (rows,))
    lengths[0], lengths[-1] = 1, TOKENS
    return torch.arange(TOKENS) < lengths[:, None]


def _log_probs(*shape: int) -> Tensor:
    return -torch.rand(shape, dtype=torch.float64) * 3 - 0.05


def pair_inputs() -> Inputs:
    """Per-token log-probabilities (2P, L) of chosen, then rejected answers, and the reference's sums (2P,)."""
    mask, logs = _mask(2 * PAIRS), _log_probs(2 * PAIRS, TOKENS)
    near = logs + 0.5 * torch.randn_like(logs)
    kl_logs = _log_probs(2 * PAIRS) * TOKENS
    return {
        "logs": logs,
        "mask": mask,
        "ref": (near * mask).sum(1),
        "desirable": torch.arange(2 * PAIRS) % 3 > 0,
        "kl_logs": kl_logs,
        "kl_ref": kl_logs + torch.randn(2 * PAIRS) - 0.4,
    }


def score_inputs() -> Inputs:
    return {
        "chosen": torch.randn(PAIRS) * 3,
        "rejected": torch.randn(PAIRS) * 3,
        "margin": torch.rand(PAIRS),
        "rewards": torch.randn(PAIRS * 4),
    }


def rollout_inputs() -> Inputs:
    """Completions as rows (S, L): log-probabilities now, when sampled and of the reference; values, rewards, advantages."""
    logs, values = _log_probs(PAIRS, TOKENS), torch.randn(PAIRS, TOKENS)
    # Of both signs, and yet no sum of signed terms near 0: rounding would be large beside it, whoever computes it.
    advantages = (0.5 + torch.rand(PAIRS)) * torch.where(torch.arange(PAIRS) % 3 == 1, -0.3, 1.0)
    return {
        "logs": logs,
        "old": logs + 0.3 * torch.randn_like(logs),
        "ref": logs + 0.5 * torch.randn_like(logs),
        "mask": _mask(PAIRS),
        "values": values,
        "old_values": values + 0.4 * torch.randn_like(values),
        "returns": torch.randn(PAIRS, TOKENS),
        "rewards": torch.randn(PAIRS, TOKENS),
        "advantages": advantages,
    }


def logit_inputs() -> Inputs:
    # Sharper than the student: between like distributions the divergence is small, and the rounding of its terms large beside it.
    teacher = torch.randn(ROWS, VOCABULARY) * 3
    return {"student": torch.randn(ROWS, VOCABULARY), "teacher": teacher, "ids": teacher.topk(TOP).indices}


def head_inputs() -> Inputs:
    return {
        "hidden": torch.randn(ROWS, WIDTH) * WIDTH**-0.5,
        "weight": torch.randn(VOCABULARY, WIDTH),
        "targets": torch.randint(VOCABULARY, (ROWS,)),
    }


# ---------------------------------------------------------------------------------------------------- cases


def _total(x: Inputs) -> Tensor:
    return (x["logs"] * x["mask"]).sum(1)


def _sums(x: Inputs) -> Four:
    """chosen, rejected, ref_chosen, ref_rejected (P,): sums over tokens."""
    total, ref = _total(x), x["ref"]
    return total[:PAIRS], total[PAIRS:], ref[:PAIRS], ref[PAIRS:]


def _means(x: Inputs) -> Four:
    total, ref = (tensor / x["mask"].sum(1) for tensor in (_total(x), x["ref"]))
    return total[:PAIRS], total[PAIRS:], ref[:PAIRS], ref[PAIRS:]


def _cpo_smoothed(x: Inputs) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = _sums(x)
    return r.trl_cpo("sigmoid", chosen - ref_chosen, rejected - ref_rejected, BETA, smoothing=SMOOTHING)


def _our_kto(x: Inputs) -> Tensor:
    kl = losses.kto_kl(x["kl_logs"], x["kl_ref"])
    return losses.kto_loss(_total(x), x["ref"], x["desirable"], kl, BETA, *KTO_WEIGHTS)


def _hand_kto(x: Inputs) -> Tensor:
    return r.kto(_total(x), x["ref"], x["desirable"], x["kl_logs"], x["kl_ref"], BETA, KTO_WEIGHTS).mean()


def _trl_kto(x: Inputs) -> Tensor:
    return r.trl_kto(x["logs"], x["mask"], x["ref"], x["desirable"], x["kl_logs"], x["kl_ref"], BETA, KTO_WEIGHTS)


def _our_grpo(kind: str, beta: float = 0.0) -> Function:
    """The whole loss from the packed tokens, as a stage computes it."""

    def loss(x: Inputs) -> Tensor:
        mask, lengths = x["mask"], x["mask"].sum(1)
        logs, old, ref = x["logs"][mask], x["old"][mask], x["ref"][mask]
        values = losses.grpo_loss(logs, old, x["advantages"].repeat_interleave(lengths), CLIP, HIGH, kind)
        if beta:
            values = values + beta * losses.kl_estimate(logs, ref, "k3") * (logs - old).exp()
        weights, divisor = losses.grpo_weights(kind, lengths, max_length=TOKENS)
        return (values * weights).sum() / {"sequences": len(lengths), "tokens": len(logs), "micro_batches": 1}[divisor]

    return loss


def _their_grpo(function: Callable[..., Tensor], kind: str, beta: float = 0.0) -> Function:
    def loss(x: Inputs) -> Tensor:
        named: dict[str, Any] = {"ref": x["ref"], "beta": beta} if beta else {}
        return function(kind, x["logs"], x["old"], x["advantages"], x["mask"], CLIP, HIGH, TOKENS, **named)

    return loss


def _kl(function: Callable[..., Tensor], kind: str) -> Function:
    return lambda x: function(x["logs"], x["ref"], kind)


def _whiten(function: Callable[..., Tensor], shift_mean: bool) -> Function:
    return lambda x: function(x["values"], x["mask"], shift_mean)


def _advantages(function: Callable[..., Tensor], scale: bool) -> Function:
    return lambda x: function(x["rewards"], 4, scale)


def _gae(x: Inputs) -> Tensor:
    return torch.stack(losses.gae(x["rewards"], x["values"], x["mask"], DISCOUNT, LAMBDA))


def _head(x: Inputs, softcap: float) -> Tensor:
    values, entropy = linear_log_probs(x["hidden"], x["weight"], x["targets"], softcap, TEMPERATURE, entropy=True)
    assert entropy is not None
    return torch.stack((values, entropy))


def _our_top(x: Inputs, function: Callable[..., Tensor]) -> Tensor:
    return function(x["student"], x["ids"], losses.topk_logs(x["teacher"], x["ids"], TEMPERATURE), TEMPERATURE)


def cases() -> list[Case]:
    """All comparisons, in the order of train/losses.py."""
    found: list[Case] = []

    def add(name: str, make: Callable[[], Inputs], wanted: str, ours: Function, *references: tuple[str, str, Function]) -> None:
        found.extend(Case(name, source, what, make, wanted, ours, theirs) for source, what, theirs in references)

    add(
        "log-probs, entropy",
        head_inputs,
        "hidden weight",
        lambda x: _head(x, 0.0),
        (HAND, "softmax of all logits", lambda x: r.head(x["hidden"], x["weight"], x["targets"], 0.0, TEMPERATURE)),
        (TRL, "selective_log_softmax, entropy_from_logits", lambda x: r.trl_head(x["hidden"], x["weight"], x["targets"], TEMPERATURE)),
    )
    add(
        "log-probs, softcap",
        head_inputs,
        "hidden weight",
        lambda x: _head(x, 5.0),
        (HAND, "softmax of all logits", lambda x: r.head(x["hidden"], x["weight"], x["targets"], 5.0, TEMPERATURE)),
    )
    add(
        "dpo_loss",
        pair_inputs,
        "logs",
        lambda x: losses.dpo_loss(*_sums(x), BETA).mean(),
        (HAND, "log(1 + exp(-x))", lambda x: r.dpo(*_sums(x), BETA, 0.0).mean()),
        (TRL, "DPOTrainer, sigmoid", lambda x: r.trl_dpo("sigmoid", x["logs"], x["mask"], x["ref"], BETA)),
    )
    add(
        "dpo_loss, smoothed",
        pair_inputs,
        "logs",
        lambda x: losses.dpo_loss(*_sums(x), BETA, SMOOTHING),
        (HAND, "log(1 + exp(-x))", lambda x: r.dpo(*_sums(x), BETA, SMOOTHING)),
        (TRL, "CPOTrainer.cpo_loss of differences to the reference", _cpo_smoothed),
    )
    add(
        "ipo_loss",
        pair_inputs,
        "logs",
        lambda x: losses.ipo_loss(*_means(x), BETA).mean(),
        (HAND, "square", lambda x: r.ipo(*_means(x), BETA).mean()),
        (TRL, "DPOTrainer, ipo", lambda x: r.trl_dpo("ipo", x["logs"], x["mask"], x["ref"], BETA)),
    )
    add(
        "simpo_loss",
        pair_inputs,
        "logs",
        lambda x: losses.simpo_loss(*_means(x)[:2], BETA, GAMMA),
        (HAND, "log(1 + exp(-x))", lambda x: r.simpo(*_means(x)[:2], BETA, GAMMA)),
        (TRL, "CPOTrainer.cpo_loss, simpo", lambda x: r.trl_cpo("simpo", *_means(x)[:2], BETA, gamma=GAMMA)),
    )
    add(
        "orpo_loss",
        pair_inputs,
        "logs",
        lambda x: losses.orpo_loss(*_means(x)[:2], BETA),
        (HAND, "odds", lambda x: r.orpo(*_means(x)[:2], BETA)),
        (TRL, "ORPOTrainer.odds_ratio_loss, which computes in fp32", lambda x: r.trl_orpo(*_means(x)[:2], BETA)),
    )
    add(
        "kto_loss, kto_kl",
        pair_inputs,
        "logs",
        lambda x: _our_kto(x).mean(),
        (HAND, "one by one", _hand_kto),
        (TRL, "KTOTrainer, kto", _trl_kto),
    )
    add(
        "reward_loss",
        score_inputs,
        "chosen rejected",
        lambda x: losses.reward_loss(x["chosen"], x["rejected"], x["margin"], CENTRE).mean(),
        (HAND, "log(1 + exp(-x))", lambda x: r.reward(x["chosen"], x["rejected"], x["margin"], CENTRE).mean()),
        (TRL, "RewardTrainer.compute_loss", lambda x: r.trl_reward(x["chosen"], x["rejected"], x["margin"], CENTRE)),
    )
    torchrl_k3 = (TORCHRL, "GRPOLoss._kl_to_ref, token by token", lambda x: r.torchrl_kl(x["logs"], x["ref"]))
    for kind in ("k1", "k2", "k3"):
        add(
            f"kl_estimate {kind}",
            rollout_inputs,
            "logs",
            _kl(losses.kl_estimate, kind),
            (HAND, "ratio and its logarithm", _kl(r.kl, kind)),
            *([torchrl_k3] if kind == "k3" else []),
        )
    add(
        "gae",
        rollout_inputs,
        "rewards values",
        _gae,
        (HAND, "the defining sum", lambda x: r.gae(x["rewards"], x["values"], x["mask"], DISCOUNT, LAMBDA)),
        (
            TORCHRL,
            "generalized_advantage_estimate, discounts in fp32",
            lambda x: r.torchrl_gae(x["rewards"], x["values"], x["mask"], DISCOUNT, LAMBDA),
        ),
    )
    for shift in (True, False):
        add(
            "whiten" if shift else "whiten, own mean",
            rollout_inputs,
            "values",
            _whiten(losses.whiten, shift),
            (HAND, "torch.var_mean of the real ones", _whiten(r.whiten, shift)),
        )
    add(
        "ppo_policy_loss",
        rollout_inputs,
        "logs",
        lambda x: losses.ppo_policy_loss(x["logs"], x["old"], x["advantages"][:, None], CLIP),
        (HAND, "case by case", lambda x: r.clipped(x["logs"], x["old"], x["advantages"][:, None].expand_as(x["logs"]), CLIP, CLIP)),
        (TORCHRL, "GRPOLoss, PPO's objective", lambda x: r.torchrl_policy(x["logs"], x["old"], x["advantages"][:, None], CLIP)),
    )
    add(
        "ppo_value_loss",
        rollout_inputs,
        "values",
        lambda x: losses.ppo_value_loss(x["values"], x["old_values"], x["returns"], CLIP),
        (HAND, "larger of two squares", lambda x: r.value(x["values"], x["old_values"], x["returns"], CLIP)),
        (TORCHRL, "ClipPPOLoss, l2 with clipped values", lambda x: r.torchrl_value(x["values"], x["old_values"], x["returns"], CLIP)),
    )
    for scale in (True, False):
        add(
            "group_advantages" if scale else "group_advantages, unscaled",
            score_inputs,
            "",
            _advantages(losses.group_advantages, scale),
            (HAND, "group by group", _advantages(r.group_advantages, scale)),
        )
    for kind in losses.GRPO_KINDS:
        ours = _our_grpo(kind)
        hand, theirs = _their_grpo(r.grpo, kind), _their_grpo(r.trl_grpo, kind)
        add(f"grpo_loss {kind}", rollout_inputs, "logs", ours, (HAND, "case by case", hand), (TRL, f"GRPOTrainer, {kind}", theirs))
    add(
        "grpo_loss + k3 * ratio",
        rollout_inputs,
        "logs",
        _our_grpo("dapo", beta=BETA),
        (TRL, "GRPOTrainer, dapo with beta", _their_grpo(r.trl_grpo, "dapo", beta=BETA)),
    )
    add(
        "forward_kl",
        logit_inputs,
        "student",
        lambda x: losses.forward_kl(x["student"], x["teacher"], TEMPERATURE).sum(),
        (HAND, "sum p log(p / q)", lambda x: r.divergence(x["teacher"], x["student"], TEMPERATURE).sum()),
        (TRL, "GKDTrainer.generalized_jsd_loss, beta 0", lambda x: r.trl_divergence(x["student"], x["teacher"], 0, TEMPERATURE)),
    )
    add(
        "reverse_kl",
        logit_inputs,
        "student",
        lambda x: losses.reverse_kl(x["student"], x["teacher"], TEMPERATURE).sum(),
        (HAND, "sum p log(p / q)", lambda x: r.divergence(x["student"], x["teacher"], TEMPERATURE).sum()),
        (TRL, "GKDTrainer.generalized_jsd_loss, beta 1", lambda x: r.trl_divergence(x["student"], x["teacher"], 1, TEMPERATURE)),
    )
    add(
        "topk_forward_kl",
        logit_inputs,
        "student",
        lambda x: _our_top(x, losses.topk_forward_kl),
        (HAND, "all other tokens merged", lambda x: r.merged_divergence(x["teacher"], x["student"], x["ids"], TEMPERATURE)),
    )
    add(
        "topk_reverse_kl",
        logit_inputs,
        "student",
        lambda x: _our_top(x, losses.topk_reverse_kl),
        (HAND, "all other tokens merged", lambda x: r.merged_divergence(x["student"], x["teacher"], x["ids"], TEMPERATURE)),
    )
    return found
