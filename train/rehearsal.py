"""--dry-run: the plan and the first steps of a run, to tell what it will take; nothing of it is kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train import sharding
from train.config import StageConfig
from train.data import BatchSource
from train.loop import _Fit
from train.metrics import LossFunction, held_out_terms
from train.planning import Prepare
from train.progress import Progress
from train.runtime import peak_memory_mb
from train.speed import undo_compiling

STEPS = 2  # the first makes the optimiser's state


@dataclass
class Rehearsal:
    """What a run will take."""

    state: Progress
    """With what was planned."""
    seconds: float
    """Of a step."""
    tokens: float
    """Of a step."""
    peak_memory_mb: float | None
    """Of this process so far; on a GPU of what torch allocates."""


def rehearse(
    settings: StageConfig,
    model: SmartHaoAI,
    batches: BatchSource,
    loss_fn: LossFunction,
    *,
    tokenizer: BPETokenizer,
    prepare: Prepare | None = None,
    log: Callable[[str], object] = print,
) -> Rehearsal:
    """The beginning of the `fit` with these arguments, in this process: the plan, STEPS steps, a batch measured as an evaluation does it,
    a plot. Checkpoints are not written."""
    with tempfile.TemporaryDirectory() as folder:
        there = replace(settings, out_dir=folder, resume=False)
        return _Beginning(there, model, batches, loss_fn, None, tokenizer, None, prepare, {}, log).rehearse()


class _Beginning(_Fit):
    def rehearse(self) -> Rehearsal:
        self.plan.make()
        self._begin(None)
        seconds = []
        try:
            with self.plan.passes(compiled=False):
                for _ in range(STEPS):
                    start = time.perf_counter()
                    self.window.add(self._step())
                    seconds.append(time.perf_counter() - start)
                    self.state.step += 1
                    self.metrics.add({"step": self.state.step, "tokens": self.state.tokens, "loss": self.window.loss})
                with self.precision.autocast(), sharding.whole(self.model):
                    held_out_terms(self.model, [self.batches.next_batch(1.0)], self.loss_fn, self.device)
        finally:
            undo_compiling(self.model)
            self.metrics.close()
        self.metrics.plot("")
        return Rehearsal(self.state, seconds[-1], self.window.real / STEPS, peak_memory_mb(self.device))
