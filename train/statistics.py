"""Intervals for measured shares."""

from __future__ import annotations

import math

import numpy as np


def wilson(passed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (95% for z = 1.96). Raises ValueError unless 0 <= passed <= total, total > 0."""
    if not 0 <= passed <= total or total == 0:
        raise ValueError(f"passed is {passed} of total {total}; need 0 <= passed <= total and total > 0")
    share = passed / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(differences: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The middle 95% of the mean over draws, with replacement, of runs and of prompts (a bootstrap on two levels; Efron, 1979).

    differences: (runs, prompts). With one run, only the prompts are drawn, and the interval says nothing about other seeds.
    """
    random = np.random.default_rng(seed)
    runs, prompts = differences.shape
    means = np.empty(draws)
    for draw in range(draws):
        chosen = differences[random.integers(runs, size=runs)]
        means[draw] = chosen[:, random.integers(prompts, size=prompts)].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
