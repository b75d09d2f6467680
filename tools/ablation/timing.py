"""Step times of all variants from one interleaved run: whatever else the machine does, it does to all of them.

Nothing is trained here: the steps of `train.loop` are only imitated, part by part, on real batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.files import atomic_write_text
from tools.ablation.settings import identity
from train.config import PretrainConfig
from train.data import Batch, make_source
from train.losses import lm_loss
from train.optim import Muon, build_optimizers
from train.runtime import choose_precision, describe_machine, device_name, set_threads, timed
from train.stage import load_tokenizer, make_model, model_config
from train.store import open_store

FILE = "step_times.json"
WARM_UP = 2  # rounds that are not counted
SMALL_RATE = 1e-5  # the work of a step does not depend on it, and no model is spoiled by it
NOT_TIMED = ("train.seed", "train.max_steps", "train.precision")


@dataclass
class StepTimes:
    """Seconds of each round and variant."""

    precision: str
    machine: str
    tokens_per_step: int
    baseline: str
    key: str
    """What was measured: a hash of the variants' settings."""
    seconds: dict[str, list[float]]

    def ratio(self, variant: str) -> tuple[float, float, float]:
        """Median, smallest and largest over the rounds of a variant's time divided by the baseline's of the same round."""
        ratios = [a / b for a, b in zip(self.seconds[variant], self.seconds[self.baseline], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def likely_ratio(self, variant: str) -> tuple[float, float]:
        """95 % interval of the median ratio, from order statistics; with fewer than 6 rounds the smallest and largest of them."""
        ratios = sorted(a / b for a, b in zip(self.seconds[variant], self.seconds[self.baseline], strict=True))
        count, outside = len(ratios), 0.0
        for rank in range(count // 2):
            outside += math.comb(count, rank) / 2**count  # the median lies below the ratio of this rank
            if outside > 0.025:
                return ratios[max(rank - 1, 0)], ratios[count - max(rank, 1)]
        return ratios[0], ratios[-1]

    def step_seconds(self, variant: str) -> float:
        """The baseline's median time of a step, times the variant's ratio."""
        return statistics.median(self.seconds[self.baseline]) * self.ratio(variant)[0]

    def tokens_per_second(self, variant: str) -> float:
        return self.tokens_per_step / self.step_seconds(variant)


def step_times(
    variants: Mapping[str, PretrainConfig], baseline: str, folder: Path, rounds: int, log: Callable[[str], object] = print
) -> StepTimes:
    """The step times that lie in `folder`, measured now when they are not there or are those of other variants."""
    known = read_step_times(folder)
    key = _key(variants)
    if known is not None and known.key == key and len(known.seconds[baseline]) >= rounds:
        return known
    log(f"measuring step times: {len(variants)} variants, {WARM_UP} + {rounds} interleaved rounds")
    times = measure(variants, baseline, rounds, key, known.precision if known is not None else None)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / FILE, json.dumps(asdict(times), indent=1) + "\n")
    for name in variants:
        middle, least, most = times.ratio(name)
        log(f"  {name:<24}{times.step_seconds(name) * 1000:>8.0f} ms a step, {middle:.3f} x the baseline's ({least:.3f} to {most:.3f})")
    return times


def read_step_times(folder: Path) -> StepTimes | None:
    file = folder / FILE
    return StepTimes(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _key(variants: Mapping[str, PretrainConfig]) -> str:
    wanted = {name: {k: v for k, v in identity(settings).items() if k not in NOT_TIMED} for name, settings in variants.items()}
    return hashlib.blake2b(json.dumps(wanted, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def measure(variants: Mapping[str, PretrainConfig], baseline: str, rounds: int, key: str, precision: str | None = None) -> StepTimes:
    """Time forward, backward and update of every variant, in a new order each round. precision: what earlier runs were trained in;
    else the baseline's setting, and where that is `auto`, what is faster for the baseline."""
    first = variants[baseline]
    set_threads(first.train.threads)
    device = device_name(first.train.device)
    tokenizer = load_tokenizer(first)
    store = open_store(first.data.pretrain_file, tokenizer, "pretrain", first.data, val_share=0.0 if first.data.val_file else None)
    steppers = {name: _Stepper(settings, model_config(settings, tokenizer), device) for name, settings in variants.items()}
    source = make_source(store, first, tokenizer.pad_token_id)

    def micro_batches() -> list[Batch]:
        return [source.next_batch(1.0).to(device) for _ in range(first.train.accumulation_steps)]

    batches = micro_batches()
    chosen = replace(first.train, precision=precision) if precision and first.train.precision == "auto" else first.train
    trial = batches
    kind = choose_precision(chosen, device, lambda: steppers[baseline].forward_backward(trial))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0)
    for number in range(WARM_UP + rounds):
        batches = micro_batches()
        shuffle.shuffle(order)
        for name in order:
            steppers[name].use(kind.name)
            with kind.autocast():
                spent = timed(partial(steppers[name].step, batches), device)
            if number >= WARM_UP:
                seconds[name].append(spent)
    return StepTimes(kind.name, describe_machine(device), sum(batch.positions for batch in batches), baseline, key, seconds)


class _Stepper:
    """A model with its optimisers, for timing."""

    def __init__(self, settings: PretrainConfig, config: Any, device: str) -> None:
        self.model = make_model(settings, config).to(device).train()
        self.optimizers = build_optimizers(self.model, settings.train, device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = SMALL_RATE

    def use(self, precision: str) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def forward_backward(self, batches: list[Batch]) -> None:
        for batch in batches:
            terms = lm_loss(self.model, batch)
            torch.stack([term.total / max(batch.weights["tokens"], 1.0) for term in terms]).sum().backward()

    def step(self, batches: list[Batch]) -> None:
        self.forward_backward(batches)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        load = self.model.take_expert_load()
        if load is not None:
            self.model.balance_experts(load)
