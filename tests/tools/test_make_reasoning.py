"""tools.make_reasoning: the problems are solved rightly, and what is held out stays out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tools.make_reasoning import main
from tools.reasoning_tasks import KINDS, SPLITS, make_dataset
from tools.reasoning_tasks.dataset import LONGER_STEPS, TRAINED_STEPS
from tools.reasoning_tasks.verify import check_row, solve
from tools.reasoning_tasks.wordings import LANGUAGES, WORDINGS
from train.formats import BadRows, as_conversation, read_samples

Row = dict[str, Any]
HELD_OUT = [split for split in SPLITS if split != "train"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    return make_dataset(tmp_path_factory.mktemp("tasks"), rows=3000, test_rows=360, seed=3, style="both")


def asked(row: Row) -> str:
    return row["messages"][0]["content"]


def numbers(row: Row) -> tuple[str, ...]:
    """The numbers and signs of a sum or story, whatever its words: one problem in all wordings and languages."""
    signs = {"+": r"\+|plus|add|gets|finds|加上?|得到|找到", "-": r"-|minus|take away|gives away|loses|减去?|送出|丢了"}
    text = asked(row)
    for sign, words in signs.items():
        text = re.sub(words, sign, text)
    return tuple(re.findall(r"[+-] ?\d+|\d+", text.replace(" ", "")))


def test_held_out_problems_never_in_train(made: dict[str, list[Row]], tmp_path: Path) -> None:
    """Guards: a test problem that another wording, the other language, a story or another seed trains on."""
    other = make_dataset(tmp_path, rows=3000, test_rows=12, seed=4)
    train = made["train"] + other["train"]
    questions = {" ".join(asked(row).split()) for row in train}
    sums = {numbers(row) for row in train if row["kind"] in ("sums", "stories")}
    presses = {(solve("parity", asked(row))[1][0], tuple(re.findall(r"\d+", asked(row)))) for row in train if row["kind"] == "parity"}
    assert len(sums) > 300 and len(presses) > 300
    for split in HELD_OUT:
        for row in made[split]:
            assert " ".join(asked(row).split()) not in questions
            if row["kind"] in ("sums", "stories"):
                assert numbers(row) not in sums, asked(row)
            elif row["kind"] == "parity":
                assert (solve("parity", asked(row))[1][0], tuple(re.findall(r"\d+", asked(row)))) not in presses


def test_the_switch_decides_which_rows_think(made: dict[str, list[Row]]) -> None:
    """Guards: answers with and without thinking to the same questions, which teach the model to toss a coin."""
    for row in made["train"]:
        thinks = "reasoning_content" in row["messages"][1]
        assert row.get("chat_template_kwargs") == (None if thinks else {"enable_thinking": False})


def test_splits_differ_as_they_say(made: dict[str, list[Row]]) -> None:
    """Guards: held-out wordings in train, longer problems that are not, rows that repeat, an uneven mixture."""
    templates = {split: {row["template"] for row in rows} for split, rows in made.items()}
    assert not templates["train"] & templates["held_templates"]
    assert templates["valid"] <= templates["train"] and templates["longer"] <= templates["train"]
    for split, rows in made.items():
        assert {row["steps"] for row in rows} == set(LONGER_STEPS if split == "longer" else TRAINED_STEPS)
        assert len({asked(row) for row in rows}) == len(rows)
        counts = Counter((row["kind"], row["lang"]) for row in rows)
        assert set(counts) == {(kind, lang) for kind in KINDS for lang in LANGUAGES}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_held_out_wordings_use_known_words() -> None:
    """Guards: a held-out wording that tests whether a model knows a word it has never seen."""
    for lang in LANGUAGES:
        pattern = r"[A-Za-z]+" if lang == "en" else r"[\u4e00-\u9fff]"
        texts: dict[bool, str] = {True: "", False: ""}
        for (_, of), wordings in WORDINGS.items():
            for wording in wordings if of == lang else ():
                texts[wording.held_out] += re.sub(r"\{\w+\}", " ", wording.frame) + " " + wording.style + " "
        assert set(re.findall(pattern, texts[True])) <= set(re.findall(pattern, texts[False]))
    assert all(len({(w.frame, w.style) for w in wordings}) == len(wordings) for wordings in WORDINGS.values())


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [
        ("sums", "Start with 3, add 4, take away 2. What do you get?", "5"),
        ("sums", "从 9 开始，再减去 7，再加上 1，得多少？", "3"),
        ("sums", "12加3减5是多少？", "10"),
        ("variables", "Let x = 3; y = x + 2; z = y - x. Find z.", "2"),
        ("variables", "已知 a = 4，b = a + 9，c = b - a。a = ？", "4"),
        ("order", "Tom is taller than Mia. Ben is shorter than Mia. Who is the tallest?", "Tom"),
        ("order", "Tom is taller than Mia. Ben is shorter than Mia. Who is the shortest?", "Ben"),
        ("order", "已知乐乐比丽丽矮，乐乐比明明高。谁最高？", "丽丽"),
        ("parity", "The lamp is on. Press the switch 3 times, then 4 times. Is it on or off?", "off"),
        ("parity", "灯是关着的。开关被按了 1 次，又按了 2 次。现在是开还是关？", "开"),
        ("counting", "Count the red ones: red, blue, red, red.", "3"),
        ("counting", "红、蓝、绿、蓝。红的有几个？", "1"),
        ("stories", "At first Tom has 3 apples. Tom gets 4 more. Tom loses 2. How many now?", "5"),
        ("stories", "乐乐有 3 个苹果。乐乐又找到 4 个。乐乐送出 6 个。还剩多少？", "1"),
    ],
)
def test_questions_are_read_rightly(kind: str, question: str, answer: str) -> None:
    """Guards: a checker that reads a question otherwise than a person does."""
    assert solve(kind, question)[0] == answer


def test_checker_finds_wrong_rows(made: dict[str, list[Row]]) -> None:
    """Guards: wrong answers and wrong steps that pass, in any kind and language."""
    tampered = 0
    for row in made["train"][:600]:
        reply = row["messages"][1]
        working = reply.get("reasoning_content")
        check_row(row["kind"], asked(row), row["answer"], working)
        wrong = {"on": "off", "off": "on", "开": "关", "关": "开"}.get(row["answer"], f"{row['answer']}7")
        with pytest.raises(AssertionError):
            check_row(row["kind"], asked(row), wrong, None)
        # A mistake in the middle, which the steps after it do not follow from.
        broken = re.sub(r"\d+(?=$|\. |。)", lambda m: str(int(m[0]) + 1), working, count=1) if working else None
        if broken and broken != working:
            tampered += 1
            with pytest.raises(AssertionError):
                check_row(row["kind"], asked(row), row["answer"], broken)
    assert tampered > 100
    with pytest.raises(AssertionError):
        check_row("order", "Tom is taller than Mia. Who is the tallest?", "Tom", "Tom < Mia")


def test_files_are_deterministic_and_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: files that differ between runs of one seed, that training cannot read, or that lose the steps."""
    arguments = ["--rows", "60", "--test-rows", "12", "--style", "think", "--kinds", "order", "counting", "--lang", "zh"]
    for name in ("a", "b"):
        main([str(tmp_path / name), *arguments])
    assert "order" in capsys.readouterr().out
    main([str(tmp_path / "c"), *arguments, "--seed", "1"])
    for split in SPLITS:
        first, second, third = ((tmp_path / name / f"{split}.jsonl").read_bytes() for name in "abc")
        assert first == second != third
        bad = BadRows()
        samples = [sample for _, sample in read_samples(tmp_path / "a" / f"{split}.jsonl", bad, as_conversation)]
        rows = [json.loads(line) for line in first.decode("utf-8").splitlines()]
        assert not bad.total and len(samples) == len(rows) == (60 if split == "train" else 12)
        assert all(sample.messages[1]["reasoning_content"] for sample in samples)
        assert {row["lang"] for row in rows} == {"zh"} and {row["kind"] for row in rows} == {"order", "counting"}
        assert all(row["answer"] == row["messages"][1]["content"] for row in rows)


def test_style_decides_on_the_steps(made: dict[str, list[Row]], tmp_path: Path) -> None:
    """Guards: rows with steps where answers alone are asked for, and a mixture that is none."""
    latent = make_dataset(tmp_path, rows=30, test_rows=6)
    assert not any("reasoning_content" in row["messages"][1] for rows in latent.values() for row in rows)
    share = sum("reasoning_content" in row["messages"][1] for row in made["train"]) / len(made["train"])
    assert 0.45 < share < 0.55


def test_mistakes_are_named(tmp_path: Path) -> None:
    """Guards: unknown names that are ignored, and a search without end for problems that do not exist."""
    for changes, message in (
        ({"kinds": ["sum"]}, "unknown kind 'sum'; known: sums"),
        ({"languages": ["de"]}, "unknown language 'de'"),
        ({"style": "thinking"}, "unknown style"),
        ({"rows": 0}, "0 rows"),
        ({"kinds": ["parity"], "test_rows": 20_000}, "hardly more different problems of the kind parity"),
    ):
        settings: dict[str, Any] = {"rows": 4, "test_rows": 4, **changes}
        with pytest.raises(ValueError, match=message):
            make_dataset(tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()
