"""Compare models on reasoning tasks: right answers over latent steps, confidence, cost, and the path to one answer.

    python -m tools.reasoning_report DIR [DIR ...] --tasks TASKS_DIR [--steps 1 2 4 8] [--halt 0.9] [--out FOLDER]

TASKS_DIR is what `python -m tools.make_reasoning` wrote; each DIR a model that was trained on its train.jsonl, whose most frequent
answers are what guessing is measured by. Models with a reasoning head are measured at each number of latent steps, and with halting;
the others once. A DIR called seed_N is one of several runs of the folder it lies in, which get a table over seeds. Writes report.md,
report.json, accuracy.png, and where a model has a reasoning head calibration.png and path.png.

An answer is right when greedy decoding, with thinking closed, gives it exactly and ends there. --generate also decodes freely: then a
model that has learned to may think first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inference import Engine
from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.evaluate import load
from tools.reasoning_tasks import measure, plots
from tools.reasoning_tasks.dataset import SPLITS
from tools.reasoning_tasks.tables import Entry, markdown, over_seeds, percent
from train.config import UsageError
from train.metrics import read_jsonl
from train.program import run_main
from train.runtime import describe_machine, device_name

TEST_SPLITS = [split for split in SPLITS if split != "train"]
PATH_CANDIDATES = 200

Row = dict[str, Any]


def read_tasks(folder: Path, limit: int | None = None) -> dict[str, list[Row]]:
    """The rows of each test file, the first `limit` of them. Raises as `read_split`."""
    return {split: read_split(folder, split)[:limit] for split in TEST_SPLITS}


def read_split(folder: Path, split: str) -> list[Row]:
    """The rows of one file. Raises FileNotFoundError for a folder without it, ValueError for rows that are no tasks."""
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; write the tasks first: `python -m tools.make_reasoning {folder}`")
    rows = read_jsonl(file)
    wrong = next((n for n, row in enumerate(rows, 1) if {"messages", "answer", "kind", "steps", "lang"} - set(row)), None)
    if wrong or not rows:
        raise ValueError(f"{file}:{wrong or 1} is no reasoning task; write the file again with `python -m tools.make_reasoning {folder}`")
    return rows


def model_names(folders: Sequence[str]) -> list[tuple[str, str]]:
    """(name, group) of each folder: its last part, with the one before for seeds and where two would have one name."""
    found = []
    for folder in folders:
        path = Path(folder)
        if re.fullmatch(r"seed_\d+", path.name):
            found.append((f"{path.parent.name}/{path.name}", path.parent.name))
        else:
            found.append((path.name, path.name))
    names = [name for name, _ in found]
    doubles = next((name for name in names if names.count(name) > 1), None)
    if doubles:
        raise UsageError(f"two of the models are called {doubles}: put each into a folder of its own name")
    return found


def settings_of(model: SmartHaoAI, steps: Sequence[int], halt: float) -> list[tuple[int | None, float]]:
    """(latent steps, halting) at which a model is measured; with halting at most as many steps as in training."""
    if model.reasoning is None:
        return [(None, 0.0)]
    trained = model.config.reasoning_steps
    wanted: list[tuple[int | None, float]] = [(count, 0.0) for count in sorted({*steps, trained})]
    return wanted + ([(trained, halt)] if halt and trained > 1 else [])


def measure_models(
    folders: Sequence[str],
    tasks: dict[str, list[Row]],
    steps: Sequence[int],
    halt: float,
    device: str = "auto",
    generate: bool = False,
    log: Callable[[str], object] = print,
) -> tuple[list[Entry], dict[str, tuple[SmartHaoAI, BPETokenizer]]]:
    """Every model at each of its settings, and the models by name."""
    entries: list[Entry] = []
    models: dict[str, tuple[SmartHaoAI, BPETokenizer]] = {}
    timings: list[measure.Timing] = []
    first = next(iter(tasks.values()))[0]
    for folder, (name, group) in zip(folders, model_names(folders), strict=True):
        model, tokenizer = models[name] = load(folder, device)
        model.eval()
        log(f"{name}: {model.num_parameters():,} parameters")
        lengths = [sum(map(len, measure.encode(tokenizer, row, model.config.max_position_embeddings))) for row in tasks["valid"]]
        logged = read_jsonl(Path(folder) / "metrics.jsonl")
        tokens = next((int(row["tokens"]) for row in reversed(logged) if "tokens" in row), None)
        for count, threshold in settings_of(model, steps, halt):
            trained = model.config.reasoning_steps if count is not None else None
            entry = Entry(name, group, count, threshold, trained, model.num_parameters(), tokens)
            measure.set_steps(model, count, threshold)
            used: list[tuple[int, float, float]] = []
            for split, rows in tqdm(tasks.items(), desc=f"{name} {entry.setting}", leave=False, disable=None):
                answers = measure.answer_rows(model, tokenizer, rows)
                entry.correct[split] = answers.correct
                entry.calibration[split] = {"softmax": measure.calibration(answers.softmax, answers.hits)}
                if answers.confidence is not None:
                    entry.calibration[split]["confidence"] = measure.calibration(answers.confidence, answers.hits)
                if answers.answer_steps is not None and answers.all_steps is not None:
                    used.append((len(rows), answers.answer_steps, answers.all_steps))
                if generate:
                    replies = measure.generate_answers(model, tokenizer, rows)
                    entry.generated[split] = [reply.text.strip() == row["answer"] for reply, row in zip(replies, rows, strict=True)]
            if used:
                weight = sum(n for n, _, _ in used)
                entry.answer_steps, entry.all_steps = (sum(row[0] * row[place] for row in used) / weight for place in (1, 2))
            taken = entry.all_steps if entry.all_steps is not None else count
            context = round(sum(lengths) / len(lengths))
            entry.flops = measure.flops_per_token(model, taken, context)
            entry.training_flops = measure.flops_per_token(model, trained, context, training=True)
            prompt = measure.encode(tokenizer, first, model.config.max_position_embeddings)[0]
            timings.append(measure.Timing(Engine(model, tokenizer), prompt, count, threshold))
            entries.append(entry)
            log(
                f"  {'steps ' + entry.setting if count else 'plain':<20}" + "  ".join(f"{s} {percent(c)}" for s, c in entry.correct.items())
            )
    log("timing")
    for entry, values in zip(entries, measure.decoding_times(timings), strict=True):
        entry.milliseconds = measure.middle(values)
    return entries, models


# ------------------------------------------------------------------------------------------------- plots


def _curves(entries: list[Entry], split: str) -> dict[str, plots.Curve]:
    """Accuracy over steps by group; halting is left to the table."""
    groups: dict[str, dict[int, list[Entry]]] = {}
    for entry in entries:
        if not entry.halt:
            groups.setdefault(entry.group, {}).setdefault(entry.steps or 0, []).append(entry)
    return {group: {step: over_seeds(found, split) for step, found in of_group.items()} for group, of_group in groups.items()}


def _panels(entries: list[Entry]) -> list[plots.Panel]:
    """One panel for each model as it was trained, the first seed of each, those with a reasoning head first."""
    kept = {entry.group: entry for entry in reversed(entries) if entry.as_trained}
    panels = []
    for entry in sorted(reversed(list(kept.values())), key=lambda e: e.steps is None):
        splits = [(split, entry.calibration[split]) for split in ("valid", "longer")]
        lines = [(name, split, found[name]) for split, found in splits for name in plots.ESTIMATES if name in found]
        panels.append((entry.model + (f", steps: {entry.steps}" if entry.steps else ""), lines))
    return panels


def find_path(model: SmartHaoAI, tokenizer: BPETokenizer, rows: Sequence[Row]) -> measure.Path:
    """The path, at the steps of training, of the English task with a right answer on which the steps change the prediction most."""
    measure.set_steps(model, model.config.reasoning_steps, 0.0)
    english = [row for row in rows if row["lang"] == "en"][:PATH_CANDIDATES] or list(rows[:PATH_CANDIDATES])
    paths = [measure.reasoning_path(model, tokenizer, row) for row in english]
    return max(paths, key=lambda path: (path.predicted[-1] == path.tokens, path.changes, path.confidence[-1][0]))


def write_report(
    out: Path,
    entries: list[Entry],
    models: dict[str, tuple[SmartHaoAI, BPETokenizer]],
    tasks: dict[str, list[Row]],
    frequent: Mapping[tuple[str, str], str],
    machine: str,
) -> str:
    """Write the files of the report into `out`; returns the Markdown. frequent: as in `measure.guessing`."""
    out.mkdir(parents=True, exist_ok=True)
    guesses = {split: measure.share(measure.guessing(rows, frequent))["rate"] for split, rows in tasks.items()}
    plots.draw_accuracy({split: _curves(entries, split) for split in tasks}, guesses, out / "accuracy.png")
    drawn = ["accuracy.png"]
    paths: list[tuple[str, measure.Path]] = []
    heads = {entry.group: entry for entry in reversed(entries) if entry.steps}  # the first seed of each
    if heads:
        plots.draw_calibration(_panels(entries), out / "calibration.png")
        paths = [(entry.model, find_path(*models[entry.model], tasks["valid"])) for entry in reversed(list(heads.values()))]
        name, path = max(paths, key=lambda pair: len(pair[1].predicted))
        plots.draw_path(path, f"{name}: what it would answer after each latent step", out / "path.png")
        drawn += ["calibration.png", "path.png"]
    text = markdown(entries, tasks, frequent, paths, machine, drawn)
    atomic_write_text(out / "report.md", text)
    cells = []
    for entry in entries:
        values = asdict(entry)
        for key in ("correct", "generated"):
            values[key] = {split: _cells(correct, tasks[split]) for split, correct in getattr(entry, key).items()}
        cells.append(values)
    facts = {"machine": machine, "guessing": guesses, "models": cells, "paths": {name: asdict(path) for name, path in paths}}
    atomic_write_text(out / "report.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    return text


def _cells(correct: Sequence[bool], rows: Sequence[Row]) -> dict[str, Any]:
    """Overall share, and by kind, steps, language and template."""
    found: dict[str, Any] = {"all": measure.share(correct)}
    for name in ("kind", "steps", "lang", "template"):
        groups: dict[str, list[bool]] = {}
        for value, row in zip(correct, rows, strict=True):
            groups.setdefault(str(row[name]), []).append(value)
        found[name] = {value: measure.share(of_value) for value, of_value in groups.items()}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reasoning_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="DIR", help="model directories")
    parser.add_argument("--tasks", required=True, metavar="TASKS_DIR", help="folder of valid.jsonl, held_templates.jsonl, longer.jsonl")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8], help="latent steps to try besides those of training")
    parser.add_argument("--halt", type=float, default=0.9, help="confidence above which a token takes no more steps; 0: not measured")
    parser.add_argument("--out", default="weight/reasoning_report", metavar="FOLDER", help="where the report goes (default %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first rows of each file")
    parser.add_argument("--generate", action="store_true", help="also let the models answer freely, with thinking where they do")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    if any(count < 1 for count in args.steps):
        raise UsageError(f"--steps {' '.join(map(str, args.steps))}: every number must be at least 1")
    if not 0 <= args.halt < 1:
        raise UsageError(f"--halt {args.halt:g} must lie in [0, 1)")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit} must be at least 1")
    tasks = read_tasks(Path(args.tasks), args.limit)
    frequent = measure.most_frequent(read_split(Path(args.tasks), "train"))
    entries, models = measure_models(args.models, tasks, args.steps, args.halt, args.device, args.generate)
    print(write_report(Path(args.out), entries, models, tasks, frequent, describe_machine(device_name(args.device))))
    print(f"{args.out}: report.md, report.json, plots")


if __name__ == "__main__":
    run_main(main)
