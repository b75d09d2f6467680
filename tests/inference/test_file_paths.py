"""The rules for paths and the deny-list, as pure functions: POSIX and Windows on any system."""

from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.file_paths import DENIED, Policy, UnsafePath, new_parts, relative_parts

BOTH = [PurePosixPath, PureWindowsPath]


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ()),
        (".", ()),
        ("a.txt", ("a.txt",)),
        ("./a/./b/", ("a", "b")),
        ("a//b", ("a", "b")),
        ("笔记/第一章 开始.md", ("笔记", "第一章 开始.md")),
        ("收入／支出.txt", ("收入／支出.txt",)),
        (".hidden/..two dots", (".hidden", "..two dots")),
        ("console.txt", ("console.txt",)),
        ("a~b.txt", ("a~b.txt",)),
    ],
)
def test_ordinary_paths(text, parts, flavour):
    """Guards: a guard that refuses the names people use."""
    assert relative_parts(text, flavour) == parts


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize(
    "text",
    [
        "..", "../a", "a/../b", "a/..", "/", "/a", "//a/b", "C:", "C:/a", "c:a", "C:\\a", "\\\\server\\share\\a", "\\\\.\\PhysicalDrive0",
        "\\\\?\\C:\\a", "\\a", "a\0b", "a\nb", "a\x1bb", "a\u202eb", "a\u200bb", "a\ufeffb", "a\u2028b", "\udc80", "．．/a", "‥", "a/．./b",
        "a／..／b", "a＼..＼b", " .. /a", "~", "~/a", ".smarthaoai", ".SMARTHAOAI/x", "．ＳmartHaoAI", ".smarthaoai-1234", ".smarthaoai. ",
        "a/.smarthaoai/b", "x" * 256, "中" * 90, "a/" * 33 + "a", "x/" * 600,
    ],
)  # fmt: skip
def test_paths_that_are_refused_everywhere(text, flavour):
    """Guards: a way out of the root, in any spelling, on any system."""
    with pytest.raises(UnsafePath):
        relative_parts(text, flavour)


@pytest.mark.parametrize(
    "text",
    [
        "a\\..\\b", "..\\a", "con", "CON.txt", "a/nul", "Aux.tar.gz", "com1", "LPT³.txt", "CONIN$", "a.", "a ", "a. ", "dir./x", "a?b",
        "a*b", "a|b", 'a"b', "a<b", "x.txt::$DATA", "file:stream", "PROGRA~1", "SECRET~1.KEY", "...",
    ],
)  # fmt: skip
def test_paths_that_mean_something_else_on_windows(text):
    """Guards: devices, streams, short names, and names whose end Windows drops; nor are such names made elsewhere."""
    with pytest.raises(UnsafePath):
        relative_parts(text, PureWindowsPath)
    with pytest.raises(UnsafePath):
        new_parts(text, PurePosixPath)


def test_backslashes():
    """Guards: a separator that is taken for a letter, or the other way round."""
    assert relative_parts("a\\b", PureWindowsPath) == ("a", "b")
    with pytest.raises(UnsafePath, match="backslash"):
        relative_parts("a\\b", PurePosixPath)


def test_what_exists_on_posix_may_be_named():
    """Guards: a file of a strange name that cannot even be deleted."""
    for name in ("what?.txt", "aux", "a:", "end.", "50%~1"):
        if PureWindowsPath(name).drive:
            continue
        assert relative_parts(name, PurePosixPath) == (name,)


def test_a_new_name_is_needed():
    """Guards: a file without a name, which is the root."""
    for text in ("", ".", "./"):
        with pytest.raises(UnsafePath, match="missing"):
            new_parts(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("./\\~:ab ．／\0\u200b*") | st.characters(), max_size=12), st.sampled_from(BOTH))
def test_no_text_leads_out(text, flavour):
    """Guards: what nobody thought of. Whatever is accepted stays below the root, for both systems' ways to read it."""
    try:
        parts = relative_parts(text, flavour)
    except UnsafePath:
        return
    for part in parts:
        assert part not in ("", ".", "..") and "/" not in part and "\0" not in part
    for system in BOTH if flavour is PureWindowsPath else [PurePosixPath]:
        top = system("/root" if system is PurePosixPath else "C:/root")
        joined = top.joinpath(*parts)
        assert top == joined or top in joined.parents
        assert len(joined.parts) == len(top.parts) + len(parts) and ".." not in joined.parts


@pytest.mark.parametrize(
    "path",
    [
        "id_rsa", "ID_RSA.bak", "a/b/x.PEM", "x.pem", "ｘ.ｐｅｍ", "x.pem. ", ".git", ".GIT/config", "a/.git/hooks/x", ".env", ".env.local",
        "Thumbs.db",
    ],
)  # fmt: skip
def test_the_deny_list(path):
    """Guards: a key that is read under another spelling, or below a denied folder."""
    assert "deny-list" in Policy().refusal(tuple(path.split("/")))


def test_allow_and_deny():
    """Guards: suffixes, names and places that are compared with the wrong thing; a later list that opens an earlier one."""
    policy = Policy(allow=("*.txt", "notes/*.md"), deny=(*DENIED, "private/*", "draft*"))

    def refused(path, folder=False):
        return bool(policy.refusal(tuple(path.split("/")), folder))

    assert not refused("a.TXT") and not refused("deep/a.txt") and not refused("notes/a.md") and not refused("pictures", folder=True)
    assert refused("a.md") and refused("other/a.md") and refused("private/a.txt") and refused("Draft 1.txt") and refused("drafts/a.txt")
    assert refused("drafts", folder=True) and refused("a.txt/id_rsa")
    assert refused(".smarthaoai/x") and refused("a/.SmartHaoAI", folder=True)


@pytest.mark.parametrize("bad", [{"max_operations": 0}, {"max_read": -1}, {"allow": "*.txt"}, {"deny": "*.txt"}])
def test_bad_policies(bad):
    """Guards: a list of single letters, a limit of nothing."""
    with pytest.raises(ValueError):
        Policy(**bad)
