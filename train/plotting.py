"""The plots of a run, and what every plot begins and ends with: matplotlib without a screen.

Words in plots are English: matplotlib's own fonts have no Chinese characters.
"""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

from model.files import atomic_write_bytes


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only; None when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure as PNG in one step, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    pyplot().close(figure)
    figure.clear()
    gc.collect()  # a figure is a tangle of cycles of some megabytes, of which a run would gather dozens before Python looks for them
    atomic_write_bytes(file, buffer.getvalue())


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and held-out loss and the learning rate over tokens, and below accuracy and rewards of pairs, where there are such;
    False when matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return False
    judged = any(row.get("accuracy") is not None for row in rows)
    figure, axes = plt.subplots(3 if judged else 1, figsize=(8, 10.5 if judged else 4.7), dpi=120, sharex=True, squeeze=False)

    def draw(axis: Any, name: str, label: str, **style: Any) -> None:
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    training: dict[str, Any] = {"linewidth": 1.2}
    held: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.5}
    axis = axes[0, 0]
    draw(axis, "loss", "training loss", color="tab:blue", **training)
    draw(axis, "val_loss", "held-out loss", color="tab:orange", **held)
    rolled = any(row.get("ratio") is not None for row in rows)
    axis.set_ylabel("mean loss of the pairs or answers" if judged else "policy loss" if rolled else "cross-entropy (nats per token)")
    right = axis.twinx()
    draw(right, "lr", "learning rate", color="tab:green", linewidth=0.8, alpha=0.5)
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    _finish_axes(axis, right)
    if judged:
        axis = axes[1, 0]
        draw(axis, "accuracy", "accuracy in training", color="tab:blue", **training)
        draw(axis, "val_accuracy", "held-out accuracy", color="tab:orange", **held)
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(ylabel="share ranked right", ylim=(0, 1.02))
        right = axis.twinx()
        draw(right, "margin", "reward margin in training", color="tab:purple", linewidth=0.8, alpha=0.6)
        draw(right, "val_margin", "held-out reward margin", color="tab:purple", linestyle="--", **held)
        right.set_ylabel("chosen reward - rejected reward")
        _finish_axes(axis, right)
        axis = axes[2, 0]
        for side, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            draw(axis, f"{side}_reward", f"{side} reward in training", color=color, alpha=0.6, **training)
            draw(axis, f"val_{side}_reward", f"held-out {side} reward", color=color, **held)
        axis.set_ylabel("mean reward of the answers")
        _finish_axes(axis)
    axis.set_xlabel("tokens seen (millions)")
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)
    return True


def plot_panels(rows: list[dict[str, Any]], path: Path, panels: dict[str, tuple[str, ...]], title: str) -> bool:
    """Draw columns of the log over steps, a panel per title of `panels` with the columns it names; those that are nowhere in the log are
    left out. False when matplotlib is missing or there is nothing to draw."""
    shown = {name: [c for c in columns if any(row.get(c) is not None for row in rows)] for name, columns in panels.items()}
    shown = {name: columns for name, columns in shown.items() if columns}
    plt = pyplot()
    if plt is None or not shown:
        return False
    across = min(len(shown), 4)
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.6 * across, 2.7 * down), dpi=120, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, columns) in zip(axes.flat, shown.items(), strict=False):
        for column in columns:
            points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
            held_out = column.startswith("val_")
            axis.plot(*zip(*points, strict=True), linewidth=1.3, marker="o" if held_out else None, markersize=3, label=column)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
        if len(columns) > 1:
            axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)
    return True


def _finish_axes(axis: Any, right: Any = None) -> None:
    """Grid, and above the axes, where it hides nothing, one legend for what is drawn on both sides."""
    axis.grid(alpha=0.3)
    drawn = [*axis.get_lines(), *(right.get_lines() if right is not None else [])]
    lines = [line for line in drawn if not str(line.get_label()).startswith("_")]
    if right is not None and not right.get_lines():
        right.set_visible(False)
    if lines:
        names = [str(line.get_label()) for line in lines]
        axis.legend(lines, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=4, fontsize=8, frameon=False)
