"""ConversationMemory: what is found again, what is kept when it is full, who wins when a fact changes."""

import random

import numpy as np
import pytest
import torch
from long_conversation import ACROSS, FACTS, OTHER, QUESTIONS, turn
from memory_helpers import characters, search  # noqa: F401

from inference.embedding import model_embedder, model_summariser
from inference.engine import Engine
from inference.memory import ConversationMemory
from inference.turn_memory import TurnMemory


def told(memory, first=1, last=190):
    for number in range(first, last + 1):
        for role, text in zip(("user", "assistant"), turn(number), strict=True):
            memory.add(role, text)
            assert len(memory.list()) <= memory.capacity
    return memory


@pytest.mark.parametrize("capacity", [40, 1000])
def test_facts_of_a_long_conversation_are_found(search, capacity):  # noqa: F811
    """Guards: a memory that forgets who it talks to after a hundred turns, or fills up with small talk."""
    memory = told(ConversationMemory(":memory:", capacity=capacity))
    for question, answer in QUESTIONS + ACROSS:
        assert answer in memory.context(question, 240, characters), question
    first = sum(answer in memory.retrieve(question, 1)[0].match for question, answer in QUESTIONS)
    assert first == len(QUESTIONS)
    told(memory, 191, 200)
    assert (memory.stats()["summaries"] > 0) == (capacity == 40)


def test_nothing_is_put_before_a_question_it_does_not_fit(search):  # noqa: F811
    """Guards: every prompt filled with what matters in general, which confuses a model more than nothing does."""
    memory = told(ConversationMemory(":memory:", capacity=100))
    assert [memory.context(question, 240, characters) for question in OTHER] == [""] * len(OTHER)
    assert memory.retrieve("") == [] and ConversationMemory(":memory:").context("What is my name?", 100, characters) == ""


def test_a_changed_fact_comes_first(search):  # noqa: F811
    """Guards: an old address before the new one, or instead of it when there is room for one line only."""
    memory = ConversationMemory(":memory:")
    for text in ("I live in Lisbon.", "The weather is fine.", "I moved to Trondheim.", "我的猫叫咪咪。", "我的猫现在叫团子。"):
        memory.add("user", text)
    both = memory.context("Where do I live?", 500, characters)
    assert both.index("Trondheim") < both.index("Lisbon")
    one = memory.context("Where do I live?", len("What I told you before (newest first):\n- I moved to Trondheim."), characters)
    assert "Trondheim" in one and "Lisbon" not in one
    assert "团子" in memory.retrieve("我的猫叫什么名字？", 1)[0].text
    assert {m.text for m in memory.list() if m.replaced} == {"I live in Lisbon.", "我的猫叫咪咪。"}
    memory.forget(next(m.id for m in memory.list() if "Trondheim" in m.text))
    assert not next(m for m in memory.list() if "Lisbon" in m.text).replaced
    memory.add("user", "I live in Lisbon.")  # said again: it is the newest now, and there once
    assert [m.text for m in memory.list() if "Lisbon" in m.text] == ["I live in Lisbon."] and "Lisbon" in memory.list()[0].text


def test_context_keeps_to_its_budget(search):  # noqa: F811
    """Guards: a prompt that outgrows the context by a header or a line; lines the model sees already."""
    memory = told(ConversationMemory(":memory:", capacity=40))
    for question, _ in QUESTIONS:
        for budget in random.sample(range(0, 400), 8):
            assert characters(memory.context(question, budget, characters)) <= budget
    assert "Marlene" not in memory.context("What is my name?", 300, characters, shown=[FACTS[1]])
    memory.add("user", "We talked about many things. " * 20 + "The code of my bicycle lock is 4711. " + "It rained a lot. " * 20)
    assert "4711" in memory.context("What is the code of my bicycle lock?", 120, characters)


def test_what_the_assistant_said_is_marked_as_such():
    """Guards: the model's own inventions handed back to it as the user's words."""
    memory = ConversationMemory(":memory:")
    memory.add("assistant", "I recommend the film about the lighthouse.")
    assert "- you said: I recommend" in memory.context("Which film did you recommend?", 200, characters)
    small = ConversationMemory(":memory:", capacity=4)
    for number in range(12):
        small.add("assistant", f"My name is Robot {number}.")
        small.add("user", f"The number {number} is odd or even.")
    assert not any("Robot" in memory.text for memory in small.list() if memory.role == "summary")


def test_the_least_important_and_oldest_go_first():
    """Guards: compression that takes the newest messages, or the facts before the small talk."""
    memory = ConversationMemory(":memory:", capacity=8)
    memory.add("user", "My name is Marlene.")
    for number in range(3):
        memory.add("user", f"Birds number {number} sang.")
    for text in ("ok", "Thanks!", "What is a comet?", "Hello!", "The last one was nice."):
        memory.add("user", text)
    texts = [m.text for m in memory.list()]
    assert texts[0] == "The last one was nice." and "My name is Marlene." in texts and "ok" not in texts and "Thanks!" not in texts
    assert not any("Thanks" in text for text in texts)


def test_capacity_holds_however_small():
    """Guards: a memory that grows without end, or an endless compression, where everything is important."""
    for capacity in (2, 3, 11):
        memory = ConversationMemory(":memory:", capacity=capacity)
        for number in range(25):
            memory.add("user", f"My favourite plant{number} is fern{number}.")
            assert len(memory.list()) <= capacity
            assert all(len(m.text) <= 4000 for m in memory.list())
    for wrong in (1, 2.5, True, "9"):
        with pytest.raises(ValueError, match=f"capacity of {wrong!r}"):
            ConversationMemory(":memory:", capacity=wrong)


def test_a_model_may_write_the_summaries():
    """Guards: facts that a model's summary leaves out, lost; its text taken for the user's."""
    asked = []

    def summarise(texts):
        asked.extend(texts)
        return "The user\nlikes to talk."

    memory = ConversationMemory(":memory:", capacity=6, summarise=summarise)
    memory.add("user", "I am allergic to peanuts.")
    for number in range(12):
        memory.add("user", f"Please remember that locker {number} is blue.")
    summary = [m.text for m in memory.list() if m.role == "summary"]
    assert asked and summary and "The user likes to talk." in summary[0].splitlines()
    assert "peanuts" in memory.context("Which food am I allergic to?", 300, characters)


def test_what_was_erased_meanwhile_stays_erased():
    """Guards: a summary that brings back what its user erased while it was written."""
    memory = ConversationMemory(":memory:", capacity=4, summarise=lambda texts: f"{memory.erase()} {texts}")
    for number in range(6):
        memory.add("user", f"My secret{number} is pear{number}.")
    assert not any("pear0" in m.text for m in memory.list())


def test_vectors_add_to_the_words_and_are_kept(tmp_path):
    """Guards: vectors worked out again at every start; vectors of one model compared with another's; noise taken for meaning."""
    calls = []

    class Embed:
        def __init__(self, name):
            self.name = name

        def __call__(self, texts):
            calls.append(list(texts))
            rng = np.random.default_rng(3)
            noise = rng.normal(size=(len(texts), 64)) * 0.2
            meaning = np.array([["feline" in text or "cat" in text for text in texts]]).T * np.ones(64)
            return noise + meaning

    path = tmp_path / "memory.sqlite"
    memory = ConversationMemory(path, embed=Embed("a"))
    for number in range(30):
        memory.add("user", f"Stone number {number} lies in the river.")
    memory.add("user", "We keep a cat.")
    assert memory.retrieve("feline company")[0].text == "We keep a cat."
    assert ConversationMemory(path).retrieve("feline company") == []
    calls.clear()
    again = ConversationMemory(path, embed=Embed("a"))
    assert again.retrieve("feline company")[0].text == "We keep a cat." and calls == [["feline company"]]
    other = ConversationMemory(path, embed=Embed("b"))
    other.retrieve("feline company")
    assert sum(len(call) for call in calls) == 1 + 31 + 1
    again.edit(again.list()[0].id, "We keep a dog.")
    again.retrieve("feline company")
    assert any("We keep a dog." in call for call in calls)
    with pytest.raises(ValueError, match="one vector for each text"):
        ConversationMemory(path, embed=lambda texts: np.zeros(4)).retrieve("anything at all")


def test_the_model_embeds_and_summarises(model, tokenizer):
    """Guards: padding that leaks into the vectors, an empty text that breaks them, a summary longer than the context allows."""
    embed = model_embedder(Engine(model, tokenizer))
    texts = ["The little fox runs.", "你好，很高兴见到你。", "", "One word more " * 200]
    together = embed(texts)
    assert together.shape == (4, 32) and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([embed([text]) for text in texts])
    assert np.allclose(together, alone, atol=1e-4)
    with torch.no_grad():
        states = model.hidden_states(torch.tensor([tokenizer.encode(texts[0])]))[0].mean(dim=0).numpy()
    expected = states - embed._common
    assert np.allclose(together[0], expected / np.linalg.norm(expected), atol=1e-4)
    memory = ConversationMemory(":memory:", capacity=5, embed=embed, summarise=model_summariser(Engine(model, tokenizer), 8))
    for number in range(9):
        memory.add("user", f"My boat{number} is called Heron{number}. {'It sails. ' * 60}")
    assert memory.retrieve("boat")
    with pytest.raises(ValueError, match="tokenizer"):
        model_embedder(Engine(model))


def test_a_turn_that_is_taken_back():
    """Guards: what a turn left in the memory, and what was there before it: that stays, also when the turn repeats it."""
    memory, turns = ConversationMemory(":memory:"), TurnMemory()
    turns.add(memory, 1, "I live in Lisbon.", "Nice!")
    turns.add(memory, 2, "My cat is called Tom.", "")
    turns.add(memory, 3, "I live in Lisbon.", "You said so.")
    turns.forget(memory, 3)
    assert [m.text for m in memory.list()] == ["I live in Lisbon.", "My cat is called Tom.", "Nice!"]
    turns.forget(memory, 1)
    assert memory.list() == []
    turns.forget(None, 1)


def test_bad_input_is_named():
    """Guards: a role or a profile that is stored and never found again."""
    memory = ConversationMemory(":memory:")
    with pytest.raises(ValueError, match="role 'system'"):
        memory.add("system", "x")
    assert memory.add("user", "  ") is None
    broken = memory.add("user", "My name is Ada \udcff.")  # a byte of another encoding, as a terminal passes it on
    assert broken is not None and broken.text == "My name is Ada ?."
    assert memory.edit(broken.id, "It is Eve \ud83d.").text == "It is Eve ?." and memory.context("Who is Eve \ud83d?", 99, characters)
    memory.erase()
    for name in ("", " ", "x" * 65, "a\nb"):
        with pytest.raises(ValueError, match="profile name"):
            ConversationMemory(":memory:", profile=name)
    with pytest.raises(ValueError, match="no memory 7"):
        memory.forget(7)
    number = memory.add("user", "The sky is blue.").id
    with pytest.raises(ValueError, match="forget it instead"):
        memory.edit(number, " ")
    assert memory.edit(number, "My name is Ada.").importance == 0.9
    assert memory.list(topic="name")[0].text == "My name is Ada."
