"""Beam search: against transformers, against trying everything, and against what its settings promise."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from generate_helpers import in_transformers

from inference.engine import Engine
from inference.grammar import Grammar
from inference.sampling import SamplingSettings

SHAPES = [{}, {"qk_norm": False, "tie_word_embeddings": False}, {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL"}]
CASES = 40


def search(model, prompts, tokenizer=None, **settings):
    return Engine(model, tokenizer).generate(prompts, SamplingSettings(**{"temperature": 0, "eos_token_id": [], **settings}))


def log_prob(model, prompt, ids):
    with torch.no_grad():
        steps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(steps.gather(1, torch.tensor(ids)[:, None]).sum())


def assert_a_random_case_equals_transformers(model, other, rng, case):
    """Ids and scores of a search with random settings, ours and theirs."""
    size = model.config.vocab_size
    ends = rng.sample(range(min(size, 97)), rng.choice([0, 1, 3, 12, 60]))
    shared = dict(
        max_new_tokens=rng.choice([4, 9, 14]),
        num_beams=rng.choice([2, 3, 4, 5]),
        length_penalty=rng.choice([1.0, 0.0, -0.5, 0.7, 2.0]),
        early_stopping=rng.choice([False, True, "never"]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        no_repeat_ngram_size=rng.choice([0, 2]),
        min_new_tokens=rng.choice([0, 3]),
    )
    count = rng.randint(1, shared["num_beams"])
    # transformers counts padding as said, so that rows of different lengths are compared without penalties only.
    penalties = shared["repetition_penalty"] != 1 or shared["no_repeat_ngram_size"]
    lengths = [4, 4] if penalties else [rng.randint(2, 9) for _ in range(rng.choice([1, 3]))]
    rows = [[rng.randrange(size) for _ in range(length)] for length in lengths]
    pad = [max(lengths) - length for length in lengths]
    ids = torch.tensor([[0] * left + row for left, row in zip(pad, rows, strict=True)])
    mask = torch.tensor([[0] * left + [1] * len(row) for left, row in zip(pad, rows, strict=True)])
    theirs = other.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_return_sequences=count,
        eos_token_id=ends or None,
        return_dict_in_generate=True,
        output_scores=True,
        **{**shared, "min_new_tokens": shared["min_new_tokens"] or None},
    )
    ours = [reply for row in search(model, rows, n=count, eos_token_id=ends, **shared) for reply in row]
    expected = theirs.sequences[:, ids.shape[1] :].tolist()
    scores = theirs.sequences_scores.tolist()
    for place, (reply, row, score) in enumerate(zip(ours, expected, scores, strict=True)):
        told = f"case {case}, reply {place}: {shared}, {len(ends)} ends {ends[:12]}"
        rounding = 1e-4 + 1e-5 * abs(score)
        assert reply.score == pytest.approx(score, abs=rounding), told
        others = [s for s in scores[place - place % count :][:count] if s != score]
        if all(abs(score - s) > rounding for s in others):  # equally good replies may change places
            assert row[: len(reply.ids)] == reply.ids and set(row[len(reply.ids) :]) <= {0, *ends[:1]}, told


def test_forty_random_cases_equal_transformers(make_model, seed):
    """Guards: the order of operations, which candidates may end, scores, when a search ends, padding, reordering of the cache."""
    pairs = []
    for shape in SHAPES:
        model = make_model(seed=seed, std=0.15, **shape)
        pairs.append((model, in_transformers(model)))
    rng = random.Random(seed)
    for case in range(CASES):
        assert_a_random_case_equals_transformers(*pairs[case % len(pairs)], rng, case)


def test_forty_random_cases_of_an_imported_model(imported_pair, seed):
    """Guards: what only real weights show, such as a large vocabulary and log-probabilities that lie far apart."""
    rng = random.Random(seed)
    for case in range(CASES):
        assert_a_random_case_equals_transformers(*imported_pair, rng, case)


def test_enough_beams_find_the_best_of_all(make_model, seed):
    """Guards: a beginning that is lost although there is room for it."""
    model = make_model(seed=seed, vocab_size=5)
    every = {ids: log_prob(model, [1, 2], list(ids)) for ids in itertools.product(range(5), repeat=3)}
    best = sorted(every, key=lambda ids: -every[ids])[:4]
    found = search(model, [[1, 2]], num_beams=125, n=4, max_new_tokens=3)[0]
    assert [reply.score for reply in found] == pytest.approx([every[ids] / 3 for ids in best], abs=1e-4)
    assert tuple(found[0].ids) == best[0] or every[best[0]] - every[best[1]] < 1e-4


def test_scores_and_log_probabilities_belong_to_the_ids(make_model, seed):
    """Guards: log-probabilities of another beam after the beams change places; scores divided by another length."""
    model = make_model(seed=seed)
    settings = dict(num_beams=4, n=4, max_new_tokens=8, length_penalty=0.5, logprobs=True, top_logprobs=2, eos_token_id=[3, 5, 8, 13])
    for reply in search(model, [[7, 8, 9]], **settings)[0]:
        assert reply.score == pytest.approx(log_prob(model, [7, 8, 9], reply.ids) / len(reply.ids) ** 0.5, abs=1e-4)
        assert sum(reply.logprobs) == pytest.approx(log_prob(model, [7, 8, 9], reply.ids), abs=1e-4)
        assert len(reply.top_logprobs) == len(reply.ids)
        for token, chosen, top in zip(reply.ids, reply.logprobs, reply.top_logprobs, strict=True):
            assert len(top) == 2 and dict(top).get(token, chosen) == pytest.approx(chosen)
        assert reply.finish_reason == ("stop" if reply.ids[-1] in (3, 5, 8, 13) else "length")


def test_prompts_do_not_depend_on_each_other(make_model, seed):
    """Guards: rows of a prompt that is done, or that fills the context, which move the rows of the others."""
    model = make_model(seed=seed, max_position_embeddings=16)
    prompts = [[5, 6], [9] * 16, [11, 12, 13, 14], [40] * 12]
    settings = dict(num_beams=3, n=2, max_new_tokens=9, eos_token_id=list(range(0, 97, 6)))
    together = search(model, prompts, **settings)
    for prompt, row in zip(prompts, together, strict=True):
        alone = search(model, [prompt], **settings)[0]
        assert [reply.score for reply in row] == pytest.approx([reply.score for reply in alone], abs=1e-4)
    assert [len(reply.ids) for reply in together[1]] == [0, 0] and len(together[3][0].ids) <= 4


def test_stop_strings_end_beams(model, tokenizer):
    """Guards: stop strings that are ignored, or shown."""
    whole = search(model, [[5, 6, 7]], tokenizer, num_beams=4, n=4, max_new_tokens=20)[0]
    stop = whole[0].text[3:5]
    replies = search(model, [[5, 6, 7]], tokenizer, num_beams=4, n=4, max_new_tokens=20, stop=[stop])[0]
    assert any(reply.finish_reason == "stop" and whole[0].text.startswith(reply.text) for reply in replies)
    assert not any(stop in reply.text for reply in replies)
    assert all((reply.finish_reason == "stop") == (len(reply.ids) < 20) for reply in replies)


def test_beams_within_a_grammar(model, tokenizer, seed):
    """Guards: a beam that goes on with another beam's place in the grammar."""
    pytest.importorskip("llguidance", reason="needs: pip install -e .[constrained]")
    words = ["hello", "hey", "你好", "no"]
    found = search(model, [[5, 6, 7]], tokenizer, num_beams=40, n=40, max_new_tokens=12, grammar=Grammar.choice(words), eos_token_id=None)[
        0
    ]
    assert sorted({reply.text for reply in found}) == sorted(words)
    assert all(reply.finish_reason == "stop" for reply in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.7}, "temperature=0"),
        ({"num_beams": 2, "n": 3}, "n=3.*num_beams from 2"),
        ({"num_beams": 2, "lookup": 3}, "lookup=3"),
        ({"length_penalty": 2.0}, "length_penalty=2.0.*num_beams"),
        ({"early_stopping": True}, "early_stopping=True.*num_beams"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping.*never.*always"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty"),
    ],
)
def test_settings_that_make_no_sense_are_explained(wrong, message):
    """Guards: settings that are ignored in silence."""
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**{"temperature": 0, **wrong})


def test_generate_searches_with_transformers_names(make_model, seed):
    """Guards: model.generate that samples, or refuses, when it is asked for beams."""
    model = make_model(seed=seed)
    ids = torch.tensor([[5, 6, 7], [9, 10, 11]])
    out = model.generate(ids, num_beams=3, num_return_sequences=2, max_new_tokens=6, early_stopping=True)
    expected = [reply.ids for row in search(model, ids.tolist(), num_beams=3, n=2, max_new_tokens=6) for reply in row]
    assert out.tolist() == [prompt + reply for prompt, reply in zip(ids.repeat_interleave(2, 0).tolist(), expected, strict=True)]
    with pytest.raises(ValueError, match="num_beams=2"):
        Engine(model).stream([1, 2], SamplingSettings(num_beams=2, temperature=0))
