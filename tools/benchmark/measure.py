"""Rows of a benchmark take turns: every round runs each of them once, forwards in one round and backwards in the next.

Each row is a function that runs in a process of its own, so that its peak memory is its own and nothing of one program (threads,
allocators, compiled code) helps or hinders another. It reports through `turn`, which waits until the row is on again.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.runtime import peak_memory_mb, set_threads

Report = dict[str, Any]
Turn = Callable[[Report], None]
"""turn({...facts}): says what was done and waits for the next turn; raises Finished when there is none. The first report holds what
is known before the first round: `check` and the row's constants. Each further one holds `units` (tokens) and `seconds`."""


class Finished(BaseException):
    """The row is not wanted any more. Not an Exception: no row's own error handling may take it for a failure."""


class Missing(Exception):
    """A peer that is not installed: the row is left out, and that is said."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `work(turn)` is picklable: a function of a module, or a functools.partial of one."""

    name: str
    work: Callable[[Turn], None]
    group: str = ""
    """Rows of one group stand beside each other and are compared with each other (the batch size of a decode row)."""


@dataclass
class Check:
    """A figure of a row beside the same of the reference; `error` relative."""

    what: str
    value: float
    reference: float
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for nan, too

    def text(self) -> str:
        return f"{self.what} {self.value:.4f} against {self.reference:.4f}, off by {self.error:.1e} (at most {self.tolerance:.0e})"


def relative(what: str, value: float, reference: float, tolerance: float) -> Check:
    return Check(what, value, reference, abs(value - reference) / max(abs(reference), 1e-12), tolerance)


@dataclass
class Measured:
    """What was found of a row. `rates` are units per second, one per counted round."""

    name: str
    group: str = ""
    facts: Report = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    peak_memory_mb: float | None = None
    checks: list[Check] = field(default_factory=list)
    extra: dict[str, list[float]] = field(default_factory=dict)
    """Other figures of each round, for example first_ms."""
    disturbed: list[float] = field(default_factory=list)
    """Share of the processors' time that other programs took during each counted turn; empty where the system does not tell."""

    @property
    def rate(self) -> dict[str, float]:
        return summary(self.rates)


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(mine: Measured, other: Measured) -> dict[str, float]:
    """Of two rows that ran in the same rounds: the median of the rounds' quotients."""
    return summary([a / b for a, b in zip(mine.rates, other.rates, strict=True)])


class Lane:
    """A row at work: in a process, or (for tests, whose rows are tiny) in a thread."""

    def __init__(self, row: Row, threads: int, device: str, isolated: bool) -> None:
        self.row = row
        self._end, theirs = multiprocessing.Pipe()
        arguments = (row, theirs, threads, device, isolated)
        self._worker: Any
        if isolated:
            # Spawned: a forked copy of a process whose OpenMP threads have run hangs. Not daemonic: torch.compile starts children.
            self._worker = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments, name=row.name)
        else:
            self._worker = threading.Thread(target=_serve, args=arguments, name=row.name)
        self._worker.start()
        if isolated:
            theirs.close()

    def begin(self) -> None:
        """Let the row do what it does before its first report: measuring already, so that only one may at a time."""
        self.go()

    def report(self) -> Report:
        """The row's next report. Raises Missing, or ValueError for a row that failed."""
        try:
            kind, what = self._end.recv()
        except EOFError as error:
            self._worker.join()
            code = getattr(self._worker, "exitcode", None)
            raise ValueError(f"the row {self.row.name!r} ended without a word (exit code {code}; -9: out of memory)") from error
        if kind == "missing":
            raise Missing(what)
        if kind == "error":
            raise ValueError(f"the row {self.row.name!r} failed:\n{what}")
        report: Report = what
        return report

    def go(self) -> None:
        self._end.send(True)

    def stop(self) -> None:
        """Tell the row that it is not wanted any more."""
        with contextlib.suppress(OSError):  # it has ended already
            self._end.send(False)

    def close(self) -> None:
        """Wait for its end."""
        self._worker.join(30)
        if self._worker.is_alive() and hasattr(self._worker, "kill"):
            self._worker.kill()
            self._worker.join()
        self._end.close()


def _serve(row: Row, end: Any, threads: int, device: str, isolated: bool) -> None:
    begun = time.process_time()

    def turn(report: Report) -> None:
        nonlocal begun
        end.send(("report", {**report, "peak_memory_mb": peak_memory_mb(device), "own_seconds": time.process_time() - begun}))
        try:
            wanted = end.recv()
        except EOFError as error:  # the program that asked is gone
            raise Finished from error
        if not wanted:
            raise Finished
        if "units" not in report:
            forget_peak(device)  # loading and trying out are over
        begun = time.process_time()

    try:
        set_threads(threads)
        if not end.recv():
            return
        # Progress bars of several rows would overwrite each other; errors go through the pipe.
        with contextlib.redirect_stderr(io.StringIO()) if isolated else contextlib.nullcontext():
            row.work(turn)
    except Finished:
        pass
    except Missing as missing:
        end.send(("missing", str(missing)))
    except BaseException:  # whatever it is, the parent has to hear it
        end.send(("error", traceback.format_exc(limit=-4)))
    finally:
        end.close()


def forget_peak(device: str) -> None:
    """Let `peak_memory_mb` count from here on, where the system can; elsewhere it holds the start, too."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def processor_seconds() -> tuple[float, float] | None:
    """(in use, passed) of all processors together since the start of the system, what a host took from them included; None where the
    system does not tell."""
    try:
        numbers = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    ticks = [int(number) for number in numbers]  # user nice system idle iowait irq softirq steal
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / tick, sum(ticks) / tick


def take_turns(
    rows: Sequence[Row],
    rounds: int,
    *,
    threads: int = 0,
    device: str = "cpu",
    isolated: bool = True,
    between: Callable[[], None] = lambda: None,
    log: Callable[[str], object] = print,
) -> list[Measured]:
    """Run every row once per round, one uncounted round first; `between` runs once per counted round (the ceilings).

    Rows that need what is not installed are left out with a line. Raises ValueError when a row fails.
    """
    started = [Lane(row, threads, device, isolated) for row in rows]
    lanes: list[tuple[Lane, Measured]] = []
    try:
        for lane in started:
            lane.begin()
            try:
                facts = lane.report()
            except Missing as missing:
                log(f"left out: {lane.row.name} ({missing})")
            else:
                lanes.append((lane, Measured(lane.row.name, lane.row.group, facts)))
        for number in range(rounds + 1):
            log(f"round {number} of {rounds}" + ("" if number else ", not counted"))
            for lane, found in lanes if number % 2 else reversed(lanes):
                before = processor_seconds()
                lane.go()
                report = lane.report()
                after, own = processor_seconds(), report.pop("own_seconds")
                if number and before and after:
                    found.disturbed.append(max(0.0, after[0] - before[0] - own) / max(after[1] - before[1], 1e-9))
                found.peak_memory_mb = report.pop("peak_memory_mb")
                units, seconds = report.pop("units"), report.pop("seconds")
                if number:
                    found.rates.append(units / seconds)
                    for name, value in report.items():
                        found.extra.setdefault(name, []).append(value)
            if number:
                between()
    finally:
        for lane in started:  # all at once: a process takes a while to end
            lane.stop()
        for lane in started:
            lane.close()
    return [found for _, found in lanes]


def run_once(row: Row, threads: int = 0, device: str = "cpu", isolated: bool = True) -> Report:
    """The first report of a row that is only asked once: the reference, whose memory must not count elsewhere."""
    lane = Lane(row, threads, device, isolated)
    try:
        lane.begin()
        return lane.report()
    finally:
        lane.stop()
        lane.close()


def ratios(found: Sequence[Measured], pairs: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """{"ours / plain": 2.5} for each name and those it is compared with, within each group; rows that are not there are passed over."""
    out: dict[str, float] = {}
    for group in dict.fromkeys(row.group for row in found):
        there = {row.name: row for row in found if row.group == group}
        for name, others in pairs.items():
            for other in others:
                if name in there and other in there and name != other:
                    label = f"{name} / {other}" + (f", {group}" if group else "")
                    out[label] = round(ratio(there[name], there[other])["median"], 4)
    return out
