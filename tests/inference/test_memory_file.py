"""The memory's file: what is erased is gone from its bytes, and nothing else ever gets lost."""

import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inference import memory_file
from inference.memory import ConversationMemory

SECRETS = [f"My passphrase{number} is marzipan-{number:03d}-zebra." for number in range(60)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "memory.sqlite"


def filled(path, texts=SECRETS, **settings):
    memory = ConversationMemory(path, **settings)
    for text in texts:
        memory.add("user", text)
    return memory


def test_erasing_leaves_no_bytes_behind(path):
    """Guards: an erased name that anybody finds in the file with a text editor, or in a journal beside it."""
    memory = filled(path)
    assert b"marzipan-007" in path.read_bytes()
    seven = next(m.id for m in memory.list() if "007" in m.text)
    memory.forget(seven)
    eight = next(m.id for m in memory.list() if "008" in m.text)
    memory.edit(eight, "Something else entirely.")
    content = path.read_bytes()
    assert b"marzipan-007" not in content and b"marzipan-008" not in content and b"marzipan-009" in content
    memory.profile = "other"
    memory.add("user", "I keep this one.")
    memory.profile = "default"
    assert memory.erase() == 59
    content = path.read_bytes()
    assert b"marzipan" not in content and b"passphrase" not in content and b"I keep this one" in content
    assert memory.erase(everything=True) == 1 and b"I keep this one" not in path.read_bytes()
    assert os.listdir(path.parent) == [path.name]


def test_compression_leaves_no_bytes_behind(path):
    """Guards: what was compressed away, still readable in free pages of the file."""
    memory = ConversationMemory(path, capacity=4)
    for number in range(30):
        memory.add("assistant", f"A sentence about quartz{number:03d}. " * 20)
    kept = "".join(m.text for m in memory.list())
    gone = [number for number in range(30) if f"quartz{number:03d}" not in kept]
    content = path.read_bytes()
    assert len(gone) > 20 and not any(f"quartz{number:03d}".encode() in content for number in gone)


def test_a_restart_finds_everything(path):
    """Guards: memories that live in the process alone; an id that is given twice."""
    memory = filled(path)
    before = memory.list()
    memory.close()
    again = ConversationMemory(path)
    assert again.list() == before
    again.forget(before[0].id)
    assert again.add("user", "New.").id > before[0].id
    assert again.retrieve("passphrase3")[0].text == SECRETS[3]


def test_profiles_are_apart(path):
    """Guards: one person's memories in another's prompt."""
    filled(path, ["My name is Ada."], profile="ada")
    other = filled(path, ["My name is Bob."], profile="bob")
    assert [m.text for m in other.list()] == ["My name is Bob."] and other.profiles() == {"ada": 1, "bob": 1}
    assert all("Ada" not in m.text for m in other.retrieve("What is my name?"))
    other.profile = "ada"
    assert [m.text for m in other.list()] == ["My name is Ada."]


def test_off_means_off(path):
    """Guards: a file that is made although the user said no; a memory that talks while it is off."""
    memory = ConversationMemory(path, enabled=False)
    assert memory.add("user", "My name is Ada.") is None and memory.list() == [] and memory.erase() == 0 and memory.profiles() == {}
    assert not path.parent.exists()
    memory.enabled = True
    assert ConversationMemory(path).list() == [] and not path.parent.exists()  # nothing to remember yet
    memory.add("user", "My name is Ada.")
    memory.enabled = False
    assert memory.retrieve("What is my name?") == [] and memory.context("What is my name?", 99, len) == ""
    assert memory.add("user", "I moved.") is None and [m.text for m in memory.list()] == ["My name is Ada."] and memory.erase() == 1


def test_a_file_that_was_deleted_is_made_anew(path):
    """Guards: a user who deletes the file while a chat runs, and whose memories go on in it, or whose next message is lost."""
    memory = filled(path, ["My name is Ada."])
    path.unlink()
    assert memory.list() == [] and memory.retrieve("What is my name?") == [] and memory.erase() == 0 and not path.exists()
    memory.add("user", "My name is Bob.")
    assert [m.text for m in memory.list()] == ["My name is Bob."] == [m.text for m in ConversationMemory(path).list()]


def test_two_processes_share_a_file(path):
    """Guards: a file that two chats at once corrupt, or memories of one that the other loses or never sees."""
    mine = filled(path, ["Mine."])
    code = (
        "import sys; from inference.memory import ConversationMemory\n"
        "memory = ConversationMemory(sys.argv[1])\n"
        "for number in range(40): memory.add('user', f'Process {sys.argv[2]} says {number}.')\n"
    )
    root = Path(__file__).resolve().parents[2]
    running = subprocess.Popen([sys.executable, "-c", code, str(path), "b"], cwd=root)
    for number in range(1000):
        if running.poll() is not None:
            break
        mine.add("user", f"Process a says {number}.")
        time.sleep(0.05)  # most of the time the other one is still starting
    assert running.wait(timeout=60) == 0
    texts = [m.text for m in mine.list()]
    assert len(texts) == len(set(texts)) == 1 + number + 40 and number > 1
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert mine.retrieve("Process b says 39", 1)[0].text == "Process b says 39."


@pytest.mark.parametrize("damage", ["text", "cut", "inside", "other", "later", "folder"])
def test_a_file_that_is_not_ours_is_left_as_it_is(path, damage):
    """Guards: a damaged file that is overwritten by an empty memory; a trace instead of a message."""
    filled(path).close()
    content = path.read_bytes()
    if damage == "text":
        content = b"just some notes\n" * 100
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "inside":
        content = content[:4096] + bytes(4096) + content[8192:]
    if damage in ("other", "later"):
        db = sqlite3.connect(path)
        db.execute("PRAGMA application_id = 5" if damage == "other" else "PRAGMA user_version = 9")
        db.commit()
        db.close()
        content = path.read_bytes()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    words = {"other": "another program", "later": "later release", "folder": "is a folder"}
    with pytest.raises(ValueError, match=words.get(damage, "damaged or not a memory file")) as error:
        ConversationMemory(path)
    assert str(path) in str(error.value)
    assert path.is_dir() if damage == "folder" else path.read_bytes() == content


def test_a_file_in_use_is_said_to_be(path, monkeypatch):
    """Guards: a chat that hangs, or dies with "database is locked"."""
    monkeypatch.setattr(memory_file, "WAIT", 0.1)
    memory = filled(path, ["One."])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TimeoutError, match="in use by another program"):
        memory.add("user", "Two.")
    other.execute("ROLLBACK")
    assert memory.add("user", "Two.") is not None and len(memory.list()) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_only_its_owner_may_read_it(path):
    """Guards: private conversations readable for every account of the machine."""
    filled(path, ["One."])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_export_and_import(path, tmp_path):
    """Guards: a copy that cannot be read back, one that doubles what is there, one that overwrites a file."""
    memory = filled(path, ["My name is Ada.", "我住在柏林。", *SECRETS[:5]])
    copy = tmp_path / "copy.json"
    assert memory.export(copy) == 7 and "我住在柏林" in copy.read_text(encoding="utf-8")
    assert memory.import_from(copy) == 0
    other = ConversationMemory(tmp_path / "other.sqlite")
    assert other.import_from(copy) == 7
    strip = [(m.role, m.text, m.importance, m.topics, m.created) for m in memory.list()]
    assert [(m.role, m.text, m.importance, m.topics, m.created) for m in other.list()] == strip
    copy.write_text(copy.read_text(encoding="utf-8"), encoding="utf-8-sig")  # as some editors save it
    assert other.import_from(copy) == 0
    small = ConversationMemory(":memory:", capacity=3)
    small.import_from(copy)
    assert len(small.list()) <= 3
    with pytest.raises(ValueError, match="exists"):
        memory.export(copy)
    with pytest.raises(ValueError, match="is off"):
        ConversationMemory(":memory:", enabled=False).import_from(copy)


GOOD = {"role": "user", "text": "x"}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not readable JSON"),
        ("[]", "no exported memory"),
        ('{"format": "haoai-memory"}', "no exported memory"),
        ([GOOD, {"role": "king", "text": "x"}], "memory 2 needs a role"),
        ([GOOD, {"role": "user", "text": " "}], "memory 2 needs a text"),
        ([GOOD, GOOD, {**GOOD, "created": "yesterday"}], "memory 3 was created 'yesterday'"),
    ],
)
def test_a_bad_export_is_refused_whole(tmp_path, content, words):
    """Guards: half an import; an error that does not say where."""
    file = tmp_path / "bad.json"
    text = content if isinstance(content, str) else json.dumps({"format": "haoai-memory", "memories": content})
    file.write_text(text, encoding="utf-8")
    memory = ConversationMemory(":memory:")
    with pytest.raises(ValueError, match=words) as error:
        memory.import_from(file)
    assert "bad.json" in str(error.value) and memory.list() == []
    with pytest.raises(FileNotFoundError):
        memory.import_from(tmp_path / "none.json")
