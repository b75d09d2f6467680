"""MemoryFile: the SQLite file behind `ConversationMemory`, and the JSON that memories are exported to.

Whoever erases something must be able to rely on it: there is one file and, while something is written, its rollback journal; what is
deleted is overwritten with zeros, and `pack` rewrites the file without it.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from model.files import atomic_write_text

ROLES = ("user", "assistant", "summary")
LONGEST_TEXT = 4000
"""Characters of one memory."""
EXPORT_FORMAT = "haoai-memory"
APPLICATION = 0x48414F4D  # "HAOM" in the file's header says whose it is
VERSION = 1
WAIT = 10.0
"""Seconds for another process to finish its write."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS memories (
  id INTEGER PRIMARY KEY AUTOINCREMENT, profile TEXT NOT NULL, role TEXT NOT NULL, text TEXT NOT NULL, importance REAL NOT NULL,
  topics TEXT NOT NULL, created TEXT NOT NULL, embedder TEXT NOT NULL DEFAULT '', vectors BLOB);
CREATE INDEX IF NOT EXISTS by_profile ON memories (profile, id);
"""


class MemoryFile:
    """A file of memories, made by the first `writing`, readable for its owner alone; None keeps them in this process.

    Raises ValueError for a file that is damaged or not ours, which is left as it is, OSError for one that cannot be used, and
    TimeoutError (an OSError) when another process does not let go of it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._opened = 0

    def open(self, create: bool = False) -> sqlite3.Connection | None:
        """The open file; None when there is none yet and it is not to be made. A file that was deleted meanwhile is let go of: what was in
        it was to be gone."""
        if self._db is not None and self.path is not None and not self.path.exists():
            self.close()
        if self._db is not None or (self.path is not None and not create and not self.path.exists()):
            return self._db
        if self.path is not None:
            if self.path.is_dir():
                raise ValueError(f"{self.path} is a folder: name a file for the memory")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would let everybody read it
        with self._translated():
            db = sqlite3.connect(self.path or ":memory:", timeout=WAIT, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        self._db = db
        self._opened += 1
        return db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing."""
        db = self.open(create=True)
        assert db is not None
        with self._translated():
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    def query(self, sql: str, values: Sequence[Any] = ()) -> Sequence[tuple[Any, ...]]:
        """All rows; none when there is no file."""
        db = self.open()
        with self._translated():
            return [] if db is None else db.execute(sql, values).fetchall()

    def state(self) -> Any:
        """Something that differs after every change, by this process or another."""
        return self.query("PRAGMA data_version"), self._db.total_changes if self._db else 0, self._opened

    def pack(self) -> None:
        """Rewrite the file without what was deleted."""
        with self._translated():
            if self._db is not None:
                self._db.execute("VACUUM")

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._db is not None:
            self._db.close()
        self._db = None

    def _prepare(self, db: sqlite3.Connection) -> None:
        application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        is_new = application == 0 and not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not is_new and application != APPLICATION:
            raise ValueError(f"{self.path} is a database of another program, not a memory file: name another file")
        if version > VERSION:
            raise ValueError(f"{self.path} was written by a later release (version {version}): update, or name another file")
        db.execute("PRAGMA temp_store = MEMORY")  # packing makes a copy of the content
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA secure_delete = ON")
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        if is_new:
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What SQLite says, as errors that a user can act on."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise TimeoutError(f"{self.path} has been in use by another program for {WAIT:g} seconds: close that one") from error
            raise OSError(f"the memory file {self.path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"the memory file {self.path} is damaged or not a memory file ({error}); it was left as it is: move it away, or put a copy "
                "in its place"
            ) from error


def write_export(path: Path, profile: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write memories (role, text, created), oldest first, to a new JSON file."""
    if path.exists():
        raise ValueError(f"{path} exists: name a new file")
    memories = [dict(zip(("role", "text", "created"), row, strict=True)) for row in rows]
    content = {"format": EXPORT_FORMAT, "version": VERSION, "profile": profile, "memories": memories}
    atomic_write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_export(path: Path) -> list[tuple[str, str, str]]:
    """(role, text, created) of an exported file. ValueError naming the bad entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != EXPORT_FORMAT or not isinstance(content.get("memories"), list):
        raise ValueError(f'{path} is no exported memory: it needs "format": "{EXPORT_FORMAT}" and a list "memories"')
    rows = []
    for number, entry in enumerate(content["memories"], start=1):
        if not isinstance(entry, dict) or entry.get("role") not in ROLES:
            raise ValueError(f"{path}: memory {number} needs a role, one of {', '.join(ROLES)}")
        if not isinstance(entry.get("text"), str) or not entry["text"].strip():
            raise ValueError(f"{path}: memory {number} needs a text")
        try:
            created = datetime.fromisoformat(str(entry["created"]).replace("Z", "+00:00")).isoformat() if "created" in entry else ""
        except ValueError as error:
            raise ValueError(f"{path}: memory {number} was created {entry['created']!r}; write 2026-01-31T12:00:00+00:00") from error
        rows.append((entry["role"], storable(entry["text"])[:LONGEST_TEXT], created))
    return rows


def storable(text: str) -> str:
    """A text without the space around it and without halves of characters, which no file can hold."""
    return text.strip().encode("utf-8", "replace").decode("utf-8")
