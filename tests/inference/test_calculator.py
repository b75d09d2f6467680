"""The calculator: exact, bounded, and never a way to run code."""

from __future__ import annotations

import operator
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.calculator import (
    MAX_BITS,
    MAX_CHARACTERS,
    MAX_DEPTH,
    CalculatorError,
    calculate,
    check_steps,
    numbers_in,
    pending,
    read_number,
    write_number,
)

OPERATIONS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv), "**": (4, operator.pow)}
Tree = int | Fraction | tuple  # a number, ("-", tree) or (sign, tree, tree)


def trees(numbers: st.SearchStrategy) -> st.SearchStrategy:
    def grow(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(
            st.tuples(st.sampled_from("+-*/"), inner, inner),
            st.tuples(st.just("**"), inner, st.integers(0, 4)),
            st.tuples(st.just("neg"), inner),
        )

    return st.recursive(numbers, grow, max_leaves=8)


def value_of(tree: Tree, found: list[Fraction]) -> Fraction:
    """By Python's own arithmetic, with everything on the way. Raises ZeroDivisionError."""
    if not isinstance(tree, tuple):
        found.append(Fraction(tree))
    elif tree[0] == "neg":
        found.append(-value_of(tree[1], found))
    else:
        found.append(Fraction(OPERATIONS[tree[0]][1](value_of(tree[1], found), value_of(tree[2], found))))
    return found[-1]


def written(tree: Tree, above: int = 0) -> str:
    """With no more parentheses than Python's precedence needs; equal ranks are bracketed on the right, of powers on the left."""
    if not isinstance(tree, tuple):
        return str(tree) if isinstance(tree, int) else f"{float(tree)}"
    if tree[0] == "neg":
        text, rank = "-" + written(tree[1], 3), 3
    else:
        rank = OPERATIONS[tree[0]][0]
        left, right = (rank + 1, rank) if tree[0] == "**" else (rank, rank + 1)
        text = f"{written(tree[1], left)} {tree[0]} {written(tree[2], right)}"
    return f"({text})" if rank < above else text


@settings(max_examples=150, deadline=None)
@given(trees(st.one_of(st.integers(0, 999), st.sampled_from([Fraction(1, 4), Fraction(5, 2), Fraction(125, 8)]))))
def test_any_expression_agrees_with_python(tree: Tree) -> None:
    """Guards precedence without parentheses, signs before powers, right-to-left powers: whatever is worked out is exact."""
    text, on_the_way = written(tree), []
    try:
        expected = value_of(tree, on_the_way)
    except ZeroDivisionError:
        with pytest.raises(CalculatorError):
            calculate(text)
        return
    try:
        assert calculate(text) == expected, text
    except CalculatorError:  # too long, too deep or too large, and only then
        bits = max(max(value.numerator.bit_length(), value.denominator.bit_length()) for value in on_the_way)
        assert len(text) > MAX_CHARACTERS or text.count("(") + text.count("-") > MAX_DEPTH // 3 or bits > MAX_BITS // 2, text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=300), st.text("0123456789+-*/^().,%= ×÷", max_size=300)))
def test_any_text_is_harmless(text: str) -> None:
    """Guards against a text that raises something else, or takes long."""
    started = time.process_time()
    try:
        assert isinstance(calculate(text), Fraction)
    except CalculatorError:
        pass
    check_steps(text), numbers_in(text), read_number(text), pending(text + "=")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "text", ["9**9**9", "9^9^9^9^9", "(" * 10_000, "1+" * 10_000 + "1", "9" * 100_000, "((((2^99)^99)^99)^99)", "-" * 199 + "1"]
)
def test_hostile_expressions_end_at_once(text: str) -> None:
    """Guards against an expression that fills the memory, overflows the stack or takes for ever."""
    started = time.process_time()
    with pytest.raises(CalculatorError):
        calculate(text)
    assert pending(text + " =") is None and check_steps(text + "=1") == []
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 3 + 4 =", ("3 + 4", "7")),
        ("所以3+4=", ("3+4", "7")),
        ("x = 2 + 7 = ", ("2 + 7", "9")),
        ("5 - 5 = 0。0 + 1 =", ("0 + 1", "1")),
        ("7 + 5 = 12，12 × 3 ＝", ("12 * 3", "36")),
        ("1. 3 - 8 =", ("3 - 8", "-5")),
        ("2 \\times 3 + 4 =", ("2 * 3 + 4", "10")),
        ("10 / 4 =", ("10 / 4", "2.5")),
        ("10 / 3 =", ("10 / 3", "3.33333")),
        ("1/2 + 1/3 =", ("1/2 + 1/3", "5/6")),
        ("1,200 + 300 =", ("1,200 + 300", "1,500")),
        ("50% * 8 =", ("50% * 8", "4")),
        ("3² + 4² =", ("3^2 + 4^2", "25")),
    ],
)
def test_pending_expression(text: str, found: tuple[str, str]) -> None:
    """Guards what the calculator writes behind an equals sign, in both languages and in the form of the numbers."""
    assert pending(text) == found


@pytest.mark.parametrize(
    "text",
    ["", "=", "4 =", "3 + 4", "3 + 4 = 7", "x + 3 + 4 =", "x - 3 + 4 =", "2x + 3 =", "f(2) + 3 =", "√16 + 3 =", "n! + 3 + 4 =", "负3 + 4 ="]
    + [
        "3 times 4 + 5 =",
        "a 3 + 4 =",
        "(3 + 4 =",
        "3 + 4) * 2 =",
        "3 apples + 4 =",
        "$3 + $4 =",
        "7 / 0 =",
        "9^200 =",
        "3 + 4 ==",
        "3 + 4 >=",
    ]
    + ["3 + 4\n=", "1 2 + 3 =", "2 (3 + 4) =", "0 * " + "1" * 600 + " + 1 =", "1 + " * 300 + "1 ="],
)
def test_what_is_not_pending(text: str) -> None:
    """Guards against working out a part of what is meant: better no help than a wrong number."""
    assert pending(text) is None


@settings(max_examples=200, deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_numbers_are_written_as_they_are(value: Fraction) -> None:
    """Guards the writing of results: exact when it can be, else right to six digits, never in scientific notation."""
    read = read_number(write_number(value))
    assert read is not None and abs(read - value) <= abs(value) * Fraction(1, 10**5)
    assert read == value or 10**12 % value.denominator != 0


def random_expression(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """An expression and its value, worked out from the way it was made."""
    if depth == 0 or rng.random() < 0.2:
        kind = rng.randrange(4)
        number = rng.randint(0, 99999)
        if kind == 0:
            return f"{number:,}", Fraction(number)
        if kind == 1:
            return f"{number}.25", Fraction(number) + Fraction(1, 4)
        if kind == 2:
            return f"{number}%", Fraction(number, 100)
        return f"(-{number})", Fraction(-number)
    (left, a), (right, b) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    sign = rng.choice("+-−*×/÷")
    if sign in "/÷" and b == 0:
        sign = "+"
    value = {"+": a + b, "-": a - b, "−": a - b, "*": a * b, "×": a * b}[sign] if sign not in "/÷" else a / b
    return f"({left} {sign} {right})", value


def test_random_expressions() -> None:
    """Guards precedence by parentheses, number forms and exactness, against values worked out while the text was made."""
    rng = random.Random()
    for _ in range(200):
        text, value = random_expression(rng, 3)
        if len(text) <= 200:
            assert calculate(text) == value, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", Fraction(7)),
        ("10 - 4 - 3", Fraction(3)),
        ("-3^2", Fraction(-9)),
        ("2^3^2", Fraction(512)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("１２＋３×（４－１）", Fraction(21)),
        ("50% * 8", Fraction(4)),
        ("2**-2", Fraction(1, 4)),
    ],
)
def test_precedence(text: str, value: Fraction) -> None:
    """Guards the order of operations, right-to-left powers, and the full-width forms of Chinese text."""
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "(1",
        "1)",
        "1 2",
        "a",
        "__import__('os')",
        "1/0",
        "0^-1",
        "2^0.5",
        "9^9^9^9",
        "9**99999999",
        "1" * 201,
        "(" * 90 + "1" + ")" * 90,
    ]
    + ["-" * 150 + "1", "9^256*9^256*9^256*9^256"],
)
def test_what_is_refused(text: str) -> None:
    """Guards against code, garbage, and expressions that would take the machine's time or memory."""
    with pytest.raises(CalculatorError):
        calculate(text)


def test_read_number() -> None:
    """Guards against taking words, or several numbers, for a number."""
    assert read_number("$1,200.50") == Fraction(2401, 2)
    assert read_number("3/4") == read_number("75%") == read_number(" 0.75. ") == Fraction(3, 4)
    assert [read_number(text) for text in ("abc", "1 2", "", "3/0", "12 apples", "1,2")] == [None] * 6


def test_numbers_in_text() -> None:
    """Guards against reading the minus of 18-7 as a sign, and against losing a real one."""
    assert numbers_in("18-7 is -11 and 1,200 is 50% of 2,400.") == [18, 7, -11, 1200, Fraction(1, 2), 2400]


def test_steps_of_a_solution() -> None:
    """Guards the equations of running text: notes in brackets, chains, money, rounding, units, other lines."""
    text = "Ones: 7 + 5 = 12, write 2. He pays 12*3=<<12*3=36>>36 dollars, $5 + $3 = $9.\n10/3 = 3.33; 2+2=4=1*4.\n1. 2+3=6\nx = 5. 1 = 1"
    assert check_steps(text) == [
        ("7 + 5 = 12", True),
        ("12*3 = 36", True),
        ("5 + 3 = 9", False),
        ("10/3 = 3.33", True),
        ("2+2 = 4", True),
        ("4 = 1*4", True),
        ("2+3 = 6", False),
    ]


def test_steps_take_linear_time() -> None:
    """Guards against a reply of thousands of digits holding up the training."""
    assert check_steps("1" * 200_000 + " + " * 50_000) == []
