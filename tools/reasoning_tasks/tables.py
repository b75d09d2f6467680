"""The results of models on the reasoning tasks, and the tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.ablation.results import interval
from tools.reasoning_tasks import measure

NONE = "–"

Row = dict[str, Any]


@dataclass
class Entry:
    """A model at one setting of its reasoning head."""

    model: str
    group: str
    """The model without its seed."""
    steps: int | None
    halt: float
    trained_steps: int | None
    parameters: int
    trained_tokens: int | None = None
    correct: dict[str, list[bool]] = field(default_factory=dict)
    """By split, a value per row."""
    generated: dict[str, list[bool]] = field(default_factory=dict)
    answer_steps: float | None = None
    all_steps: float | None = None
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split: confidence (where there is a reasoning head) and softmax."""
    flops: float = 0.0
    training_flops: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        if self.steps is None:
            return NONE
        return f"{self.steps}" + (f", halt {self.halt:g}" if self.halt else "")

    @property
    def as_trained(self) -> bool:
        return self.steps == self.trained_steps and not self.halt


def percent(correct: Sequence[bool]) -> str:
    cell = measure.share(correct)
    return f"{cell['rate']:.1%} ({cell['low']:.0%}–{cell['high']:.0%})"


def markdown(
    entries: list[Entry],
    tasks: dict[str, list[Row]],
    frequent: Mapping[tuple[str, str], str],
    paths: list[tuple[str, measure.Path]],
    machine: str,
    drawn: list[str],
) -> str:
    """The report: one table of everything, then by kind, by length, of the confidence, and the path as text. frequent: as in
    `measure.guessing`."""
    counts = ", ".join(f"{split} {len(rows):,}" for split, rows in tasks.items())
    lines = ["# Reasoning tasks", "", f"Rows: {counts}. {machine}.", "", *_main_table(entries, tasks, frequent)]
    lines += _seed_table(entries)
    for split, rows in tasks.items():
        lines += ["", f"## {split}, by kind", "", *_group_table(entries, rows, split, "kind", frequent)]
    lines += ["", "## By number of operations", "", "All test files together.", "", *_length_table(entries, tasks)]
    lines += _generated_table(entries)
    lines += ["", "## How sure the models are", "", *_calibration_table(entries)]
    for name, path in paths:
        lines += ["", f"## A path: {name}", "", *path_text(path)]
    lines += [""] + [f"![{Path(file).stem}]({file})" for file in drawn]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *("| " + " | ".join(row) + " |" for row in rows)]


def _main_table(entries: list[Entry], tasks: dict[str, list[Row]], frequent: Mapping[tuple[str, str], str]) -> list[str]:
    heads = ["model", "latent steps", "parameters, M", "trained on, M tokens", "MFLOP / trained token", "MFLOP / token", "ms / token"]
    heads += [*tasks, "mean steps: answers (all tokens)"]
    rows = [["most frequent answer", *[NONE] * 6, *(percent(measure.guessing(found, frequent)) for found in tasks.values()), NONE]]
    for entry in entries:
        time = "{median:.2f} ({min:.2f}–{max:.2f})".format(**entry.milliseconds)
        tokens = NONE if entry.trained_tokens is None else f"{entry.trained_tokens / 1e6:.2f}"
        used = NONE if entry.answer_steps is None else f"{entry.answer_steps:.2f} ({entry.all_steps:.2f})"
        cells = [entry.model, entry.setting, f"{entry.parameters / 1e6:.3f}", tokens, f"{entry.training_flops / 1e6:.2f}"]
        cells += [f"{entry.flops / 1e6:.2f}", time, *(percent(entry.correct[split]) for split in tasks), used]
        rows.append(cells)
    notes = [
        "",
        "- Right answers by exact match, greedy, without written thinking; Wilson's 95 % intervals over the rows.",
        "- Most frequent answer: that of train.jsonl for the kind and language, whatever the question.",
        "- MFLOP: computed from the shape; with halting for the mean number of steps, since a batch as a whole saves nothing until its "
        "last token halts. ms: one conversation, median of interleaved rounds (smallest to largest).",
    ]
    return _table(heads, rows) + notes


def _seed_table(entries: list[Entry]) -> list[str]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.group, entry.setting), []).append(entry)
    groups = {key: found for key, found in groups.items() if len(found) > 1}
    if not groups:
        return []
    rows = []
    for (group, setting), found in groups.items():
        cells = []
        for split in found[0].correct:
            rate, low, high = over_seeds(found, split)
            cells.append(f"{rate:.1%} ({max(low, 0):.0%}–{min(high, 1):.0%})")
        rows.append([group, setting, str(len(found)), *cells])
    heads = ["model", "latent steps", "seeds", *entries[0].correct]
    return ["", "## Over seeds", "", "Mean accuracy with Student's 95 % interval over the seeds.", "", *_table(heads, rows)]


def over_seeds(found: list[Entry], split: str) -> tuple[float, float, float]:
    """(accuracy, low, high) of entries that differ in their seed: Student's interval, with one seed Wilson's."""
    cells = [measure.share(entry.correct[split]) for entry in found]
    value = interval([cell["rate"] for cell in cells])
    assert value is not None
    if value.low is None or value.high is None:
        return value.mean, cells[0]["low"], cells[0]["high"]
    return value.mean, value.low, value.high


def _group_table(entries: list[Entry], rows: list[Row], split: str, name: str, frequent: Mapping[tuple[str, str], str]) -> list[str]:
    values = list(dict.fromkeys(row[name] for row in rows))
    picked = {value: [i for i, row in enumerate(rows) if row[name] == value] for value in values}

    def cells(correct: Sequence[bool]) -> list[str]:
        return [percent([correct[i] for i in picked[value]]) for value in values]

    table = [["most frequent answer", NONE, *cells(measure.guessing(rows, frequent))]]
    table += [[entry.model, entry.setting, *cells(entry.correct[split])] for entry in entries]
    return _table(["model", "latent steps", *map(str, values)], table)


def _length_table(entries: list[Entry], tasks: dict[str, list[Row]]) -> list[str]:
    lengths = [row["steps"] for rows in tasks.values() for row in rows]
    values = sorted(set(lengths))
    table = []
    for entry in entries:
        correct = [value for split in tasks for value in entry.correct[split]]
        table.append([entry.model, entry.setting, *(percent([c for c, n in zip(correct, lengths, strict=True) if n == v]) for v in values)])
    return _table(["model", "latent steps", *map(str, values)], table)


def _generated_table(entries: list[Entry]) -> list[str]:
    rows = [[entry.model, entry.setting, *map(percent, entry.generated.values())] for entry in entries if entry.generated]
    if not rows:
        return []
    return [
        "",
        "## Generated freely",
        "",
        "The model may think in words first.",
        "",
        *_table(["model", "latent steps", *entries[0].generated], rows),
    ]


def _calibration_table(entries: list[Entry]) -> list[str]:
    rows = []
    for entry in entries:
        for split, estimates in entry.calibration.items():
            for name, result in estimates.items():
                figures = [f"{result[key]:.3f}" for key in ("rate", "estimate", "ece", "brier")]
                rows.append([entry.model, entry.setting, split, name, f"{result['tokens']:,}", *figures])
    note = (
        "On the tokens of the answers, the end left out: estimated probability that the most probable token is right. Confidence is the "
        "reasoning head's readout, softmax the largest probability. Calibration error over ten equal intervals; of both, 0 is best."
    )
    heads = ["model", "latent steps", "split", "estimate", "tokens", "right", "mean estimate", "calibration error", "Brier"]
    return [note, "", *_table(heads, rows)]


def path_text(path: measure.Path) -> list[str]:
    """The path as a Markdown table: a row per step, a column per token of the answer."""
    heads = ["after step", *(f"`{token}`" for token in path.tokens)]
    rows = []
    for step, tokens in enumerate(path.predicted):
        values = zip(tokens, path.probability[step], path.confidence[step], strict=True)
        rows.append([str(step + 1), *(f"`{token}` {chance:.2f} (confidence {sure:.2f})" for token, chance, sure in values)])
    return [f"{path.question} -> {path.answer}", "", *_table(heads, rows)]
