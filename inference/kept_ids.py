"""The token ids of a conversation so far, and how the next prompt goes on from them.

A reply's ids are what the model chose, and keys and values were computed for them. Encoding its text again may cut it differently,
so the next prompt takes over the ids that were generated, as far as its text is the same as what they spell.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


class KeptIds:
    """Prompt and replies of one conversation, in order."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._generated: list[bool] = []

    def clear(self) -> None:
        self.ids, self._generated = [], []

    def reply(self, ids: Sequence[int]) -> None:
        """Add tokens that the model chose."""
        self.ids += ids
        self._generated += [True] * len(ids)

    def prompt(self, rendered: Sequence[int], tokenizer: Any) -> list[int]:
        """The next prompt: `rendered`, with its beginning in the ids that are kept. It becomes what is kept."""
        ours, theirs = (_spelled(ids, tokenizer) for ids in (self.ids, rendered))
        same = _common(b"".join(ours), b"".join(theirs))
        borders = {end: index for index, end in enumerate(accumulate(map(len, theirs)), start=1)}
        kept, rest = 0, 0
        for index, end in enumerate(accumulate(map(len, ours)), start=1):
            if end > same:
                break
            # Text that nobody generated is encoded anew in any case: only behind a generated token can the ids differ.
            if self._generated[index - 1] and end in borders:
                kept, rest = index, borders[end]
        self.ids = [*self.ids[:kept], *rendered[rest:]]
        self._generated = [*self._generated[:kept], *[False] * (len(rendered) - rest)]
        return list(self.ids)


def _spelled(ids: Sequence[int], tokenizer: Any) -> list[bytes]:
    """What each token writes. A token of the format is told from the same characters in a text by a byte that no text holds."""
    structure = tokenizer.backend.get_added_tokens_decoder()
    return [b"\xff%d\xff" % token if token in structure or token >= tokenizer.vocab_size else tokenizer.token_bytes(token) for token in ids]


def _common(first: bytes, second: bytes) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
