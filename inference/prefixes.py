"""Beginnings of prompts whose keys and values are there already: of the conversation so far, of requests before, of rows that run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.cache import KVCache

if TYPE_CHECKING:
    from inference.engine import Engine


@dataclass(eq=False)
class Kept:
    """The keys and values of a row that has ended: those of `ids`, in a cache of its own."""

    ids: list[int]
    cache: KVCache


@dataclass
class Prefix:
    """The first `length` tokens of a prompt: they begin a row of some cache."""

    cache: KVCache
    row: int
    length: int
    kept: Kept | None = None

    def reaches(self, length: int) -> bool:
        """Whether this many of the tokens can be taken over (windowed layers forget)."""
        return length <= self.length and self.cache.has_prefix(self.row, length)


class PromptCache:
    """Keys and values of the last `size` replies and their prompts, of at most max_tokens tokens in all (None: no limit); the least
    recently used are given up first.

    One conversation needs one place (`Engine.stream(..., cache=PromptCache())`), a `Batcher` keeps several. A prompt that begins with
    the same token ids is computed from the first one that differs; its last token is always computed: the reply starts from it.
    Call `clear` when the model's weights change.
    """

    def __init__(self, size: int = 1, max_tokens: int | None = None) -> None:
        self.size, self.max_tokens = size, max_tokens
        self.entries: list[Kept] = []
        """Least recently used first."""
        self.hits = 0
        """Prompts whose beginning was found here or in a running row."""
        self.reused = 0
        """Prompt tokens that the last call of `Engine.stream` did not compute."""
        self._cleared = 0

    @property
    def ids(self) -> list[int]:
        """The tokens of the newest entry."""
        return self.entries[-1].ids if self.entries else []

    @property
    def nbytes(self) -> int:
        return sum(entry.cache.nbytes for entry in self.entries)

    def clear(self) -> None:
        """Forget everything; what is running now is not kept either."""
        self.entries, self.reused = [], 0
        self._cleared += 1

    @property
    def epoch(self) -> int:
        """Changes with `clear`: see `put`."""
        return self._cleared

    def find(self, prompt: Sequence[int], engine: Engine, running: Iterable[tuple[list[int], KVCache, int]] = ()) -> Prefix | None:
        """The longest beginning of the prompt that is here or in a running row, each given as (ids, cache, row); None: there is none."""
        setting = engine.cache_setting
        places = [(entry.ids, entry.cache, 0, entry) for entry in reversed(self.entries)]
        best: Prefix | None = None
        for ids, cache, row, kept in [*places, *((*place, None) for place in running)]:
            prefix = Prefix(cache, row, min(common_prefix(prompt, ids), len(prompt) - 1), kept)
            longer = prefix.length > (best.length if best else 0)
            if longer and setting.same(cache.setting) and prefix.reaches(prefix.length):
                best = prefix
        return best

    def use(self, prefix: Prefix) -> bool:
        """Count a hit. True: the entry is the caller's now, as the reply goes on where it ends, or there is no place for both."""
        self.hits += 1
        kept = prefix.kept
        if kept is None or kept not in self.entries:
            return False
        self.entries.remove(kept)
        if len(kept.ids) == prefix.length or self.size == 1:
            return True
        self.entries.append(kept)
        return False

    def put(self, ids: list[int], cache: KVCache, epoch: int) -> None:
        """Keep a row that has ended. epoch: that of the time when it began; what began before `clear` is not kept."""
        if not self.size or epoch != self.epoch or not ids:
            return
        # Whoever goes on from an earlier turn of this conversation finds it in the later one.
        setting = cache.setting
        others = [entry for entry in self.entries if not setting.same(entry.cache.setting) or ids[: len(entry.ids)] != entry.ids]
        self.entries = [*others, Kept(ids, cache)][-self.size :]
        while self.max_tokens is not None and sum(len(entry.ids) for entry in self.entries) > self.max_tokens:
            del self.entries[0]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    length, step = min(len(first), len(second)), 64
    start = 0
    while start < length and first[start : start + step] == second[start : start + step]:
        start += step
    return next((index for index in range(start, length) if first[index] != second[index]), length)
