"""The curriculum and its probes: held-out content stays out, rows are well formed, and every check can fail."""

from __future__ import annotations

import random
import re
import time

import pytest

from tools.curriculum import (
    arithmetic,
    checks,
    conversations,
    dialogue,
    facts,
    held_out_casts,
    held_out_sums,
    pretrain_documents,
    probes,
    score,
    stories,
)
from tools.curriculum.probe_set import GREETING_ENDS, HOW_STARTS, IDENTITY, KINDS, LANGUAGES, STARTS, Probe
from train.statistics import wilson

ROWS = 50_000
PAIR = re.compile(r"(?<!\d)(\d+) ?(\+|-|×|plus|minus|times|加|减|乘) ?(\d+)(?!\d)")
COMPARED = re.compile(r"(?:Compare|比较) (\d+) (?:and|和) (\d+)")
SIGNS = {"plus": "+", "加": "+", "minus": "-", "减": "-", "times": "×", "乘": "×"}


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(pretrain_documents(11, ROWS // 2))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(conversations(11, ROWS // 2))


@pytest.fixture(scope="module")
def all_text(documents: list[dict], rows: list[dict]) -> str:
    parts = [document["text"] for document in documents]
    for row in rows:
        for message in row["conversations"]:
            parts += [message["content"], message.get("reasoning_content", "")]
    return "\n\n".join(parts)


def right_answer(probe: Probe) -> str:
    """An answer of the taught style that must pass."""
    rng = random.Random(probe.prompt)
    if probe.kind == "greeting":
        return dialogue.GREETINGS[probe.lang][probe.detail][1][0]
    if probe.kind == "identity":
        return dialogue.IDENTITY[probe.lang][probe.detail][1][0]
    if probe.kind == "fact":
        fact = next(f for f in facts.FACTS if any(q in probe.prompt for q in facts.reserved_questions(f, probe.lang)))
        return facts.answer(fact, probe.lang, rng)
    if probe.kind == "story":
        text = stories.TEXTS[probe.lang]
        forms = (*text.REQUESTS["full"], *text.RESERVED)
        cast = next(c for c in held_out_casts(probe.lang) if any(stories.fill_request(form, c) == probe.prompt for form in forms))
        return stories.tell(cast, rng)
    a, b = map(int, re.findall(r"\d+", probe.prompt)[:2])
    operation = probe.detail
    if operation == arithmetic.MULTIPLY:
        return f"{a * b}."
    if operation == arithmetic.ADD:
        return f"{a} + {b} = {a + b}."
    if operation == arithmetic.SUBTRACT:
        return f"{max(a, b)} - {min(a, b)} = {abs(a - b)}."
    smaller = "smaller" in probe.prompt or "小" in probe.prompt
    return f"{min(a, b) if smaller else max(a, b)}"


def test_same_seed_same_rows_and_other_seed_other_rows() -> None:
    """A run could not be repeated if rows depended on anything but the seed."""
    assert list(conversations(3, 200)) == list(conversations(3, 200)) != list(conversations(4, 200))
    assert list(pretrain_documents(3, 200)) == list(pretrain_documents(3, 200)) != list(pretrain_documents(4, 200))
    assert [p.prompt for p in probes(1, 20)] == [p.prompt for p in probes(1, 20)]


def test_rows_are_well_formed(documents: list[dict], rows: list[dict]) -> None:
    """Empty, over-long, wrongly labelled or unfilled rows would reach training silently."""
    assert sum(document["lang"] == "zh" for document in documents) * 2 == len(documents)
    for document in documents:
        assert set(document) == {"text", "source", "lang"} and 30 <= len(document["text"]) <= 600
        assert document["source"].startswith("curriculum/")
        assert not re.search(r"[{}]|None", document["text"])
    for row in rows:
        turns = row["conversations"]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2) and 2 <= len(turns) <= 8
        assert all(m["content"] and not re.search(r"[{}]|None", m["content"]) for m in turns)
        if row["source"] in ("curriculum/sum", "curriculum/word_problem"):
            assert all(m.get("reasoning_content") for m in turns if m["role"] == "assistant")
        elif row["source"] != "curriculum/multi_turn":
            assert not any("reasoning_content" in m for m in turns)


def test_documents_keep_to_one_language(documents: list[dict]) -> None:
    """A slot filled from the other language's table would teach mixed text."""
    assert all(checks.in_language(document["text"], document["lang"]) for document in documents)


def test_vocabulary_stays_small(all_text: str) -> None:
    """A model of a few million parameters needs a small world."""
    assert len({word.lower() for word in re.findall(r"[A-Za-z]+", all_text)}) < 1200
    assert len(set(re.findall(r"[\u4e00-\u9fff]", all_text))) < 1000


def test_every_sum_is_right(rows: list[dict]) -> None:
    """Wrong steps or answers would be learned as they stand."""
    for row in rows:
        for message in row["conversations"]:
            steps = message.get("reasoning_content", "")
            for left, right in re.findall(r"(\d+(?: [+-] \d+)*|\d+ × \d+) = (\d+)", steps):
                numbers = [int(n) for n in re.findall(r"\d+", left)]
                signs = re.findall(r"[+×-]", left)
                if not signs:
                    continue  # "Tens: 3 = 3" of a comparison
                total = numbers[0]
                for s, n in zip(signs, numbers[1:], strict=True):
                    total = total + n if s == "+" else total - n if s == "-" else total * n
                assert total == int(right), (left, right)
            if steps:
                assert re.findall(r"\d+", steps)[-1] == re.findall(r"\d+", message["content"])[-1]


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("operation", arithmetic.OPERATIONS)
def test_steps_end_in_the_result(operation: str, lang: str) -> None:
    """Carry and borrow must be right for every pair, not only the ones drawn."""
    for a, b in arithmetic.pairs(operation):
        for want in ("big", "small") if operation == arithmetic.COMPARE else ("big",):
            compared = max(a, b) if want == "big" else min(a, b)
            expected = str({"+": a + b, "-": a - b, "×": a * b, "<>": compared}[operation])
            assert re.findall(r"\d+", arithmetic.steps(operation, a, b, lang, want))[-1] == expected
            assert re.findall(r"\d+", arithmetic.answer(operation, a, b, lang, want))[-1] == expected


def test_held_out_pairs_are_about_15_percent_and_symmetric() -> None:
    """If 3 + 42 were held out but 42 + 3 taught, the probe would measure memory."""
    held = {operation: set(found) for operation, found in held_out_sums().items()}
    assert all(0.1 < len(held[o]) / len(list(arithmetic.pairs(o))) < 0.2 for o in ("+", "-", "×", "<>"))
    assert all((b, a) in held[o] for o in ("+", "×", "<>") for a, b in held[o])
    assert all((a, a - b) in held["-"] for a, b in held["-"])


def test_no_held_out_pair_is_generated(all_text: str) -> None:
    """A held-out pair in a row, in signs or words, would make the sum probes worthless."""
    found = [(SIGNS.get(sign, sign), int(a), int(b)) for a, sign, b in PAIR.findall(all_text)]
    found += [("<>", int(a), int(b)) for a, b in COMPARED.findall(all_text)]
    found += [("+", int(a), int(b)) for a, b in re.findall(r"Add (\d+) and (\d+)", all_text)]
    found += [("-", int(a), int(b)) for b, a in re.findall(r"Take (\d+) away from (\d+)", all_text)]
    assert len(found) > 10_000 and {operation for operation, _, _ in found} == set(arithmetic.OPERATIONS)
    leaked = [pair for pair in found if arithmetic.is_held_out(*pair)]
    assert not leaked


def test_no_held_out_cast_is_told(all_text: str) -> None:
    """Hero, kind and place of a story probe must never have been told together."""
    en = re.compile(r"little (\w+) named (\w+)[ ,](?:who |whose home was )?(?:lived )?(.+?)\.")
    kind_of = {word: kind for kind, word in stories.TEXTS["en"].KINDS.items()}
    place_of = {live: place for place, (live, _) in stories.TEXTS["en"].PLACES.items()}
    told = [(m[1], kind_of[m[0]], place_of[m[2]]) for m in en.findall(all_text) if m[2] in place_of]
    assert len(told) > 2_000
    assert not [cast for cast in told if stories.is_held_out("en", *cast)]
    for cast in held_out_casts("zh"):
        text = stories.TEXTS["zh"]
        assert f"{text.KINDS[cast.kind]}叫{cast.hero}，住在{text.PLACES[cast.place][0]}" not in all_text


def test_no_probe_prompt_is_generated(all_text: str) -> None:
    """The probes of several seeds must be new to a model that saw everything."""
    messages = set(all_text.split("\n\n"))
    for seed in range(3):
        assert not messages & {probe.prompt for probe in probes(seed)}
    for probe in probes():
        if probe.prompt in all_text:  # "8 + 28" inside "88 + 28" is another sum
            assert not re.search(rf"(?<!\d){re.escape(probe.prompt)}", all_text), probe.prompt


def _fixed_part(template: str) -> str:
    return max(re.split(r"\{\w+\}", template), key=len)


def test_no_reserved_wording_is_generated(all_text: str) -> None:
    """A reserved template that crept into training would turn a held-out phrasing into a taught one."""
    wordings = [start for lang in LANGUAGES for start in (*STARTS[lang], *HOW_STARTS[lang])]
    wordings += [end for lang in LANGUAGES for ends in GREETING_ENDS[lang].values() for end in ends]
    wordings += [question for lang in LANGUAGES for questions in IDENTITY[lang].values() for question in questions]
    wordings += [_fixed_part(template) for templates in arithmetic.RESERVED.values() for template in templates]
    wordings += [_fixed_part(template) for lang in LANGUAGES for template in stories.TEXTS[lang].RESERVED]
    for category in facts.CATEGORIES:
        for lang in LANGUAGES:
            if category.name == "science":
                wordings += [question for fact in category.facts for question in facts.reserved_questions(fact, lang)]
            else:
                wordings += [_fixed_part(template) for template in category.reserved[lang]]
    assert not [wording for wording in wordings if wording in all_text]


def test_probes_are_complete_and_distinct() -> None:
    """Every kind and language needs exactly its count of different prompts, or rates would mislead."""
    found = probes(0, 50)
    for kind in KINDS:
        for lang in LANGUAGES:
            prompts = [p.prompt for p in found if (p.kind, p.lang) == (kind, lang)]
            assert len(prompts) == len(set(prompts)) == 50
    assert all(len(p.messages) == 1 and p.messages[0]["role"] == "user" for p in found)
    with pytest.raises(ValueError, match="ask for fewer"):
        probes(0, 100_000)
    with pytest.raises(ValueError, match="per_kind is 0"):
        probes(0, 0)


def test_right_answers_pass_and_wrong_ones_fail() -> None:
    """A check that nothing or everything passes measures nothing."""
    found = probes(0, 50)
    for probe in found:
        right = right_answer(probe)
        assert probe.check(right), (probe.prompt, right)
        assert not probe.check("") and not probe.check("???")
        assert not probe.check("Das weiß ich leider nicht.")
        other = [p for p in found if p.kind != probe.kind and p.lang == probe.lang]
        if probe.kind != "sum":  # a fact may hold the number of a sum
            assert not any(probe.check(right_answer(p)) for p in other[::10])
    rates = score((probe, right_answer(probe)) for probe in found)
    assert rates["overall"]["rate"] == 1.0 and rates["cells"]["story/zh"]["total"] == 50
    for probe in (p for p in found if p.kind in ("greeting", "identity", "story")):
        other_language = {"en": "你好，我是小好，一个小小的语言模型。", "zh": "Hello! I am SmartHaoAI, a model."}
        assert not probe.check(other_language[probe.lang])


def test_fact_check_refuses_competing_answers() -> None:
    """Naming every capital, or the wrong one, must not pass; naming the country asked about may."""
    france = next(fact for fact in facts.FACTS if fact.slots["en"]["s"] == "France")
    assert facts.is_correct(france, "en", "The capital of France is Paris.")
    assert not facts.is_correct(france, "en", "Paris or Rome.")
    assert not facts.is_correct(france, "zh", "法国的首都是罗马。")
    for fact in facts.FACTS:
        for lang in LANGUAGES:
            rng = random.Random(0)
            assert all(facts.is_correct(fact, lang, facts.answer(fact, lang, rng)) for _ in range(6)), fact
            subject = fact.slots[lang]["s"].lower()
            rivals = [
                f for f in facts.BY_NAME[fact.category].facts if f.keys[lang] != fact.keys[lang] and f.slots[lang]["a"].lower() != subject
            ]
            for rival in rivals:
                assert not facts.is_correct(fact, lang, facts.answer(rival, lang, rng)), (fact, rival)


def test_facts_have_one_answer_and_enough_wordings() -> None:
    """Two answers to the same question, or a fact asked in few ways, cannot be learned."""
    assert len(facts.FACTS) >= 120
    for category in facts.CATEGORIES:
        for lang in LANGUAGES:
            taught = category.questions[lang]
            assert len(set(taught)) >= 6 and not set(taught) & set(category.reserved[lang])
            asked = [template.format_map(fact.slots[lang]) for fact in category.facts for template in taught]
            assert len(asked) == len(set(asked))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_stories_pass_their_own_check_and_are_many(lang: str) -> None:
    """A story with a lost hero, a third name or a repeated run would teach the faults that the probes look for."""
    rng = random.Random(2)
    told = set()
    for _ in range(1_000):
        cast = rng.choice(stories.casts(lang))
        story = stories.tell(cast, rng)
        told.add(story)
        assert checks.check_story(story, cast), story
        size = len(story.split()) if lang == "en" else len(story)
        assert (60 <= size <= 120) if lang == "en" else (90 <= size <= 190)
    assert len(told) > 990


def test_story_names_the_object_asked_for() -> None:
    """A request for a kite must not be answered with a story without one."""
    rng = random.Random(4)
    for obj in stories.THEME_OBJECTS:
        for _ in range(30):
            assert stories.TEXTS["en"].OBJECTS[obj] in stories.tell(stories.taught_cast("en", rng), rng, obj)
            assert stories.TEXTS["zh"].OBJECTS[obj][1] in stories.tell(stories.taught_cast("zh", rng), rng, obj)


def test_story_check_refuses_faults() -> None:
    """Each rule of the story check must bite by itself."""
    cast = stories.Cast("en", "Tom", "he", "fox", "lake")
    story = stories.tell(cast, random.Random(1), "kite")
    assert checks.check_story(story, cast)
    first, _, rest = story.partition(". ")
    body = re.split(r"(?:From|After) (?:that|then)", story)[0]
    assert not checks.check_story(story.replace("Tom", "Ben"), cast)
    assert not checks.check_story(story.replace("fox", "bear"), cast)
    assert not checks.check_story(story.replace("lake", "river"), cast)
    assert not checks.check_story(story + " Then they went home.", cast)
    assert not checks.check_story(f"{first}. {story}", cast)
    assert not checks.check_story(first + ". Jack and Ruby and Ella came. " + rest, cast)
    assert not checks.check_story(body, cast)


def test_sum_check_reads_the_last_integer() -> None:
    """An answer that only mentions the result on the way is wrong."""
    assert checks.check_sum("27 + 35 = 62.", 62) and checks.check_sum("答案是 62。", 62)
    assert not checks.check_sum("62, no, 63", 62) and not checks.check_sum("sixty-two", 62)


def test_wilson_interval_and_score() -> None:
    """Textbook value: 8 of 10 gives 0.490 to 0.943."""
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="no answers"):
        score([])
    with pytest.raises(ValueError, match="total"):
        wilson(1, 0)


def test_negative_count_is_refused_and_speed_is_fit_for_use() -> None:
    """100k rows are written while the user waits."""
    with pytest.raises(ValueError, match="count is -1"):
        list(conversations(0, -1))
    start = time.process_time()
    assert sum(1 for _ in conversations(0, 10_000)) == 10_000
    assert time.process_time() - start < 5
