"""fit(): the only optimisation loop. A stage is data, a loss and settings.

One step: collect the micro-batches, add up their weights, run each backward with its terms divided by those totals, clip,
refuse what is not finite, update, log, evaluate, save.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.checkpoints import load_state, newest_checkpoint, restore, save_checkpoint
from train.config import StageConfig, to_yaml
from train.data import Batch, BatchSource
from train.metrics import LossFunction, MetricsLog, StepResult, Window
from train.optim import RATE, Muon, build_optimizers, lr_factor
from train.plotting import plot_loss
from train.runtime import (
    Precision,
    StopRequest,
    choose_precision,
    device_name,
    format_minutes,
    peak_memory_mb,
    seed_everything,
    set_threads,
    timed,
)
from train.speed import (
    CALIBRATED,
    COMPILED,
    COMPILED_GAIN,
    best_positions,
    compile_blocks,
    compiled_passes,
    compiler_problem,
    keep_freed_memory,
    return_freed_memory,
    try_compiled,
    undo_compiling,
    usual_positions,
)

Evaluate = Callable[[SmartHaoAI], dict[str, float]]
Prepare = Callable[[SmartHaoAI, Precision], None]
REPLAN_EVERY = 0.05  # share of a time budget after which its number of steps is corrected
DEEP_FADE = 0.1  # last share of a run in which the training-only heads lose their weight
FEW_STEPS = 50  # with fewer there is nothing worth measuring
BUDGET_RESERVE = 0.97  # share of a time budget planned for steps; the rest is for evaluation and saving


@dataclass
class FitResult:
    """How a run ended."""

    step: int
    total_steps: int
    tokens: int
    seconds: float
    interrupted: bool
    precision: str
    last: dict[str, Any] = field(default_factory=dict)
    """The last row of metrics.jsonl."""


@dataclass
class _Progress:
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
    """Positions (rows times length) of a forward and backward pass; 0: the whole batch."""
    compiled: bool = False

    @property
    def done(self) -> float:
        return self.step / max(self.total_steps, 1)


def fit(
    settings: StageConfig,
    model: SmartHaoAI,
    batches: BatchSource,
    loss_fn: LossFunction,
    evaluate: Evaluate | None = None,
    *,
    tokenizer: BPETokenizer,
    sample: Callable[[SmartHaoAI], list[tuple[str, str]]] | None = None,
    prepare: Prepare | None = None,
    log: Callable[[str], object] = print,
) -> FitResult:
    """Train `model` by `settings.train`, writing metrics, plots and checkpoints to `settings.out_dir`.

    evaluate returns val_loss and the like; sample returns (prompt, answer) pairs. prepare is called once before the first step with
    the model as it came (also when a run is resumed: its weights are restored after that) and the precision of the run. With
    settings.resume the newest checkpoint of out_dir is continued. Raises ValueError when several steps in a row are not finite.
    """
    return _Fit(settings, model, batches, loss_fn, evaluate, tokenizer, sample, prepare, log).run()


class _Fit:
    def __init__(
        self,
        settings: StageConfig,
        model: SmartHaoAI,
        batches: BatchSource,
        loss_fn: LossFunction,
        evaluate: Evaluate | None,
        tokenizer: BPETokenizer,
        sample: Callable[[SmartHaoAI], list[tuple[str, str]]] | None,
        prepare: Prepare | None,
        log: Callable[[str], object],
    ) -> None:
        self.settings, self.train = settings, settings.train
        self.model, self.batches, self.loss_fn = model, batches, loss_fn
        self.evaluate, self.tokenizer, self.sample, self.prepare, self.log = evaluate, tokenizer, sample, prepare, log
        self.out_dir = Path(settings.out_dir)
        self.device = device_name(self.train.device)
        set_threads(self.train.threads)
        keep_freed_memory()
        seed_everything(self.train.seed)
        self.model.to(self.device).train()
        self.optimizers = build_optimizers(model, self.train, self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.state = _Progress()
        self.skipped_in_a_row = 0
        self.last_row: dict[str, Any] = {}
        self.lr: float | None = None
        self.window = Window()

    def run(self) -> FitResult:
        checkpoint = newest_checkpoint(self.out_dir) if self.settings.resume else None
        if checkpoint is not None:
            saved = load_state(checkpoint)
            self.state = _Progress(**saved["progress"])
            self.window = Window(**saved["window"])
            if self.train.max_steps:
                self.state.total_steps = self.train.max_steps
            self.precision = Precision(self.state.precision, self.device, self.state.precision_reason)
            self._prepare()
            if self.state.compiled:
                self._compile_again()
            self.batches.load_state_dict(saved["cursor"])
            restore(checkpoint, self.model, self.optimizers)
            self.log(f"resuming from {checkpoint} at step {self.state.step}")
        else:
            self._plan()
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.compute_dtype = torch.bfloat16 if self.precision.name == "bf16" else torch.float32
        self.scaler = self.precision.scaler()
        if checkpoint is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self.metrics = MetricsLog(self.out_dir, -1 if checkpoint is None else self.state.step)
        for row in self.metrics.rows:
            self.last_row.update({k: v for k, v in row.items() if v is not None})
        atomic_write_text(self.out_dir / "run.yaml", to_yaml(self.settings))
        at_once = f"; {self.state.at_once:,} positions at once" if self.state.at_once else ""
        self.log(f"precision {self.precision.name} ({self.precision.reason}){at_once}; {self.state.total_steps:,} steps")
        try:
            with StopRequest().installed() as stop, self._passes(compiled=False), self._bar() as self.bar:
                interrupted = self._steps(stop)
        finally:
            undo_compiling(self.model)
            self.metrics.close()
        plot_loss(self.metrics.rows, self.out_dir / "loss.png", f"{self.out_dir.name}: {self.model.num_parameters() / 1e6:.1f}M parameters")
        return FitResult(
            self.state.step, self.state.total_steps, self.state.tokens, self.state.seconds, interrupted, self.precision.name, self.last_row
        )

    def _plan(self) -> None:
        """Decide once what is measured: precision, rows per pass, compiled blocks, and the number of steps of a time budget (of what
        preparing leaves)."""
        began = time.perf_counter()
        train, rows_per_step = self.train, self.train.batch_size * self.train.accumulation_steps
        timed_run = bool(train.max_minutes and not train.max_steps)
        steps = train.max_steps or max(1, round(train.epochs * self.batches.rows_per_epoch() / rows_per_step))
        cursor, random = self.batches.state_dict(), torch.get_rng_state()
        same_shapes = bool(getattr(self.batches, "same_shapes", False))
        measured = train.precision == "auto" or timed_run or train.compile == "on" or (same_shapes and steps >= FEW_STEPS)
        if measured:  # a batch of rollouts is dear
            probe = self.batches.next_batch(1.0).to(self.device)
            first = self.batches.next_batch(0.0).to(self.device)
            self.batches.load_state_dict(cursor)

        self.state.at_once = usual_positions(train.micro_batch, self.settings.data.max_length, self.device)
        self.precision = choose_precision(train, self.device, lambda: self._trial_in_parts(probe))
        self.state.precision, self.state.precision_reason = self.precision.name, self.precision.reason
        self._prepare()
        if measured:
            shapes = [first, probe]
            with self.precision.autocast():
                self._trial_in_parts(probe)
                per_step = self._timed_trial(probe) * train.accumulation_steps
                self._plan_passes(shapes, train.max_minutes * 60 if timed_run else steps * per_step, same_shapes)
                if timed_run:
                    times = [[self._timed_trial(batch) for batch in shapes] for _ in range(3)][1:]
                    per_step = sum(map(min, zip(*times, strict=True))) / len(shapes) * train.accumulation_steps
        torch.set_rng_state(random)
        self.model.take_expert_load()  # of the trials
        return_freed_memory()
        self.state.preparing = time.perf_counter() - began
        self.state.total_steps = max(1, int(self._budget * BUDGET_RESERVE / per_step)) if timed_run else steps

    def _plan_passes(self, shapes: list[Batch], seconds: float, same_shapes: bool) -> None:
        """Rows per pass and compiled blocks, where a run of that many seconds is long enough to earn back the time of trying."""
        train = self.train
        if not train.micro_batch and self.device == "cpu" and seconds > CALIBRATED:
            self.state.at_once = best_positions(shapes[-1], self._trial, self.device)
        if train.compile == "on" or (train.compile == "auto" and seconds > COMPILED and same_shapes):
            least = 0.0 if train.compile == "on" else COMPILED_GAIN
            self.state.compiled, said = try_compiled(self.model, shapes, self._trial_in_parts, self.device, least)
            self.log(said)

    def _compile_again(self) -> None:
        problem = compiler_problem()
        if problem is None:
            compile_blocks(self.model)
        else:
            self.state.compiled = False
            self.log(f"the run began with compiled blocks, and torch.compile does not work here ({problem}): it goes on without")

    def _trial(self, batch: Batch) -> None:
        """A forward and a backward pass that changes nothing."""
        terms = self.loss_fn(self.model, batch)
        torch.stack([term.total for term in terms if not term.metric]).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def _trial_in_parts(self, batch: Batch) -> None:
        for part in self._parts(batch):
            self._trial(part)

    def _timed_trial(self, batch: Batch) -> float:
        with self._passes(compiled=True):
            return timed(lambda: self._trial_in_parts(batch), self.device)

    def _passes(self, compiled: bool) -> contextlib.AbstractContextManager[Any]:
        """Compiled blocks are for the training passes alone; without them there is nothing to switch (and no compiler to import)."""
        return compiled_passes(compiled) if self.state.compiled else contextlib.nullcontext()

    def _parts(self, batch: Batch) -> list[Batch]:
        """The batch in as many rows at once as was decided."""
        length = batch.inputs["input_ids"].shape[1]
        return batch.split(max(1, self.state.at_once // length)) if self.state.at_once else [batch]

    def _prepare(self) -> None:
        if self.prepare is not None:
            random = torch.get_rng_state()
            self.prepare(self.model, self.precision)
            self.model.train()
            torch.set_rng_state(random)

    @property
    def _budget(self) -> float:
        """Seconds for the steps; 0: there is no time budget. Whatever preparing took, a tenth of the time is for learning."""
        whole = self.train.max_minutes * 60
        return max(whole - self.state.preparing, whole / 10)

    def _replan(self) -> None:
        """Keep a time budget on a machine whose speed changes: correct the number of steps while the learning rate is still high."""
        budget = self._budget
        if not budget or self.train.max_steps or self.state.step < 5:
            return
        elapsed = self.state.seconds / budget
        if elapsed - self.state.replanned < REPLAN_EVERY or self.state.done > 1 - self.train.decay_share / 2:
            return
        self.state.replanned = elapsed
        total = max(self.state.step + 1, round(self.state.step * BUDGET_RESERVE / elapsed))
        if abs(total - self.state.total_steps) > 0.02 * self.state.total_steps:
            self.metrics.event(self.state.step, "replanned", total_steps=total, before=self.state.total_steps)
            self.state.total_steps = self.bar.total = total

    def _bar(self) -> Any:
        return tqdm(
            total=self.state.total_steps,
            initial=self.state.step,
            unit="step",
            desc=self.out_dir.name,
            disable=None,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def _steps(self, stop: StopRequest) -> bool:
        """Run to the end; True when the user stopped it before."""
        saved_at = time.monotonic()
        if self.train.eval_first and self.state.step == 0 and (evaluated := self._evaluate()):
            self._log_row(self.window, evaluated)
        while self.state.step < self.state.total_steps:
            start = time.perf_counter()
            self.window.add(self._step())
            self.state.step += 1
            spent = time.perf_counter() - start
            self.state.seconds += spent
            self.window.seconds += spent
            self._replan()
            step, last = self.state.step, self.state.step >= self.state.total_steps
            evaluated = self._evaluate() if last or (self.train.eval_every and step % self.train.eval_every == 0) else {}
            if evaluated or last or step % self.train.log_every == 0:
                self._log_row(self.window, evaluated)
                self.window = Window()
            self.bar.update(1)
            due = self.train.checkpoint_every and step % self.train.checkpoint_every == 0
            overdue = self.train.checkpoint_minutes and time.monotonic() - saved_at > self.train.checkpoint_minutes * 60
            if due or overdue or last or stop.requested:
                self._save()
                saved_at = time.monotonic()
            if last or (self.train.sample_every and step % self.train.sample_every == 0):
                self._write_samples()  # after the checkpoint: what is only for show must not cost a run
            if stop.requested and not last:
                return True
        return False

    def _step(self) -> StepResult:
        """One optimiser step."""
        lr = self.train.lr * lr_factor(self.train, self.state.step, self.state.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get(RATE, 1.0)
        self.lr = lr
        self.model.deep_weight = min(1.0, (1 - self.state.done) / DEEP_FADE)
        batches = [self.batches.next_batch(self.state.done) for _ in range(self.train.accumulation_steps)]
        micro = [part for batch in batches for part in self._parts(batch)]
        totals: dict[str, float] = {"micro_batches": len(micro)}
        for batch in batches:
            for name, weight in batch.weights.items():
                totals[name] = totals.get(name, 0.0) + weight
        loss_sum = 0.0
        others: dict[str, float] = {}
        metrics: dict[str, list[float]] = {}
        for batch in micro:
            with self._passes(compiled=True):
                with self.precision.autocast():
                    terms = self.loss_fn(self.model, batch.to(self.device))
                losses = [term for term in terms if not term.metric]
                parts = [term.total / max(totals[term.weight], 1.0) for term in losses]
                self.scaler.scale(torch.stack(parts).sum()).backward()
            loss_sum += float(losses[0].total.detach())
            for term, part in zip(losses[1:], parts[1:], strict=True):
                others[term.name] = others.get(term.name, 0.0) + float(part.detach())
            logged = [term for term in terms if term.metric]
            values = torch.stack([term.total.detach().float() for term in logged]).tolist() if logged else []
            for term, value in zip(logged, values, strict=True):
                metrics[term.name] = [metrics.get(term.name, [0.0])[0] + value, totals[term.weight]]
        positions, real = sum(b.positions for b in batches), sum(b.real for b in batches)
        norm = self._update(loss_sum)
        self.state.tokens += real
        load = self.model.take_expert_load()
        if load is not None and not self.skipped_in_a_row:
            self.model.balance_experts(load)
        expert_load = None if load is None else load.tolist()
        return StepResult(loss_sum, totals[losses[0].weight], norm, positions, real, others, metrics, expert_load)

    def _update(self, loss_sum: float) -> float:
        """Clip and apply the gradients, unless the loss or their norm is not finite. Returns the norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip or float("inf")))
        finite = torch.isfinite(torch.tensor([loss_sum, norm])).all()
        if finite:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.skipped_in_a_row = 0
        else:
            self.state.skipped += 1
            self.skipped_in_a_row += 1
            # The number of the step that is running: a run resumed from the checkpoint before it logs the event again.
            self.metrics.event(self.state.step + 1, "skipped", loss=str(loss_sum), grad_norm=str(norm))
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row > self.train.max_skipped_steps:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite (step {self.state.step}): "
                f"lower train.lr={self.train.lr:g}, or set train.precision=fp32; the last checkpoint is untouched"
            )
        return norm

    def _evaluate(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        with self.precision.autocast():
            result = self.evaluate(self.model)
        self.model.train()
        return result

    def _log_row(self, window: Window, evaluated: dict[str, float]) -> None:
        row = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": window.loss,
            "lr": self.lr,
            "grad_norm": window.norm,
            "tokens_per_second": window.real / window.seconds if window.seconds else None,
            "real_token_share": window.real / window.positions if window.positions else None,
            "val_loss": evaluated.get("val_loss"),
            "val_bpb": evaluated.get("val_bpb"),
            "peak_memory_mb": peak_memory_mb(self.device),
            "seconds": self.state.seconds,
            "skipped": self.state.skipped,
            **window.extra(),
            **{k: v for k, v in evaluated.items() if k not in ("val_loss", "val_bpb")},
        }
        self.metrics.add(row)
        self.last_row = {**self.last_row, **{k: v for k, v in row.items() if v is not None}}
        shown = f"loss {window.loss:.3f}" if window.loss is not None else "nothing learned" if self.state.step else "before training"
        if evaluated.get("val_loss") is not None:
            shown += f"  held-out {evaluated['val_loss']:.3f}"
            shown += f" ({evaluated['val_bpb']:.3f} bits/byte)" if "val_bpb" in evaluated else ""
            shown += f" (accuracy {evaluated['val_accuracy']:.3f})" if "val_accuracy" in evaluated else ""
            plot_loss(self.metrics.rows, self.out_dir / "loss.png", self.out_dir.name)
        shown += "".join(f"  held-out {name} {evaluated[f'val_{name}']:.3f}" for name in ("reward", "exact") if f"val_{name}" in evaluated)
        if not self.bar.disable:
            self.bar.set_postfix_str(shown)
        elif evaluated or self.state.step % (self.train.log_every * 5) == 0 or self.state.step == self.state.total_steps:
            shown = f"step {self.state.step}/{self.state.total_steps}  {shown}"
            if self.state.step:
                left = self.state.seconds / self.state.step * (self.state.total_steps - self.state.step)
                shown += f"  {row['tokens_per_second'] or 0:,.0f} tokens/s  {format_minutes(left)} left"
            print(shown, file=sys.stderr, flush=True)

    def _write_samples(self) -> None:
        if self.sample is None:
            return
        random = torch.get_rng_state()
        for prompt, answer in self.sample(self.model.eval()):
            self.metrics.event(self.state.step, "sample", prompt=prompt, answer=answer)
        self.model.train()
        torch.set_rng_state(random)

    def _save(self) -> None:
        state = {
            "progress": vars(self.state),
            "window": vars(self.window),
            "cursor": self.batches.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.out_dir, self.state.step, self.model, self.tokenizer, self.optimizers, state, self.train.keep_checkpoints)
