"""Continuous batching: requests that join and leave at any time get what each gets alone, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from typing import Any

import pytest
import torch
from generate_helpers import assert_same_greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.batching import PATIENCE, Batcher, QueueFull, Request, RequestFailed
from inference.engine import Engine
from inference.grammar import Grammar, Matcher
from inference.sampling import SamplingSettings
from model import SmartHaoAI
from model.lora import LoRASettings, inject_lora, use_adapter

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL"},
    "all-windows": {"use_sliding_window": True, "window_size": 6, "window_pattern": "S", "n_kv_head": 4},
    "experts": {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 32},
    "reasoning": {"use_reasoning": True, "reasoning_steps": 2, "reasoning_halt": 0.55},
}
GREEDY = SamplingSettings(temperature=0, max_new_tokens=12, eos_token_id=[])


@pytest.fixture(scope="module")
def models(make_model) -> dict[str, SmartHaoAI]:
    built = {name: make_model(**changes) for name, changes in SHAPES.items()}
    torch.manual_seed(1)
    for part in (built["reasoning"].reasoning.out_proj, built["reasoning"].reasoning.confidence.out):
        torch.nn.init.normal_(part.weight, std=0.3)
    return built


def cache_is_empty(batcher: Batcher) -> bool:
    return not batcher.busy and batcher.rows == 0 and not batcher._owners and batcher._batch.cache is None


def some_settings(rng: random.Random) -> SamplingSettings:
    """What requests of different users may ask for."""
    asked: dict[str, Any] = {"max_new_tokens": rng.choice([1, 3, 8, 20]), "eos_token_id": rng.sample(range(97), rng.choice([0, 3]))}
    kind = rng.choice(["greedy", "greedy", "sampled", "penalties", "ngrams"])
    if kind == "greedy":
        return SamplingSettings(temperature=0, **asked)
    if kind == "penalties":
        return SamplingSettings(temperature=0, repetition_penalty=1.3, presence_penalty=0.4, **asked)
    if kind == "ngrams":
        return SamplingSettings(temperature=0, no_repeat_ngram_size=2, min_new_tokens=rng.choice([0, 1]), **asked)
    return SamplingSettings(temperature=rng.choice([0.8, 1.4]), seed=rng.randrange(100), n=rng.choice([1, 1, 3]), **asked)


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(3, 12), block=st.sampled_from([7, 32, 200]), kept=st.sampled_from([0, 3]))
@settings(max_examples=2, deadline=None)
def test_random_arrivals_get_what_each_gets_alone(
    shape: str, models: dict[str, SmartHaoAI], seed: int, rows: int, block: int, kept: int
) -> None:
    """Guards: rows that see another row's keys, positions, settings, random stream or history; rows that leak; requests that starve."""
    rng, engine = random.Random(seed), Engine(models[shape])
    batcher = Batcher(engine, max_rows=rows, prefill_block=block, kept_prefixes=kept)
    starts = [[rng.randrange(97) for _ in range(20)] for _ in range(2)]  # what several prompts begin with
    jobs: list[tuple[list[int], SamplingSettings, Request, bool]] = []
    for _ in range(64):
        prompt = rng.choice([[], [], *starts]) + [rng.randrange(97) for _ in range(rng.choice([1, 2, 9, 25, 50]))]
        asked = some_settings(rng)
        jobs.append((prompt, asked, batcher.submit(prompt, asked, priority=rng.randrange(3)), rng.random() < 0.2))
        for _ in range(rng.choice([0, 0, 1, 3])):
            batcher.step()
        if jobs[-1][3]:
            batcher.cancel(jobs[-1][2])
            assert jobs[-1][2].done
    steps = 0
    while batcher.step():
        steps += 1
        assert batcher.rows <= rows and steps < 64 * 100
    assert cache_is_empty(batcher)
    for prompt, asked, request, cancelled in jobs:
        for got, alone in zip(request.result(), engine.generate([prompt], asked)[0], strict=True):
            ended = got.finish_reason != "cancelled"
            assert ended or cancelled
            expected = alone.ids if ended else alone.ids[: len(got.ids)]
            if asked.greedy:
                assert_same_greedy(engine.model, prompt, got.ids, expected, asked)
            else:
                assert got.ids == expected
            if ended and got.ids == expected:
                assert (got.finish_reason, got.reasoning_steps) == (alone.finish_reason, alone.reasoning_steps)


def test_threads_share_one_batcher(models: dict[str, SmartHaoAI], tokenizer, make_model) -> None:
    """Guards: pieces of one request in another's stream; readers that wait for ever; text that differs from the reply alone."""
    engine = Engine(make_model(tokenizer), tokenizer)
    prompts = [tokenizer.encode(text) for text in ("你好", "The little fox", "一加一等于", "print('hello')", "Hello! How")] * 3
    asked = SamplingSettings(temperature=0.9, seed=3, n=2, max_new_tokens=15)
    heard: dict[int, list[str]] = {}

    def listen(number: int, request: Request) -> None:
        heard[number] = ["", ""]
        for piece in request.stream():
            heard[number][piece.sample] += piece.text if piece.channel == "answer" else ""

    with Batcher(engine, max_rows=8) as batcher:
        requests = [batcher.submit(prompt, asked) for prompt in prompts]
        threads = [threading.Thread(target=listen, args=pair, daemon=True) for pair in enumerate(requests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        alone = engine.generate([prompt], asked)[0]
        assert heard[number] == [completion.text for completion in alone]
        assert [row.completion.ids for row in request.rows] == [completion.ids for completion in alone]
        assert request.usage.completion_tokens == sum(len(completion.ids) for completion in alone)
    assert cache_is_empty(batcher)


def test_stopping_and_closing_end_requests(models: dict[str, SmartHaoAI]) -> None:
    """Guards: a reader that hangs when the server stops; a client that went away and keeps its row."""
    batcher = Batcher(Engine(models["plain"]), max_rows=2)
    long = SamplingSettings(temperature=0, max_new_tokens=200, eos_token_id=[])
    first, second, third = (batcher.submit([number, 5], long) for number in range(3))
    stream = first.stream()
    next(stream)
    assert batcher.rows == 2 and batcher.waiting == 1
    stream.close()
    assert first.done and first.rows[0].completion.finish_reason == "cancelled" and batcher.rows == 1
    next(third.stream())
    batcher.stop()
    assert second.done and third.done and cache_is_empty(batcher)
    assert [completion.finish_reason for completion in second.result()] == ["cancelled"]
    batcher.start()
    running, seen = batcher.submit([9, 9], long), threading.Event()
    reader = threading.Thread(target=lambda: (next(running.stream()), seen.set()), daemon=True)
    reader.start()
    assert seen.wait(30)
    batcher.stop()
    reader.join(30)
    assert running.done and not reader.is_alive() and cache_is_empty(batcher)


def test_long_prompts_are_cut_into_blocks(models: dict[str, SmartHaoAI], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a prompt of 200 tokens for which all others wait. They go on with one token a step, and no block is longer than asked."""
    engine = Engine(models["windows"])
    batcher, fed = Batcher(engine, prefill_block=16, kept_prefixes=0), []
    original = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda ids, mask, cache: (fed.append(ids.numel()), original(ids, mask, cache))[1])
    running = batcher.submit([1, 2, 3], SamplingSettings(temperature=0, max_new_tokens=100, eos_token_id=[]))
    batcher.step()
    prompt = [number % 97 for number in range(200)]
    late = batcher.submit(prompt, GREEDY)
    for number in range(1, 13):
        batcher.step()
        assert len(running.rows[0].completion.ids) == 1 + number and not late.rows[0].completion.ids
    batcher.step()
    assert len(late.rows[0].completion.ids) == 1 and fed == [3, *[16] * 12, 8]
    assert late.result()[0].ids == engine.generate([prompt], GREEDY)[0][0].ids


def test_nobody_starves(models: dict[str, SmartHaoAI]) -> None:
    """Guards: a queue in which newer requests of a higher priority, or smaller ones, always go first."""
    batcher = Batcher(Engine(models["plain"]), max_rows=1)
    one = SamplingSettings(temperature=0, max_new_tokens=1, eos_token_id=[])
    patient = batcher.submit([1], one)
    taken = 0
    while not patient.done:
        batcher.submit([2], one, priority=5)
        batcher.step()
        taken += 1
        assert taken <= PATIENCE + 2
    assert taken > PATIENCE  # and priorities do count
    batcher = Batcher(Engine(models["plain"]), max_rows=4, max_tokens=120)
    small, large = SamplingSettings(temperature=0, max_new_tokens=4, eos_token_id=[]), SamplingSettings(max_new_tokens=100, n=1, seed=0)
    batcher.submit([1], small)
    batcher.step()
    big = batcher.submit([2] * 20, large)  # fits only when it is alone
    after = batcher.submit([3], small)
    while not big.usage.queue_seconds:
        assert batcher.step() and after.usage.queue_seconds is None
    assert batcher.rows == 1
    after.result()


def test_priorities_come_first_and_equal_ones_in_order(models: dict[str, SmartHaoAI]) -> None:
    """Guards: a stack in place of a queue; a priority that is read the wrong way round."""
    batcher = Batcher(Engine(models["plain"]), max_rows=1)
    order: list[int] = []
    requests = [batcher.submit([number], GREEDY, priority=priority) for number, priority in enumerate([0, 1, 0, 2, 1])]
    while len(order) < 5:
        batcher.step()
        order += [number for number, request in enumerate(requests) if request.done and number not in order]
    assert order == [3, 1, 4, 0, 2]


def test_too_much_is_refused_at_once(models: dict[str, SmartHaoAI]) -> None:
    """Guards: requests that wait for ever for what the batch never has; a queue without an end."""
    batcher = Batcher(Engine(models["plain"]), max_rows=2, max_tokens=100, max_waiting=2)
    with pytest.raises(ValueError, match="at most 2"):
        batcher.submit([1], SamplingSettings(n=3, max_new_tokens=2))
    with pytest.raises(ValueError, match=r"needs 106 tokens.*max_tokens"):
        batcher.submit([1, 2, 3], SamplingSettings(n=2, max_new_tokens=50))
    with pytest.raises(ValueError, match="vocabulary"):
        batcher.submit([97], GREEDY)
    with pytest.raises(ValueError, match="Engine.generate"):
        batcher.submit([1], SamplingSettings(temperature=0, num_beams=2))
    with pytest.raises(ValueError, match="max_rows"):
        Batcher(Engine(models["plain"]), max_rows=0)
    held = [batcher.submit([1], GREEDY) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests"):
        batcher.submit([1], GREEDY)
    batcher.cancel(held[0])
    assert batcher.submit([1], GREEDY).result()[0].finish_reason == "length"
    full = Batcher(Engine(models["plain"])).submit([1] * 256, GREEDY)  # the prompt fills the context
    assert [piece.finish_reason for piece in full.stream()] == ["length"]
    assert Batcher(Engine(models["plain"])).max_tokens > 10_000


def test_errors_end_only_who_is_concerned(models: dict[str, SmartHaoAI], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: one bad step after which the server answers nobody; a reader that never hears of it."""
    engine = Engine(models["plain"])
    batcher = Batcher(engine)
    alone = engine.generate([[1, 2]], GREEDY)[0][0].ids

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with batcher:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "decode", broken)
            request = batcher.submit([1, 2], GREEDY)
            with pytest.raises(RequestFailed, match="out of memory") as caught:
                request.result()
            assert isinstance(caught.value.__cause__, RuntimeError)
        assert batcher.submit([1, 2], GREEDY).result()[0].ids == alone
    running = batcher.submit([1, 2], GREEDY)
    batcher.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", broken)
        with pytest.raises(RequestFailed):
            batcher.submit([3, 4], GREEDY).result()
    assert running.result()[0].ids == alone and cache_is_empty(batcher)


def test_a_damaged_row_leaves_the_others_alone(models: dict[str, SmartHaoAI], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: NaN in one row, which reaches the next user of its place (zero times NaN is NaN), or ends everybody's reply."""
    engine = Engine(models["plain"])
    batcher, original = Batcher(engine, max_rows=3, kept_prefixes=0), engine.decode
    long = SamplingSettings(temperature=0, max_new_tokens=40, eos_token_id=[])
    first, second, third = (batcher.submit([number, 7], long) for number in (1, 2, 3))
    batcher.step()

    def poisoned(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = original(tokens, cache)
        for layer in cache.all_layers:
            layer.keys[1, :, : layer.filled], layer.values[1, :, : layer.filled] = float("nan"), float("nan")
        logits[1] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", poisoned)
        batcher.step()
    late = [batcher.submit([4, 5, 6, 7, 8, 9], long), batcher.submit([5], long)]
    with pytest.raises(RequestFailed, match="not finite"):
        second.result()
    for request, prompt in ((first, [1, 7]), (third, [3, 7]), (late[0], [4, 5, 6, 7, 8, 9]), (late[1], [5])):
        assert request.result()[0].ids == engine.generate([prompt], long)[0][0].ids


def test_prefixes_are_counted_exactly(models: dict[str, SmartHaoAI]) -> None:
    """Guards: a prefix pool that recomputes what it has, or takes over a token too many; one that grows without an end."""
    engine = Engine(models["plain"])
    batcher = Batcher(engine, kept_prefixes=2)
    system = list(range(40, 70))

    def ask(prompt: list[int]) -> tuple[list[int], int]:
        request = batcher.submit(prompt, GREEDY)
        ids = request.result()[0].ids
        assert ids == engine.generate([prompt], GREEDY)[0][0].ids
        return ids, request.usage.reused_tokens

    first, reused = ask([*system, 1, 2])
    assert reused == 0 and batcher.prefixes.hits == 0
    second, reused = ask([*system, 3])
    assert reused == 30 and batcher.prefixes.hits == 1
    # The last generated token was never fed: the next turn computes it and what is new.
    _, reused = ask([*system, 1, 2, *first, 8, 9])
    assert reused == 32 + len(first) - 1 and batcher.prefixes.hits == 2
    assert [entry.ids[:32] for entry in batcher.prefixes.entries] == [[*system, 3, second[0]], [*system, 1, 2]]
    assert ask([*system, 3])[1] == 30  # a prompt that was whole before: its last token is computed
    assert ask([7] * 9)[1] == 0 and len(batcher.prefixes.entries) == 2
    # Those that run count, too: nobody has ended yet.
    batcher = Batcher(engine, kept_prefixes=0)
    running = batcher.submit([*system, 1], SamplingSettings(temperature=0, max_new_tokens=50, eos_token_id=[]))
    batcher.step()
    assert ask([*system, 2])[1] == 30 and not running.done


def test_prompts_with_prefixes_are_computed_together(models: dict[str, SmartHaoAI], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: 5 requests with a common system text that are prefilled one by one, or right-aligned at the wrong place."""
    engine = Engine(models["plain"])
    batcher, fed = Batcher(engine), []
    system = list(range(50, 80))
    batcher.submit([*system, 1], GREEDY).result()
    original = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda ids, mask, cache: (fed.append(tuple(ids.shape)), original(ids, mask, cache))[1])
    prompts = [[*system, *range(length)] for length in (3, 5, 7)] + [[9, 8, 7, 6], [1, 2, 3, 4, 5, 6, 7]]
    requests = [batcher.submit(prompt, GREEDY) for prompt in prompts]
    batcher.step()
    assert fed == [(5, 7)] and [request.usage.reused_tokens for request in requests] == [26, 28, 30, 0, 0]
    monkeypatch.undo()
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.result()[0].ids == engine.generate([prompt], GREEDY)[0][0].ids


def test_another_setting_of_the_reasoning_head_is_another_prefix(models: dict[str, SmartHaoAI], make_model) -> None:
    """Guards: keys of three steps that are gone on with by two; a change in mid-reply that is not explained."""
    model = make_model(use_reasoning=True, reasoning_steps=2)
    batcher = Batcher(Engine(model))
    batcher.submit([1, 2, 3, 4], GREEDY).result()
    model.reasoning_steps = 3
    again = batcher.submit([1, 2, 3, 4], GREEDY)
    batcher.step()
    assert again.usage.reused_tokens == 0
    model.reasoning_steps = 1
    with pytest.raises(RequestFailed, match="reasoning_steps"):
        again.result()
    assert batcher.submit([1, 2], GREEDY).result()[0].ids


def test_lookup_alone_and_with_company(models: dict[str, SmartHaoAI]) -> None:
    """Guards: guessed tokens that stay in the cache when another request joins or the reply is kept."""
    engine = Engine(models["plain"])
    guessing = SamplingSettings(temperature=0, max_new_tokens=60, eos_token_id=[], lookup=5)
    prompt = [1, 2, 3, 4] * 6
    for windows in ("plain", "windows"):
        engine = Engine(models[windows])
        plain = engine.generate([prompt], SamplingSettings(temperature=0, max_new_tokens=60, eos_token_id=[]))[0][0].ids
        batcher = Batcher(engine)
        request = batcher.submit(prompt, guessing)
        for _ in range(20):
            batcher.step()
        other = batcher.submit([9, 9, 9], GREEDY)
        assert request.result()[0].ids == plain and other.result()[0].ids == engine.generate([[9, 9, 9]], GREEDY)[0][0].ids
        more = [*prompt, *plain, 5]
        following = batcher.submit(more, guessing)
        assert following.result()[0].ids == engine.generate([more], GREEDY)[0][0].ids + following.rows[0].completion.ids[12:]
        assert following.usage.reused_tokens == len(prompt) + 59


def test_the_thread_waits_without_work(models: dict[str, SmartHaoAI], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server that burns a core while nobody asks."""
    batcher, steps = Batcher(Engine(models["plain"])), []
    original = batcher.step
    monkeypatch.setattr(batcher, "step", lambda: (steps.append(1), original())[1])
    with batcher:
        batcher.submit([1, 2], GREEDY).result()
        before = len(steps)
        time.sleep(0.1)
        assert len(steps) <= before + 1 and before >= 12


def test_a_reply_that_cannot_go_on_ends_alone(
    models: dict[str, SmartHaoAI], make_model, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: settings or a grammar of one user, by which the replies of all others end: a penalty beyond fp32, a form that the tokenizer
    cannot write, a library that gives up in the middle."""
    pytest.importorskip("llguidance", reason="needs: pip install -e .[constrained]")
    engine = Engine(make_model(tokenizer), tokenizer)
    sampled = SamplingSettings(temperature=1.0, max_new_tokens=12, seed=2, eos_token_id=[])
    alone = engine.generate([[5, 6]], sampled)[0][0].ids
    word = Grammar.choice(["hello"])
    asked = [
        SamplingSettings(temperature=1e-44, max_new_tokens=12),
        SamplingSettings(temperature=1e300, min_new_tokens=3, max_new_tokens=12),
        SamplingSettings(temperature=0, repetition_penalty=1e300, logit_bias={7: 1e300}, max_new_tokens=12),
        SamplingSettings(temperature=0, presence_penalty=1e300, max_new_tokens=12),
        dataclasses.replace(sampled, grammar=word),
    ]
    lost = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)

    def given_up(matcher: Matcher, token: int) -> None:
        raise ValueError("the grammar cannot go on: too large")

    for method, stand_in in (("mask", lambda matcher: lost), ("take", given_up)):
        with monkeypatch.context() as patch:
            patch.setattr(Matcher, method, stand_in)
            batcher = Batcher(engine)
            fine = batcher.submit([5, 6], sampled)
            for settings_ in asked:
                with pytest.raises(RequestFailed, match=r"too extreme|too large"):
                    batcher.submit([7, 8], settings_).result()
            with pytest.raises(ValueError, match=r"too extreme|too large"):
                engine.generate([[7, 8]], asked[-1])
            with pytest.raises(ValueError, match=r"too extreme|too large"):
                engine.generate([[7, 8]], SamplingSettings(temperature=0, num_beams=3, grammar=word))
        assert fine.result()[0].ids == alone and cache_is_empty(batcher)
    outside = dataclasses.replace(sampled, grammar=word, eos_token_id=[tokenizer.vocab_size, 10**6])  # an end that can never come
    assert Batcher(engine).submit([7, 8], outside).result()[0].text == "hello"


def test_another_adapter_is_another_prefix(make_model, seed: int) -> None:
    """Guards: keys of one adapter that are gone on with by another, whether the reply has ended or is still running."""
    model = make_model()
    adapters = [None]
    for rank in (2, 3):
        adapters.append(inject_lora(model, LoRASettings(r=rank)))
        with torch.no_grad():
            for _, _, pair in adapters[-1].pairs(model):
                pair.B.normal_(std=0.5)
    model.eval()
    engine = Engine(model)
    batcher, prompt = Batcher(engine, kept_prefixes=4), [number % 97 for number in range(30)]
    said = {}
    for adapter in (*adapters, *adapters):
        use_adapter(model, adapter)
        request = batcher.submit(prompt, GREEDY)
        assert request.result()[0].ids == engine.generate([prompt], GREEDY)[0][0].ids
        assert request.usage.reused_tokens == (29 if id(adapter) in said else 0)
        said[id(adapter)] = request
    running = batcher.submit(prompt, SamplingSettings(temperature=0, max_new_tokens=50, eos_token_id=[]))
    batcher.step()
    use_adapter(model, adapters[1])
    late = batcher.submit([*prompt, 5], GREEDY)
    for request in (running, late):
        with pytest.raises(RequestFailed, match="another LoRA adapter"):
            request.result()
    assert cache_is_empty(batcher) and batcher.submit(prompt, GREEDY).result()[0].ids == said[id(adapters[1])].rows[0].completion.ids


def test_kept_prefixes_have_a_limit(models: dict[str, SmartHaoAI]) -> None:
    """Guards: long conversations that stay in memory by the number, whatever their length; what was running before the pool was cleared,
    as the weights changed, and is kept after it."""
    engine = Engine(models["plain"])
    batcher = Batcher(engine, kept_prefixes=8, max_tokens=100)
    for start in range(6):
        batcher.submit([start] * 30, GREEDY).result()
    assert len(batcher.prefixes.entries) == 2 and [entry.ids[0] for entry in batcher.prefixes.entries] == [4, 5]
    running = batcher.submit([9] * 30, GREEDY)
    batcher.step()
    batcher.prefixes.clear()
    assert batcher.submit([9] * 31, GREEDY).usage.reused_tokens == 0
    running.result()
    while batcher.step():
        pass
    assert [len(entry.ids) for entry in batcher.prefixes.entries] == [42]
