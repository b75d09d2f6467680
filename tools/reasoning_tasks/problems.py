"""The contents of the problems: drawn, keyed and worked out, in no language yet.

A problem of n steps takes n operations, one after the other, each on the result of the one before. Its key is the problem whatever
the words, the names and the language; a fixed hash of the key decides whether it may be trained on. A sum and a story about the same
numbers are one problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LARGEST = 20  # of all results on the way
LETTERS = "abcdkmnpqrstxyz"
COLOURS = 4
PEOPLE = 10
ITEMS_PER_STEP = 2
REUSE_SHARE = 0.5  # of the variables that could be made from two others
MOST_PRESSES = 9
ENDS = {"most": 0, "least": -1}


@dataclass(frozen=True)
class Sum:
    """start and then (sign, number) for each step."""

    start: int
    changes: tuple[tuple[str, int], ...]

    @property
    def key(self) -> tuple[object, ...]:
        return ("sum", self.start, *self.changes)

    @property
    def results(self) -> list[int]:
        """The number after each step."""
        found, total = [], self.start
        for sign, number in self.changes:
            total += number if sign == "+" else -number
            found.append(total)
        return found


@dataclass(frozen=True)
class Chain:
    """Variables: names[0] = start, then names[i] = names[left] sign right, `right` a number or the place of an earlier variable."""

    names: str
    start: int
    steps: tuple[tuple[int, str, int | None, int | None], ...]
    """(left, sign, number, right): one of number and right is None."""

    @property
    def key(self) -> tuple[object, ...]:
        return ("chain", self.start, *self.steps)

    @property
    def results(self) -> list[int]:
        """The value of every variable, the first one included."""
        values = [self.start]
        for left, sign, number, right in self.steps:
            by = values[right] if right is not None else number
            assert by is not None
            values.append(values[left] + by if sign == "+" else values[left] - by)
        return values


@dataclass(frozen=True)
class Order:
    """People in a row, and in which order the neighbours are compared."""

    people: tuple[int, ...]
    """Numbers of people, the one with the most first."""
    told: tuple[tuple[int, bool], ...]
    """(place, turned): people[place] is compared with people[place + 1], from the other side when turned."""
    ask: str
    """most | least"""

    @property
    def key(self) -> tuple[object, ...]:
        return ("order", self.ask, *self.people)

    @property
    def result(self) -> int:
        return self.people[ENDS[self.ask]]


@dataclass(frozen=True)
class Parity:
    """A lamp and how often its switch is pressed."""

    on: bool
    presses: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return ("parity", self.on, *self.presses)

    @property
    def results(self) -> list[bool]:
        """Whether the lamp is on after each step."""
        return [(self.on + sum(self.presses[: i + 1])) % 2 == 1 for i in range(len(self.presses))]


@dataclass(frozen=True)
class Counting:
    """Coloured things in a row, and the colour to count."""

    items: tuple[int, ...]
    wanted: int

    @property
    def key(self) -> tuple[object, ...]:
        return ("counting", self.wanted, *self.items)

    @property
    def results(self) -> list[int]:
        """How many there are up to and including each thing."""
        return [self.items[: i + 1].count(self.wanted) for i in range(len(self.items))]


Problem = Sum | Chain | Order | Parity | Counting


def draw_sum(steps: int, rng: random.Random) -> Sum:
    """Results stay between 0 and LARGEST."""
    start = total = rng.randint(2, 9)
    changes = []
    for _ in range(steps):
        sign, number = _change(total, rng)
        total += number if sign == "+" else -number
        changes.append((sign, number))
    return Sum(start, tuple(changes))


def _change(total: int, rng: random.Random) -> tuple[str, int]:
    while True:
        sign, number = rng.choice("+-"), rng.randint(1, 9)
        if 0 <= (total + number if sign == "+" else total - number) <= LARGEST:
            return sign, number


def draw_chain(steps: int, rng: random.Random) -> Chain:
    """Every variable is made from the one before it, some of them also from an earlier one."""
    names = "".join(rng.sample(LETTERS, steps + 1))
    start = rng.randint(1, 9)
    values = [start]
    parts: list[tuple[int, str, int | None, int | None]] = []
    for place in range(steps):
        before, sign, right = values[place], rng.choice("+-"), rng.randrange(place + 1)
        value = before + values[right] if sign == "+" else before - values[right]
        if right < place and 0 <= value <= LARGEST and rng.random() < REUSE_SHARE:
            parts.append((place, sign, None, right))
        else:
            sign, number = _change(before, rng)
            value = before + number if sign == "+" else before - number
            parts.append((place, sign, number, None))
        values.append(value)
    return Chain(names, start, tuple(parts))


def draw_order(steps: int, rng: random.Random) -> Order:
    told = [(place, rng.random() < 0.5) for place in range(steps)]
    rng.shuffle(told)
    return Order(tuple(rng.sample(range(PEOPLE), steps + 1)), tuple(told), rng.choice(tuple(ENDS)))


def draw_parity(steps: int, rng: random.Random) -> Parity:
    return Parity(rng.random() < 0.5, tuple(rng.randint(1, MOST_PRESSES) for _ in range(steps)))


def draw_counting(steps: int, rng: random.Random) -> Counting:
    return Counting(tuple(rng.randrange(COLOURS) for _ in range(ITEMS_PER_STEP * steps)), rng.randrange(COLOURS))


Draw = Callable[[int, random.Random], Problem]
KINDS: dict[str, Draw] = {
    "sums": draw_sum,
    "variables": draw_chain,
    "order": draw_order,
    "parity": draw_parity,
    "counting": draw_counting,
    "stories": draw_sum,
}
