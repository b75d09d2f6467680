"""What is decided about a run, by measuring, before its first step: precision, rows per pass, compiled blocks, number of steps.

It is decided once and stored with the checkpoint; a run that is resumed obeys it. A time budget is corrected on the way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from model.transformer import SmartHaoAI
from train import parallel
from train.config import StageConfig
from train.data import Batch, BatchSource
from train.memory import out_of_memory, reason_of, release
from train.metrics import LossFunction
from train.progress import Progress
from train.runtime import Precision, choose_precision, timed
from train.speed import (
    CALIBRATED,
    COMPILED,
    COMPILED_GAIN,
    best_positions,
    compile_blocks,
    compiled_passes,
    compiler_problem,
    in_parts,
    return_freed_memory,
    trial,
    try_compiled,
    undo_compiling,
    usual_positions,
)

T = TypeVar("T")
Prepare = Callable[[SmartHaoAI, Precision], None]
REPLAN_EVERY = 0.05  # share of a time budget after which its number of steps is corrected
FEW_STEPS = 50  # with fewer there is nothing worth measuring
BUDGET_RESERVE = 0.97  # share of a time budget planned for steps; the rest is for evaluation and saving


SMALLER_ROLLOUT = "lower rollout.batch_size (answers written at once), rollout.max_new_tokens or train.batch_size"
SMALLER_BATCH = "halve train.batch_size and double train.accumulation_steps, which is the same step"
SMALLER_MODEL = (
    "lower data.max_length, set train.activation_checkpointing=true, take a smaller model, or learn an adapter (lora.r=16) of this one"
)


class Plan:
    """The decisions of a run, and the passes through the model that follow them. What they are is kept in `state`."""

    precision: Precision

    def __init__(
        self,
        settings: StageConfig,
        model: SmartHaoAI,
        batches: BatchSource,
        loss_fn: LossFunction,
        device: str,
        prepare: Prepare | None = None,
        log: Callable[[str], object] = print,
    ) -> None:
        """prepare: as for `fit`."""
        self.settings, self.train = settings, settings.train
        self.model, self.batches, self.loss_fn, self.device = model, batches, loss_fn, device
        self._prepare_stage, self.log = prepare, log
        self.state = Progress()
        self.events: list[dict[str, Any]] = []
        """Halvings that the run has not written down yet."""
        self._widest: Batch | None = None
        if hasattr(batches, "parts"):
            batches.parts = self.parts

    def make(self) -> None:
        """Decide: precision, rows per pass, compiled blocks, and the number of steps of a time budget (of what preparing leaves)."""
        began = time.perf_counter()
        train, rows_per_step = self.train, self.train.batch_size * self.train.accumulation_steps
        timed_run = bool(train.max_minutes and not train.max_steps)
        steps = train.max_steps or max(1, round(train.epochs * self.batches.rows_per_epoch() / rows_per_step))
        cursor, random = self.batches.state_dict(), torch.get_rng_state()
        same_shapes, apart = bool(getattr(self.batches, "same_shapes", False)), bool(getattr(self.batches, "group", 0))
        measured = train.precision == "auto" or timed_run or train.compile == "on" or (same_shapes and steps >= FEW_STEPS)
        if measured:  # a batch of rollouts is dear
            probe = self.batches.next_batch(1.0).to(self.device)
            first = self.batches.next_batch(0.0).to(self.device)
            self.batches.load_state_dict(cursor)

        self.state.at_once = usual_positions(train.micro_batch, self.settings.data.max_length, self.device, apart)
        measured_here = choose_precision(train, self.device, lambda: self._trial_in_parts(probe))
        name, reason = parallel.from_first([measured_here.name, measured_here.reason])
        self.precision = Precision(name, self.device, reason)
        self.state.precision, self.state.precision_reason = self.precision.name, self.precision.reason
        self._prepare()
        if measured:
            shapes = [first, probe]
            with self.precision.autocast():
                self._trial_in_parts(probe)
                per_step = self._timed_trial(probe) * train.accumulation_steps
                self._choose_passes(shapes, train.max_minutes * 60 if timed_run else steps * per_step, same_shapes)
                if timed_run:
                    times = [[self._timed_trial(batch) for batch in shapes] for _ in range(3)][1:]
                    per_step = sum(map(min, zip(*times, strict=True))) / len(shapes) * train.accumulation_steps
            self._agree()
        torch.set_rng_state(random)
        self.model.forget_pass()  # of the trials
        return_freed_memory()
        self.state.preparing = parallel.largest(time.perf_counter() - began)[0]
        self.state.total_steps = max(1, int(self.budget * BUDGET_RESERVE / per_step)) if timed_run else steps

    def obey(self, state: Progress) -> None:
        """The decisions with which a run began that is resumed now; a smaller train.micro_batch may be set since."""
        self.state = state
        if self.train.micro_batch:
            asked = self.train.micro_batch * self.settings.data.max_length
            state.at_once = min(asked, state.at_once or asked)
        if self.train.max_steps and not state.stopped_early:
            state.total_steps = self.train.max_steps
        self.precision = Precision(state.precision, self.device, state.precision_reason)
        self._prepare()
        if state.compiled:
            problem = next(filter(None, parallel.gathered(compiler_problem())), None)
            if problem is None:
                compile_blocks(self.model)
            else:
                state.compiled = False
                self.log(f"the run began with compiled blocks, and torch.compile does not work here ({problem}): it goes on without")

    def passes(self, compiled: bool) -> contextlib.AbstractContextManager[Any]:
        """Compiled blocks are for the training passes alone; without them there is nothing to switch (and no compiler to import)."""
        return compiled_passes(compiled) if self.state.compiled else contextlib.nullcontext()

    def parts(self, batch: Batch) -> list[Batch]:
        """The batch in as many rows at once as was decided."""
        parts = in_parts(batch, self.state.at_once)
        if self._widest is None or parts[0].inputs["input_ids"].numel() > self._widest.inputs["input_ids"].numel():
            self._widest = parts[0]
        return parts

    def fitting(self, work: Callable[[], T], undo: Callable[[], None] | None) -> T:
        """work(), begun anew with half as many rows at once as often as memory asks for it; undo() takes back what an attempt has changed,
        None: nothing can.

        Raises ValueError, with advice, when it does not fit with as few rows as belong together, or in one attempt.
        """
        while True:
            self._widest = None
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = reason_of(error)
            if undo is not None:
                undo()  # here, not above: the error holds what the attempt computed
                release(self.device)
            self._halve(reason, again=undo is not None)

    def _halve(self, reason: str, again: bool) -> None:
        widest = self._widest
        if widest is None:
            raise ValueError(f"not enough memory to make a batch ({reason}): {SMALLER_ROLLOUT}")
        rows, length = widest.inputs["input_ids"].shape
        if len(widest.boundaries()) == 2:
            advice = SMALLER_MODEL if widest.group or rows == 1 else f"{SMALLER_BATCH}; {SMALLER_MODEL}"
            raise ValueError(f"not enough memory for a pass of {rows} x {length} tokens, the fewest there can be ({reason}): {advice}")
        if not again:
            fewer = max(1, rows * length // 2 // self.settings.data.max_length)
            raise ValueError(
                f"not enough memory for {rows} rows of {length} tokens at once in each of {parallel.size()} processes ({reason}): go on "
                f"with --resume train.micro_batch={fewer}, the step stays the same"
            )
        self.state.at_once = rows * length // 2
        self.events.append({"at_once": self.state.at_once, "before": rows * length, "reason": reason})
        self.log(
            f"not enough memory for {rows} rows of {length} tokens at once: half as many from now on, the step stays the same ({reason})"
        )

    def _agree(self) -> None:
        """Every process goes by the most careful of what all have found out about rows and compiled blocks."""
        found = parallel.gathered([self.state.at_once, self.state.compiled, self.events])
        self.state.at_once = min((positions for positions, _, _ in found if positions), default=0)
        self.events = [event for _, _, events in found for event in events]
        compiled = all(works for _, works, _ in found)
        if self.state.compiled and not compiled:
            undo_compiling(self.model)
            self.log("the blocks are not compiled: another process does not gain by it")
        self.state.compiled = compiled

    @property
    def budget(self) -> float:
        """Seconds for the steps; 0: there is no time budget. Whatever preparing took, a tenth of the time is for learning."""
        whole = self.train.max_minutes * 60
        return max(whole - self.state.preparing, whole / 10)

    def corrected_steps(self) -> int | None:
        """Keep a time budget on a machine whose speed changes: the number of steps that fit into it now, while the learning rate is still
        high; None: as before."""
        budget, state = self.budget, self.state
        if not budget or self.train.max_steps or state.step < 5:
            return None
        elapsed = state.seconds / budget
        if elapsed - state.replanned < REPLAN_EVERY or state.done > 1 - self.train.decay_share / 2:
            return None
        state.replanned = elapsed
        total = max(state.step + 1, round(state.step * BUDGET_RESERVE / elapsed))
        return total if abs(total - state.total_steps) > 0.02 * state.total_steps else None

    def _choose_passes(self, shapes: list[Batch], seconds: float, same_shapes: bool) -> None:
        """Rows per pass and compiled blocks, where a run of that many seconds is long enough to earn back the time of trying."""
        train = self.train
        if not train.micro_batch and self.device == "cpu" and seconds > CALIBRATED and shapes[-1].group:
            self.state.at_once = best_positions(parallel.own_share(shapes[-1]), self._trial, self.device)
        if train.compile == "on" or (train.compile == "auto" and seconds > COMPILED and same_shapes):
            least = 0.0 if train.compile == "on" else COMPILED_GAIN
            self.state.compiled, said = try_compiled(self.model, shapes, self._trial_in_parts, self.device, least)
            self.log(said)

    def _prepare(self) -> None:
        if self._prepare_stage is not None:
            random = torch.get_rng_state()
            self._prepare_stage(self.model, self.precision)
            self.model.train()
            torch.set_rng_state(random)

    def _trial(self, batch: Batch) -> None:
        trial(self.model, self.loss_fn, batch)

    def _trial_in_parts(self, batch: Batch) -> None:
        def work() -> None:
            for part in self.parts(parallel.own_share(batch)):
                self._trial(part)

        self.fitting(work, self.model.forget_pass)

    def _timed_trial(self, batch: Batch) -> float:
        with self.passes(compiled=True):
            return parallel.largest(timed(lambda: self._trial_in_parts(batch), self.device))[0]
