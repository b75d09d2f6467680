"""What a run of the benchmark found, as a table for people and as JSON."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.files import atomic_write_text
from tools.benchmark.machine import Ceilings
from tools.benchmark.measure import Measured


@dataclass
class Result:
    """All of one run. `shares` gives a row's share of the ceiling, by (group, name)."""

    what: str
    machine: str
    rows: list[Measured]
    ceilings: Ceilings | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    shares: dict[tuple[str, str], float] = field(default_factory=dict)
    share_of: str = ""
    """Which ceiling that is."""
    notes: list[str] = field(default_factory=list)
    unit: str = "tokens/s"
    command: str = ""
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))

    @property
    def ok(self) -> bool:
        return all(check.ok for row in self.rows for check in row.checks)

    def json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "command": self.command,
            "when": self.when,
            "machine": self.machine,
            "ceilings": {} if self.ceilings is None else self.ceilings.json(),
            "share_of": self.share_of,
            "rows": [self._row(row) for row in self.rows],
            "ratios": self.ratios,
            "correct": self.ok,
            "notes": self.notes,
        }

    def _row(self, row: Measured) -> dict[str, Any]:
        return {
            "name": row.name,
            "group": row.group,
            "tokens_per_second": row.rate,
            "rounds": row.rates,
            "peak_memory_mb": row.peak_memory_mb,
            "share_of_ceiling": self.shares.get((row.group, row.name)),
            "checks": [{**asdict(check), "ok": check.ok} for check in row.checks],
            "disturbed": row.disturbed,
            "facts": row.facts,
            **{name: {"rounds": values} for name, values in row.extra.items()},
        }

    def text(self) -> str:
        lines = [f"{self.what}; {self.machine}; {self.when}", f"  {self.command}", ""]
        if self.ceilings is not None and self.ceilings.found:
            lines += [self.ceilings.text(), ""]
        lines += [*self.table(), ""]
        lines += [f"  {name:<60} {value:6.2f}x" for name, value in self.ratios.items()]
        disturbed = [share for row in self.rows for share in row.disturbed]
        if disturbed:
            middle, most = statistics.median(disturbed), max(disturbed)
            lines += ["", f"  other programs took {middle:.0%} of the processors during a turn, at most {most:.0%}"]
        checked = [(row, check) for row in self.rows for check in row.checks]
        if checked:
            lines += ["", "against fp32 eager, same weights, same tokens"]
            lines += [f"  {'ok   ' if check.ok else 'WRONG'} {label(row)}: {check.text()}" for row, check in checked]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def table(self) -> list[str]:
        """The rows, aligned."""
        extras = list(dict.fromkeys(name for row in self.rows for name in row.extra))
        head = ["", self.unit, "(min-max)", "peak MiB", f"share of {self.share_of}" if self.share_of else "", *extras]
        cells = [head]
        for row in self.rows:
            rate, share = row.rate, self.shares.get((row.group, row.name))
            more = [f"{sorted(row.extra[name])[len(row.extra[name]) // 2]:,.1f}" if name in row.extra else "" for name in extras]
            cells.append(
                [
                    label(row),
                    f"{rate['median']:,.0f}",
                    f"({rate['min']:,.0f}-{rate['max']:,.0f})",
                    "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f}",
                    "" if share is None else f"{share:.1%}",
                    *more,
                ]
            )
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        aligned = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in cells]
        return ["  ".join(line).rstrip() for line in aligned]

    def markdown(self) -> str:
        """The rows as a table for docs."""
        lines = [f"| | {self.unit} | smallest to largest | peak MiB | share of {self.share_of or 'the ceiling'} |", "|---|---|---|---|---|"]
        for row in self.rows:
            rate, share = row.rate, self.shares.get((row.group, row.name))
            memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f}"
            lines.append(
                f"| {label(row)} | {rate['median']:,.0f} | {rate['min']:,.0f}-{rate['max']:,.0f} | {memory} | "
                f"{'' if share is None else f'{share:.0%}'} |"
            )
        return "\n".join(lines)


def label(row: Measured) -> str:
    return f"{row.group}: {row.name}" if row.group else row.name


def finish(results: Sequence[Result], argv: Sequence[str], file: str | None) -> int:
    """Print, write FILE (one object; a list for several), and return the exit status: 1 when anything computed was wrong."""
    command = shlex.join(["python", "-m", "tools.bench", *argv])
    for result in results:
        result.command = command
        print(result.text(), end="\n\n")
    if file:
        data = [result.json() for result in results]
        atomic_write_text(Path(file), json.dumps(data[0] if len(data) == 1 else data, ensure_ascii=False, indent=1) + "\n")
    if all(result.ok for result in results):
        return 0
    print("error: a result is wrong; see WRONG above", file=sys.stderr)
    return 1
