"""Which paths the file assistant takes, and which files it leaves alone: pure rules, the same text in, the same answer out.

    relative_parts("notes/a.txt")          # ("notes", "a.txt")
    relative_parts("../a.txt")             # UnsafePath: ... leads out of the folder
    Policy(deny=("*.bak",)).refusal(("x.bak",))   # "x.bak is on the deny-list (*.bak)"

A path is always relative to the root, with / between its parts (on Windows \\ too). Names are never normalised or resolved before
use, so a look-alike cannot turn into something else later; those that could mislead a reader or another program are refused.
"""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePath, PurePosixPath, PureWindowsPath

PRIVATE = ".smarthaoai"
"""What begins with this belongs to the assistant itself: its log, backups, and the lock."""
MAX_DEPTH = 32
MAX_PARTS_BYTES = 255
MAX_PATH_BYTES = 1024
# Private keys, passwords and what other programs keep their state in.
DENIED = (
    ".git", ".hg", ".svn", ".ssh", ".gnupg", ".aws", ".env", ".env.*", ".netrc", ".npmrc", ".pypirc", "id_rsa*", "id_ed25519*", "id_ecdsa*",
    "*.pem", "*.key", "*.pfx", "*.p12", "*.jks", "*.kdbx", "*.keychain*", "desktop.ini", "thumbs.db", "$recycle.bin",
    "system volume information",
)  # fmt: skip

Parts = tuple[str, ...]
Flavour = type[PurePosixPath] | type[PureWindowsPath]
NATIVE: Flavour = PureWindowsPath if os.name == "nt" else PurePosixPath

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_SHORT_NAME = re.compile(r"[^.]{1,6}~\d{1,6}(\.[^.]{0,3})?")
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]')


class UnsafePath(ValueError):
    """A path that the assistant does not take; the message names it and says why."""


def relative_parts(text: str, flavour: Flavour = NATIVE) -> Parts:
    """The parts of a path below the root; () for the root itself ("", ".", "/" is refused). Raises UnsafePath.

    flavour: whose rules hold, Windows' or POSIX'. On POSIX a backslash, which is a letter there and a separator elsewhere, is refused.
    """
    shown = repr(text[:120])
    if "\0" in text:
        raise UnsafePath(f"{shown} holds a NUL character")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            raise UnsafePath(f"{shown} holds the invisible character U+{ord(character):04X}")
    if len(text.encode("utf-8")) > MAX_PATH_BYTES:
        raise UnsafePath(f"{shown}... is longer than {MAX_PATH_BYTES} bytes")
    windows = PureWindowsPath(text)
    if PurePosixPath(text).is_absolute() or windows.drive or windows.root:
        raise UnsafePath(f"{shown} is absolute; give a path inside the folder, such as notes/a.txt")
    if flavour is PurePosixPath and "\\" in text:
        raise UnsafePath(f"{shown} holds a backslash; write / between folders")
    parts = flavour(text).parts
    for part in parts:
        _check_part(part, shown, windows=flavour is PureWindowsPath)
    if len(parts) > MAX_DEPTH:
        raise UnsafePath(f"{shown} is nested deeper than {MAX_DEPTH} folders")
    return parts


def new_parts(text: str, flavour: Flavour = NATIVE) -> Parts:
    """`relative_parts` of a file or folder that is to be made: its name must be possible on every system. Raises UnsafePath."""
    parts = relative_parts(text, flavour)
    if not parts:
        raise UnsafePath("the name of a file or folder is missing")
    for part in parts:
        _check_part(part, repr(text[:120]), windows=True)
    return parts


def _check_part(part: str, shown: str, windows: bool) -> None:
    # Full-width dots and slashes are ordinary letters to every file system, but not to a reader, nor to programs that normalise.
    plain = unicodedata.normalize("NFKC", part)
    if part == ".." or any(piece.strip() in (".", "..") for piece in re.split(r"[/\\]", plain)):
        raise UnsafePath(f"{shown} leads out of the folder (..)")
    if part == "~":
        raise UnsafePath(f"{shown}: ~ is not replaced by a home folder; give a path inside the folder")
    if own(part):
        raise UnsafePath(f"{shown}: {PRIVATE} belongs to the assistant itself")
    if len(part.encode("utf-8")) > MAX_PARTS_BYTES:
        raise UnsafePath(f"{shown} has a name longer than {MAX_PARTS_BYTES} bytes")
    if not windows:
        return
    if part[-1] in ". ":
        raise UnsafePath(f"{shown}: Windows drops the dot or space at the end of {part!r}, so that it names another file")
    if found := _NOT_ON_WINDOWS.search(part):
        raise UnsafePath(f"{shown}: {found.group()} cannot stand in a file name on Windows")
    if _RESERVED.fullmatch(part.strip()):
        raise UnsafePath(f"{shown}: {part} is a device on Windows")
    if _SHORT_NAME.fullmatch(part):
        raise UnsafePath(f"{shown}: {part} may be the short name of another file on Windows")


def own(part: str) -> bool:
    """Whether a name belongs to the assistant, in any spelling that some file system takes for the same."""
    return folded(part).startswith(PRIVATE)


@lru_cache(maxsize=4096)
def folded(name: str) -> str:
    """A name as the most forgiving file system compares it: no case, no compatibility forms, no dots or spaces at the end."""
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", visible).casefold().strip().rstrip(". ")


@dataclass(frozen=True)
class Policy:
    """What the assistant may touch. Patterns are compared without case, with every part of a path and with the whole of it:
    "*.txt" is a suffix, ".git" a name (with all in it), "private/*" a place."""

    allow: Sequence[str] = ()
    """When given, only files that one of these fits."""
    deny: Sequence[str] = field(default=DENIED)

    max_operations: int = 100
    """Files and folders that one plan may change."""
    max_read: int = 1 << 20
    """Bytes of the largest file that is read, or edited."""
    max_write: int = 1 << 20
    """Bytes of the largest text that is written."""
    max_copy: int = 256 << 20
    """Bytes that one plan may copy."""
    max_seen: int = 20_000
    """Files and folders that one plan may look at."""

    def __post_init__(self) -> None:
        for name in ("max_operations", "max_read", "max_write", "max_copy", "max_seen"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if isinstance(self.allow, str) or isinstance(self.deny, str):
            raise ValueError("allow and deny are lists of patterns, such as ['*.txt'], not one text")

    def refusal(self, parts: Parts, folder: bool = False) -> str:
        """Why a path is left alone, "" when it may be touched. folder: the allow-list, which is about files, does not apply."""
        shown = "/".join(parts)
        names = [*map(folded, parts), "/".join(map(folded, parts))]
        for part in parts:
            if own(part):
                return f"{shown}: {PRIVATE} belongs to the assistant itself"
        for pattern in self.deny:
            if any(fnmatch.fnmatchcase(name, pattern.casefold()) for name in names):
                return f"{shown} is on the deny-list ({pattern})"
        if self.allow and not folder and not any(fnmatch.fnmatchcase(name, p.casefold()) for p in self.allow for name in names[-2:]):
            return f"{shown} is not on the allow-list ({', '.join(self.allow)})"
        return ""


def joined(parts: Parts) -> str:
    """The path as people and the log read it."""
    return "/".join(parts) or "."


def suffix(name: str) -> str:
    """The ending of a name with its dot, in lower case; "" when it has none."""
    return PurePath(name).suffix.lower()
