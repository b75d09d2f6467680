"""Sentences for the file assistant, in Chinese and English."""

import time

import pytest

from inference.file_requests import check_requests
from inference.file_rules import EXAMPLES, read_prompt

PICTURES = "*.{jpg,jpeg,png,gif,bmp,webp,heic,heif,tif,tiff,svg,ico,avif,raw,cr2,nef,psd}"


def move(path, to, **more):
    return {"operation": "move", "path": path, "to": to, **more}


def delete(path, **more):
    return {"operation": "delete", "path": path, **more}


SENTENCES = [
    ("把所有 .txt 移到 notes 文件夹", [move("*.txt", "notes/")]),
    ("请帮我把所有图片移动到“图片 2026”文件夹里。", [move(PICTURES, "图片 2026/")]),
    ("将 a.txt 放进 notes", [move("a.txt", "notes")]),
    ("移动 notes/a.txt 到 归档", [move("notes/a.txt", "归档")]),
    ("move all .txt to notes", [move("*.txt", "notes")]),
    ("Please move all pictures into the folder pics", [move(PICTURES, "pics/")]),
    ("move everything in inbox to done/", [move("inbox/*", "done/")]),
    ("move 'my file.txt' to b", [move("my file.txt", "b")]),
    ("delete all .tmp files", [delete("*.tmp")]),
    ("delete all the .tmp files in logs", [delete("logs/*.tmp")]),
    ("delete all .tmp files, including subfolders", [delete("*.tmp", subfolders=True)]),
    ("remove a.txt, b.txt and c.txt", [delete("a.txt"), delete("b.txt"), delete("c.txt")]),
    ("delete the folder old", [delete("old")]),
    ("删除所有 .tmp 文件，包括子文件夹", [delete("*.tmp", subfolders=True)]),
    ("把 logs 里的所有 .log 文件删掉", [delete("logs/*.log")]),
    ("删掉所有tmp文件", [delete("*.tmp")]),
    ("删除 a.txt、b.txt 和 c.txt", [delete("a.txt"), delete("b.txt"), delete("c.txt")]),
    ("删除“a, b.txt”", [delete("a, b.txt")]),
    ("rename *.jpeg to *.jpg", [{"operation": "rename", "path": "*.jpeg", "to": "*.jpg"}]),
    ("rename all .jpeg files to .jpg", [{"operation": "rename", "path": "*.jpeg", "to": "*.jpg"}]),
    ("把所有 .jpeg 改名为 .jpg", [{"operation": "rename", "path": "*.jpeg", "to": "*.jpg"}]),
    ("把“旧 名.txt”重命名为“新名.txt”", [{"operation": "rename", "path": "旧 名.txt", "to": "新名.txt"}]),
    ("copy a.txt to b.txt", [{"operation": "copy", "path": "a.txt", "to": "b.txt"}]),
    ("把 a.txt 复制到 备份 文件夹", [{"operation": "copy", "path": "a.txt", "to": "备份/"}]),
    ("按类型整理", [{"operation": "classify", "by": "type"}]),
    ("整理 downloads 文件夹", [{"operation": "classify", "path": "downloads", "by": "type"}]),
    ("把 downloads 按日期分类", [{"operation": "classify", "path": "downloads", "by": "month"}]),
    ("organize downloads by date", [{"operation": "classify", "path": "downloads", "by": "month"}]),
    ("sort all files by extension", [{"operation": "classify", "by": "suffix"}]),
    ("新建文件夹 照片", [{"operation": "make_folder", "path": "照片"}]),
    ("create a folder called photos", [{"operation": "make_folder", "path": "photos"}]),
    ('create a.txt with content "one; two"', [{"operation": "create", "path": "a.txt", "content": "one; two"}]),
    ("新建 a.txt，内容为“今天；明天”", [{"operation": "create", "path": "a.txt", "content": "今天；明天"}]),
    ("在 a.txt 末尾追加“再见”", [{"operation": "update", "path": "a.txt", "content": "再见", "mode": "append"}]),
    ('append "bye" to a.txt', [{"operation": "update", "path": "a.txt", "content": "bye", "mode": "append"}]),
    ("把 a.txt 里的“猫”替换成“狗”", [{"operation": "update", "path": "a.txt", "find": "猫", "content": "狗"}]),
    ("把 a.txt 的内容改为“新”", [{"operation": "update", "path": "a.txt", "content": "新", "mode": "replace"}]),
    ("给 a.txt 加标签 工作、重要", [{"operation": "tag", "path": "a.txt", "tags": ["工作", "重要"]}]),
    ("tag all .txt with work, home", [{"operation": "tag", "path": "*.txt", "tags": ["work", "home"]}]),
    ("remove tag work from a.txt", [{"operation": "tag", "path": "a.txt", "tags": ["work"], "remove": True}]),
    ("list", [{"operation": "list"}]),
    ("有哪些文件", [{"operation": "list"}]),
    ("列出 notes 里的文件", [{"operation": "list", "path": "notes"}]),
    ("list files tagged work", [{"operation": "list", "tags": ["work"]}]),
    ("show notes/a.txt", [{"operation": "read", "path": "notes/a.txt"}]),
    ("打开 notes/a.txt", [{"operation": "read", "path": "notes/a.txt"}]),
    ("move a.txt to b; delete c.txt", [move("a.txt", "b"), delete("c.txt")]),
    ("把 a.txt 移到 b，然后删除 c.txt", [move("a.txt", "b"), delete("c.txt")]),
    ("删除 别墅.jpg", [delete("别墅.jpg")]),
]
REFUSED = [
    "", "   ", "hello", "你好", "don't delete a.txt", "do not delete a.txt", "delete all .txt except a.txt", "delete all files but a.txt",
    "不要删除 a.txt", "别删除 a.txt", "删除除了 a.txt 以外的所有文件", "删除 a.txt 之外的文件", "delete all files older than 30 days",
    "delete my tax stuff", "delete all big files", "移动", "move a.txt; then dance", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("sentence, requests", SENTENCES, ids=lambda value: value if isinstance(value, str) else "")
def test_sentences(sentence, requests):
    """Guards: a sentence that is read as something else."""
    found = read_prompt(sentence)
    check_requests(found)
    assert found == requests


@pytest.mark.parametrize("sentence", EXAMPLES)
def test_examples_in_the_error_are_understood(sentence):
    """Guards: advice that does not work."""
    check_requests(read_prompt(sentence))


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_understood_as_a_whole_is_refused(sentence):
    """Guards: "delete all .txt except a.txt" that deletes a.txt."""
    with pytest.raises(ValueError):
        read_prompt(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "把" + "把 移到 " * 600,
        "move " + "a to " * 800,
        "delete " + "a in " * 800,
        "删除" + "里的" * 1500,
        "给 " + "加 标签 " * 500,
        '"' * 3999,
        "list " + " " * 3900 + "x",
        ("删除" + " " * 39) * 90,
        "delete a" + "，" * 3900 + "b",
        "please " * 560,
    ],
)
def test_long_sentences_take_no_time(sentence):
    """Guards: a pattern that takes minutes on a strange sentence."""
    started = time.process_time()
    try:
        read_prompt(sentence)
    except ValueError:
        pass
    assert time.process_time() - started < 3


def test_advice_is_in_the_language_of_the_request():
    """Guards: advice that half of the users cannot read."""
    for sentence, shown, hidden in (("dance", "move all .txt to notes", "移到"), ("跳舞", "移到 notes", "move all")):
        with pytest.raises(ValueError) as told:
            read_prompt(sentence)
        assert shown in str(told.value) and hidden not in str(told.value)
