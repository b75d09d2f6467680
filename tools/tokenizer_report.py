"""Looks at a tokenizer: does every text survive it, what does a language cost, does it fit its model; repairs what can be repaired.

    python -m tools.tokenizer_report DIR [--fix] [--data FILE ...] [--json]

DIR is a tokenizer's or a model's folder. One line a check: ok, WARN (works, but look at it) or FAIL, with the remedy. `--fix`
repairs, keeps a copy of each changed file as NAME.bak, and reports again. Exit status: 0 no FAIL; 1 a FAIL; 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.tokenizer_checks import all_checks, listed
from tools.tokenizer_folder import FAIL, OK, WARN, Check, TokenizerFolder
from tools.tokenizer_repair import repair
from tools.tokenizer_texts import Failure, Usage, measure, round_trip, unused
from train.program import run_main

SEED = 0
SHOWN_FAILURES = 5
ENOUGH_TEXT = 20  # tokens per id from which an unused id says something
HALF = 0.5

_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def report(folder: TokenizerFolder, data: Sequence[Path | str] = (), seed: int = SEED) -> tuple[list[Check], list[Failure], Usage]:
    """All checks, the texts that came back changed, and the use of ids on `data` (else on sample texts)."""
    tried, failures = round_trip(folder, seed)
    usage = measure(folder, data)
    checks = all_checks(folder, tried, failures)
    if data and folder.backend is not None:
        checks += data_checks(folder, usage)
    return checks, failures, usage


def data_checks(folder: TokenizerFolder, usage: Usage) -> list[Check]:
    """Which learned ids the data never produces, and ready token ids beyond the vocabulary."""
    found = []
    never, learned = unused(folder, usage), len(folder.vocab)
    tokens = int(usage.counts.sum())
    names = {i: repr(token) for token, i in folder.vocab.items()}
    detail = f"{len(never):,} of {learned:,} learned tokens never occur in {tokens:,} tokens of this data"
    if never:
        detail += f": {listed(names[i] for i in never)}"
    wasted = len(never) > HALF * learned and tokens > ENOUGH_TEXT * learned
    remedy = "its training text was different, or a smaller vocabulary is enough for this data" if wasted else ""
    found.append(Check("unused ids", WARN if wasted else OK, detail, remedy))
    if usage.largest_id >= folder.size:
        detail = f"the data holds token id {usage.largest_id:,}, the tokenizer ends at {folder.size - 1:,}"
        found.append(Check("data ids", FAIL, detail, "those ids were made with another tokenizer: make them again"))
    if usage.cut:
        found.append(Check("data", OK, "large: only the beginning of its files was measured"))
    if usage.bad_rows:
        found.append(Check("data", WARN, f"{usage.bad_rows:,} unusable rows", "`python -m tools.check_data` names them"))
    return found


def as_json(folder: TokenizerFolder, checks: list[Check], failures: list[Failure], usage: Usage, done: list[str]) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "folder": str(folder.path),
        "vocab_size": folder.size,
        "own": folder.own,
        "fails": sum(check.status == FAIL for check in checks),
        "warnings": sum(check.status == WARN for check in checks),
        "checks": [asdict(check) for check in checks],
        "round_trip_failures": [asdict(failure) for failure in failures],
        "languages": usage.table(),
        "fixed": done,
    }


def print_report(folder: TokenizerFolder, checks: list[Check], failures: list[Failure], usage: Usage, on_data: bool) -> None:
    """The report for a reader."""
    print(f"\n{folder.path}")
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"  {check.status:<4}  {check.name:<{width}}  {_shown(check.detail)}")
        if check.remedy and check.status != OK:
            print(f"        {'':<{width}}  -> {check.remedy}")
    if len(failures) > 1:
        print("\n  texts that came back changed:")
        for failure in failures[:SHOWN_FAILURES]:
            print(f"    {failure.line()}")
        if len(failures) > SHOWN_FAILURES:
            print(f"    ... {len(failures) - SHOWN_FAILURES:,} more (--json shows all)")
    if usage.languages:
        print(f"\n  what a token holds, on {'the data' if on_data else 'short sample texts'}:")
        print(f"    {'language':<10}{'tokens':>12}{'characters/token':>19}{'bytes/token':>14}")
        for row in usage.table():
            print(f"    {row['language']:<10}{row['tokens']:>12,}{row['characters_per_token']:>19.2f}{row['bytes_per_token']:>14.2f}")


def print_summary(checks: list[Check], fixing: bool) -> None:
    """The last line: what to do now."""
    fails = [check for check in checks if check.status == FAIL]
    warnings = sum(check.status == WARN for check in checks)
    counted = f"{len(checks) - len(fails) - warnings} ok, {warnings} WARN, {len(fails)} FAIL"
    if any(check.fixable for check in checks) and not fixing:
        print(f"\n{counted}; --fix repairs what it says it can")
    elif fails and fixing:
        print(f"\n{counted}; what is left cannot be repaired here, see the remedies")
    else:
        print(f"\n{counted}")


def _shown(text: str) -> str:
    return _UNPRINTABLE.sub("�", text).replace("\n", " ")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tokenizer_report",
        description=(__doc__ or "").splitlines()[0],
        epilog="Exit: 0 no FAIL, 1 a FAIL, 2 usage.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a tokenizer's or a model's folder")
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired; changed files are kept as NAME.bak")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="measure on these files, of any format that training reads")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the report; returns the exit status. FileNotFoundError or ValueError for a folder or data that are not there."""
    arguments = _arguments(argv)
    done: list[str] = []
    folder = TokenizerFolder.read(arguments.folder)
    checks, failures, usage = report(folder, arguments.data)
    if arguments.fix:
        if not arguments.json:
            print_report(folder, checks, failures, usage, bool(arguments.data))
        done = repair(folder.path)
        for line in done or ["nothing to repair"]:
            print(f"fixed: {line}" if done else line, file=sys.stderr if arguments.json else sys.stdout)
        if done:
            folder = TokenizerFolder.read(folder.path)
            checks, failures, usage = report(folder, arguments.data)
    if arguments.json:
        print(json.dumps(as_json(folder, checks, failures, usage, done), ensure_ascii=False))
    else:
        if done or not arguments.fix:
            print_report(folder, checks, failures, usage, bool(arguments.data))
        print_summary(checks, arguments.fix)
    return 1 if any(check.status == FAIL for check in checks) else 0


if __name__ == "__main__":
    run_main(main)
