"""Files that are either the old version or the new one, never half of each.

Every write goes to a temporary name beside the target, is flushed to disk and renamed. A reader (or a run that is
killed at any moment) therefore sees a complete file or directory, or none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX, _ASIDE = ".tmp", ".replaced"
# Ours, and what safetensors writes to before it renames. Other files that end in .tmp are not ours to delete.
_LEFTOVER = re.compile(r".+\.\d+\.tmp|\.tmp[A-Za-z0-9]{6}")
REMEDIES = {
    errno.ENOSPC: "make room there",
    getattr(errno, "EDQUOT", -1): "make room there",
    errno.EROFS: "make that disk writable",
    errno.EACCES: "give yourself write permission there",
}


class WriteError(OSError):
    """A file could not be written: the message names it, what the system said, the space that is left and what to do."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Errors of the system inside become a WriteError about `path`: those of a full disk name no file."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        said = error.strerror or str(error)
        remedy = next((remedy for number, remedy in REMEDIES.items() if error.errno == number), "see to that")
        name = re.sub(r"\.\d+\.tmp\b", "", str(path))  # people know the name it was to get
        problem = WriteError(f"{name} could not be written: {said}{_free_space(Path(path))}; {remedy}, then run the same command again")
        problem.errno = error.errno
        raise problem from error


def _free_space(path: Path) -> str:
    for folder in (path, *Path(os.path.abspath(path)).parents):
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB free there)"
    return ""


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this process writes it; `remove_leftovers` knows it."""
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    path = Path(path)
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Add a line (UTF-8) to a file that grows. What a full disk lets through of it is taken back: the next line begins on its own."""
    with writing(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(f"{line}\n".encode())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8, line ends as given) in one step."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Fill the yielded temporary directory; on success it takes the place of `path`, on an error it is removed.

    A directory that already stands at `path` is moved aside first and deleted last, so that a crash between the two
    renames still leaves its content on disk (`.<name>.replaced`), from where `recover_directory` brings it back.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(path)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    try:
        yield temporary
        with writing(path):
            for entry in [*temporary.rglob("*"), temporary]:
                sync(entry)
            old = _aside(path)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that takes no writes any more: later
            recover_directory(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_directory(path: str | Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    path = Path(path)
    old = _aside(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, path)


def remove_leftovers(folder: str | Path) -> None:
    """Delete temporary files and directories that a killed process left in `folder`, and undo replacements that it left half done."""
    for entry in list(Path(folder).iterdir()):
        with writing(entry):
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            elif entry.name.startswith(".") and entry.name.endswith(_ASIDE):
                recover_directory(entry.with_name(entry.name[1 : -len(_ASIDE)]))


def discard_directory(path: Path) -> None:
    """Delete a directory so that an interruption leaves it whole or gone (or under a name that `remove_leftovers` knows)."""
    temporary = temporary_name(path)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _aside(path: Path) -> Path:
    # Not a name like `sft.old`, which people give to their own backups: what stands here is deleted.
    path = Path(os.path.abspath(path))  # "." and ".." have no name
    return path.with_name(f".{path.name}{_ASIDE}")


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries where the system can open a directory (Windows cannot)."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        descriptor = os.open(path, flags)
    except (PermissionError, IsADirectoryError):
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems refuse to flush a directory; the renames above are still atomic there.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
