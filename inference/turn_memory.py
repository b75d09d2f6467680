"""What the turns of one conversation left in the memory, so that a turn that is taken back leaves nothing."""

from __future__ import annotations

import contextlib

from inference.memory import ConversationMemory


class TurnMemory:
    """Entries by turn, the newest last."""

    def __init__(self) -> None:
        self._entries: list[list[int]] = []

    def add(self, memory: ConversationMemory, turn: int, question: str, answer: str) -> None:
        """Store what was said in a turn (counted from 1); an answer may be empty. What was there before stays what another turn left."""
        known = {(entry.role, entry.text): entry.id for entry in memory.list()}
        said = [memory.add(role, text) for role, text in (("user", question), ("assistant", answer))]
        moved = {known[entry.role, entry.text]: entry.id for entry in said if entry is not None and (entry.role, entry.text) in known}
        self._entries = [[moved.get(number, number) for number in entries] for entries in self._entries]
        self._entries += [[] for _ in range(turn - len(self._entries))]
        self._entries[turn - 1] += [entry.id for entry in said if entry is not None and (entry.role, entry.text) not in known]

    def forget(self, memory: ConversationMemory | None, turn: int) -> None:
        """A turn is taken back, with all after it."""
        for entry in (number for entries in self._entries[turn - 1 :] for number in entries):
            if memory is not None:
                with contextlib.suppress(ValueError):  # compressed meanwhile, or forgotten by the user
                    memory.forget(entry)
        del self._entries[turn - 1 :]

    def clear(self) -> None:
        """Another conversation begins; what is remembered stays."""
        self._entries.clear()
