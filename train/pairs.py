"""Batches of answers in twos: the pairs of preference data, or judged answers with their mismatched partner (`train.documents`).

Several sequences are packed in a row as segments. Counted over rows and segments in row-major order, sequences 2i and 2i + 1 of a
batch are a pair. Shapes: S sequences, S/2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data import Batch, Documents, FittedBlocks, Row, collate
from train.losses import Term
from train.packing import Piece, fit_pairs
from train.store import TokenStore

KEPT_PROMPT = 16  # tokens of a prompt that is too long that must be left; a shorter prompt must be whole
EXAMPLES = 3


class PackedPairs(FittedBlocks):
    """Whole pairs fitted into rows. Of a pair longer than a row the prompt loses its beginning, the same for both answers; a pair
    whose answer does not fit is left out.

    Rows come in twos, because a pair may need two: `batch_size` is rounded up to an even number. Batches have the weights "pairs"
    and "tokens" (of the answers; of judged ones without the mismatched), judged ones also "wanted" and "unwanted". In `extra`:
    "documents" (S,) the numbers of the sequences in the store; of pairs "margins" (S/2,), of judged answers "wanted" (S/2,) bool.
    Raises ValueError when no pair fits.
    """

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
        super().__init__(Documents(store, split, seed, group=2), max(1, (batch_size + 1) // 2), seed)
        self.batch_size = batch_size
        self.store, self.split_name = store, split
        self.max_length, self.pad_id, self.judged = max_length, pad_id, store.kind == "judged"
        self.units_per_step = max(1, ((rows_per_step or batch_size) + 1) // 2)
        self.cuts = self._survey(log)

    def next_batch(self, progress: float = 1.0) -> Batch:
        """`progress` changes nothing here."""
        return self._batch(self.next_units())

    def one_pass(self) -> Iterator[Batch]:
        """The first epoch, in the batches in which `next_batch` gives it; the last may be smaller."""
        return self._batches(self.units(0, block) for block in range(self.blocks(0)))

    def first_batches(self, tokens: int) -> list[Batch]:
        """Batches of about `tokens` tokens of `one_pass`: the same in every evaluation."""
        batches: list[Batch] = []
        for batch in self.one_pass():
            batches.append(batch)
            if sum(b.real for b in batches) >= tokens:
                break
        return batches

    def every_pair(self) -> Iterator[Batch]:
        """The first epoch, then the pairs that only other epochs read (of sources with a weight below 1)."""
        yield from self.one_pass()
        others = np.setdiff1d(np.arange(len(self.cuts)), self.documents.order(0))
        random = np.random.default_rng(0)
        parts = (others[i : i + self.block_size] for i in range(0, len(others), self.block_size))
        yield from self._batches(self.compose(part, random) for part in parts)

    def _batches(self, blocks: Iterable[list[list[list[Piece]]]]) -> Iterator[Batch]:
        units: list[list[list[Piece]]] = []
        for block in blocks:
            units += block
            while len(units) >= self.units_per_batch:
                yield self._batch(units[: self.units_per_batch])
                units = units[self.units_per_batch :]
        if units:
            yield self._batch(units)

    def rows_per_epoch(self) -> float:
        """Estimated from how the first block fits; in rows of an uneven batch_size, whose batches hold one more."""
        rows = sum(len(unit) for unit in self.units(0, 0)) * self.batch_size / (2 * self.units_per_batch)
        there = int((self.cuts[self.documents.order(0)[: self.block_size]] >= 0).sum())
        pairs = sum(weight * float((self.cuts[start:stop] >= 0).sum()) for (start, stop), weight in self.documents.ranges)
        return pairs * rows / max(there, 1)

    def compose(self, documents: np.ndarray, random: np.random.Generator) -> list[list[list[Piece]]]:
        pairs = [self._pieces(int(pair)) for pair in documents if self.cuts[pair] >= 0]
        return fit_pairs(pairs, self.max_length, self.units_per_step, random)

    def _pieces(self, pair: int) -> tuple[Piece, Piece]:
        cut = int(self.cuts[pair])
        first, second = (int(n) for n in self.documents.split.lengths[2 * pair : 2 * pair + 2])
        # What is only measured with may be shorter.
        return (2 * pair, cut, first), (2 * pair + 1, cut, min(second, cut + self.max_length) if self.judged else second)

    def _batch(self, units: list[list[list[Piece]]]) -> Batch:
        rows, documents, learned, held = [], [], [], []
        for pieces in (row for unit in units for row in unit):
            row = Row()
            held.append(len(pieces))
            for document, start, stop in pieces:
                row.add(self.documents.split.tokens(document, start, stop), self.documents.split.mask(document, start, stop))
                documents.append(document)
                learned.append(int(row.masks[-1].sum()))
            rows.append(row)
        batch = collate(rows, self.pad_id, limit=self.max_length)
        values = self.documents.split.values
        assert values is not None
        batch.extra["documents"] = torch.tensor(documents)
        batch.weights["pairs"] = len(documents) / 2
        of_pairs = torch.from_numpy(np.asarray(values[np.asarray(documents[::2])]))
        if self.judged:
            batch.extra["wanted"] = of_pairs > 0
            batch.weights["wanted"] = float((of_pairs > 0).sum())
            batch.weights["unwanted"] = len(of_pairs) - batch.weights["wanted"]
            batch.weights["tokens"] = float(sum(learned[::2]))
        else:
            batch.extra["margins"] = of_pairs
            # A pair may lie in two rows, which are never torn apart: between them an odd number of sequences has been. Judged answers
            # are needed all together: the drift from the reference is estimated over them.
            before = np.cumsum([0, *held])
            batch.cuts = [row for row in range(1, len(rows)) if before[row] % 2 == 0]
            batch.entries = {"documents": held, "margins": np.diff(before // 2).tolist()}
        return batch

    def _survey(self, log: Callable[[str], object] | None) -> np.ndarray:
        """How many tokens the prompt of each pair loses, (pairs,); -1: the pair is left out."""
        split = self.documents.split
        lengths = split.lengths.reshape(-1, 2)
        cuts = np.zeros(len(lengths), dtype=np.int64)
        deciding = lengths[:, :1] if self.judged else lengths
        for pair in np.nonzero(deciding.max(axis=1) > self.max_length)[0]:
            cut = int(deciding[pair].max()) - self.max_length
            marks = [split.mask(2 * int(pair) + side) for side in range(deciding.shape[1])]
            prompts = [int(np.argmax(mask)) for mask in marks if mask is not None]
            cuts[pair] = cut if all(prompt - cut >= min(prompt, KEPT_PROMPT) for prompt in prompts) else -1
        cut_off, left_out = int((cuts > 0).sum()), np.nonzero(cuts < 0)[0]
        what = "answers" if self.judged else "pairs"
        where = ", ".join(self.store.where(self.split_name, 2 * int(pair)) for pair in left_out[:EXAMPLES])
        if len(left_out) == len(cuts):
            raise ValueError(
                f"none of the {len(cuts):,} {what} fits into data.max_length={self.max_length} with at least {KEPT_PROMPT} tokens of its "
                f"prompt ({where}{', ...' if len(cuts) > EXAMPLES else ''}); raise data.max_length"
            )
        if log is not None and (cut_off or len(left_out)):
            text = f"{what} longer than data.max_length={self.max_length}: {cut_off:,} lost the beginning of their prompt"
            if len(left_out):
                text += (
                    f", {len(left_out):,} left out because an answer does not fit ({where}{', ...' if len(left_out) > EXAMPLES else ''})"
                )
            log(text)
        return cuts


def share_right(margins: Tensor) -> Tensor:
    """1 where the preferred answer has the higher reward, half for a tie."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def pair_metrics(rewards: Tensor) -> list[Term]:
    """What is logged of a batch's pairs, from the rewards (S,) of all answers, the preferred ones at even places."""
    chosen, rejected = rewards.detach()[::2], rewards.detach()[1::2]
    values = {
        "accuracy": share_right(chosen - rejected),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    return [Term(name, value.sum(), "pairs", metric=True) for name, value in values.items()]


def pair_source(
    store: TokenStore, settings: Any, pad_id: int, split: str = "train", log: Callable[[str], object] | None = None
) -> PackedPairs:
    """The pairs of a store of kind "preference" or "judged", by a stage's settings."""
    data, train = settings.data, settings.train
    rows_per_step = train.batch_size * train.accumulation_steps
    return PackedPairs(store, train.batch_size, data.max_length, pad_id, train.seed, rows_per_step, split, log)
