"""What a plan sees of the files: read folder by folder when asked, and changed in memory only, so that a plan of several steps can
be checked before any of it is done."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from inference.file_paths import Parts, Policy, UnsafePath, folded, joined, relative_parts
from inference.file_root import Root, kind


@dataclass
class Node:
    """One file or folder."""

    kind: str
    """"file", "folder", "link", or "special": a device, what belongs to the assistant, or has a name that no path can say."""
    size: int = 0
    modified: float = 0.0
    """Seconds since 1970."""
    origin: Parts | None = None
    """Where its content stands on the disk; None for what the plan makes."""
    children: dict[str, Node] | None = field(default=None, repr=False)
    """None for a folder that was not read yet."""


class Tree:
    """Raises ValueError when more is looked at than policy.max_seen."""

    def __init__(self, root: Root, policy: Policy) -> None:
        self.root, self.policy = root, policy
        self.top = Node("folder", origin=())
        self.seen = 0

    def children(self, node: Node) -> dict[str, Node]:
        """What stands in a folder, by name."""
        if node.children is None:
            node.children = {}
            if node.origin is not None:
                self._read(node, node.origin)
        return node.children

    def _read(self, node: Node, origin: Parts) -> None:
        assert node.children is not None
        with self.root.folder(origin) as folder:
            for name in folder.names():
                self.seen += 1
                if self.seen > self.policy.max_seen:
                    raise ValueError(f"there are more than {self.policy.max_seen} files and folders to look at; name a smaller folder")
                try:
                    relative_parts(name)
                    status = folder.status(name)
                except FileNotFoundError:
                    continue
                except UnsafePath:
                    node.children[name] = Node("special")
                else:
                    node.children[name] = Node(kind(status), status.st_size, status.st_mtime, (*origin, name))

    def get(self, parts: Parts) -> Node | None:
        """What stands at a path; None when there is nothing. UnsafePath when a link stands on the way."""
        node = self.top
        for index, part in enumerate(parts):
            if node.kind == "link":
                raise UnsafePath(f"{joined(parts[:index])} is a link; links are not followed")
            if node.kind != "folder" or part not in self.children(node):
                return None
            node = self.children(node)[part]
        return node

    def walk(self, parts: Parts, everything: bool = True) -> Iterator[tuple[Parts, Node]]:
        """What stands below a folder, folders before their content. everything=False stays out of hidden and of denied folders."""
        node = self.get(parts)
        if node is None or node.kind != "folder":
            return
        for name, child in list(self.children(node).items()):
            below = (*parts, name)
            yield below, child
            if everything or not (name.startswith(".") or self.policy.refusal(below, folder=True)):
                yield from self.walk(below, everything)

    def put(self, parts: Parts, node: Node) -> None:
        """Place something in a folder that is there."""
        parent = self.get(parts[:-1])
        assert parent is not None
        self.children(parent)[parts[-1]] = node

    def take(self, parts: Parts) -> Node:
        """Remove something that is there."""
        parent = self.get(parts[:-1])
        assert parent is not None
        return self.children(parent).pop(parts[-1])

    def matching(self, folder: Parts, pattern: str, subfolders: bool) -> list[Parts]:
        """The files whose name fits a pattern such as *.txt or *.{jpg,png} (without case; hidden ones only when it begins with a dot)."""
        braces = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", folded(pattern))
        wanted = [braces[1] + choice.strip() + braces[3] for choice in braces[2].split(",")] if braces else [folded(pattern)]
        return [
            parts
            for parts, node in (self.walk(folder, everything=False) if subfolders else self.direct(folder))
            if node.kind == "file"
            and (pattern.startswith(".") or not parts[-1].startswith("."))
            and any(fnmatch.fnmatchcase(folded(parts[-1]), choice) for choice in wanted)
        ]

    def direct(self, folder: Parts) -> Iterator[tuple[Parts, Node]]:
        """What stands in a folder itself."""
        node = self.get(folder)
        if node is not None and node.kind == "folder":
            yield from (((*folder, name), child) for name, child in self.children(node).items())
