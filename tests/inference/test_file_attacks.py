"""Whatever is asked of the file assistant, nothing outside its folder is read or changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import threading

import pytest
from file_helpers import POSIX, SECRET, WAYS, agree, do, fill, snapshot

from inference import file_root
from inference.file_assistant import FileAssistant
from inference.file_paths import Policy, UnsafePath


@pytest.fixture(params=WAYS)
def ways(request):
    return request.param


@pytest.fixture
def place(tmp_path):
    """root with files, outside with a secret, and everything an attacker could have laid into the root."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(outside, {"secret.txt": SECRET, "deep/other.txt": SECRET})
    fill(root, {"a.txt": "a", "b.txt": "b", "notes/n.txt": "n", "notes/deep/d.txt": "d", "x.jpeg": "x", "y.jpeg": "y"})
    fill(root, {"id_rsa": SECRET, ".env": SECRET, "keys/server.PEM": SECRET, "repo/.git/config": SECRET})
    (root / "huge.bin").write_bytes(b"\0" * 5000)
    if os.name != "nt":
        (root / "link.txt").symlink_to(outside / "secret.txt")
        (root / "linked").symlink_to(outside, target_is_directory=True)
        (root / "relative").symlink_to("../outside", target_is_directory=True)
        (root / "notes" / "loop").symlink_to("..", target_is_directory=True)
        os.mkfifo(root / "pipe")
        os.link(outside / "secret.txt", root / "hard.txt")
    return root, outside


def assistant_of(root, ways, **policy):
    return FileAssistant(root, Policy(max_read=4096, max_copy=4096, **policy), descriptors=ways)


OUTSIDE_PATHS = [
    "..", "../outside/secret.txt", "notes/../../outside/secret.txt", "notes/../a.txt", "./../outside", "/etc/passwd", "//etc/passwd",
    "C:/Windows/win.ini", "C:secret.txt", "\\\\server\\share\\x", "//server/share/x", "\\\\?\\C:\\x", "..\\outside\\secret.txt",
    "notes\\..\\..\\outside", "~", "~/x", "a.txt\0.jpg", "\0", "．．/outside/secret.txt", "‥/x", "notes/．./x", "..／outside",
    "a\u202etxt.exe", "a\u200b.txt", "\ud800", "line\nbreak", ".. /outside", "notes/.. ./x", "x" * 5000, "d/" * 100 + "x",
]  # fmt: skip
OWN_PATHS = [
    ".smarthaoai",
    ".smarthaoai/audit.jsonl",
    ".SmartHaoAI/backup",
    ".smarthaoai.",
    ".smart\u200bhaoai",
    "．smarthaoai",
    "notes/.smarthaoai",
]
LINKS = ["link.txt", "linked", "linked/secret.txt", "relative/secret.txt", "notes/loop/a.txt", "linked/../a.txt"]
DENIED = ["id_rsa", ".env", "keys/server.PEM", "repo/.git/config", "repo/.git"]
SPECIAL = ["pipe"]
ROOTS = ["", ".", "./", "./."]
NOWHERE = ["missing.txt", "a.txt/b", "notes/n.txt/x"]


def requests_for(path):
    """Every operation that takes the path, as source and as target."""
    yield from (
        {"operation": "read", "path": path},
        {"operation": "update", "path": path, "content": "evil"},
        {"operation": "update", "path": path, "content": "evil", "mode": "append"},
        {"operation": "delete", "path": path},
        {"operation": "move", "path": path, "to": "stolen.txt"},
        {"operation": "copy", "path": path, "to": "stolen.txt"},
        {"operation": "rename", "path": path, "to": "stolen.txt"},
        {"operation": "tag", "path": path, "tags": ["x"]},
    )


def targets_for(path):
    yield from (
        {"operation": "create", "path": path, "content": "evil"},
        {"operation": "create", "path": path + "/evil.txt", "content": "evil"},
        {"operation": "make_folder", "path": path + "/evil"},
        {"operation": "move", "path": "a.txt", "to": path},
        {"operation": "move", "path": "notes", "to": path + "/"},
        {"operation": "copy", "path": "*.txt", "to": path},
        {"operation": "rename", "path": "a.txt", "to": path},
    )


def attempt(assistant, request):
    """Carry out a request; "" or why it was refused."""
    try:
        outcome = assistant.apply(assistant.plan_of([request]), agree)
        assistant.preview(assistant.plan_of([request]))
        return outcome.text if outcome.failed else ""
    except (ValueError, OSError) as error:
        assert SECRET not in str(error)
        return str(error)


@pytest.mark.parametrize("path", OUTSIDE_PATHS + OWN_PATHS + DENIED + NOWHERE + ROOTS)
def test_attack_table(place, ways, path):
    """Guards: a path that leads out, to the root itself, to the assistant's own folder, or to what is on the deny-list: every
    operation refuses it with a reason, and neither the outside nor the root changes."""
    root, outside = place
    assistant = assistant_of(root, ways)
    before = snapshot(root), snapshot(outside)
    for request in requests_for(path):
        assert attempt(assistant, request), request
    if path not in ROOTS and path not in NOWHERE:
        for request in targets_for(path):
            refused = attempt(assistant, request)
            assert refused or path == "repo/.git" or request.get("path") == "*.txt", request
    assert (snapshot(root), snapshot(outside)) == before


@POSIX
@pytest.mark.parametrize("path", LINKS + SPECIAL)
def test_links_and_special_files_are_left_alone(place, ways, path):
    """Guards: a link that is followed out of the root, a pipe that is waited for."""
    root, outside = place
    assistant = assistant_of(root, ways)
    before = snapshot(root), snapshot(outside)
    for request in [*requests_for(path), *targets_for(path)]:
        assert attempt(assistant, request), request
    assert (snapshot(root), snapshot(outside)) == before


@POSIX
def test_folders_with_links_or_denied_files_stay_whole(place, ways):
    """Guards: a link or a key that goes along inside a folder."""
    root, outside = place
    assistant = assistant_of(root, ways)
    before = snapshot(root), snapshot(outside)
    for folder in ("notes", "keys", "repo"):
        for request in (
            {"operation": "delete", "path": folder},
            {"operation": "move", "path": folder, "to": "elsewhere"},
            {"operation": "copy", "path": folder, "to": "elsewhere"},
            {"operation": "rename", "path": folder, "to": "elsewhere"},
        ):
            assert attempt(assistant, request), request
    assert (snapshot(root), snapshot(outside)) == before


@POSIX
def test_patterns_do_not_reach_links_keys_or_hidden_files(place, ways):
    """Guards: "delete everything" that deletes what was never to be touched."""
    root, outside = place
    before = snapshot(outside)
    kept = {name: value for name, value in snapshot(root).items() if name in ("link.txt", "linked", "relative", "pipe", "id_rsa", ".env")}
    assistant = assistant_of(root, ways)
    outcome = do(assistant, operation="delete", path="*", subfolders=True)
    assert outcome.done == 8 and snapshot(outside) == before  # a b hard huge x y n d
    assert {name: value for name, value in snapshot(root).items() if name in kept} == kept
    assert (root / "keys/server.PEM").exists() and (root / "repo/.git/config").exists()


@POSIX
def test_a_second_name_of_an_outside_file_is_not_written_through(place, ways):
    """Guards: an update in place, which would change the file outside that has the same content on the disk."""
    root, outside = place
    assistant = assistant_of(root, ways)
    assert do(assistant, operation="update", path="hard.txt", content="new").done == 1
    assert (root / "hard.txt").read_text(encoding="utf-8") == "new"
    assert (outside / "secret.txt").read_text(encoding="utf-8") == SECRET
    assistant.undo()
    assert (outside / "secret.txt").read_text(encoding="utf-8") == SECRET == (root / "hard.txt").read_text(encoding="utf-8")


def test_limits(place, ways):
    """Guards: a huge file in memory, a copy that fills the disk, a plan that touches more than anybody looks at."""
    root, _ = place
    assistant = assistant_of(root, ways, max_operations=2, max_write=10)
    for request in (
        {"operation": "read", "path": "huge.bin"},
        {"operation": "update", "path": "huge.bin", "content": "x", "mode": "append"},
        {"operation": "copy", "path": "huge.bin", "to": "h2.bin"},
        {"operation": "create", "path": "new.txt", "content": "x" * 11},
        {"operation": "delete", "path": "*.*"},
    ):
        before = snapshot(root)
        try:
            assistant.preview(assistant.plan_of([request]))
        except ValueError as error:
            assert any(word in str(error) for word in ("more than", "at most"))
        else:
            pytest.fail(f"{request} was not refused")
        assert snapshot(root) == before
    with pytest.raises(ValueError, match="more than 5 files and folders"):
        FileAssistant(root, Policy(max_seen=5), descriptors=ways).plan_of([{"operation": "list"}]) and assistant_of(
            root, ways, max_seen=5
        ).plan_of([{"operation": "delete", "path": "*.txt", "subfolders": True}])


def test_the_root_must_be_a_folder_of_its_own(tmp_path, ways):
    """Guards: an assistant for the whole disk."""
    with pytest.raises(ValueError, match="top of the disk"):
        FileAssistant(tmp_path.anchor, descriptors=ways)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        FileAssistant(tmp_path / "missing", descriptors=ways)
    fill(tmp_path, {"file": "x"})
    with pytest.raises(NotADirectoryError):
        FileAssistant(tmp_path / "file", descriptors=ways)


@POSIX
@pytest.mark.parametrize(
    "trap", ["folder is a link", "log is a link", "log is a second name", "log is a pipe", "backup is a link", "tags is a link"]
)
def test_a_prepared_private_folder(tmp_path, ways, trap):
    """Guards: a log or backup that is written through a link which somebody laid before."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, {"a.txt": "a"})
    fill(outside, {"target": SECRET})
    own = root / ".smarthaoai"
    if trap == "folder is a link":
        own.symlink_to(outside, target_is_directory=True)
    else:
        own.mkdir()
        if trap == "log is a link":
            (own / "audit.jsonl").symlink_to(outside / "target")
        elif trap == "log is a second name":
            os.link(outside / "target", own / "audit.jsonl")
        elif trap == "log is a pipe":
            os.mkfifo(own / "audit.jsonl")
        elif trap == "backup is a link":
            (own / "backup").symlink_to(outside, target_is_directory=True)
        else:
            (own / "tags.json").symlink_to(outside / "target")
    before = snapshot(outside), (root / "a.txt").read_text(encoding="utf-8")
    assistant = FileAssistant(root, descriptors=ways)
    for request in (
        {"operation": "delete", "path": "a.txt"},
        {"operation": "tag", "path": "a.txt", "tags": ["x"]},
        {"operation": "update", "path": "a.txt", "content": "b"},
    ):
        assert attempt(assistant, request), request
    assert (snapshot(outside), (root / "a.txt").read_text(encoding="utf-8")) == before


@POSIX
def test_a_forged_log_leads_nowhere(tmp_path, ways):
    """Guards: an undo that obeys a log which somebody else wrote."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, {"a.txt": "a", ".smarthaoai/backup/00001-0001": "evil", ".smarthaoai/backup/00002-0001.old": "evil"})
    fill(outside, {"target": SECRET})
    begin = {"number": 1, "event": "begin", "to": "", "digest": "", "before": [], "after": []}
    forged = [
        {**begin, "batch": 1, "kind": "delete", "path": "../outside/new"},
        {**begin, "batch": 2, "kind": "update", "path": "/etc/x"},
        {**begin, "batch": 3, "kind": "move", "path": "../../x", "to": "a.txt"},
        {**begin, "batch": 4, "kind": "delete", "path": ".smarthaoai/x"},
        {**begin, "batch": -1, "number": "x"},
        {"batch": 5, "number": 1, "event": "done"},
    ]
    lines = [json.dumps(line) for line in forged] + ["[]", "3", "garbage", '{"batch": 1']
    (root / ".smarthaoai/audit.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assistant = FileAssistant(root, descriptors=ways)
    before = snapshot(root), snapshot(outside), snapshot(tmp_path)
    outcome = assistant.undo(everything=True)
    assert outcome.done == 0 and "nothing to undo" in outcome.text
    assert (snapshot(root), snapshot(outside), snapshot(tmp_path)) == before


SWAPPED = {
    "read": {"operation": "read", "path": "work/a.txt"},
    "update": {"operation": "update", "path": "work/a.txt", "content": "evil"},
    "create": {"operation": "create", "path": "work/new.txt", "content": "evil"},
    "move": {"operation": "move", "path": "work/a.txt", "to": "b.txt"},
    "move in": {"operation": "move", "path": "c.txt", "to": "work"},
    "delete": {"operation": "delete", "path": "work/a.txt"},
    "copy": {"operation": "copy", "path": "work/a.txt", "to": "b.txt"},
    "rename": {"operation": "rename", "path": "work/a.txt", "to": "z.txt"},
    "list": {"operation": "list", "path": "work", "subfolders": True},
    "sort": {"operation": "classify", "path": "work"},
}


@POSIX
@pytest.mark.parametrize("operation", SWAPPED)
@pytest.mark.parametrize("call", ["open", "rename", "link", "unlink", "mkdir", "replace", "stat", "lstat"])
def test_a_folder_swapped_for_a_link_between_check_and_use(tmp_path, ways, monkeypatch, call, operation):
    """Guards: the race. At a call of the system the folder at work becomes a link to one outside that holds a file of the same name;
    every call has its turn, of the many looks every seventh, beginning anywhere."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    real, rename = getattr(os, call), os.rename
    many = call in ("stat", "lstat", "open")
    for turn in range(random.randrange(7) if many else 0, 1000, 7 if many else 1):
        for folder in (root, outside):
            shutil.rmtree(folder, ignore_errors=True)
        fill(root, {"work/a.txt": "mine", "c.txt": "c"})
        fill(outside, {"a.txt": SECRET, "hidden-outside.txt": SECRET})
        before = snapshot(outside)
        left = [turn]

        def swapping(*arguments, left=left, **keywords):
            left[0] -= 1
            if left[0] == -1:
                rename(root / "work", root / "aside")
                os.symlink(outside, root / "work")
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, swapping)
            try:
                assistant = FileAssistant(root, descriptors=ways)
                plan = assistant.plan_of([SWAPPED[operation]])
                said = assistant.preview(plan) + assistant.apply(plan, agree).text
            except (ValueError, OSError) as error:
                said = str(error)
        assert SECRET not in said and "hidden-outside" not in said, turn
        inside = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and path.parent != root / "work"]
        assert not [path for path in inside if path.read_bytes() == SECRET.encode()], turn
        if ways:  # by paths, no program on such a system can close the moment between its last look and the call
            assert snapshot(outside) == before, turn
        if left[0] >= 0:
            return
    pytest.fail("more calls than were tried")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/etc", "a\0b"])
def test_the_last_gate_takes_single_names_only(tmp_path, ways, name):
    """Guards: a path that a later change lets through to the system calls."""
    root = file_root.Root(tmp_path, ways)
    with root.folder() as folder:
        for act in (folder.status, folder.enter, folder.make_folder, folder.remove, lambda n: folder.write(n, [b""])):
            with pytest.raises(UnsafePath, match="not a name"):
                act(name)


@POSIX
def test_a_busy_swapper(tmp_path):
    """Guards: the race, with a real second thread that swaps a folder and a link as fast as it can."""
    if not file_root.HAS_DESCRIPTORS:
        pytest.skip("this system has no descriptors of folders")
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, {"work/a.txt": "mine"})
    fill(outside, {"a.txt": SECRET})
    before = snapshot(outside)
    stop = threading.Event()

    def swap():
        aside = root / "aside"
        while not stop.is_set():
            os.rename(root / "work", aside)
            os.symlink(outside, root / "work")
            os.unlink(root / "work")
            os.rename(aside, root / "work")

    thread = threading.Thread(target=swap)
    thread.start()
    said = []
    requests = (
        {"operation": "read", "path": "work/a.txt"},
        {"operation": "update", "path": "work/a.txt", "content": "mine, too", "mode": "append"},
        {"operation": "copy", "path": "work/a.txt", "to": "copied.txt"},
        {"operation": "delete", "path": "copied.txt"},
    )
    try:
        assistant = FileAssistant(root)
        for request in requests * 12:
            try:
                plan = assistant.plan_of([request])
                said.append(assistant.preview(plan))
                assistant.apply(plan, agree)
            except (ValueError, OSError) as error:
                said.append(str(error))
    finally:
        assert thread.is_alive()
        stop.set()
        thread.join()
    assert snapshot(outside) == before and SECRET not in "".join(said)
    assert SECRET.encode() not in [path.read_bytes() for path in root.glob("*.txt")]


@POSIX
def test_devices_and_sockets(tmp_path, ways):
    """Guards: a read that waits for ever."""
    fill(tmp_path, {"a.txt": "a"})
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        try:
            server.bind("s")
        finally:
            os.chdir(here)
        assistant = FileAssistant(tmp_path, descriptors=ways)
        assert all("device, pipe or socket" in attempt(assistant, request) for request in requests_for("s"))
