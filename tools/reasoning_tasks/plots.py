"""The plots of a reasoning report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from tools.reasoning_tasks.measure import Path
from train.plotting import pyplot, save_figure

SPLIT_TITLES = {
    "valid": "other problems\n(1 to 4 steps)",
    "held_templates": "other problems, other wordings\n(1 to 4 steps)",
    "longer": "longer problems\n(5 to 7 steps)",
}
COLUMNS = 3

ESTIMATES = {"confidence": ("tab:blue", "o"), "softmax": ("tab:orange", "s")}
TITLE_WIDTH = 80  # characters

Panel = tuple[str, list[tuple[str, str, dict[str, Any]]]]
Curve = dict[float, tuple[float, float, float]]
"""Number of latent steps -> (accuracy, low, high); 0 for a model without a reasoning head."""


def _pyplot() -> Any:
    """As `pyplot`, but the report is not complete without its plots: ValueError names the extra that is missing."""
    plt = pyplot()
    if plt is None:
        raise ValueError('plots need matplotlib: pip install -e ".[app]"')
    return plt


def draw_accuracy(curves: dict[str, dict[str, Curve]], guesses: dict[str, float], file: FilePath) -> None:
    """curves[split][name]. Accuracy over latent steps, models without a reasoning head as horizontal lines."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 4.8), dpi=110, sharey=True, squeeze=False)
    colours = plt.get_cmap("tab10")
    names = list(dict.fromkeys(name for split in curves.values() for name in split))
    steps = sorted({step for split in curves.values() for curve in split.values() for step in curve if step})
    for axis, (split, of_split) in zip(axes[0], curves.items(), strict=True):
        for name, curve in of_split.items():
            colour = colours(names.index(name) % 10)
            if 0 in curve:
                rate, low, high = curve[0]
                axis.axhline(rate, color=colour, linestyle="--", linewidth=1.6, label=name)
                axis.axhspan(low, high, color=colour, alpha=0.10)
                continue
            shift = 1 + 0.02 * (names.index(name) - len(names) / 2)  # intervals beside each other, not on top
            points = sorted(curve.items())
            errors = [[v[0] - v[1] for _, v in points], [v[2] - v[0] for _, v in points]]
            x, y = [step * shift for step, _ in points], [v[0] for _, v in points]
            axis.errorbar(x, y, yerr=errors, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.6, label=name)
        axis.axhline(guesses[split], color="grey", linestyle=":", linewidth=1.4, label="most frequent answer")
        axis.set_title(SPLIT_TITLES.get(split, split), fontsize=10)
        axis.set_xlabel("latent steps in use")
        if steps:
            axis.set_xscale("log", base=2)
            axis.set_xlim(min(steps) / 1.3, max(steps) * 1.3)
            axis.set_xticks(steps, [f"{step:g}" for step in steps])
            axis.minorticks_off()
        else:
            axis.set_xticks([])
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers (exact match)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(3, len(labels)), fontsize=9)
    figure.tight_layout()
    save_figure(figure, file)


def draw_calibration(panels: Sequence[Panel], file: FilePath) -> None:
    """panels: (title, [(estimate, split, result of `calibration`)]). Estimated probability against the share of hits."""
    plt = _pyplot()
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 4.5 * lines), dpi=110, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(panels):
            axis.set_axis_off()
            continue
        title, estimates = panels[place]
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for estimate, split, result in estimates:
            colour, marker = ESTIMATES[estimate]
            style = "-" if split == "valid" else ":"
            x, y = [part["estimate"] for part in result["bins"]], [part["rate"] for part in result["bins"]]
            sizes = [8 + 180 * part["count"] / result["tokens"] for part in result["bins"]]
            axis.plot(x, y, color=colour, linestyle=style, linewidth=1.2, alpha=0.8)
            label = f"{estimate}, {split}: error {result['ece']:.3f}, Brier {result['brier']:.3f}"
            axis.scatter(x, y, s=sizes, color=colour, marker=marker, alpha=0.7 if style == "-" else 0.35, label=label)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="estimated probability", ylabel="share that is right")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        legend = axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([30])
    figure.tight_layout()
    save_figure(figure, file)


def draw_path(path: Path, title: str, file: FilePath) -> None:
    """A row per latent step, a column per token of the answer: the prediction, its probability, and the confidence as colour."""
    plt = _pyplot()
    rows, columns = len(path.predicted), len(path.tokens)
    figure, axis = plt.subplots(figsize=(max(7.0, 2.2 + 1.5 * columns), 1.9 + 0.62 * rows), dpi=120)
    image = axis.imshow(path.confidence, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    for step in range(rows):
        for place in range(columns):
            right = path.predicted[step][place] == path.tokens[place]
            colour = "white" if path.confidence[step][place] > 0.75 else "black"
            text = f"{path.predicted[step][place]}   p = {path.probability[step][place]:.2f}\nconfidence {path.confidence[step][place]:.2f}"
            axis.text(place, step, text, ha="center", va="center", color=colour, fontsize=9, fontweight="bold" if right else "normal")
    axis.set_xticks(range(columns), [f"{token!r}" if token != "<end>" else "end of answer" for token in path.tokens])
    axis.set_yticks(range(rows), [f"step {step + 1}" for step in range(rows)])
    axis.set_xlabel("right token (bold: predicted)")
    axis.set_title("\n".join([*textwrap.wrap(path.question, TITLE_WIDTH), title]), fontsize=10)
    figure.colorbar(image, ax=axis, label="confidence", fraction=0.05, pad=0.03)
    figure.tight_layout()
    save_figure(figure, file)
