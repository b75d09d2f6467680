"""SmartPromptEngineer: which template it chooses, and what it makes of a message."""

import pytest
import yaml
from intent_sentences import LATER, MISSED, TUNED, UNSEEN

from inference.intents import INTENTS
from inference.prompts import SmartPromptEngineer, load_templates


@pytest.fixture
def engineer():
    return SmartPromptEngineer()


@pytest.mark.parametrize(
    "name, sentences, least", [("tuned", TUNED, 0.97), ("missed", MISSED, 0.97), ("unseen", UNSEEN, 0.9), ("later", LATER, 0.8)]
)
def test_intents(engineer, name, sentences, least):
    """Guards: rules that work for one language or for the examples only."""
    wrong = [(want, engineer.detect(text).name, text) for want, texts in sentences.items() for text in texts]
    total = len(wrong)
    wrong = [entry for entry in wrong if entry[0] != entry[1]]
    print(f"intents, {name}: {total - len(wrong)} of {total}; wrong: {wrong}")
    assert set(sentences) == set(INTENTS) and total >= 48
    assert 1 - len(wrong) / total >= least


def test_the_reason_is_what_was_seen():
    """Guards: a reason that a user cannot check."""
    zh, en = (SmartPromptEngineer(lang=lang) for lang in ("zh", "en"))
    assert en.choose("Translate 'tea' into French").reason == 'looks like translation: "Translate", "into French"'
    assert zh.choose("帮我总结一下").reason == "像是总结：“总结”"
    assert en.choose("Nice.").template == "chat" and "sent as it is" in en.choose("Nice.").reason
    intent = en.detect("Write a Python function")
    assert intent.name == "code" and intent.score == intent.scores["code"] > intent.scores["writing"]


@pytest.mark.parametrize("text", ["Hello", " 你好 \n", "", "{question} {context} {0.__class__} {{ $x %s", "{language}"])
def test_plain_chat_adds_nothing(engineer, text):
    """Guards: instructions that confuse a small model; braces of a message taken for fields."""
    prompt = engineer.build(text, template="chat")
    assert prompt.user == text and prompt.system is None and prompt.template == "chat"


@pytest.mark.parametrize("name", INTENTS)
def test_the_eight_templates(engineer, name):
    """Guards: a template that loses the message or its context, changes a brace, or puts something into the system text."""
    assert list(engineer.templates) and set(INTENTS) == set(engineer.templates)
    for question in ("What is {context}?", "什么是 {question}？"):
        prompt = engineer.build(question, template=name, context=["known {0}"])
        assert prompt.user.count(question) == 1 and prompt.user.startswith("known {0}\n\n") and prompt.system is None
        assert question in engineer.build(question, template=name).user
    assert set(engineer.templates[name].description) == {"zh", "en"}
    if name != "chat":
        assert engineer.build("什么", template=name).user != engineer.build("what", template=name).user.replace("what", "什么")


def test_context_is_cut_by_importance(engineer):
    """Guards: the question cut before the context; the wrong piece left out; a budget that is not kept."""
    pieces = [(0.2, "low low low"), "first", (0.9, "high"), "second", "  "]
    whole = engineer.build("Why?", "chat", pieces)
    assert whole.user == "low low low\nfirst\nhigh\nsecond\n\nWhy?" and whole.left_out == 0
    left = []
    for budget in range(len(whole.user), -1, -1):
        prompt = engineer.build("Why?", "chat", pieces, budget=budget)
        assert prompt.user.endswith("Why?") and (len(prompt.user) <= budget or prompt.user == "Why?")
        left.append(prompt.user.split("\n\n")[0].splitlines() if "\n" in prompt.user else [])
    assert [["first", "high", "second"], ["first", "second"], ["first"], []] == [
        kept for number, kept in enumerate(left) if kept != left[number - 1] and number
    ]
    alone = engineer.build("Translate this: " + "word " * 50, "translation", pieces, budget=20)
    assert alone.user == "Translate this: " + "word " * 50 and alone.template == "chat" and alone.left_out == 4


GOOD = {"name": "recipe", "description": "Cooking", "template": "{context}Cook for {people}: {question} {{x}} ({language})"}


def write(tmp_path, *entries):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(list(entries), allow_unicode=True), encoding="utf-8")
    return path


def test_users_templates(tmp_path):
    """Guards: a user's template that is never chosen, or filled with what the user did not write."""
    entry = {**GOOD, "fields": {"people": "2", "mood": None}, "words": ["soup", "菜谱"], "system": "You cook, {mood}."}
    engineer = SmartPromptEngineer.from_file(write(tmp_path, entry))
    assert engineer.choose("A soup, please").template == "recipe" == engineer.choose("来个菜谱").template
    assert engineer.choose("Who wrote Soupault's letters?").template != "recipe"
    prompt = engineer.build("A {mood} soup", context=["I like leek."], mood="merry {people}")
    assert prompt.user == "I like leek.\n\nCook for 2: A {mood} soup {x} (English)" and prompt.system == "You cook, merry {people}."
    assert engineer.build("菜谱", "recipe", people="4", mood="x").user == "Cook for 4: 菜谱 {x} (中文)"
    with pytest.raises(ValueError, match="'recipe' needs a value for mood"):
        engineer.build("A soup", "recipe")
    with pytest.raises(ValueError, match="no field colour"):
        engineer.build("A soup", "recipe", mood="x", colour="red")
    with pytest.raises(ValueError, match="no template 'soup'"):
        engineer.build("A soup", "soup")
    assert engineer.templates["recipe"].required == ("question", "mood")
    assert engineer.build("A soup, please").template == "chat", "what nobody gives cannot be filled in, as in a chat"
    bom = tmp_path / "bom.yaml"
    bom.write_text((tmp_path / "mine.yaml").read_text(encoding="utf-8"), encoding="utf-8-sig")  # as some editors save it
    assert [template.name for template in load_templates(bom)] == ["recipe"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": None}, "name is None"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"description": ""}, "recipe.: description must be"),
        ({"template": {"zh": "{question}"}}, "recipe.: template must be a text, or"),
        ({"template": "{context} only"}, "must have {question}"),
        ({"template": "{question} {who}"}, "template has the field {who}, which is not declared"),
        ({"template": "{question} {"}, "single {; write {{"),
        ({"template": "{question.__class__}"}, "single {"),
        ({"template": 3}, "template must be a text"),
        ({"fields": {"question": "x"}}, "fields must map names"),
        ({"fields": {"budget": "x"}}, "fields must map names"),
        ({"fields": {"n": 3}}, "fields must map names"),
        ({"fields": ["n"]}, "fields must map names"),
        ({"words": "soup"}, "words must be a list"),
        ({"words": [""]}, "words must be a list"),
        ({"system": "{nobody}"}, "system has the field {nobody}"),
        ({"colour": "red"}, "unknown key colour"),
    ],
)
def test_a_bad_template_is_named(tmp_path, change, words):
    """Guards: a mistake in a file of templates that shows up as a strange prompt, or as an error without a place."""
    good = {"name": "fine", "description": "x", "template": "{question}"}
    entry = {**GOOD, "template": "{question}", **change}
    with pytest.raises(ValueError, match="mine.yaml, template 2.*" + words):
        load_templates(write(tmp_path, good, entry))


def test_a_bad_file_of_templates_is_named(tmp_path):
    """Guards: a user's template that replaces a built-in one in silence; a trace for a file that is no YAML."""
    good = {"name": "fine", "description": "x", "template": "{question}"}
    with pytest.raises(ValueError, match="template 2: the name 'fine' occurs twice"):
        load_templates(write(tmp_path, good, good))
    with pytest.raises(ValueError, match="'chat' already"):
        SmartPromptEngineer.from_file(write(tmp_path, {**good, "name": "chat"}))
    for content in ("a: [", "just text", "", "- 3", "!!python/object/apply:os.getcwd []"):
        path = tmp_path / "mine.yaml"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="mine.yaml"):
            load_templates(path)
    with pytest.raises(FileNotFoundError):
        load_templates(tmp_path / "none.yaml")
