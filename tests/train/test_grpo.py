"""GRPO: groups and their advantages, replaced questions, the KL term, and the stage from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_helpers import TEMPERATURE, HashJudge, make_source, perturb
from training_helpers import FAST, chat_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train.config import GRPOConfig, GRPOStageConfig, UsageError, parse_command_line
from train.log_probs import completion_log_probs
from train.metrics import read_jsonl
from train.rollout import REWARD, RolloutSource
from train.train_grpo import GRPORollouts, grpo, grpo_term


class OddJudge(HashJudge):
    """Answers to every second prompt differ in reward, those to the others do not."""

    def __call__(self, pairs: Any) -> list[dict[str, float]]:
        return [
            {"reward": float(parts["reward"] if int(prompt.reference or 0) % 2 else 0.25)}
            for (prompt, _), parts in zip(pairs, super().__call__(pairs), strict=True)
        ]


def grpo_source(model: SmartHaoAI, tokenizer: BPETokenizer, settings: GRPOConfig, **more: Any) -> GRPORollouts:
    source = make_source(GRPORollouts, model, tokenizer, settings, **{"batch_size": 8, **more})
    assert isinstance(source, GRPORollouts)
    return source


def test_advantages_are_those_of_the_group(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against answers of other prompts in the mean, and against advantages of the wrong answer after shuffling."""
    source = grpo_source(model, tiny_tokenizer, GRPOConfig(), rollout={"prompts": 3, "samples": 4}, batch_size=5)
    source.next_batch(0.0)
    groups: dict[int, list[Any]] = {}
    for sample in source.samples:
        groups.setdefault(sample.prompt, []).append(sample)
    for group in groups.values():
        assert len(group) == 4
        rewards = torch.tensor([sample.parts[REWARD] for sample in group], dtype=torch.float64)
        for sample, reward in zip(group, rewards, strict=True):
            wanted = float((reward - rewards.mean()) / (rewards.std() + 1e-4))
            assert set(sample.tokens["advantages"]) == {sample.tokens["advantages"][0]}
            assert sample.tokens["advantages"][0] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_groups_without_a_difference_are_replaced(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards dynamic sampling: equal groups are counted and replaced, no longer than allowed, and never learned from beside others."""
    for resample, asked in ((0, 4), (3, None)):
        source = grpo_source(model, tiny_tokenizer, GRPOConfig(resample=resample), prompts=12, judge=OddJudge())
        source.next_batch(0.0)
        kept = {sample.prompt for sample in source.samples}
        assert kept and all(number % 2 for number in kept)
        assert 0 < source.diagnostics["equal_groups"] < 1
        assert asked is None or source.diagnostics["groups"] == asked
        assert resample == 0 or len(source.samples) == 4 * 2
    events: list[str] = []
    hopeless = grpo_source(
        model, tiny_tokenizer, GRPOConfig(), judge=HashJudge(levels=1), alarm=lambda step, kind, details: events.append(kind)
    )
    batch = hopeless.next_batch(0.0)
    hopeless.note_update(batch.extra["old"], batch.extra["old"], True)
    assert events == ["rewards_collapsed"] and hopeless.diagnostics["groups"] == 3 * 4
    assert batch.weights["sequences"] == 8 and not batch.extra["advantages"].any()


def test_a_rollout_of_equal_groups_is_said(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against hours of rollouts that teach nothing because questions differ, and answers do not."""

    class ByQuestion(HashJudge):
        def __call__(self, pairs: Any) -> list[dict[str, float]]:
            return [{"reward": float(prompt.reference or 0)} for prompt, _ in pairs]

    events: list[tuple[str, Any]] = []
    source = grpo_source(
        model, tiny_tokenizer, GRPOConfig(resample=1), judge=ByQuestion(), alarm=lambda step, kind, details: events.append((kind, details))
    )
    batch = source.next_batch(0.0)
    source.note_update(batch.extra["old"], batch.extra["old"], True)
    assert events == [("groups_equal", {"groups": 8})]


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"])
def test_loss_equals_float64_maths(kind: str, model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards objective, aggregation and KL of a step of two micro-batches, answer by answer."""
    settings = GRPOConfig(loss=kind, beta=0.2, clip_low=0.1, clip_high=0.15)
    source = grpo_source(model, tiny_tokenizer, settings, batch_size=5)
    reference = SmartHaoAI(model.config).train()
    source.reference = lambda inputs: completion_log_probs(reference, inputs, TEMPERATURE).values.detach()
    batches = [source.next_batch(0.0), source.next_batch(0.0)]
    perturb(model, 0.02)
    parts = [[term for term in grpo_term(source, settings, TEMPERATURE, 12)(model, batch) if not term.metric] for batch in batches]
    totals = {name: sum(b.weights.get(name, 1.0) for b in batches) for name in ("tokens", "sequences", "micro_batches")}
    loss = sum(float(term.total.detach()) / totals[term.weight] for part in parts for term in part)

    expected = 0.0
    for batch in batches:
        new = completion_log_probs(model, batch.inputs, TEMPERATURE)
        lp, old, ref, a = (t.detach().double() for t in (new.values, *(batch.extra[n] for n in ("old", "reference", "advantages"))))
        ratio = (lp - old).exp()
        if kind == "cispo":
            each = -ratio.clamp(max=1.15) * a * lp
        elif kind == "sapo":
            sharp = torch.where(a > 0, 1.0, 1.05).double()
            each = -4 / sharp * torch.sigmoid(sharp * (ratio - 1)) * a
        else:
            each = torch.maximum(-ratio * a, -ratio.clamp(0.9, 1.15) * a)
        each = each + 0.2 * ratio * ((ref - lp).exp() - (ref - lp) - 1)
        for number in range(new.count):
            mine = each[new.sequence == number]
            if kind in ("grpo", "sapo"):
                expected += float(mine.mean()) / totals["sequences"]
            elif kind == "dr_grpo":
                expected += float(mine.sum()) / 12 / totals["sequences"]
            elif kind == "bnpo":
                expected += float(mine.sum()) / batch.weights["tokens"] / 2
            else:
                expected += float(mine.sum()) / totals["tokens"]
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    torch.manual_seed(1)
    SmartHaoAI(tiny_config).save_pretrained(folder / "sft", tiny_tokenizer)
    write_jsonl(folder / "prompts.jsonl", chat_rows(30))
    return folder


def words(base: Path, out: Path, *more: str) -> list[str]:
    return [
        *FAST,
        f"model_dir={base / 'sft'}",
        f"data.prompt_file={base / 'prompts.jsonl'}",
        f"out_dir={out}",
        "data.max_length=96",
        "data.val_share=0.2",
        "rollout.prompts=4",
        "rollout.samples=4",
        "rollout.max_new_tokens=10",
        "rewards.variety=1",
        "train.batch_size=8",
        "train.accumulation_steps=1",
        "train.log_every=1",
        "train.max_steps=5",
        "train.checkpoint_every=3",
        "train.lr=1e-3",
        "grpo.epochs=2",
        "grpo.beta=0.05",
        *more,
    ]


def test_stage_and_resume(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the whole command, its exact first update, and bit-exact resume after a kill in the middle of a rollout."""
    quiet: Any = lambda text: None  # noqa: E731
    assert grpo(parse_command_line(GRPOStageConfig, words(base, tmp_path / "straight")), quiet) == 0
    before, *rows = read_jsonl(tmp_path / "straight" / "metrics.jsonl")
    assert before["step"] == 0 and {"val_reward", "val_exact"} <= before.keys()
    first = [rows[0][name] for name in ("ratio", "kl", "kl_loss", "clip_fraction")]
    assert first == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-7)
    assert rows[1]["ratio"] != 1.0, "the second update of a rollout has moved"
    for name in ("reward", "reward_exact", "reward_format", "reward_variety", "equal_groups", "groups", "length", "entropy"):
        assert rows[0][name] is not None, name
    assert "val_exact" in rows[-1] and (tmp_path / "straight" / "grpo.png").stat().st_size > 10_000

    class Killed(Exception):
        pass

    original, calls = RolloutSource.note_update, []

    def dies(self: RolloutSource, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RolloutSource, "note_update", dies)
        grpo(parse_command_line(GRPOStageConfig, words(base, tmp_path / "killed")), quiet)
    assert grpo(parse_command_line(GRPOStageConfig, words(base, tmp_path / "killed", "--resume")), quiet) == 0
    one, two = (SmartHaoAI.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_input(base: Path, tmp_path: Path) -> None:
    """Guards the messages: one answer per question, an unknown loss, and prompts without a result that could be compared."""
    for wrong, field in (
        ("rollout.samples=1", "rollout.samples"),
        ("grpo.loss=ppo", "grpo.loss"),
        ("rollout.temperature=0", "temperature"),
    ):
        with pytest.raises(UsageError, match=field):
            parse_command_line(GRPOStageConfig, [wrong])
    talk = [{"prompt": f"Tell me about cat {n}.", "response": "It is a cat that sleeps all day long."} for n in range(5)]
    file = write_jsonl(tmp_path / "talk.jsonl", talk)
    with pytest.raises(ValueError, match="5 without a result that can be checked"):
        grpo(parse_command_line(GRPOStageConfig, words(base, tmp_path / "out", f"data.prompt_file={file}")), lambda text: None)
