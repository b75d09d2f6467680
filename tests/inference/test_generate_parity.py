"""The tokens of `transformers.generate`: greedy, every penalty and filter alone and together, sampled from the same seed.

Set PARITY_MODEL to the folder of a model (such as one from the hub) to compare on that, too.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from generate_helpers import assert_same_greedy, in_transformers

from inference.engine import Engine
from inference.sampling import SamplingSettings
from model import BPETokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "qwen3 windows": {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL"},
    "qwen3_moe": {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 32},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.4},
    "ngrams": {"no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 7, "eos_token_id": list(range(0, 97, 3))},
    "ends": {"eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12]},
    "bias": {"logit_bias": {5: 4.0, 9: -100.0, 11: 2.5}},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "eos_token_id": [3, 5, 8, 13, 21],
        "logit_bias": {5: 3.0, 13: 2.0},
    },
}
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.2},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
}
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def pairs(make_model):
    """pair(shape): a random model and the same one in transformers."""
    made: dict[str, Any] = {}

    def pair(shape):
        if shape not in made:
            model = make_model(seed=random.randrange(2**31), std=0.12, **SHAPES[shape])
            made[shape] = model, in_transformers(model)
        return made[shape]

    return pair


def both(pair, prompt, settings, seed):
    """The reply to a prompt, ours and theirs."""
    model, other = pair
    words = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": not settings.greedy,
        "eos_token_id": list(settings.eos_ids) or None,
        "min_new_tokens": settings.min_new_tokens or None,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
    }
    if settings.logit_bias:
        words["sequence_bias"] = {(token,): bias for token, bias in settings.logit_bias.items()}
    if not settings.greedy:
        words |= {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    ids = torch.tensor([prompt])
    torch.manual_seed(seed)
    theirs = other.generate(ids, attention_mask=torch.ones_like(ids), **words)[0, len(prompt) :].tolist()
    return Engine(model).generate([prompt], settings)[0][0].ids, theirs


def settings_of(**changes):
    return SamplingSettings(**{"max_new_tokens": NEW_TOKENS, "top_k": 0, "top_p": 1.0, "eos_token_id": [], **changes})


def a_prompt(seed):
    return [random.Random(seed).randrange(97) for _ in range(11)]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy(shape, penalty, pairs, seed):
    """Guards: another order of operations, another formula, a prompt that does not count, an end token that ends nothing."""
    settings, prompt = settings_of(temperature=0, **PENALTIES[penalty]), a_prompt(seed)
    ours, theirs = both(pairs(shape), prompt, settings, seed)
    assert_same_greedy(pairs(shape)[0], prompt, ours, theirs, settings)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", ["qwen3", "llama"])
def test_sampled_from_the_same_seed(shape, name, pairs, seed):
    """Guards: a filter before the temperature, ties, another use of random numbers."""
    settings = settings_of(**{"temperature": 1.0, **FILTERS[name]}, seed=seed)
    ours, theirs = both(pairs(shape), a_prompt(seed), settings, seed)
    assert ours == theirs


@pytest.mark.parametrize("case", range(6))
def test_sampled_with_everything_at_random(case, pairs, seed):
    """Guards: settings that only together go wrong."""
    rng = random.Random(seed)
    changes: dict[str, Any] = {"temperature": rng.choice([0.5, 1.0, 1.4])}
    for group in (*list(PENALTIES.values())[1:-1], *list(FILTERS.values())[3:-1]):
        changes |= group if rng.random() < 0.5 else {}
    ours, theirs = both(pairs("qwen3"), a_prompt(seed), settings_of(**changes, seed=seed), seed)
    assert ours == theirs, changes


def test_without_a_seed_the_global_generator_is_drawn_from(pairs, seed):
    """Guards: draws that ignore torch.manual_seed."""
    model, _ = pairs("qwen3")
    ids = torch.tensor([a_prompt(seed)])
    seeded = model.generate(ids, max_new_tokens=NEW_TOKENS, seed=seed)
    torch.manual_seed(seed)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW_TOKENS), seeded)


@pytest.mark.parametrize("text", ["The capital of France is", "一二三四五"])
def test_an_imported_model(text, imported_pair, seed):
    """Guards: what only real weights show, such as their sizes, precision, and several end tokens."""
    tokenizer = BPETokenizer.from_pretrained(os.environ["PARITY_MODEL"])
    prompt, ends = tokenizer.encode(text), list(tokenizer.stop_ids)
    for name, changes in PENALTIES.items():
        settings = settings_of(temperature=0, **{**changes, "eos_token_id": [*ends, *changes.get("eos_token_id", [])]})
        ours, theirs = both(imported_pair, prompt, settings, seed)
        print(name, tokenizer.decode(ours))
        assert_same_greedy(imported_pair[0], prompt, ours, theirs, settings)
    for name, changes in FILTERS.items():
        settings = settings_of(**{"temperature": 1.0, **changes}, eos_token_id=ends, seed=seed)
        ours, theirs = both(imported_pair, prompt, settings, seed)
        assert ours == theirs, name
