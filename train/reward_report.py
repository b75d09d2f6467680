"""What a reward model is worth on pairs it did not learn from: accuracy, calibration, and whether it only likes long answers.

Shapes: P pairs, S = 2 P sequences (2i chosen, 2i + 1 rejected).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from train.data import IGNORE, Batch
from train.log_probs import sequence_numbers
from train.plotting import pyplot, save_figure
from train.statistics import wilson

BINS = 5  # groups of pairs by confidence


@dataclass
class PairScores:
    """Scores and lengths of held-out pairs."""

    chosen: np.ndarray
    """(P,) scores of the preferred answers."""
    rejected: np.ndarray
    chosen_length: np.ndarray
    """(P,) tokens of the answers, end token included."""
    rejected_length: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        return self.chosen - self.rejected

    @property
    def longer(self) -> np.ndarray:
        """(P,) tokens by which the preferred answer is longer."""
        return self.chosen_length - self.rejected_length


@dataclass
class ConfidenceBin:
    """Pairs of like probability for the favoured answer."""

    count: int
    confidence: float
    """Mean probability that the model gives to the answer it favours."""
    right: int
    """In how many of them that answer is the preferred one."""


@torch.no_grad()
def score_pairs(model: torch.nn.Module, batches: Iterable[Batch], device: str) -> PairScores:
    """Scores that a RewardModel gives to whole pairs, in evaluation mode; it is in training mode afterwards."""
    model.eval()
    scores, lengths = [], []
    for batch in batches:
        batch = batch.to(device)
        ids, segments = batch.inputs["input_ids"], batch.inputs["segment_ids"]
        scores.append(model(ids, segment_ids=segments).cpu())
        numbers, count = sequence_numbers(ids, segments)
        lengths.append(torch.bincount(numbers[batch.inputs["labels"] != IGNORE], minlength=count).cpu())
    model.train()
    rewards, sizes = torch.cat(scores).double().view(-1, 2), torch.cat(lengths).view(-1, 2)
    return PairScores(rewards[:, 0].numpy(), rewards[:, 1].numpy(), sizes[:, 0].numpy(), sizes[:, 1].numpy())


def confidence_bins(difference: np.ndarray) -> list[ConfidenceBin]:
    """Pairs in groups of equal number by the probability sigmoid(|difference|) that the model gives to the answer it favours.

    A tie favours neither: it counts as right for every second pair.
    """
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = []
    for inside in np.array_split(np.argsort(confidence, kind="stable"), BINS):
        if len(inside):
            right = int((difference[inside] > 0).sum() + (difference[inside] == 0).sum() // 2)
            bins.append(ConfidenceBin(len(inside), float(confidence[inside].mean()), right))
    return bins


def calibration_error(bins: list[ConfidenceBin]) -> float:
    """Expected calibration error: |share right - mean confidence|, averaged over the pairs."""
    return sum(abs(b.right - b.count * b.confidence) for b in bins) / sum(b.count for b in bins)


def reward_facts(pairs: PairScores) -> dict[str, str]:
    """The report's lines about held-out pairs."""
    difference, longer = pairs.difference, pairs.longer
    bins = confidence_bins(difference)
    probability = 1 / (1 + np.exp(-difference))
    favoured = np.sign(difference) * np.sign(longer)  # 1: the model favours the longer answer
    return {
        "held-out pairs": f"{len(difference):,}",
        "held-out accuracy": share(difference > 0),
        "calibration": f"expected error {calibration_error(bins):.3f}, Brier score {np.square(1 - probability).mean():.3f} (0.25: a coin)",
        "confidence and share right": ", ".join(f"{b.confidence:.2f}: {b.right / b.count:.2f}" for b in bins),
        "score difference against length difference": f"correlation {correlation(difference, longer):+.2f}",
        "accuracy where the preferred answer is longer": share(difference[longer > 0] > 0),
        "accuracy where it is shorter": share(difference[longer < 0] > 0),
        "the longer answer is favoured": f"by the data {share(longer[longer != 0] > 0)}, by the model {share(favoured[longer != 0] > 0)}",
    }


def share(hits: np.ndarray) -> str:
    """ "0.62 (0.57 to 0.67, n = 284)": a share with its 95% interval."""
    if not len(hits):
        return "no such pair"
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{hits.mean():.3f} (95% {low:.3f} to {high:.3f}, n = {len(hits):,})"


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else 0.0


def plot_reward(pairs: PairScores, path: Path, title: str) -> bool:
    """Draw score differences, calibration and length bias; False when matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return False
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), dpi=110)
    left.hist(pairs.difference, bins=40, color="tab:blue", alpha=0.8)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="score of the preferred answer - score of the other", ylabel="held-out pairs", title="Score differences")
    bins = confidence_bins(pairs.difference)
    rates = np.array([b.right / b.count for b in bins])
    ends = np.array([wilson(b.right, b.count) for b in bins])
    spread = np.stack([rates - ends[:, 0], ends[:, 1] - rates]).clip(min=0)
    middle.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1, label="perfectly calibrated")
    middle.errorbar(
        [b.confidence for b in bins],
        rates,
        spread,
        color="tab:orange",
        marker="o",
        capsize=3,
        label=f"groups of {bins[0].count} pairs, 95% interval",
    )
    middle.set(xlabel="probability of the favoured answer", ylabel="share right", xlim=(0.48, 1.02), ylim=(0, 1.02))
    middle.set_title(f"Calibration (expected error {calibration_error(bins):.3f})")
    middle.legend(loc="lower right", fontsize=8)
    right.scatter(pairs.longer, pairs.difference, s=7, alpha=0.5, color="tab:green")
    right.axhline(0, color="black", linewidth=0.8)
    right.axvline(0, color="black", linewidth=0.8)
    label = f"Length bias (correlation {correlation(pairs.difference, pairs.longer):+.2f})"
    right.set(xlabel="tokens by which the preferred answer is longer", ylabel="score difference", title=label)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{title}: held-out accuracy {share(pairs.difference > 0)}")
    figure.tight_layout()
    save_figure(figure, path)
    return True
