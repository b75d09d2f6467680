"""A calculator for text that nobody has checked: exact, bounded in time and memory, without eval.

    calculate("(1 + 2) × 3.5")     # Fraction(21, 2)
    read_number("-1,200.50")       # Fraction(-2401, 2)
    check_steps("16 - 7 = 9, 3 * 4 = 13")   # [("16 - 7 = 9", True), ("3 * 4 = 13", False)]
    pending("Tom has 3 + 4 =")       # ("3 + 4", "7")

Numbers are fractions, so that 0.1 + 0.2 is 0.3. Known: + - * / × ÷ ^ ** ² ³ ( ) and the full-width forms, decimals, thousands commas,
percentages (50% is 1/2, so that 200 + 10% is 200.1).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 30
MAX_BITS = 1024
MAX_EXPONENT = 256
MAX_WRITTEN = 30  # characters of a result that is written into a text
DIGITS = 6  # of a result that has no end, such as 10 / 3
MAX_PLACES = 12  # of a decimal that is written out to its end

_WIDE = str.maketrans("＋－＊／×÷（）＝．％，−–・·０１２３４５６７８９", "+-*/*/()=.%,--**0123456789") | {ord("²"): "^2", ord("³"): "^3"}
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(rf"\s*(?:({_NUMBER})|(\*\*|[-+*/^()%]))")
_SIGNED = re.compile(rf"[-+]?(?:{_NUMBER})(?:\s*/\s*\d+)?\s*%?")
_ARITHMETIC = re.compile(r"[-+*/^()=.,%\d\s]+")
_BETWEEN = re.compile(r"\n|[.,]\s|(?<=[\d%)])\s+(?=[\d(])")  # two expressions in a row
_OPERATION = re.compile(r"[\d%)]\s*[-+*/^]")
_TIMES = re.compile(r"\\(?:times|cdot)(?![a-z])|(?<=[\d)%])(?<!\b0)\s*[xX]\s*(?=[\d(])")
_FRACTION = re.compile(r"(?<![\d./])\d+/\d+(?![\d./])")
_OPEN_END = re.compile(r"[-+*/^().,%\d \t]*\Z")
# A word that does something to the number after it, so that the expression does not begin there.
_OPERATOR_WORD = re.compile(
    r"(?:\\\w+|\b(?:[a-z]|times|plus|minus|over|by|of|twice|half|double|mod|sqrt|root|log|ln|sin|cos|tan|negative|than)|"
    "[零一二三四五六七八九十百千万亿两加减乘除倍方根负的比]|[乘除]以)$",
    re.IGNORECASE,
)


class CalculatorError(ValueError):
    """What was given is no expression, or one too large to work out; the message says which."""


def calculate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression. Raises CalculatorError, also for a division by zero."""
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"the expression has {len(expression)} characters, at most {MAX_CHARACTERS} are worked out")
    return _Parser(expression.translate(_WIDE)).value()


def read_number(text: str) -> Fraction | None:
    """The number that a text consists of: 42, -1,200.5, 3/4, 12.5%, also with a currency sign; None when it is something else."""
    text = text.translate(_WIDE).strip().strip("$¥￥€£").strip().rstrip(".。").strip()
    if len(text) > MAX_CHARACTERS or not _SIGNED.fullmatch(text):
        return None
    try:
        return calculate(text)
    except CalculatorError:
        return None


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a text in their order; a minus counts as a sign only where no number or word stands directly before it."""
    found = re.finditer(rf"(?:(?<![\w)%])-\s?)?(?:{_NUMBER})(?:/\d+)?%?", _running(text))
    values = (read_number(match.group().replace(" ", "")) for match in found)
    return [value for value in values if value is not None]


def check_steps(text: str) -> list[tuple[str, bool]]:
    """The equations of a text whose sides are all numbers, and whether each holds; at least one side has an operation.

    In a = b = c every neighbouring pair is one. A side with decimals may be rounded to them: 10 / 3 = 3.33 holds.
    """
    found: list[tuple[str, bool]] = []
    for match in _ARITHMETIC.finditer(re.sub("[$¥￥€£]", "", _running(text))):
        sides = [side.strip(" \t\r\n.,") for side in match.group().split("=")]
        for left, right in zip(sides, sides[1:], strict=False):
            # What stood before the expression (the end of a sentence, the number of a list) is not part of it.
            left, right = _BETWEEN.split(left)[-1].strip(), _BETWEEN.split(right)[0].strip()
            if not (_OPERATION.search(left) or _OPERATION.search(right)):
                continue
            try:
                values = calculate(left), calculate(right)
            except CalculatorError:
                continue
            found.append((f"{left} = {right}", _agree(*values, left, right)))
    return found


def pending(text: str) -> tuple[str, str] | None:
    """The expression behind which a text breaks off with an equals sign, and its value written to fit: ("3 + 4", "7") of "so 3 + 4 =".

    None when it ends in something else, or in what may be only a part of the expression that is meant (x + 3 + 4 =, f(2) + 1 =).
    """
    body = _running(text[-2 * MAX_CHARACTERS :]).rstrip(" \t")
    if not body.endswith("="):
        return None
    body = body[:-1]
    run = _OPEN_END.search(body)
    assert run is not None  # it also matches nothing
    before, parts = body[: run.start()], re.split(r"[.,]\s", run.group())
    expression = parts[-1].strip()
    if not _OPERATION.search(expression) or expression[0] in "+*/^%)":
        return None
    if len(parts) == 1 and not _may_begin(expression, before, adjacent=not run.group()[0].isspace()):
        return None
    if not before and len(text) > 2 * MAX_CHARACTERS:
        return None
    try:
        written = write_number(calculate(expression), expression)
    except CalculatorError:
        return None
    return (expression, written) if len(written) <= MAX_WRITTEN else None


def write_number(value: Fraction, like: str = "", most_places: int = MAX_PLACES) -> str:
    """A number as people write it: whole numbers and decimals to their end, else DIGITS digits. `like` is the expression that it is the
    value of: fractions (1/2 + 1/3) give a fraction, numbers with thousands commas such a number."""
    comma = "," if re.search(r"\d,\d", like) else ""
    if value.denominator == 1:
        return f"{value.numerator:{comma}}"
    rest = _FRACTION.sub("1", like)
    if rest != like and _OPERATION.search(rest) and "." not in like:
        return f"{value.numerator}/{value.denominator}"
    places = next((count for count in range(1, most_places + 1) if 10**count % value.denominator == 0), None)
    if places is None:
        places, size = DIGITS, abs(value)
        while size >= 1 and places > 0:
            size, places = size / 10, places - 1
        while size * 10 < 1:
            size, places = size * 10, places + 1
    scaled = round(abs(value) * 10**places)
    whole, rest = divmod(scaled, 10**places)
    return "-" * (value < 0) + f"{whole:{comma}}" + (f".{rest:0{places}d}" if places else "")


def _running(text: str) -> str:
    """Text in which expressions stand between words, in plain characters. A Chinese comma ends one there."""
    return _TIMES.sub("*", text.replace("，", "\n").translate(_WIDE).replace("\\div", "/"))


def _may_begin(expression: str, before: str, adjacent: bool) -> bool:
    """Whether what stands before an expression, with or without a space between, is no part of it."""
    word = before.rstrip()
    if not word or before[-1] == "\n":
        return True
    last = word[-1]
    if expression[0] == "-" and (last.isalnum() or last in "_)]}!"):
        return False
    if last in "=<>≈→⇒" or unicodedata.category(last).startswith("P"):
        return last not in ")]}!" or not adjacent
    chinese = "\u4e00" <= last <= "\u9fff"
    return (chinese or (last.isalnum() and not adjacent)) and not _OPERATOR_WORD.search(word[-12:])


def _agree(left: Fraction, right: Fraction, left_text: str, right_text: str) -> bool:
    for text in (left_text, right_text):
        if read_number(text) is not None and "." in text:
            places = len(re.sub(r"\D", "", text.split(".")[1]))
            unit = Fraction(1, 10**places) / (100 if "%" in text else 1)
            if abs(left - right) <= unit / 2:
                return True
    return left == right


class _Parser:
    """Recursive descent: sum -> product -> sign -> power -> number, percent or parentheses."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise CalculatorError(f"cannot read {text[at : at + 10]!r} in an expression")
            self.tokens.append(match.group(1) or match.group(2))
            at = match.end()
        self.at = self.depth = 0

    def value(self) -> Fraction:
        result = self._sum()
        if self.at < len(self.tokens):
            raise CalculatorError(f"unexpected {self.tokens[self.at]!r} in an expression")
        return result

    def _next(self, *wanted: str) -> str | None:
        """Take the next token if it is one of these."""
        if self.at < len(self.tokens) and self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def _sum(self) -> Fraction:
        total = self._product()
        while sign := self._next("+", "-"):
            part = self._product()
            total = _bounded(total + part if sign == "+" else total - part)
        return total

    def _product(self) -> Fraction:
        total = self._signed()
        while sign := self._next("*", "/"):
            part = self._signed()
            if sign == "/" and part == 0:
                raise CalculatorError("division by zero")
            total = _bounded(total * part if sign == "*" else total / part)
        return total

    def _signed(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise CalculatorError(f"an expression is nested deeper than {MAX_DEPTH}")
        sign = self._next("+", "-")
        value = (-self._signed() if sign == "-" else self._signed()) if sign else self._power()
        self.depth -= 1
        return value

    def _power(self) -> Fraction:
        base = self._single()
        if not self._next("^", "**"):
            return base
        exponent = self._signed()
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise CalculatorError(f"an exponent must be a whole number of at most {MAX_EXPONENT}")
        if base == 0 and exponent < 0:
            raise CalculatorError("division by zero")
        if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
            raise CalculatorError("a number is too large")
        return base ** int(exponent)

    def _single(self) -> Fraction:
        if self._next("("):
            value = self._sum()
            if not self._next(")"):
                raise CalculatorError("a parenthesis is not closed")
        elif self.at < len(self.tokens) and (self.tokens[self.at][0].isdigit() or self.tokens[self.at][0] == "."):
            value = _bounded(Fraction(self.tokens[self.at].replace(",", "")))
            self.at += 1
        else:
            raise CalculatorError("a number is missing in an expression")
        return value / 100 if self._next("%") else value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("a number is too large")
    return value
