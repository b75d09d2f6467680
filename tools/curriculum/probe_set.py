"""Held-out prompts with strict checks, and pass rates with Wilson intervals.

for probe in probes(): passed = probe.check(answer_of(probe.messages))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from tools.curriculum import arithmetic, checks, dialogue, facts, stories
from train.statistics import wilson

KINDS = ("greeting", "identity", "fact", "sum", "story")
LANGUAGES = ("en", "zh")

# Words below are reserved for the probes: nothing in this file may be used by the generators.
GREETING_ENDS = {
    "en": {
        "hello": (" to you, little model!", ", my small friend!", ", dear helper!", " from me!", " once more!", ", I am here!"),
        "thanks": (" for your help!", ", my small friend!", ", dear helper!", " for everything!", ", that was good!"),
        "bye": (", my small friend!", ", dear helper!", ", it was fun!"),
    },
    "zh": {
        "hello": ("，小模型！", "，我的小朋友！", "，小帮手！", "，我来了！", "，又见面了！", "，在吗？"),
        "thanks": ("你的帮助！", "，我的小朋友！", "，小帮手！", "，帮了大忙！", "，讲得真好！"),
        "bye": ("，我的小朋友！", "，小帮手！", "，今天很开心！"),
    },
}
HOW_STARTS = {"en": ("My friend! ", "Dear helper! ", "Here I am. "), "zh": ("我的小朋友，", "小帮手，", "我来了。")}
IDENTITY = {
    "en": {
        "who": (
            "What name do people use for you?",
            "Say your name, please.",
            "Could you say who you are?",
            "I forgot your name. What is it?",
        ),
        "what": ("Are you alive, or are you a program?", "Is a person writing these words?", "What kind of thing are you?"),
        "maker": ("Which people made you?", "Who was it that made you?", "Who taught you to talk?"),
        "can": ("Which things can you do for me?", "What are you able to do?"),
        "limits": ("Could you tell me something wrong?", "Is everything you say true?"),
        "language": ("Can you talk in more than one language?", "In which languages can we talk?"),
    },
    "zh": {
        "who": ("大家怎么称呼你？", "说说你的名字吧。", "你到底是谁呀？", "我忘了你的名字，你叫啥？"),
        "what": ("你是活的，还是程序？", "这些话是真人写的吗？", "你是哪一种东西？"),
        "maker": ("是哪些人做了你？", "当初是谁把你做出来的？", "谁教会了你说话？"),
        "can": ("你可以为我做哪些事？", "你都有什么本领？"),
        "limits": ("你有没有可能说错话？", "你讲的话全是真的吗？"),
        "language": ("你会不会两种语言？", "我们可以用哪几种语言说话？"),
    },
}
STARTS = {"en": ("By the way: ", "Before we begin: ", "One thing I wonder: "), "zh": ("顺便问一下，", "先问个小问题：", "我有点好奇，")}

_SHARES = {arithmetic.ADD: 0.40, arithmetic.SUBTRACT: 0.32, arithmetic.MULTIPLY: 0.16, arithmetic.COMPARE: 0.12}


@dataclass(frozen=True)
class Probe:
    """One held-out prompt. `messages` is a list of one user message; `check` judges an answer."""

    kind: str
    lang: str
    messages: list[dict[str, str]]
    judge: Callable[[str], bool] = field(repr=False, compare=False)
    detail: str = ""

    @property
    def prompt(self) -> str:
        """The user message."""
        return self.messages[0]["content"]

    def check(self, answer_text: str, reasoning: str = "") -> bool:
        """True if the answer passes. The reasoning is not judged: what the user reads must be right by itself."""
        return bool(answer_text.strip()) and self.judge(answer_text)


def _probe(kind: str, lang: str, prompt: str, judge: Callable[[str], bool], detail: str = "") -> Probe:
    return Probe(kind, lang, [{"role": "user", "content": prompt}], judge, detail)


def _greetings(lang: str, rng: random.Random) -> list[Probe]:
    found = []
    for kind, (prompts, _) in dialogue.GREETINGS[lang].items():
        if kind == "how":
            texts = [start + prompt for start in HOW_STARTS[lang] for prompt in prompts]
        else:
            plain = [prompt for prompt in prompts if prompt not in ("I have to go now", "Many thanks", "我要走了", "太谢谢你了")]
            texts = [prompt + end for end in GREETING_ENDS[lang][kind] for prompt in plain]
        found += [_probe("greeting", lang, text, partial(checks.check_greeting, lang=lang, kind=kind), kind) for text in texts]
    rng.shuffle(found)
    return found


def _identities(lang: str, rng: random.Random) -> list[Probe]:
    found = [
        _probe("identity", lang, start + question, partial(checks.check_identity, lang=lang, kind=kind), kind)
        for kind, questions in IDENTITY[lang].items()
        for question in questions
        for start in ("", *STARTS[lang])
    ]
    rng.shuffle(found)
    return found


def _check_fact(text: str, fact: facts.Fact, lang: str) -> bool:
    return checks.is_short(text, lang) and checks.in_language(text, lang) and facts.is_correct(fact, lang, text)


def _facts(lang: str, rng: random.Random) -> list[Probe]:
    """Every fact once, then every fact in its next wording, and so on; every other one after a reserved opening."""
    rounds: list[Probe] = []
    order = rng.sample(facts.FACTS, len(facts.FACTS))
    for turn in range(4):
        for i, fact in enumerate(order):
            questions = facts.reserved_questions(fact, lang)
            start = "" if (i + turn) % 2 else rng.choice(STARTS[lang])
            text = start + questions[turn % len(questions)]
            rounds.append(_probe("fact", lang, text, partial(_check_fact, fact=fact, lang=lang), fact.category))
    return rounds


def _sums(lang: str, rng: random.Random, count: int) -> list[Probe]:
    """Held-out pairs in the shares of _SHARES, in reserved and taught wordings by turns."""
    quotas = {operation: int(count * share) for operation, share in _SHARES.items()}
    quotas[arithmetic.ADD] += count - sum(quotas.values())
    found = []
    for operation, pairs in arithmetic.held_out_sums().items():
        wordings = (arithmetic.RESERVED[lang, operation], arithmetic.QUESTIONS[lang, operation])
        choices = [(pair, reserved, i) for pair in pairs for reserved in (0, 1) for i in range(len(wordings[reserved]))]
        rng.shuffle(choices)
        halves = [[choice for choice in choices if choice[1] == side] for side in (0, 1)]
        for number in range(quotas[operation]):
            if not halves[number % 2]:
                break
            (a, b), side, i = halves[number % 2].pop()
            want = rng.choice(("big", "small"))
            result = arithmetic.result(operation, a, b, want)
            found.append(
                _probe(
                    "sum", lang, arithmetic.fill(wordings[side][i], a, b, lang, want), partial(checks.check_sum, result=result), operation
                )
            )
    rng.shuffle(found)
    return found


def _stories(lang: str, rng: random.Random) -> list[Probe]:
    casts = stories.held_out_casts(lang)
    rng.shuffle(casts)
    text = stories.TEXTS[lang]
    return [
        _probe(
            "story",
            lang,
            stories.fill_request(rng.choice(text.RESERVED if i % 2 else text.REQUESTS["full"]), cast),
            partial(checks.check_story, cast=cast),
            cast.kind,
        )
        for i, cast in enumerate(casts)
    ]


def probes(seed: int = 0, per_kind: int = 50) -> list[Probe]:
    """Exactly `per_kind` held-out prompts for each kind of KINDS and each language, all different.

    Raises ValueError if `per_kind` is below 1 or above what the reserved wordings give.
    """
    if per_kind < 1:
        raise ValueError(f"per_kind is {per_kind}; ask for 1 prompt or more of each kind")
    found: list[Probe] = []
    for lang in LANGUAGES:
        for kind in KINDS:
            rng = random.Random(f"probes/{seed}/{lang}/{kind}")
            if kind == "sum":
                pool = _sums(lang, rng, per_kind)
            else:
                pool = {"greeting": _greetings, "identity": _identities, "fact": _facts, "story": _stories}[kind](lang, rng)
            unique = list({probe.prompt: probe for probe in pool}.values())
            if len(unique) < per_kind:
                raise ValueError(f"per_kind is {per_kind}, but {lang} has {len(unique)} {kind} prompts; ask for fewer")
            found += unique[:per_kind]
    return found


def _cell(results: list[bool]) -> dict[str, float]:
    low, high = wilson(sum(results), len(results))
    return {"passed": sum(results), "total": len(results), "rate": sum(results) / len(results), "low": low, "high": high}


def score(answers: Iterable[tuple[Probe, str] | tuple[Probe, str, str]]) -> dict:
    """Pass rates of (probe, answer) or (probe, answer, reasoning).

    Returns {"overall": cell, "kinds": {kind: cell}, "langs": {lang: cell},
             "cells": {"kind/lang": cell}} where a cell is
    {"passed", "total", "rate", "low", "high"} with the Wilson 95% interval. Raises ValueError if there are no answers.
    """
    results = [(probe, probe.check(*texts)) for probe, *texts in answers]
    if not results:
        raise ValueError("no answers to score; pass (probe, answer) for each probe of probes()")

    def group(key: Callable[[Probe], str]) -> dict[str, dict[str, float]]:
        groups: dict[str, list[bool]] = {}
        for probe, passed in results:
            groups.setdefault(key(probe), []).append(passed)
        return {name: _cell(values) for name, values in groups.items()}

    return {
        "overall": _cell([passed for _, passed in results]),
        "kinds": group(lambda probe: probe.kind),
        "langs": group(lambda probe: probe.lang),
        "cells": group(lambda probe: f"{probe.kind}/{probe.lang}"),
    }
