"""Every stage is killed, starved of disk space and handed damaged checkpoints; resumed, it ends where the undisturbed run ends.

The whole drill by hand: `python -m pytest -m drill tests/faults/test_kills.py -s` prints the table stage x fault (DRILL_STAGES=sft,dpo:
only these). It needs Linux and a C compiler: faults strike at calls of the system (`faulty_disk.c`).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from drill_stages import STAGES, Ended, Runner, command, differences, write_files

from model import BPETokenizer
from train.checkpoints import CHECKSUMS_FILE, damage, list_checkpoints
from train.metrics import read_jsonl

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="faults are injected at calls of Linux, by a library made with cc"
)
KILLS = {
    "SIGKILL at any moment": 5,
    "SIGKILL, a checkpoint's files": 5,
    "SIGKILL, its renames and deletions": 3,
    "SIGKILL, other writes": 4,
    "SIGTERM": 2,
    "SIGINT": 2,
}
DISK = {"disk full": 4, "disk read-only": 3}
DAMAGE = {"checkpoint cut off": 1, "bit flipped": 2, "file missing or replaced": 1}
AGAIN = "SIGKILL while resuming"
FRESH = 0.06  # share of trials in interpreters of their own, `python -m`, instead of forked ones
PLOTS = 0.2  # share of forked trials that draw: it takes half of so short a run
SECOND_KILL = 0.25


@dataclass
class Stage:
    """An undisturbed run, and where a fault can strike."""

    name: str
    whole: Path
    seconds: float
    points: dict[str, list[int]]
    """By phase: numbers of the calls that change the disk."""


@dataclass
class Drill:
    folder: Path
    files: Path
    runner: Runner
    rng: random.Random
    trials: int = 0
    outcomes: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def count(self, stage: str, fault: str, outcome: str) -> None:
        self.outcomes.setdefault((stage, fault), Counter())[outcome] += 1


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BPETokenizer) -> Iterator[Drill]:
    seed = int(os.environ.get("TEST_SEED") or time.time_ns() % 2**31)
    print(f"TEST_SEED={seed}")
    folder = tmp_path_factory.mktemp("drill")
    write_files(folder / "files", tiny_tokenizer)
    (folder / "runner").mkdir()
    runner = Runner(folder / "runner")
    yield Drill(folder, folder / "files", runner, random.Random(seed))
    runner.close()


def phase(point: str) -> str:
    """Of which kind a call that changes the disk is."""
    call, _, path = point.partition(" ")
    if "/checkpoints/" not in path:
        return "SIGKILL, other writes"
    written = re.search(r"/step_\d+\.\d+\.tmp/", path) and call != "delete"
    return "SIGKILL, a checkpoint's files" if written else "SIGKILL, its renames and deletions"


def undisturbed(drill: Drill, name: str) -> Stage:
    """Run a stage whole, twice: by an interpreter of its own, noting its writes, and by the fork server, for its time."""
    place = drill.folder / name
    ended = drill.runner.run(*command(name, drill.files, place / "whole"), fault=(place, "count", 0), fresh=True)
    assert ended.code == 0 and len(ended.points) > 10, ended.text
    points: dict[str, list[int]] = {}
    for number, point in enumerate(ended.points):
        points.setdefault(phase(point), []).append(number)
    shutil.rmtree(place / "store", ignore_errors=True)
    seconds = drill.runner.timed(*command(name, drill.files, place / "again"))
    assert differences(place / "whole", place / "again") == [], "two undisturbed runs differ"
    return Stage(name, place / "whole", seconds, points)


def trial(drill: Drill, stage: Stage, fault: str) -> None:
    """One fault, the resumed run, and the verdict. A fault that the run did not live to see is tried again."""
    rng, name = drill.rng, stage.name
    for attempt in range(4):
        drill.trials += 1
        place = drill.folder / f"{name}-{drill.trials}"
        out = place / "out"
        fresh, drill.runner.plots = rng.random() < FRESH, rng.random() < PLOTS
        struck, said, seen = strike(drill, stage, fault, place, fresh, 0.6**attempt)
        if seen is None or struck:
            break
        shutil.rmtree(place)
    else:
        drill.count(name, fault, "never reached")
        return
    problems, notes = list(seen or []), []
    if drill.rng.random() < SECOND_KILL and fault in KILLS:
        again = drill.runner.run(*command(name, drill.files, out, True), send=(signal.SIGKILL, rng.uniform(0, stage.seconds)))
        if again.code == -signal.SIGKILL:
            problems += intact(out)
            notes.append(AGAIN)
    resumed = drill.runner.run(*command(name, drill.files, out, True), fresh=fresh)
    if resumed.code != 0 or "Traceback" in resumed.text:
        problems.append(f"--resume ended with {resumed.code}")
    else:
        problems += differences(stage.whole, out)
    if said is not None:
        problems += said(resumed)
    for kind in [fault, *notes]:
        drill.count(name, kind, ("LOST" if problems else "equal") + (", own interpreter" if fresh else ""))
    if problems:
        drill.lost.append(f"{name}, {fault}, {place}: {'; '.join(problems)}\n{resumed.text[-1500:]}")
        print(drill.lost[-1])
    else:
        shutil.rmtree(place)


def strike(
    drill: Drill, stage: Stage, fault: str, place: Path, fresh: bool, part: float
) -> tuple[bool, Callable[[Ended], list[str]] | None, list[str] | None]:
    """Run the stage into a fault, a signal within that part of its usual time. Returns whether it struck, what to ask of the resumed run,
    and what was wrong already."""
    rng, out = drill.rng, place / "out"
    module, words = command(stage.name, drill.files, out)
    if fault in DAMAGE:
        return damaged_checkpoint(drill, stage, fault, place)
    if fault in DISK:
        mode = "read-only" if fault == "disk read-only" else rng.choice(["full", "full", "full-once"])
        number = rng.randrange(sum(map(len, stage.points.values())))
        ended = drill.runner.run(module, words, fault=(place, mode, number), fresh=fresh)
        return len(ended.points) > number, None, clear_end(ended) + intact(out)
    if fault in stage.points:
        mode = rng.choice(["kill-before", "kill-torn", "kill-after"])
        ended = drill.runner.run(module, words, fault=(place, mode, rng.choice(stage.points[fault])), fresh=fresh)
        return ended.code == -signal.SIGKILL and phase(ended.points[-1]) == fault, None, intact(out)
    number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(fault, signal.SIGKILL)
    delay = rng.uniform(0, part * stage.seconds) + (rng.uniform(1.5, 4.0) if fresh else 0)  # it imports first
    ended = drill.runner.run(module, words, send=(number, delay), fresh=fresh)
    codes = {"SIGTERM": (130, -signal.SIGTERM), "SIGINT": (130, -signal.SIGINT)}.get(fault, (-signal.SIGKILL,))
    wrong = ["a traceback"] if "Traceback" in ended.text and not fresh else []  # one that comes while Python starts is Python's own
    return ended.code in codes, None, wrong + intact(out)


def damaged_checkpoint(
    drill: Drill, stage: Stage, fault: str, place: Path
) -> tuple[bool, Callable[[Ended], list[str]] | None, list[str] | None]:
    """A run that dies with two checkpoints, the newer of which is damaged then."""
    rng, out = drill.rng, place / "out"
    late = stage.points["SIGKILL, its renames and deletions"]
    ended = drill.runner.run(*command(stage.name, drill.files, out), fault=(place, "kill-after", rng.choice(late[len(late) // 2 :])))
    saved = list_checkpoints(out)
    if ended.code != -signal.SIGKILL or len(saved) < 2:
        return False, None, []
    file = rng.choice(sorted(path for path in saved[-1].iterdir() if path.is_file()))
    content = bytearray(file.read_bytes())
    if fault == "checkpoint cut off":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif fault == "bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif rng.random() < 0.5 and file.name != CHECKSUMS_FILE:
        file.unlink()
    else:
        file.write_bytes(rng.choice([b"", b"{", b"[]", b"null\n", rng.randbytes(len(content))]))
    wrong = [] if damage(saved[-1]) else [f"the damage of {file.name} is not seen"]

    def said(resumed: Ended) -> list[str]:
        lines = [
            line for line in resumed.text.splitlines() if line.startswith("warning: ") and file.name in line and str(saved[-2]) in line
        ]
        aside = saved[-1].with_name(saved[-1].name + ".damaged").is_dir()
        events = [row["event"] for row in read_jsonl(out / "events.jsonl")]
        found = [] if len(lines) == 1 else [f"{len(lines)} lines say what is wrong with {file.name}"]
        return found + ([] if aside and "damaged_checkpoint" in events else ["not set aside, or no event"])

    return True, said, wrong


def intact(out: Path) -> list[str]:
    """What is wrong with the checkpoints that a run has left."""
    return [problem for path in list_checkpoints(out) if (problem := damage(path))]


def clear_end(ended: Ended) -> list[str]:
    """What is wrong with how a run took a full or read-only disk: one line says which file, what the system said and what to do; what is
    only for show may be missing with a warning."""
    errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    found = ["a traceback"] if re.search("Traceback|panicked|Exception ignored", ended.text) else []
    if ended.code == 0:
        return found + (["ended well with an error"] if errors else [])
    said = len(errors) == 1 and "could not be written: " in errors[0] and re.search("No space left|Read-only file system", errors[0])
    clear = ended.code == 1 and said and "run the same command again" in errors[0]
    return found + ([] if clear else [f"ended with {ended.code}, saying: {ended.text[-600:]}"])


def print_table(drill: Drill, names: list[str], faults: list[str]) -> None:
    """stage x fault: how often it struck, all of which ended equal unless lost ones are named."""

    def cell(counts: Counter[str]) -> str:
        lost, struck = sum(n for o, n in counts.items() if o.startswith("LOST")), sum(n for o, n in counts.items() if "reached" not in o)
        return (f"{struck}" + (f" ({lost} LOST)" if lost else "")) if struck else "-"

    print("\n| stage | " + " | ".join(faults) + " |\n|---|" + "---|" * len(faults))
    for name in names:
        print(f"| {name} | " + " | ".join(cell(drill.outcomes.get((name, fault), Counter())) for fault in faults) + " |")
    sums = {fault: sum((drill.outcomes.get((name, fault), Counter()) for name in names), Counter()) for fault in faults}
    print("| all | " + " | ".join(cell(sums[fault]) for fault in faults) + " |")
    print(json.dumps({fault: dict(counts) for fault, counts in sums.items()}))


def faults_of(stage: str) -> dict[str, int]:
    """The tokenizer's training has no checkpoints."""
    without = ("SIGKILL, a checkpoint's files", "SIGKILL, its renames and deletions", *DAMAGE)
    return {fault: count for fault, count in (KILLS | DISK | DAMAGE).items() if stage != "tokenizer" or fault not in without}


@pytest.mark.slow
def test_a_few_faults_of_each_kind(drill: Drill) -> None:
    """Guards a run that is lost, or goes on from something else than what was saved: the drill in short, other points every time."""
    name = drill.rng.choice([name for name in STAGES if name != "tokenizer"])
    for stage in (undisturbed(drill, "tokenizer"), undisturbed(drill, name)):
        for fault in faults_of(stage.name):
            trial(drill, stage, fault)
    print_table(drill, ["tokenizer", name], [*KILLS, AGAIN, *DISK, *DAMAGE])
    assert not drill.lost, "\n".join(drill.lost)


@pytest.mark.drill
def test_two_hundred_kills(drill: Drill) -> None:
    """The drill: every stage, every fault, several times."""
    names = os.environ.get("DRILL_STAGES", ",".join(STAGES)).split(",")
    for name in names:
        start, stage = time.monotonic(), undisturbed(drill, name)
        for fault, count in faults_of(name).items():
            for _ in range(count):
                trial(drill, stage, fault)
        print(f"{name}: {time.monotonic() - start:.0f} s, a run takes {stage.seconds:.1f} s")
        print({fault: dict(counts) for (of, fault), counts in drill.outcomes.items() if of == name}, flush=True)
    print_table(drill, names, [*KILLS, AGAIN, *DISK, *DAMAGE])
    struck = [(o, n) for (_, fault), counts in drill.outcomes.items() if "SIG" in fault for o, n in counts.items() if "reached" not in o]
    kills = sum(n for _, n in struck)
    print(f"{kills} kills, {drill.trials} runs into a fault, {len(drill.lost)} lost")
    assert not drill.lost, f"{len(drill.lost)} lost"
    assert len(names) < len(STAGES) or kills >= 200
