"""The calculator: exact, bounded, and never a way to run code."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from inference.calculator import CalculatorError, calculate, check_steps, numbers_in, read_number


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
