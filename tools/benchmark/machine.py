"""The machine's ceilings: how fast it multiplies matrices and reads memory, whatever the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tools.benchmark.measure import summary
from train.runtime import timed

SHAPES = {"1024^3": (1024, 1024, 1024), "4096x512x2048": (4096, 512, 2048)}
LARGE = {"8192^3": (8192, 8192, 8192)}
"""For an accelerator: what is large enough to keep it busy."""
MEMORY_BYTES = 512 * 2**20  # far beyond every cache
AIMED_SECONDS = 0.05
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Ceilings:
    """Measured once per `measure()`, so that they see the same machine as the rows that they are measured between."""

    device: str = "cpu"
    small: bool = False
    """For tests: matrices and memory so small that they cost nothing and mean nothing."""
    found: dict[str, list[float]] = field(default_factory=dict)

    def measure(self) -> None:
        shapes = {**SHAPES, **(LARGE if self.device.startswith("cuda") else {})}
        for label, (m, k, n) in shapes.items():
            for name, dtype in DTYPES.items():
                m, k, n = (min(size, 64) if self.small else size for size in (m, k, n))
                a, b = torch.ones(m, k, dtype=dtype, device=self.device), torch.ones(n, k, dtype=dtype, device=self.device)
                rate = self._rate(lambda a=a, b=b: torch.nn.functional.linear(a, b))  # type: ignore[misc]
                self._add(f"{name}_{label}_tflops", 2 * m * k * n * rate / 1e12)
        size = 2**16 if self.small else MEMORY_BYTES
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        self._add("memory_copy_gb_per_second", 2 * size * self._rate(lambda: target.copy_(source)) / 1e9)
        self._add("memory_read_gb_per_second", size * self._rate(source.sum) / 1e9)

    def _rate(self, work: Callable[[], object]) -> float:
        """Calls a second, from as many calls as take a moment."""
        timed(work, self.device)
        once = timed(work, self.device)
        count = max(1, min(200, int(AIMED_SECONDS / max(once, 1e-7))))

        def many() -> None:
            for _ in range(count):
                work()

        return count / timed(many, self.device)

    def _add(self, name: str, value: float) -> None:
        self.found.setdefault(name, []).append(value)

    def json(self) -> dict[str, dict[str, float]]:
        return {name: summary(values) for name, values in self.found.items()}

    def median(self, name: str) -> float:
        return summary(self.found[name])["median"]

    @property
    def product_flops(self) -> float:
        """The ceiling that shares are given of: bf16, at the size of a layer of a small model, or on an accelerator a large product."""
        label = "8192^3" if self.device.startswith("cuda") else "4096x512x2048"
        return self.median(f"bf16_{label}_tflops") * 1e12

    @property
    def bytes_per_second(self) -> float:
        """What memory can be read with: the larger of the two, since a sum of one thread may not reach it."""
        return max(self.median("memory_read_gb_per_second"), self.median("memory_copy_gb_per_second")) * 1e9

    def text(self) -> str:
        lines = ["ceilings, measured between the rounds"]
        for name, found in self.json().items():
            lines.append(f"  {name:<34} {found['median']:8.2f}  ({found['min']:.2f}-{found['max']:.2f})")
        return "\n".join(lines)
