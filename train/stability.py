"""What keeps a long run from being spoilt: gradients that are cut back when they stand out, loss spikes that are noticed, a way back to
the last good checkpoint, and an end when held-out data no longer gains.

All of what is remembered here is part of the checkpoint: a run that is resumed decides as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoints import damage, list_checkpoints, load_state
from train.progress import Progress

WARM_UP = 25  # norms before the first is cut back, and the decay of their mean and variance: as published
DECAY = 0.97
WINDOW = 100  # losses that a new one is compared with
FEWEST = 25
SPIKE = 8.0  # robust standard deviations above the median from which on a loss is a spike
LEAST_SPREAD = 0.01  # ... of which one is at least this share of the median: a run that stands still must not look wild
DEVIATION = 1.4826  # median absolute deviation -> standard deviation, of a normal distribution
LOWER_RATE = 0.5  # a way back is gone on at this share of the learning rate


@dataclass
class Watch:
    """The losses and gradient norms of late."""

    losses: list[float] = field(default_factory=list)
    norms: int = 0
    """How many there were."""
    mean: float = 0.0
    squares: float = 0.0
    """While warming up the sum of squared deviations, then the variance."""

    def deviations(self, loss: float) -> float:
        """By how many robust standard deviations this loss is above the median of those before it; 0 while they are few."""
        found = 0.0
        if len(self.losses) >= FEWEST:
            median = statistics.median(self.losses)
            spread = DEVIATION * statistics.median(abs(value - median) for value in self.losses)
            found = (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)
        self.losses = [*self.losses[1 - WINDOW :], loss]
        return found

    def norm_limit(self, norm: float, deviations: float) -> float:
        """The norm to which a gradient of `norm` is cut: itself, or where it stands out by more than `deviations` standard deviations z,
        mean + deviations^2 / z of them: the wilder, the smaller (ZClip; Kumar et al., 2025)."""
        self.norms += 1
        if self.norms <= WARM_UP:
            before = self.mean
            self.mean += (norm - before) / self.norms
            self.squares += (norm - before) * (norm - self.mean)
            if self.norms == WARM_UP:
                self.squares /= WARM_UP
            return norm
        deviation = math.sqrt(self.squares)
        z = (norm - self.mean) / (deviation + 1e-6)
        limit = self.mean + deviations**2 / z * deviation if z > deviations else norm
        self.mean = DECAY * self.mean + (1 - DECAY) * limit
        self.squares = DECAY * self.squares + (1 - DECAY) * (limit - self.mean) ** 2
        return limit


def last_good_checkpoint(out_dir: Path) -> Path | None:
    """The newest intact checkpoint that was not written amid trouble: its weights may be what led there."""
    intact = (path for path in reversed(list_checkpoints(out_dir)) if damage(path) is None)
    return next((path for path in intact if not Progress(**load_state(path)["progress"]).in_trouble), None)


def score(evaluated: Mapping[str, Any]) -> float | None:
    """What early stopping goes by, smaller is better: the held-out loss; where answers are judged instead, minus their reward."""
    loss, reward = evaluated.get("val_loss"), evaluated.get("val_reward")
    return loss if loss is not None else None if reward is None else -reward
