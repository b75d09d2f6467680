"""Sums: pairs, questions, steps in one regular form, answers, and one-step word problems.

Held-out pairs never reach a generated row. The table of one-digit facts (a + b with both below 10, a - b with a up to
18) is never held out, because the steps of two-digit sums are made of it. Symmetric pairs share their fate: a + b with
b + a, a × b with b × a, a - b with a - (a - b), and a pair to compare in either order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tools.curriculum.holdout import held_out

ADD, SUBTRACT, MULTIPLY, COMPARE = "+", "-", "×", "<>"
OPERATIONS = (ADD, SUBTRACT, MULTIPLY, COMPARE)
WEIGHTS = (0.40, 0.33, 0.17, 0.10)

QUESTIONS = {
    ("en", ADD): (
        "{a} + {b} = ?",
        "What is {a} + {b}?",
        "How much is {a} + {b}?",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "Please work out {a} + {b}.",
        "{a}+{b}=?",
        "How much is {a} plus {b}?",
    ),
    ("en", SUBTRACT): (
        "{a} - {b} = ?",
        "What is {a} - {b}?",
        "How much is {a} - {b}?",
        "What is {a} minus {b}?",
        "Take {b} away from {a}.",
        "Please work out {a} - {b}.",
        "{a}-{b}=?",
        "How much is {a} minus {b}?",
    ),
    ("en", MULTIPLY): (
        "{a} × {b} = ?",
        "What is {a} × {b}?",
        "How much is {a} × {b}?",
        "What is {a} times {b}?",
        "Please work out {a} × {b}.",
        "{a}×{b}=?",
        "How much is {a} times {b}?",
    ),
    ("en", COMPARE): (
        "Which is {more}, {a} or {b}?",
        "Which number is {more}, {a} or {b}?",
        "Tell me the {more} number: {a} or {b}.",
        "Look at {a} and {b}. Which is {more}?",
    ),
    ("zh", ADD): (
        "{a} + {b} = ?",
        "{a} + {b} 等于多少？",
        "{a}加{b}等于多少？",
        "{a}加{b}是多少？",
        "请算一算 {a} + {b}。",
        "{a}+{b}=？",
        "{a}+{b}等于几？",
    ),
    ("zh", SUBTRACT): (
        "{a} - {b} = ?",
        "{a} - {b} 等于多少？",
        "{a}减{b}等于多少？",
        "{a}减{b}是多少？",
        "请算一算 {a} - {b}。",
        "{a}-{b}=？",
        "{a}-{b}等于几？",
    ),
    ("zh", MULTIPLY): (
        "{a} × {b} = ?",
        "{a} × {b} 等于多少？",
        "{a}乘{b}等于多少？",
        "{a}乘{b}是多少？",
        "请算一算 {a} × {b}。",
        "{a}×{b}=？",
        "{a}×{b}等于几？",
    ),
    ("zh", COMPARE): (
        "{a} 和 {b} 哪个更{more}？",
        "{a}和{b}哪个数更{more}？",
        "告诉我更{more}的数：{a} 还是 {b}？",
        "看一看 {a} 和 {b}，哪个更{more}？",
    ),
}
RESERVED = {
    ("en", ADD): ("Put {a} and {b} together. How much do you get?", "I have {a} and I get {b} more. What number is it?"),
    ("en", SUBTRACT): ("Start with {a} and take off {b}. What number is it?", "How far is it from {b} up to {a}?"),
    ("en", MULTIPLY): ("What do {a} groups of {b} make?", "Count {b} again and again, {a} times. What number is it?"),
    ("en", COMPARE): ("{a} against {b}: which one is {more}?", "Here are two numbers, {a} and {b}. Find the {more} one."),
    ("zh", ADD): ("把 {a} 和 {b} 合起来是多少？", "先有 {a}，又来了 {b}，加在一起是几？"),
    ("zh", SUBTRACT): ("从 {a} 里拿走 {b}，是几？", "{a} 比 {b} 多多少？"),
    ("zh", MULTIPLY): ("{a} 个 {b} 合起来是多少？", "把 {b} 连着加 {a} 次，是几？"),
    ("zh", COMPARE): ("{a} 和 {b} 比一比，谁更{more}？", "这里有 {a} 和 {b} 两个数，找出更{more}的。"),
}
COMPARE_WORDS = {"en": {"big": "bigger", "small": "smaller"}, "zh": {"big": "大", "small": "小"}}
WORD_NUMBERS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "十"),
}

# (English plural, Chinese counting word and noun)
THINGS = (
    ("apples", "个苹果"),
    ("books", "本书"),
    ("flowers", "朵花"),
    ("eggs", "个鸡蛋"),
    ("pens", "支笔"),
    ("balls", "个球"),
    ("cups", "个杯子"),
    ("bananas", "根香蕉"),
    ("hats", "顶帽子"),
    ("stones", "块石头"),
)
PEOPLE = {"en": ("Tom", "Mia", "Ben", "Lily", "Sam", "Anna"), "zh": ("乐乐", "丽丽", "豆豆", "圆圆", "冬冬", "月月")}
# (operation, problem, answer): {n} and {m} are two people, {t} the things.
PROBLEMS = {
    "en": (
        (ADD, "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", "{n} has {r} {t} now."),
        (ADD, "There are {a} {t} in a box. {n} puts in {b} more. How many {t} are in the box?", "There are {r} {t} in the box."),
        (ADD, "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?", "They have {r} {t} together."),
        (SUBTRACT, "{n} has {a} {t}. {n} gives {b} to {m}. How many {t} does {n} have left?", "{n} has {r} {t} left."),
        (SUBTRACT, "There are {a} {t} in a box. {n} takes out {b}. How many {t} are left?", "There are {r} {t} left."),
        (MULTIPLY, "There are {a} boxes. Each box has {b} {t}. How many {t} are there?", "There are {r} {t}."),
        (MULTIPLY, "{a} children have {b} {t} each. How many {t} do they have together?", "They have {r} {t} together."),
    ),
    "zh": (
        (ADD, "{n}有 {a} {t}，{m}又给了{n} {b} {t}。{n}现在有多少{t}？", "{n}现在有 {r} {t}。"),
        (ADD, "盒子里有 {a} {t}，{n}又放进 {b} {t}。盒子里一共有多少{t}？", "盒子里一共有 {r} {t}。"),
        (ADD, "{n}有 {a} {t}，{m}有 {b} {t}。他们一共有多少{t}？", "他们一共有 {r} {t}。"),
        (SUBTRACT, "{n}有 {a} {t}，给了{m} {b} {t}。{n}还有多少{t}？", "{n}还有 {r} {t}。"),
        (SUBTRACT, "盒子里有 {a} {t}，{n}拿走了 {b} {t}。还有多少{t}？", "还有 {r} {t}。"),
        (MULTIPLY, "有 {a} 个盒子，每个盒子里有 {b} {t}。一共有多少{t}？", "一共有 {r} {t}。"),
        (MULTIPLY, "{a} 个孩子，每人有 {b} {t}。他们一共有多少{t}？", "他们一共有 {r} {t}。"),
    ),
}


def is_held_out(operation: str, a: int, b: int) -> bool:
    """True if the pair belongs to the probes. Raises ValueError for an unknown operation."""
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}; choose one of {', '.join(OPERATIONS)}")
    if operation == ADD and a < 10 and b < 10 or operation == SUBTRACT and a <= 18:
        return False
    if operation == MULTIPLY and min(a, b) < 2:
        return False
    if operation == SUBTRACT:
        return held_out(operation, a, *sorted((b, a - b)))
    return held_out(operation, *sorted((a, b)))


def pairs(operation: str) -> Iterator[tuple[int, int]]:
    """Every pair (a, b) of the operation's range."""
    if operation == MULTIPLY:
        yield from ((a, b) for a in range(1, 10) for b in range(1, 10))
    elif operation == COMPARE:
        yield from ((a, b) for a in range(10, 100) for b in range(10, 100) if a != b)
    else:
        yield from ((a, b) for a in range(100) for b in range(100) if operation == ADD or a >= b)


def held_out_sums() -> dict[str, list[tuple[int, int]]]:
    """The pairs that only the probes ask, by operation."""
    return {operation: [pair for pair in pairs(operation) if is_held_out(operation, *pair)] for operation in OPERATIONS}


def draw_pair(operation: str, rng: random.Random) -> tuple[int, int]:
    """A pair that may be taught; a third of additions and subtractions come from the one-digit table."""
    while True:
        if operation == MULTIPLY:
            pair = rng.randint(1, 9), rng.randint(1, 9)
        elif operation == COMPARE:
            pair = rng.randint(10, 99), rng.randint(10, 99)
            if rng.random() < 0.3:
                pair = pair[0], pair[0] // 10 * 10 + rng.randint(0, 9)
            if pair[0] == pair[1]:
                continue
        elif rng.random() < 0.33:
            b, c = rng.randint(0, 9), rng.randint(0, 9)
            pair = (b, c) if operation == ADD else (b + c, b)
        else:
            a, b = rng.randint(10, 99), rng.randint(1, 99)
            pair = (a, b) if operation == ADD and rng.random() < 0.5 else (max(a, b), min(a, b))
        if not is_held_out(operation, *pair):
            return pair


def result(operation: str, a: int, b: int, want: str = "big") -> int:
    """The number asked for; `want` ("big" or "small") matters for comparisons only."""
    if operation == COMPARE:
        return max(a, b) if want == "big" else min(a, b)
    return {ADD: a + b, SUBTRACT: a - b, MULTIPLY: a * b}[operation]


def steps(operation: str, a: int, b: int, lang: str, want: str = "big") -> str:
    """The working in one regular form: ones, carry or borrow, tens, answer."""
    en = lang == "en"
    comma, stop = (", ", ". ") if en else ("，", "。")
    ones, tens = ("Ones: ", "Tens: ") if en else ("个位：", "十位：")
    done = "The answer is " if en else "答案是 "
    total = result(operation, a, b, want)
    end = f"{done}{total}" + stop.strip()
    if operation == MULTIPLY:
        counted = comma.join(f"{i}: {i * b}" for i in range(1, a + 1))
        return f"{a} × {b}{stop}{counted}{stop}{end}"
    if operation == COMPARE:
        sign = "=" if a // 10 == b // 10 else "<" if a // 10 < b // 10 else ">"
        text = (f"Compare {a} and {b}. " if en else f"比较 {a} 和 {b}。") + f"{tens}{a // 10} {sign} {b // 10}{stop}"
        if sign == "=":
            text += f"{ones}{a % 10} {'<' if a % 10 < b % 10 else '>'} {b % 10}{stop}"
        return text + end
    start = f"{a} {operation} {b}"
    if operation == ADD and a < 10 and b < 10 or operation == SUBTRACT and a < 10:
        return f"{start} = {total}{stop}{end}"
    if operation == ADD:
        low = a % 10 + b % 10
        carry = low // 10
        first = f"{ones}{a % 10} + {b % 10} = {low}{comma}"
        first += f"write {low % 10}, carry {carry}" if en else f"写 {low % 10}，进 {carry}"
        second = f"{tens}{a // 10} + {b // 10} + {carry} = {a // 10 + b // 10 + carry}"
    else:
        borrow = int(a % 10 < b % 10)
        first = f"{ones}{a % 10 + 10 * borrow} - {b % 10} = {a % 10 + 10 * borrow - b % 10}{comma}" + (
            f"borrow {borrow}" if en else f"借 {borrow}"
        )
        second = f"{tens}{a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}"
    return f"{start}{stop}{first}{stop}{second}{stop}{end}"


def answer(operation: str, a: int, b: int, lang: str, want: str = "big") -> str:
    """The final sentence; its last integer is the result."""
    total = result(operation, a, b, want)
    if operation == COMPARE:
        word = COMPARE_WORDS[lang][want]
        return f"The {word} number is {total}." if lang == "en" else f"更{word}的数是 {total}。"
    return f"{a} {operation} {b} = {total}" + ("." if lang == "en" else "。")


def fill(template: str, a: int, b: int, lang: str, want: str = "big") -> str:
    """A question template with its numbers."""
    return template.format(a=a, b=b, more=COMPARE_WORDS[lang][want])


def exercise(lang: str, rng: random.Random) -> tuple[str, str, str]:
    """A taught sum as (question, steps, answer)."""
    operation = rng.choices(OPERATIONS, WEIGHTS)[0]
    a, b = draw_pair(operation, rng)
    want = rng.choice(("big", "small"))
    question = fill(rng.choice(QUESTIONS[lang, operation]), a, b, lang, want)
    return question, steps(operation, a, b, lang, want), answer(operation, a, b, lang, want)


def word_problem(lang: str, rng: random.Random) -> tuple[str, str, str]:
    """A one-step word problem as (question, steps, answer). Numbers are at least 2, so the plural always fits."""
    operation, problem, reply = rng.choice(PROBLEMS[lang])
    while True:
        most = (9, 9) if operation == MULTIPLY else (40, 30)
        a, b = rng.randint(2, most[0]), rng.randint(2, most[1])
        if result(operation, a, b) >= 2 and not is_held_out(operation, a, b):
            break
    n, m = rng.sample(PEOPLE[lang], 2)
    slots = {"n": n, "m": m, "t": rng.choice(THINGS)[0 if lang == "en" else 1], "a": a, "b": b, "r": result(operation, a, b)}
    return problem.format_map(slots), steps(operation, a, b, lang), reply.format_map(slots)


def prose(lang: str, rng: random.Random) -> str:
    """Two or three worked sums as a small text, or small sums in words."""
    if rng.random() < 0.2:
        words = WORD_NUMBERS[lang]
        lines = []
        for _ in range(4):
            a = rng.randint(0, 9)
            b = rng.randint(0, min(9, 10 - a))
            if lang == "en":
                lines.append(f"{words[a].capitalize()} plus {words[b]} is {words[a + b]}: {a} + {b} = {a + b}.")
            else:
                lines.append(f"{words[a]}加{words[b]}等于{words[a + b]}：{a} + {b} = {a + b}。")
        return (" " if lang == "en" else "").join(lines)
    lines = []
    for _ in range(rng.randint(2, 3)):
        question, working, reply = (word_problem if rng.random() < 0.15 else exercise)(lang, rng)
        lines.append(f"{question}\n{working}\n{reply}")
    return "\n\n".join(lines)
