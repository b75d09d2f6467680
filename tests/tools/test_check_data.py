"""The data report: what it counts, its JSON, its exit status, and the marks of learned tokens."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.tokenizer import BPETokenizer
from tools import check_data
from tools.check_data import check_file, count_duplicates, language_of, main, marked_text, marked_tokens
from train.formats import Conversation, Preference, Text

CHAT = {"conversations": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "你好!"}]}


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check_data, "DEFAULT_TOKENIZER", tmp_path / "no_tokenizer")


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(["hello 你好 user assistant"] * 3, vocab_size=300, progress=False)


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_json_has_the_fixed_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts outside the repository read these keys; a message on standard output would break them."""
    path = write(
        tmp_path / "a.jsonl", [{"text": "plain words"}, "{", {"text": ""}, {"text": "plain words"}, CHAT, {"question": "q", "answer": "a"}]
    )
    assert main([str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out)["files"]
    assert (found["file"], found["format"], found["rows"], found["kept"]) == (str(path), "text, conversations, question-answer", 6, 4)
    assert [bad["line"] for bad in found["bad"]] == [2, 3]
    assert found["bad"][1] == {"line": 3, "reason": "text is empty"}
    assert found["duplicates"] == 1 and found["tokens"] is None and found["longer_than_context"] is None
    assert "no tokenizer" in err


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that trains on data it never could read, because the check said 0."""
    good = write(tmp_path / "good.jsonl", [CHAT])
    mixed = write(tmp_path / "mixed.jsonl", [CHAT, "{"])
    none = write(tmp_path / "none.jsonl", ["{"])
    assert [main([str(good)]), main([str(good), "--strict"])] == [0, 0]
    assert [main([str(mixed)]), main([str(mixed), "--strict"])] == [0, 1]
    assert [main([str(none)]), main([str(write(tmp_path / "empty.jsonl", []))])] == [1, 1]
    capsys.readouterr()
    assert main([str(tmp_path / "goood.jsonl")]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main([str(good), "--tokenizer", str(tmp_path / "nowhere")]) == 2
    assert main([str(good), "--show", "1"]) == 2
    for wrong in ([], [str(good), "--context", "0"], [str(good), "--wat"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_report_for_a_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many bad rows flood the screen, or the later kinds are never named."""
    rows: list[Any] = [CHAT, {"text": "some words here"}, *[{"text": ""}] * 30, *[{"text": 1}] * 5]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", [CHAT])
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "37: 2 usable, 35 bad" in out and "line 3: text is empty" in out and out.count("    line ") == 20
    assert "15 more" in out and "30  text is empty" in out and "5  text is a number" in out
    assert "conversations 1, text 1" in out and "zh 50.0%, en 50.0%" not in out.split("b.jsonl")[1]
    assert "1 exact, within and between the files" in out


def test_one_unreadable_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong token file stops the report of ten good files."""
    write(tmp_path / "a.jsonl", [CHAT])
    (tmp_path / "b.npy").write_bytes(b"nonsense")
    assert main([str(tmp_path), "--json"]) == 0
    good, bad = json.loads(capsys.readouterr().out)["files"]
    assert good["kept"] == 1 and bad["kept"] == 0 and "b.npy" in bad["bad"][0]["reason"]


def test_token_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ready token ids are opened as text."""
    np.array([1, 5, 9], dtype=np.uint16).tofile(tmp_path / "a.bin")
    assert main([str(tmp_path / "a.bin")]) == 0
    assert "3, largest id 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "language"),
    [("今天天气很好", "zh"), ("我用 Python 写代码", "zh"), ("The word 你 means you", "en"), ("Привет, мир", "other"),
     ("1 + 2 = 3", "other"), ("こんにちは、げんきですか", "other")],
)  # fmt: skip
def test_language_by_script(text: str, language: str) -> None:
    """Chinese text with English names in it counts as English."""
    assert language_of(text) == language


def test_duplicates_look_at_contents_only(tmp_path: Path) -> None:
    """The same conversation in two formats, or with another source, is not seen as a repetition."""
    a = write(tmp_path / "a.jsonl", [{**CHAT, "source": "x"}, {"prompt": "hello", "response": "你好!"}, {"text": "hello"}])
    b = write(tmp_path / "b.jsonl", [CHAT, {"prompt": "hello", "completion": "你好!", "label": True}])
    reports = [check_file(a), check_file(b)]
    assert [count_duplicates([report]) for report in reports] == [1, 0]
    assert count_duplicates(reports) == 2
    assert isinstance(reports[0].hashes, array)


def test_learned_tokens_are_the_answers(tokenizer: BPETokenizer) -> None:
    """The picture differs from what training does: a prompt that is learned, an answer that is not."""
    user, bot = CHAT["conversations"]
    (ids, learned), = marked_tokens(Conversation([user, bot]), tokenizer)  # fmt: skip
    shown = marked_text(ids, learned, tokenizer, colour=False)
    assert shown.count("«") == 1 and shown.endswith("你好!<|im_end|>»\n") and "hello" in shown.split("«")[0]
    coloured = marked_text(ids, learned, tokenizer, colour=True)
    assert "\x1b[1;32m" in coloured and coloured.count("\x1b[0m") == 3 and "«" not in coloured
    pair = Preference([user], [bot], [{"role": "assistant", "content": "no"}])
    chosen, rejected = (marked_text(*sequence, tokenizer, colour=False) for sequence in marked_tokens(pair, tokenizer))
    assert "你好!<|im_end|>»" in chosen and "no<|im_end|>»" in rejected
    ((ids, learned),) = marked_tokens(Text("hello\x1b[2J"), tokenizer)
    assert marked_text(ids, learned, tokenizer, colour=False) == "«hello�[2J<|endoftext|>»"


def test_tokens_and_context(tmp_path: Path, tokenizer: BPETokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows longer than the context are cut later without anyone having been told."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", [{"text": "x " * 50}, CHAT])
    arguments = [str(path), "--tokenizer", str(tmp_path / "tokenizer"), "--context", "60"]
    assert main([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["files"]
    assert found["longer_than_context"] == 1 and found["tokens"]["max"] > 60 and found["context"] == 60
    assert main([*arguments, "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "1 rows (50.0%) exceed the context of 60 tokens" in out and "line 2, conversation:" in out


def test_rows_that_an_imported_template_refuses_are_bad(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """The report calls a row usable that training then leaves out."""
    template = "{% for m in messages %}{{ m.content | replace('drop', '') if m.role == 'user' else m.content[:3] }}<|im_end|>{% endfor %}"
    foreign = BPETokenizer(tokenizer.backend, template)
    report = check_file(write(tmp_path / "a.jsonl", [{"text": "plain"}, CHAT]), foreign)
    assert (report.kept, report.bad.total, len(report.tokens)) == (1, 1, 1)
    assert report.bad.first[0].line == 2 and "message 2" in report.bad.first[0].reason
    assert check_file(tmp_path / "a.jsonl", tokenizer).bad.total == 0
