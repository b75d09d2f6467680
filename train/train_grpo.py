"""Group-relative policy optimisation: `python -m train.train_grpo [data.prompt_file=sums.jsonl] [rewards.steps=0.2]`.

Several answers to each question are judged by rules that can be verified, and compared with each other (Shao et al., 2024: DeepSeekMath).
Questions whose answers all got the same reward teach nothing: they are counted, and replaced as in DAPO (Yu et al., 2025).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.config import GRPOConfig, GRPOStageConfig, parse_command_line
from train.data import Batch
from train.log_probs import completion_log_probs
from train.loop import LossFunction
from train.losses import Term, group_advantages, grpo_loss, grpo_weights, kl_estimate
from train.policy_stage import run_policy_stage
from train.program import run_main
from train.rollout import REWARD, RolloutSource, Sampled
from train.stage import Log
from train.train_ppo import update_metrics

PANELS = {
    "reward": ("reward", "val_reward"),
    "exact answers (share)": ("reward_exact", "val_exact"),
    "groups without a difference (share)": ("equal_groups",),
    "probability ratio": ("ratio",),
    "clipped tokens (share)": ("clip_fraction",),
    "entropy (nats per token)": ("entropy",),
    "length (tokens)": ("length",),
    "KL to the start (nats per answer)": ("kl",),
}


class GRPORollouts(RolloutSource):
    """Gathers groups whose answers differ in reward, and gives each answer its advantage within its group."""

    def __init__(self, grpo: GRPOConfig, *args: Any, **settings: Any) -> None:
        super().__init__(*args, passes=grpo.epochs, **settings)
        self.grpo, self.alarm_kl = grpo, grpo.alarm_kl
        self.asked: dict[str, float] = {}
        """Of all questions asked for the rollout, those that were replaced included: mean rewards, and how many groups were equal."""

    def collect(self) -> list[Sampled]:
        """Groups with a difference, asked for at most 1 + grpo.resample times; those without when there are no others."""
        size, wanted = self.settings.samples, self.settings.prompts
        kept: list[Sampled] = []
        equal: list[Sampled] = []
        judged: list[Sampled] = []
        for attempt in range(1 + self.grpo.resample):
            samples = self.answer(self.take_prompts(wanted - len(kept) // size), attempt)
            for start in range(0, len(samples), size):
                group = samples[start : start + size]
                rewards = [sample.parts[REWARD] for sample in group]
                differs = min(rewards) < max(rewards)
                (kept if differs else equal).extend(group)
            judged += samples
            if len(kept) == wanted * size:
                break
        names = {(f"reward_{name}" if name != REWARD else REWARD): name for name in judged[0].parts}
        self.asked = {shown: sum(sample.parts[name] for sample in judged) / len(judged) for shown, name in names.items()}
        self.asked.update(equal_groups=len(equal) / len(judged), groups=len(judged) / size)
        return kept or equal[: wanted * size]

    def cuts(self, layout: list[list[int]]) -> list[int]:
        return [] if self.grpo.loss == "bnpo" else super().cuts(layout)  # a mean over the tokens of all rows

    def finish_rollout(self) -> None:
        rewards = torch.tensor([sample.parts[REWARD] for sample in self.samples])
        advantages = group_advantages(rewards, self.settings.samples, self.grpo.scale)
        for sample, advantage in zip(self.samples, advantages.tolist(), strict=True):
            sample.tokens["advantages"] = [advantage] * sample.length
        self.diagnostics.update(self.asked)
        if self.asked["equal_groups"] == 1.0 and float(rewards.min()) < float(rewards.max()):
            self.trouble.append(("groups_equal", {"groups": round(self.asked["groups"])}))


def grpo_term(source: RolloutSource, grpo: GRPOConfig, temperature: float, longest: int) -> LossFunction:
    """The loss of a batch: the surrogate in the chosen aggregation, and beta times the KL to the starting model in the same one."""

    def loss(model: nn.Module, batch: Batch) -> list[Term]:
        extra = batch.extra
        result = completion_log_probs(model, batch.inputs, temperature)
        ratio = source.note_update(result.values, extra["old"], bool(extra["first"]))
        weights, divisor = grpo_weights(grpo.loss, result.lengths(), longest)
        policy = grpo_loss(result.values, extra["old"], extra["advantages"], grpo.clip_low, grpo.clip_high, grpo.loss)
        terms = [Term("loss", (policy * weights).sum(), divisor)]
        if grpo.beta:
            # Under answers of an older policy k3 is unbiased only with the ratio.
            distance = kl_estimate(result.values, extra["reference"], "k3") * (result.values - extra["old"]).exp()
            terms.append(Term("kl_loss", grpo.beta * (distance * weights).sum(), divisor))
        if result.aux_loss is not None:
            terms.append(Term("aux_loss", result.aux_loss, "micro_batches"))
        return [*terms, *update_metrics(ratio, extra, 1 - grpo.clip_low, 1 + grpo.clip_high)]

    return loss


def grpo(settings: GRPOStageConfig, log: Log = print) -> int:
    """Train settings.model_dir on its own answers. Returns the exit status."""
    return run_policy_stage(
        settings,
        lambda *args, **more: GRPORollouts(settings.grpo, *args, **more),
        lambda source: grpo_term(source, settings.grpo, settings.rollout.temperature, settings.rollout.max_new_tokens),
        settings.grpo.beta > 0,
        PANELS,
        log,
    )


def main() -> int:
    return grpo(parse_command_line(GRPOStageConfig))


if __name__ == "__main__":
    run_main(main, several=True)
