"""Words, search scores, and what a sentence tells: rules that the memory stands on."""

import math
import random
import time

import numpy as np
import pytest
from memory_helpers import search  # noqa: F401

from inference.facts import extractive_summary, importance, key_facts, slots, topics
from inference.lexical import Bm25, language, search_words, sentences, stem


@pytest.mark.parametrize(
    "text, value",
    [
        ("Please remember that the key is under the mat.", 1.0),
        ("记住：门禁密码是四零七二。", 1.0),
        ("别忘了周五交报告", 1.0),
        ("My name is Tom.", 0.9),
        ("我叫小林。", 0.9),
        ("I moved to Berlin.", 0.7),
        ("我的狗叫豆豆", 0.7),
        ("I am allergic to peanuts.", 0.7),
        ("我不喜欢下雨天", 0.7),
        ("我的生日是3月5号", 0.85),
        ("My sister's wedding is on June 14.", 0.85),
        ("I was thinking about the sea.", 0.45),
        ("The sky is blue.", 0.3),
        ("The tower is 300 metres high.", 0.45),
        ("What is my name?", 0.1),
        ("Do you remember my name?", 0.1),
        ("你还记得我住哪里吗？", 0.1),
        ("Tell me a story about my dog.", 0.1),
        ("给我讲一个故事", 0.1),
        ("Hello there!", 0.05),
        ("好的，谢谢你", 0.05),
        ("My dog Biscuit is ill. What can I do?", 0.7),
        ("", 0.0),
    ],
)
def test_importance(text, value):
    """Guards: a question kept and the fact before it thrown away; the table of the docstring."""
    assert importance(text)[0] == value
    assert importance(text, "assistant")[0] == pytest.approx(value / 2)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("My name is Tom and I live in Paris.", {"name", "home"}),
        ("我搬到了柏林。", {"home"}),
        ("I'm now living in Oslo", {"home"}),
        ("My dog is called Biscuit.", {"my dog"}),
        ("My new phone number is 555.", {"my phone number"}),
        ("My favourite colour is green.", {"favourite colour"}),
        ("我最喜欢的颜色是绿色", {"favourite 颜色"}),
        ("我的车现在在修理厂", {"my 车"}),
        ("我今年三十四岁", {"age"}),
        ("I am 34 years old.", {"age"}),
        ("I am 5 minutes late", set()),
        ("Where do I live?", set()),
        ("The dog is called Rex.", set()),
        ("我觉得他是对的", set()),
    ],
)
def test_slots(text, expected):
    """Guards: a new address that does not replace the old one; a remark that replaces a fact."""
    assert slots(text) == expected


def test_topics_are_the_same_in_both_languages():
    """Guards: a question in one language that misses the fact told in the other."""
    assert "home" in topics("Where do I live?") and "home" in topics("我搬到了柏林。") and "home" not in topics("记住这件事")
    assert {"pets", "health"} <= set(topics("My dog is sick")) and {"pets", "health"} <= set(topics("我的狗生病了"))
    assert "volcanoes" in topics("Volcanoes are hot.")


def test_words_of_both_languages(search):  # noqa: F811
    """Guards: a Chinese query that finds nothing because a word was cut elsewhere; a plural that is another word."""
    assert {stem(word) for word in ("move", "moves", "moved", "moving")} == {"mov"} and stem("glass") == "glass" and stem("is") == "is"
    assert set(search_words("我的狗叫豆豆")) & set(search_words("这只狗多大")) == {"狗"}
    assert search_words("The of 的 了") == [] and search_words("12:30 ３.５") == ["12:30", "3.5"]
    assert sentences("One. Two!三。四？ 3.5 is a number\nlast") == ["One.", "Two!", "三。", "四？", "3.5 is a number", "last"]
    texts = {"你好": "zh", "hello": "en", "把 hello 翻译成中文": "zh", "Translate 你好 into English": "en", "": "en", "123": "en"}
    assert {text: language(text) for text in texts} == texts


def test_bm25_by_hand(search):  # noqa: F811
    """Guards: scores that depend on which library is installed."""
    rng = random.Random()
    documents = [[rng.choice("abcdefgh") for _ in range(rng.randint(0, 9))] for _ in range(12)] + [["z"]]
    query = ["a", "b", "b", "nowhere", "z"]
    average = sum(map(len, documents)) / len(documents)
    expected = []
    for document in documents:
        score = 0.0
        for word in query:
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (0.25 + 0.75 * len(document) / average)) if holding else 0.0
        expected.append(score)
    index = Bm25(documents)
    assert np.allclose(index.scores(query), expected, atol=1e-5)
    assert index.relevance(query).max() <= 1 and (index.relevance(["nowhere"]) == 0).all()
    assert len(Bm25([]).scores(["a"])) == 0 and Bm25([[], []]).scores(["a"]).tolist() == [0, 0]
    once = Bm25([["a", "b"], ["c", "d"]]).relevance(["a", "b"])
    assert once.tolist() == pytest.approx([1.0, 0.0])


def test_extractive_summary_keeps_what_matters():
    """Guards: key facts cut off by chatter; a summary longer than allowed."""
    texts = ["Hello!", "I am allergic to nuts. What a day.", "The sea is deep.", "What is the sea?", "我住在柏林。好的。"]
    assert key_facts(texts) == ["I am allergic to nuts.", "我住在柏林。"]
    assert extractive_summary(texts, 1000).splitlines() == ["I am allergic to nuts.", "The sea is deep.", "我住在柏林。"]
    assert extractive_summary(texts, 30).splitlines() == ["I am allergic to nuts.", "我住在柏林。"]
    assert extractive_summary(["ok", "Thanks!"], 100) == ""


@pytest.mark.parametrize("piece", ["对", "I ", "my a ", "see you", "1 ", "我很", "如果所有", "if all ", "(", "'s "])
def test_long_odd_texts_take_no_time(piece):
    """Guards: a pasted text on which a pattern runs for minutes."""
    from inference.intents import detect

    text = piece * (4000 // len(piece))
    started = time.process_time()
    importance(text), slots(text), topics(text), detect(text), detect("a" + text)
    assert time.process_time() - started < 5
