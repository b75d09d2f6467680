"""Carrying out one change of a plan, and taking it back.

A change is logged, then made by moves that replace nothing: what is written is first complete in the backup folder and then moved
to its place; what is deleted is moved there. So an interruption at any point leaves the old state, the new one, or one that
`take_back` recognises, and nothing is ever lost.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from inference.file_journal import Change, State
from inference.file_paths import Parts, Policy, joined
from inference.file_root import Folder, Root, identity, kind

Edit = Callable[[bytes], bytes]


def carry_out(root: Root, state: State, change: Change, policy: Policy, content: bytes = b"", edit: Edit | None = None) -> None:
    """Make one change and log it. When it fails, what it began is taken back, and the error is raised.

    content: of kind "create". edit: of kind "update", from the old bytes to the new ones.
    """
    try:
        _prepare(root, state, change, policy, content, edit)
    except (OSError, ValueError) as error:
        _drop(state.backup, change.keep)
        state.begin(change)
        state.end(change, "failed", error=str(error))
        raise
    state.begin(change)
    try:
        _make(root, state, change)
    except (OSError, ValueError) as error:
        change.outcome = "failed"  # each step leaves nothing behind when it fails, but what came before it
        take_back(root, state, change, outcome="failed", error=str(error))
        raise
    state.end(change, "done")


def take_back(root: Root, state: State, change: Change, outcome: str = "undone", **more: str) -> None:
    """Undo a change, whether it was finished, interrupted (also in its undoing) or never begun, and log it.

    ValueError or OSError when that would lose something: the file was changed since, or its old name is taken.
    """
    path, to, kept = joined(change.path), joined(change.to), f"//{change.keep}"
    if change.kind == "tag":
        state.set_tags(path, change.before)
    elif change.kind == "delete":
        with _restored(root, change.path) as (folder, name):
            _move_back(folder, name, state.backup, change.keep, change)
        state.move_tags(kept, path)
    elif change.kind in ("move", "rename"):
        with root.at(change.to) as (into, new), _restored(root, change.path) as (folder, name):
            _move_back(folder, name, into, new, change)
        state.move_tags(to, path)
    else:
        with root.at(change.to or change.path) as (folder, name):
            if change.kind == "folder":
                _remove_folder(folder, name)
            elif change.kind == "update":
                _take_back_update(state.backup, change, folder, name)
            else:
                _must_be_unchanged(folder, name, change)
                _move_back(state.backup, change.keep, folder, name, change)
                state.move_tags(to if change.to else path, kept)
    state.end(change, outcome, **more)


def _prepare(root: Root, state: State, change: Change, policy: Policy, content: bytes, edit: Edit | None) -> None:
    """Write what the change is to write, completely, into the backup folder."""
    if change.kind == "create":
        change.digest = state.backup.write(change.keep, [content])
    elif change.kind == "copy":
        with root.at(change.path) as (folder, name):
            mode = folder.status(name).st_mode
            change.digest = state.backup.write(change.keep, folder.chunks(name, policy.max_copy), mode)
    elif change.kind == "update":
        assert edit is not None
        with root.at(change.path) as (folder, name):
            old = folder.read(name, policy.max_read)
            change.before = (hashlib.sha256(old).hexdigest(),)
            change.digest = state.backup.write(change.keep + ".new", [edit(old)], folder.status(name).st_mode)
    elif change.kind == "tag":
        change.before = tuple(state.tags_of(joined(change.path)))


def _make(root: Root, state: State, change: Change) -> None:
    path, to = joined(change.path), joined(change.to)
    with root.at(change.path) as (folder, name):
        if change.kind == "folder":
            folder.make_folder(name)
        elif change.kind == "create":
            state.backup.move(change.keep, folder, name)
        elif change.kind == "update":
            folder.keep(name, state.backup, change.keep + ".old")
            if _digest(state.backup, change.keep + ".old") != change.before[0]:
                state.backup.remove(change.keep + ".old")
                raise ValueError(f"{path} was changed by another program in the meantime; look at it and try again")
            state.backup.replace(change.keep + ".new", folder, name)
        elif change.kind == "delete":
            folder.move(name, state.backup, change.keep)
            state.move_tags(path, f"//{change.keep}")
        elif change.kind == "tag":
            folder.status(name)  # only what is there has tags
            state.set_tags(path, change.after)
        else:
            with root.at(change.to) as (into, new):
                if change.kind == "copy":
                    state.backup.move(change.keep, into, new)
                else:
                    folder.move(name, into, new)
                    state.move_tags(path, to)


def _move_back(folder: Folder, name: str, now: Folder, now_name: str, change: Change) -> None:
    """Give what is `now` somewhere else its old name again. The old name may be there already: then a move, or the way back, was
    interrupted."""
    old, new = folder.has(name), now.has(now_name)
    if not new:
        if not old and change.stands:
            raise FileNotFoundError(f"{joined(change.to or change.path)} cannot be restored: it is no longer where it was put")
    elif not old:
        now.move(now_name, folder, name)
    elif identity(folder.status(name)) == identity(now.status(now_name)):
        if not (folder.identity == now.identity and name.casefold() == now_name.casefold()):
            now.remove(now_name)
        else:
            now.move(now_name, folder, name)
    elif change.outcome == "failed" or _was_interrupted(folder, name, now, now_name, change):
        return
    else:
        raise FileExistsError(f"{joined(change.path)} cannot be restored: the name is taken by something newer")


def _was_interrupted(folder: Folder, name: str, now: Folder, now_name: str, change: Change) -> bool:
    """Whether both names are there because a move, or the way back, was interrupted; then it is finished: the way back."""
    if change.outcome == "done" or kind(folder.status(name)) != kind(now.status(now_name)):
        return False
    if now.remove_placeholder(now_name):
        return True
    if not folder.remove_placeholder(name):
        return False
    now.move(now_name, folder, name)
    return True


def _take_back_update(backup: Folder, change: Change, folder: Folder, name: str) -> None:
    old, undone = change.keep + ".old", change.keep + ".undone"
    if not backup.has(old):
        if change.stands and folder.has(name) and _digest(folder, name) == change.digest:
            raise FileNotFoundError(f"{joined(change.path)} cannot be restored: its backup is gone")
    elif not folder.has(name):
        backup.move(old, folder, name)
    elif identity(folder.status(name)) == identity(backup.status(old)):
        backup.remove(old)  # interrupted before the new version took its place
    else:
        _must_be_unchanged(folder, name, change)
        if _digest(backup, old) != change.before[0]:
            raise ValueError(f"{joined(change.path)} cannot be restored: its backup was changed")
        if backup.has(undone):
            backup.remove(undone)
        folder.keep(name, backup, undone)
        backup.replace(old, folder, name)


def _must_be_unchanged(folder: Folder, name: str, change: Change) -> None:
    if change.stands and folder.has(name) and _digest(folder, name) != change.digest:
        raise ValueError(f"{joined(change.to or change.path)} was changed since; to undo would lose that, so it is left as it is")


def _remove_folder(folder: Folder, name: str) -> None:
    if not folder.has(name):
        return
    with contextlib.closing(folder.enter(name)) as made:
        if made.names():
            raise ValueError(f"the folder {name} is not empty any more, so it is left")
    folder.remove_folder(name)


@contextlib.contextmanager
def _restored(root: Root, parts: Parts) -> Iterator[tuple[Folder, str]]:
    """`root.at`, after making the folders on the way again that were removed since."""
    for depth in range(1, len(parts)):
        with root.at(parts[:depth]) as (folder, name):
            if not folder.has(name):
                folder.make_folder(name)
    with root.at(parts) as found:
        yield found


def _digest(folder: Folder, name: str) -> str:
    digest = hashlib.sha256()
    for piece in folder.chunks(name, folder.status(name).st_size):
        digest.update(piece)
    return digest.hexdigest()


def _drop(folder: Folder, name: str) -> None:
    """Remove a version that was written for nothing."""
    for written in (name, name + ".new"):
        if folder.has(written):
            folder.remove(written)
