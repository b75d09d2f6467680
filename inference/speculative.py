"""Prompt-lookup decoding (Saxena 2023, "Prompt Lookup Decoding"): what followed the last tokens earlier in prompt or reply is guessed to
follow again, and a whole guess is checked in one pass of the model.

It pays where replies repeat what was said (rewriting, quoting, code, answers from a text) and a pass over a few tokens costs about as
much as one over one token: the weights must be read either way. It does not pay in large batches, which use that time already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache import KVCache

if TYPE_CHECKING:
    from inference.engine import Engine

LONGEST, SHORTEST = 4, 2  # tokens in a row that must have been said before; one alone says too little


class Lookup:
    """Stands between a decoding loop of one row and the model: `feed` gives the logits that Engine.decode gives, but has the guessed
    tokens computed along, so that the next calls often need no pass. The loop chooses every token itself, from these logits:
    the result is that of plain decoding, sampled or not.

    Guesses that are still open stand in the cache behind the tokens that were fed, until `close`.
    """

    def __init__(self, engine: Engine, cache: KVCache, ids: list[int], most: int) -> None:
        """ids: the tokens in the cache. most: guessed tokens per pass (settings.lookup); after a wrong guess fewer for a while."""
        self.engine, self.cache, self.most = engine, cache, most
        self.ids: list[int] = []
        self.size = most
        self.passes = 0
        """Passes of the model so far."""
        self.guessed = 0
        self.accepted = 0
        self._behind: dict[tuple[int, ...], int] = {}  # where the text goes on after some tokens, the latest place
        self._open: list[int] = []  # guesses in the cache that the loop has not come to
        self._logits: Tensor | None = None  # after every token of the last pass (1, T, V)
        self._steps: Tensor | None = None
        for token in ids:
            self._add(token)

    def feed(self, tokens: Tensor) -> Tensor:
        """The next logits (1, V) after one more token (1,)."""
        token = int(tokens)
        if self._open and self._open[0] == token:
            del self._open[0]
            self.accepted += 1
            self._add(token)
        else:
            if self._open:
                self.size = max(1, self.size // 2)
                self.close()
            elif self._logits is not None and self._logits.shape[1] > 1:
                self.size = min(self.most, self.size * 2)
            self._add(token)
            self._open = self._guess()
            self.guessed += len(self._open)
            self.passes += 1
            self._logits = self.engine.decode_block(torch.tensor([[token, *self._open]], device=tokens.device), self.cache)
            self._steps = self.engine.steps_used
        assert self._logits is not None
        at = self._logits.shape[1] - 1 - len(self._open)
        if self._steps is not None:
            self.engine.steps_used = self._steps[:, at : at + 1]
        return self._logits[:, at]

    def close(self) -> None:
        """Remove open guesses from the cache."""
        if self._open:
            # Windowed layers can do that: they hold the whole of the last block and what its first token looks back on.
            rewound = self.cache.rewind(self.cache.length - len(self._open))
            assert rewound
            self._open = []

    def _guess(self) -> list[int]:
        for length in range(LONGEST, SHORTEST - 1, -1):
            start = self._behind.get(tuple(self.ids[-length:]), 0)
            if start:
                room = min(self.cache.capacity - self.cache.length, self.cache.block) - 1
                again = self.ids[start:]  # as a cycle: a short one has come round already
                return [again[index % len(again)] for index in range(min(self.size, room))]
        return []

    def _add(self, token: int) -> None:
        """The last tokens, without this one, are known to be followed by it from now on."""
        for length in range(SHORTEST, LONGEST + 1):
            if len(self.ids) >= length:
                self._behind[tuple(self.ids[-length:])] = len(self.ids)
        self.ids.append(token)
