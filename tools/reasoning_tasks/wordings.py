"""Problems in words: questions, answers and worked steps in Chinese and English.

Every kind has wordings that are trained and wordings that are held out. Those held out put familiar words together in a new way: what
is asked of a model is to understand a sentence that it has not seen, and not words that it has not seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.curriculum import arithmetic
from tools.reasoning_tasks.problems import Chain, Order, Parity, Problem, Sum

LANGUAGES = ("zh", "en")
NAMES = {
    "en": (*arithmetic.PEOPLE["en"], "Max", "Amy", "Leo", "Eva"),
    "zh": (*arithmetic.PEOPLE["zh"], "明明", "红红", "天天", "贝贝"),
}
COLOURS = {"en": ("red", "blue", "green", "black"), "zh": ("红", "蓝", "绿", "黑")}
LAMP = {"en": ("off", "on"), "zh": ("关", "开")}
PARITY = {"en": ("even", "odd"), "zh": ("双", "单")}
# How a step of a sum is written.
CHANGES = {
    "en": {
        "sign": {"+": " + {n}", "-": " - {n}"},
        "word": {"+": " plus {n}", "-": " minus {n}"},
        "verb": {"+": ", add {n}", "-": ", take away {n}"},
    },
    "zh": {
        "sign": {"+": " + {n}", "-": " - {n}"},
        "word": {"+": "加{n}", "-": "减{n}"},
        "verb": {"+": "，再加上 {n}", "-": "，再减去 {n}"},
    },
}
# What happens in a story: {p} a person.
EVENTS = {
    "en": {"+": (" {p} gets {n} more.", " {p} finds {n} more."), "-": (" {p} gives away {n}.", " {p} loses {n}.")},
    "zh": {"+": ("{p}又得到 {n} {m}。", "{p}又找到 {n} {m}。"), "-": ("{p}送出 {n} {m}。", "{p}丢了 {n} {m}。")},
}
# (more, less, most, least)
COMPARISONS = {
    "en": (("taller", "shorter", "tallest", "shortest"), ("older", "younger", "oldest", "youngest"),
           ("faster", "slower", "fastest", "slowest")),
    "zh": (("高", "矮", "最高", "最矮"), ("大", "小", "最大", "最小"), ("快", "慢", "最快", "最慢")),
}  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """A way to put a question: `frame` with its slots, and how the list in it is written."""

    frame: str
    style: str = ""
    held_out: bool = False


def _wordings(trained: tuple[tuple[str, str], ...], held_out: tuple[tuple[str, str], ...]) -> tuple[Wording, ...]:
    return tuple(Wording(*pair) for pair in trained) + tuple(Wording(*pair, held_out=True) for pair in held_out)


WORDINGS: dict[tuple[str, str], tuple[Wording, ...]] = {
    ("sums", "en"): _wordings(
        (("What is {a}{steps}?", "sign"), ("Compute {a}{steps}.", "sign"), ("How much is {a}{steps}?", "word"),
         ("Start with {a}{steps}. What do you get?", "verb")),
        (("Start with {a}{steps}. How much is it?", "word"), ("How much is {a}{steps}?", "sign")),
    ),
    ("sums", "zh"): _wordings(
        (("{a}{steps} 等于多少？", "sign"), ("请算一算 {a}{steps}。", "sign"), ("{a}{steps}是多少？", "word"),
         ("从 {a} 开始{steps}，得多少？", "verb")),
        (("请算一算 {a}{steps}。", "word"), ("从 {a} 开始{steps}，是多少？", "verb")),
    ),
    ("variables", "en"): _wordings(
        (("{lines}. What is {x}?", ", "), ("{lines}. {x} = ?", "; "), ("Let {lines}. What is {x}?", ", "),
         ("Let {lines}. Find {x}.", "; ")),
        (("{lines}. Find {x}.", ", "), ("Let {lines}. {x} = ?", ", ")),
    ),
    ("variables", "zh"): _wordings(
        (("{lines}。{x} 是多少？", "，"), ("{lines}。{x} = ？", "；"), ("已知 {lines}。{x} 是多少？", "，"),
         ("已知 {lines}。求 {x}。", "；")),
        (("{lines}。求 {x}。", "，"), ("已知 {lines}。{x} = ？", "，")),
    ),
    ("order", "en"): _wordings(
        (("{facts}. Who is the {most}?", ". "), ("We know: {facts}. Who is the {most}?", ", "),
         ("{facts}. Tell me who is the {most}.", ". "),
         ("We know: {facts}. Find the {most} one.", "; ")),
        (("{facts}. Find the {most} one.", ", "), ("We know: {facts}. Tell me who is the {most}.", ". ")),
    ),
    ("order", "zh"): _wordings(
        (("{facts}。谁{most}？", "。"), ("已知{facts}。谁{most}？", "，"), ("{facts}。请说出谁{most}。", "。"),
         ("已知{facts}。找出{most}的人。", "；")),
        (("{facts}。找出{most}的人。", "，"), ("已知{facts}。请说出谁{most}。", "。")),
    ),
    ("parity", "en"): _wordings(
        (("The lamp is {start}. Press the switch {times}. Is it on or off?", ", then "),
         ("The lamp is {start}. The switch is pressed {times}. Is the lamp on or off?", ", then "),
         ("A lamp is {start}. Press {times}. Is it on or off now?", ", "),
         ("A lamp is {start}. The switch is pressed {times}. On or off?", ", ")),
        (("The lamp is {start}. Press {times}. On or off?", ", then "),
         ("A lamp is {start}. Press the switch {times}. Is the lamp on or off now?", ", ")),
    ),
    ("parity", "zh"): _wordings(
        (("灯是{start}着的。按开关 {times}。灯是开还是关？", "，再按 "),
         ("灯是{start}着的。开关被按了 {times}。现在是开还是关？", "，又按了 "),
         ("一盏灯{start}着。按 {times}。灯是开还是关？", "，"), ("一盏灯{start}着。开关被按了 {times}。开还是关？", "，")),
        (("灯是{start}着的。按 {times}。开还是关？", "，再按 "), ("一盏灯{start}着。按开关 {times}。现在是开还是关？", "，")),
    ),
    ("counting", "en"): _wordings(
        (("{items}. How many are {wanted}?", ", "), ("Count the {wanted} ones: {items}.", ", "),
         ("We see {items}. How many {wanted}?", ", "),
         ("We see {items}. How many are {wanted}?", " ")),
        (("{items}. How many {wanted}?", " "), ("Count the {wanted} ones: {items}.", " ")),
    ),
    ("counting", "zh"): _wordings(
        (("{items}。{wanted}的有几个？", "、"), ("数一数{wanted}的：{items}。", "、"), ("看到{items}。有几个{wanted}的？", "、"),
         ("看到{items}。{wanted}的有几个？", " ")),
        (("{items}。有几个{wanted}的？", " "), ("数一数{wanted}的：{items}。", " ")),
    ),
    ("stories", "en"): _wordings(
        (("{p} has {a} {t}.{events} How many {t} does {p} have now?", ""), ("{p} has {a} {t}.{events} How many are left?", ""),
         ("At first {p} has {a} {t}.{events} How many {t} does {p} have?", ""), ("At first {p} has {a} {t}.{events} How many now?", "")),
        (("{p} has {a} {t}.{events} How many now?", ""), ("At first {p} has {a} {t}.{events} How many {t} are left?", "")),
    ),
    ("stories", "zh"): _wordings(
        (("{p}有 {a} {t}。{events}{p}现在有多少{t}？", ""), ("{p}有 {a} {t}。{events}还剩多少？", ""),
         ("开始时{p}有 {a} {t}。{events}{p}有多少{t}？", ""), ("开始时{p}有 {a} {t}。{events}现在有多少？", "")),
        (("{p}有 {a} {t}。{events}现在有多少？", ""), ("开始时{p}有 {a} {t}。{events}还剩多少{t}？", "")),
    ),
}  # fmt: skip


def template_name(kind: str, lang: str, index: int) -> str:
    """`sums/en/2`, with a `*` when it is held out."""
    return f"{kind}/{lang}/{index}" + ("*" if WORDINGS[kind, lang][index].held_out else "")


def question(problem: Problem, wording: Wording, lang: str, rng: random.Random) -> str:
    """The problem in words. rng chooses what does not matter: names, things, what people compare."""
    en = lang == "en"
    if isinstance(problem, Sum) and "{events}" in wording.frame:
        person, thing = rng.choice(NAMES[lang][:6]), rng.choice(arithmetic.THINGS)[0 if en else 1]
        measure = thing[0]  # in Chinese: the counting word
        events = "".join(rng.choice(EVENTS[lang][sign]).format(p=person, n=n, m=measure) for sign, n in problem.changes)
        return wording.frame.format(p=person, a=problem.start, t=thing, events=events)
    if isinstance(problem, Sum):
        steps = "".join(CHANGES[lang][wording.style][sign].format(n=n) for sign, n in problem.changes)
        return wording.frame.format(a=problem.start, steps=steps)
    if isinstance(problem, Chain):
        lines = [f"{problem.names[0]} = {problem.start}"]
        lines += [f"{problem.names[i + 1]} = {_formula(problem, i, values=False)}" for i in range(len(problem.steps))]
        return wording.frame.format(lines=wording.style.join(lines), x=problem.names[-1])
    if isinstance(problem, Order):
        more, less, most, least = rng.choice(COMPARISONS[lang])
        facts = wording.style.join(_fact(problem, place, less if turned else more, turned, lang) for place, turned in problem.told)
        return wording.frame.format(facts=facts, most=most if problem.ask == "most" else least)
    if isinstance(problem, Parity):
        times = [("1 time" if n == 1 else f"{n} times") if en else f"{n} 次" for n in problem.presses]
        return wording.frame.format(start=LAMP[lang][problem.on], times=wording.style.join(times))
    items = wording.style.join(COLOURS[lang][item] for item in problem.items)
    return wording.frame.format(items=items, wanted=COLOURS[lang][problem.wanted])


def _fact(problem: Order, place: int, word: str, turned: bool, lang: str) -> str:
    first, second = (NAMES[lang][problem.people[place + shift]] for shift in ((1, 0) if turned else (0, 1)))
    return f"{first} is {word} than {second}" if lang == "en" else f"{first}比{second}{word}"


def _formula(problem: Chain, index: int, values: bool) -> str:
    """The right side of a variable's definition, with the names or the values of the other variables."""
    shown = [str(value) for value in problem.results] if values else list(problem.names)
    left, sign, number, right = problem.steps[index]
    return f"{shown[left]} {sign} {number if right is None else shown[right]}"


def answer(problem: Problem, lang: str) -> str:
    """The result in as few characters as possible."""
    if isinstance(problem, Order):
        return NAMES[lang][problem.result]
    if isinstance(problem, Parity):
        return LAMP[lang][problem.results[-1]]
    return str(problem.results[-1])


def working(problem: Problem, lang: str) -> str:
    """The steps one after the other; the last one ends with the answer."""
    stop = ". " if lang == "en" else "。"
    lines: list[str] = []
    if isinstance(problem, Sum):
        before = [problem.start, *problem.results]
        lines = [f"{before[i]} {sign} {n} = {before[i + 1]}" for i, (sign, n) in enumerate(problem.changes)]
    elif isinstance(problem, Chain):
        lines = [
            f"{problem.names[i + 1]} = {_formula(problem, i, values=True)} = {problem.results[i + 1]}" for i in range(len(problem.steps))
        ]
    elif isinstance(problem, Order):
        # Everyone is put behind the one before, beginning at the end that is not asked for: so the answer comes last.
        people = problem.people[::-1] if problem.ask == "most" else problem.people
        sign = " < " if problem.ask == "most" else " > "
        names = [NAMES[lang][person] for person in people]
        lines = [sign.join(names[i : i + 2]) for i in range(len(names) - 1)]
    elif isinstance(problem, Parity):
        states = [LAMP[lang][on] for on in problem.results]
        lines = [f"{n} {PARITY[lang][n % 2]} {state}" for n, state in zip(problem.presses, states, strict=True)]
    else:
        lines = [f"{COLOURS[lang][item]} {count}" for item, count in zip(problem.items, problem.results, strict=True)]
    return stop.join(lines)
