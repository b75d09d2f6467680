"""Sampling against `transformers` (when it is installed) and against values worked out by hand in float64."""

import dataclasses
import math
from collections import Counter

import pytest
import torch

from inference.engine import Engine
from inference.sampling import (
    SamplingSettings,
    TokenHistory,
    ban_repeated_ngrams,
    choose,
    chosen_logprobs,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_presence_frequency,
    penalize_repetition,
    process_logits,
    row_generator,
    top_logprobs,
)

OFF = dict(temperature=1.0, top_k=0, top_p=1.0)


def kept(logits):
    return [index for index, value in enumerate(logits[0].tolist()) if value != -math.inf]


def of(probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_repetition_penalty_lowers_negative_logits_too():
    """Dividing a negative logit would reward repetition: the classic wrong sign."""
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_presence_and_frequency_look_at_the_reply_only():
    """OpenAI's penalties count generated tokens; counting the prompt would forbid answering in the question's words."""
    history = TokenHistory(torch.tensor([[3, 3]]), None, vocab_size=5, room=4)
    for token in (1, 1, 2):
        history.append(torch.tensor([token]))
    out = penalize_presence_frequency(torch.zeros(1, 5, dtype=torch.float64), history.counts, 0.5, 0.25)
    assert out.tolist() == [[0.0, -1.0, -0.75, 0.0, 0.0]]


def test_padding_is_not_something_said():
    """The pad id may be an ordinary token of the reply: left padding must not be penalised, nor counted in n-grams."""
    ids, mask = torch.tensor([[0, 0, 0, 4], [1, 0, 2, 4]]), torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    history = TokenHistory(ids, mask, vocab_size=6, room=1)
    assert history.seen.tolist() == [[False, False, False, False, True, False], [True, True, True, False, True, False]]
    banned = ban_repeated_ngrams(torch.zeros(2, 6), history.ids[:, :4], 1, history.real[:, :4])
    assert (banned == -math.inf).tolist() == history.seen.tolist()


def test_ngram_ban_by_hand():
    """After 1 2 3 1 2 a trigram ban forbids 3 and nothing else."""
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    assert kept(ban_repeated_ngrams(torch.zeros(1, 5), ids, 3)) == [0, 1, 2, 4]
    assert kept(ban_repeated_ngrams(torch.zeros(1, 5), ids[:, :2], 3)) == [0, 1, 2, 3, 4]


def test_top_k_keeps_ties_and_clamps():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert kept(keep_top_k(logits, 2)) == [1, 2, 3]
    assert kept(keep_top_k(logits, 99)) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_token_that_crosses_p():
    assert kept(keep_top_p(of([0.5, 0.3, 0.15, 0.05]), 0.7)) == [0, 1]
    assert kept(keep_top_p(of([0.5, 0.3, 0.15, 0.05]), 0.0)) == [0]  # always one


def test_min_p_is_relative_to_the_likeliest():
    assert kept(keep_min_p(of([0.5, 0.3, 0.15, 0.05]), 0.25)) == [0, 1, 2]
    assert kept(keep_min_p(of([0.5, 0.3, 0.15, 0.05]), 1.0)) == [0]


def test_temperature_comes_before_top_p():
    """Cutting the nucleus before flattening would keep fewer tokens than transformers does."""
    settings = SamplingSettings(temperature=2.0, top_k=0, top_p=0.7)
    probabilities = [0.7, 0.2, 0.1]
    flat = [math.sqrt(p) for p in probabilities]
    out = process_logits(of(probabilities), TokenHistory(torch.tensor([[0]]), None, 3, 1), settings)
    assert flat[0] / sum(flat) < 0.7 and kept(out) == [0, 1]


def test_end_token_is_held_back_until_the_minimum_length():
    settings = SamplingSettings(min_new_tokens=1, eos_token_id=[2, 9], **OFF)
    history = TokenHistory(torch.tensor([[0]]), None, 3, 2)
    assert kept(process_logits(torch.zeros(1, 3), history, settings)) == [0, 1]
    history.append(torch.tensor([1]))
    assert kept(process_logits(torch.zeros(1, 3), history, settings)) == [0, 1, 2]


def test_nothing_permitted_falls_back_instead_of_sampling_nan():
    """With every token used and no_repeat_ngram_size=1 all logits are -inf; multinomial would stop the program."""
    settings = SamplingSettings(no_repeat_ngram_size=1, **OFF)
    out = process_logits(torch.zeros(1, 3), TokenHistory(torch.tensor([[0, 1, 2]]), None, 3, 1), settings)
    assert kept(out) == [0, 1, 2]


def test_draws_follow_the_probabilities():
    logits = of([0.6, 0.3, 0.1]).expand(4000, 3)
    torch.manual_seed(0)
    counts = Counter(choose(logits, greedy=False).tolist())
    assert all(abs(counts[token] / 4000 - p) < 0.03 for token, p in enumerate([0.6, 0.3, 0.1]))


def test_a_row_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(3, 50)
    cpu = torch.device("cpu")
    together = choose(logits, False, [row_generator(7, number, cpu) for number in range(3)])
    alone = [int(choose(logits[number : number + 1], False, [row_generator(7, number, cpu)])) for number in range(3)]
    assert together.tolist() == alone


def test_logprobs_are_those_of_the_unmodified_logits():
    logits = torch.randn(2, 7, dtype=torch.float64)
    expected = torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))[[0, 1], [3, 5]]
    assert torch.allclose(chosen_logprobs(logits, torch.tensor([3, 5])).double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"n": 0},
        {"stop": [""]},
        {"stop": [3]},
        {"stop": 3},
        {"eos_token_id": 2.0},
        {"logprobs": 5},
        {"eos_token_id": -1},
        {"seed": -1},
        {"no_repeat_ngram_size": -2},
        {"presence_penalty": math.inf},
        {"min_new_tokens": 300},
        {"top_logprobs": -1},
        {"logit_bias": [1]},
        {"logit_bias": {-1: 2}},
        {"logit_bias": {"a": 2}},
        {"logit_bias": {1: "much"}},
        {"logit_bias": {1: math.nan}},
    ],
)
def test_wrong_settings_name_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_bias_moves_logits_and_knows_its_vocabulary():
    """Guards: keys of JSON, which are strings; ids that index from the end, or beyond it."""
    settings = SamplingSettings(logit_bias={"2": -100, 0: 1.5}, **OFF)
    assert settings.logit_bias == {2: -100.0, 0: 1.5}
    logits = torch.randn(2, 4, dtype=torch.float64)
    expected = logits + torch.tensor([1.5, 0.0, -100.0, 0.0])
    torch.testing.assert_close(process_logits(logits, None, settings), expected, rtol=0, atol=0)
    settings.check_vocabulary(3)
    with pytest.raises(ValueError, match="logit_bias names token id 2.*2 tokens"):
        settings.check_vocabulary(2)


def test_top_logprobs_are_the_likeliest_of_the_unmodified_logits():
    logits = of([0.1, 0.6, 0.3])
    (found,) = top_logprobs(logits, 2)
    assert [token for token, _ in found] == [1, 2]
    assert [math.exp(value) for _, value in found] == pytest.approx([0.6, 0.3])
    assert len(top_logprobs(logits, 20)[0]) == 3


def test_top_logprobs_of_replies_belong_to_their_tokens(make_model, seed):
    """Guards: lists of another row or step, taken after bias or temperature, or missing from a stream."""
    engine = Engine(make_model(seed=seed))
    settings = SamplingSettings(n=2, seed=1, max_new_tokens=5, top_logprobs=3, logprobs=True, temperature=2.0, logit_bias={3: 5})
    for sample in engine.generate([[5, 6, 7]], settings)[0]:
        ids = torch.tensor([[5, 6, 7, *sample.ids]])
        with torch.no_grad():
            expected = engine.model(ids).logits.log_softmax(-1)[0, 2:-1].topk(3)
        for found, values in zip(sample.top_logprobs, expected.values.tolist(), strict=True):
            assert [value for _, value in found] == pytest.approx(values, abs=1e-4)
    pieces = list(engine.stream([5, 6, 7], dataclasses.replace(settings, n=1)))
    assert [len(piece.top_logprobs[0]) for piece in pieces if piece.ids] == [3] * 5


def test_one_stop_string_is_not_a_list_of_letters():
    assert SamplingSettings(stop="END").stop == ["END"]


@pytest.mark.parametrize("seed", range(4))
def test_processed_logits_equal_transformers(seed):
    """The whole chain, in its order, on random histories."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: parity is not checked")
    generation = transformers.generation
    torch.manual_seed(seed)
    vocab, prompt, new = 60, 12, 3
    ids = torch.randint(0, 12, (5, prompt + new))
    logits = torch.randn(5, vocab) * 3
    theirs = generation.LogitsProcessorList(
        [
            generation.RepetitionPenaltyLogitsProcessor(1.3),
            generation.NoRepeatNGramLogitsProcessor(2),
            generation.MinNewTokensLengthLogitsProcessor(prompt, 5, [1, 4]),
            generation.TemperatureLogitsWarper(0.7),
            generation.TopKLogitsWarper(25),
            generation.TopPLogitsWarper(0.9),
            generation.MinPLogitsWarper(0.02),
        ]
    )(ids, logits.clone())
    history = TokenHistory(ids[:, :prompt], None, vocab, new)
    for column in range(prompt, prompt + new):
        history.append(ids[:, column])
    settings = SamplingSettings(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=5,
        eos_token_id=[1, 4],
        temperature=0.7,
        top_k=25,
        top_p=0.9,
        min_p=0.02,
    )
    assert torch.equal(process_logits(logits, history, settings), theirs)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_top_p_of_what_top_k_left_equals_a_sort_of_everything(k):
    """Guards: candidates, to save a sort, that are too few or come back at the places of others."""
    logits = 3 * torch.randn(6, 2000)
    logits[0, :7] = 20.0  # ties with the k-th stay
    left = keep_top_k(logits, k)
    ascending, order = left.double().sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - 0.8
    drop[:, -1] = False
    found = keep_top_p(left, 0.8)
    assert torch.equal(found.isfinite().sum(dim=-1), (~drop & ascending.isfinite()).sum(dim=-1))
    assert torch.equal(found[1:], left.masked_fill(drop.scatter(1, order, drop), -torch.inf)[1:])
    assert torch.equal(found[found.isfinite()], left[found.isfinite()])
