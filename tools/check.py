"""Everything a change must pass: `python -m tools.check [--fast]`: ruff, the type checker, pytest; the same here and in CI."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from train.program import run_main

PACKAGES = ["model", "inference", "train", "tools", "chat.py", "train_smart.py", "train_rlhf.py"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check", description=(__doc__ or "").strip())
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    parser.add_argument("--slow-only", action="store_true", help="run only the tests marked slow (the others have run already)")
    parser.add_argument("pytest", nargs="*", metavar="WORD", help="more for pytest, after --")
    args = parser.parse_args()
    marks = "not slow and not drill" if args.fast else "slow" if args.slow_only else "not drill"
    steps = {
        "ruff": [sys.executable, "-m", "ruff", "check", "."],
        "types": [sys.executable, "-m", "mypy", *PACKAGES],
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", marks, *args.pytest],
    }
    failed = []
    for name, command in steps.items():
        start = time.perf_counter()
        status = subprocess.run(command, check=False).returncode
        print(f"{name}: {'ok' if status == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s", flush=True)
        if status:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
