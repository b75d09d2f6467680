"""The configuration of every stage: dataclasses. Precedence: defaults < `--preset NAME` < `--config FILE` < dotted words:

    python -m train.train_pretrain --preset nano data.pretrain_file=corpus.jsonl train.lr=3e-4 out_dir=weight/pretrain

The docstring under a field is its help text. Values are converted by the field's type; an unknown key stops with the nearest
known names. How that is done is in `train.command_line`, what all stages share in `train.settings`; the names of both can be
imported from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train.command_line import CONFIG_FOLDER as CONFIG_FOLDER
from train.command_line import FLAGS as FLAGS
from train.command_line import SYNONYMS as SYNONYMS
from train.command_line import UsageError as UsageError
from train.command_line import apply as apply
from train.command_line import help_text as help_text
from train.command_line import known_names as known_names
from train.command_line import parse_command_line as parse_command_line
from train.command_line import preset_file as preset_file
from train.command_line import read_yaml as read_yaml
from train.command_line import require
from train.command_line import set_value as set_value
from train.command_line import stage_name as stage_name
from train.command_line import to_dict as to_dict
from train.command_line import to_yaml as to_yaml
from train.settings import DataConfig, LoRAConfig, OptimizationConfig, StageConfig
from train.settings import TokenizerConfig as TokenizerConfig


@dataclass
class TokenizerStageConfig(StageConfig):
    """python -m train.train_tokenizer: learn a byte-level BPE from text."""

    out_dir: str = "weight/tokenizer"


@dataclass
class PretrainConfig(StageConfig):
    """python -m train.train_pretrain: learn a language model from text."""

    out_dir: str = "weight/pretrain"
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "nano"})
    train: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(optimizer="muon", lr=6e-3, schedule="wsd", min_lr_ratio=0.05, batch_size=8)
    )


@dataclass
class SFTConfig(StageConfig):
    """python -m train.train_sft: fine-tune on conversations; only the assistant's words are learned."""

    out_dir: str = "weight/sft"
    model_dir: str | None = "weight/pretrain"
    train: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(optimizer="muon", lr=2e-3, schedule="linear", min_lr_ratio=0.05, batch_size=8, epochs=2)
    )


@dataclass
class LoRAStageConfig(SFTConfig):
    """python -m train.train_lora: fine-tune on conversations by a small adapter; the checkpoint itself stays as it is."""

    out_dir: str = "weight/lora"
    model_dir: str | None = "newest"
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(r=16))
    train: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(lr=2e-3, schedule="linear", min_lr_ratio=0.05, weight_decay=0.0, batch_size=8, epochs=2)
    )

    def check(self) -> None:
        super().check()
        require(self.lora.r > 0, "lora.r", self.lora.r, "at least 1; without an adapter it is train.train_sft")


def aligning(**settings: Any) -> OptimizationConfig:
    """What the stages after chat training share: no decay of weights that are good already, and held-out figures from before the first
    step to compare the later ones with."""
    return OptimizationConfig(**{"weight_decay": 0.0, "beta2": 0.99, "eval_first": True, **settings})


# ---------------------------------------------------------------- preference optimisation (train_dpo)


@dataclass
class DPOConfig:
    """How preference pairs are learned from."""

    loss: str = "dpo"
    """dpo, ipo, simpo, orpo or kto; kto also learns from single answers {prompt, completion, label}."""
    beta: float = 0.0
    """How firmly the model is held to its start (simpo: scale of the rewards); 0: the loss's usual value."""
    label_smoothing: float = 0.0
    """dpo, simpo: share of the pairs that are taken to be the wrong way round."""
    nll_coef: float = 1.0
    """dpo, ipo, simpo: weight of the chosen answers' cross-entropy per token, which keeps them from becoming less likely."""
    gamma: float = 1.0
    """simpo: by how much the chosen reward has to be larger."""
    wanted_weight: float = 1.0
    """kto: weight of the answers that are wanted."""
    unwanted_weight: float = 1.0
    """kto: weight of the answers that are not."""


def require_model(settings: StageConfig) -> None:
    """For stages that change how a finished model answers."""
    wanted = "a chat model to start from, for example weight/sft"
    require(settings.model_dir is not None, "model_dir", settings.model_dir, wanted)


DPO_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


@dataclass
class DPOStageConfig(StageConfig):
    """python -m train.train_dpo: learn from pairs of answers which one is preferred (DPO, IPO, SimPO, ORPO, KTO)."""

    out_dir: str = "weight/dpo"
    model_dir: str | None = "newest"
    dpo: DPOConfig = field(default_factory=DPOConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(val_share=0.03))
    train: OptimizationConfig = field(
        default_factory=lambda: aligning(lr=3e-5, schedule="linear", batch_size=8, accumulation_steps=2, eval_tokens=100_000)
    )

    def check(self) -> None:
        super().check()
        require_model(self)
        require(self.dpo.loss in DPO_BETAS, "dpo.loss", self.dpo.loss, " | ".join(DPO_BETAS))
        for name in ("beta", "nll_coef", "wanted_weight", "unwanted_weight"):
            require(getattr(self.dpo, name) >= 0, f"dpo.{name}", getattr(self.dpo, name), "0 or more")
        require(0 <= self.dpo.label_smoothing < 0.5, "dpo.label_smoothing", self.dpo.label_smoothing, "in [0, 0.5)")


# ---------------------------------------------------------------- reward model (train_reward)


@dataclass
class RewardModelConfig:
    """How a reward model learns from pairs."""

    margin_coef: float = 1.0
    """Weight of the rows' field `margin`, by how much the preferred answer should win; 0: the field is not used."""
    centre_coef: float = 0.01
    """Pull of a pair's scores towards a sum of 0, since pairs leave the level of the scores open; 0: none."""


@dataclass
class RewardStageConfig(StageConfig):
    """python -m train.train_reward: learn to score answers from pairs of which one is preferred."""

    out_dir: str = "weight/reward"
    model_dir: str | None = "newest"
    reward: RewardModelConfig = field(default_factory=RewardModelConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(val_share=0.05))
    train: OptimizationConfig = field(
        default_factory=lambda: aligning(
            lr=5e-4, schedule="linear", weight_decay=0.01, batch_size=8, accumulation_steps=2, eval_tokens=100_000
        )
    )

    def check(self) -> None:
        super().check()
        require_model(self)
        require(not self.lora.r, "lora.r", self.lora.r, "0: a reward model is trained as a whole")
        for name in ("margin_coef", "centre_coef"):
            require(getattr(self.reward, name) >= 0, f"reward.{name}", getattr(self.reward, name), "0 or more")


# ---------------------------------------------------------------- reinforcement learning (train_ppo, train_grpo, train_rlhf)


@dataclass
class RolloutConfig:
    """How the answers are made that reinforcement learning learns from. Here train.batch_size counts answers, not rows."""

    prompts: int = 32
    """Questions per rollout."""
    samples: int = 1
    """Answers per question."""
    max_new_tokens: int = 96
    """Longest answer, thinking included."""
    temperature: float = 1.0
    """Of sampling; log-probabilities are taken at the same temperature."""
    thinking: bool | None = None
    """false: the thinking is closed before it starts; true: left to the model; none: as each row of the data says."""
    batch_size: int = 64
    """Answers generated together."""
    eval_prompts: int = 64
    """Held-out questions per evaluation, answered greedily; 0: no evaluation."""

    def check(self, max_length: int) -> None:
        """max_length: tokens of a question and its answer together."""
        for name in ("prompts", "samples", "max_new_tokens", "batch_size"):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "at least 1")
        require(self.eval_prompts >= 0, "rollout.eval_prompts", self.eval_prompts, "0 or more")
        require(self.temperature > 0, "rollout.temperature", self.temperature, "above 0")
        room = f"below data.max_length={max_length}, which has to hold the question, too"
        require(self.max_new_tokens < max_length, "rollout.max_new_tokens", self.max_new_tokens, room)


@dataclass
class PPOConfig:
    """Proximal policy optimisation with a value head and a KL penalty to the starting model."""

    epochs: int = 2
    """Passes over each rollout."""
    clip: float = 0.2
    """How far a token's probability ratio may move before its gradient stops."""
    value_clip: float = 0.2
    """How far a value may move from the rollout's; 0: no limit."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE: between one-step (0) and whole-answer (1) advantages."""
    whiten: bool = True
    """Bring the advantages of a rollout to mean 0 and variance 1."""
    kl: str = "k1"
    """Estimator of the KL penalty per token: k1, k2 or k3."""
    kl_coef: float = 0.05
    """Weight of the KL penalty; with kl_target where the controller begins. 0: no penalty and no reference model."""
    kl_target: float = 0.0
    """Adaptive controller: nats per answer to hold the KL at; 0: kl_coef stays."""
    kl_horizon: int = 2000
    """Adaptive controller: answers over which it corrects the weight."""
    stop_kl: float = 0.05
    """Give up the rest of a rollout when an update has moved the policy by more nats per token than this; 0: never."""
    missing_end: float = 1.0
    """Taken from the reward of an answer that did not come to its end."""
    alarm_kl: float = 1.0
    """Nats per token from the starting model that count as running away."""


@dataclass
class GRPOConfig:
    """Group-relative policy optimisation on rewards that can be verified; no value head."""

    loss: str = "dapo"
    """How tokens are weighed: grpo (every answer the same), bnpo or dapo (every token the same), dr_grpo (by the longest possible
    answer); or another objective: cispo, sapo."""
    epochs: int = 1
    """Passes over each rollout."""
    clip_low: float = 0.2
    """How far a ratio may fall before its gradient stops."""
    clip_high: float = 0.28
    """How far it may rise; higher than clip_low keeps rare tokens alive."""
    scale: bool = True
    """Divide a group's advantages by its standard deviation."""
    beta: float = 0.0
    """Weight of the KL to the starting model; 0: none, and no second model in memory."""
    resample: int = 2
    """How often questions whose answers all got the same reward are replaced by new ones, per rollout."""
    alarm_kl: float = 1.0
    """Nats per token from the starting model that count as running away (with beta)."""


@dataclass
class PPOStageConfig(StageConfig):
    """python -m train.train_ppo: improve the answers by a reward model, by rules, or both."""

    out_dir: str = "weight/ppo"
    model_dir: str | None = "newest"
    reward_model_dir: str | None = None
    """A finished reward model; None: weight/reward when there are no rules."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """Rules and their weights, for example rewards.format=0.5; beside the reward model, whose weight is 1."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts=128))
    ppo: PPOConfig = field(default_factory=PPOConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(val_share=0.03))
    train: OptimizationConfig = field(
        default_factory=lambda: aligning(lr=5e-5, schedule="constant", warmup_steps=4, batch_size=64, log_every=2, eval_every=20)
    )

    def check(self) -> None:
        super().check()
        require_model(self)
        self.rollout.check(self.data.max_length)
        require(self.ppo.epochs >= 1, "ppo.epochs", self.ppo.epochs, "at least 1")
        for name in ("clip", "alarm_kl"):
            require(getattr(self.ppo, name) > 0, f"ppo.{name}", getattr(self.ppo, name), "above 0")
        require(self.ppo.kl in ("k1", "k2", "k3"), "ppo.kl", self.ppo.kl, "k1 | k2 | k3")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self.ppo, name) <= 1, f"ppo.{name}", getattr(self.ppo, name), "in [0, 1]")
        for name in ("value_clip", "value_coef", "entropy_coef", "kl_coef", "kl_target", "stop_kl", "missing_end"):
            require(getattr(self.ppo, name) >= 0, f"ppo.{name}", getattr(self.ppo, name), "0 or more")
        require(self.ppo.kl_coef > 0 or not self.ppo.kl_target, "ppo.kl_coef", self.ppo.kl_coef, "above 0 with ppo.kl_target")
        require(self.ppo.kl_horizon >= 1, "ppo.kl_horizon", self.ppo.kl_horizon, "at least 1")


GRPO_KINDS = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")


@dataclass
class GRPOStageConfig(StageConfig):
    """python -m train.train_grpo: improve answers whose result can be checked, by comparing several answers to one question."""

    out_dir: str = "weight/grpo"
    model_dir: str | None = "newest"
    reward_model_dir: str | None = None
    """A finished reward model to add to the rules."""
    rewards: dict[str, Any] = field(default_factory=lambda: {"exact": 1.0, "format": 0.1})
    """Rules and their weights, for example rewards.steps=0.2; rewards.exact=0 leaves one out."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts=32, samples=8))
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(val_share=0.03))
    train: OptimizationConfig = field(
        default_factory=lambda: aligning(
            lr=1.5e-4, schedule="linear", warmup_steps=4, batch_size=64, accumulation_steps=4, log_every=2, eval_every=20
        )
    )

    def check(self) -> None:
        super().check()
        require_model(self)
        self.rollout.check(self.data.max_length)
        require(self.rollout.samples >= 2, "rollout.samples", self.rollout.samples, "at least 2: answers are compared with each other")
        require(self.grpo.loss in GRPO_KINDS, "grpo.loss", self.grpo.loss, " | ".join(GRPO_KINDS))
        require(self.grpo.epochs >= 1, "grpo.epochs", self.grpo.epochs, "at least 1")
        for name in ("clip_low", "clip_high", "alarm_kl"):
            require(getattr(self.grpo, name) > 0, f"grpo.{name}", getattr(self.grpo, name), "above 0")
        for name in ("beta", "resample"):
            require(getattr(self.grpo, name) >= 0, f"grpo.{name}", getattr(self.grpo, name), "0 or more")


@dataclass
class RLHFConfig:
    """python train_rlhf.py: a reward model from preference pairs, then PPO with it, in one command.

    A setting without `reward.` or `ppo.` before it goes to each of the two stages that knows it: model_dir=weight/sft,
    data.preference_file=pairs.jsonl, rollout.prompts=32; out_dir=FOLDER puts them into FOLDER/reward and FOLDER/ppo.
    """

    reward: RewardStageConfig = field(default_factory=RewardStageConfig)
    ppo: PPOStageConfig = field(default_factory=PPOStageConfig)
    resume: bool = False
    """Go on where an earlier run stopped; a finished reward model is used as it is."""
    overwrite: bool = False
    """Replace both results."""
    dry_run: bool = False
    """Print parameters, memory, tokens and time of both stages, and stop."""

    def check(self) -> None:
        self.reward.check()
        self.ppo.check()
        chosen = self.ppo.reward_model_dir
        require(chosen is None, "reward_model_dir", chosen, "left out: it is trained here; train.train_ppo takes a finished one")


# ---------------------------------------------------------------- distillation (train_distill)


@dataclass
class DistillConfig:
    """How a student learns from a teacher."""

    data: str = "sft"
    """sft (data.sft_file: the answers' tokens) or pretrain (data.pretrain_file: every token)."""
    kind: str = "forward_kl"
    """forward_kl (the student covers all that the teacher would say) or reverse_kl (it keeps to what the teacher finds likely)."""
    temperature: float = 1.0
    """Both distributions are softened by it; 1: as they are."""
    alpha: float = 0.5
    """Share of the teacher in the loss; the rest is cross-entropy with the data."""
    top_k: int = 0
    """Keep the teacher's k most probable tokens on disk and read them again in later epochs and runs; 0: run the teacher each time."""
    structure_weight: float = 1.0
    """How much the tokens of <think>, </think>, tool calls and turn ends count, against 1 for the others."""


@dataclass
class DistillStageConfig(StageConfig):
    """python -m train.train_distill: learn from a teacher's distributions, or (teacher_dir=none) from texts that a teacher wrote."""

    out_dir: str = "weight/distill"
    teacher_dir: str | None = "newest"
    """Checkpoint of the teacher, of the student's vocabulary; newest: of weight/reasoning and weight/sft; none: learn from texts only."""
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "nano"})
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(optimizer="muon", lr=2e-3, schedule="linear", min_lr_ratio=0.05, batch_size=8, epochs=2)
    )

    def check(self) -> None:
        super().check()
        distill = self.distill
        require(distill.data in ("sft", "pretrain"), "distill.data", distill.data, "sft | pretrain")
        require(distill.kind in ("forward_kl", "reverse_kl"), "distill.kind", distill.kind, "forward_kl | reverse_kl")
        require(distill.temperature > 0, "distill.temperature", distill.temperature, "above 0")
        require(0 <= distill.alpha <= 1, "distill.alpha", distill.alpha, "in [0, 1]")
        require(distill.top_k >= 0, "distill.top_k", distill.top_k, "0 or more")
        require(distill.structure_weight > 0, "distill.structure_weight", distill.structure_weight, "above 0")
