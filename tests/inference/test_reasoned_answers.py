"""Votes, confidence, and solving in steps: with scripted replies, and with random models."""

from __future__ import annotations

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.engine import Completion, Engine
from inference.markdown import cell_width
from inference.reasoning import MultiStepReasoning, ReasoningPath, ReasoningStep, Sample, generate_with_reasoning, read_plan, vote
from inference.reasoning_view import wrap
from inference.sampling import SamplingSettings
from inference.text import ReplyText, starts_in_reasoning
from inference.thinking import Call


class ScriptedEngine:
    """Says what it is told, one text per sample; notes what it was asked."""

    def __init__(self, tokenizer, *texts, context=4096):
        self.tokenizer, self.context, self.texts = tokenizer, context, list(texts)
        self.model, self.asked = SimpleNamespace(reasoning=None), []

    def end_tokens(self, settings):
        return tuple(self.tokenizer.stop_ids)

    def generate(self, prompts, settings):
        self.asked.append((self.tokenizer.decode(prompts[0], skip_special_tokens=False), settings))
        return [[self.reply(prompts[0], self.texts.pop(0)) for _ in range(settings.n)]]

    def reply(self, prompt, text):
        """A text that ends with "…" was cut off; "@0.5" at the end is the probability of every token."""
        text, _, chance = text.partition("@")
        cut = text.endswith("…")
        ids = self.tokenizer.encode(text.rstrip("…"), parse_special=True) + [self.tokenizer.eos_token_id] * (not cut)
        shown = ReplyText(self.tokenizer, reasoning=starts_in_reasoning(self.tokenizer, prompt))
        for token in ids:
            shown.push(token)
        shown.finish()
        return Completion(ids, shown.text, shown.reasoning, "length" if cut else "stop", [math.log(float(chance or 0.9))] * len(ids))


def test_votes_count_values_not_letters(tokenizer):
    """Guards self-consistency: numbers that are equal, whatever they look like, vote together; the likeliest of them is shown."""
    texts = ["a\n</think>\n\n0.5@0.6", "b\n</think>\n\n1/2@0.9", "c\n</think>\n\n3@0.99", "d\n</think>\n\nThe answer is 50%.@0.5", "e…"]
    engine = ScriptedEngine(tokenizer, *texts)
    result = generate_with_reasoning(engine, "how much?", samples=5)
    assert (result.answer, result.thinking, result.result) == ("1/2", "b", "1/2")
    assert [(v.result, v.count, v.share) for v in result.votes] == [("1/2", 3, 0.6), ("3", 1, 0.2)]
    assert (result.confidence, result.basis, result.finish_reason) == (0.6, "votes", "stop")
    assert [sample.result for sample in result.samples] == ["0.5", "1/2", "3", "50%", None]
    assert engine.asked[0][0].endswith("<think>\n") and engine.asked[0][1].n == 5 and engine.asked[0][1].logprobs


def test_ties_and_samples_without_a_vote():
    """Guards a vote of the sample that was cut off, a tie that goes to the first one, and a result of nothing."""
    tie = [Sample("7", result="7", finish_reason="stop", log_prob=-2.0), Sample("8", result="8", finish_reason="stop", log_prob=-1.0)]
    cut = [Sample("about 9", result="9", finish_reason="length", log_prob=-0.1)] * 3
    chosen, votes = vote([*tie, *cut])
    assert chosen.result == "8" and [(v.result, v.count, v.share) for v in votes] == [("8", 1, 0.2), ("7", 1, 0.2)]
    chosen, votes = vote(cut)
    assert chosen.answer == "about 9" and votes[0].count == 3, "when all were cut off, what there is counts"
    words = [
        Sample(text, finish_reason="stop", log_prob=-n) for n, text in enumerate(("Hello, who are you?!", "Hello. Who are you", "Go away"))
    ]
    assert vote(words)[0] is words[0] and [v.count for v in vote(words)[1]] == [2, 1]
    zeros = [Sample(text, result=text, finish_reason="stop") for text in ("0", "0.0", "-0")]
    assert vote(zeros)[1][0].count == 3
    assert vote([Sample("", log_prob=-3.0), Sample("", log_prob=-1.0)]) == (Sample("", log_prob=-1.0), [])


def test_confidence_of_one_reply_by_hand(tokenizer, model):
    """Guards which tokens count: those of the answer, without the end and the blank lines, by their probability in the plain model."""
    engine = Engine(model, tokenizer)
    for thinking in (True, False):
        result = generate_with_reasoning(engine, "你好", thinking=thinking, budget=5, settings=SamplingSettings(40, 1.3, seed=1))
        (sample,) = result.samples
        prompt = engine.tokenizer.render([{"role": "user", "content": "你好"}], add_generation_prompt=True, enable_thinking=thinking).ids
        prompt += tokenizer.encode("<think>\n", parse_special=True) if thinking else []
        closing = tokenizer.token_id("</think>")
        start = len(sample.ids) - sample.ids[::-1].index(closing) if closing in sample.ids else 0
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + sample.ids])).logits[0].double().log_softmax(-1)
        places = [p for p in range(start, len(sample.ids)) if tokenizer.decode([sample.ids[p]]).strip()]
        places = [p for p in places if sample.ids[p] not in tokenizer.stop_ids]
        expected = math.exp(sum(float(logprobs[len(prompt) + p - 1, sample.ids[p]]) for p in places) / len(places))
        assert result.confidence == pytest.approx(expected, rel=1e-3) and result.basis == "probability" and not result.votes
        assert result.prompt_tokens == len(prompt) and result.completion_tokens == len(sample.ids)


def test_confidence_of_a_reasoning_head(tokenizer, make_model):
    """Guards the place that the head's estimate is read at, and a model that is left in another mode."""
    model = make_model(tokenizer, use_reasoning=True, reasoning_steps=2)
    torch.nn.init.normal_(model.reasoning.confidence.out.weight)
    model.train()
    result = generate_with_reasoning(Engine(model, tokenizer), "hi", thinking=False, settings=SamplingSettings(6, 0.0, eos_token_id=[]))
    assert model.training and result.basis == "reasoning head"
    (sample,) = result.samples
    prompt = tokenizer.render([{"role": "user", "content": "hi"}], add_generation_prompt=True, enable_thinking=False).ids
    with torch.no_grad():
        estimates = model.eval()(torch.tensor([prompt + sample.ids])).confidence[0].double()
    places = [p for p in range(len(sample.ids)) if tokenizer.decode([sample.ids[p]]).strip()]
    expected = math.exp(sum(math.log(float(estimates[len(prompt) + p - 1])) for p in places) / len(places))
    assert result.confidence == pytest.approx(expected, rel=1e-4)


def test_calls_are_recorded_and_off_by_default(tokenizer):
    """Guards the record of what the calculator did, against what stands in the thinking."""
    text = "so 12 * 3 = 36. good\n</think>\n\n36"
    on = generate_with_reasoning(ScriptedEngine(tokenizer, text), "?", calculator=True)
    assert on.calls == [Call("12 * 3", "36")] and on.answer == "36" and on.thinking == "so 12 * 3 = 36. good"
    off = ScriptedEngine(tokenizer, text)
    assert generate_with_reasoning(off, "?").calls == [] and off.asked[0][1].grammar is None


def test_bad_values(tokenizer, model):
    """Guards mistakes that would pass for an answer: each is named with what to do."""
    engine = Engine(model, tokenizer)
    cases: list[tuple[str, dict]] = [
        ("samples must be", {"samples": 0}),
        ("samples must be", {"samples": 2.0}),
        ("temperature 0 would all be the same", {"samples": 3, "settings": SamplingSettings(temperature=0.0)}),
        ("say samples=3", {"settings": SamplingSettings(n=3)}),
        ("budget must be", {"budget": "many"}),
        ("message 1 needs a role", {"messages": [{"role": "king", "content": "hi"}]}),
        ("message 2 .user. needs a content", {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": None}]}),
        ("list of messages, got int", {"messages": 5}),
    ]
    for message, options in cases:
        with pytest.raises(ValueError, match=message):
            generate_with_reasoning(engine, **{"messages": "hi", **options})
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate_with_reasoning(Engine(model), "hi")


def test_a_model_answers_by_itself(tokenizer, model):
    """Guards `model.generate_with_reasoning`: the same as the function, samples and all."""
    options = {"samples": 3, "budget": 4, "settings": SamplingSettings(30, seed=5)}
    ours = model.generate_with_reasoning([{"role": "user", "content": "hi"}], tokenizer, **options)
    same = generate_with_reasoning(Engine(model, tokenizer), "hi", **options)
    assert ours.samples == same.samples and len(ours.samples) == 3 and ours.votes == same.votes


# ------------------------------------------------------------------------------------------------- several steps


def test_steps_know_what_was_found(tokenizer):
    """Guards the path: every step is told the results before it, and the confidences multiply."""
    plan = "Sure!\n1. Add the apples\n2) Take **two** away\n2) Take **two** away\n- Look at the rest\n"
    engine = ScriptedEngine(tokenizer, plan, "3 + 4 = 7@0.5", "5@0.8", "5 are left@0.5", "The answer is 5.@0.9")
    told: list[ReasoningStep] = []
    path = MultiStepReasoning(engine).solve("Tom has 3 apples, gets 4 and gives 2 away. How many are left?", told.append)
    assert told == path.steps
    assert [step.title for step in path.steps] == ["Add the apples", "Take **two** away", "Look at the rest"]
    assert [step.result for step in path.steps] == ["3 + 4 = 7", "5", "5 are left"] and path.answer == "The answer is 5."
    assert path.planned and path.confidence == pytest.approx(0.5 * 0.8 * 0.5 * 0.9) and path.answer_confidence == pytest.approx(0.9)
    asked = [text for text, _ in engine.asked]
    assert "What is known" not in asked[1] and "1. Add the apples → 3 + 4 = 7\n\nNow" in asked[2] and "2. Take **two** away → 5" in asked[4]
    text = path.text()
    assert text.splitlines()[1].startswith("├─ 1. Add the apples") and "└─ Answer: The answer is 5. (confidence 90%)" in text
    assert json.loads(json.dumps(path.to_dict()))["steps"][0]["result"] == "3 + 4 = 7"


def test_without_a_plan_in_one_step(tokenizer):
    """Guards a small model's chatter being taken for a plan, in Chinese; the path says so."""
    engine = ScriptedEngine(tokenizer, "我不知道。1. 你好", "3 + 4 =\n</think>\n\n答案是 7。@0.5")
    path = MultiStepReasoning(engine, thinking=True).solve("三加四等于几？")
    assert not path.planned and path.language == "zh" and len(engine.asked) == 2 and len(path.steps) == 1
    assert path.answer == "答案是 7。" and path.confidence == path.answer_confidence == pytest.approx(0.5)
    assert "模型没有给出分步计划" in path.text() and "思考：3 + 4 =" in path.text() and "gave no plan" in path.text("en")
    with pytest.raises(ValueError, match="empty"):
        MultiStepReasoning(engine).solve("  ")
    with pytest.raises(ValueError, match="zh, en or None"):
        MultiStepReasoning(engine, language="fr")


def test_plans_in_many_forms():
    """Guards the forms in which models number their steps, and lines that are none."""
    assert read_plan("步骤一：先加\n步骤二：再减") == ["先加", "再减"]
    assert read_plan("第1步：先加\n第二步，再减") == ["先加", "再减"]
    assert read_plan("① 先加\n② 再减") == ["先加", "再减"] == read_plan("一、先加\n二、再减") == read_plan("**1. 先加**\n**2. 再减**")
    assert read_plan("Step 1: add\nstep 2: take") == ["add", "take"] == read_plan("(1) add\n(2) take")
    assert read_plan("3.5 + 2 = 5.5\n2.5 * 2 = 5") == read_plan("10:30 meet\n11:30 eat") == [], "numbers are no numbering"
    assert read_plan("1. What is 2+2?\n2. add", "What is 2+2?") == read_plan("3.5 + 2 = 5.5\n4 apples") == read_plan("1. only one") == []


def test_a_small_context_drops_the_oldest_results(tokenizer, model):
    """Guards a long path that no longer fits: the prompt is shortened, not refused."""
    plan = "\n".join(f"{n}. part {n}" for n in range(1, 7))
    engine = ScriptedEngine(tokenizer, plan, *["many words " * 20 for _ in range(7)], context=600)
    path = MultiStepReasoning(engine).solve("What is all that?")
    assert len(path.steps) == 6
    last = engine.asked[-1][0]
    assert "6. part 6" in last and "1. part 1" not in last and all(len(tokenizer.encode(text)) < 600 for text, _ in engine.asked)
    random = MultiStepReasoning(Engine(model, tokenizer), settings=SamplingSettings(12, seed=0), budget=None).solve("hello?")
    assert isinstance(random.text(), str) and random.seconds > 0


def test_plans_are_made_without_thinking(tokenizer):
    """Guards a model that uses up the tokens of its plan by thinking, and a budget of the steps that the plan has no room for."""
    engine = ScriptedEngine(tokenizer, "1. add\n2. take", "x\n</think>\n\n1", "y\n</think>\n\n2", "z\n</think>\n\n3")
    path = MultiStepReasoning(engine, thinking=True, budget=600).solve("1 + 1?")
    assert [text.endswith("<think>\n\n</think>\n\n") for text, _ in engine.asked] == [True, False, False, False]
    assert path.answer == "3" and [step.thinking for step in path.steps] == ["x", "y"]


# ------------------------------------------------------------------------------------------------- for people


@settings(max_examples=150, deadline=None)
@given(st.text(st.one_of(st.characters(categories=["L", "Nd", "P"]), st.sampled_from(" \n你好，。")), max_size=120), st.integers(4, 60))
def test_wrapping_keeps_width_and_words(text: str, width: int) -> None:
    """Guards lines that are too wide by a full stop's two columns at most, and characters that are lost."""
    lines = wrap(text, width)
    assert all(cell_width(line) <= width + 2 for line in [*lines, *wrap(text + "。" * 40, width)])
    assert "".join("".join(lines).split()) == "".join(text.split())


def a_path(**more) -> ReasoningPath:
    steps = [
        ReasoningStep("先把 $3 和 $4 加起来", "一共 7 元" * 9, 0.9, "3 + 4 = 7 " * 60, [Call("3 + 4", "7")]),
        ReasoningStep("减去 2", "", 0.2),
    ]
    return ReasoningPath(
        "小明有 3 元，又得到 4 元，花了 2 元，还剩多少？", steps, "还剩 5 元。", 0.17, answer_confidence=0.95, language="zh", **more
    )


def test_tree_is_indented_and_narrow():
    """Guards a tree that is wider than the terminal, or loses a branch in a wrapped line."""
    for language in ("zh", "en"):
        lines = a_path().text(language, 50).splitlines()
        assert max(map(cell_width, lines)) <= 52 and sum(line[0] in "├└" for line in lines) == 3
    assert lines[-1].startswith("   ") and "confidence of the whole path: 17%" in lines[-1] and any("…" in line for line in lines)
    assert any("3 + 4 = 7" in line and "calculator" in line for line in lines)


def test_picture(tmp_path):
    """Guards a picture that is empty, that needs a screen, or that fails where no font has Chinese characters."""
    pytest.importorskip("matplotlib")
    from matplotlib import image

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = a_path().picture(tmp_path / "path.png")
        a_path(planned=False).picture(tmp_path / "path.svg", "en")
    assert all("no installed font has Chinese" in str(warning.message) for warning in caught)
    pixels = image.imread(file)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels[..., :3].std() > 0.02
    assert (tmp_path / "path.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match="nonsense"):
        ReasoningPath("?", [], "1", 1.0).picture(tmp_path / "path.nonsense")
