"""Files and directories that are the old version or the new one after any interruption."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import model.files as files
from model.files import (
    WriteError,
    append_line,
    atomic_directory,
    atomic_write_bytes,
    atomic_write_text,
    recover_directory,
    remove_leftovers,
)


def contents(path: Path) -> dict[str, str]:
    return {f.relative_to(path).as_posix(): f.read_text(encoding="utf-8") for f in sorted(path.rglob("*")) if f.is_file()}


def fill(path: Path, version: str) -> None:
    (path / "deep").mkdir()
    (path / "a.txt").write_text(version, encoding="utf-8")
    (path / "deep" / "b.txt").write_text(version, encoding="utf-8")


def versions(name: str) -> dict[str, str]:
    return {"a.txt": name, "deep/b.txt": name}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Guards: translated line ends, another encoding, folders that do not exist yet, leftovers."""
    file = tmp_path / "new" / "x.txt"
    atomic_write_text(file, "一\r\n二\n")
    assert file.read_bytes() == "一\r\n二\n".encode()
    atomic_write_bytes(file, b"\x00")
    assert file.read_bytes() == b"\x00" and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an empty settings file after the disk was full."""
    file = tmp_path / "x.txt"
    atomic_write_text(file, "old")

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old"


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    """Guards: files of the previous version that stay between the new ones."""
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as folder:
        fill(folder, "old")
        (folder / "only-old.txt").write_text("x", encoding="utf-8")
        assert not target.exists()
    with atomic_directory(target) as folder:
        fill(folder, "new")
        assert contents(target)["a.txt"] == "old"
    assert contents(target) == versions("new")
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_filling_changes_nothing(error: type[BaseException], tmp_path: Path) -> None:
    """Guards: half a checkpoint after Ctrl-C."""
    target = tmp_path / "model"
    for before in ({}, versions("old")):
        if before:
            target.mkdir()
            fill(target, "old")
        with pytest.raises(error), atomic_directory(target) as folder:
            (folder / "a.txt").write_text("half", encoding="utf-8")
            raise error
        assert (contents(target) if target.exists() else {}) == before
        assert {entry.name for entry in tmp_path.iterdir()} == ({"model"} if before else set())


@pytest.mark.parametrize("call", range(8))
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_at_any_step_keeps_a_version(when: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a moment in which neither the old nor the new folder can be had. Interrupts the n-th file operation."""
    target = tmp_path / "model"
    target.mkdir()
    fill(target, "old")
    count = 0

    def interrupted(original: Any) -> Any:
        def operation(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            mine = count - 1
            if mine == call and when == "before":
                raise KeyboardInterrupt
            result = original(*arguments, **settings)
            if mine == call and when == "after":
                raise KeyboardInterrupt
            return result

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", interrupted(os.replace))
        patch.setattr(files, "sync", interrupted(files.sync))
        patch.setattr(files.shutil, "rmtree", interrupted(files.shutil.rmtree))
        try:
            with atomic_directory(target) as folder:
                fill(folder, "new")
        except KeyboardInterrupt:
            pass
    recover_directory(target)
    # Flush two files and their two folders, move the old aside, move the new in (5), flush the folder, delete the old.
    moved_in = call > 5 or (call == 5 and when == "after")
    assert contents(target) == versions("new" if moved_in else "old")
    with atomic_directory(target) as folder:
        fill(folder, "later")
    assert contents(target) == versions("later")


KILLED = textwrap.dedent("""
    import os, signal, sys
    import model.files as files

    original, calls = os.replace, 0

    def replace(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    os.replace = replace
    with files.atomic_directory(sys.argv[1]) as folder:
        (folder / "a.txt").write_text("new")
        if sys.argv[2] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
""")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("kill_at", [0, 1, 2])
def test_a_killed_process_leaves_the_old_version(kill_at: int, tmp_path: Path) -> None:
    """Guards: a checkpoint lost to a power cut: while filling (0), before the first (1) or second (2) rename."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "a.txt").write_text("old", encoding="utf-8")
    (package,) = {Path(files.__file__).resolve().parent}
    # model/__init__ loads torch, which this does not need: a bare package keeps the three runs fast.
    (tmp_path / "path" / "model").mkdir(parents=True)
    (tmp_path / "path" / "model" / "files.py").write_bytes((package / "files.py").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    status = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), str(kill_at)], env=environment, cwd=tmp_path, check=False
    ).returncode
    assert status == -signal.SIGKILL
    assert target.exists() == (kill_at < 2)
    recover_directory(target)
    assert contents(target) == {"a.txt": "old"}
    remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "path"}


def test_recovery_leaves_other_folders_alone(tmp_path: Path) -> None:
    """Guards: a backup that somebody made by hand (`model.old`), deleted when the model is read."""
    for name in ("model", "model.old", "model.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name, encoding="utf-8")
    recover_directory(tmp_path / "model")
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a.txt").write_text("new", encoding="utf-8")
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {"model.bak/a.txt": "model.bak", "model.old/a.txt": "model.old", "model/a.txt": "new"}
    recover_directory(tmp_path / "missing")


def test_recovery_after_the_second_rename(tmp_path: Path) -> None:
    """Guards: the old version that comes back although the new one is complete."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "a.txt").write_text("new", encoding="utf-8")
    aside = files._aside(target)
    aside.mkdir()
    (aside / "a.txt").write_text("old", encoding="utf-8")
    recover_directory(target)
    assert contents(target) == {"a.txt": "new"} and not aside.exists()


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a folder named without its parent."""
    monkeypatch.chdir(tmp_path)
    with atomic_directory("model") as folder:
        (folder / "a.txt").write_text("x", encoding="utf-8")
    atomic_write_text("b.txt", "y")
    assert contents(tmp_path) == {"b.txt": "y", "model/a.txt": "x"}


@pytest.mark.parametrize("name", [".", "..", "../model"])
def test_the_working_directory_has_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: `--model .` in a model's folder: "PosixPath('.') has an empty name"."""
    (tmp_path / "model" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "inner" if name == ".." else tmp_path / "model")
    recover_directory(name)
    assert files._aside(Path(name)) == tmp_path / ".model.replaced"


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards half a row in a log, to which the next row is then glued."""
    file = tmp_path / "log.jsonl"
    append_line(file, '{"step": 1}')

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:5])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", Full, raising=False)
        with pytest.raises(WriteError, match=r"log.jsonl could not be written: No space left.*free there.*make room there, then run"):
            append_line(file, '{"step": 2}')
    append_line(file, '{"step": 3}')
    assert file.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_only_our_own_leftovers_are_deleted(tmp_path: Path) -> None:
    """Guards files of other programs that end in .tmp, and the replaced version of a folder that nobody brings back."""
    for name in ("mine.tmp", "a.tmp.txt", "model.safetensors.123.tmp", ".tmpAb3dE9"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / ".step_000006.replaced").mkdir()
    (tmp_path / "step_000003.77.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"mine.tmp", "a.tmp.txt", "step_000006"}
