"""Proximal policy optimisation: `python -m train.train_ppo [data.prompt_file=...] [reward_model_dir=weight/reward] [rewards.format=0.5]`.

The policy answers prompts, a reward model and / or rules judge the answers, and the clipped surrogate raises what was better than the
value head expected, while a KL penalty holds the policy near its start (Schulman et al., 2017; Ziegler et al., 2019; Ouyang et al., 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.heads import ValueHead
from model.transformer import SmartHaoAI
from train.config import PPOConfig, PPOStageConfig, parse_command_line
from train.data import Batch
from train.log_probs import LogProbs, completion_log_probs
from train.loop import LossFunction
from train.losses import Term, gae, kl_estimate, ppo_policy_loss, ppo_value_loss, whiten
from train.policy_stage import logged_metrics, run_policy_stage
from train.program import run_main
from train.rollout import REWARD, RolloutSource, Sampled
from train.stage import Log

LARGEST_CORRECTION = 0.2  # of the adaptive controller, per its horizon (Ziegler et al., 2019)
PANELS = {
    "reward": ("reward", "val_reward"),
    "KL to the start (nats per answer)": ("kl",),
    "probability ratio": ("ratio",),
    "clipped tokens (share)": ("clip_fraction",),
    "explained variance of the values": ("explained_variance",),
    "entropy (nats per token)": ("entropy",),
    "length (tokens)": ("length",),
    "moved by an update (nats per token)": ("update_kl",),
}


class PPORollouts(RolloutSource):
    """Adds values, KL-penalised rewards, advantages and returns; holds the KL controller's state."""

    def __init__(self, ppo: PPOConfig, *args: Any, **settings: Any) -> None:
        super().__init__(*args, passes=ppo.epochs, **settings)
        self.ppo, self.stop_kl, self.alarm_kl, self.kl_coef = ppo, ppo.stop_kl, ppo.alarm_kl, ppo.kl_coef

    def attach(self, policy: SmartHaoAI) -> None:
        super().attach(policy)
        if policy.value_head is None:
            policy.value_head = ValueHead(policy.config).to(policy.device)

    def measure(self, samples: list[Sampled], result: LogProbs) -> None:
        assert self.policy.value_head is not None
        self.store(samples, "values", self.policy.value_head(result.states))

    def finish_rollout(self) -> None:
        samples, ppo = self.samples, self.ppo
        values, mask = self.padded(samples, "values")
        rewards = torch.zeros_like(values)
        if self.reference is not None:
            rewards -= self.kl_coef * kl_estimate(self.padded(samples, "old")[0], self.padded(samples, "reference")[0], ppo.kl) * mask
        last = mask.sum(dim=1) - 1
        rewards[torch.arange(len(samples)), last] += torch.tensor([sample.parts[REWARD] for sample in samples])
        advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.lam)
        spread = float(returns[mask].var()) if int(mask.sum()) > 1 else 0.0
        self.diagnostics["explained_variance"] = 1 - float((returns - values)[mask].var()) / spread if spread > 0 else 0.0
        self.diagnostics["kl_coef"] = self.kl_coef
        self.store(samples, "advantages", (whiten(advantages, mask) if ppo.whiten else advantages)[mask])
        self.store(samples, "returns", returns[mask])
        for sample in samples:
            sample.tokens.pop("reference", None)  # it is in the rewards
        if ppo.kl_target:
            error = self.diagnostics["kl"] / ppo.kl_target - 1
            clipped = max(-LARGEST_CORRECTION, min(LARGEST_CORRECTION, error))
            self.kl_coef *= 1 + clipped * len(samples) / ppo.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kl_coef": self.kl_coef}


def ppo_loss(source: RolloutSource, ppo: PPOConfig, temperature: float) -> LossFunction:
    """The loss of a batch: policy, value and entropy terms, each a mean over the step's tokens; and what is logged."""

    def loss(model: nn.Module, batch: Batch) -> list[Term]:
        extra = batch.extra
        result = completion_log_probs(model, batch.inputs, temperature, entropy=True)
        policy_model: Any = model
        values = policy_model.value_head(result.states)
        ratio = source.note_update(result.values, extra["old"], bool(extra["first"]))
        policy = ppo_policy_loss(result.values, extra["old"], extra["advantages"], ppo.clip)
        value = ppo_value_loss(values, extra["values"], extra["returns"], ppo.value_clip or math.inf)
        assert result.entropy is not None
        terms = [Term("loss", policy.sum(), "tokens"), Term("value_loss", ppo.value_coef * value.sum(), "tokens")]
        if ppo.entropy_coef:
            terms.append(Term("entropy_loss", -ppo.entropy_coef * result.entropy.sum(), "tokens"))
        if result.aux_loss is not None:
            terms.append(Term("aux_loss", result.aux_loss, "micro_batches"))
        return [*terms, *update_metrics(ratio, extra, 1 - ppo.clip, 1 + ppo.clip)]

    return loss


def update_metrics(ratio: Tensor, extra: dict[str, Tensor], low: float, high: float) -> list[Term]:
    """What the log says of an update: mean ratio, share of ratios outside [low, high], how far it is from the rollout's policy; and how
    the rollout went."""
    clipped = ((ratio < low) | (ratio > high)).float()
    found = [("ratio", ratio), ("clip_fraction", clipped), ("update_kl", ratio - 1 - ratio.log())]
    terms = [Term(name, values.sum(), "tokens", metric=True) for name, values in found]
    return terms + [Term(name, value, "micro_batches", metric=True) for name, value in logged_metrics(extra).items()]


def ppo(settings: PPOStageConfig, log: Log = print) -> int:
    """Train settings.model_dir on its own answers. Returns the exit status."""
    return run_policy_stage(
        settings,
        lambda *args, **more: PPORollouts(settings.ppo, *args, **more),
        lambda source: ppo_loss(source, settings.ppo, settings.rollout.temperature),
        settings.ppo.kl_coef > 0,
        PANELS,
        log,
    )


def main() -> int:
    return ppo(parse_command_line(PPOStageConfig))


if __name__ == "__main__":
    run_main(main, several=True)
