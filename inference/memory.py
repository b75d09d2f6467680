"""ConversationMemory: what was said, in one SQLite file that its user can read, correct, copy and erase.

    memory = ConversationMemory("weight/memory.sqlite", profile="lin")
    memory.add("user", "My dog is called Biscuit.")
    memory.context("What is my dog called?", budget=60, count=lambda text: len(tokenizer.encode(text)))

Nothing leaves the file: there is no second journal, what is deleted is overwritten with zeros, and the file is packed afterwards.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from inference.facts import extractive_summary, importance, key_facts, named_topics, slots, topics
from inference.lexical import Bm25, language, search_parts, search_words, sentences
from inference.memory_file import LONGEST_TEXT, MemoryFile, read_export, storable, write_export

LONGEST_SUMMARY = 1500
SMALLEST_SCORE = 0.15
SMALLEST_IMPORTANCE = 0.2
"""What `context` leaves out: what hardly fits the query; questions and small talk."""
HALF_LIFE = 200
"""Memories after which the part of the score that age takes has halved."""
_HEADERS = {
    ("zh", "user"): "我之前说过（新的在前）：",
    ("en", "user"): "What I told you before (newest first):",
    ("zh", "assistant"): "你说过：",
    ("en", "assistant"): "you said: ",
}


@dataclass(frozen=True)
class Memory:
    """One thing that is remembered."""

    id: int
    role: str
    """"user", "assistant", or "summary": the gist of several that were compressed, one sentence a line."""
    text: str
    importance: float
    """From 0 to 1 (`facts.importance`); of what `retrieve` found in a summary, that of the line."""
    topics: tuple[str, ...]
    created: str
    """UTC, ISO 8601."""
    replaced: bool = False
    """All that it says of the user was said anew later (`facts.slots`)."""
    score: float = 0.0
    """How well it fits the query of `retrieve`."""
    match: str = ""
    """The part of the text that fits best: the text itself, or a line of a summary."""


@dataclass(frozen=True)
class _Line:
    """What is searched: a memory's text, or one line of a summary."""

    place: int  # of its memory among all, oldest first
    text: str
    importance: float
    replaced_by: int | None  # the line that says all that it says of the user anew


Memories = list[Memory]  # in the class below `list` is a method


class ConversationMemory:
    """What was said in one profile of a memory file; ":memory:" keeps it until the program ends.

    `capacity`: memories a profile holds before the least important are compressed. `summarise`: what the user said to a shorter text (a
    model: `inference.embedding.model_summariser`), else the sentences that matter most are kept; facts about the user are kept word
    for word either way. `embed`: texts to vectors (N, D), which are stored under the function's `name` if it has one. `enabled=False`,
    which may be changed at any time: nothing is stored or recalled, no file is made; what is there can still be listed and erased. The
    file is made by the first `add`, readable for its owner alone. Usable from several threads and processes at once.

    Raises ValueError for a bad value, and for a file that is damaged or no memory file, which is left as it is; TimeoutError when another
    process does not let go of the file.
    """

    def __init__(
        self,
        path: str | Path,
        profile: str = "default",
        capacity: int = 1000,
        summarise: Callable[[list[str]], str] | None = None,
        embed: Callable[[list[str]], Any] | None = None,
        enabled: bool = True,
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 2:
            raise ValueError(f"a memory with a capacity of {capacity!r} can hold nothing: use a whole number of 2 or more, such as 1000")
        self.path = None if str(path) == ":memory:" else Path(path)
        self._file = MemoryFile(self.path)
        self.capacity, self.summarise, self.embed, self.enabled = capacity, summarise, embed, enabled
        self._embedder = getattr(embed, "name", None) or uuid.uuid4().hex
        self._lock = threading.RLock()
        self._held: tuple[Any, Memories, Sequence[_Line]] | None = None
        self._index: Bm25 | None = None
        self.profile = profile
        if enabled:
            self._file.open()  # a damaged file should be heard of at once

    @property
    def profile(self) -> str:
        """The profile that is read and written; may be set to another, which need not exist yet."""
        return self._profile

    @profile.setter
    def profile(self, name: str) -> None:
        if not name.strip() or len(name) > 64 or not name.isprintable():
            raise ValueError(f"{name!r} is no profile name: use 1 to 64 printable characters")
        self._profile = name.strip()

    # What the conversation does

    def add(self, role: str, text: str) -> Memory | None:
        """Remember what was said; returns the memory, or None when off or when there is nothing to remember. What is already there word
        for word becomes the newest instead of a second one; of a very long text the sentences that matter most are kept."""
        if role not in ("user", "assistant"):
            raise ValueError(f"role {role!r} is not remembered: use user or assistant")
        text = storable(text)
        if not self.enabled or not text:
            return None
        with self._lock:
            if len(text) > LONGEST_TEXT:
                text = extractive_summary([text], LONGEST_TEXT) or text[:LONGEST_TEXT]
            with self._file.writing() as db:
                db.execute("DELETE FROM memories WHERE profile = ? AND role = ? AND text = ?", (self.profile, role, text))
                number = self._insert(db, role, text)
            self._compress()
            return next((memory for memory in self._rows() if memory.id == number), None)

    def retrieve(self, query: str, k: int = 5) -> Memories:
        """The k memories that fit the query best, best first; none that does not fit at all.

        score = relevance x (0.5 + importance) x (0.8 + 0.2 x 2^(-age / 200)) x (0.5 if a later memory replaced it); age: memories since
        then. Relevance is BM25 over words, Chinese characters and topics between 0 and 1 (`Bm25.relevance`); with an embedder
        1 - (1 - BM25) x (1 - s), where s is how far a cosine stands out among all (`_standing_out`), so that a bad embedder does little
        harm. Relevance leads: what is irrelevant stays so however important it is.
        """
        with self._lock:
            if not self.enabled or not query.strip():
                return []
            memories, lines = self._snapshot()
            if not memories:
                return []
            self._index = self._index or Bm25([_index_words(line.text) for line in lines])
            relevance = self._index.relevance(_index_words(query))
            if self.embed is not None:
                relevance = 1 - (1 - relevance) * (1 - _standing_out(self._vectors(memories, lines) @ self._embed([query])[0]))
        best: dict[int, Memory] = {}
        fits = relevance.tolist()
        for line, fit in zip(lines, relevance.tolist(), strict=True):
            if line.replaced_by is not None:  # what fits the old fact fits the new one
                fits[line.replaced_by] = max(fits[line.replaced_by], fit)
        for line, fit in zip(lines, fits, strict=True):
            age = len(memories) - 1 - line.place
            score = fit * (0.5 + line.importance) * (0.8 + 0.2 * 2 ** (-age / HALF_LIFE)) * (1.0 if line.replaced_by is None else 0.5)
            if score > 0 and (line.place not in best or score > best[line.place].score):
                best[line.place] = replace(memories[line.place], score=score, match=line.text, importance=line.importance)
        return sorted(best.values(), key=lambda memory: (-memory.score, -memory.id))[:k]

    def context(self, query: str, budget: int, count: Callable[[str], int], k: int = 8, shown: Collection[str] = ()) -> str:
        """What to put before the query in the same user turn: the memories that fit it, newest first, so that a fact that changed is met
        in its new form first; in the query's language; at most `budget` by `count` (text to tokens). "" where nothing fits. `shown`:
        texts that the model sees anyway, such as the turns that are still in its context."""
        known = {text.strip() for text in shown} | {query.strip()}
        lang = language(query)
        kept: Memories = []
        text = ""
        for memory in self.retrieve(query, 4 * k):
            fits_query = memory.score >= SMALLEST_SCORE and memory.importance >= SMALLEST_IMPORTANCE
            if not fits_query or memory.match in known or len(kept) == k:
                continue
            # Where all of a long message is too much, the sentence of it that fits best will do.
            for part in (memory.match, *_best_sentence(memory.match, query)):
                trial = sorted([*kept, replace(memory, match=part)], key=lambda one: -one.id)
                rendered = _render(trial, lang)
                if count(rendered) <= budget:
                    kept, text = trial, rendered
                    break
        return text

    # What its user does

    def list(self, topic: str | None = None) -> Memories:
        """All memories of the profile, newest first; with a topic those about it."""
        with self._lock:
            return [memory for memory in reversed(self._rows()) if topic is None or topic in memory.topics]

    def edit(self, number: int, text: str) -> Memory:
        """Replace the text of a memory; the old one is overwritten in the file."""
        text = storable(text)
        if not text:
            raise ValueError(f"memory {number} cannot become empty: forget it instead")
        with self._lock:
            before = self._find(number)
            row = (*_described(before.role, text[:LONGEST_TEXT]), number)
            with self._file.writing() as db:
                db.execute("UPDATE memories SET text = ?, importance = ?, topics = ?, embedder = '', vectors = NULL WHERE id = ?", row)
            self._file.pack()
            return self._find(number)

    def forget(self, number: int) -> None:
        """Erase one memory."""
        with self._lock:
            self._find(number)
            with self._file.writing() as db:
                db.execute("DELETE FROM memories WHERE id = ?", (number,))
            self._file.pack()

    def erase(self, everything: bool = False) -> int:
        """Erase all memories of this profile, or of all profiles; returns how many there were."""
        with self._lock:
            if self._file.open() is None:
                return 0
            with self._file.writing() as db:
                where, values = ("", ()) if everything else (" WHERE profile = ?", (self.profile,))
                erased = db.execute(f"DELETE FROM memories{where}", values).rowcount
            self._file.pack()
            return erased

    def export(self, path: str | Path) -> int:
        """Write the profile's memories to a new JSON file; returns their number."""
        rows = [(memory.role, memory.text, memory.created) for memory in reversed(self.list())]
        write_export(Path(path), self.profile, rows)
        return len(rows)

    def import_from(self, path: str | Path) -> int:
        """Add the memories of an exported file to this profile, all or none; returns how many were new."""
        if not self.enabled:
            raise ValueError("the memory is off and stores nothing: switch it on to import")
        rows = read_export(Path(path))
        with self._lock:
            known = {(memory.role, memory.text) for memory in self._rows()}
            new = [row for row in dict.fromkeys(rows) if row[:2] not in known]
            with self._file.writing() as db:
                for role, text, created in new:
                    self._insert(db, role, text, created)
            self._compress()
            return len(new)

    def profiles(self) -> dict[str, int]:
        """The profiles of the file and how many memories each holds."""
        with self._lock:
            return dict(self._file.query("SELECT profile, COUNT(*) FROM memories GROUP BY profile ORDER BY profile"))

    def stats(self) -> dict[str, Any]:
        """Figures for a status line: how many, about what, how they are searched."""
        memories = self.list()
        by_topic = Counter(topic for memory in memories for topic in memory.topics)
        return {
            "enabled": self.enabled,
            "profile": self.profile,
            "memories": len(memories),
            "capacity": self.capacity,
            "characters": sum(len(memory.text) for memory in memories),
            "summaries": sum(memory.role == "summary" for memory in memories),
            "topics": dict(by_topic.most_common(10)),
            "search": search_parts() + (" + embeddings" if self.embed else ""),
            "file": str(self.path or ":memory:"),
            "bytes": self.path.stat().st_size if self.path and self.path.exists() else 0,
        }

    def close(self) -> None:
        """Let go of the file; the next call opens it again (what was in ":memory:" is gone)."""
        with self._lock:
            self._file.close()
            self._held = None

    # Within

    def _insert(self, db: sqlite3.Connection, role: str, text: str, created: str | None = None) -> int:
        created = created or datetime.now(timezone.utc).isoformat(timespec="seconds")
        done = db.execute(
            "INSERT INTO memories (text, importance, topics, profile, role, created) VALUES (?, ?, ?, ?, ?, ?)",
            (*_described(role, text), self.profile, role, created),
        )
        return int(done.lastrowid or 0)

    def _find(self, number: int) -> Memory:
        found = next((memory for memory in self._rows() if memory.id == number), None)
        if found is None:
            known = ", ".join(str(memory.id) for memory in self._rows()[-5:]) or "none"
            raise ValueError(f"there is no memory {number} in the profile {self.profile!r}; the newest: {known}")
        return found

    def _rows(self) -> Memories:
        return self._snapshot()[0]

    def _snapshot(self) -> tuple[Memories, Sequence[_Line]]:
        """The profile's memories, oldest first, and their lines. Read again only after a change."""
        self._file.open()
        state = (self.profile, self._file.state())
        if self._held is None or self._held[0] != state:
            columns = "id, role, text, importance, topics, created"
            rows = self._file.query(f"SELECT {columns} FROM memories WHERE profile = ? ORDER BY id", (self.profile,))
            memories = [
                Memory(number, role, text, value, tuple(json.loads(about)), created) for number, role, text, value, about, created in rows
            ]
            texts = [
                (place, text)
                for place, memory in enumerate(memories)
                for text in (memory.text.splitlines() if memory.role == "summary" else [memory.text])
            ]
            told = [slots(text) if memories[place].role != "assistant" else frozenset() for place, text in texts]
            last = {name: number for number, names in enumerate(told) for name in names}
            lines = []
            for number, (place, text) in enumerate(texts):
                memory = memories[place]
                later = [last[name] for name in told[number] if last[name] > number]
                replaced = bool(later) and len(later) == len(told[number])
                # A line of a summary counts as what it is, not as the best of its summary.
                lines.append(
                    _Line(
                        place,
                        text,
                        importance(text)[0] if memory.role == "summary" else memory.importance,
                        max(later) if replaced else None,
                    )
                )
                if replaced and memory.role != "summary":
                    memories[place] = replace(memory, replaced=True)
            self._held, self._index = (state, memories, lines), None
        return self._held[1:]

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (N, D)."""
        assert self.embed is not None
        vectors = np.asarray(self.embed([*texts]), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(f"embed() must give one vector for each text, ({len(texts)}, D); it gave {vectors.shape}")
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _vectors(self, memories: Memories, lines: Sequence[_Line]) -> np.ndarray:
        """The lines' vectors (N, D): from the file, and worked out once where this embedder's are not there."""
        wanted = "SELECT id, vectors FROM memories WHERE profile = ? AND embedder = ?"
        stored = dict(self._file.query(wanted, (self.profile, self._embedder)))
        missing = [line for line in lines if memories[line.place].id not in stored]
        if missing:
            fresh: dict[int, bytes] = {}
            for line, vector in zip(missing, self._embed([line.text for line in missing]), strict=True):
                number = memories[line.place].id
                fresh[number] = fresh.get(number, b"") + vector.astype("<f4").tobytes()
            with self._file.writing() as db:
                update = "UPDATE memories SET vectors = ?, embedder = ? WHERE id = ?"
                db.executemany(update, [(blob, self._embedder, number) for number, blob in fresh.items()])
            stored |= fresh
        return np.frombuffer(b"".join(stored[memory.id] for memory in memories), dtype="<f4").reshape(len(lines), -1)

    def _compress(self) -> None:
        """Above capacity: the least important and oldest memories become one summary of what the user said in them; the assistant's are
        dropped. The newest quarter is left alone."""
        memories = self._rows()
        if len(memories) <= self.capacity:
            return
        excess = len(memories) - self.capacity + 1 + self.capacity // 10  # a tenth of room, so that not every message compresses
        old = memories[: -max(1, self.capacity // 4)]
        chosen = sorted(old, key=lambda memory: (not memory.replaced, round(memory.importance, 1), memory.id))[:excess]
        chosen.sort(key=lambda memory: memory.id)
        texts = [memory.text for memory in chosen if memory.role != "assistant" and not memory.replaced]
        if self.summarise is None or not texts:
            gist = extractive_summary(texts, LONGEST_SUMMARY)
        else:
            facts = extractive_summary(key_facts(texts), LONGEST_SUMMARY)
            gist = f"{facts}\n{' '.join(self.summarise(texts).split())[: LONGEST_SUMMARY // 3]}".strip()
        numbers = [memory.id for memory in chosen]
        with self._file.writing() as db:
            where = f"WHERE id IN ({','.join('?' * len(numbers))})"
            now = [text for (text,) in db.execute(f"SELECT text FROM memories {where} ORDER BY id", numbers)]
            if now != [memory.text for memory in chosen]:
                return  # meanwhile another process compressed them, or the user erased one: it must not come back in a summary
            db.execute(f"DELETE FROM memories {where}", numbers)
            if gist:
                db.execute("UPDATE memories SET id = ? WHERE id = ?", (numbers[-1], self._insert(db, "summary", gist)))


def _described(role: str, text: str) -> tuple[str, float, str]:
    """text, importance and topics (JSON), as they are stored."""
    return text, importance(text, role)[0], json.dumps(topics(text), ensure_ascii=False)


def _standing_out(cosines: np.ndarray) -> np.ndarray:
    """Cosines (N,) of a query with all lines, as 0 to 1: 0 up to two standard deviations above their mean, 1 from six on. What an embedder
    calls near differs from one to the next; what is unusually near does not. Of five lines or fewer none can be that."""
    return np.clip((cosines - cosines.mean()) / max(float(cosines.std()), 1e-6) - 2, 0, 4) / 4


@lru_cache(maxsize=1 << 17)
def _index_words(text: str) -> tuple[str, ...]:
    """What a line is found by; its topics, too, so that "where do I live" finds 我搬到了柏林."""
    return (*search_words(text), *(f"#{topic}" for topic in named_topics(text)))


def _best_sentence(text: str, query: str) -> list[str]:
    parts = sentences(text)
    if len(parts) < 2:
        return []
    fits = Bm25([_index_words(part) for part in parts]).relevance(_index_words(query))
    return [parts[int(np.argmax(fits))]]


def _render(memories: Sequence[Memory], lang: str) -> str:
    said = {"assistant": _HEADERS[lang, "assistant"]}
    lines = [f"- {said.get(memory.role, '')}{' '.join(memory.match.split())}" for memory in memories]
    return "\n".join([_HEADERS[lang, "user"], *lines])
