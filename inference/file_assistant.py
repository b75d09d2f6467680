"""A file assistant that stays in one folder: a plan first, changes only when confirmed, every one logged and undoable.

python -m inference.file_assistant ROOT --prompt "move all .txt to notes"            # shows the plan, changes nothing
python -m inference.file_assistant ROOT --prompt "把所有 .txt 移到 notes 文件夹" --apply
python -m inference.file_assistant ROOT --undo
python -m inference.file_assistant ROOT --log

assistant = FileAssistant("documents")
plan = assistant.plan("delete all .tmp files")
print(assistant.preview(plan))
assistant.apply(plan, confirm=lambda question: input(question) == "y")
assistant.undo()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.file_changes import carry_out, take_back
from inference.file_journal import Change, Journal, State, read_changes
from inference.file_paths import Policy, UnsafePath, joined
from inference.file_plan import Plan, Step, make_plan
from inference.file_requests import OPERATIONS, PLAN_SCHEMA
from inference.file_root import HAS_DESCRIPTORS, Root
from inference.file_rules import read_prompt
from inference.file_texts import say
from inference.file_tree import Tree
from inference.json_schema import problems
from inference.json_text import JsonTextError, read_object

Confirm = Callable[[str], bool]
MOST_SHOWN = 20
MOST_LISTED = 500


@dataclass
class Outcome:
    """What became of a plan or an undoing, in words and in numbers."""

    done: int = 0
    failed: int = 0
    batch: int = 0
    text: str = ""
    lines: list[str] = field(default_factory=list, repr=False)


class FileAssistant:
    """Works in one folder. backup: where its log and backups go (default: `.smarthaoai` in the folder). language: zh or en.

    confirm: asked before a tool call changes something; None: tool calls only show their plan. Raises FileNotFoundError,
    NotADirectoryError or ValueError for a folder that cannot be worked in.
    """

    def __init__(
        self,
        root: str | Path,
        policy: Policy | None = None,
        backup: str | Path | None = None,
        language: str = "en",
        confirm: Confirm | None = None,
        descriptors: bool = HAS_DESCRIPTORS,
    ) -> None:
        self.root = Root(root, descriptors)
        self.policy = policy or Policy()
        self.language = language
        self.confirm = confirm
        self._journal = Journal(self.root, backup)

    # Planning.

    def plan(self, prompt: str) -> Plan:
        """The plan of a sentence, by rules (`file_rules`). Raises ValueError when it is not understood or cannot be done."""
        return self.plan_of(read_prompt(prompt))

    def plan_of(self, requests: Sequence[dict[str, Any]]) -> Plan:
        """The plan of requests of the form `file_requests.FILE_PARAMETERS`. Raises ValueError."""
        with self._journal.hidden():
            return make_plan(requests, self.root, self.policy, self._journal.tags(), self.language)

    def plan_by_model(self, prompt: str, generate: Callable[[list[dict[str, str]]], str]) -> Plan:
        """The plan that a model makes. generate: its answer, best held to PLAN_SCHEMA by a grammar, to a conversation. Raises
        ValueError when the answer is no plan, or one that cannot be done."""
        with self._journal.hidden():
            tree = Tree(self.root, self.policy)
            names = [f"{parts[-1]}{'/' * (node.kind == 'folder')}" for parts, node in tree.direct(()) if node.kind in ("file", "folder")]
        system = (
            "You plan work with files. Answer with JSON alone, such as "
            '{"operations": [{"operation": "move", "path": "*.txt", "to": "notes/"}]}. '
            f"Operations: {', '.join(OPERATIONS)}. Paths are relative. The folder holds: {', '.join(names[:100]) or 'nothing'}"
        )
        answer = generate([{"role": "system", "content": system}, {"role": "user", "content": prompt}])
        try:
            stated = read_object(answer.rpartition("</think>")[2])
        except JsonTextError as error:
            raise ValueError(
                f"the model's answer is not a plan ({error}): {answer[:200]!r}; ask again, or say it as the rules read it"
            ) from error
        return self.plan_of(stated_requests(stated))

    def preview(self, plan: Plan) -> str:
        """The plan in words; of looks (list, read) their result."""
        lines = []
        for step in plan.steps:
            if step.kind in ("list", "read"):
                lines.append(self._look(step))
        changes = [f"  {number}. {self._words(step)}" for number, step in enumerate(plan.changes, start=1)]
        if changes:
            lines += [say("plan", self.language, count=len(changes)), *_shortened(changes, self.language)]
        elif not lines:
            lines.append(say("nothing", self.language))
        lines += _shortened([say("left", self.language, note=note) for note in plan.notes], self.language)
        return "\n".join(lines)

    # Doing and undoing.

    def apply(self, plan: Plan, confirm: Confirm) -> Outcome:
        """Make the changes of a plan, in order; the first that fails ends it, and what was made stays, to be undone. confirm is asked
        once, and a second time for what deletes and for several renames. Raises ValueError when another assistant is at work."""
        outcome = Outcome()
        changes = plan.changes
        if not changes:
            outcome.text = say("nothing", self.language)
            return outcome
        kinds = [step.kind for step in changes]
        questions = [say("ask", self.language, count=len(changes))]
        if plan.confirmations > 1:
            questions.append(say("ask_delete", self.language, deleted=kinds.count("delete"), renamed=kinds.count("rename")))
        if not all(confirm(question) for question in questions):
            outcome.text = say("refused", self.language)
            return outcome
        with self._journal.opened() as state:
            outcome.lines += self._settle(state)
            outcome.batch = state.next_batch()
            for number, step in enumerate(changes, start=1):
                try:
                    self._do(state, outcome.batch, number, step)
                except (OSError, ValueError) as error:
                    outcome.failed = 1
                    words = {"done": outcome.done, "count": len(changes), "batch": outcome.batch, "error": _reason(error)}
                    outcome.lines.append(say("stopped", self.language, **words))
                    break
                outcome.done += 1
            else:
                outcome.lines.append(say("done", self.language, done=outcome.done, batch=outcome.batch))
        outcome.text = "\n".join(outcome.lines)
        return outcome

    def undo(self, batch: int | None = None, everything: bool = False) -> Outcome:
        """Take back the changes of a batch (None: the last one that still stands; everything: of all), the newest first. One that
        cannot be taken back without loss is left, and said. Raises ValueError for a number that is not there."""
        outcome = Outcome()
        with self._journal.opened() as state:
            outcome.lines += self._settle(state)
            standing = [change for change in state.changes if change.outcome == "done"]
            if batch is not None and batch not in {change.batch for change in state.changes}:
                raise ValueError(f"there is no batch {batch}; see the log")
            outcome.batch = batch if batch is not None else max((change.batch for change in standing), default=0)
            wanted = [change for change in standing if everything or change.batch == outcome.batch]
            for change in sorted(wanted, key=lambda change: (change.batch, change.number), reverse=True):
                what = _change_words(change, self.language)
                state.begin_undo(change)
                try:
                    take_back(self.root, state, change)
                except (OSError, ValueError) as error:
                    state.end(change, "done", error=str(error))
                    outcome.failed += 1
                    outcome.lines.append(say("not_undone", self.language, what=what, error=_reason(error)))
                else:
                    outcome.done += 1
                    outcome.lines.append(say("undone", self.language, what=what))
            if not wanted:
                outcome.lines.append(say("no_undo", self.language))
        outcome.text = "\n".join(outcome.lines)
        return outcome

    def log(self) -> list[dict[str, Any]]:
        """The audit log, oldest first, one entry a line of the file."""
        return self._journal.lines()

    def log_text(self) -> str:
        """The changes of the log in words."""
        lines = [
            f"{change.batch}.{change.number} {change.outcome or 'interrupted'}: {_change_words(change, self.language)}"
            for change in read_changes(self.log())
        ]
        return "\n".join(lines) or say("no_log", self.language)

    # As a tool of a conversation.

    @property
    def description(self) -> str:
        return say("tool", self.language, name=self.root.path.name)

    def run(self, **request: Any) -> str:
        """One request, as a tool: looks at once; changes when `confirm` agrees, else their plan. Raises ValueError."""
        plan = self.plan_of([request])
        preview = self.preview(plan)
        if not plan.changes:
            return preview
        confirm = self.confirm
        if confirm is None:
            return f"{preview}\n{say('dry_tool', self.language)}"
        return self.apply(plan, lambda question: confirm(f"{preview}\n{question}")).text

    def _do(self, state: State, batch: int, number: int, step: Step) -> None:
        refusal = self.policy.refusal(step.path, folder=True) or (self.policy.refusal(step.to, folder=True) if step.to else "")
        if refusal:
            raise UnsafePath(refusal)
        change = Change(batch, number, step.kind, step.path, step.to)
        if step.kind == "tag":
            before = state.tags_of(joined(step.path))
            change.after = tuple(tag for tag in before if tag not in step.tags) + (() if step.remove else step.tags)
        carry_out(self.root, state, change, self.policy, step.content.encode("utf-8"), lambda old: self._edited(step, old))

    def _edited(self, step: Step, old: bytes) -> bytes:
        if not step.append and not step.find:
            return step.content.encode("utf-8")
        try:
            text = old.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{joined(step.path)} is not a UTF-8 text, so it is not edited: {error}") from error
        if step.find and step.find not in text:
            raise ValueError(f"{joined(step.path)} does not hold {step.find!r:.60}")
        new = (text.replace(step.find, step.content) if step.find else text + step.content).encode("utf-8")
        if len(new) > self.policy.max_read:
            raise ValueError(f"{joined(step.path)} would have {len(new)} bytes, more than the {self.policy.max_read} that are edited")
        return new

    def _settle(self, state: State) -> list[str]:
        """Take back what was interrupted, before anything else is done."""
        lines = []
        for change in reversed([change for change in state.changes if change.outcome in ("", "undoing")]):
            what = _change_words(change, self.language)
            try:
                take_back(self.root, state, change, reason="interrupted")
            except (OSError, ValueError) as error:
                state.end(change, "done" if change.stands else "failed", error=str(error))
                lines.append(say("unsettled", self.language, what=what, error=_reason(error)))
            else:
                lines.append(say("settled", self.language, what=what))
        return lines

    def _look(self, step: Step) -> str:
        with self._journal.hidden():
            if step.kind == "read":
                with self.root.at(step.path) as (folder, name):
                    data = folder.read(name, self.policy.max_read)
                try:
                    return data.decode("utf-8-sig")
                except UnicodeDecodeError:
                    return say("binary", self.language, size=len(data))
            return self._listing(step)

    def _listing(self, step: Step) -> str:
        tree, tags = Tree(self.root, self.policy), self._journal.tags()
        node = tree.get(step.path)
        if step.find:
            head, _, pattern = step.find.rpartition("/")
            where = tuple(part for part in head.split("/") if part not in ("", ".", "**"))
            wanted = tree.matching(where, pattern, step.subfolders or "**" in step.find)
            entries = [(parts, tree.get(parts)) for parts in wanted]
        elif node is not None and node.kind == "file":
            entries = [(step.path, node)]
        else:
            found = tree.walk(step.path, everything=False) if step.subfolders else tree.direct(step.path)
            entries = [(parts, child) for parts, child in found]
        lines = []
        for parts, entry in entries:
            mine = tags.get(joined(parts), [])
            if entry is None or self.policy.refusal(parts, entry.kind == "folder") or not set(step.tags) <= set(mine):
                continue
            size = "/" if entry.kind == "folder" else f"  {entry.size:,} B" if entry.kind == "file" else f"  ({entry.kind})"
            lines.append(f"{joined(parts)}{size}{''.join(f'  #{tag}' for tag in mine)}")
        return "\n".join(lines[:500] + [say("more", self.language, count=len(lines) - 500)] * (len(lines) > 500)) or say(
            "empty", self.language
        )

    def _words(self, step: Step) -> str:
        key = step.kind
        if key == "update":
            key = "append" if step.append else "replace" if step.find else key
        elif key == "delete" and step.files > 1:
            key = "delete_folder"
        elif key == "tag" and step.remove:
            key = "untag"
        return say(
            key,
            self.language,
            path=joined(step.path),
            to=joined(step.to),
            size=len(step.content),
            find=repr(step.find[:40]),
            content=repr(step.content[:40]),
            tags=", ".join(step.tags),
            files=step.files - 1,
        )


def stated_requests(stated: dict[str, Any]) -> list[dict[str, Any]]:
    """The requests of a plan in JSON: {"operations": [...]}, or one operation. Raises ValueError naming what is wrong."""
    if "operation" in stated:
        return [stated]
    found = problems(stated, {**PLAN_SCHEMA, "properties": {"operations": {"type": "array", "minItems": 1, "maxItems": 20}}})
    if found:
        raise ValueError(f"the plan cannot be used: {'; '.join(found)}")
    requests: list[dict[str, Any]] = stated["operations"]
    return requests


def _change_words(change: Change, language: str) -> str:
    key = {"tag": "tagged", "update": "changed", "create": "created"}.get(change.kind, change.kind)
    return say(key, language, path=joined(change.path), to=joined(change.to))


def _reason(error: Exception) -> str:
    """An error in words; those of the system come with a number."""
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.errno else str(error)


def _shortened(lines: list[str], language: str) -> list[str]:
    more = len(lines) - MOST_SHOWN
    return lines if more <= 0 else [*lines[:MOST_SHOWN], say("more", language, count=more)]


if __name__ == "__main__":
    from inference.file_command import main

    raise SystemExit(main())
