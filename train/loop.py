"""fit(): the only optimisation loop. A stage is data, a loss and settings.

One step: collect the micro-batches, add up their weights, run each backward with its terms divided by those totals, clip,
refuse what is not finite, update, log, evaluate, save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train import parallel, sharding
from train.checkpoints import (
    check_same_models,
    intact_checkpoint,
    load_best,
    load_state,
    restore_model,
    restore_optimizers,
    save_best,
    save_checkpoint,
)
from train.config import StageConfig, to_yaml
from train.data import BatchSource
from train.memory import out_of_memory, reason_of, release
from train.metrics import LossFunction, StepResult, Window
from train.optim import RATE, Muon, build_optimizers, lr_factor
from train.planning import Plan, Prepare
from train.progress import Display, Progress
from train.record import Record
from train.runtime import (
    StopRequest,
    device_name,
    only_for_show,
    random_states,
    seed_everything,
    set_random_states,
    set_threads,
)
from train.speed import keep_freed_memory, undo_compiling
from train.stability import LOWER_RATE, SPIKE, Watch, last_good_checkpoint, score

Evaluate = Callable[[SmartHaoAI], dict[str, float]]
DEEP_FADE = 0.1  # last share of a run in which the training-only heads lose their weight


@dataclass
class FitResult:
    """How a run ended."""

    step: int
    total_steps: int
    tokens: int
    seconds: float
    interrupted: bool
    precision: str
    processes: int = 1
    last: dict[str, Any] = field(default_factory=dict)
    """The last row of metrics.jsonl."""


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
    begun_from: dict[str, str] | None = None,
    log: Callable[[str], object] = print,
) -> FitResult:
    """Train `model` by `settings.train`, writing metrics, plots and checkpoints to `settings.out_dir`.

    evaluate returns val_loss and the like; sample returns (prompt, answer) pairs. prepare is called once before the first step with
    the model as it came (also when a run is resumed: its weights are restored after that) and the precision of the run.
    begun_from: `models_begun_from` of the settings, which a resumed run must find unchanged. With settings.resume the newest intact
    checkpoint of out_dir is continued. Raises ValueError when several steps in a row are not finite.
    """
    return _Fit(settings, model, batches, loss_fn, evaluate, tokenizer, sample, prepare, begun_from or {}, log).run()


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
        begun_from: dict[str, str],
        log: Callable[[str], object],
    ) -> None:
        self.settings, self.train = settings, settings.train
        self.model, self.batches, self.loss_fn = model, batches, loss_fn
        self.evaluate, self.tokenizer, self.sample = evaluate, tokenizer, sample
        self.log = log if parallel.is_first() else lambda text: None
        self.out_dir, self.begun_from = Path(settings.out_dir), begun_from
        self.device = device_name(self.train.device)
        parallel.check_device(self.device)
        set_threads(self.train.threads)
        keep_freed_memory()
        seed_everything(self.train.seed)
        self.model.to(self.device).train()
        self.model.activation_checkpointing = self.train.activation_checkpointing
        self.plan = Plan(settings, model, batches, loss_fn, self.device, prepare, self.log)
        self.watch = Watch()
        self.lr: float | None = None
        self.window = Window()

    def run(self) -> FitResult:
        checkpoint, damaged = self._find_checkpoint()
        for problem in damaged:
            self.log(f"warning: {problem}; set aside, going on from {checkpoint}")
        if checkpoint is not None:
            saved = load_state(checkpoint)
            check_same_models(checkpoint, saved.get("models", {}), self.begun_from, self.settings)
            self.plan.obey(Progress(**saved["progress"]))
            self.window, self.watch = Window(**saved["window"]), Watch(**saved.get("watch", {}))
            self.batches.load_state_dict(saved["cursor"])
            restore_model(checkpoint, self.model)
            self.log(f"resuming from {checkpoint} at step {self.plan.state.step}")
        else:
            self.plan.make()
        how = self._begin(checkpoint)
        for problem in damaged:
            self.metrics.event(self.state.step, "damaged_checkpoint", problem=problem)
        if parallel.is_first():
            atomic_write_text(self.out_dir / "run.yaml", to_yaml(self.settings))
        at_once = f"; {self.state.at_once:,} positions at once" if self.state.at_once else ""
        at_once += f"; {parallel.size()} processes ({how})" if how != "none" else ""
        self.log(f"precision {self.precision.name} ({self.precision.reason}){at_once}; {self.state.total_steps:,} steps")
        try:
            with (
                StopRequest().installed() as stop,
                self.plan.passes(compiled=False),
                Display(self.out_dir.name, self.state, self.train.log_every) as self.display,
            ):
                interrupted = self._steps(stop)
        finally:
            undo_compiling(self.model)
            self.metrics.close()
        if self.train.patience and self.state.best is not None and not interrupted:
            self._take_best()
        self.metrics.plot(f"{self.out_dir.name}: {self.model.num_parameters() / 1e6:.1f}M parameters")
        return FitResult(
            self.state.step,
            self.state.total_steps,
            self.state.tokens,
            self.state.seconds,
            interrupted,
            self.precision.name,
            parallel.size(),
            self.metrics.last,
        )

    def _find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """As `intact_checkpoint`, where the run is to be resumed: what rank 0 finds."""
        found, damaged = intact_checkpoint(self.out_dir) if self.settings.resume and parallel.is_first() else (None, [])
        place, damaged = parallel.from_first([None if found is None else str(found), damaged])
        return None if place is None else Path(place), damaged

    def _begin(self, checkpoint: Path | None) -> str:
        """What the steps need besides the plan. checkpoint: from which the run is resumed. Returns how the processes share the model."""
        self.state, self.precision = self.plan.state, self.plan.precision
        # All that was measured and restored so far was each process's own model in one piece.
        how = sharding.choose(self.train.parallel, self.model, self.device)
        if how == "fsdp":
            sharding.shard(self.model, self.device)
        self.shared = parallel.SharedLoss(self.model, self.loss_fn, how)
        self.optimizers = build_optimizers(self.model, self.train, self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.compute_dtype = torch.bfloat16 if self.precision.name == "bf16" else torch.float32
        self.scaler = self.precision.scaler()
        if checkpoint is not None:
            restore_optimizers(checkpoint, self.model, self.optimizers)
            self.scaler.load_state_dict(load_state(checkpoint)["scaler"])
        self.metrics = Record(self.out_dir, self.state, self.device, -1 if checkpoint is None else self.state.step, self.log)
        self._tell_halvings()
        return how

    def _steps(self, stop: StopRequest) -> bool:
        """Run to the end; True when the user stopped it before."""
        saved_at = time.monotonic()
        if self.train.eval_first and self.state.step == 0 and (evaluated := self._evaluate()):
            self._log_row(self.window, evaluated)
        while self.state.step < self.state.total_steps:
            start = time.perf_counter()
            self.window.add(self._step())
            self.state.step += 1
            if self.state.bad_in_a_row > self.train.max_skipped_steps or 0 < self.train.max_spike_steps < self.state.spikes_in_a_row:
                self._roll_back()
            spent = parallel.largest(time.perf_counter() - start)[0]
            self.state.seconds += spent
            self.window.seconds += spent
            if total := self.plan.corrected_steps():
                self.metrics.event(self.state.step, "replanned", total_steps=total, before=self.state.total_steps)
                self.state.total_steps = total
            step, last = self.state.step, self.state.step >= self.state.total_steps
            evaluated = self._evaluate() if last or (self.train.eval_every and step % self.train.eval_every == 0) else {}
            if self.train.patience and evaluated and self._enough(evaluated):
                last = True
            if evaluated or last or step % self.train.log_every == 0:
                self._log_row(self.window, evaluated)
                self.window = Window()
            self.display.advance()
            due = self.train.checkpoint_every and step % self.train.checkpoint_every == 0
            overdue = self.train.checkpoint_minutes and time.monotonic() - saved_at > self.train.checkpoint_minutes * 60
            overdue, stopping = parallel.largest(bool(overdue), stop.requested)
            if due or overdue or last or stopping:
                self._save()
                saved_at = time.monotonic()
            if last or (self.train.sample_every and step % self.train.sample_every == 0):
                self._write_samples()  # after the checkpoint: what is only for show must not cost a run
            if stopping and not last:
                return True
        return False

    def _step(self) -> StepResult:
        """One optimiser step."""
        parallel.seed_step(self.train.seed, self.state.step)
        lr = self.train.lr * lr_factor(self.train, self.state.step, self.state.total_steps) * self.state.rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get(RATE, 1.0)
        self.lr = lr
        self.model.deep_weight = min(1.0, (1 - self.state.done) / DEEP_FADE)
        # Processes meet in their passes: one alone cannot begin anew.
        result = self.plan.fitting(self._gradients, self._way_back() if parallel.size() == 1 else None)
        self._tell_halvings()
        result.loss_sum, result.others, result.metrics, load = parallel.add_up(
            result.loss_sum, result.others, result.metrics, self.model.take_expert_load()
        )
        result.norm = self._update(result.loss_sum)
        if not self.state.bad_in_a_row:
            self._watch_loss(result.loss_sum / max(result.weight, 1.0))
        self.state.tokens += result.real
        if load is not None:
            result.expert_load = load.tolist()
            if not self.state.bad_in_a_row:
                self.model.balance_experts(load)
        return result

    def _way_back(self) -> Callable[[], None]:
        """What puts things back as they are now, before a step."""
        cursor, random = self.batches.state_dict(), random_states()

        def undo() -> None:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            self.model.forget_pass()
            self.batches.load_state_dict(cursor)
            set_random_states(random)

        return undo

    def _gradients(self) -> StepResult:
        """The gradients of a step, and this process's sums as far as they are known before the update."""
        batches = [self.batches.next_batch(self.state.done) for _ in range(self.train.accumulation_steps)]
        micro, passes = parallel.own_parts(batches, self.plan.parts)
        totals: dict[str, float] = {"micro_batches": passes}
        for batch in batches:
            for name, weight in batch.weights.items():
                totals[name] = totals.get(name, 0.0) + weight
        loss_sum = 0.0
        others: dict[str, float] = {}
        metrics: dict[str, list[float]] = {}
        for number, (batch, counted) in enumerate(micro, start=1):
            with self.plan.passes(compiled=True), self.shared.sending(last=number == len(micro)):
                with self.precision.autocast():
                    terms = self.shared(batch.to(self.device))
                losses = [term for term in terms if not term.metric]
                parts = [term.total * counted / max(totals[term.weight], 1.0) for term in losses]
                # The mean over processes that is taken of the gradients becomes a sum.
                self.scaler.scale(torch.stack(parts).sum() * parallel.size()).backward()
            loss_sum += float(losses[0].total.detach()) * counted
            for term, part in zip(losses[1:], parts[1:], strict=True):
                others[term.name] = others.get(term.name, 0.0) + float(part.detach())
            logged = [term for term in terms if term.metric]
            values = torch.stack([term.total.detach().float() for term in logged]).tolist() if logged else []
            for term, value in zip(logged, values, strict=True):
                metrics[term.name] = [metrics.get(term.name, [0.0])[0] + value * counted, totals[term.weight]]
        positions, real = sum(b.positions for b in batches), sum(b.real for b in batches)
        return StepResult(loss_sum, totals[losses[0].weight], 0.0, positions, real, others, metrics, None)

    def _update(self, loss_sum: float) -> float:
        """Clip and apply the gradients, unless the loss or their norm is not finite. Returns the norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(sharding.whole_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip or float("inf"))))
        if math.isfinite(loss_sum) and math.isfinite(norm):
            if self.train.adaptive_clip:
                limit = self.watch.norm_limit(norm, self.train.adaptive_clip)
                if limit < min(norm, self.train.clip or norm):
                    torch.nn.utils.clip_grad_norm_(self.parameters, limit)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.state.bad_in_a_row = 0
        else:
            self.state.skipped += 1
            self.state.bad_in_a_row += 1
            # The number of the step that is running: a run resumed from the checkpoint before it logs the event again.
            self.metrics.event(self.state.step + 1, "skipped", loss=str(loss_sum), grad_norm=str(norm))
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def _watch_loss(self, loss: float) -> None:
        deviations = self.watch.deviations(loss)
        if deviations <= SPIKE:
            self.state.spikes_in_a_row = 0
            return
        self.state.spikes += 1
        self.state.spikes_in_a_row += 1
        self.metrics.event(self.state.step + 1, "spike", loss=loss, deviations=round(deviations, 1))

    def _roll_back(self) -> None:
        """After repeated trouble: on from the last good checkpoint, more carefully. The data that led here is not gone through again."""
        state, train = self.state, self.train
        trouble = (
            f"{state.bad_in_a_row} steps in a row had a loss or gradient that is not finite"
            if state.bad_in_a_row
            else f"{state.spikes_in_a_row} steps in a row had a loss far above those before"
        )
        found = last_good_checkpoint(self.out_dir) if parallel.is_first() else None
        found = parallel.from_first(None if found is None else str(found))
        good = None if found is None else Path(found)
        if good is None or state.rollbacks >= train.max_rollbacks:
            back = f"after going back {state.rollbacks} times" if good is not None else "and there is no checkpoint to go back to"
            raise ValueError(
                f"{trouble} (step {state.step}), {back}: lower train.lr={train.lr:g}, or set train.precision=fp32; "
                "the last checkpoint is untouched"
            )
        restore_model(good, self.model)
        restore_optimizers(good, self.model, self.optimizers)
        if (renew := getattr(self.batches, "renew", None)) is not None:
            renew()
        state.rollbacks += 1
        state.rate *= LOWER_RATE
        state.bad_in_a_row = state.spikes_in_a_row = 0
        self.metrics.event(state.step, "rolled_back", to=good.name, rate=state.rate, trouble=trouble)
        self.log(f"step {state.step}: {trouble}; going on with the weights of {good.name} at {state.rate:g} of the learning rate")

    def _enough(self, evaluated: dict[str, float]) -> bool:
        """Keep the best weights; True when the last `patience` evaluations did not better them."""
        state, found = self.state, parallel.from_first(score(evaluated))
        if found is None:
            return False
        if math.isfinite(found) and (state.best is None or found < state.best):
            state.best, state.best_step, state.without_gain = found, state.step, 0
            save_best(self.out_dir, self.model, self.tokenizer)
            return False
        state.without_gain += 1
        if state.without_gain < self.train.patience or state.step >= state.total_steps:
            return False
        state.total_steps, state.stopped_early = state.step, True
        self.metrics.event(state.step, "stopped_early", best_step=state.best_step, evaluations=state.without_gain)
        self.log(f"step {state.step}: no gain on held-out data in {state.without_gain} evaluations; the run ends here")
        return True

    def _take_best(self) -> None:
        """The finished model is the best one that was measured, and so are the figures that are told of it."""
        load_best(self.out_dir, self.model)
        row = next((row for row in self.metrics.rows if row["step"] == self.state.best_step), {})
        self.metrics.last.update({name: value for name, value in row.items() if name.startswith("val_") and value is not None})
        self.log(f"the finished model is that of step {self.state.best_step}, the best on held-out data")

    def _tell_halvings(self) -> None:
        for details in self.plan.events:
            self.metrics.event(self.state.step + 1, "halved", **details)
        self.plan.events.clear()

    def _evaluate(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        try:
            with self.precision.autocast(), sharding.whole(self.model):
                return self.evaluate(self.model)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or parallel.size() > 1:  # the others wait for this one's part
                raise
            reason = reason_of(error)
        finally:
            self.model.train()
        release(self.device)
        self.metrics.event(self.state.step, "not_evaluated", reason=reason)
        self.log(f"step {self.state.step}: not enough memory to evaluate, which is left out ({reason}); lower train.batch_size")
        return {}

    def _log_row(self, window: Window, evaluated: dict[str, float]) -> None:
        self.display.show(self.metrics.report(window, evaluated, self.lr), evaluated)

    def _write_samples(self) -> None:
        if self.sample is None:
            return
        random = torch.get_rng_state()
        with sharding.whole(self.model):
            if parallel.is_first():
                with parallel.alone():
                    for prompt, answer in self.sample(self.model.eval()):
                        with only_for_show("samples"):
                            self.metrics.event(self.state.step, "sample", prompt=prompt, answer=answer)
        self.model.train()
        torch.set_rng_state(random)

    def _save(self) -> None:
        state = {
            "progress": vars(self.state),
            "window": vars(self.window),
            "cursor": self.batches.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watch": vars(self.watch),
            "models": self.begun_from,
        }
        self.metrics.flush()
        save_checkpoint(self.out_dir, self.state.step, self.model, self.tokenizer, self.optimizers, state, self.train.keep_checkpoints)
