"""The engine on random tiny models: caching, padding, samples, stops, limits."""

import dataclasses

import numpy as np
import pytest
import torch
from generate_helpers import greedy_by_full_forward

from inference.batching import Batcher
from inference.engine import Engine, PromptCache
from inference.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0, max_new_tokens=12, eos_token_id=[])
WINDOWS = {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL"}
PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18], [40], [60, 61, 62, 63, 64]]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "tie_word_embeddings": False}, WINDOWS])
def test_cached_greedy_equals_full_forward(changes, make_model):
    """A cache that masks, shifts or forgets a position gives other tokens after the first few."""
    model = make_model(**changes)
    for prompt in PROMPTS:
        expected = greedy_by_full_forward(model, prompt, 12)
        assert Engine(model).generate([prompt], GREEDY)[0][0].ids == expected
        assert [token for piece in Engine(model).stream(prompt, GREEDY) for token in piece.ids] == expected


@pytest.mark.parametrize("changes", [{}, WINDOWS])
def test_left_padded_batch_equals_single_rows(changes, make_model):
    """Padding that is attended to, or that shifts positions, changes the short rows."""
    engine = Engine(make_model(**changes))
    together = engine.generate(PROMPTS, GREEDY)
    assert [row[0].ids for row in together] == [engine.generate([prompt], GREEDY)[0][0].ids for prompt in PROMPTS]


def test_rows_that_finish_early_leave_the_others_alone(make_model):
    """Dropping finished rows reorders the cache; the rest must go on as if nothing had happened."""
    model = make_model()
    alone = [greedy_by_full_forward(model, prompt, 12) for prompt in PROMPTS]
    ends = [row[3] for row in alone[:3]]
    settings = dataclasses.replace(GREEDY, eos_token_id=ends)
    for row, expected in zip(Engine(model).generate(PROMPTS, settings), alone, strict=True):
        cut = next((index + 1 for index, token in enumerate(expected) if token in ends), 12)
        assert row[0].ids == expected[:cut]
        assert row[0].finish_reason == ("stop" if expected[cut - 1] in ends else "length")


def test_samples_do_not_depend_on_their_neighbours(make_model):
    engine = Engine(make_model())
    settings = SamplingSettings(n=3, seed=5, max_new_tokens=8, eos_token_id=[], temperature=1.5, top_k=0, top_p=1.0)
    together = engine.generate([PROMPTS[0], PROMPTS[3], PROMPTS[0]], settings)
    ids = [[sample.ids for sample in row] for row in together]
    assert ids[1] == [sample.ids for sample in engine.generate([PROMPTS[3]], settings)[0]]
    # The prompt that comes twice goes on with new samples.
    assert len({tuple(sample) for sample in ids[0] + ids[2]}) == 6
    first = dataclasses.replace(settings, n=1)
    assert engine.generate([PROMPTS[0]], first)[0][0].ids == ids[0][0]
    assert [token for piece in engine.stream(PROMPTS[0], first) for token in piece.ids] == ids[0][0]


def test_logprobs_belong_to_the_tokens(make_model):
    model = make_model()
    settings = SamplingSettings(n=2, seed=1, max_new_tokens=5, eos_token_id=[], logprobs=True, temperature=0.5)
    for sample in Engine(model).generate([PROMPTS[1]], settings)[0]:
        ids = torch.tensor([PROMPTS[1] + sample.ids])
        with torch.no_grad():
            expected = model(ids).logits.log_softmax(-1)[0, len(PROMPTS[1]) - 1 : -1]
        picked = expected.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(sample.logprobs), picked, atol=1e-4)


def test_stop_strings_end_every_row_for_itself(model, tokenizer):
    engine = Engine(model, tokenizer)
    settings = SamplingSettings(temperature=0, max_new_tokens=30, eos_token_id=[])
    whole = engine.generate(PROMPTS, settings)
    stop = whole[0][0].text[3:5]
    stopped = dataclasses.replace(settings, stop=[stop])
    for before, after, prompt in zip(whole, engine.generate(PROMPTS, stopped), PROMPTS, strict=True):
        expected = before[0].text.split(stop)[0]
        assert after[0].text == expected
        assert after[0].finish_reason == ("stop" if stop in before[0].text else "length")
        assert "".join(piece.text for piece in engine.stream(prompt, stopped) if piece.channel == "answer") == expected
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(model).generate(PROMPTS, stopped)


def test_full_context_ends_the_reply_and_does_not_crash(make_model):
    engine = Engine(make_model(max_position_embeddings=16))
    rows = engine.generate([[3] * 14, [4] * 16, [5] * 3], GREEDY)
    assert [len(row[0].ids) for row in rows] == [2, 0, 12]
    assert {row[0].finish_reason for row in rows} == {"length"}
    assert list(engine.stream([4] * 16, GREEDY))[-1].finish_reason == "length"
    with pytest.raises(ValueError, match="17 tokens.*holds 16"):
        engine.generate([[3] * 17], GREEDY)
    with pytest.raises(ValueError, match="17 tokens"):
        engine.stream([3] * 17, GREEDY)


NO_IDS = r"a list of token ids, such as tokenizer\.encode"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([97], "vocabulary"), ([-1], "vocabulary"), ("Hello", NO_IDS), (5, NO_IDS), ([1.0], NO_IDS), (None, NO_IDS)],
)
def test_unusable_prompts_are_explained(prompt, message, make_model):
    engine = Engine(make_model())
    for settings in (GREEDY, dataclasses.replace(GREEDY, num_beams=2)):
        with pytest.raises(ValueError, match=message):
            engine.generate([prompt], settings)
    for ask in (engine.stream, Batcher(engine).submit):
        with pytest.raises(ValueError, match=message):
            ask(prompt, GREEDY)


def test_prompts_may_be_arrays(make_model):
    """Guards: tensors whose equal prompts count as different ones, or that fail far from their cause."""
    engine = Engine(make_model())
    sampled = SamplingSettings(temperature=1.5, top_k=0, max_new_tokens=8, eos_token_id=[], seed=3)
    expected = [row[0].ids for row in engine.generate([[5, 6, 7], [5, 6, 7]], sampled)]
    assert [row[0].ids for row in engine.generate(torch.tensor([[5, 6, 7]] * 2), sampled)] == expected
    assert engine.generate([np.array([5, 6, 7])], sampled)[0][0].ids == expected[0] != expected[1]


def test_damaged_weights_are_explained(make_model):
    """NaN logits would surface as an obscure error of the sampler, or as endless token 0 in greedy decoding."""
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        Engine(model).generate([[1, 2]], GREEDY)


@pytest.mark.parametrize("changes", [{}, WINDOWS])
def test_prompt_cache_gives_what_a_fresh_one_gives(changes, make_model):
    """Reused keys and values must be exactly those of the common prefix, also after the reply was broken off."""
    engine = Engine(make_model(**changes))
    held = PromptCache()
    stream = engine.stream(PROMPTS[1], GREEDY, held)
    said = [next(stream).ids[0] for _ in range(5)]
    stream.close()
    assert held.ids == PROMPTS[1] + said[:4]
    for prompt in (PROMPTS[1] + said[:2] + [9, 9], PROMPTS[1][:3], PROMPTS[2], PROMPTS[2] * 30):
        again = [token for piece in engine.stream(prompt, GREEDY, held) for token in piece.ids]
        assert again == [token for piece in engine.stream(prompt, GREEDY) for token in piece.ids]
    if not changes:
        list(engine.stream(PROMPTS[1], GREEDY, held))
        list(engine.stream(PROMPTS[1] + [1, 2], GREEDY, held))
        assert held.reused == len(PROMPTS[1])


def test_an_interrupted_forward_empties_the_cache(monkeypatch, make_model):
    """Half-written layers must not be trusted by the next turn."""
    engine = Engine(make_model())
    held = PromptCache()
    stream = engine.stream(PROMPTS[0], GREEDY, held)
    next(stream)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert held.ids == []
    expected = [token for piece in engine.stream(PROMPTS[0], GREEDY) for token in piece.ids]
    assert [token for piece in engine.stream(PROMPTS[0], GREEDY, held) for token in piece.ids] == expected


def test_streaming_does_not_leak_inference_mode_or_eval_mode(make_model):
    """Between two pieces the caller may train: gradients must work and dropout must be on."""
    model = make_model(dropout=0.5).train()
    for _ in Engine(model).stream(PROMPTS[0], GREEDY):
        assert model.training and not torch.is_inference_mode_enabled()
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, temperature=0)
    model(ids, labels=ids).loss.backward()
    assert model.embed_tokens.weight.grad is not None


def test_generate_returns_prompt_and_padding(make_model):
    model = make_model()
    ids = torch.tensor([[0, 0, 5, 6, 7], [60, 61, 62, 63, 64]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first = greedy_by_full_forward(model, [5, 6, 7], 6)
    second = greedy_by_full_forward(model, [60, 61, 62, 63, 64], 6)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, temperature=0)
    assert out.tolist() == [ids[0].tolist() + first, ids[1].tolist() + second]
    end = first[2]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, temperature=0, eos_token_id=end, pad_token_id=1)
    cut = first.index(end) + 1
    assert out[0].tolist()[5:] == first[:cut] + [1] * (out.shape[1] - 5 - cut)


def test_generate_explains_what_it_cannot_do(make_model):
    model, ids = make_model(), torch.tensor([[1, 2, 3]])
    with pytest.raises(TypeError, match=r"do_sample.*max_new_tokens.*temperature=0 is greedy"):
        model.generate(ids, do_sample=False)
    with pytest.raises(ValueError, match="length_penalty"):
        model.generate(ids, length_penalty=2.0)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="batch, time"):
        model.generate(ids[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
        {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.9},
        {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_same_seed_same_tokens_as_transformers(tmp_path, tokenizer, settings, make_model):
    """A saved model, loaded by transformers, chooses the same tokens from the same seed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: parity is not checked")
    model = make_model(tokenizer, std=0.1)
    model.save_pretrained(tmp_path, tokenizer)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    other.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids = torch.tensor([tokenizer.encode("Hello 你好")])
    ours = dict(settings)
    if not ours.pop("do_sample"):
        ours["temperature"] = 0
    for seed in (0, 123):
        torch.manual_seed(seed)
        expected = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **settings)
        assert model.generate(ids, max_new_tokens=20, seed=seed, **ours).tolist() == expected.tolist()
        torch.manual_seed(seed)  # without a seed the global generator is used, as there
        assert model.generate(ids, max_new_tokens=20, **ours).tolist() == expected.tolist()


def test_ids_without_a_token_are_never_chosen(make_model, tokenizer):
    """Guards: a padded embedding whose surplus rows win; in the reply they stand for nothing, elsewhere they are an IndexError."""
    size = tokenizer.vocab_size
    model = make_model(tokenizer, vocab_size=size + 30)
    with torch.no_grad():
        model.embed_tokens.weight[size:] = 40 * torch.randn(30, 32)
    prompt = tokenizer.encode("Hello")
    settings = SamplingSettings(temperature=0, max_new_tokens=10, eos_token_id=[], top_logprobs=3)
    assert max(Engine(model).generate([prompt], settings)[0][0].ids) >= size
    engine = Engine(model, tokenizer)
    for changes in ({}, {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "n": 4}, {"num_beams": 3}, {"lookup": 3}):
        for completion in engine.generate([prompt], dataclasses.replace(settings, **changes))[0]:
            assert max(completion.ids) < size and len(completion.ids) == 10
            assert all(token < size for step in completion.top_logprobs for token, _ in step)
    assert max(token for piece in engine.stream(prompt, settings) for token in piece.ids) < size
    with pytest.raises(ValueError, match=f"token id {size}, the model's vocabulary has {size}"):
        engine.generate([[*prompt, size]], settings)


def test_every_reply_knows_its_reasoning_steps(make_model):
    """Guards: steps of one row that are told of all, or of the last pass only."""
    model = make_model(use_reasoning=True, reasoning_steps=3, reasoning_halt=0.5)
    with torch.no_grad():
        model.reasoning.out_proj.weight.normal_(std=0.3)
        model.reasoning.confidence.out.weight.normal_(std=1.0)
    engine, totals = Engine(model), set()
    for prompt, (completion,) in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        with torch.no_grad():
            used = model(torch.tensor([prompt + completion.ids[:-1]])).steps_used[0, len(prompt) - 1 :]
        assert completion.reasoning_steps == int(used.sum())
        pieces = list(engine.stream(prompt, GREEDY))
        assert [piece.reasoning_steps for piece in pieces] == used.tolist()
        totals.add(int(used.sum()))
    assert len(totals) > 1


def test_a_cleared_cache_takes_nothing_of_what_was_running(make_model):
    """Guards: keys of an adapter that was switched off while its reply was still being read."""
    engine, held = Engine(make_model()), PromptCache()
    stream = engine.stream(PROMPTS[0], GREEDY, held)
    next(stream)
    held.clear()
    stream.close()
    assert held.ids == [] and not held.entries


def test_kept_prefixes_are_given_up_in_order_of_use(make_model):
    """Guards: a pool that forgets what is asked for most, or holds every turn of a conversation."""
    engine, held = Engine(make_model()), PromptCache(2)

    def ask(prompt):
        said = [token for piece in engine.stream(prompt, GREEDY, held) for token in piece.ids]
        assert said == engine.generate([prompt], GREEDY)[0][0].ids
        return said, held.reused

    first, _ = ask(PROMPTS[1])
    ask(PROMPTS[3])
    assert ask([*PROMPTS[1], 3])[1] == len(PROMPTS[1])  # used again, and another continuation beside it
    assert [entry.ids[: len(PROMPTS[1])] for entry in held.entries] == [PROMPTS[1], PROMPTS[1]]
    assert ask([*PROMPTS[1], *first, 5])[1] == len(PROMPTS[1]) + len(first) - 1
    assert ask(PROMPTS[3])[1] == 0 and held.hits == 2


def test_many_prompts_draw_independently(make_model):
    """Guards the samples of different prompts against one shared random stream, and a prompt that comes again in a later batch against
    getting the same reply: means over prompts would be far noisier than they look."""
    engine = Engine(make_model())
    flat = SamplingSettings(temperature=100.0, top_k=0, top_p=1.0, max_new_tokens=3, eos_token_id=[], seed=3)
    prompts = [*PROMPTS * 2, *PROMPTS]
    replies = dict(pair for batch in engine.generate_many(prompts, flat, at_once=5) for pair in batch)
    assert sorted(replies) == list(range(12))
    assert len({tuple(reply.ids) for (reply,) in replies.values()}) == 12
    assert len({reply.ids[0] for (reply,) in replies.values()}) > 6, "almost uniform draws fell on the same tokens"
    again = dict(pair for batch in engine.generate_many(prompts, flat, at_once=3) for pair in batch)
    assert again == replies, "a reply depends on the batch it is in"
    with pytest.raises(ValueError, match="as many seeds"):
        engine.generate(PROMPTS, flat, [1, 2])
    with pytest.raises(ValueError, match="at_once"):
        list(engine.generate_many(PROMPTS, flat, at_once=0))
    assert list(engine.generate_many([], flat, at_once=2)) == []


def test_beam_search_of_many_prompts_draws_nothing(make_model):
    """Guards: seeds that change, or refuse, what is searched; prompts and replies in the order of their batches."""
    engine = Engine(make_model())
    searched = dataclasses.replace(GREEDY, num_beams=3, n=2, seed=4)
    expected = [[reply.ids for reply in engine.generate([prompt], searched)[0]] for prompt in PROMPTS]
    found = dict(pair for batch in engine.generate_many(PROMPTS, searched, at_once=3) for pair in batch)
    assert [[reply.ids for reply in found[number]] for number in range(len(PROMPTS))] == expected
    assert [[reply.ids for reply in row] for row in engine.generate(PROMPTS, searched, [9, 8, 7, 6])] == expected
    with pytest.raises(ValueError, match="as many seeds"):
        engine.generate(PROMPTS, searched, [1, 2])


def test_a_long_limit_does_not_take_memory_before_it_is_needed(make_model, monkeypatch):
    """Guards: a cache for the whole context, times the rows of the batch, for replies of three tokens."""
    engine = Engine(make_model(max_position_embeddings=100_000))
    made = []
    original = engine.new_cache
    monkeypatch.setattr(engine, "new_cache", lambda rows, columns: (made.append(columns), original(rows, columns))[1])
    first = engine.generate([[5, 6]], GREEDY)[0][0].ids
    endless = SamplingSettings(temperature=0, max_new_tokens=90_000, eos_token_id=first[2])
    assert engine.generate([[5, 6]] * 3, endless)[2][0].finish_reason == "stop"
    engine.generate([[5, 6]], dataclasses.replace(endless, num_beams=2, early_stopping=True))
    assert max(made) < 1000
