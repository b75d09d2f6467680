"""Do the alignment losses compute what others compute? Each on random inputs against trl, torchrl and plain float64 maths.

    python -m tools.loss_parity [--trials N] [--seed S] [--json]

One row per function and reference: the largest difference of a value over the largest value, and of a gradient over the largest entry
of that gradient, over all trials. Ours runs in fp32, as in training, the reference in float64 on the same numbers. The exit status is 1
when a row exceeds the limit or a reference cannot be called. References of packages that are not installed are left out, and named.
Seeds are fresh unless given, and printed. Both packages come with the extra `parity`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import secrets
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from tools.loss_cases import TORCHRL, TRL, Case, Inputs, cases
from train.program import run_main

LIMIT = 1e-6


@dataclass
class Row:
    """A line of the table."""

    name: str
    reference: str
    trials: int
    value: float = 0.0
    gradient: float | None = None
    """None where there is no gradient to compare."""
    failed: str = ""
    """Why the reference could not be called."""

    @property
    def ok(self) -> bool:
        return not self.failed and max(self.value, self.gradient or 0.0) <= LIMIT


def compare(case: Case, trials: int, seed: int) -> Row:
    """The largest relative differences of `trials` random inputs."""
    row = Row(case.name, f"{case.source}: {case.what}", trials)
    for trial in range(trials):
        torch.manual_seed(seed + trial)
        drawn = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in case.make().items()}
        ours, theirs = (_leaves(drawn, dtype, case.wanted) for dtype in (torch.float32, torch.float64))
        actual = case.ours(ours)
        try:
            expected = case.theirs(theirs)
        except (AttributeError, ImportError, KeyError, TypeError) as error:
            row.failed = f"{type(error).__name__}: {error}"
            return row
        row.value = max(row.value, difference(actual, expected))
        if case.wanted:
            upstream = torch.randn(expected.shape)
            row.gradient = max(row.gradient or 0.0, _gradient_difference(case, (ours, theirs), (actual, expected), upstream))
    return row


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; nan counts as infinite, another shape too."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    share = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(share.nan_to_num(float("inf")))


def _leaves(drawn: Inputs, dtype: torch.dtype, wanted: str) -> Inputs:
    leaves = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in drawn.items()}
    return {name: tensor.clone().requires_grad_() if name in wanted.split() else tensor for name, tensor in leaves.items()}


def _gradient_difference(case: Case, inputs: tuple[Inputs, Inputs], outputs: tuple[Tensor, Tensor], upstream: Tensor) -> float:
    gradients = [
        torch.autograd.grad((result * upstream.to(result.dtype)).sum(), [leaves[name] for name in case.wanted.split()])
        for leaves, result in zip(inputs, outputs, strict=True)
    ]
    return max(difference(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def table(rows: list[Row]) -> str:
    """The rows, aligned, for people."""
    lines = [("function", "reference", "trials", "value", "gradient", "")]
    for row in rows:
        verdict = "ok" if row.ok else f"FAILED {row.failed}".rstrip()
        lines.append(
            (row.name, row.reference, str(row.trials), f"{row.value:.1e}", "-" if row.gradient is None else f"{row.gradient:.1e}", verdict)
        )
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.loss_parity", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=20, help="random inputs per row (default: 20)")
    parser.add_argument("--seed", type=int, help="of the first trial (default: a fresh one)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    if args.trials < 1:
        raise ValueError(f"--trials {args.trials}: at least 1 is needed")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    missing = [package for package in (TRL, TORCHRL) if importlib.util.find_spec(package) is None]
    versions = {package: version(package) for package in ("torch", TRL, TORCHRL) if package not in missing}
    rows = [compare(case, args.trials, seed) for case in cases() if case.source not in missing]
    ok = all(row.ok for row in rows)
    if args.json:
        shown = [{**asdict(row), "ok": row.ok} for row in rows]
        result = {"seed": seed, "limit": LIMIT, "versions": versions, "missing": missing, "ok": ok, "rows": shown}
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(table(rows))
        print(f"limit {LIMIT:.0e}; seed {seed}; " + ", ".join(f"{name} {number}" for name, number in versions.items()))
        if missing:
            print(f"not compared with {' and '.join(missing)}: not installed (pip install {' '.join(missing)})")
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(main)
