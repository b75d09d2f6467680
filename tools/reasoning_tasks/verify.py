"""A second way to the answers: it reads the words of a question, knows nothing of how it was made, and solves it.

Every row of a data set goes through `check_row` before it is written.
"""

from __future__ import annotations

import re

from tools.reasoning_tasks.wordings import COLOURS, COMPARISONS, LAMP

_ADD = ("+", "plus", "add", "加", "加上", "gets", "finds", "得到", "找到")
_CHANGE = re.compile(r"(\+|-|plus|minus|add|take away|加上?|减去?|gets|finds|gives away|loses|得到|找到|送出|丢了) ?(\d+)")
_DEFINITION = re.compile(r"\b([a-z]) = ([a-z]|\d+)(?: ([+-]) ([a-z]|\d+))?\b", re.ASCII)
_FORMULA = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
_FACT = re.compile(r"(\w+) is (\w+) than (\w+)|(\w\w)比(\w\w)(\w)")
_COLOUR = "|".join((*COLOURS["en"], *COLOURS["zh"]))
_WANTED = re.compile(rf"(?:How many are|How many|Count the|数一数|有几个) ?({_COLOUR})|({_COLOUR})的有几个")
_LAMP_WORD = re.compile("|".join((*LAMP["en"], *LAMP["zh"])))


def solve(kind: str, question: str) -> tuple[str, list[str]]:
    """Answer and results of the steps, from the words alone; of an order, the steps are the pairs "more > less" that are told.

    Raises ValueError for a question that it cannot read.
    """
    try:
        return _SOLVERS[kind](question)
    except (LookupError, AttributeError) as error:
        raise ValueError(f"cannot read this question of the kind {kind}: {question!r}") from error


def check_row(kind: str, question: str, answer: str, working: str | None) -> None:
    """Raises AssertionError unless the answer follows from the question, and each step from the ones before."""
    found, results = solve(kind, question)
    assert found == answer, f"{question!r}: {answer!r} is given, {found!r} is right"
    if working is None:
        return
    lines = re.split(r"\. |。", working)
    if kind == "order":
        chain = [line.replace(" ", "") for line in lines]
        told = [pair if ">" in chain[0] else "<".join(reversed(pair.split(">"))) for pair in results]
        assert sorted(chain) == sorted(told), f"{question!r}: {working!r} uses what is not told"
        sign = ">" if ">" in chain[0] else "<"
        assert all(a.split(sign)[1] == b.split(sign)[0] for a, b in zip(chain, chain[1:], strict=False)), f"{working!r} is no chain"
        assert chain[-1].split(sign)[1] == answer, f"{working!r} does not end with {answer!r}"
        return
    for left, sign, right, result in _FORMULA.findall(working):
        assert int(result) == int(left) + (int(right) if sign == "+" else -int(right)), (
            f"{working!r}: {left} {sign} {right} is not {result}"
        )
    assert [line.split(" ")[-1] for line in lines] == results, f"{question!r}: {working!r} does not follow, expected {results}"


def _solve_sum(question: str) -> tuple[str, list[str]]:
    total = int(re.search(r"\d+", question).group())  # type: ignore[union-attr]
    results = []
    for word, number in _CHANGE.findall(question):
        total += int(number) if word in _ADD else -int(number)
        results.append(str(total))
    return results[-1], results


def _solve_chain(question: str) -> tuple[str, list[str]]:
    values: dict[str, int] = {}
    for name, left, sign, right in _DEFINITION.findall(question):
        first, second = (values[word] if word in values else int(word or 0) for word in (left, right))
        values[name] = first + (second if sign == "+" else -second)
    asked = re.findall(r"\b[a-z]\b", question, re.ASCII)[-1]
    return str(values[asked]), [str(value) for value in list(values.values())[1:]]


def _solve_order(question: str) -> tuple[str, list[str]]:
    comparisons = [row for rows in COMPARISONS.values() for row in rows]
    more, most = {row[0] for row in comparisons}, [row[2] for row in comparisons]
    pairs = []
    for found in _FACT.findall(question):
        first, word, second = found[:3] if found[0] else (found[3], found[5], found[4])
        pairs.append((first, second) if word in more else (second, first))
    side = 0 if any(word in question for word in most) else 1
    ends = {pair[side] for pair in pairs} - {pair[1 - side] for pair in pairs}
    return ends.pop() if len(ends) == 1 else "", [f"{a}>{b}" for a, b in pairs]


def _solve_parity(question: str) -> tuple[str, list[str]]:
    # 开关 is a switch, and neither of its halves says how the lamp is.
    start = _LAMP_WORD.search(question.replace("开关", "")).group()  # type: ignore[union-attr]
    words = LAMP["en"] if start in LAMP["en"] else LAMP["zh"]
    state, results = words.index(start), []
    for presses in re.findall(r"\d+", question):
        state ^= int(presses) % 2
        results.append(words[state])
    return results[-1], results


def _solve_counting(question: str) -> tuple[str, list[str]]:
    found = _WANTED.search(question)
    wanted = found.group(1) or found.group(2)  # type: ignore[union-attr]
    assert found is not None
    items = re.findall(_COLOUR, question[: found.start()] + question[found.end() :])
    results = [str(items[: i + 1].count(wanted)) for i in range(len(items))]
    return results[-1], results


_SOLVERS = {
    "sums": _solve_sum,
    "stories": _solve_sum,
    "variables": _solve_chain,
    "order": _solve_order,
    "parity": _solve_parity,
    "counting": _solve_counting,
}
