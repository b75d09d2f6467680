"""From a token store to batches: deterministic shuffling, packing without padding, and a cursor that resumes exactly.

Pretraining cuts the shuffled stream of documents into rows; conversations are fitted whole into rows. Tokens of a row see
only their own document (`segment_ids`). Shapes: B rows, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from train.store import Split, TokenStore

IGNORE = -100
BLOCK_DOCUMENTS = 2048  # conversations that are fitted into rows together
ROUND_TO = 8


@dataclass
class Batch:
    """One micro-batch. `inputs` are the model's arguments; `weights` what its loss terms are divided by, counted from the data."""

    inputs: dict[str, Tensor]
    weights: dict[str, float]
    positions: int
    """B * T."""
    real: int
    """Positions that hold a token of the data."""

    def to(self, device: str) -> Batch:
        if device == "cpu":
            return self
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}, self.weights, self.positions, self.real)


class BatchSource(Protocol):
    """An endless, resumable supply of batches."""

    def next_batch(self, progress: float) -> Batch:
        """`progress` in [0, 1] is how much of the run is done; curricula follow it."""
        ...

    def rows_per_epoch(self) -> float: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass
class Row:
    """Tokens of one row and the number of the document each belongs to (from 1; 0 is padding)."""

    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    length: int = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        self.ids.append(ids)
        self.masks.append(np.ones(len(ids), dtype=bool) if mask is None else mask.astype(bool))
        self.length += len(ids)


def collate(rows: list[Row], pad_id: int, length: int | None = None, limit: int | None = None) -> Batch:
    """Rows as one batch of `length`, or of the longest row's length rounded up to at most `limit`; with labels and segment numbers."""
    longest = max(row.length for row in rows)
    rounded = -(-longest // ROUND_TO) * ROUND_TO
    T = length or (rounded if limit is None else max(longest, min(rounded, limit)))
    ids = np.full((len(rows), T), pad_id, dtype=np.int64)
    labels = np.full((len(rows), T), IGNORE, dtype=np.int64)
    segments = np.zeros((len(rows), T), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens, mask = np.concatenate(row.ids).astype(np.int64), np.concatenate(row.masks)
        ids[index, : row.length] = tokens
        labels[index, : row.length] = np.where(mask, tokens, IGNORE)
        segments[index, : row.length] = np.repeat(np.arange(1, len(row.ids) + 1), [len(part) for part in row.ids])
    predicted = (labels[:, 1:] != IGNORE) & (segments[:, 1:] == segments[:, :-1])
    inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "segment_ids": torch.from_numpy(segments)}
    return Batch(inputs, {"tokens": float(predicted.sum())}, ids.size, sum(row.length for row in rows))


class _Documents:
    """The order of documents: a permutation per epoch; a source's weight is how often an epoch reads each of its documents."""

    def __init__(self, store: TokenStore, split: str, seed: int) -> None:
        self.split: Split = getattr(store, split)
        self.ranges = [(source.ranges[split], source.weight) for source in store.sources]
        self._seed = seed
        self._cached: tuple[int, np.ndarray] | None = None
        if len(self.split) == 0:
            raise ValueError(f"the {split} part of {store.folder} is empty")

    def order(self, epoch: int) -> np.ndarray:
        """Document numbers of one epoch, shuffled by (seed, epoch)."""
        if self._cached is None or self._cached[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            chosen = []
            for (start, stop), weight in self.ranges:
                whole, part = divmod(weight, 1.0)
                chosen += [np.arange(start, stop)] * int(whole)
                if part:
                    count = round(part * (stop - start))
                    chosen.append(start + random.permutation(stop - start)[:count])
            order = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
            if not len(order):
                raise ValueError("every data source has weight 0: nothing is left to train on")
            self._cached = (epoch, order[random.permutation(len(order))])
        return self._cached[1]

    def mean_tokens(self) -> float:
        """Tokens of one epoch."""
        lengths = self.split.lengths
        return float(sum(weight * lengths[start:stop].sum() for (start, stop), weight in self.ranges))


class PackedText:
    """Rows cut from the stream of shuffled documents: every position is real, documents may continue in the next row."""

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        max_length: int,
        pad_id: int,
        seed: int = 0,
        short_length: int = 0,
        short_share: float = 0.0,
        split: str = "train",
    ) -> None:
        self.documents = _Documents(store, split, seed)
        self.batch_size, self.max_length, self.pad_id = batch_size, max_length, pad_id
        self.short_length, self.short_share = short_length, short_share
        self.epoch = self.offset = 0
        self._starts: tuple[int, np.ndarray] | None = None

    def length_at(self, progress: float) -> int:
        return self.short_length if self.short_length and progress < self.short_share else self.max_length

    def next_batch(self, progress: float = 1.0) -> Batch:
        """Short rows come in proportionally larger number: the tokens of a batch stay the same."""
        length = self.length_at(progress)
        count = max(1, self.batch_size * self.max_length // length)
        return collate([self._next_row(length) for _ in range(count)], self.pad_id, length)

    def _next_row(self, length: int) -> Row:
        starts = self._stream()
        if starts[-1] - self.offset < length and self.offset > 0:
            # Less than a row is left. Which documents stand at the end differs from epoch to epoch, so none is always missed.
            self.epoch, self.offset = self.epoch + 1, 0
            starts = self._stream()
        order, row = self.documents.order(self.epoch), Row()
        position = int(np.searchsorted(starts, self.offset, side="right")) - 1
        while row.length < length and position < len(order):
            begin = self.offset - int(starts[position])
            ids = self.documents.split.tokens(order[position], begin, begin + length - row.length)
            row.add(ids, None)
            self.offset += len(ids)
            position += 1
        if self.offset >= starts[-1]:
            self.epoch, self.offset = self.epoch + 1, 0
        return row

    def _stream(self) -> np.ndarray:
        """Where each document of the epoch begins in the stream, and the stream's length, (N + 1,)."""
        if self._starts is None or self._starts[0] != self.epoch:
            lengths = self.documents.split.lengths[self.documents.order(self.epoch)]
            self._starts = (self.epoch, np.concatenate(([0], np.cumsum(lengths))))
        return self._starts[1]

    def rows_per_epoch(self) -> float:
        return self.documents.mean_tokens() / self.max_length

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "offset": int(self.offset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.offset = state["epoch"], state["offset"]


@dataclass
class CutReport:
    """What happened to conversations longer than the context."""

    between_turns: int = 0
    inside_prompt: int = 0
    inside_answer: int = 0
    dropped: int = 0

    def text(self, length: int) -> str | None:
        counts = {
            "cut between turns": self.between_turns,
            "lost the beginning of a prompt": self.inside_prompt,
            "lost the end of an answer": self.inside_answer,
            "left out, nothing to learn": self.dropped,
        }
        if not any(counts.values()):
            return None
        return f"conversations longer than data.max_length={length}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)


class PackedConversations:
    """Whole conversations fitted into rows (exactly where possible, within blocks of documents); rows of like length share a batch."""

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        max_length: int,
        pad_id: int,
        seed: int = 0,
        rows_per_step: int | None = None,
        split: str = "train",
        log: Callable[[str], object] | None = None,
    ) -> None:
        self.documents = _Documents(store, split, seed)
        self.batch_size, self.max_length, self.pad_id = batch_size, max_length, pad_id
        self.rows_per_step = rows_per_step or batch_size
        self.epoch = self.block = self.row = 0
        self._rows: tuple[int, int, list[list[tuple[int, int, int]]]] | None = None
        self._seed = seed
        self.kept_tokens, report = self._survey()
        if not self.kept_tokens:
            raise ValueError(f"no conversation has a learned token within data.max_length={max_length}; raise data.max_length")
        if log is not None and (text := report.text(max_length)):
            log(text)

    def next_batch(self, progress: float = 1.0) -> Batch:
        """`progress` changes nothing here."""
        rows: list[Row] = []
        while len(rows) < self.batch_size:
            pieces = self._block_rows()
            if self.row >= len(pieces):
                self._advance()
                continue
            row = Row()
            for document, start, stop in pieces[self.row]:
                row.add(self.documents.split.tokens(document, start, stop), self.documents.split.mask(document, start, stop))
            rows.append(row)
            self.row += 1
        return collate(rows, self.pad_id, limit=self.max_length)

    def _advance(self) -> None:
        self.block, self.row = self.block + 1, 0
        if self.block * BLOCK_DOCUMENTS >= len(self.documents.order(self.epoch)):
            self.epoch, self.block = self.epoch + 1, 0

    def _block_rows(self) -> list[list[tuple[int, int, int]]]:
        if self._rows is None or self._rows[:2] != (self.epoch, self.block):
            order = self.documents.order(self.epoch)[self.block * BLOCK_DOCUMENTS : (self.block + 1) * BLOCK_DOCUMENTS]
            pieces = [piece for document in order for piece in self._pieces(int(document))]
            random = np.random.Generator(np.random.Philox(key=[self._seed + 1, self.epoch * 1_000_003 + self.block]))
            self._rows = (self.epoch, self.block, fit_rows(pieces, self.max_length, self.rows_per_step, random))
        return self._rows[2]

    def _pieces(self, document: int, report: CutReport | None = None) -> list[tuple[int, int, int]]:
        """(document, start, stop) of what is used of a conversation: all of it, or parts that fit, cut after an answer."""
        mask = self.documents.split.mask(document)
        assert mask is not None
        if len(mask) <= self.max_length:
            return [(document, 0, len(mask))]
        # An answer ends where the mask falls; the line end after it belongs to the turn.
        ends = np.nonzero((mask[:-1] == 1) & (mask[1:] == 0))[0] + 2
        ends = np.minimum(np.append(ends, len(mask)), len(mask))
        pieces: list[tuple[int, int, int]] = []
        start, prompt_cut, answer_cut = 0, False, False
        while start < len(mask):
            fitting = ends[(ends > start) & (ends <= start + self.max_length)]
            if len(fitting):
                begin, stop = start, int(fitting[-1])
                after = stop
            else:
                after = int(ends[ends > start][0])
                begin, stop = _cut_long_turn(mask, start, after, self.max_length)
                learned = mask[start:after].any()
                prompt_cut |= bool(learned) and stop == after
                answer_cut |= bool(learned) and stop < after
            if mask[begin:stop].any():
                pieces.append((document, begin, stop))
            start = after
        if report is not None:
            report.dropped += not pieces
            report.inside_answer += answer_cut
            report.inside_prompt += prompt_cut and not answer_cut
            report.between_turns += bool(pieces) and not (answer_cut or prompt_cut)
        return pieces

    def _survey(self) -> tuple[int, CutReport]:
        """Tokens of an epoch after cutting, and what was cut."""
        report = CutReport()
        kept = self.documents.mean_tokens()
        lengths = self.documents.split.lengths
        for (first, last), weight in self.documents.ranges:
            for document in first + np.nonzero(lengths[first:last] > self.max_length)[0]:
                kept -= weight * (lengths[document] - sum(stop - start for _, start, stop in self._pieces(int(document), report)))
        return int(kept), report

    def rows_per_epoch(self) -> float:
        return self.kept_tokens / self.max_length

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "block": self.block, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.block, self.row = state["epoch"], state["block"], state["row"]


def fit_rows(pieces: list[tuple[int, int, int]], length: int, group: int, random: np.random.Generator) -> list[list[tuple[int, int, int]]]:
    """Fit whole pieces into rows of `length` tokens, with as little left free as possible.

    A row begins with the longest piece left; one piece or two that fill the rest exactly close it, until then the longest that
    fits is added. Rows of like fill are neighbours in groups of `group` (the rows of one optimiser step), the groups are shuffled.
    """
    by_size: dict[int, list[tuple[int, int, int]]] = {}
    for piece in pieces:
        by_size.setdefault(piece[2] - piece[1], []).append(piece)
    sizes = sorted(by_size)

    def take(size: int) -> tuple[int, int, int]:
        piece = by_size[size].pop()
        if not by_size[size]:
            del by_size[size]
            sizes.pop(bisect_left(sizes, size))
        return piece

    rows: list[tuple[int, list[tuple[int, int, int]]]] = []
    while sizes:
        free = length - sizes[-1]
        row = [take(sizes[-1])]
        while sizes and sizes[0] <= free:
            smaller = _exact_pair(by_size, sizes, free)
            size = free if free in by_size else smaller or sizes[bisect_right(sizes, free) - 1]
            row.append(take(size))
            free -= size
        rows.append((free, row))
    rows.sort(key=lambda r: r[0])
    groups = [rows[i : i + group] for i in range(0, len(rows), group)]
    return [row for g in random.permutation(len(groups)) for _, row in groups[g]]


def _exact_pair(by_size: dict[int, list[tuple[int, int, int]]], sizes: list[int], total: int) -> int | None:
    """The smaller of two sizes that add up to `total`, when there are two such pieces."""
    for size in sizes[: bisect_right(sizes, total // 2)]:
        if total - size in by_size and (2 * size != total or len(by_size[size]) > 1):
            return size
    return None


def _cut_long_turn(mask: np.ndarray, start: int, after: int, length: int) -> tuple[int, int]:
    """Which `length` tokens of the turn [start, after) to keep: its end when the answer fits, else the answer's beginning with
    a quarter of the row for what it answers."""
    learned = start + np.nonzero(mask[start:after])[0]
    if not len(learned) or learned[-1] + 1 - learned[0] < length:
        return after - length, after
    begin = max(start, int(learned[0]) - length // 4)
    return begin, begin + length


def evaluation_batches(source: PackedText | PackedConversations, tokens: int) -> list[Batch]:
    """About `tokens` tokens of a held-out source, at most one pass over it, the same in every evaluation."""
    batches: list[Batch] = []
    while sum(batch.real for batch in batches) < tokens:
        batch = source.next_batch(1.0)
        if source.epoch > 0 and batches:
            break
        batches.append(batch)
    return batches


def make_source(
    store: TokenStore, settings: Any, pad_id: int, split: str = "train", log: Callable[[str], object] | None = None
) -> PackedText | PackedConversations:
    """The batch source of a stage's settings."""
    data, train = settings.data, settings.train
    if store.kind == "sft":
        return PackedConversations(
            store, train.batch_size, data.max_length, pad_id, train.seed, train.batch_size * train.accumulation_steps, split, log
        )
    short = data.short_length if split == "train" else 0
    return PackedText(store, train.batch_size, data.max_length, pad_id, train.seed, short, data.short_share, split)
