"""The settings that every stage shares: tokenizer, data, optimisation, adapter. The stages' own are in `train.config`, through which
these are imported, too."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any

from model.config import PRESETS, HaoAIConfig
from model.lora import LoRASettings
from train.command_line import UsageError, convert, require, unknown


@dataclass
class TokenizerConfig:
    """How a tokenizer is trained."""

    vocab_size: int = 16384
    """Number of tokens, special ones included."""
    sample_mb: float = 64.0
    """Train on at most this much text (10^6 bytes of UTF-8), drawn evenly from the languages and files."""


@dataclass
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    pretrain_file: Any = "training_data/pretrain"
    """Text to learn from: a file, folder, glob, or list of them; {path: ..., weight: 2} reads a source twice per epoch."""
    sft_file: Any = "training_data/sft"
    """Conversations to learn from, in the same forms."""
    preference_file: Any = "training_data/rlhf"
    """Pairs {prompt, chosen, rejected}, or judged answers {prompt, completion, label}, in the same forms."""
    prompt_file: Any = "training_data/sft"
    """Conversations or pairs whose questions PPO and GRPO answer, in the same forms; the data's own answers are what rules compare with."""
    val_file: Any = None
    """Held-out data to measure on; None: documents held out of the training data by their hash."""
    max_length: int = 512
    """Row length in tokens (the context in training)."""
    short_length: int = 0
    """Curriculum: begin with rows of this many tokens (0: full rows from the start)."""
    short_share: float = 0.5
    """Curriculum: share of the run that uses short rows."""
    val_share: float = 0.01
    """Share of the documents held out."""
    store_dir: str = "weight/token_store"
    """Folder of the token stores, one per content, tokenizer and kind."""
    strict: bool = False
    """Stop at the first unusable row instead of counting and skipping it."""


@dataclass
class OptimizationConfig:
    """One optimisation run, whatever the stage."""

    max_steps: int = 0
    """Optimiser steps; 0: as many as `epochs` or `max_minutes` say."""
    epochs: float = 1.0
    """Passes over the data when max_steps and max_minutes are 0."""
    max_minutes: float = 0.0
    """Time budget of the stage; the number of steps is derived from the measured speed, and corrected on the way."""
    batch_size: int = 16
    """Rows per micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches per optimiser step; each token counts the same however they are split."""
    micro_batch: int = 0
    """Rows of a forward and backward pass; 0: as many as suit the device, on a CPU measured in runs of a minute and more; of pairs and
    rollouts all. Each token counts the same however they are split."""
    optimizer: str = "adamw"
    """adamw, or muon (matrices by Muon, everything else by AdamW)."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The learning rate's floor at the end, as a share of the peak."""
    schedule: str = "cosine"
    """cosine, linear, wsd (constant, then linear decay over decay_share) or constant, each after the warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    decay_share: float = 0.4
    """wsd: share of the run spent decaying."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of norms)."""
    beta1: float = 0.9
    """AdamW: decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    adaptive_clip: float = 0.0
    """Besides clip: cut a gradient back whose norm is this many standard deviations above the recent ones (ZClip; Kumar et al., 2025).
    2.5 is usual; 0: not."""
    activation_checkpointing: bool = False
    """Keep only what enters each block, and compute the block again for its gradient: much less memory, a third more work."""
    precision: str = "auto"
    """auto (measured once on this device), fp32, bf16 or fp16."""
    compile: str = "auto"
    """Compile the model's blocks (needs a C++ compiler): on, off, or auto: in pretraining of five minutes and more, if measured to be
    faster."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), or a torch device name."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    parallel: str = "auto"
    """How the processes of torchrun share the work: ddp (each has the whole model), fsdp (weights, gradients and optimiser are divided), or
    auto: ddp, unless that would fill a GPU. Without torchrun nothing."""
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only when stopped."""
    checkpoint_minutes: float = 5.0
    """A checkpoint at least this often, however long a step takes; 0: by steps only."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; 0: at the end only."""
    eval_first: bool = False
    """Evaluate before the first step, too: the row of step 0, which later ones are compared with."""
    eval_tokens: int = 40_000
    """Held-out tokens per evaluation."""
    sample_every: int = 500
    """Steps between sample generations; 0: at the end only."""
    patience: int = 0
    """Early stop after this many evaluations in a row without a better held-out loss (PPO, GRPO: reward); the finished model is then the
    best one measured. 0: run to the end, and keep the last."""
    max_skipped_steps: int = 5
    """Steps in a row whose loss or gradient is not finite, and which are skipped, before the run goes back to its last good checkpoint."""
    max_spike_steps: int = 0
    """The same for steps in a row whose loss is a spike: far above those of the last 100 steps. 0: spikes are only reported."""
    max_rollbacks: int = 3
    """How often a run goes back to its last good checkpoint, each time at half the learning rate, before it gives up."""

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("batch_size", "accumulation_steps", "log_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("micro_batch", "max_steps", "epochs", "max_minutes", "warmup_steps", "clip", "weight_decay", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for name in ("adaptive_clip", "patience", "max_skipped_steps", "max_spike_steps", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        require(not self.patience or self.eval_every > 0, "train.eval_every", self.eval_every, "above 0 with train.patience")
        require(self.lr > 0, "train.lr", self.lr, "above 0")
        require(self.max_steps > 0 or self.max_minutes > 0 or self.epochs > 0, "train.epochs", self.epochs, "above 0")
        for name, known in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "linear", "wsd", "constant")),
            ("precision", ("auto", "fp32", "bf16", "fp16")),
            ("compile", ("auto", "on", "off")),
            ("parallel", ("auto", "ddp", "fsdp")),
        ):
            require(getattr(self, name) in known, f"train.{name}", getattr(self, name), " | ".join(known))


@dataclass
class LoRAConfig(LoRASettings):
    """An adapter that is trained in place of the checkpoint's own weights, in any stage with a model_dir."""

    r: int = 0
    """Rank of the adapter's matrices; 0: no adapter, all weights are trained."""


@dataclass
class StageConfig:
    """What all stages share."""

    out_dir: str = ""
    """Directory of the result."""
    model_dir: str | None = None
    """Checkpoint to start from; its shape and vocabulary are used. newest: the newest of weight/reasoning and weight/sft."""
    tokenizer_dir: str | None = None
    """Folder of the tokenizer; None: the checkpoint's, else weight/tokenizer (trained first when missing)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Shape of a new model: `preset`, and any field of HaoAIConfig."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: OptimizationConfig = field(default_factory=OptimizationConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    resume: bool = False
    """Go on from the newest checkpoint in out_dir."""
    overwrite: bool = False
    """Replace an out_dir that already holds something."""
    dry_run: bool = False
    """Print parameters, memory, tokens and time, and stop."""

    def check(self) -> None:
        self.train.check()
        require(self.data.max_length >= 2, "data.max_length", self.data.max_length, "at least 2")
        require(0 <= self.data.val_share < 1, "data.val_share", self.data.val_share, "in [0, 1)")
        require(
            0 <= self.data.short_length <= self.data.max_length,
            "data.short_length",
            self.data.short_length,
            "between 0 and data.max_length",
        )
        require(self.tokenizer.sample_mb > 0, "tokenizer.sample_mb", self.tokenizer.sample_mb, "above 0")
        self.model_shape()
        if self.lora.r:
            try:
                self.lora.check()
            except ValueError as error:
                raise UsageError(str(error)) from error

    def model_shape(self) -> dict[str, Any]:
        """Fields of HaoAIConfig: the preset's, then those set by name. Raises UsageError for unknown ones."""
        fields = dict(self.model)
        preset = fields.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise UsageError(f"model.preset={preset!r} is unknown; known: {', '.join(PRESETS)}")
        hints = typing.get_type_hints(HaoAIConfig)
        for name, value in fields.items():
            if name not in hints:
                raise unknown(f"model.{name}", [f"model.{n}" for n in [*hints, "preset"]])
            fields[name] = convert(value, hints[name], f"model.{name}")
        return {**(PRESETS[preset] if preset else {}), **fields}
