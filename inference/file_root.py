"""A folder that nothing leads out of: opening, reading and moving below it without ever following a link.

Where the system has them (Linux, macOS), every step goes through descriptors of folders opened one by one with O_NOFOLLOW, so that
what was checked is what is used, also when somebody swaps a folder for a link in between. Elsewhere (Windows) the chain of folders
is compared with what it was, before and after each step. Nothing here replaces or deletes what a user made: `move` refuses a name
that is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from inference.file_paths import Parts, UnsafePath, joined

HAS_DESCRIPTORS = hasattr(os, "O_NOFOLLOW") and {os.open, os.stat, os.mkdir, os.rmdir, os.rename, os.link, os.unlink} <= os.supports_dir_fd

_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | sum(getattr(os, n, 0) for n in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
CHUNK = 1 << 20
PLACEHOLDER = b"smarthaoai: this name is kept for a file that is being moved here\n"
# Links and mounted folders of Windows; other reparse points (files that a cloud fetches when needed) are files.
_LINK_TAGS = {getattr(stat, name, -1) for name in ("IO_REPARSE_TAG_SYMLINK", "IO_REPARSE_TAG_MOUNT_POINT", "IO_REPARSE_TAG_APPEXECLINK")}

Identity = tuple[int, int]


def identity(status: os.stat_result) -> Identity:
    """What makes two names the same file."""
    return status.st_dev, status.st_ino


def kind(status: os.stat_result) -> str:
    """ "file", "folder", "link" or "special" (a device, pipe or socket)."""
    if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) in _LINK_TAGS:
        return "link"
    return "file" if stat.S_ISREG(status.st_mode) else "folder" if stat.S_ISDIR(status.st_mode) else "special"


class Root:
    """The folder itself. Raises FileNotFoundError or NotADirectoryError when it is none, ValueError for the top of a disk.

    descriptors=False takes the way without descriptors where both are possible.
    """

    def __init__(self, path: str | Path, descriptors: bool = HAS_DESCRIPTORS) -> None:
        self.path = Path(os.path.realpath(os.path.expanduser(path)))  # the user's own link to the root is the user's business
        if not self.path.is_dir():
            raise (NotADirectoryError if self.path.exists() else FileNotFoundError)(f"{path} is not a folder: name an existing one")
        if self.path == Path(self.path.anchor):
            raise ValueError(f"{self.path} is the top of the disk: choose a folder for the assistant's files")
        self.descriptors = descriptors
        self.identity = identity(os.lstat(self.path))
        self.private: set[Identity] = set()
        """Folders that are not to be entered, under whatever name they appear."""

    @contextlib.contextmanager
    def folder(self, parts: Parts = ()) -> Iterator[Folder]:
        """The folder at a path below the root. FileNotFoundError, NotADirectoryError; UnsafePath for a link on the way."""
        with contextlib.ExitStack() as opened:
            here = Folder(self, None, "", self.identity)
            opened.callback(here.close)
            for part in parts:
                here = here.enter(part)
                opened.callback(here.close)
            yield here

    @contextlib.contextmanager
    def at(self, parts: Parts) -> Iterator[tuple[Folder, str]]:
        """The folder that holds a path, and the last name of the path. UnsafePath for the root itself."""
        if not parts:
            raise UnsafePath("the folder itself is never changed")
        with self.folder(parts[:-1]) as folder:
            yield folder, parts[-1]


class Folder:
    """One folder below the root. Its methods take single names, never paths; missing names raise FileNotFoundError."""

    def __init__(self, root: Root, parent: Folder | None, name: str, known: Identity) -> None:
        self.root, self.parent, self.name, self.identity = root, parent, name, known
        self.path: Path = root.path if parent is None else parent.path / name
        self.descriptor: int | None = None
        if root.descriptors:
            flags = _READ | os.O_DIRECTORY
            self.descriptor = os.open(self.path, flags) if parent is None else os.open(name, flags, dir_fd=parent.descriptor)
            if identity(os.fstat(self.descriptor)) != known:
                self.close()
                raise UnsafePath(f"{self} was replaced by something else in the meantime")
        else:
            self.check()

    def __str__(self) -> str:
        return "the folder" if self.parent is None else joined(self.path.relative_to(self.root.path).parts)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def check(self) -> None:
        """UnsafePath when the way here is not what it was; with descriptors nothing can have changed."""
        if self.descriptor is not None:
            return
        if self.parent is not None:
            self.parent.check()
        status = os.lstat(self.path)
        if identity(status) != self.identity or kind(status) != "folder":
            raise UnsafePath(f"{self} was replaced by something else in the meantime")

    def sync(self) -> None:
        """Flush the names in this folder to the disk, where the system can."""
        self.check()
        if self.descriptor is not None:
            os.fsync(self.descriptor)

    def enter(self, name: str, private: bool = False) -> Folder:
        """The folder of this name, open; the caller closes it. private: the assistant's own may be entered."""
        status = self.status(name, private)
        if kind(status) == "link":
            raise UnsafePath(f"{self._named(name)} is a link; links are not followed")
        if kind(status) != "folder":
            raise NotADirectoryError(f"{self._named(name)} is not a folder")
        return Folder(self.root, self, name, identity(status))

    def names(self) -> list[str]:
        self.check()
        return sorted(os.listdir(self.path if self.descriptor is None else self.descriptor))

    def status(self, name: str, private: bool = False) -> os.stat_result:
        """What stands at a name, a link as a link. FileNotFoundError; UnsafePath for what belongs to the assistant."""
        target, where = self._target(name)
        try:
            status = os.stat(target, follow_symlinks=False, **where)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no {self._named(name)}") from error
        if not private and identity(status) in self.root.private:
            raise UnsafePath(f"{self._named(name)} belongs to the assistant itself")
        return status

    def has(self, name: str) -> bool:
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def chunks(self, name: str, most: int) -> Iterator[bytes]:
        """The bytes of an ordinary file, piece by piece. ValueError when there are more than `most`; UnsafePath for a link or a device."""
        status = self.status(name)
        self._must_be_file(name, status)
        target, where = self._target(name)
        descriptor = os.open(target, _READ, **where)
        with os.fdopen(descriptor, "rb") as file:
            opened = os.fstat(file.fileno())
            self._must_be_file(name, opened)
            self.check()
            if identity(opened) != identity(status):
                raise self._replaced(name)
            if opened.st_size > most:
                raise ValueError(f"{self._named(name)} has {opened.st_size} bytes, more than the {most} that are read")
            while piece := file.read(CHUNK):
                most -= len(piece)
                if most < 0:
                    raise ValueError(f"{self._named(name)} grew while it was read")
                yield piece

    def read(self, name: str, most: int) -> bytes:
        """`chunks` in one."""
        return b"".join(self.chunks(name, most))

    def write(self, name: str, data: Iterable[bytes], mode: int | None = None) -> str:
        """A new file, flushed to the disk; the sha256 of what was written. mode: its permissions. FileExistsError."""
        target, where = self._target(name)
        digest = hashlib.sha256()
        try:
            descriptor = os.open(target, _WRITE, 0o666, **where)
        except FileExistsError as error:
            raise self._taken(name) from error
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode & 0o777)
            for piece in data:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(descriptor)
        self.check()
        return digest.hexdigest()

    def append_line(self, name: str, line: bytes) -> None:
        """At the end of a file of the assistant's own, which is made when it is missing; flushed to the disk."""
        with os.fdopen(self.open_own(name), "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that was cut off by a crash must not swallow this one
                    file.write(b"\n")
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def open_own(self, name: str) -> int:
        """A descriptor to write to a file of the assistant's own. UnsafePath when it is a link, a pipe, or has another name elsewhere,
        as whoever can write here could have arranged."""
        target, where = self._target(name)
        descriptor = os.open(target, _APPEND, 0o600, **where)
        status = os.fstat(descriptor)
        if kind(status) != "file" or status.st_nlink > 1 or (self.descriptor is None and identity(self.status(name)) != identity(status)):
            os.close(descriptor)
            raise UnsafePath(f"{self._named(name)} is not the assistant's own file; remove it")
        return descriptor

    def make_folder(self, name: str, mode: int = 0o777) -> None:
        """FileExistsError when the name is taken."""
        target, where = self._target(name)
        try:
            os.mkdir(target, mode, **where)
        except FileExistsError as error:
            raise self._taken(name) from error
        self.check()

    def remove_folder(self, name: str) -> None:
        """An empty folder. OSError when it is not empty."""
        target, where = self._target(name)
        os.rmdir(target, **where)

    def remove(self, name: str) -> None:
        """One name of a file."""
        target, where = self._target(name)
        os.unlink(target, **where)

    def replace(self, name: str, into: Folder, new: str) -> None:
        """Put a file of the assistant in the place of another in one step. UnsafePath when a link or a folder stands there."""
        if into.has(new):
            self._must_be_file(new, into.status(new))
        paths, where = self._both(name, into, new)
        os.replace(*paths, **where)
        into.sync()

    def keep(self, name: str, into: Folder, new: str) -> None:
        """A second name for a file (where the disk has none: a copy), so that it survives when the first is replaced."""
        status = self.status(name)
        self._must_be_file(name, status)
        try:
            self._link(name, into, new)
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):
            part = f"{new}.part"  # never half a copy under the name itself
            if into.has(part):
                into.remove(part)
            into.write(part, self.chunks(name, status.st_size), status.st_mode)
            into._rename(part, into, new)

    def move(self, name: str, into: Folder, new: str) -> None:
        """Move a file or folder within the disk. FileExistsError when the new name is taken; links and devices are refused."""
        status = self.status(name)
        if kind(status) != "folder":
            self._must_be_file(name, status)
        if into.has(new):
            same = identity(into.status(new)) == identity(status) and self.identity == into.identity
            if not (same and name != new and name.casefold() == new.casefold()):  # the same name in other case is the file itself
                raise into._taken(new)
            self._rename(name, into, new)
        elif os.name == "nt":
            self._rename(name, into, new)  # refuses a name that is taken
        else:
            self._move_exclusively(name, into, new, status)
        self._must_have_moved(name, into, new, status)
        into.sync()
        self.sync()

    def _move_exclusively(self, name: str, into: Folder, new: str, status: os.stat_result) -> None:
        """On POSIX a rename replaces what has the name, so the name is taken first: by a second name of the file, or a placeholder."""
        if kind(status) == "folder":
            into.make_folder(new, status.st_mode & 0o777)  # the rename replaces this empty folder
        else:
            try:
                self._link(name, into, new)
            except FileExistsError as error:
                raise into._taken(new) from error
            except (OSError, NotImplementedError):  # a disk without second names
                into.write(new, [PLACEHOLDER])
            else:
                try:
                    if identity(into.status(new)) != identity(status) or identity(self.status(name)) != identity(status):
                        raise self._replaced(name)
                    self.remove(name)
                except UnsafePath:
                    into.remove(new)
                    raise
                return
        try:
            self._rename(name, into, new)
        except OSError:
            into.remove_placeholder(new)
            raise

    def _must_have_moved(self, name: str, into: Folder, new: str, status: os.stat_result) -> None:
        """What came to the new name must be what was looked at; else it goes back to where it came from. Without descriptors, somebody
        may have swapped a folder between the last look and the renaming."""
        if identity(into.status(new)) == identity(status):
            return
        if self.descriptor is not None and not self.has(name):
            into._rename(new, self, name)
        elif self.descriptor is None and not os.path.lexists(self.path / name):
            os.rename(into.path / new, self.path / name)
        raise self._replaced(name)

    def remove_placeholder(self, name: str) -> bool:
        """Remove what holds a name for a move that was interrupted; False when it is something else."""
        status = self.status(name)
        if kind(status) == "folder":
            try:
                self.remove_folder(name)
            except OSError:
                return False
            return True
        if kind(status) != "file" or status.st_size != len(PLACEHOLDER) or self.read(name, len(PLACEHOLDER)) != PLACEHOLDER:
            return False
        self.remove(name)
        return True

    def _link(self, name: str, into: Folder, new: str) -> None:
        paths, where = self._both(name, into, new)
        os.link(*paths, follow_symlinks=False, **where)

    def _rename(self, name: str, into: Folder, new: str) -> None:
        paths, where = self._both(name, into, new)
        os.rename(*paths, **where)

    def _target(self, name: str) -> tuple[Any, dict[str, Any]]:
        """How a system call names something here."""
        if name in ("", ".", "..") or "/" in name or os.sep in name or "\0" in name:
            raise UnsafePath(f"{name!r:.120} is not a name")
        if self.descriptor is not None:
            return name, {"dir_fd": self.descriptor}
        self.check()
        return self.path / name, {}

    def _both(self, name: str, into: Folder, new: str) -> tuple[tuple[Any, Any], dict[str, Any]]:
        (source, here), (target, there) = self._target(name), into._target(new)
        where = {"src_dir_fd": here["dir_fd"], "dst_dir_fd": there["dir_fd"]} if here else {}
        return (source, target), where

    def _must_be_file(self, name: str, status: os.stat_result) -> None:
        found = kind(status)
        if found != "file":
            words = {"link": "a link; links are left alone", "folder": "a folder, not a file", "special": "a device, pipe or socket"}
            raise UnsafePath(f"{self._named(name)} is {words[found]}")

    def _replaced(self, name: str) -> UnsafePath:
        return UnsafePath(f"{self._named(name)} was replaced by something else in the meantime")

    def _taken(self, name: str) -> FileExistsError:
        return FileExistsError(f"{self._named(name)} exists already; nothing is ever replaced")

    def _named(self, name: str) -> str:
        return name if self.parent is None else f"{self}/{name}"
