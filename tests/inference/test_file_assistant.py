"""The file assistant at its work: plans, confirmation, undo, tags, the log, its place in a conversation, and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from file_helpers import agree, do, fill, snapshot

from inference.file_assistant import FileAssistant
from inference.file_command import main
from inference.file_paths import Policy
from inference.file_plan import make_plan
from inference.file_root import Root

FILES = {
    "a.txt": "one",
    "b.txt": "two",
    "c.md": "three",
    "x.jpeg": "x",
    "y.JPEG": "y",
    "t.tmp": "t",
    "notes/n.txt": "n",
    "notes/t.tmp": "t",
    "空 格.txt": "中",
}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    fill(folder, FILES)
    return folder


@pytest.fixture
def assistant(root):
    return FileAssistant(root)


def steps(plan):
    return [(step.kind, "/".join(step.path), "/".join(step.to)) for step in plan.steps]


def test_a_plan_changes_nothing(root, assistant):
    """Guards: a dry run that is none, or one that leaves its own folder behind."""
    before = snapshot(root, private="")
    plan = assistant.plan("把所有 .txt 移到 新文件夹；删除 t.tmp；按类型整理")
    assert plan.changes and assistant.preview(plan) and snapshot(root, private="") == before


def test_plans(assistant):
    """Guards: what a request comes to."""
    assert steps(assistant.plan("move all .txt to notes")) == [
        ("move", "a.txt", "notes/a.txt"),
        ("move", "b.txt", "notes/b.txt"),
        ("move", "空 格.txt", "notes/空 格.txt"),
    ]
    assert steps(assistant.plan("move a.txt to new/deep/")) == [
        ("folder", "new", ""),
        ("folder", "new/deep", ""),
        ("move", "a.txt", "new/deep/a.txt"),
    ]
    assert steps(assistant.plan("move a.txt to d.txt")) == [("move", "a.txt", "d.txt")]
    assert steps(assistant.plan("move notes to archive")) == [("move", "notes", "archive")]
    assert steps(assistant.plan("rename *.jpeg to *.jpg")) == [("rename", "x.jpeg", "x.jpg"), ("rename", "y.JPEG", "y.jpg")]
    assert steps(assistant.plan("rename notes/n.txt to m.txt")) == [("rename", "notes/n.txt", "notes/m.txt")]
    assert steps(assistant.plan("delete all .tmp files")) == [("delete", "t.tmp", "")]
    assert len(assistant.plan("delete all .tmp files including subfolders").changes) == 2
    assert steps(assistant.plan("copy notes to copies")) == [
        ("folder", "copies", ""),
        ("copy", "notes/n.txt", "copies/n.txt"),
        ("copy", "notes/t.tmp", "copies/t.tmp"),
    ]
    assert {to for _, _, to in steps(assistant.plan("organize by type")) if to} == {
        "Documents/a.txt", "Documents/b.txt", "Documents/c.md", "Documents/空 格.txt", "Pictures/x.jpeg", "Pictures/y.JPEG", "Other/t.tmp",
    }  # fmt: skip
    several = assistant.plan("create folder new; move a.txt to new; rename new/a.txt to z.txt")
    assert steps(several) == [("folder", "new", ""), ("move", "a.txt", "new/a.txt"), ("rename", "new/a.txt", "new/z.txt")]


def test_the_language_of_folders(root):
    """Guards: English folders for a Chinese sentence's user."""
    assert ("folder", "图片", "") in steps(FileAssistant(root, language="zh").plan("按类型整理"))


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("move a.txt to notes/n.txt", "exists already"),
        ("create a.txt", "exists already"),
        ("rename a.txt to b.txt", "exists already"),
        ("rename a.txt to notes/b.txt", "another folder"),
        ("rename *.jpeg to pic.jpg", "need one *"),
        ("move notes to notes/inner", "into itself"),
        ("delete missing.txt", "there is no missing.txt"),
        ("delete all .log files", "no file in . fits"),
        ("delete n.*", "1 are in subfolders"),
        ("read notes", "is a folder"),
        ("move all .txt to c.md", "is a file"),
        ("organize a.txt by type", "not a folder"),
        ("create what?.txt", "on Windows"),
    ],
)
def test_what_cannot_be_done_says_why(assistant, prompt, words):
    """Guards: a plan that fails half-way for a reason that was known before."""
    with pytest.raises(ValueError, match=words.replace("*", r"\*").replace("?", r"\?")):
        assistant.plan(prompt)


def test_collisions_are_left_out_and_said(root, assistant):
    """Guards: a file that is lost under another of the same name."""
    fill(root, {"notes/a.txt": "older", "x.jpg": "taken"})
    plan = assistant.plan("move all .txt to notes; rename *.jpeg to *.jpg")
    assert [name for _, name, _ in steps(plan)] == ["b.txt", "空 格.txt", "y.JPEG"]
    assert len(plan.notes) == 2 and all("exists already" in note for note in plan.notes)
    assert "left alone: notes/a.txt exists already" in assistant.preview(plan)


@pytest.mark.parametrize("name, is_folder", [("d.txt", False), ("d.txt", True)])
def test_a_name_that_is_taken_after_the_plan(root, assistant, name, is_folder):
    """Guards: overwriting what another program made between plan and change."""
    plan = assistant.plan(f"copy a.txt to {name}; move notes to moved")
    (root / name).mkdir() if is_folder else fill(root, {name: "new"})
    before = snapshot(root)
    outcome = assistant.apply(plan, agree)
    assert outcome.failed == 1 and outcome.done == 0 and "exists already" in outcome.text and snapshot(root) == before
    assert [line["event"] for line in assistant.log()] == ["begin", "failed"]
    (root / "moved").mkdir()
    assert do(assistant, operation="rename", path="c.md", to="d.md").done == 1


def test_confirmation(root, assistant):
    """Guards: a deletion after one careless key."""
    asked = []

    def answers(*given):
        left = list(given)
        return lambda question: asked.append(question) or left.pop(0)

    for prompt, count in (
        ("move a.txt to notes", 1),
        ("delete a.txt", 2),
        ("rename *.jpeg to *.jpg", 2),
        ("rename a.txt to z.txt", 1),
        ("list", 0),
    ):
        plan = assistant.plan(prompt)
        assert plan.confirmations == count
        before = snapshot(root)
        for refused in range(count):
            asked.clear()
            outcome = assistant.apply(plan, answers(*[True] * refused, False))
            assert len(asked) == refused + 1 and outcome.done == 0 and snapshot(root) == before and "nothing was changed" in outcome.text
    assert assistant.log() == []


REQUESTS = [
    {"operation": "create", "path": "new/file.txt", "content": "你好\n"},
    {"operation": "make_folder", "path": "p/q"},
    {"operation": "update", "path": "a.txt", "content": "changed"},
    {"operation": "update", "path": "a.txt", "content": "\nmore", "mode": "append"},
    {"operation": "update", "path": "a.txt", "content": "ONE", "find": "one"},
    {"operation": "move", "path": "*.txt", "to": "notes/"},
    {"operation": "move", "path": "notes", "to": "deep/down/"},
    {"operation": "copy", "path": "notes", "to": "copies"},
    {"operation": "copy", "path": "a.txt", "to": "z.txt"},
    {"operation": "rename", "path": "*.jpeg", "to": "*.jpg"},
    {"operation": "rename", "path": "notes", "to": "Notes2"},
    {"operation": "delete", "path": "*.txt", "subfolders": True},
    {"operation": "delete", "path": "notes"},
    {"operation": "classify", "by": "month"},
    {"operation": "tag", "path": "*.txt", "tags": ["work"]},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: f"{request['operation']} {request.get('path', '')}")
def test_undo_of_each_operation(root, assistant, request_):
    """Guards: an operation that cannot be taken back, permissions and times of deleted and changed files included."""
    os.chmod(root / "a.txt", 0o640)
    os.utime(root / "a.txt", (1e9, 1e9))
    do(assistant, operation="tag", path="a.txt", tags=["first"])
    before, tags = snapshot(root), assistant._journal.tags()
    outcome = do(assistant, **request_)
    assert outcome.done and not outcome.failed
    assert (snapshot(root), assistant._journal.tags()) != (before, tags)
    undone = FileAssistant(root).undo()
    assert undone.done == outcome.done and not undone.failed, undone.text
    assert (snapshot(root), assistant._journal.tags()) == (before, tags) and (root / "a.txt").stat().st_mtime == 1e9


def test_contents(root, assistant):
    """Guards: text that is written other than it was said."""
    do(assistant, operation="create", path="n.txt", content="你好\r\nx\n")
    assert (root / "n.txt").read_bytes() == "你好\r\nx\n".encode()
    do(assistant, operation="update", path="n.txt", content="y", mode="append")
    do(assistant, operation="update", path="n.txt", find="你", content="您")
    assert (root / "n.txt").read_bytes() == "您好\r\nx\ny".encode()
    missing = do(assistant, operation="update", path="n.txt", find="nowhere", content="")
    assert missing.failed and "does not hold 'nowhere'" in missing.text
    (root / "binary").write_bytes(b"\xff\xfe\x00")
    assert do(assistant, operation="update", path="binary", content="x", mode="append").failed
    assert (root / "binary").read_bytes() == b"\xff\xfe\x00"
    assert "not a text" in assistant.preview(assistant.plan_of([{"operation": "read", "path": "binary"}]))


def test_undo_does_not_lose_later_work(root, assistant):
    """Guards: an undo that throws away what was written since."""
    do(assistant, operation="create", path="n.txt", content="draft")
    do(assistant, operation="update", path="a.txt", content="changed")
    do(assistant, operation="delete", path="b.txt")
    fill(root, {"n.txt": "a day's work", "a.txt": "another", "b.txt": "a new one"})
    before = snapshot(root)
    outcome = assistant.undo(everything=True)
    assert outcome.failed == 3 and outcome.done == 0 and snapshot(root) == before
    assert "changed since" in outcome.text and "taken by something newer" in outcome.text
    (root / "b.txt").unlink()
    assert assistant.undo().done == 1 and (root / "b.txt").read_text(encoding="utf-8") == "two"


def test_undo_by_number(root, assistant):
    """Guards: the wrong batch."""
    first, second = do(assistant, operation="delete", path="a.txt"), do(assistant, operation="delete", path="b.txt")
    assert (first.batch, second.batch) == (1, 2)
    assert assistant.undo(1).done == 1 and (root / "a.txt").exists() and not (root / "b.txt").exists()
    assert assistant.undo().batch == 2 and snapshot(root) == snapshot(root)
    assert "nothing to undo" in assistant.undo().text
    with pytest.raises(ValueError, match="no batch 9"):
        assistant.undo(9)


def test_undo_when_folders_are_gone(root, assistant):
    """Guards: a deleted file that cannot come back because its folder went, too."""
    do(assistant, operation="delete", path="notes/*")
    (root / "notes").rmdir()
    assert assistant.undo().done == 2 and (root / "notes/n.txt").read_text(encoding="utf-8") == "n"


def test_tags_go_with_their_files(root, assistant):
    """Guards: tags of a file that was moved, copied over or deleted."""
    do(assistant, operation="tag", path="notes/n.txt", tags=["work", "重要"])
    do(assistant, operation="move", path="notes", to="archive")
    do(assistant, operation="rename", path="archive/n.txt", to="m.txt")
    listed = assistant.preview(assistant.plan("list files tagged 重要"))
    assert listed == "archive/m.txt  1 B  #work  #重要"
    do(assistant, operation="tag", path="archive/m.txt", tags=["work"], remove=True)
    do(assistant, operation="classify", path="archive", by="tag")
    assert (root / "archive/重要/m.txt").exists()
    do(assistant, operation="delete", path="archive")
    assert assistant.preview(assistant.plan("list files tagged 重要")) == "(empty)"
    assert not assistant.undo(everything=True).failed and assistant._journal.tags() == {}


def test_the_log(root, assistant):
    """Guards: a change that is not on record, or a line that is no JSON."""
    do(assistant, operation="move", path="a.txt", to="notes/")
    assistant.undo()
    lines = (root / ".smarthaoai/audit.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["event"] for entry in entries] == ["begin", "done", "undoing", "undone"]
    said = {"batch": 1, "number": 1, "event": "begin", "kind": "move", "path": "a.txt", "to": "notes/a.txt"}
    assert entries[0] == {**entries[0], **said} and entries[0]["time"].startswith("20")
    assert assistant.log() == entries and "1.1 undone: move a.txt -> notes/a.txt" in assistant.log_text()
    with open(root / ".smarthaoai/audit.jsonl", "ab") as file:
        file.write(b'{"batch": 7, "eve')  # the power went
    assert do(assistant, operation="delete", path="b.txt").batch == 2
    assert [entry["event"] for entry in assistant.log()][-2:] == ["begin", "done"]


def test_two_assistants(root, assistant):
    """Guards: two programs that write one log."""
    with assistant._journal.opened(), pytest.raises(ValueError, match="another file assistant"):
        do(FileAssistant(root), operation="delete", path="a.txt")
    assert do(FileAssistant(root), operation="delete", path="a.txt").done == 1


def test_backups_elsewhere(tmp_path, root):
    """Guards: a backup folder inside the root that the assistant itself can reach."""
    (tmp_path / "safe").mkdir()
    assistant = FileAssistant(root, backup=tmp_path / "safe")
    do(assistant, operation="delete", path="a.txt")
    assert not (root / ".smarthaoai").exists() and list((tmp_path / "safe").glob(".smarthaoai-*/backup/00001-0001"))
    assert assistant.undo().done == 1
    (root / "safe").mkdir()
    inside = FileAssistant(root, backup=root / "safe")
    do(inside, operation="delete", path="a.txt")
    with pytest.raises(ValueError, match="belongs to the assistant"):
        do(inside, operation="delete", path="safe")
    with pytest.raises(FileNotFoundError, match="missing"):
        FileAssistant(root, backup=tmp_path / "missing")


def test_allow_list(root):
    """Guards: a rule that holds for the source and not for the target."""
    assistant = FileAssistant(root, Policy(allow=("*.txt",)))
    assert steps(assistant.plan("move everything to notes")) == [
        ("move", name, f"notes/{name}") for name in ("a.txt", "b.txt", "空 格.txt")
    ]
    for prompt in ("read c.md", "rename a.txt to a.sh", "create x.md", "copy a.txt to a.py", "delete notes"):
        with pytest.raises(ValueError, match="not on the allow-list"):
            assistant.plan(prompt)


def test_as_a_tool(root):
    """Guards: a model that changes files without anybody agreeing."""
    before = snapshot(root)
    assert "only the plan" in FileAssistant(root).run(operation="delete", path="a.txt") and snapshot(root) == before
    asked = []
    refusing = FileAssistant(root, language="zh", confirm=lambda question: bool(asked.append(question)))
    assert "什么都没有改" in refusing.run(operation="delete", path="a.txt") and "删除 a.txt" in asked[0] and snapshot(root) == before
    agreeing = FileAssistant(root, confirm=agree)
    assert "Changes made: 1" in agreeing.run(operation="delete", path="a.txt") and not (root / "a.txt").exists()
    assert agreeing.run(operation="read", path="b.txt") == "two"


def test_plans_of_a_model(assistant):
    """Guards: an answer of a model that is taken for something else than it says."""
    said = []

    def model(answer):
        return lambda messages: said.append(messages) or answer

    plan = assistant.plan_by_model("tidy up", model('<think>hm</think>\n{"operations": [{"operation": "delete", "path": "*.tmp"}]}'))
    assert steps(plan) == [("delete", "t.tmp", "")] and "notes/" in said[0][0]["content"] and said[0][1]["content"] == "tidy up"
    for answer, words in (
        ("I cannot.", "is not a plan"),
        ('{"operations": []}', "at least 1"),
        ('{"operations": [{"operation": "format"}]}', "must be one of"),
        ('{"operations": [{"operation": "move", "path": "a.txt"}]}', "move needs to"),
        ('{"operations": [{"operation": "delete", "path": "a.txt", "to": "b"}]}', "delete takes no to"),
        ('{"operations": [{"operation": "delete", "path": "../x"}]}', "leads out"),
    ):
        with pytest.raises(ValueError, match=words):
            assistant.plan_by_model("x", model(answer))


def test_many_files_are_shortened(root, assistant):
    """Guards: a question that scrolls off the screen."""
    fill(root, {f"many/{number}.log": "" for number in range(30)})
    preview = assistant.preview(assistant.plan("delete all .log files in many"))
    assert "... and 10 more" in preview and len(preview.splitlines()) == 22
    with pytest.raises(ValueError, match="touches 30 files and folders, at most 5"):
        make_plan([{"operation": "delete", "path": "many/*"}], Root(root), Policy(max_operations=5))


def command(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_command(root, capsys, monkeypatch):
    """Guards: a command that changes files without --apply, or deletes after one --yes."""
    before = snapshot(root)
    prompt = ("--prompt", "delete all .tmp files", "--lang", "en")
    status, out, _ = command(capsys, root, *prompt)
    assert status == 0 and "delete t.tmp" in out and "Add --apply" in out and snapshot(root) == before
    status, out, err = command(capsys, root, *prompt, "--apply", "--yes")
    assert status == 1 and "Add --yes (twice" in err and snapshot(root) == before
    status, out, _ = command(capsys, root, *prompt, "--apply", "--yes", "--yes")
    assert status == 0 and "batch 1" in out and not (root / "t.tmp").exists()
    status, out, _ = command(capsys, root, "--log", "--lang", "zh")
    assert status == 0 and "1.1 done: 删除 t.tmp" in out
    status, out, _ = command(capsys, root, "--undo", "--lang", "zh")
    assert status == 0 and "已撤销：删除 t.tmp" in out and snapshot(root) == before
    status, out, _ = command(capsys, root, "--prompt", "read a.txt")
    assert (status, out) == (0, "one\n")
    status, _, err = command(capsys, root, "--prompt", "read ../a.txt")
    assert status == 1 and err.startswith("error: ") and "Traceback" not in err
    answers = iter(["y", "n"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    status, out, _ = command(capsys, root, *prompt, "--apply")
    assert status == 1 and "nothing was changed" in out and snapshot(root) == before


def test_command_in_json(root, capsys, tmp_path):
    """Guards: output that a program cannot read."""
    (tmp_path / "plan.json").write_text('{"operations": [{"operation": "move", "path": "*.txt", "to": "notes/"}]}', encoding="utf-8")
    status, out, _ = command(capsys, root, "--plan", tmp_path / "plan.json", "--json")
    planned = json.loads(out)
    assert status == 0 and planned["confirmations"] == 1 and not planned["applied"] and len(planned["operations"]) == 3
    status, out, _ = command(capsys, root, "--plan", tmp_path / "plan.json", "--json", "--apply", "--yes", "--limit", "3")
    assert status == 0 and json.loads(out)["done"] == 3
    status, out, _ = command(capsys, root, "--log", "--json")
    assert len(json.loads(out)) == 6
    (tmp_path / "plan.json").write_text("not a plan", encoding="utf-8")
    status, _, err = command(capsys, root, "--plan", tmp_path / "plan.json")
    assert status == 1 and "is not a plan in JSON" in err
    with pytest.raises(SystemExit) as stopped:
        main([str(root)])
    assert stopped.value.code == 2


def test_command_as_users_type_it(root):
    """Guards: a module that does not start."""
    command_line = [sys.executable, "-m", "inference.file_assistant", str(root), "--prompt", "列出 notes", "--lang", "zh"]
    result = subprocess.run(command_line, cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert result.stdout.decode("utf-8").split() == ["notes/n.txt", "1", "B", "notes/t.tmp", "1", "B"]
