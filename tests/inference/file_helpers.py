"""A folder to work in with an outside to protect, and snapshots to compare."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from inference.file_assistant import FileAssistant
from inference.file_root import HAS_DESCRIPTORS

SECRET = "the secret outside"
POSIX = pytest.mark.skipif(os.name == "nt", reason="links, pipes and descriptors of POSIX")


# Both ways to reach files, the second as on Windows: parameters of a fixture.
WAYS = [
    pytest.param(True, id="descriptors", marks=pytest.mark.skipif(not HAS_DESCRIPTORS, reason="no descriptors of folders here")),
    pytest.param(False, id="paths"),
]


def snapshot(folder: Path, private: str = ".smarthaoai") -> dict[str, tuple]:
    """Everything below a folder but the assistant's own: kind, permissions, content or where a link points."""
    found = {}
    for parent, folders, files in os.walk(folder, followlinks=False):
        if private in folders:
            folders.remove(private)
        for name in folders + files:
            path = Path(parent, name)
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                content = ""
            found[path.relative_to(folder).as_posix()] = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), content)
    return found


def fill(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def agree(question: str) -> bool:
    return True


def do(assistant: FileAssistant, **request):
    """One request, carried out without asking."""
    return assistant.apply(assistant.plan_of([request]), agree)
