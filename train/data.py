"""From a token store to batches: deterministic shuffling, packing without padding, and a cursor that resumes exactly.

Pretraining cuts the shuffled stream of documents into rows; conversations are fitted whole into rows. Tokens of a row see
only their own document (`segment_ids`). Shapes: B rows, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from train.packing import Piece, fit_rows
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
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What only the loss reads: values per sequence or token (reference log-probabilities, advantages, token weights ...)."""
    group: int = 0
    """Rows that have to be computed together: 1 where each stands for itself; 0: all of them."""
    cuts: list[int] | None = None
    """Rows before which it may be divided, in order; None: as `group` says."""
    entries: dict[str, list[int]] = field(default_factory=dict)
    """How many values each row has in an `extra`, where that is not one; they stand in the order of the rows."""

    def split(self, rows: int) -> list[Batch]:
        """The same in about equal pieces of at most `rows` rows, or of what has to stay together, whose `weights`, `positions` and `real`
        are those of the whole."""
        ends = self.boundaries()
        count = ends[-1]
        equal = -(-count // -(-count // rows))
        pieces, start = [], 0
        while start < count:
            later = [end for end in ends if end > start]
            fitting = [end for end in later if end <= start + rows] or later[:1]
            stop = next((end for end in fitting if end >= start + equal), fitting[-1])
            pieces.append(self.rows(start, stop))
            start = stop
        return pieces

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) alone, with the weights of all."""
        if (start, stop) == (0, len(self.inputs["input_ids"])):
            return self
        inputs = {name: value[start:stop] for name, value in self.inputs.items()}
        extra = {}
        for name, value in self.extra.items():
            counts = self.entries.get(name)
            first, last = (start, stop) if counts is None else (sum(counts[:start]), sum(counts[:stop]))
            extra[name] = value[first:last] if value.dim() else value
        entries = {name: counts[start:stop] for name, counts in self.entries.items()}
        cuts = None if self.cuts is None else [row - start for row in self.cuts if start < row < stop]
        return replace(self, inputs=inputs, extra=extra, entries=entries, cuts=cuts)

    def boundaries(self) -> list[int]:
        """Where parts may begin and end: 0, the rows of `cuts`, and the number of rows."""
        count = len(self.inputs["input_ids"])
        inner = range(self.group, count, self.group) if self.cuts is None and self.group else self.cuts or []
        return [0, *inner, count]

    def to(self, device: str) -> Batch:
        if device == "cpu":
            return self
        inputs, extra = ({k: v.to(device, non_blocking=True) for k, v in part.items()} for part in (self.inputs, self.extra))
        return replace(self, inputs=inputs, extra=extra)


class BatchSource(Protocol):
    """An endless, resumable supply of batches. What it may also tell before the first one: `group` of its batches, and `same_shapes`.
    `renew()`, where it is there, is called when the run went back to older weights."""

    def next_batch(self, progress: float) -> Batch:
        """`progress` in [0, 1] is how much of the run is done; curricula follow it."""
        ...

    def rows_per_epoch(self) -> float: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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


class Documents:
    """The order of documents: a permutation per epoch; a source's weight is how often an epoch reads each of its documents.

    group: documents that stay together (a pair); it is then their groups that are numbered and ordered.
    """

    def __init__(self, store: TokenStore, split: str, seed: int, group: int = 1) -> None:
        self.split: Split = getattr(store, split)
        ranges = [(source.ranges[split], source.weight) for source in store.sources]
        self.ranges = [((start // group, stop // group), weight) for (start, stop), weight in ranges]
        self._seed, self._group = seed, group
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
        lengths = self.split.lengths.reshape(-1, self._group).sum(axis=1)
        return float(sum(weight * lengths[start:stop].sum() for (start, stop), weight in self.ranges))


class PackedText:
    """Rows cut from the stream of shuffled documents: every position is real, documents may continue in the next row."""

    group = 1
    """As in its batches."""
    same_shapes = True
    """Batches have the shape of the first or of the last one of a run: worth compiling for."""

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
        self.documents = Documents(store, split, seed)
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
        return replace(collate([self._next_row(length) for _ in range(count)], self.pad_id, length), group=self.group)

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

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "offset": int(self.offset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
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


class FittedBlocks(ABC):
    """Documents are shuffled per epoch and fitted into units of rows, a block of them at a time; a cursor walks over the units."""

    block_size = BLOCK_DOCUMENTS

    def __init__(self, documents: Documents, units_per_batch: int, seed: int) -> None:
        self.documents, self.units_per_batch = documents, units_per_batch
        self.epoch = self.block = self.row = 0
        self._seed = seed
        self._fitted: tuple[int, int, list[Any]] | None = None

    @abstractmethod
    def compose(self, documents: np.ndarray, random: np.random.Generator) -> list[Any]:
        """The units of these documents, in order."""

    def next_units(self) -> list[Any]:
        """The units of the next batch."""
        taken: list[Any] = []
        while len(taken) < self.units_per_batch:
            units = self.units(self.epoch, self.block)
            if self.row < len(units):
                taken.append(units[self.row])
                self.row += 1
                continue
            self.block, self.row = self.block + 1, 0
            if self.block >= self.blocks(self.epoch):
                self.epoch, self.block = self.epoch + 1, 0
        return taken

    def blocks(self, epoch: int) -> int:
        return -(-len(self.documents.order(epoch)) // self.block_size)

    def units(self, epoch: int, block: int) -> list[Any]:
        if self._fitted is None or self._fitted[:2] != (epoch, block):
            documents = self.documents.order(epoch)[block * self.block_size : (block + 1) * self.block_size]
            random = np.random.Generator(np.random.Philox(key=[self._seed + 1, epoch * 1_000_003 + block]))
            self._fitted = (epoch, block, self.compose(documents, random))
        return self._fitted[2]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "block": self.block, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.block, self.row = state["epoch"], state["block"], state["row"]


class PackedConversations(FittedBlocks):
    """Whole conversations fitted into rows (exactly where possible, within blocks of documents); rows of like length share a batch."""

    group = 1

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
        super().__init__(Documents(store, split, seed), batch_size, seed)
        self.max_length, self.pad_id = max_length, pad_id
        self.rows_per_step = rows_per_step or batch_size
        self.kept_tokens, report = self._survey()
        if not self.kept_tokens:
            raise ValueError(f"no conversation has a learned token within data.max_length={max_length}; raise data.max_length")
        if log is not None and (text := report.text(max_length)):
            log(text)

    def next_batch(self, progress: float = 1.0) -> Batch:
        """`progress` changes nothing here."""
        rows: list[Row] = []
        for pieces in self.next_units():
            row = Row()
            for document, start, stop in pieces:
                row.add(self.documents.split.tokens(document, start, stop), self.documents.split.mask(document, start, stop))
            rows.append(row)
        return replace(collate(rows, self.pad_id, limit=self.max_length), group=self.group)

    def compose(self, documents: np.ndarray, random: np.random.Generator) -> list[list[Piece]]:
        pieces = [piece for document in documents for piece in self._pieces(int(document))]
        return fit_rows(pieces, self.max_length, self.rows_per_step, random)

    def _pieces(self, document: int, report: CutReport | None = None) -> list[Piece]:
        """(document, start, stop) of what is used of a conversation: all of it, or parts that fit, cut after an answer."""
        mask = self.documents.split.mask(document)
        assert mask is not None
        if len(mask) <= self.max_length:
            return [(document, 0, len(mask))]
        # An answer ends where the mask falls; the line end after it belongs to the turn.
        ends = np.nonzero((mask[:-1] == 1) & (mask[1:] == 0))[0] + 2
        ends = np.minimum(np.append(ends, len(mask)), len(mask))
        pieces: list[Piece] = []
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
