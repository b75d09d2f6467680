"""What a run leaves to read: metrics.jsonl, events.jsonl, loss.png, samples, report; and bits per byte."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.files import atomic_write_bytes, atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import IGNORE, SmartHaoAI
from train.data import Batch

EVALUATION_ROWS = 16


class MetricsLog:
    """Appends one JSON object per logged step to metrics.jsonl; mirrors numbers to TensorBoard when it is installed."""

    def __init__(self, out_dir: Path, from_step: int = 0) -> None:
        self.out_dir = out_dir
        out_dir.mkdir(parents=True, exist_ok=True)
        self.path, self.events_path = out_dir / "metrics.jsonl", out_dir / "events.jsonl"
        for path in (self.path, self.events_path):
            # What was logged after the checkpoint that a run resumes from will be logged again.
            kept = [row for row in read_jsonl(path) if row["step"] <= from_step]
            atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self.rows = read_jsonl(self.path)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=from_step)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._append(self.path, row)
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Something that happened once: a skipped step, a new plan, a sample."""
        self._append(self.events_path, {"step": step, "event": kind, **details})

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    @staticmethod
    def _append(path: Path, row: dict[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


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


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and held-out loss and the learning rate over tokens; False when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import io

    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.get("loss") is not None]
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    tokens = [row["tokens"] / 1e6 for row in rows]
    axis.plot(tokens, [row["loss"] for row in rows], color="tab:blue", linewidth=1.2, label="training loss")
    held = [(row["tokens"] / 1e6, row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if held:
        axis.plot(*zip(*held, strict=True), color="tab:orange", marker="o", markersize=3, linewidth=1.5, label="held-out loss")
    axis.set(xlabel="tokens seen (millions)", ylabel="cross-entropy (nats per token)", title=title)
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(tokens, [row["lr"] for row in rows], color="tab:green", linewidth=0.8, alpha=0.5, label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    lines = [*axis.get_lines(), *right.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    atomic_write_bytes(path, buffer.getvalue())
    return True


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, batches: list[Batch], byte_lengths: torch.Tensor, device: str) -> dict[str, float]:
    """val_loss (nats per learned token) and val_bpb (bits per UTF-8 byte of those tokens)."""
    model.eval()
    nats = tokens = size = 0.0
    for batch in batches:
        batch = batch.to(device)
        out = model(**batch.inputs)
        nats += float(out.loss_sum)
        tokens += batch.weights["tokens"]
        size += float(byte_lengths[_predicted_labels(batch.inputs)].sum())
    model.train()
    if not tokens:
        return {}
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / max(size, 1.0)}


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
