"""Turns the content of this package into rows: documents for pretraining and conversations for tuning."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tools.curriculum import arithmetic, definitions, dialogue, facts, stories

DOCUMENT_WEIGHTS = {"story": 38, "facts": 22, "sums": 18, "dialogue": 12, "description": 10}
CONVERSATION_WEIGHTS = {
    "fact": 27,
    "sum": 20,
    "story": 13,
    "identity": 10,
    "greeting": 8,
    "definition": 7,
    "word_problem": 5,
    "multi_turn": 5,
    "translate": 3,
    "unknown": 2,
}
OPENERS = {
    "en": ("Hi! ", "Please tell me: ", "I have a question. ", "Hello, SmartHaoAI. "),
    "zh": ("请问，", "你好，", "我想问一下，", "小好，"),
}
_SPEAKERS = {
    "en": ('{n} asked: "{q}"\n{m} said: "{a}"', '{n} asked {m}: "{q}"\n{m} answered: "{a}"', "Question: {q}\nAnswer: {a}"),
    "zh": ("{n}问：“{q}”\n{m}说：“{a}”", "“{q}”{n}问。\n“{a}”{m}回答。", "问：{q}\n答：{a}"),
}


def _check_count(count: int) -> None:
    if count < 0:
        raise ValueError(f"count is {count}; give the number of rows wanted, 0 or more")


def _join(sentences: list[str], lang: str) -> str:
    return (" " if lang == "en" else "").join(sentences)


def _facts_document(lang: str, rng: random.Random) -> str:
    pool = rng.choice(facts.CATEGORIES).facts if rng.random() < 0.5 else facts.FACTS
    return _join([facts.statement(fact, lang, rng) for fact in rng.sample(pool, min(len(pool), rng.randint(4, 6)))], lang)


def _description_document(lang: str, rng: random.Random) -> str:
    return _join([definitions.statement(row, lang, rng) for row in rng.sample(definitions.DEFINITIONS, 3)], lang)


def _dialogue_document(lang: str, rng: random.Random) -> str:
    n, m = rng.sample(stories.names(lang), 2)
    shape = rng.choice(_SPEAKERS[lang])
    lines = []
    for _ in range(3):
        if rng.random() < 0.7:
            fact = rng.choice(facts.FACTS)
            q, a = facts.question(fact, lang, rng), facts.answer(fact, lang, rng)
        else:
            row = rng.choice(definitions.DEFINITIONS)
            q, a = definitions.question(row, lang, rng), definitions.answer(row, lang)
        if "“" in shape:  # a quotation inside a quotation takes single marks
            q, a = (text.replace("“", "‘").replace("”", "’") for text in (q, a))
        lines.append(shape.format(q=q, a=a, n=n, m=m))
    return "\n".join(lines)


def _story_document(lang: str, rng: random.Random) -> str:
    return stories.tell(stories.taught_cast(lang, rng), rng)


_DOCUMENTS = {
    "story": _story_document,
    "facts": _facts_document,
    "sums": arithmetic.prose,
    "dialogue": _dialogue_document,
    "description": _description_document,
}


def pretrain_documents(seed: int, count: int) -> Iterator[dict[str, str]]:
    """`count` documents {"text", "source", "lang"}, English and Chinese in turn; text of 30 to 600 characters.

    The same seed gives the same rows. Raises ValueError for a negative count.
    """
    _check_count(count)
    rng = random.Random(f"pretrain/{seed}")
    kinds, weights = tuple(DOCUMENT_WEIGHTS), tuple(DOCUMENT_WEIGHTS.values())
    for i in range(count):
        lang = ("zh", "en")[i % 2]
        kind = rng.choices(kinds, weights)[0]
        while True:
            text = _DOCUMENTS[kind](lang, rng)
            if 30 <= len(text) <= 600:
                break
        yield {"text": text, "source": f"curriculum/{kind}", "lang": lang}


def _opened(question: str, lang: str, rng: random.Random) -> str:
    """A question, one time in four after a short opening; requests ("Tell me ...") stay as they are."""
    return rng.choice(OPENERS[lang]) + question if question[-1] in "?？" and rng.random() < 0.25 else question


def _turn(kind: str, lang: str, rng: random.Random) -> tuple[str, ...]:
    """One exchange: (user, assistant) or (user, assistant, reasoning)."""
    if kind == "fact":
        fact = rng.choice(facts.FACTS)
        return _opened(facts.question(fact, lang, rng), lang, rng), facts.answer(fact, lang, rng)
    if kind in ("sum", "word_problem"):
        make = arithmetic.exercise if kind == "sum" else arithmetic.word_problem
        question, steps, reply = make(lang, rng)
        return question, reply, steps
    if kind == "definition":
        row = rng.choice(definitions.DEFINITIONS)
        return _opened(definitions.question(row, lang, rng), lang, rng), definitions.answer(row, lang)
    if kind == "story":
        return stories.request(lang, rng)
    if kind == "identity":
        question, reply = dialogue.identity(lang, rng)
        return (_opened(question, lang, rng) if rng.random() < 0.5 else question), reply
    return {"greeting": dialogue.greeting, "translate": dialogue.translate, "unknown": dialogue.unknown}[kind](lang, rng)


def _multi_turn(lang: str, rng: random.Random) -> list[tuple[str, ...]]:
    """Two to four exchanges that belong together."""
    shape = rng.random()
    simple = ("fact", "fact", "sum", "definition")
    if shape < 0.35:
        between = [_turn(rng.choice(simple), lang, rng)] if rng.random() < 0.5 else []
        return dialogue.memory(lang, rng, between)
    if shape < 0.5:
        again = rng.choice(dialogue.AGAIN[lang])
        return [stories.request(lang, rng), (again, stories.tell(stories.taught_cast(lang, rng), rng))]
    turns = [_turn(rng.choice(simple), lang, rng) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.6:
        turns.insert(0, dialogue.greeting(lang, rng, "hello"))
    if rng.random() < 0.6 or len(turns) == 1:
        turns.append(dialogue.greeting(lang, rng, rng.choice(("thanks", "bye"))))
    return turns


def conversations(seed: int, count: int) -> Iterator[dict[str, object]]:
    """`count` rows {"conversations": [{"role", "content", "reasoning_content"?}], "source", "lang"}.

    English and Chinese take turns; only sums carry `reasoning_content`. The same seed gives the same rows.
    Raises ValueError for a negative count.
    """
    _check_count(count)
    rng = random.Random(f"conversations/{seed}")
    kinds, weights = tuple(CONVERSATION_WEIGHTS), tuple(CONVERSATION_WEIGHTS.values())
    for i in range(count):
        lang = ("zh", "en")[i % 2]
        kind = rng.choices(kinds, weights)[0]
        turns = _multi_turn(lang, rng) if kind == "multi_turn" else [_turn(kind, lang, rng)]
        messages: list[dict[str, str]] = []
        for user, assistant, *reasoning in turns:
            messages.append({"role": "user", "content": user})
            reply = {"role": "assistant", "content": assistant}
            if reasoning:
                reply["reasoning_content"] = reasoning[0]
            messages.append(reply)
        yield {"conversations": messages, "source": f"curriculum/{kind}", "lang": lang}
