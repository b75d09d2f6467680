"""Files that are either the old version or the new one, never half of each.

Every write goes to a temporary name beside the target, is flushed to disk and renamed. A reader (or a run that is
killed at any moment) therefore sees a complete file or directory, or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this process writes it; `remove_leftovers` knows it."""
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    temporary = temporary_name(path)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        old = _aside(path)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
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
    """Delete temporary files and directories that a killed process left in `folder`."""
    for entry in Path(folder).glob(f"*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _aside(path: Path) -> Path:
    # Not a name like `sft.old`, which people give to their own backups: what stands here is deleted.
    path = Path(os.path.abspath(path))  # "." and ".." have no name
    return path.with_name(f".{path.name}.replaced")


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
