"""The result that a reply ends in, and when two results are the same: for votes, rewards and measurements.

final_answer("3 + 4 = 7. 答案是 7。")    # "7"
same_answer("1/2", "50%")               # True
answer_key("(B) Paris")                 # "b"
"""

from __future__ import annotations

import re
from fractions import Fraction

from inference.calculator import numbers_in, read_number

LONGEST_WORD_ANSWER = 12  # characters of an answer that counts as a result as it stands: B, yes, no, 北京
LONGEST_READ = 4_000  # characters of a text's end that are looked at

_MARKED = (
    re.compile(r"####\s*(.+)"),
    re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"),
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
    re.compile(
        r"(?:the (?:final |correct |right |best )?(?:answer|option|choice) is|answer(?=\s*[:：*])|答案(?:是|为|选|(?=\s*[:：*]))|"
        r"选项?(?:是|为|：|:)?(?=\s*[A-H](?![A-Za-z])))[\s:：*$]*(.+?)(?=\.\s|\.?$|[。!！?？])",
        re.IGNORECASE | re.MULTILINE,
    ),
)
_REASON = re.compile(r"[,，;；]\s*(?![\s\d])|\s(?:because|since|as)\b|因为|所以", re.IGNORECASE)  # what follows is no part of a result
_SPOKEN = re.compile("[。！？，；!?,;~…]")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")
_NAMED = re.compile(r"[A-Za-z_]\d")  # A2 is a name, 2 km a number
_CHOICE = re.compile(r"\(?([A-Ha-h])(?:[)）．：、]|[.:](?![A-Za-z\d]))")


def final_answer(text: str) -> str | None:
    """The result that a text ends in: behind `####`, in `\\boxed{}` or `<answer>`, after "the answer is" or "答案是", a text of a word
    or two as it stands, else its last number; None when there is nothing of this."""
    text = text[-LONGEST_READ:]
    marked = _marked(text)
    if marked is not None:
        return marked
    plain = text.strip().rstrip(".。!！")
    if plain and len(plain) <= LONGEST_WORD_ANSWER and "=" not in plain:
        return plain
    numbers = numbers_in(text)
    return str(numbers[-1]) if numbers else None


def _marked(text: str) -> str | None:
    for pattern in _MARKED:
        found = pattern.findall(text)
        if found and found[-1].strip():
            return _value(_plain(found[-1])).strip().rstrip(".。") or None
    return None


def _value(result: str) -> str:
    """The number that a marked result comes to: 7 of "7, because it is 3 + 4", "3 + 4 = 7" and "x = 7"; without one, all of it."""
    first = _REASON.split(result)[0]
    if not numbers_in(first):
        return result
    return first.rpartition("=")[2] if numbers_in(first.rpartition("=")[2]) else first


def _plain(text: str) -> str:
    """A result without the writing of formulas and of Markdown."""
    text = _TEXT.sub(r"\1", _FRACTION.sub(r"\1/\2", text))
    return text.replace("\\%", "%").replace("\\,", "").replace("**", "").strip().strip("$").removeprefix("\\(").removesuffix("\\)")


def checkable(reference: str) -> bool:
    """Whether a reference has a result to compare with: a short remark such as "你好！" is none, although B and yes are."""
    result = final_answer(reference)
    return result is not None and (_marked(reference) is not None or read_number(result) is not None or not _SPOKEN.search(reference))


def answer_key(result: str) -> Fraction | str:
    """What equal results share: the exact value of a number, alone or with a unit (0.5, 1/2 and 50% are one, as are 8 and "8 apples"),
    the letter of a choice ("B", "(b)" and "B. Paris"), else the words without case and punctuation."""
    value = read_number(result)
    if value is not None:
        return value
    choice = _CHOICE.match(result.strip())
    if choice:
        return choice.group(1).casefold()
    numbers = numbers_in(result)
    alone = len(numbers) == 1 and not _NAMED.search(result)
    return numbers[0] if alone else re.sub(r"[\W_]+", "", result).casefold()


def same_answer(reference: str, given: str) -> bool:
    """Whether two results agree; see `answer_key`."""
    return answer_key(reference) == answer_key(given)
