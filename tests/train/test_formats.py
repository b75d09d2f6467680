"""Every data format, every kind of bad row, and every container."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train import raw_rows
from train.formats import (
    BadRows,
    Conversation,
    Judged,
    Preference,
    RowError,
    Text,
    as_conversation,
    as_preference,
    as_text,
    expand_paths,
    format_name,
    read_rows,
    read_samples,
    read_token_ids,
    recognise,
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, reasoning: str | None = None, calls: list[Any] | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
QA = Conversation([user("q"), bot("a")])
PAIR = Preference([user("q")], [bot("good")], [bot("bad")])
USED_TOOL = [user("q"), bot("", calls=[CALL]), tool("2"), bot("two")]

FORMATS: list[tuple[str, dict[str, Any], Any]] = [
    ("text", {"text": "你好", "source": "x", "label": 3}, Text("你好")),
    ("conversations", {"conversations": [user("q"), bot("a")], "lang": "en"}, QA),
    ("conversations", {"conversations": [user("q"), bot("a", "r")]}, Conversation([user("q"), bot("a", "r")])),
    ("conversations", {"system": "s", "conversations": [user("q"), bot("a")]},
     Conversation([system("s"), user("q"), bot("a")])),
    ("conversations", {"conversations": [{**system(""), "tools": json.dumps(TOOLS)}, user("q"), bot("a")]},
     Conversation([user("q"), bot("a")], TOOLS)),
    ("conversations", {"conversations": json.dumps([user("q"), bot("a")])}, QA),
    ("conversations", {"conversations": [bot("hi"), user("q"), user("q2"), bot("a")]},
     Conversation([bot("hi"), user("q"), user("q2"), bot("a")])),
    ("messages", {"messages": [user("q"), bot("a")], "text": None}, QA),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, bot("a")]}, QA),
    ("messages", {"messages": [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        tool("2"), bot("two")], "tools": TOOLS}, Conversation(USED_TOOL, TOOLS)),
    ("conversations", {"conversations": [
        user("q"), {"role": "assistant", "content": "", "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
        tool("2"), bot("two")]}, Conversation(USED_TOOL)),
    ("messages", {"messages": [
        user("q"), bot('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'), tool("2"), bot("two")]},
     Conversation(USED_TOOL)),
    ("prompt-response", {"prompt": "q", "response": "a"}, QA),
    ("prompt-response", {"prompt": "q", "completion": "a"}, QA),
    ("prompt-response", {"prompt": "q", "answer": "a"}, QA),
    ("prompt-response", {"prompt": [user("q")], "completion": [bot("a")]}, QA),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, QA),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["q0", "a0"]]},
     Conversation([system("s"), user("q0"), bot("a0"), user("q\nx"), bot("a")])),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    ("sharegpt", {"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"}], "tools": json.dumps(TOOLS)},
     Conversation(USED_TOOL, TOOLS)),
    ("user-assistant", {"system": "s", "user": "q", "assistant": "a"},
     Conversation([system("s"), user("q"), bot("a")])),
    ("user-final", {"system": "", "user": "q", "cot": "r", "final": "a"}, Conversation([user("q"), bot("a", "r")])),
    ("question-answer", {"question": "q", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
     Conversation([user("q"), bot("6 * 7 = <<6*7=42>>42\n#### 42")])),
    ("question-answer", {"system": "s", "question": "q", "answer": "a", "reasoning_content": "r"},
     Conversation([system("s"), user("q"), bot("a", "r")])),
    ("prompt-response", {"prompt": "q", "response": "<think>\nr\n</think>\n<answer>a</answer>"},
     Conversation([user("q"), bot("a", "r")])),
    ("prompt-response", {"prompt": "q", "response": "<think>r</think>\n\na"}, Conversation([user("q"), bot("a", "r")])),
    ("prompt-response", {"prompt": "q", "response": "r</think>a"}, Conversation([user("q"), bot("a", "r")])),
    ("prompt-response", {"prompt": "q", "response": "<think></think>a"}, QA),
    ("prompt-response", {"prompt": "q", "response": "【推理过程】\nr\n【最终答案】\na\n"}, Conversation([user("q"), bot("a", "r")])),
    ("prompt-response", {"prompt": "q", "response": "先写【推理过程】r\n【最终答案】a"},
     Conversation([user("q"), bot("先写【推理过程】r\n【最终答案】a")])),
    ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad", "kind": "x"}, PAIR),
    ("preference", {"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]}, PAIR),
    ("preference", {"prompt": "q", "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]}, PAIR),
    ("preference", {"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]}, PAIR),
    ("preference", {"chosen": [user("q"), bot("x")], "rejected": [user("q"), bot("x"), user("y"), bot("z")]},
     Preference([user("q")], [bot("x")], [bot("x"), user("y"), bot("z")])),
    ("preference", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
    ("preference", {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
                    "rejected": {"from": "gpt", "value": "bad"}}, PAIR),
    ("preference", {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, PAIR),
    ("judged", {"prompt": "q", "completion": "a", "label": True}, Judged([user("q")], [bot("a")], True)),
    ("judged", {"prompt": [user("q")], "completion": [bot("a")], "label": 0}, Judged([user("q")], [bot("a")], False)),
    ("judged", {"prompt": "q", "completion": "a", "label": "False"}, Judged([user("q")], [bot("a")], False)),
    ("judged", {"messages": [user("q"), bot("a")], "label": False}, Judged([user("q")], [bot("a")], False)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "sample"), FORMATS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FORMATS)])
def test_every_format_is_recognised(name: str, row: dict[str, Any], sample: Any) -> None:
    """A format that needs registration, or is taken for another one."""
    assert recognise(row) == sample
    assert format_name(row) == name


BAD_ROWS: list[tuple[Any, str]] = [
    ("text", "row is text, expected an object"),
    ([user("q")], "row is a list, expected an object with fields; write a list of rows to a .json file"),
    ({}, "row has no fields"),
    ({"question": "q", "answers": "a"}, "unknown format: found the fields answers, question; known are {prompt, chosen"),
    ({"question": "q", "answer": 3}, "answer is a number, expected text"),
    ({"text": None}, "found the fields text (null: text)"),
    ({"text": ""}, "text is empty"),
    ({"text": " \n"}, "text is empty"),
    ({"text": 5}, "text is a number, expected text"),
    ({"text": "a\ud800"}, "half a character"),
    ({"prompt": "q\udfff", "response": "a"}, "prompt contains half a character"),
    ({"prompt": "q", "response": ""}, "response is empty"),
    ({"prompt": "", "response": "a"}, "prompt is empty"),
    ({"prompt": "q", "response": "<think>r"}, "response opens <think> and never closes it"),
    ({"prompt": "q", "response": "So <think>r</think> a"}, "response has text before <think>"),
    ({"prompt": "q", "response": "<think>r</think>"}, "response is empty (there is reasoning but no answer)"),
    ({"prompt": "q", "response": "<think>r</think><answer>a"}, "opens <answer> and does not end with </answer>"),
    ({"prompt": "q", "response": "<tool_call>{"}, "opens <tool_call> and never closes it"),
    ({"conversations": []}, "conversations is empty"),
    ({"conversations": "hello"}, "conversations is text, expected a list of turns"),
    ({"conversations": ["q"]}, "conversations[0] is text, expected an object"),
    ({"conversations": [{"content": "q"}]}, "conversations[0] has no role (its fields: content)"),
    ({"conversations": [user("q"), {"role": "bard", "content": "a"}]}, "conversations[1]: unknown role 'bard'"),
    ({"conversations": [user("q"), bot(" ")]}, "conversations[1].content is empty"),
    ({"conversations": [user("q"), {"role": "assistant", "content": 7}]}, "conversations[1].content is a number"),
    ({"conversations": [user("q"), {"role": "assistant", "content": None}]}, "conversations[1].content is null"),
    ({"conversations": [user("q")]}, "no assistant turn (roles found: user)"),
    ({"conversations": [bot("a")]}, "no user turn"),
    ({"conversations": [user("q"), bot("<think>x</think>a", "r")]}, "keep one"),
    ({"conversations": [{**user("q"), "tool_calls": [CALL]}, bot("a")]}, "tool_calls in a user turn"),
    ({"conversations": [user("q"), bot("a", calls=[{"arguments": {}}])]}, "a tool call needs a name"),
    ({"conversations": [user("q"), bot("a", calls=[{"name": "f", "arguments": "{"}])]},
     "arguments of f is not valid JSON"),
    ({"conversations": [user("q"), bot("a")], "tools": "[{"}, "tools is not valid JSON"),
    ({"conversations": [user("q"), bot("a")], "tools": [1]}, "tools is a list, expected a list of objects"),
    ({"conversations": [user("q"), bot("a")], "tools": [{"since": object()}]}, "tools cannot be written as JSON"),
    ({"system": "x", "conversations": [system("s"), user("q"), bot("a")]}, "two different system prompts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, bot("a")]},
     "messages[0].content[0] is of type 'image_url', expected a text part"),
    ({"instruction": "", "input": "", "output": "a"}, "instruction is empty"),
    ({"instruction": "q", "output": "a", "history": ["x"]}, "history is not a list of [question, answer] pairs"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({"prompt": [user("q"), bot("a")], "chosen": "b", "rejected": "c"}, "prompt ends with a turn of the assistant"),
    ({"prompt": "other", "chosen": [user("q"), bot("b")], "rejected": [user("q"), bot("c")]},
     "do not begin with prompt"),
    ({"chosen": [user("q"), bot("b")], "rejected": [user("p"), bot("c")]}, "no user turn in the turns shared"),
    ({"prompt": "q", "completion": "a", "label": "maybe"}, "label is 'maybe', expected true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[str(i) for i in range(len(BAD_ROWS))])
def test_bad_rows_say_why(row: Any, reason: str) -> None:
    """A schema surprise that stops a run, or is dropped with a vague reason."""
    with pytest.raises(RowError) as caught:
        recognise(row)
    assert reason in str(caught.value)


def test_the_switch_of_a_row() -> None:
    """Guards: a row's own switch for thinking, in the form of other trainers, that is dropped or taken for true."""
    turns = [{"role": "user", "content": "3 + 5 = ?"}, {"role": "assistant", "content": "8"}]
    for row in ({"messages": turns}, {"prompt": "3 + 5 = ?", "response": "8"}, {"question": "3 + 5 = ?", "answer": "8"}):
        assert [as_conversation(recognise({**row, **more})).thinking for more in ({}, _switch(False), _switch(True))] == [None, False, True]
    for wrong, reason in ((_switch("no"), "enable_thinking is 'no'"), ({"chat_template_kwargs": [1]}, "chat_template_kwargs is a list")):
        with pytest.raises(RowError, match=reason):
            recognise({"messages": turns, **wrong})
    pair, judged = {"prompt": "3 + 5 = ?", "chosen": "8", "rejected": "9"}, {"prompt": "3 + 5 = ?", "completion": "8", "label": True}
    for row in (pair, judged):
        assert [recognise({**row, **more}).thinking for more in ({}, _switch(False), _switch(True))] == [None, False, True]  # type: ignore[union-attr]
        assert as_conversation(recognise({**row, **_switch(False)})).thinking is False
    with pytest.raises(RowError, match="false, but the answer has reasoning_content"):
        recognise({**pair, "rejected": "<think>3 + 5 = 9</think>9", **_switch(False)})
    with pytest.raises(RowError, match="false, but the answer has reasoning_content"):
        recognise({"question": "3 + 5 = ?", "answer": "8", "reasoning_content": "3 + 5 = 8", **_switch(False)})


def _switch(value: object) -> dict[str, Any]:
    return {"chat_template_kwargs": {"enable_thinking": value}}


def test_conversions_between_stages() -> None:
    """A stage fed with another stage's rows fails late or teaches unwanted answers."""
    reasoned = Conversation([user("q"), bot("a", "r")])
    assert as_text(reasoned) == "q\nr\na"
    assert as_text(Text("x")) == "x"
    assert as_conversation(PAIR) == Conversation([user("q"), bot("good")])
    assert as_preference(PAIR) is PAIR
    with pytest.raises(RowError, match="judged unwanted"):
        as_text(Judged([user("q")], [bot("a")], False))
    with pytest.raises(RowError, match="plain text has no turns"):
        as_conversation(Text("x"))
    with pytest.raises(RowError, match="expected a pair"):
        as_preference(QA)


# ---------------------------------------------------------------- containers


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def outcome(path: Path) -> list[tuple[int, Any]]:
    """(line, value or reason) of every row."""
    return [(row.line, row.value if row.error is None else row.error) for row in read_rows(path)]


def test_jsonl_with_mark_crlf_blank_lines_and_bad_lines(tmp_path: Path) -> None:
    """One wrong byte or comma ends the run, or shifts the reported lines."""
    data = '\ufeff{"text": "你\u2028好"}\r\n\r\n'.encode() + b'{"text": "\xe4\xbd\xff"}\n{"text": }\n{"text": NaN}'
    rows = outcome(write(tmp_path / "a.jsonl", data))
    assert rows[0] == (1, {"text": "你\u2028好"})
    assert rows[1] == (3, "line is not UTF-8 (byte 0xe4 at column 11); save the file as UTF-8")
    assert rows[2][0] == 4 and "not valid JSON: Expecting value at column 10" in rows[2][1]
    assert rows[3][0] == 5 and rows[3][1]["text"] != rows[3][1]["text"]


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000], ids=["deep", "long number"])
def test_hostile_json_is_a_bad_row(tmp_path: Path, line: str) -> None:
    """Nesting or digits beyond the parser's limits escape as RecursionError and end the run."""
    samples = list(read_samples(write(tmp_path / "a.jsonl", f'{line}\n{{"text": "ok"}}\n'), bad := BadRows()))
    assert [line for line, _ in samples] == [2] and bad.first[0].line == 1


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_compressed_and_damaged_files(tmp_path: Path, suffix: str) -> None:
    """A truncated archive raises in the middle of a run, or its missing part goes unnoticed."""
    text = "".join(json.dumps({"text": f"{i} " + "x" * 50}) + "\n" for i in range(5000)).encode()
    packed = gzip.compress(text) if suffix == ".gz" else lzma.compress(text)
    whole = write(tmp_path / f"a.jsonl{suffix}", packed)
    assert [row.line for row in read_rows(whole)] == list(range(1, 5001))
    cut = outcome(write(tmp_path / f"b.jsonl{suffix}", packed[: len(packed) // 2]))
    assert "compressed file is damaged, the rest of it was not read" in cut[-1][1]
    foreign = outcome(write(tmp_path / f"c.jsonl{suffix}", b"plain text"))
    assert len(foreign) == 1 and "damaged" in foreign[0][1]


def test_zstandard_is_read_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing optional package shows as a bare ImportError."""
    path = write(tmp_path / "a.jsonl.zst", b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="needs the package zstandard.*extra `data`"):
        list(read_rows(path))


def test_zstandard_round_trip(tmp_path: Path) -> None:
    """Only the first frame of a multi-frame file is read."""
    zstandard = pytest.importorskip("zstandard")
    packed = b"".join(zstandard.ZstdCompressor().compress(f'{{"text": "{i}"}}\n'.encode()) for i in range(2))
    assert outcome(write(tmp_path / "a.jsonl.zst", packed)) == [(1, {"text": "0"}), (2, {"text": "1"})]


def test_parquet(tmp_path: Path) -> None:
    """Columns that are null in a row are taken for wrong values."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a", "messages": None}, {"text": None, "messages": [user("q"), {**bot("a"), "tool_calls": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [s for _, s in read_samples(tmp_path / "a.parquet", BadRows())] == [Text("a"), QA]
    assert "not a parquet file" in outcome(write(tmp_path / "b.parquet", b"no"))[0][1]


def test_json_list_object_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large list is loaded whole, or is read wrongly at the edges of the window that slides over it."""
    rows = [{"text": f"{i} 你\n" + "x" * i, "n": [i, {"a": 1.5}]} for i in range(60)]
    for window in (1, 7, 1 << 16):
        monkeypatch.setattr(raw_rows, "JSON_CHUNK_CHARACTERS", window)
        for name, data in (
            ("list", json.dumps(rows)),
            ("pretty", "\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False).replace("\n", "\r\n")),
            ("lines", "\n".join(json.dumps(row) for row in rows)),
        ):
            assert [row.value for row in read_rows(write(tmp_path / f"{name}.json", data))] == rows
    assert outcome(write(tmp_path / "one.json", '\n{"text": "a"}\n')) == [(2, {"text": "a"})]
    assert outcome(write(tmp_path / "numbers.json", "[12, 345]")) == [(1, 12), (1, 345)]
    assert outcome(write(tmp_path / "empty.json", " \n")) == outcome(write(tmp_path / "none.json", "[]")) == []


def test_broken_json_says_what_was_not_read(tmp_path: Path) -> None:
    """Rows after the fault of a JSON list vanish silently."""
    rows = outcome(write(tmp_path / "a.json", '[{"text": "a"},\n{"text": "b" "c"},\n{"text": "d"}]'))
    assert rows[0] == (1, {"text": "a"}) and len(rows) == 2
    assert rows[1][0] == 2 and rows[1][1].endswith("the rest of the file was not read")
    assert [line for line, _ in outcome(write(tmp_path / "cut.json", '[{"text": "a"}, {"text": "b'))] == [1, 1]
    lines = outcome(write(tmp_path / "lines.json", '{"text": "a"}\n{"text": \n{"text": "c"}\n'))
    assert lines[0] == (1, {"text": "a"}) and lines[-1] == (3, {"text": "c"}) and len(lines) == 3
    wrong = outcome(write(tmp_path / "byte.json", b'[{"text": "a\xff"}, {"text": "b"}]'))
    assert "row is not UTF-8 (byte 0xff" in wrong[0][1] and wrong[1] == (1, {"text": "b"})


def test_csv(tmp_path: Path) -> None:
    """A quoted line end shifts the lines, an unclosed quote swallows the file, a short row shifts the columns."""
    data = '\ufeffprompt,response\r\n"q\n1","a ""x"""\r\nonly\r\n\r\nq2,a2\r\nq3,"open\r\nq4,a4\r\n'
    rows = outcome(write(tmp_path / "a.csv", data))
    assert rows[0] == (2, {"prompt": "q\n1", "response": 'a "x"'})
    assert rows[1] == (4, "row has 1 cells, the header has 2")
    assert rows[2] == (6, {"prompt": "q2", "response": "a2"})
    assert rows[3][0] == 7 and "not valid CSV" in rows[3][1] and "lines 7 to 8 were not read" in rows[3][1]
    long = write(tmp_path / "long.csv", "text\n" + "字" * 200_000)
    assert len(outcome(long)[0][1]["text"]) == 200_000
    assert "not UTF-8 (byte 0xff" in outcome(write(tmp_path / "b.csv", b"text\na\xff\n"))[0][1]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_text_documents(tmp_path: Path, suffix: str) -> None:
    """Paragraphs are cut in the middle, or a file without blank lines is held in memory whole."""
    path = tmp_path / f"a{suffix}"
    assert outcome(write(path, "\n\n第一\n行\r\n\n\n二\n<|endoftext|>\n三")) == [
        (3, {"text": "第一\n行\n\n二"}),
        (9, {"text": "三"}),
    ]
    paragraphs = [f"{i}" + "x" * 2999 for i in range(10)]
    documents = [row.value["text"] for row in read_rows(write(path, "\n\n".join(paragraphs)))]
    assert "\n\n".join(documents) == "\n\n".join(paragraphs) and max(map(len, documents)) <= 8000
    assert len(outcome(write(path, "\n".join(paragraphs)))) > 3
    assert outcome(write(path, "y" * 20_000)) == [(1, {"text": "y" * 20_000})]
    holed = outcome(write(path, b"one\ntwo \xff\nthree"))
    assert holed[0] == (1, {"text": "one"}) and "byte 0xff" in holed[1][1] and holed[2] == (3, {"text": "three"})


def test_utf16_is_named(tmp_path: Path) -> None:
    """Files saved by Windows tools as UTF-16 give one misleading error a line."""
    rows = outcome(write(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16")))
    assert len(rows) == 1 and "UTF-16" in rows[0][1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.md", "a.csv"])
def test_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    """An empty file crashes its reader."""
    assert outcome(write(tmp_path / name, b"")) == []


# ---------------------------------------------------------------- paths


def test_folder_glob_list_and_weights(tmp_path: Path) -> None:
    """Readmes and manifests are taken for training text; the order depends on the disk; weights get lost."""
    for name in (
        "b.jsonl",
        "a.TXT",
        "README.md",
        "LICENSE.txt",
        "SOURCES.md",
        "manifest.json",
        ".hidden.jsonl",
        "x.py",
    ):
        write(tmp_path / name, b"")
    for name in ("raw.bin", "ids.bin", "ids.json"):
        write(tmp_path / name, b"{}")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.csv.gz", b"")
    files = expand_paths(tmp_path)
    assert [file.path.relative_to(tmp_path).as_posix() for file in files] == [
        "a.TXT",
        "b.jsonl",
        "ids.bin",
        "sub/c.csv.gz",
    ]
    assert [file.path.name for file in expand_paths(str(tmp_path / "*.jsonl"))] == ["b.jsonl"]
    assert [file.path.name for file in expand_paths(str(tmp_path / "**" / "*.gz"))] == ["c.csv.gz"]
    assert [file.path.name for file in expand_paths(tmp_path / "raw.bin")] == ["raw.bin"]
    weighted = expand_paths([str(tmp_path / "sub"), {"path": tmp_path / "b.jsonl", "weight": 2}, tmp_path / "sub" / "c.csv.gz"])
    assert [(file.path.name, file.weight) for file in weighted] == [("c.csv.gz", 1.0), ("b.jsonl", 2.0)]


def test_wrong_paths_name_the_remedy(tmp_path: Path) -> None:
    """A mistyped path gives a bare error, or silently no data."""
    write(tmp_path / "corpus.jsonl", b"")
    with pytest.raises(FileNotFoundError, match=r"corpus\.json does not exist\. Did you mean .*corpus\.jsonl"):
        expand_paths(tmp_path / "corpus.json")
    with pytest.raises(FileNotFoundError, match=r"holds corpus\.jsonl"):
        expand_paths(tmp_path / "nowhere" / "x.jsonl")
    with pytest.raises(FileNotFoundError, match="no data file matches"):
        expand_paths(str(tmp_path / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data files in .*the folder is empty"):
        expand_paths(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"unknown data suffix '\.doc'"):
        expand_paths(write(tmp_path / "a.doc", b""))
    with pytest.raises(ValueError, match="no data files given"):
        expand_paths([])
    for weight in (0, -1, True, "2", float("nan")):
        with pytest.raises(ValueError, match="weight is"):
            expand_paths({"path": tmp_path / "corpus.jsonl", "weight": weight})
    with pytest.raises(ValueError, match="expected {"):
        expand_paths({"file": "x"})


# ---------------------------------------------------------------- token ids and bad rows


def test_ready_token_ids(tmp_path: Path) -> None:
    """A uint32 file read as uint16 trains on noise."""
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.int64))
    assert read_token_ids(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    np.array([1, 70000 % 65536], dtype="<u2").tofile(tmp_path / "b.bin")
    assert read_token_ids(tmp_path / "b.bin").tolist() == [1, 4464]
    np.array([1, 70000], dtype="<u4").tofile(tmp_path / "c.bin")
    write(tmp_path / "c.json", '{"dtype": "uint32"}')
    assert read_token_ids(tmp_path / "c.bin").tolist() == [1, 70000]
    write(tmp_path / "c.json", '{"dtype": "float32"}')
    with pytest.raises(ValueError, match="dtype is 'float32'"):
        read_token_ids(tmp_path / "c.bin")
    with pytest.raises(ValueError, match="3 bytes"):
        read_token_ids(write(tmp_path / "d.bin", b"abc"))
    np.save(tmp_path / "e.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected a non-empty 1-D array"):
        read_token_ids(tmp_path / "e.npy")
    with pytest.raises(ValueError, match="holds token ids.*read_token_ids"):
        read_rows(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="read its rows"):
        read_token_ids(write(tmp_path / "f.jsonl", b""))


def test_bad_rows_are_counted_and_reported() -> None:
    """Memory grows with every bad row, or the count is lost."""
    bad, lines = BadRows(keep=2), []
    bad.report(lines.append)
    bad.raise_if_strict(True)
    assert lines == []
    for line in range(5):
        bad.add("a.jsonl", line, f"turn {line} is empty")
    bad.report(lines.append)
    assert bad.total == 5 and len(bad.first) == 2 and dict(bad.by_reason) == {"turn N is empty": 5}
    assert lines[0] == "5 bad rows skipped:" and "a.jsonl:0: turn 0 is empty" in lines[1] and lines[-1].split()[0] == "5"
    bad.raise_if_strict(False)
    with pytest.raises(ValueError, match="5 bad rows with --strict; the first is a.jsonl:0"):
        bad.raise_if_strict(True)


def test_read_samples_collects_every_fault(tmp_path: Path) -> None:
    """Rows that a stage cannot use are dropped without a trace."""
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{\n{"prompt": "q", "response": "a"}\n{"text": ""}\n')
    bad = BadRows()
    assert list(read_samples(path, bad, as_conversation)) == [(3, QA)]
    assert [(row.line, row.reason.split(":")[0]) for row in bad.first] == [
        (1, "plain text has no turns"), (2, "not valid JSON"), (4, "text is empty"),
    ]  # fmt: skip
