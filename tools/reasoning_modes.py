"""What ways of thinking are worth: one model, the same tasks, several modes of `generate_with_reasoning`.

    python -m tools.reasoning_modes DIR --tasks FILE [--limit 100] [--samples 5] [--budget 24] [--kinds sums variables] [--out FOLDER]

    off            the answer at once              votes              the most frequent result of several samples
    on             thinking first                  votes, calculator  both
    calculator     thinking; sums are worked out   budget             thinking that is cut after so many tokens

FILE: rows {"messages", "answer", ...} as `python -m tools.make_reasoning` writes them (valid.jsonl, longer.jsonl ...), which the model was
not trained on. Prints a table and writes modes.md and modes.json: right answers (the reply ends by itself, and its result is the
reference's) with Wilson's 95 % interval, the difference to `on` with the middle 95 % of 2,000 draws of the tasks (bootstrap of pairs),
how many of the votes' samples are right, each for itself, what the mode says of its confidence, tokens and seconds of an answer, one
question at a time, all modes in turn on each; "times on" is the median over the tasks of a mode's seconds by those of `on`. Votes draw
with --temperature; everything else is greedy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inference import Engine, SamplingSettings
from inference.answers import final_answer, same_answer
from inference.reasoning import ReasoningResult, Sample, generate_with_reasoning
from model.files import atomic_write_text
from tools.evaluate import load
from tools.reasoning_tasks.measure import share
from train.config import UsageError
from train.metrics import read_jsonl
from train.program import run_main
from train.runtime import describe_machine, device_name
from train.statistics import bootstrap

BASE = "on"  # what the others are compared with

Row = dict[str, Any]


def modes(samples: int, budget: int, temperature: float, max_new_tokens: int) -> dict[str, dict[str, Any]]:
    """Arguments of `generate_with_reasoning` by the name of the mode."""
    greedy = SamplingSettings(max_new_tokens, temperature=0.0)
    drawn = SamplingSettings(max_new_tokens, temperature=temperature, top_k=0, top_p=1.0)
    return {
        "off": {"thinking": False, "settings": greedy},
        BASE: {"settings": greedy},
        "calculator": {"calculator": True, "settings": greedy},
        f"votes of {samples}": {"samples": samples, "settings": drawn},
        f"votes of {samples}, calculator": {"samples": samples, "calculator": True, "settings": drawn},
        f"budget of {budget}": {"budget": budget, "settings": greedy},
    }


def is_right(result: ReasoningResult | Sample, row: Row) -> bool:
    """Whether the reply came to its end with the right result, in any wording and number form."""
    wanted = final_answer(row["answer"])
    return result.finish_reason == "stop" and result.result is not None and wanted is not None and same_answer(wanted, result.result)


def measure_modes(engine: Engine, rows: Sequence[Row], wanted: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By mode, for every row {"question", "answer", "given", "right", "samples_right" (share), "confidence", "tokens", "seconds", "calls",
    "cut"}."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    generate_with_reasoning(engine, rows[0]["messages"][:1], **wanted[BASE])  # the first call pays for what is made once
    for place, row in enumerate(tqdm(rows, desc="tasks", leave=False, disable=None)):
        for name, options in wanted.items():
            settings = dataclasses.replace(options["settings"], seed=place)  # one seed would draw alike for all tasks
            result = generate_with_reasoning(engine, row["messages"][:1], **{**options, "settings": settings})
            found[name].append(
                {
                    "question": row["messages"][0]["content"],
                    "answer": row["answer"],
                    "thinking": result.thinking,
                    "given": result.answer,
                    "right": is_right(result, row),
                    "samples_right": statistics.fmean(is_right(sample, row) for sample in result.samples),
                    "confidence": result.confidence,
                    "tokens": result.completion_tokens,
                    "seconds": result.seconds,
                    "calls": len(result.calls),
                    "cut": any(sample.cut for sample in result.samples),
                }
            )
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The results as a Markdown table."""
    heads = [
        "mode",
        "right",
        f"difference to {BASE}",
        "each sample",
        "confidence when right / wrong",
        "tokens",
        "seconds (median)",
        f"times {BASE}",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    base = np.array([row["right"] for row in found[BASE]], dtype=float)
    for name, rows in found.items():
        cell = share([row["right"] for row in rows])
        difference = np.array([row["right"] for row in rows]) - base
        low, high = bootstrap(difference[None])
        against = "–" if name == BASE else f"{difference.mean():+.1%} ({low:+.0%} to {high:+.0%})"
        sure = [_mean([row["confidence"] for row in rows if row["right"] == right]) for right in (True, False)]
        tokens, seconds = _mean([row["tokens"] for row in rows], ".0f"), statistics.median(row["seconds"] for row in rows)
        right = f"{cell['passed']} of {cell['total']}: {cell['rate']:.1%} ({cell['low']:.0%}–{cell['high']:.0%})"
        times = statistics.median(row["seconds"] / other["seconds"] for row, other in zip(rows, found[BASE], strict=True))
        alone = _mean([row["samples_right"] for row in rows], ".1%")
        lines.append(f"| {name} | {right} | {against} | {alone} | {sure[0]} / {sure[1]} | {tokens} | {seconds:.3f} | {times:.2f} |")
    return lines


def _mean(values: Sequence[float], form: str = ".2f") -> str:
    return f"{statistics.fmean(values):{form}}" if values else "–"


def read_rows(file: Path, kinds: Sequence[str] | None, limit: int | None) -> list[Row]:
    """The first `limit` rows of these kinds. Raises FileNotFoundError, or ValueError when there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; write tasks with `python -m tools.make_reasoning {file.parent}`")
    rows = [row for row in read_jsonl(file) if kinds is None or row.get("kind") in kinds][:limit]
    wrong = next((row for row in rows if {"messages", "answer"} - set(row)), None)
    if not rows or wrong is not None:
        raise ValueError(f"{file} has {'no rows of these kinds' if not rows else f'a row that is no task: {str(wrong)[:80]}'}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reasoning_modes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="DIR", help="model directory; a model that was trained to think in words")
    parser.add_argument("--tasks", required=True, metavar="FILE", help="rows to answer, such as weight/tasks/valid.jsonl")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only rows of these kinds, such as sums variables stories")
    parser.add_argument("--samples", type=int, default=5, help="samples of a vote (default %(default)s)")
    parser.add_argument("--budget", type=int, default=24, help="tokens after which thinking is cut (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the samples (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of a reply, its thinking included (default %(default)s)")
    parser.add_argument("--out", default="weight/reasoning_modes", metavar="FOLDER", help="where the report goes (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("samples", 2), ("budget", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least {least}")
    rows = read_rows(Path(args.tasks), args.kinds, args.limit)
    model, tokenizer = load(args.model, args.device)
    model.eval()
    found = measure_modes(Engine(model, tokenizer), rows, modes(args.samples, args.budget, args.temperature, args.max_new_tokens))
    lines = table(found)
    machine = describe_machine(device_name(args.device))
    text = (
        "\n".join([f"# Ways of thinking: {Path(args.model).name}", "", f"{args.tasks}: {len(rows)} tasks. {machine}.", "", *lines]) + "\n"
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "modes.md", text)
    facts = {"model": args.model, "tasks": args.tasks, "machine": machine, "modes": found}
    atomic_write_text(out / "modes.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    print(text + f"\n{out}: modes.md, modes.json")


if __name__ == "__main__":
    run_main(main)
