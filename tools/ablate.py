"""Compare variants of a model: each is trained by train.train_pretrain on the same tokens in the same order, for one or more seeds.

    python -m tools.ablate CONFIG.yaml [key=value ...] [--only NAME ...]     # smart: the optional parts; example: a minute's demonstration
    python -m tools.ablate CONFIG.yaml --report                              # only write the tables and plots again

Results lie in out_dir: <variant>/seed_<n>/ (below a folder per size when there are sizes), report.md, report.json, plots. The command
goes on where it was stopped, however it was stopped: finished runs are kept, an interrupted one continues from its checkpoint. First
the step times of all variants are measured in one interleaved run. The report is written again after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tools.ablation.report import write_report
from tools.ablation.results import FILE as RESULT_FILE
from tools.ablation.results import finish_run, read_result
from tools.ablation.settings import AblationConfig, Run, differences, plan, read_config, run_settings
from tools.ablation.timing import StepTimes, step_times
from train.config import UsageError, help_text, to_yaml
from train.program import run_main
from train.runtime import StopRequest, format_minutes
from train.stage import INTERRUPTED

POLL_SECONDS = 0.5
LOCK_FILE = ".lock"
TRIES = 2  # of a run that was killed, for example for want of memory
EVALUATION_SHARE = 1.15  # a first guess of a run's time over the time of its steps


def ablate(config: AblationConfig, only: list[str] | None = None, log: Callable[[str], object] = print) -> int:
    """Do all runs that are not finished, one after the other. Returns the exit status: 0, or 1 when runs failed."""
    runs = plan(config)
    if only:
        unknown = sorted(set(only) - {run.variant for run in runs})
        if unknown:
            raise UsageError(f"--only {unknown[0]}: there is no such variant; known: {', '.join(config.variants)}")
    with _one_at_a_time(Path(config.out_dir), log) as lock, StopRequest().installed() as stop:
        times = {}
        for size in config.size_names:
            variants = {name: run_settings(config, size, name) for name in config.variants}
            times[size] = step_times(variants, config.baseline, Path(config.out_dir) / size, config.time_rounds, log)
            for run in runs:
                if run.size == size and run.settings.train.precision == "auto":
                    run.settings.train.precision = times[size].precision
            if stop.requested:
                return INTERRUPTED
        _refuse_other_settings(runs)
        return _Progress(config, runs, [run for run in runs if not only or run.variant in only], times, lock, stop, log).run()


def _refuse_other_settings(runs: list[Run]) -> None:
    for run in runs:
        changed = differences(run)
        if changed:
            shown = "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise ValueError(f"{run.folder} holds a run with other settings ({shown}): name another out_dir, or delete that folder")


class _Progress:
    """Goes through the runs, and knows how long the rest will take."""

    def __init__(
        self,
        config: AblationConfig,
        runs: list[Run],
        wanted: list[Run],
        times: dict[str, StepTimes],
        lock: IO[str],
        stop: StopRequest,
        log: Callable[[str], object],
    ) -> None:
        self.config, self.runs, self.wanted, self.times = config, runs, wanted, times
        self.lock, self.stop, self.log = lock, stop, log
        self.failures: dict[str, str] = {}
        self.spent, self.predicted = 0.0, 0.0

    def run(self) -> int:
        open_runs = [run for run in self.wanted if read_result(run) is None]
        self.log(f"{len(self.wanted) - len(open_runs)} of {len(self.wanted)} runs are finished; about {self._left(open_runs)} for the rest")
        for number, run in enumerate(open_runs):
            self.log(
                f"[{len(self.wanted) - len(open_runs) + number + 1}/{len(self.wanted)}] {run.label}: {run.settings.train.max_steps:,} steps"
            )
            start = time.monotonic()
            fresh = not run.folder.exists()
            reason = self._train(run)
            if self.stop.requested:
                self.log("stopped; the same command goes on from here")
                return INTERRUPTED
            if reason is None:
                try:
                    result = finish_run(run, self.config)
                except (ValueError, OSError) as error:
                    reason = str(error)
                else:
                    if fresh:
                        self.spent += time.monotonic() - start
                        self.predicted += self._seconds(run)
                    by_file = ", ".join(f"{name} {value:.4f}" for name, value in result.bpb_by_file.items())
                    self.log(
                        f"  {result.bpb:.4f} bits per byte{f' ({by_file})' if by_file else ''} in "
                        f"{format_minutes(time.monotonic() - start)}; about {self._left(open_runs[number + 1 :])} left"
                    )
            if reason is not None:
                self.failures[run.label] = reason
                self.log(f"  failed: {reason} (see {_log_file(run)})")
            write_report(self.config, self.runs, self.failures)
        self.log(f"{self.config.out_dir}: report.md, report.json, plots")
        return 1 if self.failures else 0

    def _seconds(self, run: Run) -> float:
        return run.settings.train.max_steps * self.times[run.size].step_seconds(run.variant)

    def _left(self, runs: list[Run]) -> str:
        factor = self.spent / self.predicted if self.predicted else EVALUATION_SHARE
        return format_minutes(factor * sum(self._seconds(run) for run in runs))

    def _train(self, run: Run) -> str | None:
        """Train in a process of its own, so that its peak memory is its own and its end is not ours. Returns why it failed, or None."""
        settings_file = run.folder.with_name(f"{run.folder.name}.yaml")
        settings_file.parent.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(to_yaml(run.settings), encoding="utf-8")
        command = [sys.executable, "-m", "train.train_pretrain", "--config", str(settings_file), "--resume"]
        reason = None
        for _ in range(TRIES):
            status = self._wait_for(command, _log_file(run))
            if status == 0 or self.stop.requested:
                return None
            reason = _last_line(_log_file(run)) or f"exit status {status}"
            if 0 < status < 128:  # its own decision: it would decide so again
                return reason
            reason = f"killed (status {status})"
        return reason

    def _wait_for(self, command: list[str], log_file: Path) -> int:
        # A program that outlives this one keeps the lock: a second ablation waits for it instead of training beside it.
        held: dict[str, Any] = {"pass_fds": (self.lock.fileno(),)} if os.name == "posix" else {}
        with open(log_file, "a", encoding="utf-8") as output:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **held)
            told = False
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                if self.stop.requested and not told and os.name == "posix":  # elsewhere Ctrl-C reaches it, and terminating would not ask
                    child.terminate()
                    told = True
        return child.returncode


def _log_file(run: Run) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ") if lines else ""


@contextlib.contextmanager
def _one_at_a_time(out: Path, log: Callable[[str], object]) -> Iterator[IO[str]]:
    """Hold out's lock; wait while another ablation, or a training it left behind, has it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK_FILE, "a", encoding="utf-8") as file:
        waiting = False
        while not _try_lock(file):
            if not waiting:
                log(f"waiting: another ablation of {out}, or the training of one that was killed, still runs")
            waiting = True
            time.sleep(POLL_SECONDS)
        yield file


def _try_lock(file: IO[str]) -> bool:
    """Take the lock of an open file, which the system gives back when its holders end, however they end."""
    if sys.platform == "win32":
        import msvcrt

        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    description = (__doc__ or "").strip()
    if "-h" in words or "--help" in words:
        print(f"{description}\n\n{help_text(AblationConfig)}")
        raise SystemExit(0)
    parser = argparse.ArgumentParser(prog="python -m tools.ablate", add_help=False)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these variants")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(words)
    config = read_config(args.config, args.words)
    if args.report:
        runs = plan(config)
        if not any((run.folder / RESULT_FILE).is_file() for run in runs):
            raise ValueError(f"no run in {config.out_dir} is finished; run the same command without --report first")
        print(write_report(config, runs))
        return 0
    return ablate(config, args.only)


if __name__ == "__main__":
    run_main(main)
