"""All that the file assistant did can be undone: after any sequence of operations, and when it was killed at any moment."""

from __future__ import annotations

import os
import random

import pytest
from file_helpers import POSIX, SECRET, WAYS, agree, fill, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference import file_root
from inference.file_assistant import FileAssistant


@pytest.fixture(params=WAYS)
def ways(request):
    return request.param


NAMES = "a.txt b.txt c.md d.jpeg sub sub/a.txt sub/e.txt sub/deep sub/deep/f.txt new new/g.txt 中文.txt *.txt sub/*".split()
TEXTS = ["", "x", "你好\n", "longer text " * 20]


@st.composite
def random_requests(draw):
    path, to = draw(st.sampled_from(NAMES)), draw(st.sampled_from([*NAMES, "new/", "sub/", "*.txt", "*.text", "z.txt"]))
    operation = draw(st.sampled_from(["create", "make_folder", "update", "move", "copy", "rename", "delete", "classify", "tag"]))
    request = {"operation": operation}
    if operation != "classify":
        request["path"] = path
    if operation in ("create", "update"):
        request["content"] = draw(st.sampled_from(TEXTS))
    if operation == "update" and draw(st.booleans()):
        request["mode"] = "append"
    if operation in ("move", "copy", "rename"):
        request["to"] = to.rpartition("/")[2] if operation == "rename" else to
    if operation == "classify":
        request["by"] = draw(st.sampled_from(["type", "suffix", "tag", "month"]))
    if operation == "tag":
        request["tags"] = [draw(st.sampled_from(["red", "blue"]))]
    return request


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(random_requests(), min_size=1, max_size=8), seed=st.integers(0, 10**6))
def test_undoing_everything_restores_the_first_state(tmp_path_factory, requests, seed):
    """Guards: an operation whose undoing loses or leaves something, in any combination."""
    top = tmp_path_factory.mktemp("random")
    root = top / "root"
    fill(root, {"a.txt": "a", "b.txt": "b", "c.md": "c", "d.jpeg": "d", "sub/a.txt": "sa", "sub/deep/f.txt": "f", "中文.txt": "中"})
    fill(top / "outside", {"secret.txt": SECRET})
    before = snapshot(root), snapshot(top / "outside")
    assistant = FileAssistant(root, descriptors=file_root.HAS_DESCRIPTORS and seed % 2 == 0)
    for request in requests:
        here = snapshot(root)
        try:
            outcome = assistant.apply(assistant.plan_of([request]), agree)
        except ValueError:
            assert snapshot(root) == here
        else:
            assert not outcome.failed, outcome.text  # what a plan accepts can be done
    outcome = assistant.undo(everything=True)
    assert not outcome.failed, outcome.text
    assert (snapshot(root), snapshot(top / "outside")) == before
    assert assistant._journal.tags() == {}


class Killed(BaseException):
    """The program ends here, as by a power cut."""


@POSIX
@pytest.mark.parametrize("request_", [
    {"operation": "create", "path": "new/deep.txt", "content": "x"},
    {"operation": "update", "path": "a.txt", "content": "changed"},
    {"operation": "move", "path": "*.txt", "to": "sub/"},
    {"operation": "move", "path": "sub", "to": "other"},
    {"operation": "copy", "path": "sub", "to": "other"},
    {"operation": "delete", "path": "*.txt"},
    {"operation": "delete", "path": "sub"},
    {"operation": "rename", "path": "a.txt", "to": "A2.txt"},
    {"operation": "tag", "path": "a.txt", "tags": ["x"]},
], ids=lambda request: f"{request['operation']} {request['path']}")  # fmt: skip
def test_killed_at_any_moment(tmp_path, ways, monkeypatch, request_):
    """Guards: a change that was cut off half-way. The program is ended before or after a call that changes the disk (every third,
    beginning anywhere); the next one takes back what was half done, and undoes the rest, whether or not it is killed itself.
    Without descriptors the disk has no second names either, as some have not."""
    changing = ("rename", "link", "unlink", "mkdir", "rmdir", "replace", "fsync")
    reals = {name: getattr(os, name) for name in changing}
    rng = random.Random()

    def run(assistant, work, countdown, after):
        def killing(name):
            def call(*arguments, **keywords):
                if name == "link" and not ways:
                    raise PermissionError(1, "no second names on this disk")
                countdown[0] -= 1
                if countdown[0] == 0 and not after:
                    raise Killed
                result = reals[name](*arguments, **keywords)
                if countdown[0] == 0:
                    raise Killed
                return result

            return call

        with monkeypatch.context() as patch:
            for name in changing:
                patch.setattr(os, name, killing(name))
            work(assistant)

    def apply(assistant):
        outcome = assistant.apply(assistant.plan_of([request_]), agree)
        assert not outcome.failed, outcome.text

    for step in range(rng.randrange(1, 4), 300, 3):
        root = tmp_path / str(step)
        fill(root, {"a.txt": "a", "b.txt": "b", "sub/c.md": "c", "sub/deep/d.md": "d"})
        (root / "a.txt").chmod(0o640)
        before = snapshot(root)
        after, again = rng.random() < 0.5, rng.randrange(0, 12)
        try:
            run(FileAssistant(root, descriptors=ways), apply, [step], after)
            finished = True
        except Killed:
            finished = False
        if again:  # the next one may be killed, too
            try:
                run(FileAssistant(root, descriptors=ways), lambda assistant: assistant.undo(everything=True), [again], not after)
            except Killed:
                pass
        outcome = FileAssistant(root, descriptors=ways).undo(everything=True)
        assert not outcome.failed, (step, after, again, outcome.text)
        assert snapshot(root) == before, (step, after, again)
        assert FileAssistant(root, descriptors=ways)._journal.tags() == {}
        if finished:
            return
    pytest.fail("never finished")
