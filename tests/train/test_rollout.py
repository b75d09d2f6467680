"""RolloutSource: batches that the policy writes itself, their log-probabilities, their order, and going on from a saved state."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from rollout_helpers import HashJudge, make_prompts, make_source

from model import BPETokenizer, SmartHaoAI
from train.data import IGNORE
from train.log_probs import completion_log_probs
from train.rollout import REWARD, RolloutSource


class Plain(RolloutSource):
    """Rollouts that need nothing more."""

    def finish_rollout(self) -> None:
        for sample in self.samples:
            sample.tokens["advantages"] = [sample.parts[REWARD]] * sample.length


def served_ids(batch: Any) -> list[tuple[int, ...]]:
    """The sequences of a batch, in order."""
    ids, segments = batch.inputs["input_ids"], batch.inputs["segment_ids"]
    return [tuple(row[marks == n].tolist()) for row, marks in zip(ids, segments, strict=True) for n in range(1, int(marks.max()) + 1)]


def test_first_update_starts_exactly_at_the_rollout(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards ratio 1 and KL 0, to the last bit: old and reference log-probabilities come from the training forward over equal rows."""
    reference = SmartHaoAI(model.config).train()
    reference.load_state_dict(model.state_dict())
    source = make_source(Plain, model, tiny_tokenizer, accumulation_steps=3)
    source.reference = lambda inputs: completion_log_probs(reference, inputs, source.settings.temperature).values.detach()
    for _ in range(3):
        batch = source.next_batch(0.0)
        assert bool(batch.extra["first"]) and len(batch.inputs["input_ids"]) < batch.weights["sequences"], "several answers share a row"
        result = completion_log_probs(model, batch.inputs, source.settings.temperature)
        assert torch.equal(result.values, batch.extra["old"]) and torch.equal(batch.extra["old"], batch.extra["reference"])
        assert torch.equal(source.note_update(result.values, batch.extra["old"], True), torch.ones(len(result.values)))
    assert source.diagnostics["kl"] == 0.0


def test_log_probs_belong_to_their_tokens(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the order of packed values, against each answer alone in float64; and that only the answer is learned."""
    source = make_source(Plain, model, tiny_tokenizer)
    batch = source.next_batch(0.0)
    double = SmartHaoAI(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    prompts = {prompt.ids for prompt in make_prompts(tiny_tokenizer, 6)}
    expected = []
    for ids in served_ids(batch):
        start = max(len(prompt) for prompt in prompts if ids[: len(prompt)] == prompt)
        logits = double(torch.tensor([ids[:-1]])).logits[0, start - 1 :] / 0.9
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
    torch.testing.assert_close(batch.extra["old"].double(), torch.cat(expected), atol=2e-5, rtol=1e-5)
    assert batch.weights["tokens"] == len(batch.extra["old"]) == int((batch.inputs["labels"] != IGNORE).sum())


def test_every_answer_is_served_once_a_pass(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against answers that are left out or repeated when the rollout is no multiple of the batch, and equal passes."""
    source = make_source(Plain, model, tiny_tokenizer, passes=2)
    passes = [[served_ids(source.next_batch(0.0)) for _ in range(3)] for _ in range(2)]
    orders = [[ids for batch in one for ids in batch] for one in passes]
    assert Counter(orders[0]) == Counter(orders[1]) and orders[0] != orders[1]
    assert sum(Counter(orders[0]).values()) == 8 and source.round == 0
    source.next_batch(0.0)
    assert source.round == 1


def test_answers_do_not_repeat_themselves(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the random streams: the samples of a prompt differ, and the same prompt gets other answers in the next rollout."""
    source = make_source(Plain, model, tiny_tokenizer, prompts=2, rollout={"prompts": 2, "samples": 4}, batch_size=8)
    rounds = [served_ids(source.next_batch(0.0)) for _ in range(3)]
    assert len({ids for batch in rounds for ids in batch}) == 24


def test_a_prompt_that_comes_again_in_a_rollout_gets_other_answers(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards rollouts of several batches over few prompts: exact copies of an answer would count as so many samples."""
    rollout = {"prompts": 8, "samples": 2, "batch_size": 4}
    source = make_source(Plain, model, tiny_tokenizer, prompts=2, rollout=rollout, batch_size=16)
    assert len(set(served_ids(source.next_batch(0.0)))) == 16


def test_prompts_come_round(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against prompts that are never asked: each epoch takes all of them, in another order."""
    source = make_source(Plain, model, tiny_tokenizer, prompts=10)
    epochs = [source.take_prompts(4) + source.take_prompts(6) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]


@pytest.mark.parametrize("served", [1, 4, 6, 7])
def test_state_goes_through_json(served: int, model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards bit-exact resume, in the middle of a pass, at its end and at the end of a rollout."""
    source = make_source(Plain, model, tiny_tokenizer, passes=2)
    for _ in range(served):
        source.next_batch(0.0)
    again = make_source(Plain, model, tiny_tokenizer, passes=2)
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    for _ in range(4):
        one, two = source.next_batch(0.0), again.next_batch(0.0)
        assert one.weights == two.weights and one.extra.keys() == two.extra.keys()
        for name, value in [*one.inputs.items(), *one.extra.items()]:
            assert torch.equal(value, {**two.inputs, **two.extra}[name]), name


def test_a_state_for_other_prompts_is_refused(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against resuming with another prompt file: the numbers of the prompts would mean others."""
    state = make_source(Plain, model, tiny_tokenizer, prompts=6).state_dict()
    with pytest.raises(ValueError, match="data.prompt_file"):
        make_source(Plain, model, tiny_tokenizer, prompts=7).load_state_dict(state)


def test_a_policy_that_moved_too_far_gets_new_answers(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the early stop: the rest of the rollout is left out at the next step, and said."""
    events: list[tuple[int, str, dict[str, Any]]] = []
    source = make_source(Plain, model, tiny_tokenizer, passes=3, alarm=lambda *event: events.append(event))
    source.stop_kl = 0.1
    for moved in (0.01, 1.0):
        batch = source.next_batch(0.0)
        source.note_update(batch.extra["old"] + moved, batch.extra["old"], False)
    assert source.round == 0
    batch = source.next_batch(0.0)
    assert events == []
    source.note_update(batch.extra["old"], batch.extra["old"], True)
    assert source.round == 1 and [(step, kind) for step, kind, _ in events] == [(3, "kl_stop")]


def test_alarms(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the three alarms: a first ratio that is not 1, equal rewards, and a policy far from the reference."""
    events: list[tuple[int, str, dict[str, Any]]] = []
    source = make_source(Plain, model, tiny_tokenizer, judge=HashJudge(levels=1), alarm=lambda *event: events.append(event))
    source.reference = lambda inputs: completion_log_probs(model, inputs, 0.9).values.detach() - 2.0
    source.alarm_kl = 1.5
    start = source.state_dict()

    def update(moved: float) -> None:
        batch = source.next_batch(0.0)
        source.note_update(batch.extra["old"] + moved, batch.extra["old"], bool(batch.extra["first"]))

    update(0.0)
    assert [(step, kind) for step, kind, _ in events] == [(1, "kl_runaway"), (1, "rewards_collapsed")]
    update(0.1)
    assert len(events) == 2, "only the first update of a rollout has to begin at a ratio of 1"
    source.load_state_dict(start)
    source.alarm_kl = 2.5
    update(0.01)
    assert [(step, kind) for step, kind, _ in events[2:]] == [(1, "rewards_collapsed"), (1, "ratio")]


def test_a_trial_is_not_heard(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against alarms of batches that the loop serves, tries in another number type, and takes back."""
    events: list[str] = []
    source = make_source(Plain, model, tiny_tokenizer, judge=HashJudge(levels=1), alarm=lambda step, kind, details: events.append(kind))
    start = source.state_dict()
    trial = source.next_batch(0.0).extra
    source.load_state_dict(start)
    source.note_update(trial["old"] + 1.0, trial["old"], True)
    assert events == []
    real = source.next_batch(0.0).extra
    source.note_update(real["old"], real["old"], True)
    assert events == ["rewards_collapsed"]
