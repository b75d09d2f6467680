"""Fitting whole sequences into rows of a fixed length, with as little left free as possible."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Piece = tuple[int, int, int]
"""(document, start, stop): the tokens [start, stop) of a document."""
Anything = TypeVar("Anything")


def fit_rows(pieces: list[Piece], length: int, group: int, random: np.random.Generator) -> list[list[Piece]]:
    """Rows of at most `length` tokens that hold every piece whole.

    A row begins with the longest piece left; one piece or two that fill the rest exactly close it, until then the longest that
    fits is added. Rows of like fill are neighbours in groups of `group` (the rows of one optimiser step), the groups are shuffled.
    """
    return _in_shuffled_groups(_Pool(pieces).rows(length), group, random)


def fit_pairs(pairs: Sequence[tuple[Piece, Piece]], length: int, group: int, random: np.random.Generator) -> list[list[list[Piece]]]:
    """Pairs of pieces in units of one or two rows, in which the two pieces of a pair follow each other in row-major order.

    A pair that fits is in one row. Of one that does not, the first piece ends a unit's first row and the second begins the other; what
    they leave free is filled with shorter pairs. group: units of one optimiser step, as in `fit_rows`.
    """

    def size(pair: tuple[Piece, Piece]) -> int:
        return sum(stop - start for _, start, stop in pair)

    pool = _Pool([(number, 0, size(pair)) for number, pair in enumerate(pairs) if size(pair) <= length])

    def whole(filled: list[Piece]) -> list[Piece]:
        return [piece for number, _, _ in filled for piece in pairs[number]]

    units: list[tuple[int, list[list[Piece]]]] = []
    for pair in sorted((pair for pair in pairs if size(pair) > length), key=size, reverse=True):
        free = [length - (stop - start) for _, start, stop in pair]
        before, after = pool.fill(free[0]), pool.fill(free[1])
        left = sum(free) - sum(stop for _, _, stop in before + after)
        units.append((left, [[*whole(before), pair[0]], [pair[1], *whole(after)]]))
    rest = sorted(pool.rows(length), key=lambda row: row[0])
    for first in range(0, len(rest), 2):
        two = rest[first : first + 2]
        units.append((sum(free for free, _ in two), [whole(row) for _, row in two]))
    return _in_shuffled_groups(units, group, random)


def _in_shuffled_groups(items: list[tuple[int, Anything]], group: int, random: np.random.Generator) -> list[Anything]:
    """Items without what they leave free; those of like free space are neighbours in groups, which are shuffled."""
    items = sorted(items, key=lambda item: item[0])
    groups = [items[i : i + group] for i in range(0, len(items), group)]
    return [item for g in random.permutation(len(groups)) for _, item in groups[g]]


class _Pool:
    """Pieces that have no row yet, by size."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._by_size: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._by_size.setdefault(piece[2] - piece[1], []).append(piece)
        self._sizes = sorted(self._by_size)

    def rows(self, length: int) -> list[tuple[int, list[Piece]]]:
        """Everything that is left as rows, each with what it leaves free."""
        rows = []
        while self._sizes:
            row = [self._take(self._sizes[-1])]
            row += self.fill(length - (row[0][2] - row[0][1]))
            rows.append((length - sum(stop - start for _, start, stop in row), row))
        return rows

    def fill(self, free: int) -> list[Piece]:
        """Pieces for `free` tokens."""
        filled = []
        while self._sizes and self._sizes[0] <= free:
            size = free if free in self._by_size else self._exact_pair(free) or self._sizes[bisect_right(self._sizes, free) - 1]
            filled.append(self._take(size))
            free -= size
        return filled

    def _take(self, size: int) -> Piece:
        piece = self._by_size[size].pop()
        if not self._by_size[size]:
            del self._by_size[size]
            self._sizes.pop(bisect_left(self._sizes, size))
        return piece

    def _exact_pair(self, total: int) -> int | None:
        """The smaller of two sizes that add up to `total`, when there are two such pieces."""
        for size in self._sizes[: bisect_right(self._sizes, total // 2)]:
            if total - size in self._by_size and (2 * size != total or len(self._by_size[size]) > 1):
                return size
        return None
