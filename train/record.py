"""What a run leaves of itself while it goes: rows with all its figures, a warning before memory ends, the plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import parallel
from train.memory import MEMORY_LOW, MemoryWatch, memory_in_use
from train.metrics import MetricsLog, Window
from train.plotting import plot_loss
from train.progress import Progress
from train.runtime import only_for_show, peak_memory_mb


class Record(MetricsLog):
    """The metrics of a run at `state`. Of several processes the first writes."""

    def __init__(self, out_dir: Path, state: Progress, device: str, from_step: int, log: Callable[[str], object]) -> None:
        """from_step: as for MetricsLog."""
        super().__init__(out_dir, from_step, write=parallel.is_first())
        self.state, self.device, self.log = state, device, log
        self.last: dict[str, Any] = {}
        """The newest value of each key."""
        for row in self.rows:
            self._remember(row)
        self._memory = MemoryWatch()

    def report(self, window: Window, evaluated: dict[str, float], lr: float | None) -> dict[str, Any]:
        """The row of a window of steps, and of what was measured on held-out data after it."""
        state = self.state
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": window.loss,
            "lr": lr,
            "grad_norm": window.norm,
            "tokens_per_second": window.real / window.seconds if window.seconds else None,
            "real_token_share": window.real / window.positions if window.positions else None,
            "val_loss": evaluated.get("val_loss"),
            "val_bpb": evaluated.get("val_bpb"),
            "peak_memory_mb": peak_memory_mb(self.device),
            "seconds": state.seconds,
            **memory_in_use(self.device),
            "skipped": state.skipped,
            "spikes": state.spikes,
            "rollbacks": state.rollbacks,
            **window.extra(),
            **{k: v for k, v in evaluated.items() if k not in ("val_loss", "val_bpb")},
        }
        if not self.write:
            return row
        self.add(row)
        self._remember(row)
        if (low := self._memory.due(self.device)) is not None:
            self.event(state.step, "memory_low", left_mb=low[0], of_mb=low[1])
            self.log(MEMORY_LOW.format(step=state.step, left=low[0], there=low[1]))
        if evaluated.get("val_loss") is not None:
            self.plot(self.out_dir.name)
        return row

    def plot(self, title: str) -> None:
        """loss.png."""
        if self.write:
            with only_for_show("loss.png"):
                plot_loss(self.rows, self.out_dir / "loss.png", title)

    def _remember(self, row: dict[str, Any]) -> None:
        self.last.update({name: value for name, value in row.items() if value is not None})
