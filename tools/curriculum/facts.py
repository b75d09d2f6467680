"""Simple facts: questions (some wordings kept for the probes), short answers and statements for prose.

Slots of a template: {s} subject, {u} unit, {a} answer, {S} and {A} the same with a capital first letter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from tools.curriculum import fact_table as table

Text = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fact:
    """One fact: the template slots and the accepted answer words of each language ("en", "zh")."""

    category: str
    slots: Mapping[str, Mapping[str, str]]
    keys: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Category:
    """Facts that share their wordings. `reserved` questions are asked by the probes only."""

    name: str
    facts: tuple[Fact, ...]
    questions: Text
    reserved: Text
    answers: Text
    statements: Text


NUMBER_WORDS = {
    "two": ("two", "2"),
    "three": ("three", "3"),
    "four": ("four", "4"),
    "five": ("five", "5"),
    "six": ("six", "6"),
    "seven": ("seven", "7"),
    "eight": ("eight", "8"),
    "twelve": ("twelve", "12"),
    "twenty-four": ("twenty-four", "twenty four", "24"),
    "sixty": ("sixty", "60"),
    "两": ("两", "二", "2"),
    "三": ("三", "3"),
    "四": ("四", "4"),
    "五": ("五", "5"),
    "六": ("六", "6"),
    "七": ("七", "7"),
    "八": ("八", "8"),
    "十二": ("十二", "12"),
    "二十四": ("二十四", "24"),
    "六十": ("六十", "60"),
}


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _keys(answer: str, lang: str) -> tuple[str, ...]:
    if answer in NUMBER_WORDS:
        return NUMBER_WORDS[answer]
    if lang == "en":
        return (re.sub(r"^((in|on|at|under) )?((the|a|an) )?", "", answer),)
    core = re.sub(r"(里|上|色)$", "", answer) if len(answer) > 1 else answer
    return (core,)


def _slots(subject: str, answer: str, unit: str = "") -> dict[str, str]:
    return {"s": subject, "S": capital(subject), "a": answer, "A": capital(answer), "u": unit}


def _fact(category: str, row: tuple[str, ...]) -> Fact:
    if len(row) == 6:
        en, zh = _slots(row[0], row[2], row[1]), _slots(row[3], row[5], row[4])
    else:
        en, zh = _slots(row[0], row[1]), _slots(row[2], row[3])
    keys = {"en": _keys(en["a"], "en"), "zh": _keys(zh["a"], "zh")}
    return Fact(category, {"en": en, "zh": zh}, keys)


def _science_fact(row: tuple[str, ...]) -> Fact:
    en = {"q": row[0], "h": row[1], "f": row[2], "s": "", "a": row[3]}
    zh = {"q": row[4], "h": row[5], "f": row[6], "s": "", "a": row[7]}
    return Fact("science", {"en": en, "zh": zh}, {"en": _keys(row[3], "en"), "zh": (row[7],)})


def _category(name: str, rows: tuple[tuple[str, ...], ...], **texts: tuple[str, ...]) -> Category:
    """Build a category from rows and the texts questions_en, reserved_en, answers_en, statements_en and ..._zh."""
    make = _science_fact if name == "science" else lambda row: _fact(name, row)
    both = {kind: {lang: texts[f"{kind}_{lang}"] for lang in ("en", "zh")} for kind in ("questions", "reserved", "answers", "statements")}
    return Category(name, tuple(make(row) for row in rows), **both)


_BOTH_WAYS = table.OPPOSITES + tuple((row[1], row[0], row[3], row[2]) for row in table.OPPOSITES)

CATEGORIES: tuple[Category, ...] = (
    _category(
        "capital",
        table.CAPITALS,
        questions_en=(
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Tell me the capital of {s}.",
            "Do you know the capital of {s}?",
            "What is the name of the capital of {s}?",
            "The capital of {s} is which city?",
        ),
        reserved_en=("Which city does {s} have as its capital?", "I forgot the capital of {s}. Which city is it?"),
        answers_en=("The capital of {s} is {a}.", "It is {a}."),
        statements_en=("The capital of {s} is {a}.", "{a} is the capital of {s}.", "{S} is a country, and its capital is {a}."),
        questions_zh=(
            "{s}的首都是哪里？",
            "{s}的首都是哪个城市？",
            "哪个城市是{s}的首都？",
            "告诉我{s}的首都。",
            "你知道{s}的首都吗？",
            "{s}的首都在哪里？",
        ),
        reserved_zh=("{s}把哪座城市当作首都？", "我忘了{s}的首都，它是哪座城？"),
        answers_zh=("{s}的首都是{a}。", "是{a}。"),
        statements_zh=("{s}的首都是{a}。", "{a}是{s}的首都。", "{s}是一个国家，它的首都是{a}。"),
    ),
    _category(
        "sound",
        table.SOUNDS,
        questions_en=(
            "What sound does {s} make?",
            "What does {s} say?",
            "Which sound does {s} make?",
            "Tell me the sound of {s}.",
            "Do you know the sound of {s}?",
            "What is the sound of {s}?",
        ),
        reserved_en=("What would I hear from {s}?", "Can you make the sound that {s} makes?"),
        answers_en=("{S} says {a}.", "The sound of {s} is {a}."),
        statements_en=("{S} says {a}.", "The sound of {s} is {a}.", "When you meet {s}, you can hear it say {a}."),
        questions_zh=(
            "{s}怎么叫？",
            "{s}的叫声是什么？",
            "{s}是怎么叫的？",
            "告诉我{s}的叫声。",
            "你知道{s}怎么叫吗？",
            "{s}会发出什么声音？",
        ),
        reserved_zh=("{s}叫起来是什么样的？", "你来学一学{s}的叫声。"),
        answers_zh=("{s}的叫声是{a}。", "{s}{a}地叫。"),
        statements_zh=("{s}的叫声是{a}。", "{s}{a}地叫。", "听，{s}在{a}地叫呢。"),
    ),
    _category(
        "home",
        table.HOMES,
        questions_en=(
            "Where does {s} live?",
            "Where is the home of {s}?",
            "Tell me where {s} lives.",
            "Do you know where {s} lives?",
            "What is the home of {s}?",
            "In which place does {s} live?",
        ),
        reserved_en=("Where can I find {s} at home?", "If I look for {s}, where should I go?"),
        answers_en=("{S} lives {a}.", "It lives {a}."),
        statements_en=("{S} lives {a}.", "The home of {s} is {a}.", "If you go and look {a}, you may see {s}."),
        questions_zh=(
            "{s}住在哪里？",
            "{s}的家在哪里？",
            "告诉我{s}住在哪里。",
            "你知道{s}住在哪里吗？",
            "{s}生活在什么地方？",
            "{s}的家在什么地方？",
        ),
        reserved_zh=("想找{s}要去哪儿？", "{s}是在哪儿安家的？"),
        answers_zh=("{s}住在{a}。", "它住在{a}。"),
        statements_zh=("{s}住在{a}。", "{s}的家在{a}。", "在{a}，你能看到{s}。"),
    ),
    _category(
        "food",
        table.FOODS,
        questions_en=(
            "What does {s} like to eat?",
            "What does {s} eat?",
            "What is the food of {s}?",
            "Tell me what {s} eats.",
            "Do you know what {s} eats?",
            "Which food does {s} like?",
        ),
        reserved_en=("What should I feed {s}?", "If {s} is hungry, what will it eat?"),
        answers_en=("{S} likes to eat {a}.", "It likes to eat {a}."),
        statements_en=("{S} likes to eat {a}.", "The food of {s} is {a}.", "When {s} is hungry, it looks for {a}."),
        questions_zh=(
            "{s}喜欢吃什么？",
            "{s}吃什么？",
            "{s}爱吃什么？",
            "告诉我{s}喜欢吃什么。",
            "你知道{s}吃什么吗？",
            "{s}的食物是什么？",
        ),
        reserved_zh=("我该喂{s}什么好？", "{s}要是饿了，会找什么吃？"),
        answers_zh=("{s}喜欢吃{a}。", "它喜欢吃{a}。"),
        statements_zh=("{s}喜欢吃{a}。", "{s}爱吃{a}。", "{s}饿的时候会去找{a}。"),
    ),
    _category(
        "color",
        table.COLORS,
        questions_en=(
            "What color is {s}?",
            "What is the color of {s}?",
            "Tell me the color of {s}.",
            "Do you know the color of {s}?",
            "Which color is {s}?",
            "Which color does {s} have?",
        ),
        reserved_en=("I want to paint {s}. Which color do I need?", "What color do you see when you look at {s}?"),
        answers_en=("{S} is {a}.", "It is {a}."),
        statements_en=("{S} is {a}.", "The color of {s} is {a}.", "Look at {s}: it is {a}."),
        questions_zh=(
            "{s}是什么颜色？",
            "{s}是什么颜色的？",
            "{s}的颜色是什么？",
            "告诉我{s}的颜色。",
            "你知道{s}是什么颜色吗？",
            "{s}是哪种颜色？",
        ),
        reserved_zh=("我想画{s}，要用哪种颜色？", "{s}看上去是什么颜色？"),
        answers_zh=("{s}是{a}的。", "是{a}的。"),
        statements_zh=("{s}是{a}的。", "{s}的颜色是{a}。", "你看，{s}是{a}的。"),
    ),
    _category(
        "count",
        table.COUNTS,
        questions_en=(
            "How many {u} does {s} have?",
            "How many {u} are there in {s}?",
            "Tell me how many {u} {s} has.",
            "Do you know how many {u} {s} has?",
            "What is the number of {u} in {s}?",
            "{S} has how many {u}?",
        ),
        reserved_en=("Count the {u} of {s} for me. How many?", "If I count the {u} of {s}, what number do I get?"),
        answers_en=("{S} has {a} {u}.", "It has {a} {u}."),
        statements_en=("{S} has {a} {u}.", "There are {a} {u} in {s}.", "Count with me: {s} has {a} {u}."),
        questions_zh=(
            "{s}有几{u}？",
            "{s}有多少{u}？",
            "{s}一共有几{u}？",
            "告诉我{s}有几{u}。",
            "你知道{s}有几{u}吗？",
            "{s}一共有多少{u}？",
        ),
        reserved_zh=("帮我数一数{s}有几{u}。", "数一数，{s}的{u}是多少？"),
        answers_zh=("{s}有{a}{u}。", "有{a}{u}。"),
        statements_zh=("{s}有{a}{u}。", "{s}一共有{a}{u}。", "我们都知道，{s}有{a}{u}。"),
    ),
    _category(
        "opposite",
        _BOTH_WAYS,
        questions_en=(
            "What is the opposite of {s}?",
            "Tell me the opposite of {s}.",
            "Do you know the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "The opposite of {s} is what?",
            "What word is the opposite of {s}?",
        ),
        reserved_en=("If it is not {s} at all, what is it?", "Give me the word that means the opposite of {s}."),
        answers_en=("The opposite of {s} is {a}.", "It is {a}."),
        statements_en=("The opposite of {s} is {a}.", "{S} and {a} are opposites.", "If something is not {s}, it may be {a}."),
        questions_zh=(
            "“{s}”的反义词是什么？",
            "和“{s}”相反的词是什么？",
            "告诉我“{s}”的反义词。",
            "你知道“{s}”的反义词吗？",
            "什么词和“{s}”相反？",
            "“{s}”的反义词是哪个？",
        ),
        reserved_zh=("哪个字词和“{s}”是反着的意思？", "请找一个意思和“{s}”正好相反的词。"),
        answers_zh=("“{s}”的反义词是“{a}”。", "是“{a}”。"),
        statements_zh=("“{s}”的反义词是“{a}”。", "“{s}”和“{a}”是一对反义词。", "和“{s}”相反的词是“{a}”。"),
    ),
    _category(
        "season",
        table.SEASONS,
        questions_en=(
            "{S} in which season?",
            "{S}. Which season is it?",
            "Tell me the season: {s}.",
            "{S}. What season is it?",
            "Do you know this season? {S}.",
            "In which season is this true? {S}.",
        ),
        reserved_en=("{S}. What do we call this time of the year?", "{S}. Name the season."),
        answers_en=("It is {a}.", "That season is {a}."),
        statements_en=("{S} in {a}.", "In {a} we can say: {s}.", "{S}. This season is {a}."),
        questions_zh=(
            "哪个季节{s}？",
            "{s}的是哪个季节？",
            "什么季节{s}？",
            "告诉我哪个季节{s}。",
            "你知道哪个季节{s}吗？",
            "{s}是在哪个季节？",
        ),
        reserved_zh=("一年里什么时候{s}？", "{s}，这是一年里的哪个时候？"),
        answers_zh=("{a}{s}。", "是{a}。"),
        statements_zh=("{a}{s}。", "{s}的季节是{a}。", "{a}到了，{s}。"),
    ),
    _category(
        "day",
        table.DAYS,
        questions_en=(
            "What day comes after {s}?",
            "Which day comes after {s}?",
            "What day is after {s}?",
            "Tell me the day after {s}.",
            "Do you know the day after {s}?",
            "What is the day after {s}?",
        ),
        reserved_en=("Today is {s}. What day is tomorrow?", "When {s} is over, what day is it?"),
        answers_en=("The day after {s} is {a}.", "It is {a}."),
        statements_en=("The day after {s} is {a}.", "{a} comes after {s}.", "First comes {s}, and then comes {a}."),
        questions_zh=(
            "{s}的后一天是星期几？",
            "{s}后面是星期几？",
            "{s}的下一天是星期几？",
            "告诉我{s}后面是星期几。",
            "你知道{s}的后一天是星期几吗？",
            "{s}过后是星期几？",
        ),
        reserved_zh=("今天是{s}，明天是星期几？", "过完{s}，就到星期几了？"),
        answers_zh=("{s}的后一天是{a}。", "是{a}。"),
        statements_zh=("{s}的后一天是{a}。", "{s}后面是{a}。", "先过{s}，再过{a}。"),
    ),
    _category(
        "body",
        table.BODY,
        questions_en=(
            "What do we {s} with?",
            "What do people {s} with?",
            "Which part of the body do we {s} with?",
            "Tell me what we {s} with.",
            "Do you know what we {s} with?",
            "With what do we {s}?",
        ),
        reserved_en=("I want to {s}. Which part of my body helps me?", "Which part of the body is there to {s}?"),
        answers_en=("We {s} with our {a}.", "With our {a}."),
        statements_en=("We {s} with our {a}.", "Our {a} help us to {s}.", "People {s} with their {a}."),
        questions_zh=(
            "我们用什么{s}？",
            "人用什么{s}？",
            "人用身体的哪里{s}？",
            "告诉我人用什么{s}。",
            "你知道我们用什么{s}吗？",
            "{s}要用身体的哪里？",
        ),
        reserved_zh=("我想{s}，靠身体的哪一个部分？", "身体的哪一个部分能{s}？"),
        answers_zh=("我们用{a}{s}。", "用{a}。"),
        statements_zh=("我们用{a}{s}。", "{a}能帮我们{s}。", "人用{a}{s}。"),
    ),
    _category(
        "record",
        table.RECORDS,
        questions_en=(
            "What is {s}?",
            "Tell me what {s} is.",
            "Do you know {s}?",
            "What is the name of {s}?",
            "Which one is {s}?",
            "What do we call {s}?",
        ),
        reserved_en=("Can you name {s}?", "Think of {s}. What is it?"),
        answers_en=("{S} is {a}.", "It is {a}."),
        statements_en=("{S} is {a}.", "{A} is {s}.", "Do you know {s}? It is {a}."),
        questions_zh=("{s}是什么？", "{s}是哪个？", "什么是{s}？", "告诉我{s}是什么。", "你知道{s}是什么吗？", "{s}叫什么名字？"),
        reserved_zh=("请你说出名字：{s}。", "猜一猜{s}是谁？"),
        answers_zh=("{s}是{a}。", "是{a}。"),
        statements_zh=("{s}是{a}。", "{a}是{s}。", "你知道{s}吗？它就是{a}。"),
    ),
    _category(
        "job",
        table.JOBS,
        questions_en=(
            "Who {s}?",
            "Tell me who {s}.",
            "Do you know who {s}?",
            "Which person {s}?",
            "Who is the person who {s}?",
            "What do we call a person who {s}?",
        ),
        reserved_en=("My mother is a person who {s}. What is her job?", "What is the job of someone who {s}?"),
        answers_en=("{A} {s}.", "It is {a}."),
        statements_en=("{A} {s}.", "A person who {s} is {a}.", "Who {s}? It is {a}."),
        questions_zh=("谁{s}？", "告诉我谁{s}。", "你知道谁{s}吗？", "{s}的人叫什么？", "{s}的人是谁？", "什么人{s}？"),
        reserved_zh=("我妈妈天天{s}，她是做什么工作的？", "{s}是谁的工作？"),
        answers_zh=("{a}{s}。", "是{a}。"),
        statements_zh=("{a}{s}。", "{s}的人是{a}。", "谁{s}？是{a}。"),
    ),
    _category(
        "tool",
        table.TOOLS,
        questions_en=(
            "What do we use to {s}?",
            "What do people use to {s}?",
            "Which thing do we use to {s}?",
            "Tell me what we use to {s}.",
            "Do you know what we use to {s}?",
            "What can I use to {s}?",
        ),
        reserved_en=("I want to {s}. What do I need?", "Which thing helps me to {s}?"),
        answers_en=("We use {a} to {s}.", "We use {a}."),
        statements_en=("We use {a} to {s}.", "To {s}, we use {a}.", "With {a} we can {s}."),
        questions_zh=(
            "我们用什么{s}？",
            "人们用什么{s}？",
            "用什么东西可以{s}？",
            "告诉我用什么{s}。",
            "你知道用什么{s}吗？",
            "我可以用什么{s}？",
        ),
        reserved_zh=("我想{s}，需要哪样东西？", "想要{s}，拿什么好呢？"),
        answers_zh=("我们用{a}{s}。", "用{a}。"),
        statements_zh=("我们用{a}{s}。", "{a}可以用来{s}。", "有了{a}，就可以{s}。"),
    ),
    _category(
        "science",
        table.SCIENCE,
        questions_en=("{q}", "I want to know: {q}", "Tell me: {q}", "My question is: {q}", "Do you know this? {q}", "{q} Tell me."),
        reserved_en=("{h}",),
        answers_en=("{f}",),
        statements_en=("{f}", "We know this: {f}", "Let me tell you something. {f}"),
        questions_zh=("{q}", "我想知道，{q}", "告诉我，{q}", "我的问题是：{q}", "你知道吗？{q}", "{q}告诉我吧。"),
        reserved_zh=("{h}",),
        answers_zh=("{f}",),
        statements_zh=("{f}", "我们都知道，{f}", "我来告诉你，{f}"),
    ),
)

BY_NAME: Mapping[str, Category] = {category.name: category for category in CATEGORIES}
FACTS: tuple[Fact, ...] = tuple(fact for category in CATEGORIES for fact in category.facts)


def question(fact: Fact, lang: str, rng: random.Random) -> str:
    """One of the taught wordings of the question."""
    return rng.choice(BY_NAME[fact.category].questions[lang]).format_map(fact.slots[lang])


def reserved_questions(fact: Fact, lang: str) -> list[str]:
    """Every wording of the question that only the probes use."""
    return [template.format_map(fact.slots[lang]) for template in BY_NAME[fact.category].reserved[lang]]


def answer(fact: Fact, lang: str, rng: random.Random) -> str:
    """A short answer; three in four are the full sentence."""
    forms = BY_NAME[fact.category].answers[lang]
    return (forms[0] if rng.random() < 0.75 else rng.choice(forms)).format_map(fact.slots[lang])


def statement(fact: Fact, lang: str, rng: random.Random) -> str:
    """The fact as a sentence of prose."""
    return rng.choice(BY_NAME[fact.category].statements[lang]).format_map(fact.slots[lang])


@cache
def _answer_pattern(category: str, lang: str, subject: str) -> re.Pattern[str]:
    """Answer words of a category and the subject, longest first: an answer inside the subject does not count."""
    fixed = {"反义词", "相反"} if category == "opposite" and lang == "zh" else set()
    words = {key for fact in BY_NAME[category].facts for key in fact.keys[lang]} | fixed | ({subject} - {""})
    parts = sorted(words, key=lambda word: (-len(word), word))
    if lang == "en":
        return re.compile("|".join(rf"\b{re.escape(part)}(?:e?s)?\b" for part in parts), re.IGNORECASE)
    if category == "opposite":
        # one character is an answer only where it stands alone: the 好 of 你好 is none
        alone = "(?:(?<![\u4e00-\u9fff])|(?<=是)){}(?![\u4e00-\u9fff])"
        return re.compile("|".join(alone.format(part) if len(part) == 1 else part for part in parts))
    return re.compile("|".join(rf"(?<!\d){part}(?!\d)" if part.isdigit() else re.escape(part) for part in parts))


def is_correct(fact: Fact, lang: str, text: str) -> bool:
    """True if the text holds an accepted answer and no competing answer of the category (the subject may be named)."""
    subject = fact.slots[lang]["s"]
    own = {key.lower() for key in fact.keys[lang]}
    every = {key.lower() for other in BY_NAME[fact.category].facts for key in other.keys[lang]}
    sentence = (fact.slots[lang].get("f", "") + fact.slots[lang].get("q", "")).lower()
    competing = {word for word in every - own - {subject.lower()} if word not in sentence}
    found = set()
    for match in _answer_pattern(fact.category, lang, subject).finditer(text):
        word = match.group().lower()
        for form in (word, word[:-1], word[:-2]):
            if form in every:
                found.add(form)
                break
    return bool(found & own) and not found & competing
