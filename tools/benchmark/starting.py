"""How long until something happens: programs started anew and timed from outside, and which imports take the time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.benchmark.measure import summary

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")


def commands(model: Path) -> dict[str, list[str]]:
    """Name -> arguments for Python. The first two are what nothing here can be faster than."""
    return {
        "python": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import model": ["-c", "import model"],
        "import SmartHaoAI": ["-c", "from model import SmartHaoAI"],
        "import ChatSession": ["-c", "from inference import ChatSession"],
        "chat.py --help": ["chat.py", "--help"],
        "train_pretrain --help": ["-m", "train.train_pretrain", "--help"],
        "first answer, 8 tokens": ["chat.py", "--model", str(model), "--prompt", "hello", "--json", "--max-new-tokens", "8"],
    }


@dataclass
class Started:
    name: str
    arguments: list[str]
    seconds: list[float] = field(default_factory=list)

    def run(self, *flags: str) -> str:
        """Run it once; returns its standard error. Raises ValueError when it fails."""
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *flags, *self.arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8"
        )
        self.seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise ValueError(f"{self.name} failed: {done.stderr.strip()[-400:]}")
        return done.stderr


def measure(model: Path, rounds: int, names: list[str] | None = None) -> list[Started]:
    """Every program once per round; a first round (cold files) is not counted."""
    programs = [Started(name, arguments) for name, arguments in commands(model).items() if names is None or name in names]
    for number in range(rounds + 1):
        for program in programs:
            program.run()
            if not number:
                program.seconds.clear()
    return programs


def slowest_imports(program: Started, count: int, least_ms: float = 5.0) -> list[tuple[str, float, float]]:
    """(module, own ms, ms with all that it imports) of the modules that take longest, by their own time."""
    seconds = list(program.seconds)
    found = LINE.findall(program.run("-X", "importtime"))
    program.seconds = seconds
    rows = [(name, int(own) / 1000, int(whole) / 1000) for own, whole, _, name in found]
    return [row for row in sorted(rows, key=lambda row: -row[2])[:count] if row[2] >= least_ms]


def text(programs: list[Started]) -> str:
    lines = [f"{'':<26}{'seconds':>9}  (min-max)"]
    for program in programs:
        found = summary(program.seconds)
        lines.append(f"{program.name:<26}{found['median']:9.2f}  ({found['min']:.2f}-{found['max']:.2f})")
    return "\n".join(lines)
