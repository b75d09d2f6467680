"""What the file assistant did: a log that is written before and after each change, the backups, and the tags of files.

All of it stands in one private folder: `.smarthaoai` in the root, or a folder given, on the same disk.

    audit.jsonl   one JSON object a line: {"time", "batch", "number", "event": "begin" | "done" | "failed" | "undoing" | "undone", ...}
    backup/       deleted files, and the old versions of changed ones, by batch and number
    tags.json     {"path": ["tag", ...]}

A change whose "begin" or "undoing" has no outcome was interrupted: it is taken back before anything else is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from inference.file_paths import PRIVATE, Parts, relative_parts
from inference.file_root import Folder, Root, identity

LOG, BACKUP, TAGS, LOCK = "audit.jsonl", "backup", "tags.json", "lock"
MOST_LOG_BYTES = 256 << 20
KINDS = ("folder", "create", "update", "move", "rename", "copy", "delete", "tag")
_T = TypeVar("_T")
_KEEP = re.compile(r"\d{5,}-\d{4,}")


@dataclass
class Change:
    """One change of the log."""

    batch: int
    number: int
    kind: str
    """One of KINDS."""
    path: Parts
    to: Parts = ()
    digest: str = ""
    """sha256 of what was written."""
    before: tuple[str, ...] = ()
    """kind "tag": the tags that the file had."""
    after: tuple[str, ...] = ()
    outcome: str = ""
    """"done", "failed" or "undone"; "" for one that was interrupted, "undoing" for one whose undoing was."""

    @property
    def keep(self) -> str:
        """The name of what it keeps in the backup folder."""
        return f"{self.batch:05d}-{self.number:04d}"

    @property
    def stands(self) -> bool:
        """Whether it was made, and not yet undone."""
        return self.outcome in ("done", "undoing")


class Journal:
    """Opens the private folder of a root; one at a time, over all programs."""

    def __init__(self, root: Root, place: str | Path | None = None) -> None:
        self.root = root
        if place is None:
            self.home, self.name = root, PRIVATE
        else:
            self.home = Root(place, root.descriptors)
            # Several roots may keep their backups in one place.
            self.name = f"{PRIVATE}-{hashlib.sha256(str(root.path).encode('utf-8', 'replace')).hexdigest()[:12]}"
            if self.home.identity == root.identity:
                self.home, self.name = root, PRIVATE
            elif self.home.identity[0] != root.identity[0]:
                raise ValueError(f"{place} is on another disk than {root.path}; files are moved there: choose a folder on the same disk")

    @contextlib.contextmanager
    def opened(self) -> Iterator[State]:
        """The private folder, made when it is missing, for this program alone. ValueError when another one has it open."""
        with self.home.folder() as top:
            with contextlib.suppress(FileExistsError):
                top.make_folder(self.name, 0o700)
        with self._folder() as folder:
            with contextlib.suppress(FileExistsError):
                folder.make_folder(BACKUP, 0o700)
            with _locked(folder), self.hidden(), contextlib.closing(folder.enter(BACKUP)) as backup:
                yield State(folder, backup)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """While this lasts, nothing in the root reaches the private folder, under whatever name."""
        before = self.root.private
        with self.home.folder() as top:
            with contextlib.suppress(FileNotFoundError):
                self.root.private = before | {identity(top.status(self.name, private=True))}
        try:
            yield
        finally:
            self.root.private = before

    def lines(self) -> list[dict[str, Any]]:
        """The log, oldest first; lines that were cut off are left out."""
        return self._look(_read_log, [])

    def tags(self) -> dict[str, list[str]]:
        return self._look(_read_tags, {})

    def _look(self, read: Callable[[Folder], _T], default: _T) -> _T:
        """Read something of the private folder without making it."""
        try:
            with self._folder() as folder:
                return read(folder)
        except FileNotFoundError:
            return default

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Folder]:
        with self.home.folder() as top, contextlib.closing(top.enter(self.name, private=True)) as folder:
            yield folder


class State:
    """The private folder while it is open."""

    def __init__(self, folder: Folder, backup: Folder) -> None:
        self.folder, self.backup = folder, backup
        self.changes = read_changes(_read_log(folder))
        self._tags = _read_tags(folder)

    def next_batch(self) -> int:
        kept = [int(name.partition("-")[0]) for name in self.backup.names() if _KEEP.match(name)]
        return max([change.batch for change in self.changes] + kept, default=0) + 1

    def begin(self, change: Change, **more: Any) -> None:
        """To be called before anything is changed."""
        self.changes.append(change)
        self._write(
            change,
            "begin",
            kind=change.kind,
            path="/".join(change.path),
            to="/".join(change.to),
            digest=change.digest,
            before=list(change.before),
            after=list(change.after),
            **more,
        )

    def end(self, change: Change, outcome: str, **more: Any) -> None:
        """outcome: "done", "failed" or "undone"; with "done" and an error, it could not be undone."""
        change.outcome = outcome
        self._write(change, outcome, **more)

    def begin_undo(self, change: Change) -> None:
        """To be called before a change is taken back."""
        self._write(change, "undoing")

    def tags_of(self, path: str) -> list[str]:
        return list(self._tags.get(path, ()))

    def set_tags(self, path: str, tags: Sequence[str]) -> None:
        if list(tags) == self._tags.get(path, []):
            return
        if tags:
            self._tags[path] = list(tags)
        else:
            self._tags.pop(path, None)
        self._save_tags()

    def move_tags(self, path: str, to: str) -> None:
        """A file or folder has another name now."""
        moved = {to + key[len(path) :]: key for key in self._tags if key == path or key.startswith(path + "/")}
        for new, old in moved.items():
            self._tags[new] = self._tags.pop(old)
        if moved:
            self._save_tags()

    def _save_tags(self) -> None:
        new = f"{TAGS}.new"
        if self.folder.has(new):
            self.folder.remove(new)
        self.folder.write(new, [json.dumps(self._tags, ensure_ascii=False, indent=1, sort_keys=True).encode("utf-8")], 0o600)
        self.folder.replace(new, self.folder, TAGS)

    def _write(self, change: Change, event: str, **more: Any) -> None:
        self._append({"batch": change.batch, "number": change.number, "event": event, **more})

    def _append(self, entry: dict[str, Any]) -> None:
        entry = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **entry}
        self.folder.append_line(LOG, json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace"))


def read_changes(lines: list[dict[str, Any]]) -> list[Change]:
    """The changes of a log, with what became of them. What does not look like the assistant's own lines is passed over: the log
    stands where others may write, so its paths are checked like any other."""
    found: dict[tuple[int, int], Change] = {}
    for line in lines:
        batch, count = line.get("batch"), line.get("number")
        if not (isinstance(batch, int) and isinstance(count, int) and batch > 0 and count > 0):
            continue
        number = batch, count
        if line.get("event") == "begin" and line.get("kind") in KINDS:
            try:
                change = Change(
                    *number,
                    line["kind"],
                    relative_parts(line["path"]),
                    relative_parts(line["to"]),
                    str(line["digest"]),
                    tuple(map(str, line["before"])),
                    tuple(map(str, line["after"])),
                )
            except (KeyError, TypeError, AttributeError, ValueError):
                continue
            found[number] = change
        elif line.get("event") in ("done", "failed", "undone", "undoing") and number in found:
            found[number].outcome = line["event"]
    return list(found.values())


def _read_log(folder: Folder) -> list[dict[str, Any]]:
    if not folder.has(LOG):
        return []
    lines = []
    for line in folder.read(LOG, MOST_LOG_BYTES).decode("utf-8", "replace").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # empty, or cut off
        if isinstance(entry, dict):
            lines.append(entry)
    return lines


def _read_tags(folder: Folder) -> dict[str, list[str]]:
    if not folder.has(TAGS):
        return {}
    try:
        stored = json.loads(folder.read(TAGS, MOST_LOG_BYTES))
        return {str(path): [str(tag) for tag in tags] for path, tags in stored.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{PRIVATE}/{TAGS} is damaged ({error}): repair or remove it") from error


@contextlib.contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """The lock goes with the program that holds it, however it ends."""
    descriptor = folder.open_own(LOCK)
    try:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError("another file assistant is at work in this folder; wait until it is done") from error
        yield
    finally:
        os.close(descriptor)
