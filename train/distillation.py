"""Distillation: what a teacher finds likely next, and how far a student is from it, without ever storing all logits.

A teacher is run along with the student, or its `top_k` most probable tokens (and the probability of all others together) are kept on
disk. The cache is found by the content of a document, so that packing, shuffling and other students find it again. Shapes: N
labelled tokens, C channels, V vocabulary, k kept tokens.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint import find_model
from model.cross_entropy import IGNORE, ROW_MULTIPLE, ScaledGradients, capped, compute_dtype, labelled
from model.files import writing
from model.tokenizer import THINK, THINK_END, BPETokenizer
from model.transformer import SmartHaoAI
from train.checkpoints import model_digest
from train.data import Batch, BatchSource
from train.losses import Term, forward_kl, lm_terms, reverse_kl, topk_forward_kl, topk_logs, topk_reverse_kl

if TYPE_CHECKING:
    from train.config import DistillConfig

CHUNK = 256  # rows of logits held at once; student, teacher and their gradients all are
NEVER = -1e4  # log-probability of what cannot happen: fits into fp16, and its exponential is 0
RowLosses = Callable[[Tensor, slice], Tensor]
"""Logits (n, V) of some rows, and which of the N rows they are -> losses (n,)."""


# ---------------------------------------------------------------- the loss


def linear_row_loss(hidden: Tensor, weight: Tensor, softcap: float, row_losses: RowLosses, row_weights: Tensor | None = None) -> Tensor:
    """sum_n w_n * row_losses(logits_n), a scalar, for logits = hidden (N, C) @ weight (V, C).T, capped by `softcap` (0: not).

    The logits are fp32 (products in the autocast type), made for CHUNK rows at a time; both gradients are computed in the forward pass
    and only scaled in backward. row_weights (N,) or None for ones. Differentiable once in hidden and weight.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearRowLoss.apply(hidden, weight, softcap, row_losses, row_weights)


class _LinearRowLoss(ScaledGradients):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, softcap: float, row_losses: RowLosses, row_weights: Tensor | None) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = compute_dtype(hidden)
        precise = torch.promote_types(dtype, torch.float32)
        head = weight.to(dtype)
        total = torch.zeros((), device=hidden.device, dtype=precise)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, device=weight.device, dtype=precise) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks(len(hidden)):
                count = len(hidden[part])
                rows = F.pad(hidden[part].to(dtype), (0, 0, 0, -count % ROW_MULTIPLE))
                logits = (rows @ head.T).to(precise)
                with torch.enable_grad():
                    logits = logits.requires_grad_(needs_hidden or needs_weight)
                    losses = row_losses(capped(logits[:count], softcap), part)
                    loss = (losses if row_weights is None else losses * row_weights[part]).sum()
                total += loss.detach()
                if not logits.requires_grad:
                    continue
                gradient = torch.autograd.grad(loss, logits)[0].to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (gradient @ head)[:count].to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += gradient.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total


def chunks(count: int) -> Iterator[slice]:
    """`count` rows in runs of CHUNK."""
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def distillation_loss(settings: DistillConfig, teacher: Teacher | CachedTeacher) -> Callable[[nn.Module, Batch], list[Term]]:
    """The loss of `fit`: alpha * temperature^2 * KL to the teacher + (1 - alpha) * cross-entropy, per labelled token.

    The factor temperature^2 keeps the two in proportion when the temperature changes (Hinton et al., 2015). The metrics are the KL
    (at the temperature, without the factor) and the cross-entropy.
    """

    def loss(model: nn.Module, batch: Batch) -> list[Term]:
        out = model(**batch.inputs, output_hidden_states=True)
        hard, *others = lm_terms(out)
        student: Any = model
        states, chosen = _predicting_states(out.hidden_states, batch)
        compare = teacher.compare(batch, settings.kind)
        weights = batch.inputs.get("token_weights")
        row_weights = None if weights is None else weights.flatten()[chosen + 1]
        # A vocabulary may be padded with ids that stand for nothing, by each model to another size.
        head = student.head_weight[: teacher.vocab_size]
        kl = linear_row_loss(states, head, student.config.logit_softcap, compare, row_weights)
        total = settings.alpha * settings.temperature**2 * kl + (1 - settings.alpha) * hard.total
        return [
            Term("loss", total, "tokens"),
            *others,
            Term("kl", kl.detach(), "tokens", metric=True),
            Term("hard_loss", hard.total.detach(), "tokens", metric=True),
        ]

    return loss


def _predicting_states(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The states (N, C) from which the labelled tokens are predicted, and their positions (N,) in the B * T of the batch."""
    labels = batch.inputs["labels"]
    chosen, _ = labelled(labels, batch.inputs.get("segment_ids"), labels.shape[1])
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen), chosen


# ---------------------------------------------------------------- teachers


class Teacher:
    """A frozen model, run on each batch in evaluation mode."""

    def __init__(self, model: SmartHaoAI, vocab_size: int, temperature: float) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size, self.temperature = vocab_size, temperature

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(N, C) of its hidden states at the labelled tokens."""
        ids = batch.inputs["input_ids"]
        hidden = self.model.to(ids.device).hidden_states(ids, segment_ids=batch.inputs.get("segment_ids"))
        return _predicting_states(hidden, batch)[0]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """(n, V) fp32 of states (n, C)."""
        head = self.model.head_weight[: self.vocab_size].to(states.dtype)
        rows = F.pad(states, (0, 0, 0, -len(states) % ROW_MULTIPLE))
        return capped((rows @ head.T)[: len(states)].float(), self.model.config.logit_softcap)

    def compare(self, batch: Batch, kind: str) -> RowLosses:
        """The divergence of a student's logits at the labelled tokens of `batch` from this teacher's."""
        states = self.states(batch)
        divergence = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[kind]
        return lambda logits, part: divergence(logits, self.logits(states[part]), self.temperature)


class CachedTeacher:
    """The `top_k` most probable tokens of a teacher, read from `folder`; the teacher is loaded for what is not there yet.

    Kept is, for each document (or the piece of it that stands in a row) and each of its labelled tokens: k ids and the k + 1
    log-probabilities of `topk_logs` in fp16. Every process appends to a file of its own, so that several may share a folder; a
    record that was cut off is ignored.
    """

    def __init__(self, folder: Path, load: Callable[[], Teacher], vocab_size: int, temperature: float, top_k: int) -> None:
        self.folder, self.vocab_size, self.temperature, self.top_k = folder, vocab_size, temperature, top_k
        self._load = load
        self._teacher: Teacher | None = None
        self._id_type = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._own = folder / f"{uuid.uuid4().hex}.bin"
        self._places: dict[bytes, tuple[Path, int]] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.bin")):
            self._scan(file)

    def __len__(self) -> int:
        """Documents in the cache."""
        return len(self._places)

    def compare(self, batch: Batch, kind: str) -> RowLosses:
        """As `Teacher.compare`, against the kept tokens."""
        ids, logs = self.top(batch)
        divergence = {"forward_kl": topk_forward_kl, "reverse_kl": topk_reverse_kl}[kind]
        return lambda logits, part: divergence(logits, ids[part], logs[part], self.temperature)

    def top(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids (N, k) and log-probabilities (N, k + 1) of the labelled tokens of a batch."""
        documents = labelled_documents(batch)
        if not documents:
            device = batch.inputs["labels"].device
            return torch.zeros(0, self.top_k, dtype=torch.long, device=device), torch.zeros(0, self.top_k + 1, device=device)
        if any(digest not in self._places for digest, _ in documents):
            self._append(batch, documents)
        found = [self._read(digest, count) for digest, count in documents]
        device = batch.inputs["labels"].device
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in found]).astype(np.int64)).to(device)
        logs = torch.from_numpy(np.concatenate([logs for _, logs in found]).astype(np.float32)).to(device)
        return ids, logs.log_softmax(dim=-1)  # fp16 rounded each of them: they add up to 1 again

    def _append(self, batch: Batch, documents: list[tuple[bytes, int]]) -> None:
        if self._teacher is None:
            self._teacher = self._load()
        states = self._teacher.states(batch)
        ids, logs = [], []
        for part in chunks(len(states)):
            logits = self._teacher.logits(states[part])
            ids.append(logits.topk(self.top_k, dim=-1).indices)
            logs.append(topk_logs(logits, ids[-1], self.temperature).clamp(min=NEVER))
        all_ids = torch.cat(ids).cpu().numpy().astype(self._id_type)
        all_logs = torch.cat(logs).cpu().numpy().astype("<f2")
        start = 0
        with writing(self._own), open(self._own, "ab") as file:
            for digest, count in documents:
                if digest not in self._places:
                    self._places[digest] = (self._own, file.tell())
                    file.write(digest + np.array(count, dtype="<u4").tobytes())
                    file.write(all_ids[start : start + count].tobytes() + all_logs[start : start + count].tobytes())
                start += count

    def _read(self, digest: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
        path, place = self._places[digest]
        with open(path, "rb") as file:
            file.seek(place + HEADER)
            ids = np.frombuffer(file.read(count * self.top_k * self._id_type.itemsize), dtype=self._id_type)
            logs = np.frombuffer(file.read(count * (self.top_k + 1) * 2), dtype="<f2")
        return ids.reshape(count, self.top_k), logs.reshape(count, self.top_k + 1)

    def _scan(self, path: Path) -> None:
        """Note where each whole record of a file begins."""
        size = path.stat().st_size
        with open(path, "rb") as file:
            place = 0
            while len(header := file.read(HEADER)) == HEADER:
                count = int(np.frombuffer(header[DIGEST:], dtype="<u4")[0])
                after = place + HEADER + count * (self.top_k * self._id_type.itemsize + (self.top_k + 1) * 2)
                if count == 0 or after > size:
                    return
                self._places[header[:DIGEST]] = (path, place)
                place = after
                file.seek(place)


DIGEST = 16
HEADER = DIGEST + 4


def labelled_documents(batch: Batch) -> list[tuple[bytes, int]]:
    """(digest, labelled tokens) of the documents of a batch that have any, in the order in which `labelled` lists their tokens."""
    ids, labels, segments = (batch.inputs[name].cpu().numpy() for name in ("input_ids", "labels", "segment_ids"))
    found = []
    for row in range(len(ids)):
        starts = np.flatnonzero(np.diff(segments[row], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], segments.shape[1]], strict=True):
            count = int((labels[row, start + 1 : stop] != IGNORE).sum())
            if count:
                words = ids[row, start:stop].tobytes() + labels[row, start:stop].tobytes()
                found.append((hashlib.blake2b(words, digest_size=DIGEST).digest(), count))
    return found


def cache_folder(store_dir: str | Path, teacher_dir: str | Path, size: int, temperature: float, top_k: int) -> Path:
    """Where the distributions of a teacher are kept: found by the bytes of its weights, the number of tokens that it shares with the
    student, the temperature and k."""
    return Path(store_dir) / f"teacher-{model_digest(teacher_dir)}-v{size}-k{top_k}-t{temperature:g}"


# ---------------------------------------------------------------- vocabulary and structure


def shared_vocabulary(student: BPETokenizer, teacher_dir: str | Path) -> None:
    """Raises ValueError unless the teacher's tokenizer gives every token the same id."""
    teacher = BPETokenizer.from_pretrained(find_model(teacher_dir))
    if different := student.first_difference(teacher):
        raise ValueError(
            f"the teacher {teacher_dir} has another vocabulary than the student ({teacher.vocab_size:,} tokens against "
            f"{student.vocab_size:,}; the first difference is id {different[0]}, {different[1]!r}): use the teacher's tokenizer "
            f"(tokenizer_dir={teacher_dir}), or learn from texts that the teacher wrote (teacher_dir=none)"
        )


def structure_ids(tokenizer: BPETokenizer) -> list[int]:
    """The tokens that give an answer its structure, as far as the vocabulary has them: the thinking tags, tool calls, turn ends."""
    tags = (THINK, THINK_END, "<answer>", "</answer>", "<tool_call>", "</tool_call>")
    found = [tokenizer.token_id(tag) for tag in tags]
    return sorted({tokenizer.eos_token_id, *(token for token in found if token is not None)})


class WeightedStructure:
    """A batch source in which the labels `ids` count `weight` times; the loss stays a mean: it is divided by the sum of the weights."""

    def __init__(self, source: BatchSource, ids: list[int], weight: float) -> None:
        self.source, self.ids, self.weight = source, torch.tensor(ids), weight

    def next_batch(self, progress: float = 1.0) -> Batch:
        batch = self.source.next_batch(progress)
        labels = batch.inputs["labels"]
        weights = torch.where(torch.isin(labels, self.ids), self.weight, 1.0)
        chosen, _ = labelled(labels, batch.inputs.get("segment_ids"), labels.shape[1])
        batch.inputs["token_weights"] = weights
        batch.weights["tokens"] = float(weights.flatten()[chosen + 1].double().sum())
        return batch

    def rows_per_epoch(self) -> float:
        return self.source.rows_per_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)
