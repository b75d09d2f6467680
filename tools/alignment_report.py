"""What alignment changed: models before and after a stage on the same held-out questions, with intervals.

    python -m tools.alignment_report --before DIR [DIR ...] --after DIR [DIR ...] [--probes 50] [--tasks TASKS_DIR] [--text FILE ...]
        [--reward-model DIR] [--out FOLDER]

Several DIRs are one stage trained with several seeds; with as many before as after, the first belongs to the first and so on.
What is measured, each part when it is asked for:

    --probes N         shares of N held-out prompts of each kind and language that are passed: answered greedily, and sampled as chat does
    --tasks FOLDER     right answers to what `python -m tools.make_reasoning` holds out: with thinking (greedily, and sampled), and with
                       the thinking closed; and the share of right equations in the thinking, by the calculator
    --reward-model M   how often M scores the answer after the stage higher than the one before it, on the same prompts (a tie is half)
    --text FILE ...    bits per byte: what the stage cost in ordinary language

Intervals are the middle 95% of 2,000 draws of seeds and prompts (a bootstrap on two levels), of differences between pairs of answers
to one prompt. Writes report.md and report.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inference import SamplingSettings
from model.files import atomic_write_text
from model.reward import RewardModel, check_same_vocabulary
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.evaluate import PROBE_TOKENS, file_bits_per_byte, load, probe_replies
from tools.reasoning_report import read_tasks
from tools.reasoning_tasks import measure
from train.config import UsageError
from train.data_files import expand_paths
from train.program import run_main
from train.rewards import exact, steps
from train.runtime import describe_machine, device_name
from train.statistics import bootstrap

SAMPLED = SamplingSettings(max_new_tokens=PROBE_TOKENS, temperature=0.7, top_k=40, top_p=0.9, seed=0)
"""As chat samples."""
TASK_SPLITS = ("valid", "held_templates")
LIMIT_KB = 100

Row = dict[str, Any]
WORKING = "right equations"
"""A rule that hardly any stage learns from: it looks at the way, not at the result."""


@dataclass
class Measured:
    """One model."""

    shares: dict[str, list[float]] = field(default_factory=dict)
    """Name of a measure -> a value for each prompt."""
    answers: list[list[int]] = field(default_factory=list)
    """Tokens of the questions with the greedy answers, for a reward model."""
    bits: dict[str, float] = field(default_factory=dict)
    """Name of a file -> bits per byte."""


@dataclass
class Change:
    """A measure before and after; shares of prompts, or bits per byte."""

    name: str
    before: float | None
    after: float
    difference: float
    low: float
    high: float
    seeds: list[float]
    """The difference of each seed."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves "no difference" out."""
        return self.low > 0 or self.high < 0


def measure_model(folder: str, options: argparse.Namespace, tasks: dict[str, list[Row]]) -> Measured:
    """Everything that was asked for, of one model."""
    model, tokenizer = load(folder, options.device)
    found = Measured()
    if options.probes:
        _measure_probes(found, model, tokenizer, options)
    for split, rows in tasks.items():
        _measure_tasks(found, model, tokenizer, split, rows)
    for file in expand_paths(options.text):
        measured = file_bits_per_byte(model, tokenizer, file.path, context=256, limit_bytes=LIMIT_KB * 1000)
        assert measured.bpb is not None
        found.bits[file.path.stem] = measured.bpb
    return found


def _measure_tasks(found: Measured, model: SmartHaoAI, tokenizer: BPETokenizer, split: str, rows: list[Row]) -> None:
    for name, thinking, temperature in (("thinking", True, 0.0), ("thinking, sampled", True, 1.0), ("thinking closed", False, 0.0)):
        replies = measure.generate_answers(model, tokenizer, rows, thinking=thinking, temperature=temperature)
        answers = measure.as_answers(replies, rows)
        found.shares[f"exact, {split}, {name}"] = [exact(answer) for answer in answers]
        if name == "thinking":
            found.shares[f"{WORKING}, {split}"] = [steps(answer) for answer in answers]
            prompts = measure.task_prompts(tokenizer, rows, thinking)
            found.answers += [[*ids, *reply.ids] for ids, reply in zip(prompts, replies, strict=True)]


def _measure_probes(found: Measured, model: SmartHaoAI, tokenizer: BPETokenizer, options: argparse.Namespace) -> None:
    for name, settings in (("probes, greedy", None), ("probes, sampled", SAMPLED)):
        answered = probe_replies(model, tokenizer, options.probes, settings=settings)
        found.shares[name] = [float(probe.check(reply.text, reply.reasoning)) for probe, reply in answered]
        if settings is None:
            asked = [tokenizer.render(probe.messages, add_generation_prompt=True).ids for probe, _ in answered]
            found.answers += [[*ids, *reply.ids] for ids, (_, reply) in zip(asked, answered, strict=True)]


def score_answers(models: Sequence[Measured], folder: str, tokenizer: BPETokenizer, device: str) -> list[np.ndarray]:
    """The reward model's score of each answer of each model."""
    check_same_vocabulary(tokenizer, BPETokenizer.from_pretrained(folder), folder)
    judge = RewardModel.from_pretrained(folder).to(device_name(device))
    return [judge.score_ids(model.answers, tokenizer.pad_token_id).numpy() for model in models]


def changes(before: Sequence[Measured], after: Sequence[Measured], scores: Sequence[np.ndarray] | None = None) -> list[Change]:
    """Every measure, before against after. scores: of the models before, then of those after, for the win rate."""
    pairs = [before[n if len(before) > 1 else 0] for n in range(len(after))]
    found = []
    for name in after[0].shares:
        first = np.array([m.shares[name] for m in pairs])
        second = np.array([m.shares[name] for m in after])
        found.append(_change(name, second - first, float(first.mean()), float(second.mean())))
        if name.startswith(WORKING):
            found.append(_win_rate(f"win rate by {name}", first, second))
    if scores is not None:
        starts = np.array([scores[n if len(before) > 1 else 0] for n in range(len(after))])
        found.append(_win_rate("win rate by the reward model", starts, np.array(scores[len(before) :])))
    for name in after[0].bits:
        differences = [new.bits[name] - old.bits[name] for old, new in zip(pairs, after, strict=True)]
        low, high = min(differences), max(differences)
        means = [sum(m.bits[name] for m in side) / len(side) for side in (pairs, after)]
        found.append(Change(f"bits per byte, {name}", means[0], means[1], means[1] - means[0], low, high, differences))
    return found


def _change(name: str, differences: np.ndarray, before: float | None, after: float) -> Change:
    """differences: (seeds, prompts)."""
    low, high = bootstrap(differences)
    return Change(name, before, after, float(differences.mean()), low, high, [float(row.mean()) for row in differences])


def _win_rate(name: str, before: np.ndarray, after: np.ndarray) -> Change:
    """How often the later answer is the better one; a tie is half. before, after: (seeds, prompts)."""
    wins = (np.sign(after - before) + 1) / 2
    return _change(name, wins - 0.5, None, float(wins.mean()))


def table(found: Sequence[Change]) -> str:
    """A row for each measure. Shares in percent; the interval of bits per byte is the range over the seeds."""
    lines = ["| | before | after | difference | 95% interval | each seed |", "|---|---:|---:|---:|---|---|"]
    for change in found:
        bits = change.name.startswith("bits")
        show: Callable[[float], str] = (lambda x: f"{x:.3f}") if bits else (lambda x: f"{100 * x:.1f}")
        signed: Callable[[float], str] = (lambda x: f"{x:+.3f}") if bits else (lambda x: f"{100 * x:+.1f}")
        before = "50.0" if change.before is None else show(change.before)  # of two equal models each wins half
        interval = f"{signed(change.low)} to {signed(change.high)}" + ("" if bits or change.clear else " (unclear)")
        seeds = ", ".join(signed(value) for value in change.seeds)
        lines.append(f"| {change.name} | {before} | {show(change.after)} | {signed(change.difference)} | {interval} | {seeds} |")
    return "\n".join(lines)


def run(options: argparse.Namespace, log: Callable[[str], object] = print) -> list[Change]:
    """Measure all models, and write the report."""
    tasks = {}
    if options.tasks:
        tasks = {split: rows for split, rows in read_tasks(Path(options.tasks), options.limit).items() if split in TASK_SPLITS}
    models = []
    for folder in [*options.before, *options.after]:
        models.append(measure_model(folder, options, tasks))
        shares = "  ".join(f"{name} {100 * sum(values) / len(values):.1f}" for name, values in models[-1].shares.items())
        log(f"{folder}: {shares}")
    scores = None
    if options.reward_model:
        tokenizer = BPETokenizer.from_pretrained(options.before[0])
        scores = score_answers(models, options.reward_model, tokenizer, options.device)
    found = changes(models[: len(options.before)], models[len(options.before) :], scores)
    counts = [f"{len(options.after)} seeds" if len(options.after) > 1 else "one seed"]
    counts += [f"{len(values)} prompts ({name})" for name, values in list(models[0].shares.items())[:1]]
    text = f"{table(found)}\n\n{', '.join(counts)}; {describe_machine(device_name(options.device))}\n"
    log(text)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    names = "\n".join(f"- {side}: {', '.join(getattr(options, side))}" for side in ("before", "after"))
    atomic_write_text(out / "report.md", f"# Alignment, before and after\n\n{names}\n\n{text}")
    facts = {"before": options.before, "after": options.after, "changes": [vars(change) for change in found]}
    atomic_write_text(out / "report.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    log(f"{out}: report.md, report.json")
    return found


def main(argv: list[str] | None = None) -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.alignment_report", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", nargs="+", required=True, metavar="DIR", help="the model that the stage began with")
    parser.add_argument("--after", nargs="+", required=True, metavar="DIR", help="what the stage made of it, one DIR for each seed")
    parser.add_argument("--probes", type=int, default=0, metavar="N", help="held-out prompts of each kind and language (default: none)")
    parser.add_argument("--reward-model", metavar="DIR", help="for the win rate; needs --probes or --tasks")
    parser.add_argument("--tasks", metavar="FOLDER", help="what tools.make_reasoning wrote")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N tasks of each file")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help=f"texts; the first {LIMIT_KB} kB of each file")
    parser.add_argument("--out", default="weight/alignment_report", metavar="FOLDER", help="where the report goes (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    options = parser.parse_args(argv)
    if len(options.before) not in (1, len(options.after)):
        raise UsageError(f"--before names {len(options.before)} models, --after {len(options.after)}: give one before, or as many as after")
    if not (options.probes or options.tasks or options.text):
        raise UsageError("nothing is measured: give --probes N, --tasks FOLDER or --text FILE")
    if options.reward_model and not (options.probes or options.tasks):
        raise UsageError("--reward-model judges answers: give --probes N or --tasks FOLDER, too")
    run(options)


if __name__ == "__main__":
    run_main(main)
