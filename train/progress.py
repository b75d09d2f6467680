"""How far a run is: what a checkpoint keeps of the loop itself, and what the terminal shows of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from train import parallel
from train.runtime import format_minutes


@dataclass
class Progress:
    """What a checkpoint keeps of the loop itself."""

    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    precision: str = ""
    precision_reason: str = ""
    skipped: int = 0
    replanned: float = 0.0
    preparing: float = 0.0
    """Seconds before the first step: measuring, compiling, and what the stage does."""
    at_once: int = 0
    """Positions (rows times length) of a forward and backward pass, as far as rows may be parted; 0: the whole batch."""
    compiled: bool = False
    bad_in_a_row: int = 0
    """Steps whose loss or gradient was not finite, without one between them that was."""
    spikes: int = 0
    spikes_in_a_row: int = 0
    rollbacks: int = 0
    rate: float = 1.0
    """Share of the learning rate that is left after the rollbacks."""
    best: float | None = None
    """Of the evaluations so far, as `train.stability.score` counts; the weights are in checkpoints/best."""
    best_step: int = 0
    without_gain: int = 0
    """Evaluations since the best one."""
    stopped_early: bool = False

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was not as it should be."""
        return self.bad_in_a_row > 0 or self.spikes_in_a_row > 0

    @property
    def done(self) -> float:
        return self.step / max(self.total_steps, 1)


class Display:
    """A bar on a terminal; elsewhere a line now and then. Of several processes the first shows it."""

    def __init__(self, name: str, state: Progress, log_every: int) -> None:
        self.state, self.log_every = state, log_every
        self.bar: Any = tqdm(
            total=state.total_steps,
            initial=state.step,
            unit="step",
            desc=name,
            disable=None if parallel.is_first() else True,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One step more; of perhaps another total."""
        self.bar.total = self.state.total_steps
        self.bar.update(1)

    def show(self, row: dict[str, Any], evaluated: dict[str, float]) -> None:
        """A row of metrics.jsonl, and what was measured on held-out data for it."""
        if not parallel.is_first():
            return
        state = self.state
        shown = f"loss {row['loss']:.3f}" if row["loss"] is not None else "nothing learned" if state.step else "before training"
        if evaluated.get("val_loss") is not None:
            shown += f"  held-out {evaluated['val_loss']:.3f}"
            shown += f" ({evaluated['val_bpb']:.3f} bits/byte)" if "val_bpb" in evaluated else ""
            shown += f" (accuracy {evaluated['val_accuracy']:.3f})" if "val_accuracy" in evaluated else ""
        shown += "".join(f"  held-out {name} {evaluated[f'val_{name}']:.3f}" for name in ("reward", "exact") if f"val_{name}" in evaluated)
        if not self.bar.disable:
            self.bar.set_postfix_str(shown)
        elif evaluated or state.step % (self.log_every * 5) == 0 or state.step == state.total_steps:
            shown = f"step {state.step}/{state.total_steps}  {shown}"
            if state.step:
                left = state.seconds / state.step * (state.total_steps - state.step)
                shown += f"  {row['tokens_per_second'] or 0:,.0f} tokens/s  {format_minutes(left)} left"
            print(shown, file=sys.stderr, flush=True)
