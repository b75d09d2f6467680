"""What a run leaves to read: metrics.jsonl, events.jsonl, samples, report; and bits per byte. Its plots: `train.plotting`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.files import append_line, atomic_write_text, sync, writing
from model.tokenizer import BPETokenizer
from model.transformer import IGNORE, SmartHaoAI
from train import parallel
from train.data import Batch
from train.losses import Term
from train.memory import by_halves
from train.runtime import only_for_show

LossFunction = Callable[[torch.nn.Module, Batch], list[Term]]

EVALUATION_ROWS = 16
METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"
OF_THE_MACHINE = {"seconds", "tokens_per_second", "peak_memory_mb", "memory_mb", "reserved_memory_mb"}
"""Keys of a row that differ between two runs that are otherwise the same."""


class MetricsLog:
    """Appends one JSON object per logged step to metrics.jsonl; mirrors numbers to TensorBoard when it is installed."""

    def __init__(self, out_dir: Path, from_step: int = -1, write: bool = True) -> None:
        """from_step: step of the checkpoint that the run resumes from; -1: it begins, and nothing of an earlier attempt is kept. write:
        not in the processes after the first, whose log stays empty."""
        self.out_dir, self.write = out_dir, write
        self.rows: list[dict[str, Any]] = []
        self._board: Any = None
        if not write:
            return
        with writing(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
        self.path, self.events_path = out_dir / METRICS_FILE, out_dir / EVENTS_FILE
        for path in (self.path, self.events_path):
            # What was logged after the checkpoint that a run resumes from will be logged again.
            kept = [row for row in read_jsonl(path) if row["step"] <= from_step]
            atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self.rows = read_jsonl(self.path)
        with contextlib.suppress(ImportError), self._on_board():
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=max(from_step, 0))

    def add(self, row: dict[str, Any]) -> None:
        if not self.write:
            return
        self.rows.append(row)
        append_line(self.path, json.dumps(row, ensure_ascii=False))
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                with self._on_board():
                    if self._board is not None:
                        self._board.add_scalar(name, value, row["step"])

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Something that happened once: a skipped step, a new plan, a sample."""
        if self.write:
            append_event(self.out_dir, step, kind, **details)

    def flush(self) -> None:
        """Onto the disk with what was logged: before the checkpoint behind which it will not be logged again."""
        for path in (self.path, self.events_path) if self.write else ():
            if path.is_file():
                with writing(path):
                    sync(path)

    def close(self) -> None:
        with self._on_board():
            if self._board is not None:
                self._board.close()

    @contextlib.contextmanager
    def _on_board(self) -> Iterator[None]:
        with only_for_show("TensorBoard"):
            try:
                yield
            except OSError:
                self._board = None
                raise


def append_event(out_dir: Path, step: int, kind: str, **details: Any) -> None:
    """One line of events.jsonl: something that happened once."""
    append_line(out_dir / EVENTS_FILE, json.dumps({"step": step, "event": kind, **details}, ensure_ascii=False))


@dataclass
class StepResult:
    """Sums of one optimiser step."""

    loss_sum: float
    weight: float
    norm: float
    positions: int
    real: int
    others: dict[str, float]
    """Terms besides the loss, each with its coefficient and divided by its weight."""
    metrics: dict[str, list[float]]
    """Total and weight of what is only logged."""
    expert_load: list[list[float]] | None
    """Tokens per layer and expert."""


@dataclass
class Window:
    """Sums since the last row of metrics.jsonl."""

    loss_sum: float = 0.0
    weight: float = 0.0
    norm: float | None = None
    positions: int = 0
    real: int = 0
    seconds: float = 0.0
    steps: int = 0
    others: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    expert_load: list[list[float]] | None = None

    def add(self, step: StepResult) -> None:
        if math.isfinite(step.loss_sum) and math.isfinite(step.norm):  # a skipped step must not spoil the row, and NaN is not JSON
            self.loss_sum += step.loss_sum
            self.weight += step.weight
            self.norm = step.norm if self.norm is None else max(self.norm, step.norm)
            self.steps += 1
            for name, value in step.others.items():
                self.others[name] = self.others.get(name, 0.0) + value
            for name, pair in step.metrics.items():
                if math.isfinite(pair[0]):
                    self.metrics[name] = [a + b for a, b in zip(self.metrics.get(name, [0.0, 0.0]), pair, strict=True)]
        if step.expert_load is not None:
            before = self.expert_load or [[0.0] * len(layer) for layer in step.expert_load]
            self.expert_load = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(before, step.expert_load, strict=True)]
        self.positions += step.positions
        self.real += step.real

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.weight if self.weight else None

    def extra(self) -> dict[str, Any]:
        """What only some stages and models have: mean of the other loss terms; metrics over their weight; each expert's share of its
        layer's work, times the number of experts (1: balanced), with the largest and smallest of all."""
        row: dict[str, Any] = {name: value / max(self.steps, 1) for name, value in self.others.items()}
        row.update({name: total / weight if weight else None for name, (total, weight) in self.metrics.items()})
        if self.expert_load is not None:
            loads = [[round(count * len(layer) / max(sum(layer), 1.0), 3) for count in layer] for layer in self.expert_load]
            row.update(
                expert_load=loads, expert_load_max=max(max(layer) for layer in loads), expert_load_min=min(min(layer) for layer in loads)
            )
        return row


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    # Only "\n" ends a row (samples may hold U+2028, where splitlines cuts), and a crash may cut a row inside a character.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, batches: list[Batch], byte_lengths: torch.Tensor, device: str) -> dict[str, float]:
    """val_loss (nats per learned token) and val_bpb (bits per UTF-8 byte of those tokens)."""
    model.eval()
    nats = tokens = size = 0.0
    for batch in batches[parallel.rank() :: parallel.size()]:
        nats += sum(by_halves(batch, lambda part: float(model(**part.to(device).inputs).loss_sum)))
        tokens += batch.weights["tokens"]
        size += float(byte_lengths[_predicted_labels(batch.inputs)].sum())
    model.train()
    nats, tokens, size = parallel.summed([nats, tokens, size])
    if not tokens:
        return {}
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / max(size, 1.0)}


@torch.no_grad()
def held_out_terms(model: torch.nn.Module, batches: Iterable[Batch], loss_fn: LossFunction, device: str) -> dict[str, float]:
    """What a stage's loss function says of held-out batches: `val_loss` and its other terms and metrics, each over its weight."""
    model.eval()
    totals: dict[tuple[str, str], float] = {}
    weights: dict[str, float] = {}
    count = parallel.size()
    for number, batch in enumerate(batches):
        mine = number % count == parallel.rank() % count
        if not mine and number:  # every process computes the first, to know what terms there are
            parts = []
        else:
            parts = by_halves(batch, lambda part: [(term.name, term.weight, float(term.total)) for term in loss_fn(model, part.to(device))])
        for name, weight in {**batch.weights, "micro_batches": float(len(parts))}.items():
            weights[name] = weights.get(name, 0.0) + weight * mine
        for name, divisor, total in (term for part in parts for term in part):
            totals[name, divisor] = totals.get((name, divisor), 0.0) + total * mine
    model.train()
    sums = parallel.summed([*totals.values(), *weights.values()])
    totals, weights = dict(zip(totals, sums, strict=False)), dict(zip(weights, sums[len(totals) :], strict=True))
    return {f"val_{name}": total / weights[weight] for (name, weight), total in totals.items() if weights[weight]}


def _predicted_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels, segments = inputs["labels"][:, 1:], inputs["segment_ids"]
    return labels[(labels != IGNORE) & (segments[:, 1:] == segments[:, :-1])].cpu()


@dataclass
class BitsPerByte:
    """Sums over documents; `bpb` is their quotient."""

    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def bpb(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None


@torch.inference_mode()
def bits_per_byte(model: SmartHaoAI, tokenizer: BPETokenizer, texts: Iterable[str], context: int, stride: int | None = None) -> BitsPerByte:
    """Bits per UTF-8 byte of texts, each on its own, whatever the tokenizer.

    A window's input is at most `context` tokens. With stride = context every window begins with the token that documents begin
    with, which is not scored, and scores `context` tokens; with a smaller stride a window scores its last `stride` tokens and sees the ones
    before. Every token of a text is scored exactly once. Raises ValueError for a context the model does not have.
    """
    stride = context if stride is None else stride
    limit = model.config.max_position_embeddings
    if not 1 <= stride <= context <= limit:
        raise ValueError(f"--stride {stride} and --context {context} must satisfy 1 <= stride <= context <= {limit} (the model's)")
    total = BitsPerByte()
    waiting: list[tuple[list[int], list[int]]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        total.bytes += len(text.encode("utf-8"))
        total.tokens += len(ids)
        sequence = [*tokenizer.document_start(), *ids]
        for window in _windows(sequence, context, stride):
            waiting.append(window)
            if len(waiting) == EVALUATION_ROWS * 8:
                total.nats += _score(model, waiting, tokenizer.pad_token_id)
                waiting = []
    total.nats += _score(model, waiting, tokenizer.pad_token_id)
    return total


def _windows(sequence: list[int], context: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """(input, labels) pairs: labels hold the tokens that this window scores, at the position that predicts them."""
    inputs, targets = sequence[:-1], sequence[1:]
    start = 0
    while start < len(targets):
        stop = min(start + (context if start == 0 else stride), len(targets))
        begin = start if stride == context else max(0, stop - context)
        window = inputs[begin:stop]
        if stride == context:
            window[0] = sequence[0]
        yield window, [IGNORE] * (start - begin) + targets[start:stop]
        start = stop


def _score(model: SmartHaoAI, windows: list[tuple[list[int], list[int]]], pad_id: int) -> float:
    """Sum of nats over the windows' labels. Windows of like length share a batch."""
    windows = sorted(windows, key=lambda w: len(w[0]))
    nats = 0.0
    for start in range(0, len(windows), EVALUATION_ROWS):
        part = windows[start : start + EVALUATION_ROWS]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([i + [pad_id] * (longest - len(i)) for i, _ in part], device=model.device)
        targets = torch.tensor([t + [IGNORE] * (longest - len(t)) for _, t in part], device=model.device)
        nats -= float(model.position_log_probs(ids, targets).double().sum())
    return nats


def write_report(out_dir: Path, title: str, facts: dict[str, Any], samples: list[tuple[str, str]], seconds: float) -> None:
    """report.md: what was trained, on what, how it went, and a few samples."""
    lines = [f"# {title}", "", f"Finished {time.strftime('%Y-%m-%d %H:%M')}, {seconds / 60:.1f} minutes of training.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    if samples:
        lines += ["", "## Samples", ""]
        for prompt, answer in samples:
            lines += [f"**{prompt}**", "", "```text", answer.strip(), "```", ""]
    atomic_write_text(out_dir / "report.md", "\n".join(lines) + "\n")
