"""Guessing tokens from repetitions never changes a reply, and saves passes of the model."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from generate_helpers import assert_same_greedy

from inference.engine import Engine, PromptCache
from inference.sampling import SamplingSettings
from inference.speculative import Lookup

WINDOWS = {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL"}
SHAPES = [{}, WINDOWS, {**WINDOWS, "window_pattern": "S"}, {"use_reasoning": True, "reasoning_steps": 3}]
GREEDY = SamplingSettings(temperature=0, max_new_tokens=60, eos_token_id=[])
SAMPLED = dataclasses.replace(GREEDY, temperature=0.4, top_k=3)


@pytest.fixture
def lookups(monkeypatch):
    """Every Lookup that the engine makes."""
    made = []
    original = Lookup.__init__

    def noted(self, *arguments):
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Lookup, "__init__", noted)
    return made


def prompt_of(seed):
    return [random.Random(seed).randrange(97) for _ in range(6)] * 3


def replies(engine, prompt, settings):
    """From generate and from stream."""
    stream = engine.stream(prompt, settings, PromptCache())
    return engine.generate([prompt], settings)[0][0].ids, [token for piece in stream for token in piece.ids]


@pytest.mark.parametrize("shape", SHAPES, ids=["full", "windows", "windows only", "reasoning head"])
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.2, "min_new_tokens": 20, "eos_token_id": [3, 5, 7, 9]}])
def test_greedy_replies_are_those_of_plain_decoding(shape, penalties, make_model, seed, lookups):
    """Guards: rejected guesses that stay in the cache, accepted ones at another position or with another token's logits."""
    model = make_model(seed=seed, std=0.15, **shape)
    prompt, settings = prompt_of(seed), dataclasses.replace(GREEDY, **penalties)
    plain = Engine(model).generate([prompt], settings)[0][0].ids
    for ids in replies(Engine(model), prompt, dataclasses.replace(settings, lookup=6)):
        assert_same_greedy(model, prompt, ids, plain, settings)
    assert len(lookups) == 2 and all(lookup.passes + lookup.accepted == len(ids) - 1 for lookup in lookups)


@pytest.mark.parametrize("shape", SHAPES, ids=["full", "windows", "windows only", "reasoning head"])
def test_samples_are_those_of_plain_decoding(shape, make_model, seed, lookups):
    """Guards: a random number drawn for a guess, which changes the distribution of what follows."""
    engine = Engine(make_model(seed=seed, std=0.15, **shape))
    prompt, settings = prompt_of(seed), dataclasses.replace(SAMPLED, seed=seed)
    plain = engine.generate([prompt], settings)[0][0].ids
    assert replies(engine, prompt, dataclasses.replace(settings, lookup=6)) == (plain, plain)
    unseeded = dataclasses.replace(SAMPLED, lookup=6)
    for _ in range(2):
        torch.manual_seed(seed)  # without a seed, the global generator is drawn from in the same way
        assert engine.generate([prompt], unseeded)[0][0].ids == plain
    assert sum(lookup.accepted for lookup in lookups) > 0


def test_a_repetitive_reply_takes_few_passes(make_model, lookups):
    """Guards: guesses that are never found, or never right."""
    engine = Engine(make_model(std=0.15))
    with torch.no_grad():
        engine.model.embed_tokens.weight.zero_()  # always the same token
        engine.model.embed_tokens.weight[7].fill_(1.0)
    engine.generate([[1, 2, 3]], dataclasses.replace(GREEDY, lookup=8))
    assert lookups[0].passes < 15 and lookups[0].accepted > 45


def test_a_stream_that_is_left_leaves_a_usable_cache(make_model, seed):
    """Guards: open guesses that the next turn takes for tokens of the conversation."""
    model = make_model(seed=seed, std=0.15)
    engine, held = Engine(model), PromptCache()
    settings = dataclasses.replace(GREEDY, lookup=6)
    prompt = prompt_of(seed)
    for left_after in (3, 7, 11, 12, 13):
        stream = engine.stream(prompt, settings, held)
        said = [next(stream).ids[0] for _ in range(left_after)]
        stream.close()
        prompt = [*prompt, *said, 9]
        ids = [token for piece in engine.stream(prompt, settings, held) for token in piece.ids]
        assert held.reused >= len(prompt) - 2
        assert_same_greedy(model, prompt, ids, Engine(model).generate([prompt], GREEDY)[0][0].ids, GREEDY)


def test_guesses_end_where_the_context_does(make_model, seed):
    """Guards: a guess that does not fit into the cache."""
    model = make_model(seed=seed, std=0.15, max_position_embeddings=32)
    prompt = prompt_of(seed)
    plain = Engine(model).generate([prompt], GREEDY)[0][0]
    guessed = Engine(model).generate([prompt], dataclasses.replace(GREEDY, lookup=20))[0][0]
    assert_same_greedy(model, prompt, guessed.ids, plain.ids, GREEDY)
    assert guessed.finish_reason == "length" and len(guessed.ids) == 14


def test_several_replies_are_not_guessed(make_model, lookups):
    """Guards: guesses for one row that are fed to all."""
    engine = Engine(make_model())
    settings = dataclasses.replace(GREEDY, lookup=6)
    prompts = [prompt_of(1), prompt_of(2)]
    together = [row[0].ids for row in engine.generate(prompts, settings)]
    assert not lookups
    assert together == [row[0].ids for row in engine.generate(prompts, GREEDY)]


def test_wrong_values_are_explained():
    with pytest.raises(ValueError, match="lookup must be a whole number"):
        SamplingSettings(lookup=-1)
