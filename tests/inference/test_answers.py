"""The result that a reply ends in, and when two results are the same."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from inference.answers import answer_key, checkable, final_answer, same_answer


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("So \\boxed{3/4}.", "3/4"),
        ("<answer> B </answer>", "B"),
        ("The answer is 12. It was 10 before.", "12"),
        ("37 + 45. 答案是 82。", "82"),
        ("The answer is: 12.", "12"),
        ("The answer is **12**.", "12"),
        ("**Answer:** $12", "12"),
        ("The answer is:\n12 apples", "12 apples"),
        ("答案是：5", "5"),
        ("答案：5。", "5"),
        ("最后的答案 **5**", "5"),
        ("#### 12 apples", "12 apples"),
        ("18 + 33 = 51.", "51"),
        ("yes", "yes"),
        ("so x is \\boxed{\\frac{1}{2}}.", "1/2"),
        ("it is \\boxed{\\text{(B)}}", "(B)"),
        ("The correct option is **B**.", "B"),
        ("因为二是偶数，故选B。", "B"),
        ("正确选项是 C。", "C"),
        ("所以选 D", "D"),
        ("The answer is 3 + 4 = 7.", "7"),
        ("so \\boxed{x = \\frac{1}{2}}", "1/2"),
        ("答案是7，因为3+4=7，而不是8。", "7"),
        ("The answer is 12, since 3 times 4 is 12.", "12"),
        ("The answer is 12 because 3 * 4 = 12.", "12"),
        ("The answer is 1,200, I think.", "1,200"),
        ("The answer is 8, 9 and 10.", "8, 9 and 10"),
        ("The answer is Paris, France.", "Paris, France"),
        ("今天我们应选择好的路。走了很久很久。", None),
        ("7 + 5 = 12，12 + 4 = 16", "16"),
        ("I do not know what that is supposed to mean.", None),
        ("", None),
    ],
)
def test_final_answer(text: str, result: str | None) -> None:
    """Guards against comparing the wrong number of an answer, or a whole sentence."""
    assert final_answer(text) == result


def test_what_can_be_checked() -> None:
    """Guards against remarks of everyday talk being taken for results, and results of a word being left out."""
    assert all(checkable(text) for text in ("B", "yes.", "Paris", "18 + 33 = 51。", "So it is C. The answer is C.", "#### 7"))
    assert not any(checkable(text) for text in ("你好！", "Bye!", "", "It is a cat that sleeps all day."))


def test_same_answer() -> None:
    """Guards against 0.50 counting as wrong where 1/2 is asked, and 8 as right where 80 is."""
    assert same_answer("1/2", "0.50") and same_answer("1200", "$1,200") and same_answer("8", "8 apples") and same_answer("Yes", "yes!")
    assert not same_answer("8", "80") and not same_answer("8", "8 or 9") and not same_answer("A", "B") and not same_answer("8", "eight")


def test_equal_results_have_one_key() -> None:
    """Guards the vote: numbers by their value in any form, with or without a unit; choices by their letter; words bare."""
    for same in (("0.5", "1/2", "50%", "０．５"), ("8", "8 apples", "8个苹果", "$8", "8.0"), ("B", "(b)", "B. Paris", "b)", "B、北京")):
        assert len({answer_key(text) for text in same}) == 1, same
    different = ["8", "80", "-8", "1/8", "B", "C", "8 or 9", "A cat", "a", "乐乐", "贝贝", "e.g. this", "A2", "2 km"]
    assert len({answer_key(text) for text in different}) == len(different)
    assert answer_key("1,200") == Fraction(1200) and not same_answer("12", "1 2")


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "<answer>", "answer: ", "\\frac{", "1,", "((", "#### ", "- ", "\\boxed{{x}", "the answer is "]
)
def test_long_replies_take_no_time(piece: str) -> None:
    """Guards patterns that take quadratic time or worse on a reply that repeats itself."""
    started = time.process_time()
    answer_key(final_answer(piece * (200_000 // len(piece))) or "")
    assert time.process_time() - started < 2
