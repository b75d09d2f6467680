"""From requests ("move *.txt to notes") to a plan: every single change it would make, checked against rules and against the files.

`make_plan` looks at the files, changes none, and leaves out what must not be done, with a note that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.file_paths import Parts, Policy, UnsafePath, joined, new_parts, relative_parts
from inference.file_requests import LOOKS, check_requests
from inference.file_root import Root
from inference.file_tree import Node, Tree
from inference.file_types import group_name


@dataclass(frozen=True)
class Step:
    """One thing to do with one file or folder."""

    kind: str
    """"list" or "read", or a kind of `file_journal.KINDS`."""
    path: Parts
    to: Parts = ()
    content: str = ""
    find: str = ""
    append: bool = False
    tags: tuple[str, ...] = ()
    remove: bool = False
    subfolders: bool = False
    files: int = 1
    """How many files and folders it touches."""

    def to_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"operation": self.kind, "path": joined(self.path)}
        shown.update({"to": joined(self.to)} if self.to else {})
        shown.update({name: getattr(self, name) for name in ("content", "find", "append", "remove", "subfolders") if getattr(self, name)})
        return {**shown, **({"tags": list(self.tags)} if self.tags else {}), "files": self.files}


@dataclass
class Plan:
    """What would be done, in order, and what is left out and why."""

    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def changes(self) -> list[Step]:
        return [step for step in self.steps if step.kind not in LOOKS]

    @property
    def confirmations(self) -> int:
        """How often the user is asked: twice for what deletes, and for several renames."""
        kinds = [step.kind for step in self.changes]
        return 0 if not kinds else 2 if "delete" in kinds or kinds.count("rename") > 1 else 1

    def to_dict(self) -> dict[str, Any]:
        return {"operations": [step.to_dict() for step in self.steps], "notes": self.notes, "confirmations": self.confirmations}


def make_plan(
    requests: Sequence[dict[str, Any]], root: Root, policy: Policy, tags: dict[str, list[str]] | None = None, language: str = "en"
) -> Plan:
    """The plan of some requests. Raises ValueError (UnsafePath among them) when one cannot be done at all; of several files that a
    pattern names, those that cannot are left out with a note. language: of the folders that "classify" makes."""
    check_requests(requests)
    planner = _Planner(root, policy, tags or {}, language)
    for request in requests:
        planner.add(request)
    touched = sum(step.files for step in planner.plan.changes)
    if touched > policy.max_operations:
        raise ValueError(
            f"the plan touches {touched} files and folders, at most {policy.max_operations} at once: name fewer, or raise --limit"
        )
    if planner.copied > policy.max_copy:
        raise ValueError(f"the plan copies {planner.copied} bytes, at most {policy.max_copy}")
    return planner.plan


class _Planner:
    def __init__(self, root: Root, policy: Policy, tags: dict[str, list[str]], language: str) -> None:
        self.policy, self.tags, self.language = policy, tags, language
        self.tree = Tree(root, policy)
        self.plan = Plan()
        self.copied = 0

    def add(self, request: dict[str, Any]) -> None:
        getattr(self, f"_{request['operation']}")(**{name: value for name, value in request.items() if name != "operation"})

    def _list(self, path: str = "", subfolders: bool = False, tags: Sequence[str] = ()) -> None:
        parts = () if _is_pattern(path) else relative_parts(path)
        if _is_pattern(path):
            self._select(path, subfolders)
            self.plan.steps.append(Step("list", (), find=path, tags=tuple(tags), subfolders=subfolders))
            return
        node = self._there(parts)
        self._allowed(parts, folder=node.kind == "folder")
        self.plan.steps.append(Step("list", parts, tags=tuple(tags), subfolders=subfolders or bool(tags)))

    def _read(self, path: str) -> None:
        parts = relative_parts(path)
        self._file(parts)
        self._allowed(parts)
        self.plan.steps.append(Step("read", parts))

    def _create(self, path: str, content: str = "") -> None:
        parts = new_parts(path)
        self._small(content)
        self._free(parts)
        self._parents(parts)
        self._do(Step("create", parts, content=content))
        self.tree.put(parts, Node("file", len(content.encode("utf-8"))))

    def _make_folder(self, path: str) -> None:
        parts = new_parts(path)
        self._free(parts, folder=True)
        self._parents(parts)
        self._folder(parts)

    def _update(self, path: str, content: str, mode: str = "replace", find: str = "") -> None:
        parts = relative_parts(path)
        node = self._file(parts)
        self._allowed(parts)
        self._small(content)
        if find and mode == "append":
            raise ValueError("the plan cannot be used: update takes find or mode append, not both")
        if node.size > self.policy.max_read:
            raise ValueError(f"{joined(parts)} has {node.size} bytes, more than the {self.policy.max_read} that are edited")
        self._do(Step("update", parts, content=content, find=find, append=mode == "append"))

    def _move(self, path: str, to: str, subfolders: bool = False) -> None:
        self._transfer("move", path, to, subfolders)

    def _copy(self, path: str, to: str, subfolders: bool = False) -> None:
        self._transfer("copy", path, to, subfolders)

    def _transfer(self, kind: str, path: str, to: str, subfolders: bool) -> None:
        sources, several = self._select(path, subfolders)
        target = relative_parts(to)
        there = self.tree.get(target)
        if there is not None and there.kind != "folder" and several:
            raise ValueError(f"{joined(target)} is a file; several files need a folder to go to")
        into = several or to.endswith(("/", "\\")) or (there is not None and there.kind == "folder")
        if there is None and self._there(sources[0]).kind == "file" and "." not in target[-1]:
            into = True  # notes.txt would be the file's new name, notes is a folder to be made
        for parts in sources:
            self._each(several, self._transfer_one, kind, parts, (*target, parts[-1]) if into else target)

    def _transfer_one(self, kind: str, parts: Parts, to: Parts) -> None:
        node = self._whole(parts)
        if to[: len(parts)] == parts:
            raise ValueError(f"{joined(parts)} is there already" if to == parts else f"{joined(parts)} cannot go into itself")
        for below, child in [(parts, node), *self.tree.walk(parts)]:
            self._allowed((*to, *below[len(parts) :]), folder=child.kind == "folder")
        if to[-1] != parts[-1] and len(new_parts(to[-1])) != 1:
            raise UnsafePath(f"{to[-1]!r} is a path, not a name")
        self._free(to)
        if kind == "copy" and node.kind == "folder":
            self._parents(to)
            self._copy_folder(parts, to)
            return
        self._parents(to)
        if kind == "copy":
            self.copied += node.size
            self._do(Step("copy", parts, to))
            self.tree.put(to, Node("file", node.size, node.modified, node.origin))
        else:
            self._do(Step(kind, parts, to, files=1 + sum(1 for _ in self.tree.walk(parts))))
            self.tree.put(to, self.tree.take(parts))

    def _copy_folder(self, parts: Parts, to: Parts) -> None:
        below = list(self.tree.walk(parts))
        self._folder(to)
        for inner, child in below:
            target = (*to, *inner[len(parts) :])
            if child.kind == "folder":
                self._folder(target)
            else:
                self.copied += child.size
                self._do(Step("copy", inner, target))
                self.tree.put(target, Node("file", child.size, child.modified, child.origin))

    def _rename(self, path: str, to: str, subfolders: bool = False) -> None:
        sources, several = self._select(path, subfolders)
        if several and (path.rpartition("/")[2].count("*") != 1 or to.count("*") != 1):
            raise ValueError(f"to rename several files, both names need one *, as in *.jpeg -> *.jpg; got {path} -> {to}")
        if not several and "*" in to:
            raise ValueError(f"the new name {to!r} holds a *; give one for {joined(sources[0])}")
        if several and ("/" in to or "\\" in to):
            raise ValueError(f"{to!r} is a path, not a name; use move to change the folder")
        for parts in sources:
            if several:
                head, _, tail = path.rpartition("/")[2].partition("*")
                name = to.replace("*", parts[-1][len(head) : len(parts[-1]) - len(tail)])
            else:
                target = new_parts(to)
                if len(target) > 1 and target[:-1] != parts[:-1]:
                    raise ValueError(f"{to!r} is in another folder than {joined(parts)}; use move")
                name = target[-1]
            self._each(several, self._transfer_one, "rename", parts, (*parts[:-1], name))

    def _delete(self, path: str, subfolders: bool = False) -> None:
        sources, several = self._select(path, subfolders)
        for parts in sources:
            self._each(several, self._delete_one, parts)

    def _delete_one(self, parts: Parts) -> None:
        self._whole(parts)
        self._do(Step("delete", parts, files=1 + sum(1 for _ in self.tree.walk(parts))))
        self.tree.take(parts)

    def _classify(self, path: str = "", by: str = "type") -> None:
        parts = relative_parts(path)
        if self._there(parts).kind != "folder":
            raise ValueError(f"{joined(parts)} is not a folder")
        found = [(inner, node) for inner, node in self.tree.direct(parts) if node.kind == "file" and not inner[-1].startswith(".")]
        for inner, node in found:
            group = group_name(by, inner[-1], node.modified, self.tags.get("/".join(inner), []), self.language)
            if group:
                self._each(True, self._transfer_one, "move", inner, (*parts, group, inner[-1]))

    def _tag(self, path: str, tags: Sequence[str], subfolders: bool = False, remove: bool = False) -> None:
        cleaned = tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
        if not cleaned or any(not tag.isprintable() for tag in cleaned):
            raise ValueError(f"tags {list(tags)} must be words")
        sources, several = self._select(path, subfolders)
        for parts in sources:
            self._each(several, self._tag_one, parts, cleaned, remove)

    def _tag_one(self, parts: Parts, tags: tuple[str, ...], remove: bool) -> None:
        self._allowed(parts, folder=self._there(parts).kind == "folder")
        self._do(Step("tag", parts, tags=tags, remove=remove))

    # What the above is made of.

    def _each(self, several: bool, work: Any, *arguments: Any) -> None:
        """Of several files one that cannot be done becomes a note."""
        try:
            work(*arguments)
        except ValueError as error:
            if not several:
                raise
            self.plan.notes.append(str(error))

    def _select(self, path: str, subfolders: bool) -> tuple[list[Parts], bool]:
        """The files that a path or pattern names, and whether it is a pattern."""
        if not _is_pattern(path) or _exists(self.tree, path):
            parts = relative_parts(path)
            self._there(parts)
            if not parts:
                raise UnsafePath("the folder itself is never changed; name what is in it, such as *.txt")
            return [parts], False
        head, _, pattern = path.rpartition("/")
        if head.endswith("**") or pattern.startswith("**"):
            head, subfolders = head.removesuffix("**").rstrip("/"), True
        if _is_pattern(head):
            raise ValueError(f"{path!r}: only the last part may be a pattern")
        relative_parts(pattern.translate(_LETTERS))
        folder = relative_parts(head)
        self._there(folder)
        found = self.tree.matching(folder, pattern, subfolders)
        if not found:
            more = [] if subfolders else self.tree.matching(folder, pattern, True)
            hint = f"; {len(more)} are in subfolders, which must be asked for" if more else ""
            raise ValueError(f"no file in {joined(folder)} fits {pattern!r}{hint}")
        return found, True

    def _there(self, parts: Parts) -> Node:
        node = self.tree.get(parts)
        if node is None:
            raise ValueError(f"there is no {joined(parts)}")
        if node.kind == "link":
            raise UnsafePath(f"{joined(parts)} is a link; links are left alone")
        if node.kind == "special":
            raise UnsafePath(
                self.policy.refusal(parts, folder=True) or f"{joined(parts)} is a device, pipe or socket, or has a strange name"
            )
        return node

    def _file(self, parts: Parts) -> Node:
        node = self._there(parts)
        if node.kind != "file":
            raise ValueError(f"{joined(parts)} is a folder, not a file")
        return node

    def _whole(self, parts: Parts) -> Node:
        """A file or folder that may be changed with all that is in it."""
        if not parts:
            raise UnsafePath("the folder itself is never changed")
        node = self._there(parts)
        self._allowed(parts, folder=node.kind == "folder")
        for below, child in self.tree.walk(parts):
            self._there(below)
            self._allowed(below, folder=child.kind == "folder")
        return node

    def _allowed(self, parts: Parts, folder: bool = False) -> None:
        refusal = self.policy.refusal(parts, folder)
        if refusal:
            raise UnsafePath(refusal)

    def _free(self, parts: Parts, folder: bool = False) -> None:
        self._allowed(parts, folder=True)
        if not folder:
            self._allowed(parts)
        if self.tree.get(parts) is not None:
            raise ValueError(f"{joined(parts)} exists already; nothing is ever replaced")

    def _parents(self, parts: Parts) -> None:
        """Plan the folders that are missing above a path."""
        for depth in range(1, len(parts)):
            above = self.tree.get(parts[:depth])
            if above is None:
                self._allowed(new_parts("/".join(parts[:depth]))[:depth], folder=True)
                self._folder(parts[:depth])
            elif above.kind != "folder":
                raise ValueError(f"{joined(parts[:depth])} is no folder, so {joined(parts)} cannot be in it")

    def _folder(self, parts: Parts) -> None:
        self._do(Step("folder", parts))
        self.tree.put(parts, Node("folder", children={}))

    def _small(self, content: str) -> None:
        try:
            size = len(content.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a character that cannot be written: {error}") from error
        if size > self.policy.max_write:
            raise ValueError(f"the text has {size} bytes, at most {self.policy.max_write} are written")

    def _do(self, step: Step) -> None:
        self.plan.steps.append(step)


_LETTERS = str.maketrans("*?[]{}", "xxxxxx")


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[{")


def _exists(tree: Tree, path: str) -> bool:
    """Whether a name that looks like a pattern is a file's."""
    try:
        return tree.get(relative_parts(path)) is not None
    except UnsafePath:
        return False
