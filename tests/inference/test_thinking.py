"""Guided thinking: the budget, the calculator, and the rendering that opens and closes it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from inference.calculator import read_number
from inference.engine import Engine
from inference.rendering import render_prompt, thinking_end
from inference.sampling import SamplingSettings
from inference.text import starts_in_reasoning
from inference.thinking import LEAST_ANSWER, LONGEST_CHARACTER, LONGEST_NUMBER, ThinkingGuide, ThinkingMatcher, guided, replayed

QUESTION = [{"role": "user", "content": "3 + 4 = ?"}]


@pytest.fixture
def prompt(tokenizer):
    return render_prompt(tokenizer, QUESTION, True)


def write(matcher: ThinkingMatcher, tokens: Iterator[int], most: int = 400) -> list[int]:
    """What a model says that wants to say `tokens`: each of them where it is allowed, and else what is."""
    said: list[int] = []
    while len(said) < most and not matcher.finished:
        allowed = matcher.mask()
        if int(allowed.sum()) == 1:
            token = int(allowed.nonzero())
        else:
            token = next((token for token in tokens if allowed[token]), -1)
            if token < 0:
                break
        matcher.take(token)
        said.append(token)
    return said


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "thought", ["一加一等于二，二加二等于四。你好，今天天气很好。", "The little fox runs through the forest and sings. "]
)
@pytest.mark.parametrize("budget", [0, 1, 4, 9])
def test_budget_closes_the_thinking_as_the_template_does(tokenizer, prompt, thought, budget):
    """Guards a limit that is not kept, characters that are cut in half, and a closing that the model never saw in training."""
    guide = ThinkingGuide("", "thinking", budget=budget)
    end = tokenizer.eos_token_id
    matcher = guide.matcher(tokenizer, prompt)
    said = write(matcher, iter([*tokenizer.encode(thought * 4), end]), most=budget + 20)
    closing = tokenizer.token_id("</think>")
    place = said.index(closing)
    thinking = text_of(tokenizer, said[:place]).removesuffix("\n")
    assert budget <= matcher.thinking_tokens < budget + LONGEST_CHARACTER and matcher.cut and not matcher.thinking
    assert (thought * 4).startswith(thinking)
    answer = text_of(tokenizer, said[matcher.answer_start :]).lstrip("\n")
    rendered = tokenizer.render([*QUESTION, {"role": "assistant", "reasoning_content": thinking, "content": answer}])
    assert rendered.text.startswith(text_of(tokenizer, [*prompt, *said]))


@pytest.mark.parametrize("budget", range(1, 12))
def test_budget_cuts_no_number(tokenizer, prompt, budget):
    """Guards 8 + 8 = 1, where the 6 no longer fitted: the answer would be wrong although the thinking was right."""
    thought = "37+45=82, 123456+1=123457."
    matcher = ThinkingGuide("", "thinking", budget=budget).matcher(tokenizer, prompt)
    said: list[int] = []
    for token in tokenizer.encode(thought):
        if not matcher.mask()[token]:
            break
        matcher.take(token)
        said.append(token)
    thinking = text_of(tokenizer, said)
    assert len(said) >= budget and not (thinking[-1].isdigit() and thought[len(thinking)].isdigit())
    while matcher.thinking:
        allowed = matcher.mask().nonzero()[:, 0].tolist()
        matcher.take(next(token for token in allowed if not tokenizer.token_bytes(token)[:1].isdigit()))
    assert matcher.cut and matcher.thinking_tokens == len(said) and all(matcher.own[: len(said)]) and not any(matcher.own[len(said) :])


def test_a_number_without_end_is_cut(tokenizer, prompt):
    """Guards a budget that a model gets round by counting digits, or by tokens that are no text."""
    for token in (tokenizer.encode("1")[0], tokenizer.token_id("<|im_start|>")):
        matcher = ThinkingGuide("", "thinking", budget=5).matcher(tokenizer, prompt)
        write(matcher, iter([token] * 50), most=50)
        assert matcher.cut and not matcher.thinking and 5 <= matcher.thinking_tokens <= 5 + LONGEST_NUMBER


def test_thinking_that_ends_in_time_is_left_alone(tokenizer, prompt):
    """Guards a second closing, and a limit that also counts the answer."""
    matcher = ThinkingGuide("", "thinking", budget=30).matcher(tokenizer, prompt)
    wanted = tokenizer.encode("Hello\n</think>\n\n" + "How are you today? " * 6 + "<|im_end|>", parse_special=True)
    assert write(matcher, iter(wanted)) == wanted and matcher.finished and not matcher.cut and all(matcher.own)
    assert text_of(tokenizer, wanted[matcher.answer_start :]).startswith("\n\nHow")


def test_no_reply_ends_inside_a_limited_thinking(tokenizer, prompt):
    """Guards an empty answer: with a limit, the end of the reply has to wait for the end of the thinking."""
    limited, free = (ThinkingGuide("", "thinking", budget=budget).matcher(tokenizer, prompt) for budget in (5, None))
    ends = tokenizer.stop_ids
    assert not limited.mask()[ends].any() and free.mask().all()
    write(limited, iter(tokenizer.encode("a b c d e f g h i j k")), most=10)
    assert limited.mask()[ends].all()


def test_calculator_writes_the_value_and_nothing_more(tokenizer, prompt):
    """Guards a value that is wrong, spaced otherwise than the expression, or goes on with the digits that the model wanted."""
    for spaced in (True, False):
        left, sign, right = random.randrange(10, 99), random.choice("+-*"), random.randrange(10, 99)
        space = " " * spaced
        matcher = ThinkingGuide("", "thinking", calculator=True).matcher(tokenizer, prompt)
        said = write(matcher, iter(tokenizer.encode(f"so {left}{space}{sign}{space}{right}{space}=")), most=60)
        text = text_of(tokenizer, said)
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        assert text.endswith(f"{space}={space}{value}"), text
        assert [read_number(call.value) for call in matcher.calls] == [Fraction(value)]
        refused = {token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token)[:1].isdigit()}
        assert refused and set((~matcher.mask()).nonzero()[:, 0].tolist()) == refused
        said += write(matcher, iter(tokenizer.encode(". 5 apples = 5. x + 1 + 2 = 4 </think> 1 + 1 =")), most=80)
        assert text_of(tokenizer, said).endswith(f"{value}. 5 apples = 5. x + 1 + 2 = 4 </think> 1 + 1 = 2"), "an ordinary </think> is text"


def test_calculator_stays_out_of_the_answer(tokenizer, prompt):
    """Guards help after the thinking is over; without any thinking, the answer is where the model works."""
    wanted = tokenizer.encode("1 + 1 = 2\n</think>\n\n1 + 1 = 3", parse_special=True)
    matcher = ThinkingGuide("", "thinking", calculator=True).matcher(tokenizer, prompt)
    assert text_of(tokenizer, write(matcher, iter(tokenizer.encode("1 + 1 =") + wanted[len(tokenizer.encode("1 + 1 = 2")) :]))) == (
        "1 + 1 = 2\n</think>\n\n1 + 1 = 3"
    )
    closed = ThinkingGuide("", "thinking", calculator=True).matcher(tokenizer, render_prompt(tokenizer, QUESTION, False))
    assert text_of(tokenizer, write(closed, iter(tokenizer.encode("1 + 1 =")))) == "1 + 1 = 2" and len(closed.calls) == 1


def test_copies_and_replays_know_the_same(tokenizer, prompt):
    """Guards beams that share what they hold, and a report that disagrees with what happened."""
    settings = SamplingSettings(100, grammar=ThinkingGuide("", "thinking", budget=14, calculator=True))
    matcher = settings.grammar.matcher(tokenizer, prompt)
    said = write(matcher, iter(tokenizer.encode("你好 12 * 3 =")), most=9)
    other = matcher.copy()
    said += write(matcher, iter(tokenizer.encode(" and more, and more, and more") + [tokenizer.eos_token_id]))
    assert len(other.own) == 9 and other.thinking and not other.cut and matcher.finished
    again = replayed(settings, tokenizer, prompt, said, tokenizer.stop_ids)
    for name in ("own", "calls", "cut", "thinking_tokens", "answer_start", "finished"):
        assert getattr(again, name) == getattr(matcher, name)
    assert not all(again.own) and [call.value for call in again.calls] == ["36"] * len(again.calls)
    plain = replayed(SamplingSettings(), tokenizer, prompt, said, tokenizer.stop_ids)
    assert all(plain.own) and not plain.calls and plain.answer_start == matcher.answer_start


def test_an_answer_of_a_given_form_follows_the_thinking(tokenizer, prompt):
    """Guards a budget or a calculator that breaks the grammar of the answer."""
    pytest.importorskip("llguidance")
    from inference.grammar import Grammar

    guide = ThinkingGuide("", "thinking", budget=6, calculator=True, answer=Grammar.choice(["1 + 1 = 3", "no"]))
    wanted = [*tokenizer.encode("Hello! How are you today? print hello 1 + 1 = 3"), tokenizer.eos_token_id]
    matcher = guide.matcher(tokenizer, prompt)
    said = write(matcher, iter(wanted), most=60)
    assert matcher.finished and text_of(tokenizer, said[matcher.answer_start :]).strip("\n") in ("1 + 1 = 3<|im_end|>", "no<|im_end|>")


def test_settings_that_guide(tokenizer, model):
    """Guards a cost where nothing is asked for, and thinking that leaves no room for an answer."""
    engine, settings = Engine(model, tokenizer), SamplingSettings(64)
    assert guided(settings, engine, [1, 2, 3]) is settings
    for budget in (-1, 2.5, True, "9"):
        with pytest.raises(ValueError, match="budget must be a whole number"):
            guided(settings, engine, [1], budget)  # type: ignore[arg-type]
    close = [5] * (engine.context - LEAST_ANSWER - 10)
    for prompt, budget, most in (([1], 60, 64 - LEAST_ANSWER), ([1], 9, 9), ([1], 0, 0), (close, 30, 9), (close * 2, 30, 0)):
        grammar = guided(settings, engine, prompt, budget).grammar
        assert isinstance(grammar, ThinkingGuide) and grammar.budget is not None and most - 5 <= grammar.budget <= most


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_and_streams_keep_the_budget(tokenizer, model, prompt, temperature):
    """Guards the engine's side: every sample of a batch is guided by itself, and a stream is guided like a batch."""
    engine = Engine(model, tokenizer)
    n = 3 if temperature else 1
    settings = guided(SamplingSettings(40, temperature, seed=3, n=n, logprobs=True), engine, prompt, budget=7)
    closing = tokenizer.token_id("</think>")
    replies = engine.generate([prompt, prompt[:-2] + prompt], settings)
    for given, group in zip((prompt, prompt[:-2] + prompt), replies, strict=True):
        assert len(group) == n
        for reply in group:
            state = replayed(settings, tokenizer, given, reply.ids, tokenizer.stop_ids)
            assert 7 <= state.thinking_tokens <= 7 + LONGEST_NUMBER and closing in reply.ids[: state.thinking_tokens + 2]
            assert reply.logprobs is not None and len(reply.logprobs) == len(reply.ids)
    if n == 1:
        alone = SamplingSettings(40, temperature, seed=3, grammar=settings.grammar)
        pieces = list(engine.stream(prompt, alone))
        assert [token for piece in pieces for token in piece.ids] == replies[0][0].ids
        assert "".join(piece.text for piece in pieces if piece.channel == "answer") == replies[0][0].text


def test_rendering(tokenizer):
    """Guards the three ways to begin an answer, and a template's own closing."""
    ends = {None: "<|im_start|>assistant\n", True: "<|im_start|>assistant\n<think>\n", False: "<think>\n\n</think>\n\n"}
    for thinking, end in ends.items():
        ids = render_prompt(tokenizer, QUESTION, thinking)
        assert text_of(tokenizer, ids).endswith(end) and starts_in_reasoning(tokenizer, ids) == bool(thinking)
    assert thinking_end(tokenizer) == "\n</think>\n\n"


def test_masks_are_tensors_of_the_vocabulary(tokenizer, prompt):
    """Guards the form that the engine stacks."""
    mask = ThinkingGuide("", "thinking", budget=3).matcher(tokenizer, prompt).mask()
    assert mask.dtype == torch.bool and mask.shape == (tokenizer.vocab_size,)
