"""Repairs and judgements of `train.cleaning`, near-duplicates and contamination of `train.near_duplicates`."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.cleaning import Limits, is_boilerplate, lost_characters, repair, simplifier, why_unsuitable, without_lines
from train.near_duplicates import NGRAM, TestTexts, band_keys, near_duplicates, ngrams, signature, similarity, units


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("他说：“好，好！”（笑）……《书》—完；真的？", "他说：“好，好！”（笑）……《书》—完；真的？"),
        ("ＡＢＣ１２３，％", "ABC123，%"),
        ("e\u0301a\r\nb\rc\u2028d", "éa\nb\nc\nd"),
        ("def f():\n\treturn  1\n", "def f():\n\treturn  1\n"),
        ("a\x00b\x1b[31mc\u200b\ufeffd\u202e", "ab[31mcd"),
        ("一家👨\u200d👩\u200d👧人\u200d啊", "一家👨\u200d👩\u200d👧人啊"),
        ("caf\u00c3\u00a9 and it\u00e2\u20ac\u2122s", "café and it’s"),
        ("\u4f60\u597d".encode().decode("latin-1"), "你好"),
        ("naïve «oui» Ångström ÀÉÎ", "naïve «oui» Ångström ÀÉÎ"),
    ],
)
def test_repair_keeps_what_was_said(raw: str, clean: str) -> None:
    """Guards: NFKC, which turns Chinese commas into ASCII ones; lost indentation; taken-apart emoji; accents taken for a wrong decoding."""
    assert repair(raw) == clean


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_repair_settles(text: str) -> None:
    """Guards: a second cleaning that finds work again, and then removes other rows than the first; hidden characters left over."""
    once = repair(repair(text))
    assert repair(once) == once and not any(ord(c) < 32 and c not in "\n\t" for c in once)


def test_traditional_becomes_simplified() -> None:
    """Guards: characters converted one by one (頭髮 and 發展 have different characters, 头发 and 发展 one)."""
    pytest.importorskip("opencc")
    assert simplifier()("頭髮與發展，皇后在後面") == "头发与发展，皇后在后面"


def test_boilerplate_lines() -> None:
    """Guards: sentences that only mention a phrase being taken for menus."""
    for line in ("Copyright (c) 2020 Example. All rights reserved", "上一篇  下一篇", "Read more", "转载请注明出处", "  登录 | 注册 "):
        assert is_boilerplate(line), line
    for line in (
        "He went to log in at noon, and then he read more of the book.",
        "请点击这里，然后你会看到结果。",
        "注册表",
        "",
        "第三方登录",
    ):
        assert not is_boilerplate(line), line
    assert without_lines("标题\n\n上一篇\n\n正文。", is_boilerplate) == ("标题\n\n正文。", ["上一篇"])
    assert without_lines("a\n\n\n\nb", is_boilerplate) == ("a\n\n\n\nb", [])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("太短", "short"),
        ("A sentence that is long enough to be kept as it is.", None),
        ("12 + 35 = 47, 8 * 9 = 72", None),
        ("==== ---- **** ____ //// " * 2 + "abcdefghijk", "symbols"),
        ("好的，我知道了。" * 60, "repetitive"),
        ("锟斤拷锟斤拷 text with characters that are lost " * 2, "damaged"),
        ("".join(chr(0x4E00 + i * 7) for i in range(400)), "long"),
    ],
)
def test_judgements(text: str, rule: str | None) -> None:
    """Guards: sums taken for noise, loops taken for text."""
    found = why_unsuitable(text, Limits(max_characters=399 if rule == "long" else 0), lost_characters(text))
    assert (found and found[0]) == rule
    if rule in ("short", "symbols"):
        assert why_unsuitable(text, Limits(), is_text=False) is None  # a short answer is one


def words(text: str) -> list[str]:
    """An independent reading of what a unit is, for Latin and Chinese."""
    found, word = [], ""
    for c in text + " ":
        if "\u4e00" <= c <= "\u9fff" or not c.isalnum():
            found += [word] if word else []
            word = ""
            found += [c] if c.isalnum() else []
        else:
            word += c.lower()
    return found


def test_units_are_words_and_characters(seed: int) -> None:
    """Guards: hashes that depend on case or punctuation, that collide, or that differ from place to place."""
    rng = random.Random(seed)
    texts = ["".join(rng.choice(["a", "B", "词", "字", " ", "，", "9", "é", "𠀀"]) for _ in range(rng.randrange(40))) for _ in range(200)]
    hash_of: dict[str, int] = {}
    for text in texts:
        expected = words(text.replace("𠀀", "丁"))
        hashes = units(text.replace("𠀀", "丁")).tolist()
        assert len(hashes) == len(expected)
        for word, value in zip(expected, hashes, strict=True):
            assert hash_of.setdefault(word, value) == value
    assert len(set(hash_of.values())) == len(hash_of)
    assert len(units("𠀀𠀁")) == 2 and units("").size == 0


def test_the_estimate_is_the_share_of_common_shingles(seed: int) -> None:
    """Guards: a signature whose values are not independent. Against the sets themselves; 4 standard deviations."""
    rng = np.random.default_rng(seed)
    errors = []
    for share in (0.0, 0.02, 0.05, 0.1):
        for _ in range(10):
            first = rng.integers(0, 2**63, 400, dtype=np.uint64)
            second = np.where(rng.random(400) < share, rng.integers(0, 2**63, 400, dtype=np.uint64), first)
            a, b = (set(ngrams(hashes, 3).tolist()) for hashes in (first, second))
            low = [signature(hashes).astype(np.uint8) for hashes in (first, second)]
            errors.append(similarity(low[0], low[1]) - len(a & b) / len(a | b))
    assert max(map(abs, errors)) < 4 * (0.25 / 120) ** 0.5 and abs(np.mean(errors)) < 0.03


def test_planted_near_duplicates_are_found_and_others_left(seed: int) -> None:
    """Guards: a band width that never lets a pair meet; distinct texts taken away."""
    rng = np.random.default_rng(seed)
    distinct = [rng.integers(0, 5000, rng.integers(100, 600)).astype(np.uint64) for _ in range(200)]
    planted = [np.where(rng.random(t.size) < 0.03, rng.integers(0, 5000, t.size).astype(np.uint64), t) for t in distinct]
    values = [signature(t * np.uint64(0x9E3779B97F4A7C15)) for t in distinct + planted]
    keys, low = np.stack([band_keys(v) for v in values]), np.stack(values).astype(np.uint8)
    found = near_duplicates(keys, low, 0.7)
    assert all(copy >= 200 and copy - 200 == original for copy, (original, _) in found.items())  # none of the distinct ones
    assert len(found) >= 180


def test_contamination() -> None:
    """Guards: a test question inside a long text that is not seen; a row that only shares a phrase with one taken away."""
    question = "小明有三个苹果和五个橘子，他给了小红两个苹果，请问他一共还剩下几个水果？"
    other = "A farmer keeps seventeen sheep and all but nine of them run away during the night, how many are left in the field?"
    tests = TestTexts([("q:1", question), ("q:2", other), ("q:3", "太短"), ("q:4", question + "请说明理由。")])
    assert tests.too_short == 1 and NGRAM == 13
    assert tests.match(units(f"今天学了一道题。{question.replace('，', ' ')}老师说答案是六。")) == "q:1"
    assert tests.match(units("Once " + other.upper() + " Nine.")) == "q:2"
    assert tests.match(units("小明有三个苹果和五个橘子，他很高兴。")) is None
    assert tests.match(units("短")) is None and TestTexts([]).match(units(other)) is None
